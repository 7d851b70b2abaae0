"""What the fleet looks like to one rollout: counted, and written down where no agent says it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, overload

from sqlalchemy import and_, func, select

from agent_core.directive import bucket, progress_for
from agent_core.wire import AttemptState
from release_server import agents, attempts, cohorts, presence
from release_server.figures import compare
from release_server.members import FAILED, Look, Member, Outlook, count, truth
from release_server.models import Agent, Attempt, Rollout, RolloutCounter, RolloutStatus
from release_server.rollout import Counters, State
from release_server.sequential import UNKNOWN, Baseline
from release_server.shuffle import first_progress
from release_server.stages import wanted_count

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.rollout import Spec, Status

COMPARED = 1_000
"""Of at most how many agents the health figures are compared."""
SITE = "site"
"""The label that says where an agent stands."""


def census(
    session: Session, now: datetime, rollout: Rollout, spec: Spec, status: Status, *, write: bool = True
) -> Counters:
    """Count what the cohort looks like to this rollout.

    Args:
        write: while it runs, write down also what no agent reports: that one runs the release already, that
            one has been silent past the stage's deadline, that a silent one is back.
    """
    look = _look(session, now, rollout, spec, status)
    members = _members(session, rollout)
    reached = [member for member in members if member.place < status.progress]
    if write and look.corrects:
        reached = [_corrected(session, rollout, look, member) for member in reached]
    return count(look, members, reached, _counted(session, rollout, look, members))


def outlook(session: Session, now: datetime, rollout: Rollout, spec: Spec, status: Status) -> Outlook:
    """What the census would count from now on if no agent had news; writes nothing."""
    look, members = _look(session, now, rollout, spec, status), _members(session, rollout)
    return Outlook(look, members, _counted(session, rollout, look, members))


def _look(session: Session, now: datetime, rollout: Rollout, spec: Spec, status: Status) -> Look:
    pace = cohorts.newest_spec(session, rollout.cohort_id)
    period = agents.period_in(pace)
    return Look(
        rollout.version,
        spec,
        status,
        now,
        period=period,
        poll=timedelta(seconds=pace.poll_s),
        hearing=presence.Ear(session, now).of(period),
    )


def _counted(session: Session, rollout: Rollout, look: Look, members: Sequence[Member]) -> Counters:
    """What is counted otherwise than by going through the members."""
    spec, quiet = look.spec, look.now - look.silent_after
    return Counters(
        candidates=_Candidates(session, rollout, spec, members),
        attempts=attempts.counters(session, rollout.id),
        baseline=_baseline(session, rollout) if spec.false_halt_bp else UNKNOWN,
        worse=compare(_figures(session, rollout, quiet)) if spec.figures else (),
    )


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
            RolloutCounter.state != attempts.SENT_BACK,
        )
        .group_by(RolloutCounter.state)
    )
    counted = {AttemptState(state): int(count) for state, count in session.execute(query)}
    failed = sum(counted.get(state, 0) for state in FAILED)
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


def _members(session: Session, rollout: Rollout) -> list[Member]:
    facts = (Agent.enrolled_at, Agent.seen_at, Agent.version, Agent.phase, Agent.reason, Agent.held)
    rows = session.execute(
        select(Agent.id, *facts, Attempt.state)
        .outerjoin(Attempt, and_(Attempt.agent_id == Agent.id, Attempt.rollout_id == rollout.id))
        .where(Agent.cohort_id == rollout.cohort_id, Agent.retired_at.is_(None))
        .order_by(Agent.id)
    )
    salt = rollout.salt
    return [Member(row[0], bucket(row[0], salt), *row[1:]) for row in rows]


class _Candidates(Sequence[int]):
    """The progress each stage needs, worked out when it is asked for: most looks open no stage."""

    def __init__(self, session: Session, rollout: Rollout, spec: Spec, members: Sequence[Member]) -> None:
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


def _corrected(session: Session, rollout: Rollout, look: Look, member: Member) -> Member:
    """The member with its attempt as it must be, after writing that down when it differs."""
    now = truth(look, member)
    if now is None:
        return member
    state, reason = now
    attempts.move(session, look.now, member.id, rollout, state, reason=reason)
    return member._replace(attempt=str(state))
