"""How an agent stands, from what is known of it and the time. Pure.

The first of these that holds: retired, pending, gone, silent, failed, held, late, ok.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from release_server.hearing import ALWAYS, Hearing

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

GRACE = timedelta(seconds=30)
COMES_BACK = timedelta(hours=1)
GONE = timedelta(days=30)
"""After so long without a word a host is not expected back; it stays counted until somebody retires it."""


class Standing(StrEnum):
    """What people see of an agent, the weightiest first."""

    RETIRED = "retired"
    PENDING = "pending"
    GONE = "gone"
    SILENT = "silent"
    FAILED = "failed"
    HELD = "held"
    LATE = "late"
    OK = "ok"


@dataclass(frozen=True)
class Facts:
    """All that a standing follows from.

    Attributes:
        period: how often it should be heard of, the longer of polls and reports.
        failed: it failed in the newest rollout of its cohort.
        hearing: when the server could hear it; who could not report is neither late nor silent.
    """

    seen_at: datetime
    period: timedelta
    hearing: Hearing = ALWAYS
    retired: bool = False
    pending: bool = False
    failed: bool = False
    held: bool = False


def late_after(period: timedelta) -> timedelta:
    """How long an agent may be quiet before it is late: one report missed, and a little."""
    return min(2 * period + GRACE, GONE)


def silent_after(period: timedelta) -> timedelta:
    """How long before it is silent: three reports missed, and a little."""
    return min(3 * period + GRACE, GONE)


def back_after(period: timedelta) -> timedelta:
    """After the server was away: how long until every agent that is there has reported; at most an hour."""
    return min(period + GRACE, COMES_BACK)


def standing(facts: Facts, now: datetime) -> Standing:
    """The one word for how an agent stands."""

    def is_quiet(after: Callable[[timedelta], timedelta]) -> bool:
        return facts.hearing.ends(facts.seen_at, after(facts.period)) < now

    ladder = (
        (Standing.RETIRED, facts.retired),
        (Standing.PENDING, facts.pending),
        (Standing.GONE, now - facts.seen_at > GONE),
        (Standing.SILENT, is_quiet(silent_after)),
        (Standing.FAILED, facts.failed),
        (Standing.HELD, facts.held),
        (Standing.LATE, is_quiet(late_after)),
    )
    return next((state for state, holds in ladder if holds), Standing.OK)
