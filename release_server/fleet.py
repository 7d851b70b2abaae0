"""Moves rollouts along: the only orchestrator on the server.

A tick takes each rollout that can move, counts what its fleet looks like, asks `rollout.reconcile` for the
next status and stores it by compare-and-swap, until nothing moves any more; then the cohort's directive
follows. What people ask goes the same way, in the transaction of the asking, so the answer shows its effect.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from sqlalchemy import and_, func, select, update

from agent_core.directive import bucket, progress_for
from agent_core.errors import ConflictError, NotFoundError
from agent_core.wire import AttemptState, Phase, Reason
from release_server import agents, audit, cohorts, releases
from release_server.models import (
    Agent,
    Attempt,
    Cohort,
    Rollout,
    RolloutCounter,
    RolloutEvent,
    RolloutSpec,
    RolloutStatus,
)
from release_server.rollout import (
    FINISHED,
    MOVING,
    Counters,
    Spec,
    Stage,
    StageState,
    State,
    Status,
    Wanted,
    Why,
    check_stages,
    reconcile,
    wanted_count,
)

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session

    from release_server.rollout import Event

log = logging.getLogger(__name__)

NAMED = 5
"""How many agents that stand aside are named in an event; the count is always whole."""
COUNTED_MOST, SALTS_MOST = 5_000, 8
"""Up to how many agents a first stage is held to its number, and how many salts are tried for that."""
CANNOT = frozenset(
    map(
        str,
        (
            Reason.NO_BUNDLE,
            Reason.WRONG_PLATFORM,
            Reason.GATE,
            Reason.BELOW_FLOOR,
            Reason.REVOKED,
            Reason.OLDER,
            Reason.STEPPING_STONE,
            Reason.OLD_LAUNCHER,
            Reason.HELD,
            Reason.SKIPPED,
        ),
    )
)
"""What an agent's last decision says when waiting for it would be in vain."""
OPEN_ATTEMPT = (None, str(AttemptState.OFFERED))


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
        seen = census(session, now, rollout, spec, status)
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


# --- the census ------------------------------------------------------------------------------------------


class _Member(NamedTuple):
    """One agent of the cohort, with what became of its attempt so far (None: nothing was heard)."""

    id: str
    place: int
    enrolled_at: datetime
    seen_at: datetime
    version: str
    phase: str
    reason: str
    held: bool
    attempt: str | None


@dataclass(frozen=True)
class _Look:
    """What one look at a cohort is about.

    Attributes:
        quiet: agents not seen since then are silent.
        told: agents seen since then know what the stage offers them.
    """

    rollout: Rollout
    spec: Spec
    status: Status
    now: datetime
    quiet: datetime
    told: datetime


def census(session: Session, now: datetime, rollout: Rollout, spec: Spec, status: Status) -> Counters:
    """Count what the cohort looks like to this rollout.

    While it runs, this also writes down what no agent reports: that one runs the release already, that one
    has been silent past the stage's deadline, that a silent one is back.
    """
    pace = cohorts.newest_spec(session, rollout.cohort_id)
    quiet = now - agents.silent_after(pace.poll_s, pace.report_s)
    told = (status.opened_at or now) + timedelta(seconds=2 * pace.poll_s)
    look = _Look(rollout, spec, status, now, quiet, told)
    members = _members(session, rollout)
    reached = [member for member in members if member.place < status.progress]
    if status.state is State.RUNNING and not spec.frozen and status.reason != Why.FROZEN:
        reached = [_corrected(session, look, member) for member in reached]
    aside = [member for member in reached if _stands_aside(member, told)]
    waiting = [member for member in reached if _is_open(member) and not _stands_aside(member, told)]
    return Counters(
        members=len(members),
        reached=len(reached),
        waiting=len(waiting),
        waiting_since=min((member.enrolled_at for member in waiting), default=None),
        aside=tuple(member.id for member in aside[:NAMED]),
        aside_count=len(aside),
        on_version=sum(_runs(member, rollout.version) and member.seen_at >= quiet for member in members),
        candidates=_Candidates(rollout, spec, members),
        attempts=agents.counters(session, rollout.id),
    )


def _members(session: Session, rollout: Rollout) -> list[_Member]:
    facts = (Agent.enrolled_at, Agent.seen_at, Agent.version, Agent.phase, Agent.reason, Agent.held)
    rows = session.execute(
        select(Agent.id, *facts, Attempt.state)
        .outerjoin(Attempt, and_(Attempt.agent_id == Agent.id, Attempt.rollout_id == rollout.id))
        .where(Agent.cohort_id == rollout.cohort_id, Agent.retired_at.is_(None))
        .order_by(Agent.id)
    )
    salt = rollout.salt
    return [_Member(row[0], bucket(row[0], salt), *row[1:]) for row in rows]


