"""When a cohort's window is open, by the clock on the wall of its time zone. Pure.

An update begins only while that clock reads a time within the window. So in the night in which an hour comes
twice a window within it is open both times, and in the night that lacks an hour a window within it does not
open. A host that does not know the zone cannot tell, and then the window is closed, with that reason: an
update at the wrong hour breaks the operator's word, one that waits breaks nothing.
"""

from __future__ import annotations

from datetime import UTC, datetime, time, timedelta, tzinfo
from functools import lru_cache
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from agent_core.wire import DAYS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent_core.wire import Window

MINUTE = timedelta(minutes=1)
DAY = timedelta(days=1)
DAYS_AHEAD = 15
"""A window of one day a week may fall into the hour that a night lacks; the week after it does not."""


@lru_cache(maxsize=4)
def zone_of(window: Window) -> tzinfo | None:
    """The window's zone, None when this host does not know it; UTC needs no host that knows zones."""
    if window.zone == "UTC":
        return UTC
    try:
        return ZoneInfo(window.zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return None


def is_open(window: Window, now: datetime) -> bool:
    """Whether an update may begin now; a window past midnight belongs to the day it began on."""
    zone = zone_of(window)
    if zone is None:
        return False
    local = now.astimezone(zone)
    start, end = time.fromisoformat(window.start), time.fromisoformat(window.end)
    today, yesterday = DAYS[local.weekday()], DAYS[local.weekday() - 1]
    clock = local.time()
    if start < end:
        return today in window.days and start <= clock < end
    return (today in window.days and clock >= start) or (yesterday in window.days and clock < end)


def next_opening(window: Window, now: datetime) -> datetime | None:
    """The next moment after `now`, in UTC, at which the window opens; None when that cannot be told."""
    zone = zone_of(window)
    if zone is None:
        return None
    today = now.astimezone(zone).date()
    for ahead in range(DAYS_AHEAD):
        midnight = datetime.combine(today + timedelta(days=ahead), time(), zone)
        for moment in _at(midnight, window.start):
            if moment > now and is_open(window, moment) and not is_open(window, moment - MINUTE):
                return moment
    return None


def next_change(window: Window, now: datetime) -> datetime | None:
    """The next moment, in UTC, at which the window opens or closes; None when that cannot be told."""
    zone = zone_of(window)
    if zone is None:
        return None
    today = now.astimezone(zone).date()
    before = is_open(window, now)
    for ahead in range(DAYS_AHEAD):
        midnight = datetime.combine(today + timedelta(days=ahead), time(), zone)
        edges = {moment for edge in ("00:00", window.start, window.end) for moment in _at(midnight, edge)}
        for moment in sorted(edges):
            if moment > now and is_open(window, moment) is not before:
                return moment
    return None


def _at(midnight: datetime, clock: str) -> Iterator[datetime]:
    """Where in one local day the clock may reach a time: then, or at any minute when clocks are changed."""
    begin, end = midnight.astimezone(UTC), (midnight + DAY).astimezone(UTC)
    if end - begin == DAY:
        moment = datetime.combine(midnight.date(), time.fromisoformat(clock), midnight.tzinfo)
        yield moment.astimezone(UTC)
    else:
        moment = begin
        while moment < end:
            yield moment
            moment += MINUTE
