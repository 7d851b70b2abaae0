"""Freeze calendars: what entries mean, also in nights in which clocks are changed, and what obeys them."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_core.errors import ConflictError, UsageError
from agent_core.wire import DAYS, Mode
from release_server import cohorts, explain, freezes
from release_server.freezes import Freeze
from release_server.stages import Stage
from tests.release_server.fleet_world import World
from tests.release_server.operator_desk import desk

MINUTE = timedelta(minutes=1)
BERLIN = "Europe/Berlin"


def at(text: str, zone: str = "UTC") -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone))


# --- what an entry means ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "begins", "ends"),
    [
        pytest.param("sat,sun", "2026-05-02T00:00", "2026-05-04T00:00", id="a weekend is one freeze"),
        pytest.param("fri 18:00-24:00", "2026-05-01T18:00", "2026-05-02T00:00", id="an evening"),
        pytest.param("fri 22:00-06:00", "2026-05-01T22:00", "2026-05-02T06:00", id="past midnight"),
        pytest.param("2026-11-27..2026-11-30", "2026-11-27T00:00", "2026-12-01T00:00", id="dated"),
        pytest.param("2026-12-24", "2026-12-24T00:00", "2026-12-25T00:00", id="one day"),
        pytest.param("12-20..01-04", "2026-12-20T00:00", "2027-01-05T00:00", id="a year's end"),
        pytest.param("11-4thu..12-01", "2026-11-26T00:00", "2026-12-02T00:00", id="the fourth Thursday"),
        pytest.param("02-29", "2026-03-01T00:00", "2026-03-02T00:00", id="a leap day in another year"),
    ],
)
@pytest.mark.parametrize("zone", ["UTC", BERLIN, "Pacific/Kiritimati", "America/New_York"])
def test_an_entry_freezes_from_its_beginning_until_its_end(entry, begins, ends, zone):
    calendar, first, last = {"x": f"{entry} {zone}"}, at(begins, zone), at(ends, zone)
    assert freezes.standing(calendar, first - MINUTE) is None
    assert freezes.standing(calendar, first) == Freeze("x", last)
    assert freezes.standing(calendar, last - MINUTE) == Freeze("x", last)
    assert freezes.standing(calendar, last) is None


def test_a_year_s_end_comes_again_every_year():
    calendar = {"year-end": f"12-20..01-04 {BERLIN}"}
    for year in (2025, 2030, 2039):
        assert freezes.standing(calendar, at(f"{year}-12-31T12:00")).until == at(
            f"{year + 1}-01-05T00:00", BERLIN
        )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "UTC",
        "sat",
        "sat Mars/Olympus",
        "sat ../../etc/passwd",
        "day UTC",
        "sat 8-9 UTC",
        "sat 25:00-26:00 UTC",
        "sat 08:00-09:00 10:00-11:00 UTC",
        "13-01 UTC",
        "02-30 UTC",
        "2026-02-29 UTC",
        "2026-12-20..01-04 UTC",
        "2026-12-20..2026-12-01 UTC",
        "11-5thu UTC",
        "11-4xyz UTC",
        "9999-12-31 UTC",
        "12-20... UTC",
    ],
)
def test_what_is_no_entry_is_refused(text):
    with pytest.raises(ValueError, match="x: "):
        freezes.check({"x": text})


def test_names_and_numbers_of_entries_have_limits():
    with pytest.raises(ValueError, match="cannot name"):
        freezes.check({"Year end": "sat UTC"})
    with pytest.raises(ValueError, match="more than"):
        freezes.check({f"n{number}": "sat UTC" for number in range(65)})


# --- several, and people ---------------------------------------------------------------------------------


def test_freezes_without_a_gap_end_with_the_last_of_them():
    calendar = {"weekend": "sat,sun UTC", "fair": "2026-05-04..2026-05-05 UTC"}
    assert freezes.standing(calendar, at("2026-05-02T12:00")) == Freeze("weekend", at("2026-05-06T00:00"))


@pytest.mark.parametrize(
    ("until", "found"),
    [
        pytest.param(None, Freeze("", None), id="without end"),
        pytest.param("2026-05-01T20:00", Freeze("", at("2026-05-01T20:00")), id="over before the calendar's"),
        pytest.param("2026-05-02T12:00", Freeze("", at("2026-05-04T00:00")), id="over within the calendar's"),
        pytest.param("2026-05-01T11:00", None, id="over already"),
    ],
)
def test_a_freeze_by_hand_goes_before_the_calendar_and_the_longer_one_counts(until, found):
    how = {"by_hand": True, "until": until and at(until)}
    assert freezes.standing({"weekend": "sat,sun UTC"}, at("2026-05-01T12:00"), **how) == found


def test_a_calendar_that_never_opens_has_no_end():
    calendar = {"week": "mon-fri UTC", "weekend": "sat,sun UTC"}
    assert freezes.standing(calendar, at("2026-05-01T12:00")) == Freeze("week", None)


# --- any zone, any night ---------------------------------------------------------------------------------

ZONES = st.sampled_from(
    [
        BERLIN,
        "America/New_York",
        "Australia/Lord_Howe",
        "America/Sao_Paulo",
        "Asia/Kathmandu",
        "Africa/Casablanca",
    ]
)
CLOCKS = st.integers(0, 47).map(lambda half: f"{half // 2:02}:{half % 2 * 30:02}")
WEEKLY = st.builds(
    lambda days, start, end: f"{','.join(sorted(days))} {start}-{end}",
    st.sets(st.sampled_from(DAYS), min_size=1, max_size=5),
    CLOCKS,
    CLOCKS,
)
DATES = st.dates(date(2020, 1, 1), date(2038, 12, 31))
DATED = st.builds(lambda first, days: f"{first}..{first + timedelta(days=days)}", DATES, st.integers(0, 40))
ENTRIES = st.one_of(WEEKLY, DATED)
MOMENTS = st.one_of(
    st.datetimes(datetime(2020, 1, 1), datetime(2038, 12, 31)),  # noqa: DTZ001 - in UTC below
    st.builds(  # the nights in which clocks are changed
        datetime.combine,
        st.sampled_from([date(2026, 3, 29), date(2026, 10, 25), date(2026, 11, 1)]),
        st.times(),
    ),
).map(lambda moment: moment.replace(second=0, microsecond=0, tzinfo=UTC))


@given(ENTRIES, ZONES, MOMENTS)
def test_whenever_the_clock_on_the_wall_reads_a_frozen_hour_it_is_frozen(entry, zone, moment):
    frozen = freezes.standing({"x": f"{entry} {zone}"}, moment) is not None
    local = moment.astimezone(ZoneInfo(zone))
    if reads_frozen(entry, local):
        assert frozen
    elif frozen:  # never on a usual day: only where one time on the wall means two
        near = (local + timedelta(days=ahead) for ahead in (-1, 0, 1))
        offsets = {each.utcoffset() for day in near for each in (day, day.replace(fold=1))}
        assert len(offsets) > 1


def reads_frozen(entry: str, local: datetime) -> bool:
    """The plain meaning of an entry, by the clock on the wall alone."""
    when, _, hours = entry.partition(" ")
    if ".." in when:
        first, last = map(date.fromisoformat, when.split(".."))
        return first <= local.date() <= last
    start, end = map(time.fromisoformat, hours.split("-"))
    today, before, clock = DAYS[local.weekday()], DAYS[local.weekday() - 1], local.time()
    if start < end:
        return today in when and start <= clock < end
    return (today in when and clock >= start) or (before in when and clock < end)


@given(st.lists(ENTRIES, min_size=1, max_size=3), ZONES, MOMENTS)
def test_until_is_when_it_opens_and_the_next_beginning_is_when_it_closes(entries, zone, moment):
    calendar = {f"e{number}": f"{entry} {zone}" for number, entry in enumerate(entries)}
    found = freezes.standing(calendar, moment)
    if found is None:
        begins = freezes.next_beginning(calendar, moment)
        if begins is not None:
            assert begins > moment
            assert freezes.standing(calendar, begins) is not None
            assert freezes.standing(calendar, begins - MINUTE) is None
    elif found.until is not None:
        assert found.until > moment
        assert freezes.standing(calendar, found.until) is None
        assert freezes.standing(calendar, found.until - MINUTE) is not None


# --- what obeys them -------------------------------------------------------------------------------------


@pytest.fixture
def world(sessions, clock):
    """It is Friday, 2026-05-01, 12:00 UTC."""
    made = World(sessions, clock)
    made.cohort(calendar={"weekend": f"sat,sun {BERLIN}"})
    return made


def test_a_directive_is_suspended_while_the_calendar_says_so(world):
    assert world.directive().mode is Mode.ENABLED
    assert world.view().status.due_at == at("2026-05-02T00:00", BERLIN)
    world.tick(hours=10)
    assert world.directive().mode is Mode.SUSPENDED
    world.tick(hours=48)
    assert world.directive().mode is Mode.ENABLED
    assert world.view().status.due_at == at("2026-05-09T00:00", BERLIN)


def test_a_rollout_waits_through_the_freeze_and_its_deadline_stands_still(world):
    host = world.enroll("web-1")
    rollout = world.start("1.1.0", Stage(share_bp=10_000, deadline_s=3600))
    world.tick(minutes=1)
    world.tick(hours=10)
    assert world.offered("1.1.0") == []
    for _ in range(48):
        world.report(host)
        world.tick(hours=1)
    assert world.status(rollout).state == "running"
    assert world.offered("1.1.0") == [host]


def test_why_names_the_entry_and_when_it_ends(world):
    world.enroll("web-1")
    world.start("1.1.0", Stage(share_bp=10_000))
    world.tick(minutes=1)
    world.tick(hours=10)
    with world.read() as session:
        told = explain.agent_why(session, world.clock(), "web-1")
    frozen = next(link for link in told["chain"] if link["code"] == "frozen")
    assert frozen["text"] == "cohort all is frozen until 2026-05-03 22:00 UTC: by the calendar (weekend)"
    assert (frozen["until"], frozen["seen"]) == ("2026-05-03T22:00:00Z", {"by": "weekend"})


def test_no_rollout_starts_in_a_freeze_by_the_calendar(world):
    world.tick(hours=11)
    with pytest.raises(ConflictError) as refused:
        world.start("1.1.0")
    assert (refused.value.reason, refused.value.why) == ("frozen", "by its calendar: weekend")


def test_a_calendar_that_cannot_be_read_is_refused(world):
    with pytest.raises(UsageError) as refused:
        world.call(cohorts.edit, "demo", "all", calendar={"x": "sat"})
    assert refused.value.reason == "bad-calendar"


def test_a_calendar_is_typed_shown_and_taken_off_and_unfreezing_leaves_it(
    world, app, token, tmp_path, monkeypatch, capsys
):
    with desk(app, token, tmp_path, monkeypatch, capsys) as at_desk:
        entries = ("--calendar", "year-end=12-20..01-04  UTC", "--calendar", "fair=2026-05-01 UTC")
        made = at_desk.json("cohort", "edit", "all", *entries)
        assert made["calendar"] == {"year-end": "12-20..01-04 UTC", "fair": "2026-05-01 UTC"}
        assert (made["frozen"], made["frozen_by"], made["freeze"]) == (True, "fair", None)
        assert "frozen until 2026-05-02T00:00:00Z (fair)" in at_desk.run("cohort", "show", "all")[1]
        at_desk.json("cohort", "freeze", "--all", "--reason", "an incident")
        assert world.view().freeze == Freeze("", None)
        assert len(at_desk.json("cohort", "unfreeze", "--all")) == 1
        assert at_desk.json("cohort", "unfreeze", "--all") == []
        assert world.view().freeze.by == "fair"
        assert at_desk.run("cohort", "edit", "all", "--calendar", "x=sat")[0] == 2
        assert at_desk.json("cohort", "edit", "all", "--poll", "9s")["calendar"]
        assert at_desk.json("cohort", "edit", "all", "--calendar", "none")["frozen"] is False
