"""Clocks that are wrong: a device's decides nothing, and the server's own may go back."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from agent_core.wire import AttemptState
from release_server import agents, reports
from tests.release_server.fleet_world import World


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    return made


@pytest.mark.parametrize(
    "wrong",
    [
        pytest.param(datetime(1970, 1, 1, tzinfo=UTC), id="since the epoch"),
        pytest.param(datetime(2026, 4, 30, tzinfo=UTC), id="a day behind"),
        pytest.param(datetime(2026, 5, 3, tzinfo=UTC), id="two days ahead"),
        pytest.param(datetime(9999, 12, 31, tzinfo=UTC), id="at the end of time"),
    ],
)
def test_a_report_counts_by_when_it_came_whatever_the_device_takes_the_time_for(world, wrong):
    host = world.enroll("web")
    world.clock.step(minutes=3)
    world.report(host, host.step(wrong, AttemptState.ROLLED_BACK, "1.1.0", reason="checks"))
    assert world.agent("web").agent.seen_at == world.clock()
    with world.read() as session:
        event = agents.events(session, "web")[0]
        assert (event.received_at, event.at[:4]) == (world.clock(), str(wrong.year))


def test_a_wrong_clock_makes_no_old_report_new(world):
    """What makes a report new is its counter; no time in it is asked."""
    host = world.enroll("web")
    proof, _ = host.sign(host.report())
    with world.write() as session:
        reports.take_report(session, world.clock(), proof, host.report())
    for days in (-400, 0, 400):
        with pytest.raises(agents.NotAllowedError) as caught, world.write() as session:
            reports.take_report(session, world.clock() + timedelta(days=days), proof, host.report())
        assert caught.value.reason == "replayed"


def test_after_the_servers_clock_went_back_a_silence_is_still_noticed(world):
    host = world.enroll("web")
    world.clock.step(days=2)
    world.report(host)
    world.clock.step(days=-2)
    world.report(host)
    assert world.agent("web").agent.seen_at == world.clock()
    world.clock.step(hours=6)
    assert world.agent("web").state == "silent"
