"""This module tells when a cohort is frozen and when it is let go, by people or by time, and when a whole
fleet stands by that.

What was told is kept with the cohort (`CohortStatus.frozen_by`, `frozen_by_hand`, and until when) and stored
by the same compare-and-swap as its directive, so that each beginning and each end is told once. A freeze that
stands is told again when its end is another, or the entry of the calendar it stands by.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import select

from agent_core.clock import iso
from release_server import audit
from release_server.models import Cohort, CohortStatus, Webhook
from release_server.webhooks import events, outbox

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session


@dataclass(frozen=True)
class Stand:
    """What freezes a cohort, each cause by itself.

    Attributes:
        by: the entry of the calendar that began it; None where none holds.
        until: when the calendar lets it go.
        by_hand: a person's freeze stands, until `hand_until`, or without end.
    """

    by: str | None = None
    until: datetime | None = None
    by_hand: bool = False
    hand_until: datetime | None = None


@dataclass(frozen=True)
class Act:
    """Who did what led to a change, and when; the server is who, where time did."""

    actor: str = audit.SERVER
    reason: str = ""
    at: datetime | None = None


BY_TIME = Act()
LATE = timedelta(minutes=1)
"""Of what is noticed later than this the audit log says when it was."""


def tell(session: Session, now: datetime, cohort: Cohort, before: Stand, after: Stand, act: Act) -> None:
    """Tell and audit what of a cohort's freezes has begun and ended between two stands, just stored."""
    if (before.by_hand, before.hand_until) != (after.by_hand, after.hand_until):
        _tell_hand(session, now, cohort, after, act)
    if (before.by, before.until) != (after.by, after.until):
        if after.by:
            _tell_calendar(session, now, cohort, act.at, after.by, after.until)
        elif before.by:
            _tell_calendar(session, now, cohort, act.at, before.by, frozen=False)
    stood, stands = (bool(stand.by or stand.by_hand) for stand in (before, after))
    if stood != stands and _has_webhooks(session) and not _another_moves(session, cohort):
        kind = events.FLEET_STOPPED if stands else events.FLEET_RESUMED
        said = {"reason": act.reason, "actor": act.actor}
        outbox.tell(session, now, kind, cohort.product.name, act.at, **said)


def _tell_hand(session: Session, now: datetime, cohort: Cohort, after: Stand, act: Act) -> None:
    reason = act.reason
    if act.actor == audit.SERVER and not after.by_hand:
        reason = "its time is over"
        _audit(session, now, cohort, act.at, "cohort.unfreeze", reason=reason)
    _put(session, now, cohort, replace(act, reason=reason), "", after.hand_until, frozen=after.by_hand)


def _tell_calendar(
    session: Session,
    now: datetime,
    cohort: Cohort,
    at: datetime | None,
    by: str,
    until: datetime | None = None,
    *,
    frozen: bool = True,
) -> None:
    ends = {"until": iso(until)} if until else {}
    _audit(session, now, cohort, at, "cohort.freeze" if frozen else "cohort.unfreeze", by=by, **ends)
    _put(session, now, cohort, Act(reason=f"by its calendar: {by}", at=at), by, until, frozen=frozen)


def _audit(
    session: Session, now: datetime, cohort: Cohort, at: datetime | None, action: str, **detail: str
) -> None:
    if at is not None and now - at > LATE:
        detail["at"] = iso(at)
    audit.record(session, now, audit.SERVER, action, f"{cohort.product.name}/{cohort.name}", **detail)


def _put(
    session: Session,
    now: datetime,
    cohort: Cohort,
    act: Act,
    by: str,
    until: datetime | None,
    *,
    frozen: bool,
) -> None:
    if not _has_webhooks(session):
        return
    kind = events.COHORT_FROZEN if frozen else events.COHORT_UNFROZEN
    ends = iso(until) if frozen and until else None
    said = {"until": ends, "by": by, "reason": act.reason, "actor": act.actor}
    outbox.tell(session, now, kind, cohort.product.name, act.at, cohort=cohort.name, **said)


def _has_webhooks(session: Session) -> bool:
    return session.execute(select(Webhook.id).limit(1)).first() is not None


def _another_moves(session: Session, cohort: Cohort) -> bool:
    """Whether another cohort of the product is not frozen, as far as that was told."""
    moving = (
        select(Cohort.id)
        .join(CohortStatus, CohortStatus.cohort_id == Cohort.id)
        .where(Cohort.product_id == cohort.product_id, Cohort.id != cohort.id, Cohort.deleted_at.is_(None))
        .where(CohortStatus.frozen_by.is_(None), CohortStatus.frozen_by_hand.is_(False))
    )
    return session.execute(moving.limit(1)).first() is not None
