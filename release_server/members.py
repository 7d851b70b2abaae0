"""The agents of a cohort as one rollout sees them, and what becomes of them without a word of theirs. Pure.

The census asks what is so now; `Outlook` asks the same ahead, so that a forecast counts as the census will.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from agent_core.wire import AttemptState, Phase, Reason
from release_server import standing
from release_server.hearing import ALWAYS, NEVER, Hearing
from release_server.rollout import StageState, State, Why

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from release_server.rollout import Counters, Spec, Status

FAILED = (AttemptState.ROLLED_BACK, AttemptState.FAILED, AttemptState.SILENT)
ENDED = frozenset({AttemptState.HEALTHY, *FAILED, AttemptState.SKIPPED})
OPEN_ATTEMPT = (None, AttemptState.OFFERED)
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


class Member(NamedTuple):
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
class Look:
    """What one look at a cohort is about.

    Attributes:
        version: of the rollout.
        period: how often its agents should be heard of.
        poll: how often they look for something new.
        hearing: when the server could be heard.
    """

    version: str
    spec: Spec
    status: Status
    now: datetime
    period: timedelta
    poll: timedelta
    hearing: Hearing = ALWAYS

    @cached_property
    def silent_after(self) -> timedelta:
        return standing.silent_after(self.period)

    @cached_property
    def told(self) -> datetime:
        """Agents seen since then know what the stage offers them."""
        return (self.status.opened_at or self.now) + 2 * self.poll

    @property
    def corrects(self) -> bool:
        """Whether attempts are now brought to what no agent says."""
        status = self.status
        return status.state is State.RUNNING and not self.spec.frozen and status.reason != Why.FROZEN

    def quiet_from(self, member: Member) -> datetime:
        """When a member is silent by its own reports, if it stays quiet."""
        return self.hearing.ends(member.seen_at, self.silent_after)

    def hears(self, member: Member) -> bool:
        return self.now < self.quiet_from(member)

    def stands_aside(self, member: Member) -> bool:
        """Held, skipping, or has said since it knows of the stage that it cannot take the release."""
        if member.attempt == AttemptState.SKIPPED:
            return True
        if not is_open(member) or member.phase != Phase.IDLE:
            return False
        return member.held or (member.reason in CANNOT and member.seen_at >= self.told)

    def runs(self, member: Member) -> bool:
        """Whether an agent runs the release, or is about to find out whether it can."""
        trying = member.phase in (Phase.STAGED, Phase.TRIAL) and member.attempt in (
            AttemptState.STAGED,
            AttemptState.TRIAL,
        )
        return member.version == self.version or trying


def is_open(member: Member) -> bool:
    return member.attempt not in ENDED


def truth(look: Look, member: Member) -> tuple[AttemptState, str] | None:
    """What an attempt must become without a word of the agent, and why; None when it stays as it is."""
    settled = member.version == look.version and member.phase == Phase.IDLE
    was_silent = member.attempt == AttemptState.SILENT
    if look.hears(member):
        if settled and (was_silent or member.attempt in OPEN_ATTEMPT):
            return AttemptState.HEALTHY, str(Reason.UP_TO_DATE)
        return (AttemptState.OFFERED, "heard-again") if was_silent else None
    ends = silent_from(look, member)
    return (AttemptState.SILENT, ends[1]) if ends and look.now >= ends[0] else None


def silent_from(look: Look, member: Member) -> tuple[datetime, str] | None:
    """When a member of the present stage becomes silent if it stays quiet, and why; None when it does not."""
    status = look.status
    if not is_open(member) or look.stands_aside(member):
        return None
    if status.stage_state is not StageState.OPEN or status.reason == Why.OUTSIDE_WINDOW:
        return None
    quiet = look.quiet_from(member)
    began = max(status.opened_at or look.now, member.enrolled_at)
    if member.seen_at > began:
        return quiet, "own-deadline"  # it was there, and then fell silent: its own reports say so
    allowed = timedelta(seconds=look.spec.stages[status.stage].deadline_s)
    return max(quiet, look.hearing.ends(began, allowed)), "deadline"


def count(look: Look, members: Sequence[Member], reached: Sequence[Member], counters: Counters) -> Counters:
    """The counters with what they say of `members`, and of those in progress as they are by now."""
    aside = [member for member in reached if look.stands_aside(member)]
    waiting = [member for member in reached if is_open(member) and not look.stands_aside(member)]
    return replace(
        counters,
        members=len(members),
        reached=len(reached),
        waiting=len(waiting),
        waiting_since=min((member.enrolled_at for member in waiting), default=None),
        aside=tuple(member.id for member in aside[:NAMED]),
        aside_count=len(aside),
        on_version=sum(look.runs(member) and look.hears(member) for member in members),
        hearing=look.hearing,
    )


# --- ahead -----------------------------------------------------------------------------------------------


class Fall(NamedTuple):
    """A member becomes silent: when, what its attempt was, and when it joined."""

    at: datetime
    attempt: str | None
    joined: datetime


class Course:
    """What the quiet of some agents does to the counters of one status as time goes on.

    Args:
        now: from when on.
        first: the counters of then with all of them still waited for.
        staying: when each of those joined who are waited for and do not become silent.
        falls: those who do.
        running: how many run the release.
        leaves: when each of these that is not expected to report is heard of no more.
    """

    def __init__(
        self,
        now: datetime,
        first: Counters,
        staying: Sequence[datetime],
        falls: Sequence[Fall],
        running: int,
        leaves: Sequence[datetime],
    ) -> None:
        self.now, self.first, self.running, self.leaves = now, first, running, sorted(leaves)
        falls = sorted(falls, key=lambda fall: fall.at)
        self._times = [fall.at for fall in falls]
        self.looks = len(set(map(whole, self._times)))
        self._since: list[datetime | None] = [min(staying, default=None)]
        for fall in reversed(falls):
            last = self._since[-1]
            self._since.append(fall.joined if last is None else min(last, fall.joined))
        self._since.reverse()
        self._left = {
            state: list(accumulate((fall.attempt == state for fall in falls), initial=0))
            for state in {fall.attempt for fall in falls}
            if state is not None
        }

    def at(self, moment: datetime, *, before: bool) -> Counters:
        """The counters of a moment; `before`: nobody became silent just then, only earlier."""
        fallen = (bisect_left if before else bisect_right)(self._times, moment)
        attempts = Counter(self.first.attempts)
        attempts[AttemptState.SILENT] += fallen
        for state, left in self._left.items():
            attempts[AttemptState(state)] -= left[fallen]
        return replace(
            self.first,
            waiting=self.first.waiting - fallen,
            waiting_since=self._since[fallen],
            on_version=self._on_version(moment),
            attempts=attempts,
        )

    def _on_version(self, moment: datetime) -> int:
        if moment <= self.now:
            return self.first.on_version  # some that are expected have not been heard of yet
        return self.running - bisect_right(self.leaves, moment)

    def changes(self, now: datetime) -> Iterator[datetime]:
        """The next moment of each kind after `now` at which they change."""
        if (place := bisect_right(self._times, now)) < len(self._times):
            yield whole(self._times[place])  # of a large fleet many fall in one second: one look for all
        if self.leaves:
            yield self.leaves[-1]  # that some are left means nothing, that none is ends a way back


@dataclass
class Outlook:
    """A cohort's agents at later moments, when none has news and nobody asks anything.

    Those that are on time go on being heard as they are; those that are late, or silent, stay quiet. Their
    figures stay as they are.

    Attributes:
        look: at the moment from which it looks ahead.
        counters: of that moment, as stored.
    """

    look: Look
    members: Sequence[Member]
    counters: Counters
    _known: dict[Status, Course] = field(default_factory=dict)

    def at(self, spec: Spec, status: Status, moment: datetime) -> Counters:
        """What the census would count at a moment at which the rollout has this status."""
        return self._course(status).at(moment, before=spec.frozen)

    def changes(self, status: Status, now: datetime) -> Iterator[datetime]:
        """Moments after `now` at which that may change, the next of each kind."""
        return self._course(status).changes(now)

    def turns(self, status: Status) -> int:
        """How often it may change."""
        return self._course(status).looks

    def _course(self, status: Status) -> Course:
        status = replace(status, spec_revision=0, detail="", watch_at=None)  # which say nothing of agents
        if status not in self._known:
            self._known = {status: self._make(replace(self.look, status=status))}
        return self._known[status]

    def _make(self, look: Look) -> Course:
        reached = [member for member in self.members if member.place < look.status.progress]
        attempts, falls = Counter(self.counters.attempts), dict[str, Fall]()
        if look.corrects:
            reached = [_as_heard(look, member, attempts) for member in reached]
            falls = dict(self._falls(look, reached))
        running = [member for member in self.members if look.runs(member)]
        first = count(look, self.members, reached, replace(self.counters, attempts=attempts))
        return Course(
            look.now,
            first,
            [
                member.enrolled_at
                for member in reached
                if is_open(member) and not look.stands_aside(member) and member.id not in falls
            ],
            list(falls.values()),
            len(running),
            [look.quiet_from(member) for member in running if member.id in self._quiet],
        )

    @cached_property
    def _quiet(self) -> frozenset[str]:
        """Those of whom no word is expected any more."""
        look, late = self.look, standing.late_after(self.look.period)
        return frozenset(
            member.id for member in self.members if look.hearing.ends(member.seen_at, late) < look.now
        )

    def _falls(self, look: Look, reached: Sequence[Member]) -> Iterator[tuple[str, Fall]]:
        for member in reached:
            ends = silent_from(look, member) if member.id in self._quiet else None
            if ends is not None and ends[0] != NEVER:
                yield member.id, Fall(max(ends[0], look.now), member.attempt, member.enrolled_at)


def _as_heard(look: Look, member: Member, attempts: Counter[AttemptState]) -> Member:
    """A member as it is by what is heard of it, though its attempt does not say so yet; counted so."""
    now = truth(look, member) if look.hears(member) else None
    if now is None:
        return member
    attempts[now[0]] += 1
    if member.attempt is not None:
        attempts[AttemptState(member.attempt)] -= 1
    return member._replace(attempt=str(now[0]))


def whole(moment: datetime) -> datetime:
    """The first whole second that is not before a moment; the wire tells no parts of them."""
    return moment if not moment.microsecond else moment.replace(microsecond=0) + timedelta(seconds=1)
