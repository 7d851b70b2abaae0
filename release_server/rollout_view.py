"""Rollouts as people see them: lists, one with its counters, and its history."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import and_, func, select

from agent_core.errors import NotFoundError
from agent_core.wire import AttemptState
from release_server import attempts, releases
from release_server.models import (
    Agent,
    Cohort,
    Rollout,
    RolloutCounter,
    RolloutEvent,
    RolloutSpec,
    RolloutStatus,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session


@dataclass(frozen=True)
class View:
    """A rollout as people see it; `members` are the agents of its cohort."""

    rollout: Rollout
    product: str
    cohort: str
    spec: RolloutSpec
    status: RolloutStatus
    members: int
    counters: dict[str, int]


def list_rollouts(
    session: Session,
    *,
    product: str | None = None,
    cohort: str | None = None,
    version: str | None = None,
    state: str | None = None,
    limit: int = 100,
    after: int | None = None,
) -> list[View]:
    """Rollouts, the newest first, at most `limit`, those that come after the one of id `after`."""
    conditions: list[ColumnElement[bool]] = []
    if product is not None:
        conditions.append(Cohort.product_id == releases.find_product(session, product).id)
    if cohort is not None:
        conditions.append(Cohort.name == cohort)
    if version is not None:
        conditions.append(Rollout.version == version)
    if state is not None:
        conditions.append(RolloutStatus.state == state)
    if after is not None:
        conditions.append(Rollout.id < after)
    return _views(session, conditions, limit)


def show(session: Session, rollout_id: int) -> View:
    """One rollout.

    Raises:
        NotFoundError: there is none of that number.
    """
    found = _views(session, [Rollout.id == rollout_id], 1)
    if not found:
        raise NotFoundError(f"there is no rollout r-{rollout_id}", then="release rollout list")
    return found[0]


def events(session: Session, rollout_id: int, limit: int = 500) -> Sequence[RolloutEvent]:
    """What happened to a rollout, oldest first; of very many the last."""
    query = select(RolloutEvent).where(RolloutEvent.rollout_id == rollout_id)
    return session.scalars(query.order_by(RolloutEvent.id.desc()).limit(limit)).all()[::-1]


def _views(session: Session, conditions: Sequence[ColumnElement[bool]], limit: int) -> list[View]:
    newest = (
        select(func.max(RolloutSpec.revision))
        .where(RolloutSpec.rollout_id == Rollout.id)
        .correlate(Rollout)
        .scalar_subquery()
    )
    members = (
        select(func.count(Agent.id))
        .where(Agent.cohort_id == Rollout.cohort_id, Agent.retired_at.is_(None))
        .correlate(Rollout)
        .scalar_subquery()
    )
    rows = session.execute(
        select(Rollout, Cohort, RolloutSpec, RolloutStatus, members)
        .join(Cohort, Cohort.id == Rollout.cohort_id)
        .join(RolloutStatus, RolloutStatus.rollout_id == Rollout.id)
        .join(RolloutSpec, and_(RolloutSpec.rollout_id == Rollout.id, RolloutSpec.revision == newest))
        .where(*conditions)
        .order_by(Rollout.id.desc())
        .limit(limit)
        .execution_options(populate_existing=True)
    ).all()
    counted = _counted(session, [row[0].id for row in rows])
    return [
        View(rollout, cohort.product.name, cohort.name, spec, status, count, counted[rollout.id])
        for rollout, cohort, spec, status, count in rows
    ]


def _counted(session: Session, rollout_ids: Sequence[int]) -> dict[int, dict[str, int]]:
    counted = {rollout_id: dict.fromkeys(map(str, AttemptState), 0) for rollout_id in rollout_ids}
    query = select(RolloutCounter.rollout_id, RolloutCounter.state, RolloutCounter.count)
    here = query.where(RolloutCounter.rollout_id.in_(rollout_ids), RolloutCounter.state != attempts.SENT_BACK)
    for rollout_id, state, count in session.execute(here):
        counted[rollout_id][state] = count
    return counted
