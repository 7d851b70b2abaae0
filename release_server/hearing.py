"""How much of a time the server could hear agents in: what silence, soaks and deadlines are counted in. Pure.

Time in which nobody listened does not count. After it hosts come back one after the other, each with its
next report: until all have had the time for one (`settle`), a third counts, and nothing that is up ends. Not
all counts, for few have been heard yet; and not nothing, for then a server that goes away again and again
would never find anybody silent (docs/decisions/0028).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

Gap = tuple[datetime, datetime]
"""From when to when nobody listened; `NEVER` where it goes on."""
NEVER = datetime.max.replace(tzinfo=UTC)
FULL = 3
"""What a microsecond counts; one after a gap counts 1, so that all of this is whole numbers."""
MOST_GAPS = 256
TICK, ZERO = timedelta(microseconds=1), timedelta()


def joined(gaps: Iterable[Gap], most: int = MOST_GAPS) -> tuple[Gap, ...]:
    """The gaps in order, those that touch as one; of too many those with the least between them too."""
    found: list[Gap] = []
    for start, end in sorted(gaps):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    while len(found) > most:
        place = min(range(len(found) - 1), key=lambda each: found[each + 1][0] - found[each][1])
        found[place : place + 2] = [(found[place][0], found[place + 1][1])]
    return tuple(found)


@dataclass(frozen=True)
class Hearing:
    """When the server could be heard, as one count that stands still while it could not.

    Attributes:
        gaps: as of `joined`.
        settle: how long after a gap every agent that is there has reported.
    """

    gaps: tuple[Gap, ...] = ()
    settle: timedelta = ZERO

    def ends(self, start: datetime, length: timedelta) -> datetime:
        """When a time that began at `start` is up; `NEVER` while nobody listens.

        A moment that has come does not move any more, whatever gaps come after it.
        """
        if not self.gaps or start >= self._whole_from:
            return start + length
        reached = max(start, self._moment(self._count(start) + length // TICK * FULL))
        place = bisect_left(self.gaps, (reached,)) - 1  # the last one that began before
        if place < 0 or reached == NEVER:
            return reached
        end = self.gaps[place][1]
        if end == NEVER:
            return NEVER
        return reached if reached >= end + self.settle else self._settled(end, reached)

    def up_before(self, now: datetime, length: timedelta) -> datetime:
        """What began before this moment, and nothing later, is up before `now`: `ends`, turned round."""
        latest = now - length
        if not self.gaps or latest <= (first := self.gaps[0][0] - length):
            return latest
        steps = range((latest - first) // TICK)
        return first + TICK * bisect_left(
            steps, True, key=lambda step: self.ends(first + TICK * step, length) >= now
        )

    def _settled(self, end: datetime, reached: datetime) -> datetime:
        return max(reached, self._moment(self._count(end) + self.settle // TICK))

    def is_deaf(self, now: datetime) -> bool:
        """Whether nobody listens at a moment."""
        place = bisect_left(self.gaps, (now,)) - 1
        return place >= 0 and now < self.gaps[place][1]

    def is_whole(self, start: datetime, now: datetime) -> bool:
        """Whether all of the time between two moments counts."""
        return not self.gaps or self._count(now) - self._count(start) == (now - start) // TICK * FULL

    @cached_property
    def _whole_from(self) -> datetime:
        """From when on all time counts; `NEVER` while nobody listens."""
        end = self.gaps[-1][1]
        return end if end == NEVER else end + self.settle

    @cached_property
    def _turns(self) -> tuple[list[datetime], list[int], list[int]]:
        """Moments from which on time counts otherwise, what had counted by then, and what a tick counts."""
        moments, counts, speeds = [self.gaps[0][0]], [0], [0]

        def turn(moment: datetime, speed: int) -> None:
            counts.append(counts[-1] + (moment - moments[-1]) // TICK * speeds[-1])
            moments.append(moment)
            speeds.append(speed)

        for (_, end), (following, _) in zip(self.gaps, (*self.gaps[1:], (NEVER, NEVER)), strict=True):
            if end == NEVER:
                break
            turn(end, 1)
            if following - end > self.settle:
                turn(end + self.settle, FULL)
            if following != NEVER:
                turn(following, 0)
        return moments, counts, speeds

    def _count(self, moment: datetime) -> int:
        moments, counts, speeds = self._turns
        place = bisect_right(moments, moment) - 1
        if place < 0:
            return (moment - moments[0]) // TICK * FULL
        return counts[place] + (moment - moments[place]) // TICK * speeds[place]

    def _moment(self, count: int) -> datetime:
        """The first at which so much has counted."""
        moments, counts, speeds = self._turns
        place = bisect_left(counts, count) - 1
        if place < 0:
            return moments[0] + -(-count // FULL) * TICK
        if not speeds[place]:
            return NEVER
        return moments[place] + -((counts[place] - count) // speeds[place]) * TICK


ALWAYS = Hearing()
