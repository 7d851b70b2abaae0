"""Health figures of a release beside those of the one before, agent by agent. Pure; see docs/gates.md.

A leak needs an hour to show, long after the trial: what an agent reports after its commit is held against
what the same agent reported before it began.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

MIB = 2.0**20


@dataclass(frozen=True)
class Limit:
    """An agent is worse off when a figure is above `factor` times what it was, plus `slack`."""

    figure: str
    factor: float
    slack: float

    def is_worse(self, before: float, after: float) -> bool:
        return after > self.factor * before + self.slack


LIMITS = (
    Limit("rss", 2.0, 64 * MIB),
    Limit("cpu", 3.0, 50.0),
    Limit("fds", 3.0, 256.0),
    Limit("restarts", 1.0, 3.0),
    Limit("errors", 2.0, 100.0),
)
CHANCE, DOUBT = 0.05, 0.01
"""How often one agent is worse off for no fault of the release, and how unlikely it must be that all are."""


@dataclass(frozen=True)
class Worse:
    """A figure that the release has made worse: of `agents` compared, `worse` are."""

    figure: str
    worse: int
    agents: int

    def __str__(self) -> str:
        return f"{self.figure} worse on {self.worse} of {self.agents}"


def compare(pairs: Iterable[tuple[Mapping[str, float], Mapping[str, float]]]) -> tuple[Worse, ...]:
    """The figures that are worse on most agents, or on more than chance explains.

    Args:
        pairs: for each agent its figures before and now; a figure that one of them lacks is not compared.
    """
    seen = list(pairs)
    return tuple(found for limit in LIMITS if (found := _compare(limit, seen)) is not None)


def _compare(limit: Limit, pairs: list[tuple[Mapping[str, float], Mapping[str, float]]]) -> Worse | None:
    both = [
        (before[limit.figure], after[limit.figure])
        for before, after in pairs
        if limit.figure in before and limit.figure in after
    ]
    found = Worse(limit.figure, sum(limit.is_worse(*pair) for pair in both), len(both))
    is_most = 2 * found.worse > found.agents
    return found if is_most or _tail(found.agents, found.worse) < DOUBT else None


def _tail(agents: int, worse: int) -> float:
    """The chance that so many agents or more are worse off when the release is not at fault."""
    below = sum(comb(agents, k) * CHANCE**k * (1 - CHANCE) ** (agents - k) for k in range(worse))
    return 1.0 - below
