"""This module tells when people freeze a cohort or let it go, and when a whole fleet stands by that."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select
from sqlalchemy.orm import aliased

from agent_core.clock import iso
from release_server.models import Cohort, CohortSpec, Webhook
from release_server.webhooks import events, outbox

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session


def tell_frozen(
    session: Session,
    now: datetime,
    actor: str,
    cohort: Cohort,
    *,
    frozen: bool,
    until: datetime | None = None,
    reason: str = "",
) -> None:
    """Tell that a cohort was frozen or unfrozen by hand just now, and what that makes of its fleet."""
    if session.execute(select(Webhook.id).limit(1)).first() is None:
        return
    said = {"reason": reason, "actor": actor}
    ends = None if until is None else iso(until)
    kind = events.COHORT_FROZEN if frozen else events.COHORT_UNFROZEN
    outbox.tell(session, now, kind, cohort.product.name, cohort=cohort.name, until=ends, **said)
    if not _another_moves(session, now, cohort):
        kind = events.FLEET_STOPPED if frozen else events.FLEET_RESUMED
        outbox.tell(session, now, kind, cohort.product.name, **said)


def _another_moves(session: Session, now: datetime, cohort: Cohort) -> bool:
    """Whether another cohort of the product is not frozen by hand."""
    any_spec = aliased(CohortSpec)
    newest = select(func.max(any_spec.revision)).where(any_spec.cohort_id == Cohort.id).scalar_subquery()
    moving = (
        select(Cohort.id)
        .join(CohortSpec, CohortSpec.cohort_id == Cohort.id)
        .where(Cohort.product_id == cohort.product_id, Cohort.id != cohort.id, Cohort.deleted_at.is_(None))
        .where(CohortSpec.revision == newest)
        .where(CohortSpec.frozen.is_(False) | (CohortSpec.frozen_until <= now))
    )
    return session.execute(moving.limit(1)).first() is not None
