"""How a rollout moves: pure, so the server, the tests and a rehearsal share one set of rules.

| from | what is so | to |
|---|---|---|
| draft | submitted by a resume | scheduled |
| scheduled | a second person must approve, and has not | awaiting approval |
| awaiting approval | approved, by the digest of what it is | scheduled |
| scheduled | wanted, and its time has come | running, stage 0 open |
| running, open | more failed than the stage allows; time is up | paused, stage halted |
| running, open | every agent in progress has finished, the sample is big enough | running, soaking |
| running, soaking | an agent is unfinished after all | running, open |
| running, soaking | the soak is over | next stage open, or completed |
| running | advance asked for | next stage open, or completed |
| running | pause asked for; cohort pinned | paused, stage as it was |
| running, open | the window closes on unfinished agents | the same, its deadline standing still |
| paused | resume asked for, by a revision newer than the halt | running, stage open again |
| any but a finished one | abort asked for | aborted, or rolling back |
| completed | worse than before while it is still watched | paused, stage halted |
| aborted, completed | going back asked for (undo) | rolling back |
| rolling back | no agent runs the version any more | rolled back |
| any but a finished one | a newer rollout takes its place | superseded |
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from agent_core.wire import PROGRESS_FULL, AttemptState
from release_server.hearing import ALWAYS, ZERO, Hearing
from release_server.sequential import UNKNOWN, Baseline, boundary, evidence
from release_server.stages import failed_limit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from release_server.figures import Worse
    from release_server.stages import Stage

LOOK_EVERY = timedelta(minutes=1)
"""How often a completed rollout is looked at while it is watched."""
UNWATCHED: dict[str, Any] = {"finished_at": None, "watch_until": None, "watch_at": None}
EMPTY = "no agent is in this cohort yet"


class State(StrEnum):
    """Where a rollout is."""

    DRAFT = "draft"
    AWAITING_APPROVAL = "awaiting_approval"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    PAUSED = "paused"
    COMPLETED = "completed"
    ABORTED = "aborted"
    ROLLING_BACK = "rolling_back"
    ROLLED_BACK = "rolled_back"
    SUPERSEDED = "superseded"


FINISHED = frozenset({State.COMPLETED, State.ABORTED, State.ROLLED_BACK, State.SUPERSEDED})
MOVING = frozenset({State.SCHEDULED, State.RUNNING, State.ROLLING_BACK})
"""States that time or agents can change; a paused rollout waits for a person."""
WAITING = frozenset({State.DRAFT, State.AWAITING_APPROVAL, State.PAUSED})
"""States that only a person's word changes."""
RETURNABLE = frozenset({State.ABORTED, State.COMPLETED})
"""Ends from which agents may still be taken back."""


class StageState(StrEnum):
    """Where a rollout's current stage is."""

    PENDING = "pending"
    OPEN = "open"
    SOAKING = "soaking"
    PASSED = "passed"
    HALTED = "halted"


class Wanted(StrEnum):
    """What people want of a rollout. Only `RESUME` ends a halt, so no other request can do it by accident."""

    RUN = "run"
    RESUME = "resume"
    PAUSE = "pause"
    ABORT = "abort"
    ABORT_ROLLBACK = "abort-rollback"
    SUPERSEDE = "supersede"


class Why(StrEnum):
    """Reason codes of a rollout's status and events."""

    NONE = ""
    MANUAL = "manual"
    PINNED = "pinned"
    FROZEN = "frozen"
    OUTSIDE_WINDOW = "outside-window"
    APPROVAL = "approval"
    NO_AGENTS = "no-agents"
    MIN_SAMPLE = "min-sample"
    MAX_FAILED = "max-failed"
    MAX_SILENT = "max-silent"
    UNUSUAL = "unusual-failures"
    FIGURES = "figures-worse"
    WATCHED = "watched"
    DEADLINE = "deadline"
    FINISHED = "all-finished"
    UNFINISHED = "unfinished"
    SOAKED = "soaked"
    ADVANCED = "advanced"
    SUPERSEDED = "superseded"
    GONE_BACK = "gone-back"
    LISTENING = "listening"


