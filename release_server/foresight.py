"""What a rollout does next when nobody asks anything and no agent has news: `reconcile`, asked ahead. Pure.

Agents that are on time go on being heard as they are; those that are late stay quiet (`members.Outlook`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

from agent_core.window import is_open, next_change
from release_server import freezes
from release_server.hearing import NEVER, ZERO
from release_server.rollout import State, reconcile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from agent_core.wire import Window
    from release_server.freezes import Freeze
    from release_server.rollout import Counters, Event, Spec, Status

MOST_LOOKS = 200
"""A move behind more changes of window and calendar than this is not foretold."""


@dataclass(frozen=True)
class Allowance:
    """What a cohort allows its rollouts, and how that changes by itself as time goes on.

    Attributes:
        by_hand: a person froze it, until `until`, or without end.
        window: when agents may begin; None: always.
        stopped: what a stop file says, where there is one; it has no end that anybody knows.
    """

    by_hand: bool = False
    until: datetime | None = None
    calendar: Mapping[str, str] = field(default_factory=dict)
    window: Window | None = None
    stopped: str | None = None

    def freeze(self, now: datetime) -> Freeze | None:
        """What freezes the cohort at a moment."""
        return freezes.standing(self.calendar, now, by_hand=self.by_hand, until=self.until)

    def at(self, spec: Spec, now: datetime) -> Spec:
        """The spec as it is at a moment, other things equal."""
        window_open = self.window is None or is_open(self.window, now)
        frozen = self.stopped is not None or self.freeze(now) is not None
        return replace(spec, frozen=frozen, window_open=window_open)

    def changes(self, now: datetime) -> Iterator[datetime | None]:
        """When the freeze that holds ends or the next one begins, and when the window opens or closes."""
        freeze = self.freeze(now)
        yield freeze.until if freeze else freezes.next_beginning(self.calendar, now)
        if self.window is not None:
            yield next_change(self.window, now)


@dataclass(frozen=True)
class _Remembering(Allowance):
    """The same for one forecast, whose moments only go on: a calendar is read once for each change."""

    _last: list[tuple[datetime, Freeze | None, datetime | None]] = field(default_factory=list)

    def freeze(self, now: datetime) -> Freeze | None:
        return self._read(now)[1]

    def changes(self, now: datetime) -> Iterator[datetime | None]:
        yield self._read(now)[2]
        if self.window is not None:
            yield next_change(self.window, now)

    def _read(self, now: datetime) -> tuple[datetime, Freeze | None, datetime | None]:
        """Since when it is known, what freezes then, and until when that is so."""
        if self._last:
            since, _, until = self._last[-1]
            if since <= now and (until is None or now < until):
                return self._last[-1]
        freeze = super().freeze(now)
        until = freeze.until if freeze else freezes.next_beginning(self.calendar, now)
        known = (now, freeze, until)
        too_long = freeze is not None and until is None and not self.by_hand  # its end is only not told yet
        self._last[:] = [] if too_long else [known]
        return known


class Fleet(Protocol):
    """How the agents look at later moments; `members.Outlook` is one."""

    def at(self, spec: Spec, status: Status, moment: datetime) -> Counters: ...
    def changes(self, status: Status, now: datetime) -> Iterator[datetime]: ...
    def turns(self, status: Status) -> int: ...


@dataclass(frozen=True)
class Still:
    """Agents that look the same at any moment."""

    counters: Counters

    def at(self, spec: Spec, status: Status, moment: datetime) -> Counters:
        return self.counters

    def changes(self, status: Status, now: datetime) -> Iterator[datetime]:
        return iter(())

    def turns(self, status: Status) -> int:
        return 0


@dataclass(frozen=True)
class Move:
    """The next step of a rollout: when, and what happens then."""

    at: datetime
    events: tuple[Event, ...]

    @property
    def event(self) -> Event:
        """The one that says where it is after it."""
        return self.events[-1]


def foresee(spec: Spec, status: Status, fleet: Fleet, now: datetime, allowance: Allowance) -> Move | None:
    """The next step that time alone brings, other things equal; None where only a person or an agent can.

    `reconcile` itself is asked at each moment at which its answer may change, so this cannot differ from it.
    """
    moment, allowance = now, _Remembering(**vars(allowance))
    for _ in range(MOST_LOOKS + fleet.turns(status)):
        spec_then = allowance.at(spec, moment)
        counters = fleet.at(spec_then, status, moment)
        following = reconcile(spec_then, status, counters, moment)
        if following.events:
            return Move(moment, following.events)
        status = following.status
        changing = (*_turns(spec, status, counters, moment, allowance), *fleet.changes(status, moment))
        later = [each for each in changing if moment < each < NEVER]
        if not later:
            return None
        moment = min(later)
    return None


def _turns(
    spec: Spec, status: Status, counters: Counters, now: datetime, allowance: Allowance
) -> Iterator[datetime]:
    """Every moment by which `reconcile` decides anything."""
    fixed = (
        spec.not_before,
        soak_end(spec, status, counters),
        deadline(spec, status, counters),
        watch_end(status, counters),
        counters.hearing.ends(now, ZERO),
    )
    changing = allowance.changes(now) if status.state in (State.SCHEDULED, State.RUNNING) else ()
    yield from (moment for moment in (*fixed, *changing) if moment is not None)


def soak_end(spec: Spec, status: Status, counters: Counters) -> datetime | None:
    """When the present stage has stayed good for long enough; `NEVER` while nobody listens."""
    if status.soaking_since is None:
        return None
    soak = timedelta(seconds=spec.stages[status.stage].soak_s)
    return counters.hearing.ends(status.soaking_since, soak)


def watch_end(status: Status, counters: Counters) -> datetime | None:
    """When the watch over a completed rollout ends; `NEVER` while nobody listens."""
    return None if status.watch_until is None else counters.hearing.ends(status.watch_until, ZERO)


def deadline(spec: Spec, status: Status, counters: Counters) -> datetime | None:
    """When the present stage's time is up: of its agents where some are unfinished, else of its sample.

    `NEVER` while nobody listens.
    """
    if status.opened_at is None:
        return None
    since = status.opened_at
    if counters.waiting:
        since = max(since, counters.waiting_since or since)
    return counters.hearing.ends(since, timedelta(seconds=spec.stages[status.stage].deadline_s))
