"""Windows by the clock on the wall: past midnight, in the nights when it is changed, and without its zone."""

from __future__ import annotations

import os
import subprocess
import sys
import zoneinfo
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from agent_core.window import MINUTE, is_open, next_change, next_opening
from agent_core.wire import DAYS, Window

MONDAY_NIGHT = Window(("mon",), "22:00", "04:00", "UTC")
ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/Havana", "Asia/Kolkata")
"""Among them a change of half an hour, and one at midnight."""


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def every_day(start: str, end: str, zone: str = "Europe/Berlin") -> Window:
    return Window(DAYS, start, end, zone)


@pytest.mark.parametrize(
    ("moment", "is_in"),
    [
        ("2026-03-02T21:59", False),
        ("2026-03-02T22:00", True),
        ("2026-03-03T03:59", True),
        ("2026-03-03T04:00", False),
        ("2026-03-03T22:30", False),
        ("2026-03-02T01:00", False),
    ],
)
def test_a_window_past_midnight_belongs_to_the_day_it_began_on(moment, is_in):
    assert is_open(MONDAY_NIGHT, utc(moment)) is is_in


def test_a_window_is_in_the_cohorts_own_time():
    berlin = Window(("mon",), "12:00", "13:00", "Europe/Berlin")
    assert is_open(berlin, utc("2026-03-02T11:30"))
    assert is_open(berlin, utc("2026-07-06T10:30"))


def test_in_the_night_that_lacks_an_hour_a_window_opens_when_the_clocks_have_been_put_on():
    window = every_day("02:30", "05:00")
    before = utc("2026-03-29T00:00")
    assert next_opening(window, before) == utc("2026-03-29T01:00")
    assert not is_open(window, utc("2026-03-29T00:59"))


def test_a_window_within_the_hour_that_a_night_lacks_opens_the_day_after():
    assert next_opening(every_day("02:15", "02:45"), utc("2026-03-28T23:00")) == utc("2026-03-30T00:15")


def test_in_the_night_in_which_an_hour_comes_twice_a_window_is_open_both_times():
    window = every_day("02:15", "02:45")
    first, second = utc("2026-10-25T00:15"), utc("2026-10-25T01:15")
    assert next_opening(window, first - MINUTE) == first
    assert next_opening(window, first) == second
    assert not is_open(window, utc("2026-10-25T00:45"))
    assert is_open(window, second)


def test_clocks_that_are_put_back_into_a_window_open_it_again():
    window = every_day("01:30", "02:30")
    assert next_opening(window, utc("2026-10-25T00:40")) == utc("2026-10-25T01:00")


def test_a_window_without_length_is_open_all_day_from_its_start_on():
    monday = Window(("mon",), "06:00", "06:00", "UTC")
    assert [is_open(monday, utc(moment)) for moment in ("2026-03-02T05:59", "2026-03-03T05:59")] == [
        False,
        True,
    ]


CLOCK_TIMES = st.times().map(lambda moment: f"{moment:%H:%M}")
MOMENTS = st.integers(0, 3 * 366 * 24 * 60).map(lambda minutes: utc("2026-01-01T00:00") + minutes * MINUTE)
WINDOWS = st.builds(
    Window,
    st.lists(st.sampled_from(DAYS), min_size=1).map(tuple),
    CLOCK_TIMES,
    CLOCK_TIMES,
    st.sampled_from(ZONES),
)


@given(WINDOWS, MOMENTS)
@settings(max_examples=200)
def test_a_window_is_open_only_while_the_clock_on_the_wall_says_so(window, moment):
    wall = moment.astimezone(ZoneInfo(window.zone))
    start, end, now = time.fromisoformat(window.start), time.fromisoformat(window.end), wall.time()
    within = start <= now < end if start < end else now >= start or now < end
    assert within or not is_open(window, moment)


@given(WINDOWS, MOMENTS, st.floats(0, 1))
@example(every_day("02:15", "02:45"), utc("2026-03-28T23:00"), 0.5)
@settings(max_examples=200)
def test_the_next_opening_is_open_and_nothing_is_open_before_it(window, moment, part):
    if is_open(window, moment):
        return
    opens = next_opening(window, moment)
    assert opens is not None
    assert moment < opens
    assert is_open(window, opens)
    between = moment + timedelta(minutes=int((opens - moment) / MINUTE * part))
    assert between == opens or not is_open(window, between)
    assert not is_open(window, opens - MINUTE)


@given(WINDOWS, MOMENTS, st.floats(0, 1))
@example(every_day("02:15", "02:45"), utc("2026-03-28T23:00"), 0.5)
@example(every_day("02:15", "02:45"), utc("2026-10-25T00:20"), 0.5)
@example(Window(DAYS, "06:00", "06:00", "UTC"), utc("2026-03-02T06:00"), 0.5)
@settings(max_examples=100)
def test_the_next_change_is_one_and_nothing_changes_before_it(window, moment, part):
    before, changes = is_open(window, moment), next_change(window, moment)
    if changes is None:
        assert set(window.days) == set(DAYS)
        changes = moment + timedelta(days=9)
    else:
        assert is_open(window, changes) is not before
    between = moment + timedelta(minutes=int((changes - moment) / MINUTE * part))
    assert between == changes or is_open(window, between) is before


@pytest.mark.parametrize(
    "zone", ["Europe/Nowhere", "../../etc/passwd", "/etc/localtime", "", "\0", "x" * 300]
)
def test_a_window_whose_zone_is_not_known_is_closed(zone):
    window = every_day("00:00", "23:59", zone)
    assert not is_open(window, utc("2026-03-02T12:00"))
    assert next_opening(window, utc("2026-03-02T12:00")) is None
    assert next_change(window, utc("2026-03-02T12:00")) is None


def test_a_host_without_zones_takes_those_its_bundle_brings(tmp_path):
    """The host's zones are looked for first, then the package `tzdata`, which a product may carry along."""
    zones = tmp_path / "tzdata"
    (zones / "zoneinfo" / "Europe").mkdir(parents=True)
    for place in (zones, zones / "zoneinfo", zones / "zoneinfo" / "Europe"):
        (place / "__init__.py").touch()
    host = next(place for place in map(Path, zoneinfo.TZPATH) if place.is_dir())
    (zones / "zoneinfo" / "Europe" / "Berlin").write_bytes((host / "Europe" / "Berlin").read_bytes())
    ask = (
        "from agent_core.wire import Window; from agent_core.window import zone_of\n"
        "print(*(zone_of(Window(('mon',), '00:00', '01:00', zone)) for zone in ('Europe/Berlin', 'UTC')))"
    )

    def told(path: str) -> str:
        environment = {**os.environ, "PYTHONTZPATH": "", "PYTHONPATH": path}
        done = subprocess.run(
            [sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert told("") == "None UTC"
    assert told(str(tmp_path)) == "Europe/Berlin UTC"
