"""A sequential test of a release's failures against what is usual in its cohort. Pure; see docs/gates.md.

The likelihood ratio of two failure rates is a test martingale while the rate is the usual one, so the chance
that it ever reaches 1/alpha is at most alpha, however often and at whatever moments one looks (Ville 1939; as
a sequential probability ratio test, Wald 1945, with the boundary for one side alone).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import Self

PRIOR_FAILED, PRIOR_ENDED = 1, 100
"""What is believed before anything was seen: one failure in a hundred agents."""
TIMES, AT_LEAST, AT_MOST = 5.0, 0.05, 0.9
"""The rate that is tested for: so many times the usual one, and so much above it at least."""
FALSE_HALT_BP = 100


@dataclass(frozen=True)
class Baseline:
    """How often agents of a cohort fail when nothing is wrong with a release, and what would be wrong."""

    usual: float
    wrong: float

    @classmethod
    def of(cls, failed: int, ended: int) -> Self:
        """By the cohort's completed rollouts: `failed` of `ended` attempts."""
        usual = (failed + PRIOR_FAILED) / (ended + PRIOR_ENDED)
        return cls(min(usual, AT_MOST - AT_LEAST), min(AT_MOST, max(TIMES * usual, usual + AT_LEAST)))


UNKNOWN = Baseline.of(0, 0)
"""Of a cohort that has completed no rollout yet."""


def evidence(baseline: Baseline, failed: int, ended: int) -> float:
    """How much likelier these outcomes are under the wrong rate than the usual one; natural logarithm."""
    good = ended - failed
    return failed * log(baseline.wrong / baseline.usual) + good * log(
        (1 - baseline.wrong) / (1 - baseline.usual)
    )


def boundary(false_halt_bp: int) -> float:
    """The evidence that halts; a good release halts with a chance of at most `false_halt_bp` basis points."""
    return log(10_000 / false_halt_bp)
