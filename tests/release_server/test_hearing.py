"""Only time in which the server could hear agents counts, and agents that are there are never silent."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from release_server import standing
from release_server.hearing import NEVER, TICK, Hearing, joined

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)


def gaps(*minutes):
    return tuple(
        (NOW + start * MINUTE, NEVER if end is None else NOW + end * MINUTE) for start, end in minutes
    )


@pytest.mark.parametrize(
    ("missed", "start", "length", "ends"),
    [
        pytest.param((), 0, 10, 10, id="the server was always there"),
        pytest.param(((20, 50),), 0, 10, 10, id="over before it went away"),
        pytest.param(((-50, -20),), 0, 10, 10, id="begun long after it was back"),
        pytest.param(((10, 70),), 0, 40, 104, id="ten before, two of six, and all of the rest"),
        pytest.param(((10, 70),), 0, 11, 76, id="up while hosts come back: all of them first"),
        pytest.param(((10, 70),), 30, 0, 76, id="over while it was away: not before it has heard of it"),
        pytest.param(((10, 70),), 72, 0, 76, id="over just after it was back: neither"),
        pytest.param(((-9, -3),), 0, 10, 12, id="begun while hosts come back"),
        pytest.param(((10, None),), 0, 11, None, id="away still"),
        pytest.param(((10, None),), 0, 10, 10, id="over just before it went away"),
        pytest.param(((1, 2), (3, 4), (5, 6), (7, 8)), 0, 3, 14, id="a third of each minute between"),
        pytest.param(((10, 70), (73, 80), (90, 100)), 0, 11, 83, id="what was listened of the six goes on"),
    ],
)  # fmt: skip
def test_time_counts_while_the_server_listens_and_a_third_while_hosts_come_back(missed, start, length, ends):
    told = Hearing(gaps(*missed), 6 * MINUTE).ends(NOW + start * MINUTE, length * MINUTE)
    assert told == (NEVER if ends is None else NOW + ends * MINUTE)


def test_it_is_deaf_in_a_gap_and_time_is_whole_outside_of_them():
    heard = Hearing(gaps((10, 20)), MINUTE)
    assert [heard.is_deaf(NOW + minute * MINUTE) for minute in (9, 10, 11, 19, 20)] == [0, 0, 1, 1, 0]
    assert [heard.is_whole(NOW + minute * MINUTE, NOW + 60 * MINUTE) for minute in (0, 15, 20, 21)] == [
        0,
        0,
        0,
        1,
    ]
    assert Hearing().is_whole(NOW, NOW + HOUR)
    assert not Hearing().is_deaf(NOW)


def test_gaps_that_touch_are_one_and_of_too_many_those_with_the_least_between_them_are():
    assert joined(gaps((30, 40), (0, 10), (5, 20), (20, 21))) == gaps((0, 21), (30, 40))
    assert joined(gaps((0, 10), (30, 40), (45, 50), (70, 80)), most=3) == gaps((0, 10), (30, 50), (70, 80))
    flapping = [(each, each + 1) for each in range(0, 3_000, 3)]
    kept = joined(gaps(*flapping))
    assert (len(kept), kept[0][0], kept[-1][1]) == (256, *gaps((0, 2_998))[0])


def thrown(dice, count):
    """Times in which the server was away, the last one open or not."""
    moments = sorted(NOW + dice.randrange(6 * 3600) * SECOND for _ in range(2 * count))
    found = joined(gap for gap in zip(moments[::2], moments[1::2], strict=True) if gap[0] < gap[1])
    return (*found[:-1], (found[-1][0], NEVER)) if found and dice.random() < 0.3 else found


SEEDS = st.integers(0, 2**32)


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_it_is_what_counting_second_by_second_comes_to(seed):
    dice = random.Random(seed)
    heard = Hearing(thrown(dice, dice.choice([1, 3, 8])), dice.choice([30, 330, 3_600]) * SECOND)
    start, length = NOW + dice.randrange(-600, 6 * 3600) * SECOND, dice.choice([0, 90, 1_000, 7_200])
    told = heard.ends(start, length * SECOND)
    reached = counted(heard, start, 3 * length)
    for begun, end in heard.gaps:
        back = NEVER if end == NEVER else end + heard.settle
        if begun < reached < back and (back == NEVER or begun == last_before(heard, reached)):
            reached = NEVER if end == NEVER else max(reached, counted(heard, end, heard.settle // SECOND))
            break
    assert reached - SECOND < told <= reached


@settings(max_examples=50, deadline=None)
@given(SEEDS)
def test_what_is_up_before_a_moment_began_before_another_and_nothing_later_did(seed):
    dice = random.Random(seed)
    heard = Hearing(thrown(dice, dice.choice([1, 3, 8])), dice.choice([30, 330, 3_600]) * SECOND)
    now, length = NOW + dice.randrange(6 * 3600) * SECOND, dice.choice([90, 1_000, 7_200]) * SECOND
    known = [(begun, NEVER if end > now else end) for begun, end in heard.gaps if begun < now]
    heard = Hearing(tuple(known), heard.settle)
    turn = heard.up_before(now, length)
    assert heard.ends(turn - TICK, length) < now <= heard.ends(turn, length)


def last_before(heard, moment):
    return max(begun for begun, _ in heard.gaps if begun < moment)


def counted(heard, moment, wanted):
    """The first whole second from a moment on by which so much has counted."""
    while wanted > 0:
        gap = [(begun, end) for begun, end in heard.gaps if begun <= moment]
        if gap and gap[-1][1] == NEVER:
            return NEVER
        if not gap or moment >= gap[-1][1]:
            wanted -= 1 if gap and moment < gap[-1][1] + heard.settle else 3
        moment += SECOND
    return moment


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_what_has_ended_stays_ended_and_until_then_gaps_only_put_it_off(seed):
    dice = random.Random(seed)
    gone = [gap for gap in thrown(dice, dice.choice([1, 3, 8, 40])) if gap[1] != NEVER]
    settle = dice.choice([30, 330]) * SECOND
    start, length = NOW + dice.randrange(3 * 3600) * SECOND, dice.choice([0, 90, 1_000]) * SECOND
    over, before = None, start
    for step in range(0, 10 * 3600, 75):
        now = NOW + step * SECOND
        known = [(begun, end if end <= now else NEVER) for begun, end in gone if begun < now]
        ends = Hearing(tuple(known), settle).ends(start, length)
        if over is None and NEVER > before > ends:
            raise AssertionError("a gap brought it nearer")
        if over is None and ends <= now:
            over = ends
        assert over in (None, ends)
        before = ends
    assert over is not None


@settings(max_examples=25, deadline=None)
@given(SEEDS)
def test_an_agent_that_is_there_is_not_silent_and_one_that_is_gone_is_however_often_the_server_is_away(seed):
    """As long as the server stays for a report; where it goes sooner, luck decides who is heard in time."""
    dice = random.Random(seed)
    period, down = dice.choice([60, 300, 900]), dice.choice([30, 300, 3_000])
    settle, silent = (rule(period * SECOND) for rule in (standing.back_after, standing.silent_after))
    missed, moment = [], NOW
    while moment < NOW + 24 * HOUR:
        begun = moment + settle + dice.randrange(2 * period) * SECOND
        moment = begun + dice.randrange(1, down) * SECOND
        missed.append((begun, moment))
    heard = Hearing(tuple(missed), settle)
    first = seen = NOW + dice.randrange(period) * SECOND
    while seen < NOW + 20 * HOUR:
        following = seen + period * SECOND
        while heard.is_deaf(following):
            following += period * SECOND
        assert following < heard.ends(seen, silent)
        seen = following
    chances = [end for _, end in missed if end > first]
    assert heard.ends(first, silent) < chances[11]


def test_a_server_that_is_never_there_for_a_whole_report_finds_who_is_gone_all_the_same():
    """Reports each hour; away for half a minute in each quarter of an hour."""
    missed = tuple((NOW + each * 15 * MINUTE, NOW + (each * 15 + 0.5) * MINUTE) for each in range(1, 96))
    heard = Hearing(missed, standing.back_after(HOUR))
    silent = heard.ends(NOW, standing.silent_after(HOUR))
    assert NOW + 8 * HOUR < silent < NOW + 10 * HOUR
