"""Routes from one release to another: stepping stones, barriers and dead ends, by what is signed. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True)
class Stop:
    """A release as far as a route needs it.

    Attributes:
        from_seq: it installs only over a release of this seq or a later one.
        barrier: nobody goes past it without having run it.
    """

    version: str
    seq: int
    from_seq: int = 0
    barrier: bool = False


def route(stops: Iterable[Stop], here: int, there: int) -> tuple[Stop, ...] | None:
    """The fewest releases that lead from seq `here` to seq `there`, the last of them included.

    Returns:
        None when no way leads there: `here` is a dead end for it.
    """
    between = sorted((stop for stop in stops if here < stop.seq <= there), key=lambda stop: stop.seq)
    ways: dict[int, tuple[Stop, ...]] = {here: ()}
    for place, stop in enumerate(between):
        froms = [way for seq, way in ways.items() if _leads(seq, stop, between[:place])]
        if froms:
            ways[stop.seq] = (*min(froms, key=len), stop)
    return ways.get(there)


def _leads(seq: int, stop: Stop, before: Sequence[Stop]) -> bool:
    passed = (other for other in before if other.barrier and other.seq > seq)
    return seq >= stop.from_seq and not any(passed)
