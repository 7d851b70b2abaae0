r"""Freeze calendars: when a cohort takes nothing new by the calendar, and until when. Pure.

    entry = when zone
    when  = days [ HH:MM-HH:MM ]          every week: `sat,sun`, `fri 18:00-24:00`, `mon-fri 07:00-19:00`
          | date [ ".." date ]            whole days, both ends within: `2026-12-20..2027-01-04`
    date  = YYYY-MM-DD                    once
          | MM-DD | MM-Nddd               every year: `12-24`, `11-4thu` is the fourth Thursday of November

The times are those of the clock on the wall of the zone. In the nights in which clocks are changed a freeze
is the longer of what its words can mean: one that lasts an hour too long breaks nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import lru_cache
from typing import TYPE_CHECKING
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from agent_core.wire import DAYS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
MOST_ENTRIES = 64
MOST_LINKS = 40
"""A chain of freezes without a gap that is longer than this has no end that anybody waits for."""
DAY = timedelta(days=1)
HOURS = re.compile(r"([01]\d|2[0-3]):([0-5]\d)-(?:([01]\d|2[0-3]):([0-5]\d)|24:00)")
DATE = re.compile(r"(?:(20\d\d)-)?(\d\d)-(?:(\d\d)|([1-4])([a-z]{3}))")

Span = tuple[datetime, datetime]
"""From, and until but not including; in UTC."""


@dataclass(frozen=True)
class Weekly:
    """The same hours of some days of each week; `end` not after `start` is of the next day."""

    days: frozenset[str]
    start: time
    end: time
    zone: ZoneInfo

    def spans(self, near: date) -> Iterator[Span]:
        """Those that begin within eight days of `near`, which hold one of each day."""
        for ahead in range(-8, 9):
            day = near + ahead * DAY
            if DAYS[day.weekday()] in self.days:
                last = day if self.end > self.start else day + DAY
                yield _earliest(day, self.start, self.zone), _latest(last, self.end, self.zone)


@dataclass(frozen=True)
class Dated:
    """Whole days, once or every year; `first` and `last` are as they are written."""

    first: str
    last: str
    zone: ZoneInfo

    def spans(self, near: date) -> Iterator[Span]:
        """The only one, or those of the years around."""
        years = (near.year,) if DATE.fullmatch(self.first)[1] else range(near.year - 1, near.year + 2)  # type: ignore[index]
        for year in years:
            first, last = _day(self.first, year), _day(self.last, year)
            if last < first:
                last = _day(self.last, year + 1)
            yield _earliest(first, time(), self.zone), _latest(last + DAY, time(), self.zone)


Entry = Weekly | Dated


@dataclass(frozen=True)
class Freeze:
    """A cohort takes nothing new; `by` is the calendar's entry, empty where a person said so."""

    by: str
    until: datetime | None


def standing(
    calendar: Mapping[str, str], now: datetime, *, by_hand: bool = False, until: datetime | None = None
) -> Freeze | None:
    """What freezes a cohort now, and until when all of it together does.

    Args:
        calendar: entries by name, each of which can be read.
        by_hand: a person froze it, until `until`, or without end.
    """
    by_hand = by_hand and (until is None or now < until)
    if by_hand and until is None:
        return Freeze("", None)
    entries = {name: read(text) for name, text in calendar.items()}
    by = "" if by_hand else next((name for name, entry in entries.items() if _end(entry, now)), None)
    if by is None:
        return None
    ends = until if by_hand and until else now
    for _ in range(MOST_LINKS):
        later = [end for entry in entries.values() if (end := _end(entry, ends))]
        if not later:
            return Freeze(by, ends)
        ends = max(later)
    return Freeze(by, None)


def next_beginning(calendar: Mapping[str, str], now: datetime) -> datetime | None:
    """When the next freeze by the calendar begins; None where none is to come."""
    spans = (span for text in calendar.values() for span in _around(read(text), now))
    return min((start for start, _ in spans if start > now), default=None)


def _end(entry: Entry, moment: datetime) -> datetime | None:
    """The end of the entry's freeze that holds at a moment."""
    return max((end for start, end in _around(entry, moment) if start <= moment < end), default=None)


def _around(entry: Entry, moment: datetime) -> Iterator[Span]:
    return entry.spans(moment.astimezone(entry.zone).date())


# --- reading ---------------------------------------------------------------------------------------------


