"""Stages of a rollout: how far each reaches, and what its gate allows. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from agent_core.errors import UsageError
from agent_core.wire import PROGRESS_FULL, Getter

MAX_STAGES = 50
DEADLINE_S = 7_200
"""A stage always has a deadline: without one a dead host would keep a rollout waiting for ever."""
LONGEST_S = 90 * 86_400


@dataclass(frozen=True)
class Stage:
    """How many agents a stage takes in, and what must be so before the next opens.

    Attributes:
        share_bp: basis points of the cohort, 1 to 10,000; or
        count: a number of agents.
        soak_s: how long nothing may fail after the last agent became healthy.
        min_sample: outcomes (healthy or failed) to see first, at most as many as the stage has agents.
        max_failed: failures allowed; `max_failed_bp` says it in basis points of the agents in progress.
        max_silent: silent agents allowed; None counts a silent agent as a failed one.
        deadline_s: after so long without finishing, silent agents are given up and others halt the stage.
    """

    share_bp: int | None = None
    count: int | None = None
    soak_s: int = 0
    min_sample: int = 1
    max_failed: int | None = None
    max_failed_bp: int | None = None
    max_silent: int | None = None
    deadline_s: int = DEADLINE_S

    def to_json(self) -> dict[str, Any]:
        return {
            "share_bp": self.share_bp,
            "count": self.count,
            "soak_s": self.soak_s,
            "min_sample": self.min_sample,
            "max_failed": self.max_failed,
            "max_failed_bp": self.max_failed_bp,
            "max_silent": self.max_silent,
            "deadline_s": self.deadline_s,
        }

    @classmethod
    def from_json(cls, stage: object, path: str = "stage") -> Self:
        get = Getter(stage, path)
        share_bp = get.integer("share_bp", None, low=1, high=PROGRESS_FULL)
        count = get.integer("count", None, low=1)
        if (share_bp is None) == (count is None):
            raise get.refuse("share_bp", "a stage has either a share or a count")
        return cls(
            share_bp=share_bp,
            count=count,
            soak_s=get.integer("soak_s", 0, high=LONGEST_S),
            min_sample=get.integer("min_sample", 1),
            max_failed=get.integer("max_failed", None),
            max_failed_bp=get.integer("max_failed_bp", None, high=PROGRESS_FULL),
            max_silent=get.integer("max_silent", None),
            deadline_s=get.integer("deadline_s", DEADLINE_S, low=1, high=LONGEST_S),
        )


def check_stages(stages: tuple[Stage, ...]) -> None:
    """Refuse stages that cannot mean what their writer thinks.

    Raises:
        UsageError: none, too many, or a later stage smaller than an earlier one of its kind.
    """
    if not 1 <= len(stages) <= MAX_STAGES:
        raise UsageError(
            f"a rollout has 1 to {MAX_STAGES} stages", why=f"{len(stages)} were given", reason="bad-stages"
        )
    for kind in ("share_bp", "count"):
        sizes = [size for stage in stages if (size := getattr(stage, kind)) is not None]
        if sizes != sorted(sizes):
            raise UsageError(
                "a stage is smaller than the one before it",
                why=f"{kind} goes {', '.join(map(str, sizes))}; agents are never taken out again",
                then="write the stages from small to large",
                reason="bad-stages",
            )


def wanted_count(stage: Stage, members: int) -> int:
    """How many of `members` agents a stage should reach: at least one, unless there is none."""
    if stage.count is not None:
        return min(stage.count, members)
    share = stage.share_bp or 0
    return min(members, max(1, -(-share * members // PROGRESS_FULL)))


def failed_limit(stage: Stage, reached: int) -> int:
    """How many may fail: the larger of the two limits when both are given, 0 when none is."""
    by_share = (stage.max_failed_bp or 0) * reached // PROGRESS_FULL
    return max(stage.max_failed or 0, by_share)