@dataclass(frozen=True)
class Spec:
    """What people want: the newest revision, and what the cohort allows just now.

    Attributes:
        not_before: it does not start earlier.
        approval: a second person has to approve it first; `approved` says that one has.
        window_open: agents of the cohort may begin an update now.
        stratified: the first stage takes in one agent of each site and platform, whatever its size.
        watch_s: how long a completed rollout is still looked at.
        false_halt_bp: the chance that the sequential test may halt a good release with; 0: no test.
        figures: health figures are compared.
    """

    stages: tuple[Stage, ...]
    wanted: Wanted = Wanted.RUN
    advance_to: int = 0
    revision: int = 1
    pinned: bool = False
    frozen: bool = False
    not_before: datetime | None = None
    approval: bool = False
    approved: bool = False
    window_open: bool = True
    stratified: bool = False
    watch_s: int = 0
    false_halt_bp: int = 0
    figures: bool = False


@dataclass(frozen=True)
class Status:
    """What is so. `spec_revision` is the last revision this status has answered.

    Attributes:
        opened_at: since when the stage's deadline counts.
        soaking_since: when the last agent of the stage finished.
        tolerated, tolerated_silent: failures an operator has seen and resumed over; they lapse when
            the agents heal.
        excused: figures that an operator has seen worse and resumed over.
        watch_until, watch_at: how long a completed rollout is watched, and when it is looked at next.
    """

    state: State = State.SCHEDULED
    stage: int = 0
    stage_state: StageState = StageState.PENDING
    progress: int = 0
    reason: str = ""
    detail: str = ""
    opened_at: datetime | None = None
    soaking_since: datetime | None = None
    finished_at: datetime | None = None
    spec_revision: int = 0
    tolerated: int = 0
    tolerated_silent: int = 0
    excused: tuple[str, ...] = ()
    watch_until: datetime | None = None
    watch_at: datetime | None = None


@dataclass(frozen=True)
class Counters:
    """What the fleet looks like to one rollout.

    Attributes:
        members: agents of the cohort.
        reached: those in progress.
        waiting: those of `reached` that can take the release and have not finished.
        waiting_since: when the first of the waiting agents joined.
        aside: names (the first few) of agents in progress that are held, skip the release or cannot take it;
            they count neither as healthy nor as failed.
        on_version: agents heard of lately that run the release.
        candidates: for each stage the progress that takes in its `wanted_count`.
        attempts: how many attempts are in each state.
        baseline: how often agents of the cohort fail when nothing is wrong.
        worse: health figures that the release has made worse.
        hearing: when the server could be heard; soaks and deadlines are counted in that.
    """

    members: int = 0
    reached: int = 0
    waiting: int = 0
    waiting_since: datetime | None = None
    aside: tuple[str, ...] = ()
    aside_count: int = 0
    on_version: int = 0
    candidates: Sequence[int] = ()
    attempts: Mapping[AttemptState, int] = field(default_factory=dict)
    baseline: Baseline = UNKNOWN
    worse: tuple[Worse, ...] = ()
    hearing: Hearing = ALWAYS

    def of(self, *states: AttemptState) -> int:
        return sum(self.attempts.get(state, 0) for state in states)

    def silent(self) -> int:
        return self.of(AttemptState.SILENT)

    def failed(self, stage: Stage) -> int:
        """Failures as `stage` sees them; a silent agent is one unless the stage limits silence by itself."""
        broken = self.of(AttemptState.ROLLED_BACK, AttemptState.FAILED)
        return broken + (self.silent() if stage.max_silent is None else 0)


@dataclass(frozen=True)
class Event:
    """One transition, with the reason and the numbers it saw."""

    name: str
    stage: int
    reason: str = ""
    detail: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Next:
    """The status that follows, and what happened on the way (nothing, when it is the same)."""

    status: Status
    events: tuple[Event, ...] = ()


