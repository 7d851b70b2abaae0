"""What the fleet looks like to one rollout: counted, and written down where no agent says it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple, overload

from sqlalchemy import and_, func, select

from agent_core.directive import bucket, progress_for
from agent_core.wire import AttemptState, Phase, Reason
from release_server import agents, attempts, cohorts
from release_server.figures import compare
from release_server.models import Agent, Attempt, Lease, Rollout, RolloutCounter, RolloutStatus
from release_server.rollout import Counters, StageState, State, Why
from release_server.sequential import UNKNOWN, Baseline
from release_server.shuffle import first_progress
from release_server.stages import wanted_count

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.rollout import Spec, Status

LISTENS = timedelta(hours=1)
"""So long at most the server listens after it was away, however seldom agents report."""
NAMED = 5
"""How many agents that stand aside are named in an event; the count is always whole."""
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
            Reason.STOP_FILE,
            Reason.SKIPPED,
        ),
    )
)
"""What an agent's last decision says when waiting for it would be in vain."""
COMPARED = 1_000
"""Of at most how many agents the health figures are compared."""
SITE = "site"
"""The label that says where an agent stands."""
OPEN_ATTEMPT = (None, str(AttemptState.OFFERED))


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
        listened: the server was there long enough to have heard of everybody; before that nobody is silent.
    """

    rollout: Rollout
    spec: Spec
    status: Status
    now: datetime
    quiet: datetime
    told: datetime
    listened: bool


def census(
    session: Session, now: datetime, rollout: Rollout, spec: Spec, status: Status, *, write: bool = True
) -> Counters:
    """Count what the cohort looks like to this rollout.

    Args:
        write: while it runs, write down also what no agent reports: that one runs the release already, that
            one has been silent past the stage's deadline, that a silent one is back.
    """
    pace = cohorts.newest_spec(session, rollout.cohort_id)
    quiet = now - agents.silent_after(pace.poll_s, pace.report_s)
    told = (status.opened_at or now) + timedelta(seconds=2 * pace.poll_s)
    look = _Look(rollout, spec, status, now, quiet, told, _has_listened(session, now, quiet))
    members = _members(session, rollout)
    reached = [member for member in members if member.place < status.progress]
    if write and status.state is State.RUNNING and not spec.frozen and status.reason != Why.FROZEN:
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
        candidates=_Candidates(session, rollout, spec, members),
        attempts=attempts.counters(session, rollout.id),
        baseline=_baseline(session, rollout) if spec.false_halt_bp else UNKNOWN,
        worse=compare(_figures(session, rollout, quiet)) if spec.figures else (),
        listened=look.listened,
    )


def _has_listened(session: Session, now: datetime, quiet: datetime) -> bool:
    since = session.scalar(select(Lease.since).where(Lease.name == Lease.JOBS))
    return since is None or since <= max(quiet, now - LISTENS)


def _baseline(session: Session, rollout: Rollout) -> Baseline:
    """How the agents of this cohort fared in its completed rollouts."""
    query = (
        select(RolloutCounter.state, func.sum(RolloutCounter.count))
        .join(Rollout, Rollout.id == RolloutCounter.rollout_id)
        .join(RolloutStatus, RolloutStatus.rollout_id == Rollout.id)
        .where(
            Rollout.cohort_id == rollout.cohort_id,
            Rollout.id != rollout.id,
            RolloutStatus.state == str(State.COMPLETED),
        )
        .group_by(RolloutCounter.state)
    )
    counted = {AttemptState(state): int(count) for state, count in session.execute(query)}
    failed = sum(counted.get(state, 0) for state in attempts.FAILED)
    return Baseline.of(failed, failed + counted.get(AttemptState.HEALTHY, 0))


def _figures(
    session: Session, rollout: Rollout, quiet: datetime
) -> Iterator[tuple[dict[str, float], dict[str, float]]]:
    """What agents that run the release reported before it and report now; those that run it longest."""
    query = (
        select(Attempt.before, Agent.figures)
        .join(Agent, Agent.id == Attempt.agent_id)
        .where(
            Attempt.rollout_id == rollout.id,
            Attempt.state == str(AttemptState.HEALTHY),
            Agent.version == rollout.version,
            Agent.retired_at.is_(None),
            Agent.seen_at >= quiet,
        )
        .order_by(Attempt.id)
        .limit(COMPARED)
    )
    return ((before, now) for before, now in session.execute(query))


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

    def __init__(self, session: Session, rollout: Rollout, spec: Spec, members: Sequence[_Member]) -> None:
        self._session, self._cohort_id = session, rollout.cohort_id
        self._each = spec.stratified
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
        if self._each and place == 0:
            groups = strata(self._session, self._cohort_id)
            return first_progress(groups, self._salt, count, each=True)
        return progress_for((member.id for member in self._members), self._salt, count)


def strata(session: Session, cohort_id: int, most: int | None = None) -> dict[str, tuple[str, str]]:
    """The agents of a cohort, at most `most`, each with the site and the platform that it represents."""
    query = select(Agent.id, Agent.platform, Agent.labels, Agent.operator_labels)
    here = query.where(Agent.cohort_id == cohort_id, Agent.retired_at.is_(None)).limit(most)
    return {
        agent_id: (str({**said, **own}.get(SITE, "")), platform)
        for agent_id, platform, said, own in session.execute(here.order_by(Agent.id))
    }


def _is_open(member: _Member) -> bool:
    return member.attempt not in attempts.ENDED


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
    attempts.move(session, look.now, member.id, look.rollout, state, reason=reason)
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
    if heard or not look.listened or not _is_open(member) or _stands_aside(member, look.told):
        return None
    if look.status.stage_state is not StageState.OPEN or look.status.reason == Why.OUTSIDE_WINDOW:
        return None
    began = max(look.status.opened_at or look.now, member.enrolled_at)
    if member.seen_at > began:
        return (
            AttemptState.SILENT,
            "own-deadline",
        )  # it was there, and then fell silent: its own reports say so
    deadline = timedelta(seconds=look.spec.stages[look.status.stage].deadline_s)
    return (AttemptState.SILENT, "deadline") if look.now >= began + deadline else None