def check(calendar: Mapping[str, str]) -> dict[str, str]:
    """A calendar with every entry in its plainest form.

    Raises:
        ValueError: an entry, or its name, cannot be read; it says which.
    """
    if len(calendar) > MOST_ENTRIES:
        raise ValueError(f"it has more than {MOST_ENTRIES} entries")
    for name, text in calendar.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"{name[:80]!r} cannot name an entry: a name has the form {NAME.pattern}")
        try:
            read(" ".join(text.split()))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return {name: " ".join(text.split()) for name, text in calendar.items()}


@lru_cache(maxsize=1024)
def read(text: str) -> Entry:
    """Read one entry, `12-20..01-04 Europe/Berlin`.

    Raises:
        ValueError: it cannot be read.
    """
    *when, zone_name = text.split()
    zone = _zone(zone_name) if when else None
    if zone is not None and len(when) == 1 and DATE.match(when[0]):
        return _dated(when[0], zone)
    if zone is not None and len(when) <= 2:
        hours = HOURS.fullmatch(when[1]) if len(when) == 2 else HOURS.fullmatch("00:00-24:00")
        if hours is not None:
            return Weekly(_days(when[0]), *_hours(hours), zone)
    raise ValueError(
        f"{text[:80]!r} is none of `sat,sun ZONE`, `fri 18:00-24:00 ZONE` and `12-20..01-04 ZONE`"
    )


def days(text: str) -> list[str]:
    """Read `mon,wed` or `sat-mon`; a range may pass the end of the week.

    Raises:
        ValueError: it cannot be read.
    """
    found: list[str] = []
    for part in text.lower().split(","):
        first, _, last = part.partition("-")
        if first not in DAYS or (last or first) not in DAYS:
            raise ValueError(f"{part!r} is not a day or a range of days such as mon-fri")
        place, end = DAYS.index(first), DAYS.index(last or first)
        found += [DAYS[(place + step) % 7] for step in range((end - place) % 7 + 1)]
    return list(dict.fromkeys(found))


def _days(text: str) -> frozenset[str]:
    return frozenset(days(text))


def _hours(found: re.Match[str]) -> tuple[time, time]:
    end = time(int(found[3]), int(found[4])) if found[3] else time()
    return time(int(found[1]), int(found[2])), end


def _dated(text: str, zone: ZoneInfo) -> Dated:
    first, dots, last = text.partition("..")
    found = [DATE.fullmatch(part) for part in (first, last if dots else first)]
    begin, end = found
    if begin is None or end is None or (begin[1] is None) != (end[1] is None):
        raise ValueError(f"{text[:80]!r} is not days such as 2026-12-20..2027-01-04 or 12-20..01-04")
    for part in found:
        _day(part[0], 2024)  # type: ignore[index]  # a leap year: every day there is, is in it
    if begin[1] and _day(begin[0], 0) > _day(end[0], 0):
        raise ValueError(f"{text[:80]!r} ends before it begins")
    return Dated(begin[0], end[0], zone)


def _day(text: str, year: int) -> date:
    """The day that a date means, in a year where it names none.

    Raises:
        ValueError: there is no such day, or no such month.
    """
    found = DATE.fullmatch(text)
    assert found is not None
    own, month = int(found[1] or year), int(found[2])
    if not 1 <= month <= 12:
        raise ValueError(f"{text!r} is not a day: there is no month {month}")
    if found[4] is None:
        return _existing(own, month, int(found[3]), leap=found[1] is None)
    if found[5] not in DAYS:
        raise ValueError(f"{text!r} is not a day such as 11-4thu")
    first = date(own, month, 1)
    return first + timedelta(days=(DAYS.index(found[5]) - first.weekday()) % 7 + 7 * (int(found[4]) - 1))


def _existing(year: int, month: int, day: int, *, leap: bool) -> date:
    """That day; with `leap` the first of March where a year has no 29th of February."""
    if leap and (month, day) == (2, 29):
        return date(year, 2, 28) + DAY
    try:
        return date(year, month, day)
    except ValueError:
        raise ValueError(f"there is no day {month:02}-{day:02}") from None


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise ValueError(f"{name[:64]!r} is not a time zone such as Europe/Berlin") from None


def _earliest(day: date, clock: time, zone: ZoneInfo) -> datetime:
    return min(_readings(day, clock, zone))


def _latest(day: date, clock: time, zone: ZoneInfo) -> datetime:
    return max(_readings(day, clock, zone))


def _readings(day: date, clock: time, zone: ZoneInfo) -> Iterator[datetime]:
    """The moments that a time on the wall can mean: two where clocks are set back, or set on over it."""
    for fold in (0, 1):
        yield datetime.combine(day, clock.replace(fold=fold), zone).astimezone(UTC)