def reconcile(spec: Spec, status: Status, counters: Counters, now: datetime) -> Next:
    """Take at most one step from `status` towards what is wanted.

    Calling it again with the result, and with counters that see the new progress, takes the next step; with
    nothing left to do it returns `status` unchanged. Failures are looked at before wishes, so no request made
    at the moment of a halt undoes it.
    """
    if status.state in FINISHED:
        return _after_end(spec, status, counters, now)
    step = _Step(spec, _lapse(status, spec, counters), counters, now)
    if spec.wanted is Wanted.SUPERSEDE:
        return step.to("superseded", Why.SUPERSEDED, state=State.SUPERSEDED, finished_at=now)
    if status.state is State.ROLLING_BACK:
        return _go_back(step)
    if spec.wanted in (Wanted.ABORT, Wanted.ABORT_ROLLBACK):
        return _abort(spec, status, counters, now)
    match status.state:
        case State.DRAFT | State.AWAITING_APPROVAL:
            return _prepare(step)
        case State.SCHEDULED:
            return _start(step)
        case State.RUNNING:
            return _run(step)
        case State.PAUSED:
            return _resume(step)
        case _:
            return Next(status)


def _after_end(spec: Spec, status: Status, counters: Counters, now: datetime) -> Next:
    """Some ends are taken back when asked, and completion is watched for a while; else an end is an end."""
    returnable = status.state in RETURNABLE and status.stage_state is not StageState.PENDING
    if returnable and _asks(spec, status, Wanted.ABORT_ROLLBACK):
        return _abort(spec, status, counters, now)
    if status.watch_until is not None:
        return _watch(_Step(spec, _lapse(status, spec, counters), counters, now))
    return Next(status)


@dataclass(frozen=True)
class _Step:
    """The facts of one call, and the ways to end it."""

    spec: Spec
    status: Status
    counters: Counters
    now: datetime

    @property
    def stage(self) -> Stage:
        return self.spec.stages[min(self.status.stage, len(self.spec.stages) - 1)]

    def is_past(self, start: datetime, length: timedelta = ZERO) -> bool:
        """Whether a time that began at `start` is up, by what of it the server could hear agents in."""
        return self.now >= self.counters.hearing.ends(start, length)

    def to(
        self, name: str, reason: str = "", detail: str = "", *, quiet: bool = False, **changes: Any
    ) -> Next:
        """End with an event; the status takes its reason and detail unless `quiet`."""
        status = replace(
            self.status,
            reason="" if quiet else str(reason),
            detail="" if quiet else detail,
            spec_revision=self.spec.revision,
            **changes,
        )
        return Next(status, (Event(name, status.stage, str(reason), detail, self.numbers()),))

    def stay(self, **changes: Any) -> Next:
        """End without an event: the wish has been seen, and there is nothing to do about it now."""
        return Next(replace(self.status, spec_revision=self.spec.revision, **changes))

    def numbers(self) -> dict[str, Any]:
        seen = self.counters
        return {
            "members": seen.members,
            "reached": seen.reached,
            "waiting": seen.waiting,
            "aside": seen.aside_count,
            "on_version": seen.on_version,
            "progress": self.status.progress,
            "failures": seen.failed(self.stage),
            "limit": failed_limit(self.stage, seen.reached),
            "tolerated": self.status.tolerated,
            "usual_rate": round(seen.baseline.usual, 4),
            "evidence": round(_evidence(self), 2),
            "worse": {each.figure: each.worse for each in seen.worse},
            **{str(state): count for state, count in seen.attempts.items() if count},
        }


def numbers(spec: Spec, status: Status, counters: Counters, now: datetime) -> dict[str, Any]:
    """What an event would store if one happened now."""
    return _Step(spec, status, counters, now).numbers()


def too_few(spec: Spec, status: Status, counters: Counters, now: datetime) -> str:
    """What the sample of the present stage lacks, in the words that are stored; empty when nothing."""
    return _too_few(_Step(spec, status, counters, now))


