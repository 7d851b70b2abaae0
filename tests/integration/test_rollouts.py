"""Whole stories on the server's side: good and bad rollouts, pins, freezes, pauses, aborts, moves."""

from __future__ import annotations

import pytest

from agent_core.errors import ConflictError
from tests.integration.world import until
from updater.device import Device


def test_a_good_release_reaches_every_agent_through_its_stages(world):
    cohort = world.cohort()
    hosts = world.hosts(cohort, cohort)
    number = world.roll_out("1.1.0", cohort, 1, "all")
    ended = world.await_rollout(number, "completed")
    assert ended["counters"]["healthy"] == 2
    for host in hosts:
        host.await_good("1.1.0")
        host.await_seen(version="1.1.0")
        assert host.states("1.1.0") == ["downloading", "staged", "trial", "healthy"]


def test_a_bad_release_halts_itself_at_its_first_agent_and_the_others_never_see_it(world):
    cohort = world.cohort()
    hosts = world.hosts(cohort, cohort)
    number = world.roll_out("2.0.0-exits-at-once", cohort, 1, "all")
    halted = world.await_rollout(number, "paused")
    assert (halted["stage_state"], halted["reason"]) == ("halted", "max-failed")
    assert halted["counters"]["rolled_back"] == 1
    tried = [host for host in hosts if host.states("2.0.0-exits-at-once")]
    assert len(tried) == 1
    tried[0].await_good("1.0.0")
    for host in hosts:
        assert host.good == "1.0.0"


def test_a_paused_rollout_offers_nothing_until_it_is_resumed_and_an_abort_takes_agents_back(world):
    cohort = world.cohort()
    host = world.host(cohort)
    world.publish("1.1.0")
    with world.jobs_stopped():  # so that no agent hears of the rollout before it is paused
        number = world.roll_out("1.1.0", cohort, 1, "all", soak_s=3600)
        assert world.exit_of("release", "rollout", "pause", f"r-{number}")[0] == 0
    host.await_reason("suspended")
    assert host.good == "1.0.0"
    assert world.exit_of("release", "rollout", "resume", f"r-{number}")[0] == 0
    host.await_good("1.1.0")
    host.await_seen(version="1.1.0", phase="idle")
    code, _, said = world.exit_of("release", "rollout", "abort", f"r-{number}", "--rollback")
    assert (code, "1 agent" in said) == (2, True)  # nobody to ask on a pipe
    assert world.exit_of("release", "rollout", "abort", f"r-{number}", "--rollback", "--yes")[0] == 0
    world.await_rollout(number, "rolled_back")
    host.await_good("1.0.0")
    assert host.skipped == {}


def test_a_pin_takes_a_cohort_back_to_an_older_version_and_its_end_moves_nobody(world):
    cohort = world.cohort()
    host = world.host(cohort)
    world.await_rollout(world.roll_out("1.1.0", cohort), "completed")
    host.await_good("1.1.0")
    world.pin(cohort, "1.0.0")
    host.await_good("1.0.0")
    assert world.client.get(f"/cohorts/probe/{cohort}")["directive"]["rollback"] is True
    pinned = world.directive(cohort)["revision"]
    world.steer(cohort, "unpin")
    until("the host to hear of it", lambda: Device.load(host.root).seen().directive.revision > pinned)
    host.await_look("up-to-date")  # taking the pin off moves nobody
    assert (host.good, host.skipped) == ("1.0.0", {})


def test_a_frozen_cohort_is_offered_nothing_and_takes_no_rollout(world):
    cohort = world.cohort()
    host = world.host(cohort)
    world.steer(cohort, "freeze")
    world.pin(cohort, "1.1.0")
    host.await_reason("suspended")
    assert host.good == "1.0.0"
    world.steer(cohort, "unpin")
    with pytest.raises(ConflictError) as refused:
        world.roll_out("1.2.0", cohort)
    assert refused.value.reason == "frozen"
    world.steer(cohort, "unfreeze")
    world.pin(cohort, "1.1.0")
    host.await_good("1.1.0")


def test_an_agent_that_is_moved_follows_its_new_cohort_without_anything_else_being_published(world):
    world.publish("1.1.0")
    old, new = world.cohort(), world.cohort(release="1.1.0")
    host = world.host(old)
    host.await_look("up-to-date")
    world.client.post(f"/agents/{host.name}/move", {"cohort": new, "reason": "a test"})
    host.await_good("1.1.0")
    host.await_seen(version="1.1.0", cohort=new)
