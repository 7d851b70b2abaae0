"""The only place that reads clocks: wall time for people and expiry, boot time for durations."""

from __future__ import annotations

import time
from datetime import UTC, datetime


def now() -> datetime:
    """Wall clock in UTC; may jump, so it never measures a duration."""
    return datetime.now(UTC)  # noqa: TID251 - this is the clock's home


def boot_s() -> float:
    """Seconds since boot, asleep or awake; for durations (design section 4)."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def iso(moment: datetime) -> str:
    """The wire's form of a time, `2026-01-31T12:00:00Z`, to the second."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_iso(text: str) -> datetime:
    """Read what `iso` wrote.

    Raises:
        ValueError: any other form.
    """
    return datetime.strptime(text, "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