def _asks(spec: Spec, status: Status, wanted: Wanted) -> bool:
    return spec.wanted is wanted and spec.revision > status.spec_revision


def _lapse(status: Status, spec: Spec, counters: Counters) -> Status:
    """Forget tolerance for failures that have healed, or it would excuse as many new ones."""
    stage = spec.stages[min(status.stage, len(spec.stages) - 1)]
    return replace(
        status,
        tolerated=min(status.tolerated, counters.failed(stage)),
        tolerated_silent=min(status.tolerated_silent, counters.silent()),
    )


def _prepare(step: _Step) -> Next:
    """A draft is submitted by a resume; what awaits approval goes on by nothing else."""
    if step.status.state is State.DRAFT:
        submitted = _asks(step.spec, step.status, Wanted.RESUME)
        return step.to("submitted", state=State.SCHEDULED) if submitted else Next(step.status)
    return step.to("approved", state=State.SCHEDULED) if step.spec.approved else step.stay()


def _start(step: _Step) -> Next:
    if step.spec.approval and not step.spec.approved:
        return step.to("awaiting-approval", Why.APPROVAL, state=State.AWAITING_APPROVAL)
    if step.spec.wanted is Wanted.PAUSE:
        return step.to("paused", Why.MANUAL, state=State.PAUSED)
    if step.spec.pinned:
        return step.to("paused", Why.PINNED, state=State.PAUSED)
    too_early = step.spec.not_before is not None and step.now < step.spec.not_before
    if step.spec.frozen or too_early:
        return step.stay()
    return _open(step, 0, "started")


def _open(step: _Step, stage: int, name: str) -> Next:
    """Open `stage` with the progress it needs, never with less than there was."""
    empty = not step.counters.members
    needed = 0 if empty else step.counters.candidates[stage]
    return step.to(
        name,
        Why.NO_AGENTS if empty else Why.NONE,
        EMPTY if empty else "",
        state=State.RUNNING,
        stage=stage,
        stage_state=StageState.OPEN,
        progress=max(step.status.progress, needed),
        opened_at=step.now,
        soaking_since=None,
    )


def _run(step: _Step) -> Next:
    if halt := _failed_too_often(step):
        return halt
    if step.spec.wanted is Wanted.PAUSE:
        return step.to("paused", Why.MANUAL, state=State.PAUSED)
    if step.spec.pinned:
        return step.to("paused", Why.PINNED, state=State.PAUSED)
    if step.spec.frozen:
        return _stand_still(step, Why.FROZEN)
    if step.status.reason == Why.FROZEN:
        return _open(step, step.status.stage, "unfrozen")
    if step.status.reason == Why.OUTSIDE_WINDOW and step.spec.window_open:
        return _open(step, step.status.stage, "window-opened")
    if step.spec.advance_to > step.status.stage:
        return _pass(step, Why.ADVANCED)
    if not step.counters.members:
        return _wait(step, Why.NO_AGENTS, EMPTY)
    if not step.counters.reached or step.status.reason == Why.NO_AGENTS:
        return _open(step, step.status.stage, "widened")
    return _judge(step)


def _judge(step: _Step) -> Next:
    """Decide on a running stage that has agents: late, unfinished, too few, soaking or passed."""
    if step.counters.waiting and step.status.stage_state is StageState.SOAKING:
        return _reopen(step)
    if step.counters.waiting and not step.spec.window_open:
        return _stand_still(step, Why.OUTSIDE_WINDOW)
    if halt := _took_too_long(step):
        return halt
    if step.counters.waiting:
        return step.stay(reason="", detail="")
    if lacking := _too_few(step):
        return _wait(step, Why.MIN_SAMPLE, f"{lacking}{_aside(step)}")
    if step.status.soaking_since is None:
        soaking = {"stage_state": StageState.SOAKING, "soaking_since": step.now}
        return step.to("soaking", Why.FINISHED, _healthy(step), quiet=True, **soaking)
    if step.is_past(step.status.soaking_since, timedelta(seconds=step.stage.soak_s)):
        return _pass(step, Why.SOAKED)
    return step.stay()


