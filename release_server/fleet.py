"""Moves rollouts along: the only orchestrator on the server.

A tick takes each rollout that can move, counts what its fleet looks like, asks `rollout.reconcile` for the
next status and stores it by compare-and-swap, until nothing moves any more; then the cohort's directive
follows. What people ask goes the same way, in the transaction of the asking, so the answer shows its effect.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, func, select, update

from agent_core.errors import ConflictError, NotAllowedError, NotFoundError
from agent_core.window import is_open
from agent_core.wire import AttemptState, Window
from release_server import attempts, audit, census, cohorts, releases, ways
from release_server.members import FAILED
from release_server.models import (
    Attempt,
    Rollout,
    RolloutEvent,
    RolloutSpec,
    RolloutStatus,
)
from release_server.rollout import (
    MOVING,
    RETURNABLE,
    WAITING,
    Spec,
    StageState,
    State,
    Status,
    Wanted,
    reconcile,
)
from release_server.specs import ask, newest_spec
from release_server.stages import Stage
from release_server.terms import Terms, plan_digest
from release_server.webhooks import events, outbox

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
    for rollout_id in _movable(session, now):
        changed = _settle_apart(session, now, rollout_id) or changed
    return changed


def _movable(session: Session, now: datetime) -> Sequence[int]:
    """Rollouts that time or agents may move, those watched, and those whose newest wish is not answered."""
    asked = (
        select(func.max(RolloutSpec.revision))
        .where(RolloutSpec.rollout_id == RolloutStatus.rollout_id)
        .scalar_subquery()
    )
    waits = RolloutStatus.state.in_([str(state) for state in WAITING])
    unanswered = and_(waits, RolloutStatus.spec_revision < asked)
    moving = RolloutStatus.state.in_([str(state) for state in MOVING])
    query = select(RolloutStatus.rollout_id).where(moving | unanswered | (RolloutStatus.watch_at <= now))
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
    spec = spec_now(session, now, rollout, asked)
    before = status_of(session.get_one(RolloutStatus, rollout_id, populate_existing=True))
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
        if before.stage_state is StageState.PENDING and done.stage_state is not StageState.PENDING:
            _end_others(session, now, rollout, asked.actor)
        cohorts.refresh_directive(
            session, now, rollout.cohort, base=_base_after(rollout, before.state, done.state)
        )
    return changed


def _base_after(rollout: Rollout, before: State, after: State) -> str | None:
    """What the cohort has settled on: the release from its completion on, and what was before once undone."""
    if before is after:
        return None
    if after is State.COMPLETED:
        return rollout.version
    return rollout.base if before is State.COMPLETED else None


def _end_others(session: Session, now: datetime, rollout: Rollout, actor: str) -> None:
    """One that begins takes the place of all that began before it, and ends the watch over them."""
    for other, _ in cohorts.unfinished(session, rollout.cohort_id):
        if other.id != rollout.id:
            supersede(session, now, actor, other.id, rollout.version)
    before = select(Rollout.id).where(Rollout.cohort_id == rollout.cohort_id, Rollout.id != rollout.id)
    watched = update(RolloutStatus).where(
        RolloutStatus.rollout_id.in_(before), RolloutStatus.watch_at.is_not(None)
    )
    session.execute(
        watched.values(watch_until=None, watch_at=None, edition=RolloutStatus.edition + 1).execution_options(
            synchronize_session=False
        )
    )


def supersede(session: Session, now: datetime, actor: str, rollout_id: int, version: str) -> None:
    """End a rollout because another one, to `version`, takes its place."""
    ask(session, now, actor, rollout_id, wanted=Wanted.SUPERSEDE, reason=f"for {version}")
    settle(session, now, rollout_id)


def has_begun(status: RolloutStatus) -> bool:
    """Whether any agent may have been offered the release."""
    return status.stage_state != StageState.PENDING


def spec_of(asked: RolloutSpec) -> Spec:
    """What people want of a rollout by itself, without what its cohort allows."""
    terms = Terms.from_json(asked.terms)
    return Spec(
        stages=tuple(Stage.from_json(stage) for stage in asked.stages),
        wanted=Wanted(asked.wanted),
        advance_to=asked.advance_to,
        revision=asked.revision,
        not_before=terms.not_before,
        approval=terms.approval,
        stratified=terms.stratified,
        watch_s=terms.watch_s,
        false_halt_bp=terms.false_halt_bp,
        figures=terms.figures,
    )


def spec_now(session: Session, now: datetime, rollout: Rollout, asked: RolloutSpec) -> Spec:
    """What people want of a rollout, and what its cohort allows just now."""
    cohort = cohorts.newest_spec(session, rollout.cohort_id)
    window = None if cohort.window is None else Window.from_json(cohort.window, "window")
    return replace(
        spec_of(asked),
        pinned=cohort.pin is not None or _is_overtaken(session, rollout),
        frozen=cohorts.is_frozen(cohort, now) or rollout.cohort.product.stopped is not None,
        approved=bool(asked.approved) and asked.approved == digest_of(rollout, asked),
        window_open=window is None or is_open(window, now),
    )


def _is_overtaken(session: Session, rollout: Rollout) -> bool:
    """Whether a pin has come and gone under a running rollout, and has taken its cohort elsewhere."""
    running = session.get_one(RolloutStatus, rollout.id).state == State.RUNNING
    return running and cohorts.status_of(session, rollout.cohort_id).base != rollout.base


def digest_of(rollout: Rollout, asked: RolloutSpec) -> str:
    """What an approval of this rollout is bound to."""
    cohort, stages = rollout.cohort, tuple(Stage.from_json(stage) for stage in asked.stages)
    terms = Terms.from_json(asked.terms)
    return plan_digest(cohort.product.name, cohort.name, rollout.version, stages, terms, rollout.base)


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
        excused=tuple(row.excused),
        watch_until=row.watch_until,
        watch_at=row.watch_at,
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
            excused=list(status.excused),
            watch_until=status.watch_until,
            watch_at=status.watch_at,
            edition=row.edition + 1,
            updated_at=now,
        )
        .returning(RolloutStatus.rollout_id)
        .execution_options(synchronize_session=False)
    ).first()
    if stored is None:
        raise ConflictError(f"r-{row.rollout_id} was changed meanwhile", then="look at it and try again")


def _record(session: Session, now: datetime, rollout_id: int, happened: Sequence[Event], actor: str) -> None:
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
        for event in happened
    )
    for event in happened:
        if event.name == "halted":
            said = {"stage": event.stage, "reason": event.reason, "detail": event.detail}
            audit.record(session, now, audit.SERVER, "rollout.halt", f"r-{rollout_id}", **said)
    session.flush()
    for event in happened:
        _tell(session, now, rollout_id, event, actor)


def _tell(session: Session, now: datetime, rollout_id: int, event: Event, actor: str) -> None:
    kind = events.OF_ROLLOUTS.get(event.name)
    if kind is None:
        return
    rollout = session.get_one(Rollout, rollout_id)
    outbox.tell(
        session,
        now,
        kind,
        rollout.cohort.product.name,
        rollout=f"r-{rollout_id}",
        cohort=rollout.cohort.name,
        version=rollout.version,
        base=rollout.base,
        stage=event.stage + 1,
        reason=event.reason,
        detail=event.detail,
        numbers=dict(event.numbers),
        actor=actor or audit.SERVER,
    )


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
    """Let a paused rollout go on, or submit a draft; after a halt this tolerates what has failed so far.

    Raises:
        ConflictError: it is not paused, its cohort is pinned or has gone past it, or its release was yanked.
    """
    status = _require(session, rollout_id, "resumed", State.PAUSED, State.DRAFT)
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
    base = cohorts.status_of(session, cohort.id).base
    ways.check_again(session, rollout, base)
    rollout.base = base
    ask(session, now, actor, rollout_id, wanted=Wanted.RESUME, reason=reason)
    _done(session, now, actor, "rollout.resume", rollout_id, reason=reason)


def approve(
    session: Session, now: datetime, actor: str, rollout_id: int, reason: str = "", *, digest: str
) -> None:
    """Let a rollout begin that waits for a second person.

    Args:
        digest: of the plan that this person has looked at, so that no other one is approved.

    Raises:
        ConflictError: it does not wait for that, its plan is another, or its release was yanked meanwhile.
        NotAllowedError: this person asked for it.
    """
    _require(session, rollout_id, "approved", State.AWAITING_APPROVAL)
    rollout, asked = session.get_one(Rollout, rollout_id), newest_spec(session, rollout_id)
    releases.refuse_yanked(rollout.release)
    if digest != digest_of(rollout, asked):
        raise ConflictError(
            f"r-{rollout_id} is not the plan that was looked at",
            why=f"its digest is {digest_of(rollout, asked)[:12]}",
            then=f"release rollout status r-{rollout_id}",
            reason="changed",
        )
    if audit.identity(actor) in {audit.identity(asker) for asker in askers(session, rollout)}:
        raise NotAllowedError(
            f"{actor} asked for r-{rollout_id}",
            why="a second person approves",
            then=f"have somebody else type: release rollout approve r-{rollout_id}",
            reason="self-approval",
        )
    ask(session, now, actor, rollout_id, wanted=Wanted(asked.wanted), reason=reason, approved=digest)
    _done(session, now, actor, "rollout.approve", rollout_id, reason=reason, digest=digest)


def askers(session: Session, rollout: Rollout) -> set[str]:
    """Everyone who had a hand in what a rollout is to do; who approved it has none."""
    of = select(RolloutSpec.actor, RolloutSpec.approved).where(RolloutSpec.rollout_id == rollout.id)
    rows = session.execute(of.order_by(RolloutSpec.revision)).all()
    asked = [after.actor for before, after in pairwise(rows) if after.approved == before.approved]
    return {rollout.created_by, rows[0].actor, *asked}


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
    _check_newest(session, rollout, row)
    if rollback:
        _check_way_back(session, rollout, row)
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
    states = (State.SCHEDULED, State.RUNNING, *sorted(WAITING))
    return (*states, State.ABORTED) if rollback else states


def _check_way_back(session: Session, rollout: Rollout, row: RolloutStatus) -> None:
    """Agents go back to what their cohort is on; to the rollout's own version the way has no end."""
    base = cohorts.status_of(session, rollout.cohort_id).base
    if base is None:
        raise ConflictError(
            f"r-{rollout.id} cannot go back",
            why="its cohort had no release before",
            then="abort without --rollback",
        )
    if base == rollout.version and row.state != State.COMPLETED:
        raise ConflictError(
            f"r-{rollout.id} cannot go back",
            why=f"cohort {rollout.cohort.name} is on {base} itself by now",
            then=f"to go back all the same: {_pin_back(rollout)}",
            reason="already-there",
        )


