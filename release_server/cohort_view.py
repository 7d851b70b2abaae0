"""Cohorts as people see them: what is wanted of each, what is so, and what holds it just now."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, func, or_, select

from release_server import cohorts, releases
from release_server.membership import is_newest
from release_server.models import Agent, Cohort, CohortSpec, CohortStatus

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.freezes import Freeze


@dataclass(frozen=True)
class View:
    """A cohort as people see it; `freeze` is what keeps it from taking anything new now."""

    cohort: Cohort
    spec: CohortSpec
    status: CohortStatus
    agents: int
    freeze: Freeze | None
    by_hand: bool


def list_cohorts(
    session: Session,
    now: datetime,
    product: str | None = None,
    *,
    pinned: bool | None = None,
    limit: int | None = None,
    after: tuple[int, str] | None = None,
) -> list[View]:
    """All cohorts, or those of one product, by name.

    Args:
        after: product and name of the cohort that they come after.
    """
    query = _views()
    if product is not None:
        query = query.where(Cohort.product_id == releases.find_product(session, product).id)
    if pinned is not None:
        query = query.where(CohortSpec.pin.is_not(None) if pinned else CohortSpec.pin.is_(None))
    if after is not None:
        owner, name = after
        later = and_(Cohort.product_id == owner, Cohort.name > name)
        query = query.where(or_(Cohort.product_id > owner, later))
    query = query.order_by(Cohort.product_id, Cohort.name).limit(limit)
    return [_view(row, now) for row in session.execute(query)]


def show(session: Session, now: datetime, product: str, name: str) -> View:
    """One cohort.

    Raises:
        NotFoundError: no such product, or no such cohort.
    """
    cohort = cohorts.find(session, product, name)
    return _view(session.execute(_views().where(Cohort.id == cohort.id)).one(), now)


def _views() -> Any:
    agents = (
        select(func.count(Agent.id))
        .where(Agent.cohort_id == Cohort.id, Agent.retired_at.is_(None))
        .correlate(Cohort)
        .scalar_subquery()
    )
    return (
        select(Cohort, CohortSpec, CohortStatus, agents)
        .join(CohortSpec, CohortSpec.cohort_id == Cohort.id)
        .join(CohortStatus, CohortStatus.cohort_id == Cohort.id)
        .where(Cohort.deleted_at.is_(None), is_newest())
        .execution_options(populate_existing=True)
    )


def _view(row: Any, now: datetime) -> View:
    cohort, spec, status, agents = row
    by_hand = cohorts.is_frozen_by_hand(spec, now)
    return View(cohort, spec, status, agents, cohorts.freeze_of(spec, now), by_hand)
