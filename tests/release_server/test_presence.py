"""Agents that could not report are not silent: what web processes note, and what the census makes of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from agent_core import clock
from agent_core.clock import parse_iso
from agent_core.findings import State
from release_server import doctor, explain, presence, standing
from release_server.hearing import NEVER
from release_server.members import whole
from release_server.models import Lease
from release_server.presence import AHEAD, LENGTH, Pulse
from release_server.stages import Stage
from tests.release_server.fleet_world import World

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
SECOND, MINUTE, HOUR = timedelta(seconds=1), timedelta(minutes=1), timedelta(hours=1)


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    made.enroll_many(3)
    return made


def row(world, name=Lease.WEB):
    with world.read() as session:
        return session.get(Lease, name)


@pytest.mark.parametrize(
    ("web", "jobs", "since"),
    [
        pytest.param(None, None, None, id="nobody ever noted it: as it always was"),
        pytest.param(None, NOW - HOUR, NOW - HOUR, id="no note, and jobs were away"),
        pytest.param((NOW + SECOND, None), None, None, id="it listens, and always did"),
        pytest.param((NOW, None), None, None, id="the note ends just now"),
        pytest.param((NOW - SECOND, None), None, NEVER, id="it does not listen"),
        pytest.param((NOW - SECOND, NOW - HOUR), NOW - MINUTE, NEVER, id="nor when jobs are back"),
        pytest.param((NOW + SECOND, NOW - HOUR), None, NOW - HOUR, id="it was away"),
        pytest.param((NOW + SECOND, NOW - MINUTE), NOW - HOUR, NOW - MINUTE, id="it was away longer"),
        pytest.param((NOW + SECOND, NOW - HOUR), NOW - MINUTE, NOW - MINUTE, id="jobs were away longer"),
    ],
)
def test_agents_are_heard_since_both_web_and_jobs_were_there_again(sessions, web, jobs, since):
    with sessions.write() as session:
        if web:
            session.add(Lease(name=Lease.WEB, holder="", until=web[0], since=web[1]))
        if jobs:
            session.add(Lease(name=Lease.JOBS, holder="me", until=NOW, since=jobs))
        assert presence.heard_since(session, NOW) == since


def test_of_many_web_processes_one_writes_and_a_gap_is_kept_until_the_next(world):
    first, second = (Pulse(world.sessions, world.clock) for _ in range(2))
    first.beat()
    ends = row(world).until
    world.clock.step(seconds=5)
    second.beat()
    assert row(world).until == ends == world.clock() - 5 * SECOND + LENGTH
    world.clock.step(seconds=10)
    second.beat()
    assert (row(world).until, row(world).since) == (world.clock() + LENGTH, None)
    world.clock.now += LENGTH + SECOND
    first.beat()
    gap = world.clock()
    assert row(world).since == gap
    assert row(world).gaps == [[(gap - SECOND - LENGTH).isoformat(), gap.isoformat()]]
    world.clock.step(seconds=15)
    second.beat()
    assert row(world).since == gap


def test_a_clock_that_was_ahead_leaves_no_note_that_outlasts_it(world):
    pulse = Pulse(world.sessions, world.clock)
    pulse.beat()
    world.clock.step(days=365)
    pulse.beat()
    world.clock.step(days=-365)
    pulse.beat()
    assert (row(world).until, row(world).since) == (world.clock() + LENGTH, world.clock())
    assert row(world).gaps == [], "what it thought it missed has not come yet"


def test_of_gaps_none_ends_later_than_now_and_what_is_long_past_goes():
    told = [
        (NOW + begun * HOUR, NOW + end * HOUR) for begun, end in ((-9_000, -8_999), (-9, -3), (-2, 5), (1, 9))
    ]
    kept = presence.with_gap([(begun.isoformat(), end.isoformat()) for begun, end in told], NOW + HOUR, NOW)
    assert kept == [((NOW - a * HOUR).isoformat(), (NOW - b * HOUR).isoformat()) for a, b in ((9, 3), (2, 0))]


def test_agents_are_heard_when_a_web_and_a_jobs_process_are_there(sessions):
    with sessions.write() as session:
        web = presence.with_gap([], NOW - 9 * MINUTE, NOW - 8 * MINUTE)
        session.add(Lease(name=Lease.WEB, holder="", until=NOW - SECOND, gaps=web))
        jobs = presence.with_gap([], NOW - 20 * MINUTE, NOW - 10 * MINUTE)
        session.add(Lease(name=Lease.JOBS, holder="me", until=NOW - HOUR, gaps=jobs))
    with sessions.read() as session:
        heard = presence.hearing(session, NOW, MINUTE)
    gaps = ((-20, -10), (-9, -8))
    assert heard.gaps == (
        *((NOW + a * MINUTE, NOW + b * MINUTE) for a, b in gaps),
        (NOW - SECOND - LENGTH, NEVER),
    )


@pytest.mark.parametrize("skew", [4, 14, 19, 25, 49, 90, 600])
def test_replicas_whose_clocks_differ_find_no_gap_while_one_of_them_listens(world, skew):
    """One comes later, which may look like a gap once; by either clock agents are heard since before long."""
    behind = Pulse(world.sessions, world.clock)
    ahead = Pulse(world.sessions, lambda: world.clock() + skew * SECOND)
    began, seen = world.clock(), set()
    for second in range(300):
        if second % 5 == 0:
            behind.beat()
        if second % 5 == 2:
            ahead.beat()
        seen.add(row(world).since)
        world.clock.now += SECOND
    assert len(seen - {None}) <= 2
    since = row(world).since
    assert since is None or since <= began + AHEAD + 5 * SECOND
    while world.clock() < row(world).until:
        world.clock.now += SECOND  # both are gone
    world.clock.now += MINUTE + skew * SECOND
    behind.beat()
    assert row(world).since == world.clock(), "a gap is one still"


def test_a_process_that_stood_still_was_not_there(world):
    pulse = Pulse(world.sessions, world.clock)
    pulse.beat()
    world.clock.now += LENGTH + SECOND
    pulse.beat()
    assert row(world).since == world.clock()


@pytest.mark.parametrize(
    ("until", "since", "state", "told"),
    [
        (LENGTH, None, State.OK, "agents can be heard"),
        (LENGTH, -HOUR, State.OK, "again since"),
        (LENGTH, -3 * SECOND, State.NOTE, "again since"),
        (LENGTH + 31 * SECOND, None, State.NOTE, "s ahead of this machine's"),
        (-SECOND, None, State.NOTE, "no web process notes that it listens"),
    ],
)
def test_doctor_says_when_clocks_differ_or_the_moment_moves(sessions, until, since, state, told):
    now = clock.now()
    with sessions.write() as session:
        session.add(Lease(name=Lease.WEB, holder="", until=now + until, since=since and now + since))
    with sessions.read() as session:
        (found,) = doctor.CHECKS["listening"](None, session.get_bind())
    assert (found.state, told in found.detail) == (state, True), found


def test_a_note_that_cannot_be_written_ends_no_web_process(world, caplog):
    world.sessions.close()
    broken = Pulse(world.sessions, lambda: None)
    broken.beat()
    assert "was not noted" in caplog.text


def test_the_silence_of_agents_halts_nothing_while_no_web_process_is_there(world):
    """The jobs process ticks on meanwhile. Who stays quiet once it could report again is silent."""
    pulse = Pulse(world.sessions, world.clock)
    pulse.beat()
    world.start("1.1.0", Stage(count=3, deadline_s=1_800))
    world.clock.step(seconds=10)
    pulse.beat()
    world.heartbeats()
    for _ in range(12):
        world.tick(minutes=10)  # jobs are there, web is not
        assert world.status(1).state == "running"
        assert world.counters(1) == {}
    pulse.beat()
    back, (quiet, *others) = world.clock(), world.hosts.values()
    for host in others:
        world.finish(host, 1, "healthy")
    comes_back = standing.back_after(MINUTE)  # of which a third counts
    while world.clock() < back + standing.silent_after(MINUTE) + comes_back * 2 / 3:
        assert world.status(1).state == "running"
        world.clock.step(seconds=10)
        pulse.beat()
        world.tick()
    assert (world.status(1).state, world.status(1).detail) == ("paused", "1 of 3 failed (limit 0)")
    assert world.attempt(quiet, 1).state == "silent"


def test_silence_counts_though_the_web_process_ends_every_quarter_of_an_hour(sessions, clock):
    """It is away again before it has listened for three reports; and `why` knows when it ends."""
    world, pulse = World(sessions, clock), Pulse(sessions, clock)
    world.cohort(poll_s=60, report_s=300)
    quiet, *others = world.enroll_many(3)
    world.start("1.1.0", Stage(count=3, deadline_s=6 * 3_600))
    clock.step(seconds=10)
    began, foretold = clock(), None
    world.heartbeats()
    while clock() < began + 2 * HOUR and world.status(1).state == "running":
        for second in range(15, 871, 15):
            clock.step(seconds=15)
            pulse.beat()
            if second % 150 == 0:
                world.heartbeat(*others)
                world.tick()
                with world.read() as session:
                    foretold = explain.why_of_rollout(session, clock(), 1)["next"] or foretold
        clock.step(seconds=30)
        pulse = Pulse(sessions, clock)
    assert (world.status(1).reason, world.attempt(quiet, 1).state) == ("max-failed", "silent")
    with world.read() as session:
        heard = presence.hearing(session, clock(), standing.back_after(5 * MINUTE))
    ends = heard.ends(began, standing.silent_after(5 * MINUTE))
    assert (foretold["event"], parse_iso(foretold["at"])) == ("halted", whole(ends))
    assert standing.silent_after(5 * MINUTE) < ends - began < 40 * MINUTE


def test_an_agent_that_could_not_report_meanwhile_is_not_called_silent(world):
    pulse = Pulse(world.sessions, world.clock)
    pulse.beat()
    host = next(iter(world.hosts.values()))
    world.report(host)
    said = []
    for step, times in ((HOUR, 1), (timedelta(), 1), (15 * SECOND, 19)):
        for _ in range(times):
            world.clock.now += step
            with world.read() as session:
                said.append(explain.agent_why(session, world.clock(), host.id)["chain"][0]["code"])
            pulse.beat()
    assert said == ["reported"] * 20 + ["silent"]
