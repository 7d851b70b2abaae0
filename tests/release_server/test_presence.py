"""Agents that could not report are not silent: what web processes note, and what the census makes of it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from release_server import presence, standing
from release_server.members import NEVER
from release_server.models import Lease
from release_server.presence import LENGTH, Pulse
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
    while world.clock() < back + standing.silent_after(MINUTE):
        assert world.status(1).state == "running"
        world.clock.step(seconds=10)
        pulse.beat()
        world.tick()
    assert (world.status(1).state, world.status(1).detail) == ("paused", "1 of 3 failed (limit 0)")
    assert world.attempt(quiet, 1).state == "silent"