def _reopen(step: _Step) -> Next:
    """An agent came after all others had finished: it gets the whole deadline, and the soak starts anew."""
    return step.to(
        "reopened",
        Why.UNFINISHED,
        f"{step.counters.waiting} not finished",
        quiet=True,
        stage_state=StageState.OPEN,
        opened_at=step.now,
        soaking_since=None,
    )


def _outcomes(step: _Step) -> int:
    ended = (AttemptState.HEALTHY, AttemptState.ROLLED_BACK, AttemptState.FAILED, AttemptState.SILENT)
    return step.counters.of(*ended)


def _sample(step: _Step) -> int:
    """The outcomes a stage must see; never more than it can have, and one even when all stand aside."""
    return min(step.stage.min_sample, step.counters.reached)


def _too_few(step: _Step) -> str:
    seen, wanted = _outcomes(step), _sample(step)
    return f"{seen} outcomes, {wanted} wanted" if seen < wanted else ""


def _healthy(step: _Step) -> str:
    return f"{step.counters.of(AttemptState.HEALTHY)} of {step.counters.reached} healthy{_aside(step)}"


def _aside(step: _Step) -> str:
    if not step.counters.aside_count:
        return ""
    more = step.counters.aside_count - len(step.counters.aside)
    names = ", ".join(step.counters.aside) + (f" and {more} more" if more else "")
    return f"; {step.counters.aside_count} set aside: {names}"


def _failed_too_often(step: _Step) -> Next | None:
    stage, seen, status = step.stage, step.counters, step.status
    failed, limit = seen.failed(stage), failed_limit(stage, seen.reached)
    if failed - status.tolerated > limit:
        seen_before = f", {status.tolerated} tolerated" if status.tolerated else ""
        return _halt(step, Why.MAX_FAILED, f"{failed} of {seen.reached} failed (limit {limit}{seen_before})")
    if stage.max_silent is not None and seen.silent() - status.tolerated_silent > stage.max_silent:
        detail = f"{seen.silent()} of {seen.reached} silent (limit {stage.max_silent})"
        return _halt(step, Why.MAX_SILENT, detail)
    return _compared_badly(step)


def _compared_badly(step: _Step) -> Next | None:
    """Beside the fixed limits: what is unusual for this cohort, or worse than the release before."""
    seen = step.counters
    if step.spec.false_halt_bp and _evidence(step) >= boundary(step.spec.false_halt_bp):
        usual = f"{seen.baseline.usual:.1%} is usual here"
        return _halt(step, Why.UNUSUAL, f"{seen.failed(step.stage)} of {_outcomes(step)} failed, {usual}")
    fresh = [each for each in seen.worse if each.figure not in step.status.excused]
    return _halt(step, Why.FIGURES, "; ".join(map(str, fresh))) if fresh else None


def _evidence(step: _Step) -> float:
    """Against the release, without the failures that an operator has resumed over."""
    known = step.status.tolerated
    failed = max(0, step.counters.failed(step.stage) - known)
    return evidence(step.counters.baseline, failed, max(failed, _outcomes(step) - known))


def _took_too_long(step: _Step) -> Next | None:
    """Halt when agents that do report have not finished in time; an agent's time starts when it joins."""
    opened_at = step.status.opened_at or step.now
    allowed = timedelta(seconds=step.stage.deadline_s)
    seen = step.counters
    if seen.waiting and step.is_past(max(opened_at, seen.waiting_since or opened_at), allowed):
        return _halt(
            step, Why.DEADLINE, f"{seen.waiting} of {seen.reached} not finished in {step.stage.deadline_s} s"
        )
    if not seen.waiting and step.is_past(opened_at, allowed) and (lacking := _too_few(step)):
        return _halt(step, Why.MIN_SAMPLE, f"{lacking} in {step.stage.deadline_s} s{_aside(step)}")
    return None


