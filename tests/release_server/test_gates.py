"""Gates that compare: with what is usual in the cohort, with the release before; also after completion."""

from __future__ import annotations

import pytest

from agent_core.wire import AttemptState
from release_server import census, fleet, rollout_view
from release_server.figures import MIB
from release_server.stages import Stage
from release_server.terms import Terms
from tests.release_server.fleet_world import World

ALL = Stage(share_bp=10_000)
SOAKING = Stage(share_bp=10_000, soak_s=7_200)
CALM = {"rss": 100 * MIB, "restarts": 0}
LEAKED = {"rss": 300 * MIB, "restarts": 0}


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    hosts = made.enroll_many(6)
    made.clock.step(seconds=10)
    for host in hosts:
        made.report(host, figures=CALM)
    made.clock.step(seconds=10)
    return made


def take(world, rollout, *hosts):
    """These hosts become healthy on the release."""
    for host in hosts or world.hosts.values():
        world.finish(host, rollout, "healthy")
    world.tick(seconds=10)


def say(world, figures, *hosts):
    for host in hosts or world.hosts.values():
        world.report(host, figures=figures)
    world.tick(seconds=10)


def test_a_leak_that_takes_an_hour_to_show_halts_after_every_commit(world):
    rollout = world.start("1.1.0", Stage(count=2, soak_s=7_200), ALL)
    canaries = world.offered("1.1.0")
    take(world, rollout, *canaries)
    for minutes in (10, 20, 30):
        world.clock.step(minutes=minutes)
        say(world, CALM)
    assert world.status(rollout).stage_state == "soaking"
    say(world, LEAKED, *canaries)
    status = world.status(rollout)
    assert (status.state, status.reason) == ("paused", "figures-worse")
    assert status.detail == "rss worse on 2 of 2"
    assert not world.offered("1.1.0")


def test_a_transition_keeps_the_numbers_it_saw(world):
    rollout = world.start("1.1.0", SOAKING)
    take(world, rollout)
    say(world, LEAKED)
    with world.read() as session:
        halted = rollout_view.events(session, rollout)[-1]
    assert halted.event == "halted"
    assert halted.numbers["worse"] == {"rss": 6}
    assert {"usual_rate", "evidence", "failures", "limit", "healthy"} <= halted.numbers.keys()


def test_a_figure_that_an_operator_has_seen_halts_once(world):
    rollout = world.start("1.1.0", SOAKING)
    take(world, rollout)
    say(world, LEAKED)
    world.call(fleet.resume, rollout)
    say(world, LEAKED)
    assert world.status(rollout).state == "running"
    say(world, LEAKED | {"restarts": 9})
    assert world.status(rollout).detail == "restarts worse on 6 of 6"


def test_figures_are_not_compared_where_nobody_wants_it(world):
    rollout = world.start("1.1.0", SOAKING, terms=Terms(figures=False))
    take(world, rollout)
    say(world, LEAKED)
    assert world.status(rollout).state == "running"


def test_a_regression_after_completion_halts_and_the_cohort_goes_by_its_old_base(world):
    rollout = world.start("1.1.0", ALL)
    take(world, rollout)
    assert (world.status(rollout).state, world.view().status.base) == ("completed", "1.1.0")
    say(world, CALM)
    world.clock.step(minutes=40)
    say(world, LEAKED)
    status = world.status(rollout)
    assert (status.state, status.stage_state, status.reason) == ("paused", "halted", "figures-worse")
    assert world.view().status.base == "1.0.0"
    world.call(fleet.undo, rollout)
    assert len(world.offered("1.0.0")) == 6


def test_the_watch_ends_after_the_time_that_was_agreed(world):
    rollout = world.start("1.1.0", ALL, terms=Terms(watch_s=600))
    take(world, rollout)
    world.clock.step(minutes=11)
    say(world, CALM)
    assert world.events(rollout)[-1] == "watch-over"
    world.clock.step(minutes=5)
    say(world, LEAKED)
    assert world.status(rollout).state == "completed"


def test_a_newer_rollout_ends_the_watch_over_the_one_before(world):
    first = world.start("1.1.0", ALL)
    take(world, first)
    world.start("1.2.0", Stage(count=1), ALL)
    say(world, LEAKED)
    assert (world.status(first).state, world.status(first).watch_at) == ("completed", None)


def test_a_pin_ends_the_watch_and_stays_the_base(world):
    from release_server import cohorts

    first = world.start("1.1.0", ALL)
    take(world, first)
    world.call(cohorts.pin, "demo", "all", version="1.0.0")
    world.tick(minutes=2)
    assert (world.status(first).watch_at, world.view().status.base) == (None, "1.0.0")


def test_unusually_many_failures_halt_below_a_generous_limit(world):
    world.enroll_many(6)
    rollout = world.start("1.1.0", Stage(share_bp=10_000, max_failed=10))
    hosts = list(world.hosts.values())
    for host in hosts[:2]:
        world.finish(host, rollout, "rolled_back")
    world.tick()
    assert world.status(rollout).state == "running"
    world.finish(hosts[2], rollout, "failed")
    world.tick()
    assert world.status(rollout).reason == "unusual-failures"
    assert world.status(rollout).detail == "3 of 3 failed, 1.0% is usual here"
    world.call(fleet.resume, rollout)
    world.finish(hosts[3], rollout, "failed")
    world.tick()
    assert world.status(rollout).state == "running", "what was seen is no evidence any more"


def test_the_baseline_is_that_of_the_cohorts_completed_rollouts(world):
    first = world.start("1.1.0", Stage(share_bp=10_000, max_failed=2), terms=Terms(watch_s=0))
    failing, *others = world.hosts.values()
    world.finish(failing, first, "rolled_back")
    take(world, first, *others)
    assert world.status(first).state == "completed"
    second = world.start("1.2.0", ALL)
    with world.read() as session:
        baseline = census._baseline(session, world.rollout(second))
    assert baseline.usual == pytest.approx(2 / 106)


def test_an_agent_that_was_there_and_fell_silent_is_silent_by_its_own_period(world):
    rollout = world.start("1.1.0", Stage(share_bp=10_000, max_silent=0, deadline_s=7_200))
    gone, *others = world.hosts.values()
    world.clock.step(seconds=5)
    world.report(gone)
    world.clock.step(seconds=205)
    for host in others:
        world.report(host)
    world.tick(seconds=4)
    assert world.status(rollout).state == "running"
    world.tick(seconds=2)
    assert (world.status(rollout).reason, world.attempt(gone, rollout).state) == (
        "max-silent",
        AttemptState.SILENT,
    )
