"""Moves rollouts along: the only orchestrator on the server.

A tick takes each rollout that can move, counts what its fleet looks like, asks `rollout.reconcile` for the
next status and stores it by compare-and-swap, until nothing moves any more; then the cohort's directive
follows. What people ask goes the same way, in the transaction of the asking, so the answer shows its effect.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, func, select, update

from agent_core.errors import ConflictError, NotFoundError
from agent_core.wire import AttemptState
from release_server import agents, audit, census, cohorts, releases
from release_server.models import (
    Attempt,
    Rollout,
    RolloutEvent,
    RolloutSpec,
    RolloutStatus,
)
from release_server.rollout import (
    MOVING,
    Spec,
    StageState,
    State,
    Status,
    Wanted,
    reconcile,
)
from release_server.stages import Stage

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.rollout import Event

log = logging.getLogger(__name__)


# --- the tick --------------------------------------------------------------------------------------------


def tick(session: Session, now: datetime) -> bool:
    """Bring every rollout as far as it can go now; the work grows with the rollouts that move.

    Returns:
        Whether anything changed.
    """
    changed = cohorts.refresh_due(session, now)
    for rollout_id in _movable(session):
        changed = _settle_apart(session, now, rollout_id) or changed
    return changed


def _movable(session: Session) -> Sequence[int]:
    """Rollouts that time or agents may move, and those whose newest wish has not been answered."""
    asked = (
        select(func.max(RolloutSpec.revision))
        .where(RolloutSpec.rollout_id == RolloutStatus.rollout_id)
        .scalar_subquery()
    )
    unanswered = and_(RolloutStatus.state == str(State.PAUSED), RolloutStatus.spec_revision < asked)
    moving = RolloutStatus.state.in_([str(state) for state in MOVING])
    query = select(RolloutStatus.rollout_id).where(moving | unanswered)
    return session.scalars(query.order_by(RolloutStatus.rollout_id)).all()


def _settle_apart(session: Session, now: datetime, rollout_id: int) -> bool:
    """Settle one rollout under a savepoint: a mistake in one must not stop the others, nor the signing."""
    try:
        with session.begin_nested():
            return settle(session, now, rollout_id)
    except ConflictError as error:
        log.info("a rollout was changed meanwhile", extra={"rollout": rollout_id, "why": str(error)})
    except Exception:
        log.exception("a rollout could not be reconciled", extra={"rollout": rollout_id})
    return False


def settle(session: Session, now: datetime, rollout_id: int) -> bool:
    """Reconcile one rollout until nothing moves, and make its cohort's directive anew when something did.

    Raises:
        ConflictError: another transaction moved it meanwhile; nothing of this one may be kept.
    """
    rollout = session.get_one(Rollout, rollout_id)
    asked = newest_spec(session, rollout_id)
    spec = _spec(session, now, rollout, asked)
    changed = False
    for _ in range(2 * len(spec.stages) + 8):
        row = session.get_one(RolloutStatus, rollout_id, populate_existing=True)
        status = status_of(row)
        seen = census.census(session, now, rollout, spec, status)
        following = reconcile(spec, status, seen, now)
        if following.status == status:
            break
        actor = asked.actor if asked.revision > status.spec_revision else ""
        _store(session, now, row, following.status)
        _record(session, now, rollout_id, following.events, actor)
        changed = True
    if changed:
        done = status_of(session.get_one(RolloutStatus, rollout_id, populate_existing=True))
        base = rollout.version if done.state is State.COMPLETED else None
        cohorts.refresh_directive(session, now, rollout.cohort, base=base)
    return changed


def _spec(session: Session, now: datetime, rollout: Rollout, asked: RolloutSpec) -> Spec:
    cohort = cohorts.newest_spec(session, rollout.cohort_id)
    return Spec(
        stages=tuple(Stage.from_json(stage) for stage in asked.stages),
        wanted=Wanted(asked.wanted),
        advance_to=asked.advance_to,
        revision=asked.revision,
        pinned=cohort.pin is not None,
        frozen=cohorts.is_frozen(cohort, now),
    )


def status_of(row: RolloutStatus) -> Status:
    """A stored status as `reconcile` knows it."""
    return Status(
        state=State(row.state),
        stage=row.stage,
        stage_state=StageState(row.stage_state),
        progress=row.progress,
        reason=row.reason,
        detail=row.detail,
        opened_at=row.opened_at,
        soaking_since=row.soaking_since,
        finished_at=row.finished_at,
        spec_revision=row.spec_revision,
        tolerated=row.tolerated,
        tolerated_silent=row.tolerated_silent,
    )


def _store(session: Session, now: datetime, row: RolloutStatus, status: Status) -> None:
    """Compare-and-swap on `edition`: of two that saw the same status one stores, the other starts over."""
    stored = session.execute(
        update(RolloutStatus)
        .where(RolloutStatus.rollout_id == row.rollout_id, RolloutStatus.edition == row.edition)
        .values(
            state=str(status.state),
            stage=status.stage,
            stage_state=str(status.stage_state),
            progress=status.progress,
            reason=status.reason,
            detail=status.detail,
            opened_at=status.opened_at,
            soaking_since=status.soaking_since,
            finished_at=status.finished_at,
            spec_revision=status.spec_revision,
            tolerated=status.tolerated,
            tolerated_silent=status.tolerated_silent,
            edition=row.edition + 1,
            updated_at=now,
        )
        .returning(RolloutStatus.rollout_id)
        .execution_options(synchronize_session=False)
    ).first()
    if stored is None:
        raise ConflictError(f"r-{row.rollout_id} was changed meanwhile", then="look at it and try again")


def _record(session: Session, now: datetime, rollout_id: int, events: Sequence[Event], actor: str) -> None:
    session.add_all(
        RolloutEvent(
            rollout_id=rollout_id,
            at=now,
            event=event.name,
            stage=event.stage,
            reason=event.reason,
            detail=event.detail,
            numbers=dict(event.numbers),
            actor=actor,
        )
        for event in events
    )
    session.flush()


# --- what people ask -------------------------------------------------------------------------------------


def pause(session: Session, now: datetime, actor: str, rollout_id: int, reason: str = "") -> None:
    """Stop a rollout where it is: nobody new is offered the release.

    Raises:
        ConflictError: it is not moving.
    """
    _require(session, rollout_id, "paused", State.SCHEDULED, State.RUNNING)
    ask(session, now, actor, rollout_id, wanted=Wanted.PAUSE, reason=reason)
    _done(session, now, actor, "rollout.pause", rollout_id, reason=reason)


def resume(session: Session, now: datetime, actor: str, rollout_id: int, reason: str = "") -> None:
    """Let a paused rollout go on; after a halt this tolerates what has failed so far, and nothing more.

    Raises:
        ConflictError: it is not paused, its cohort is pinned, or its release was yanked.
    """
    status = _require(session, rollout_id, "resumed", State.PAUSED)
    rollout = session.get_one(Rollout, status.rollout_id)
    releases.refuse_yanked(rollout.release)
    cohort = rollout.cohort
    pinned = cohorts.newest_spec(session, cohort.id).pin
    if pinned is not None:
        raise ConflictError(
            f"cohort {cohort.name} is pinned to {pinned}",
            then=f"release cohort unpin {cohort.name}",
            reason="pinned",
        )
    ask(session, now, actor, rollout_id, wanted=Wanted.RESUME, reason=reason)
    _done(session, now, actor, "rollout.resume", rollout_id, reason=reason)


def advance(session: Session, now: datetime, actor: str, rollout_id: int, reason: str = "") -> None:
    """Open the next stage now, without waiting for this one's gate; after the last one it is complete.

    Raises:
        ConflictError: it is not running.
    """
    status = _require(session, rollout_id, "advanced", State.RUNNING)
    ask(session, now, actor, rollout_id, wanted=Wanted.RUN, advance_to=status.stage + 1, reason=reason)
    _done(session, now, actor, "rollout.advance", rollout_id, reason=reason)


def abort(
    session: Session, now: datetime, actor: str, rollout_id: int, reason: str = "", *, rollback: bool = False
) -> None:
    """End a rollout for good. Agents that have the release keep it; `rollback` takes them back to the base.

    Raises:
        ConflictError: it has ended, or there is nothing to go back to.
    """
    row = _require(session, rollout_id, "aborted", *_abortable(rollback=rollback))
    rollout = session.get_one(Rollout, rollout_id)
    if rollback and cohorts.status_of(session, rollout.cohort_id).base is None:
        raise ConflictError(
            f"r-{rollout_id} cannot go back",
            why="its cohort had no release before",
            then="abort without --rollback",
        )
    newest = cohorts.newest_rollout(session, rollout.cohort_id)
    if row.state == State.ABORTED and newest and newest[0].id != rollout_id:
        raise ConflictError(f"r-{newest[0].id} has taken the place of r-{rollout_id}", reason="superseded")
    ask(
        session,
        now,
        actor,
        rollout_id,
        wanted=Wanted.ABORT_ROLLBACK if rollback else Wanted.ABORT,
        reason=reason,
    )
    _done(session, now, actor, "rollout.abort", rollout_id, reason=reason, rollback=rollback)


def _abortable(*, rollback: bool) -> tuple[State, ...]:
    states = (State.DRAFT, State.SCHEDULED, State.RUNNING, State.PAUSED)
    return (*states, State.ABORTED) if rollback else states


def retry(session: Session, now: datetime, actor: str, rollout_id: int, reason: str = "") -> None:
    """Let agents that failed try once more: their attempts begin anew, and a halted rollout goes on.

    Raises:
        ConflictError: it was given up, or its cohort is pinned.
    """
    row = _require(session, rollout_id, "retried", State.RUNNING, State.PAUSED, State.COMPLETED)
    rollout = session.get_one(Rollout, rollout_id)
    cohorts.bump_retry(session, now, actor, rollout.cohort, reason)
    again = (*agents.FAILED, AttemptState.SKIPPED)
    failed = session.scalars(
        select(Attempt.agent_id).where(
            Attempt.rollout_id == rollout_id, Attempt.state.in_([str(state) for state in again])
        )
    ).all()
    for agent_id in failed:
        agents.move_attempt(session, now, agent_id, rollout, AttemptState.OFFERED, reason="retry")
    if row.state == State.PAUSED:
        resume(session, now, actor, rollout_id, reason)
    _done(session, now, actor, "rollout.retry", rollout_id, reason=reason, agents=len(failed))


def _require(session: Session, rollout_id: int, verb: str, *states: State) -> RolloutStatus:
    row = session.get(RolloutStatus, rollout_id, populate_existing=True)
    if row is None:
        raise NotFoundError(f"there is no rollout r-{rollout_id}", then="release rollout list")
    if row.state not in states:
        raise ConflictError(
            f"r-{rollout_id} cannot be {verb}",
            why=f"it is {row.state.replace('_', ' ')}",
            then=f"release rollout status r-{rollout_id}",
        )
    return row


def ask(
    session: Session,
    now: datetime,
    actor: str,
    rollout_id: int,
    *,
    wanted: Wanted,
    reason: str,
    **changes: Any,
) -> None:
    """Write down the next revision of what is wanted; what is not said stays."""
    newest = session.scalar(_specs(rollout_id).limit(1))
    kept = {"stages": newest.stages, "advance_to": newest.advance_to} if newest else {}
    session.add(
        RolloutSpec(
            rollout_id=rollout_id,
            revision=newest.revision + 1 if newest else 1,
            wanted=str(wanted),
            actor=actor,
            reason=reason,
            created_at=now,
            **(kept | changes),
        )
    )
    session.flush()


def _done(session: Session, now: datetime, actor: str, action: str, rollout_id: int, **detail: Any) -> None:
    audit.record(session, now, actor, action, f"r-{rollout_id}", **detail)
    settle(session, now, rollout_id)


def _specs(rollout_id: int) -> Any:
    return (
        select(RolloutSpec).where(RolloutSpec.rollout_id == rollout_id).order_by(RolloutSpec.revision.desc())
    )


def newest_spec(session: Session, rollout_id: int) -> RolloutSpec:
    spec: RolloutSpec = session.scalars(_specs(rollout_id).limit(1)).one()
    return spec