def _halt(step: _Step, reason: Why, detail: str) -> Next:
    return step.to(
        "halted",
        reason,
        detail,
        state=State.PAUSED,
        stage_state=StageState.HALTED,
        soaking_since=None,
        **UNWATCHED,
    )


def _watch(step: _Step) -> Next:
    """After completion: a late failure or a figure that grows halts as it would have before."""
    if step.status.watch_until is None or step.spec.pinned:
        return step.stay(watch_until=None, watch_at=None)
    if halt := _failed_too_often(step):
        return halt
    ends = step.counters.hearing.ends(step.status.watch_until, ZERO)
    if step.now >= ends:
        return step.to("watch-over", Why.WATCHED, quiet=True, watch_until=None, watch_at=None)
    return step.stay(watch_at=min(step.now + LOOK_EVERY, ends))


def _wait(step: _Step, reason: Why, detail: str) -> Next:
    if step.status.reason == reason:
        return step.stay()
    return step.to("waiting", reason, detail, stage_state=StageState.OPEN, soaking_since=None)


def _stand_still(step: _Step, why: Why) -> Next:
    """No deadline runs while agents may not begin; each stage gets a whole one when they may again."""
    if step.status.reason == why:
        return step.stay()
    return step.to(str(why), why)


def _pass(step: _Step, reason: Why) -> Next:
    """Leave the stage: the next one opens in the same step, or the rollout is complete."""
    here = step.status.stage
    passed = Event("stage-passed", here, str(reason), _healthy(step), step.numbers())
    if here + 1 < len(step.spec.stages):
        opened = _open(step, here + 1, "stage-opened")
        return Next(opened.status, (passed, *opened.events))
    done = step.to(
        "completed",
        state=State.COMPLETED,
        stage_state=StageState.PASSED,
        progress=PROGRESS_FULL,
        finished_at=step.now,
        **_watched(step),
    )
    return Next(done.status, (passed, *done.events))


def _watched(step: _Step) -> dict[str, Any]:
    if not step.spec.watch_s:
        return {}
    until = step.now + timedelta(seconds=step.spec.watch_s)
    return {"watch_until": until, "watch_at": min(step.now + LOOK_EVERY, until)}


def _resume(step: _Step) -> Next:
    if not _asks(step.spec, step.status, Wanted.RESUME) or step.spec.pinned:
        return step.stay()
    if step.status.stage_state is StageState.PENDING:
        return step.to("resumed", state=State.SCHEDULED)
    halted = step.status.stage_state is StageState.HALTED
    failed, silent = step.counters.failed(step.stage), step.counters.silent()
    return step.to(
        "resumed",
        "",
        f"{failed} failed so far, tolerated" if halted and failed else "",
        state=State.RUNNING,
        stage_state=StageState.OPEN,
        opened_at=step.now,
        soaking_since=None,
        tolerated=failed if halted else step.status.tolerated,
        tolerated_silent=silent if halted else step.status.tolerated_silent,
        excused=_excused(step) if halted else step.status.excused,
    )


def _excused(step: _Step) -> tuple[str, ...]:
    return tuple(sorted({*step.status.excused, *(each.figure for each in step.counters.worse)}))


def _abort(spec: Spec, status: Status, counters: Counters, now: datetime) -> Next:
    """Stop for good; agents are asked to go back only when any was ever offered the release."""
    step = _Step(spec, status, counters, now)
    reached = status.stage_state is not StageState.PENDING
    if spec.wanted is Wanted.ABORT_ROLLBACK and reached:
        return step.to("rolling-back", Why.MANUAL, state=State.ROLLING_BACK, progress=0, **UNWATCHED)
    return step.to("aborted", Why.MANUAL, state=State.ABORTED, progress=0, finished_at=now)


def _go_back(step: _Step) -> Next:
    if step.counters.on_version or not step.is_past(step.now):
        return step.stay()
    return step.to("rolled-back", Why.GONE_BACK, state=State.ROLLED_BACK, finished_at=step.now)