class _Candidates(Sequence[int]):
    """The progress each stage needs, worked out when it is asked for: most looks open no stage."""

    def __init__(self, rollout: Rollout, spec: Spec, members: Sequence[_Member]) -> None:
        self._salt = rollout.salt
        self._stages = spec.stages
        self._members = members

    def __len__(self) -> int:
        return len(self._stages)

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...
    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            return [self[each] for each in range(*place.indices(len(self)))]
        count = wanted_count(self._stages[place], len(self._members))
        return progress_for((member.id for member in self._members), self._salt, count)


def _is_open(member: _Member) -> bool:
    return member.attempt not in agents.ENDED


def _stands_aside(member: _Member, told: datetime) -> bool:
    """Held, skipping, or has said since it knows of the stage that it cannot take the release."""
    if member.attempt == AttemptState.SKIPPED:
        return True
    if not _is_open(member) or member.phase != Phase.IDLE:
        return False
    return member.held or (member.reason in CANNOT and member.seen_at >= told)


def _runs(member: _Member, version: str) -> bool:
    """Whether an agent runs the release, or is about to find out whether it can."""
    trying = member.phase in (Phase.STAGED, Phase.TRIAL) and member.attempt in (
        AttemptState.STAGED,
        AttemptState.TRIAL,
    )
    return member.version == version or trying


def _corrected(session: Session, look: _Look, member: _Member) -> _Member:
    """The member with its attempt as it must be, after writing that down when it differs."""
    truth = _truth(look, member)
    if truth is None:
        return member
    state, reason = truth
    agents.move_attempt(session, look.now, member.id, look.rollout, state, reason=reason)
    return member._replace(attempt=str(state))


def _truth(look: _Look, member: _Member) -> tuple[AttemptState, str] | None:
    """What an attempt must become without a word of the agent, and why; None when it stays as it is."""
    heard = member.seen_at >= look.quiet
    settled = member.version == look.rollout.version and member.phase == Phase.IDLE
    was_silent = member.attempt == AttemptState.SILENT
    if heard and settled and (was_silent or member.attempt in OPEN_ATTEMPT):
        return AttemptState.HEALTHY, str(Reason.UP_TO_DATE)
    if heard and was_silent:
        return AttemptState.OFFERED, "heard-again"
    if heard or not _is_open(member) or _stands_aside(member, look.told):
        return None
    if look.status.stage_state is not StageState.OPEN:
        return None
    began = max(look.status.opened_at or look.now, member.enrolled_at)
    deadline = timedelta(seconds=look.spec.stages[look.status.stage].deadline_s)
    return (AttemptState.SILENT, "deadline") if look.now >= began + deadline else None


# --- what people ask -------------------------------------------------------------------------------------


def start_rollout(
    session: Session,
    now: datetime,
    actor: str,
    *,
    product: str,
    cohort: str,
    version: str,
    stages: Sequence[Stage],
    reason: str = "",
    supersede: bool = False,
) -> Rollout:
    """Send a release through the stages of a cohort.

    Args:
        supersede: end the rollout that is going on there; without it only one that has stopped is replaced.

    Raises:
        NotFoundError: no such product, cohort or release.
        UsageError: the stages make no sense.
        ConflictError: the cohort is pinned, frozen, on this version already, or busy with another rollout.
    """
    check_stages(tuple(stages))
    target = cohorts.find(session, product, cohort)
    release = cohorts.require_release(session, target.product, version)
    base = cohorts.status_of(session, target.id).base
    _check_free(session, now, target, version, base)
    _make_way(session, now, actor, target, version, supersede=supersede)
    rollout = Rollout(
        cohort=target,
        release_id=release.id,
        version=version,
        base=base,
        salt=_new_salt(session, target.id, stages[0]),
        created_at=now,
        created_by=actor,
    )
    session.add(rollout)
    session.flush()
    agents.make_counters(session, rollout.id)
    fresh = Status()
    session.add(
        RolloutStatus(
            rollout_id=rollout.id,
            state=str(fresh.state),
            stage_state=str(fresh.stage_state),
            opened_at=None,
            soaking_since=None,
            finished_at=None,
            updated_at=now,
        )
    )
    stored = [stage.to_json() for stage in stages]
    _ask(session, now, actor, rollout.id, stages=stored, wanted=Wanted.RUN, advance_to=0, reason=reason)
    subject = f"{product}/{cohort}"
    audit.record(
        session, now, actor, "rollout.start", subject, rollout=rollout.id, version=version, reason=reason
    )
    settle(session, now, rollout.id)
    return rollout