def _pin_back(rollout: Rollout) -> str:
    return f"release cohort pin {rollout.cohort.name} {rollout.base or 'VERSION'}"


def _check_newest(session: Session, rollout: Rollout, row: RolloutStatus) -> None:
    newest = cohorts.newest_rollout(session, rollout.cohort_id)
    if row.state in RETURNABLE and newest and newest[0].id != rollout.id:
        raise ConflictError(
            f"r-{newest[0].id} has taken the place of r-{rollout.id}",
            then=f"to go back all the same: {_pin_back(rollout)}",
            reason="superseded",
        )


def undo(session: Session, now: datetime, actor: str, rollout_id: int, reason: str = "") -> None:
    """Take every agent back to the release before, also after completion; audited as an act of its own.

    Raises:
        ConflictError: nothing was before, or something newer has taken its place.
    """
    states = (State.RUNNING, State.PAUSED, *sorted(RETURNABLE))
    row = _require(session, rollout_id, "undone", *states)
    rollout = session.get_one(Rollout, rollout_id)
    _check_newest(session, rollout, row)
    settled = cohorts.status_of(session, rollout.cohort_id).base
    if row.state == State.COMPLETED and settled != rollout.version:
        raise ConflictError(
            f"cohort {rollout.cohort.name} is on {settled} by now", then="unpin it, or start a rollout"
        )
    if rollout.base is None:
        raise ConflictError(f"r-{rollout_id} cannot be undone", why="its cohort had no release before")
    _check_way_back(session, rollout, row)
    ask(session, now, actor, rollout_id, wanted=Wanted.ABORT_ROLLBACK, reason=reason)
    _done(session, now, actor, "rollout.undo", rollout_id, reason=reason, back_to=rollout.base)


def retry(session: Session, now: datetime, actor: str, rollout_id: int, reason: str = "") -> None:
    """Let agents that failed try once more: their attempts begin anew, and a halted rollout goes on.

    Raises:
        ConflictError: it was given up, or its cohort is pinned.
    """
    row = _require(session, rollout_id, "retried", State.RUNNING, State.PAUSED, State.COMPLETED)
    rollout = session.get_one(Rollout, rollout_id)
    cohorts.bump_retry(session, now, actor, rollout.cohort, reason)
    again = (*FAILED, AttemptState.SKIPPED)
    failed = session.scalars(
        select(Attempt.agent_id).where(
            Attempt.rollout_id == rollout_id, Attempt.state.in_([str(state) for state in again])
        )
    ).all()
    for agent_id in failed:
        attempts.move(session, now, agent_id, rollout, AttemptState.OFFERED, reason="retry")
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


def _done(session: Session, now: datetime, actor: str, action: str, rollout_id: int, **detail: Any) -> None:
    audit.record(session, now, actor, action, f"r-{rollout_id}", **detail)
    settle(session, now, rollout_id)