def _new_salt(session: Session, cohort_id: int, first: Stage) -> str:
    """A salt by which the first stage takes in just the agents it asks for, where a few tries find one.

    Two agents in one basis point enter together, but whoever asks for one canary wants one. In a large cohort
    nobody counts the agents of a stage one by one.
    """
    living = (Agent.cohort_id == cohort_id, Agent.retired_at.is_(None))
    members = session.scalars(select(Agent.id).where(*living).limit(COUNTED_MOST + 1)).all()
    salt = secrets.token_hex(16)
    if len(members) > COUNTED_MOST:
        return salt
    count = wanted_count(first, len(members))
    for _ in range(SALTS_MOST):
        progress = progress_for(members, salt, count)
        if sum(bucket(member, salt) < progress for member in members) == count:
            break
        salt = secrets.token_hex(16)
    return salt


def _check_free(session: Session, now: datetime, cohort: Cohort, version: str, base: str | None) -> None:
    spec = cohorts.newest_spec(session, cohort.id)
    if spec.pin is not None:
        raise ConflictError(
            f"cohort {cohort.name} is pinned to {spec.pin}",
            why=spec.reason,
            then=f"release cohort unpin {cohort.name}",
            reason="pinned",
        )
    if cohorts.is_frozen(spec, now):
        raise ConflictError(
            f"cohort {cohort.name} is frozen",
            why=spec.reason,
            then=f"release cohort unfreeze {cohort.name}",
            reason="frozen",
        )
    if base == version:
        raise ConflictError(
            f"cohort {cohort.name} is on {version} already",
            then="to take agents back to it: release rollout abort ID --rollback",
            reason="already-there",
        )


def _make_way(
    session: Session, now: datetime, actor: str, cohort: Cohort, version: str, *, supersede: bool
) -> None:
    """End the rollout before, if it has not ended: one that moves only when the caller says so."""
    newest = cohorts.newest_rollout(session, cohort.id)
    if newest is None or State(newest[1].state) in FINISHED:
        return
    rollout, status = newest
    if status.state != State.PAUSED and not supersede:
        raise ConflictError(
            f"r-{rollout.id} takes {rollout.version} through cohort {cohort.name}",
            why=f"it is {status.state.replace('_', ' ')}",
            then=f"release rollout pause r-{rollout.id}, or supersede it",
            reason="busy",
        )
    _ask(session, now, actor, rollout.id, wanted=Wanted.SUPERSEDE, reason=f"for {version}")
    settle(session, now, rollout.id)


def pause(session: Session, now: datetime, actor: str, rollout_id: int, reason: str = "") -> None:
    """Stop a rollout where it is: nobody new is offered the release.

    Raises:
        ConflictError: it is not moving.
    """
    _require(session, rollout_id, "paused", State.SCHEDULED, State.RUNNING)
    _ask(session, now, actor, rollout_id, wanted=Wanted.PAUSE, reason=reason)
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
    _ask(session, now, actor, rollout_id, wanted=Wanted.RESUME, reason=reason)
    _done(session, now, actor, "rollout.resume", rollout_id, reason=reason)


def advance(session: Session, now: datetime, actor: str, rollout_id: int, reason: str = "") -> None:
    """Open the next stage now, without waiting for this one's gate; after the last one it is complete.

    Raises:
        ConflictError: it is not running.
    """
    status = _require(session, rollout_id, "advanced", State.RUNNING)
    _ask(session, now, actor, rollout_id, wanted=Wanted.RUN, advance_to=status.stage + 1, reason=reason)
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
    _ask(
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


def _ask(
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


# --- looking at rollouts ---------------------------------------------------------------------------------


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
    limit: int = 100,
    before: int | None = None,
) -> list[View]:
    """Rollouts, the newest first, at most `limit`, beginning before the id `before`."""
    conditions: list[ColumnElement[bool]] = []
    if product is not None:
        conditions.append(Cohort.product_id == releases.find_product(session, product).id)
    if cohort is not None:
        conditions.append(Cohort.name == cohort)
    if before is not None:
        conditions.append(Rollout.id < before)
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
    for rollout_id, state, count in session.execute(query.where(RolloutCounter.rollout_id.in_(rollout_ids))):
        counted[rollout_id][state] = count
    return counted
