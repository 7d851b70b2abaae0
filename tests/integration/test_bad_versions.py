"""Versions that are no good: each is tried on a host of its own, all at once, and each host goes back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from agent_core import slots
from tests.integration.world import Host, until
from updater.second_opinion import PATIENCE

# What becomes of each: the reason in the skip list, starts of it, and what the server hears in the end.
ENDS = {
    "2.0.0-exits-at-once": ("workload-exited", 1, "rolled_back"),
    "2.1.0-never-healthy": ("unhealthy", 1, "rolled_back"),
    "2.2.0-cannot-import": ("preflight", 0, "failed"),
    "2.3.0-hangs": ("dead-man", 2, "rolled_back"),
    "2.4.0-agent-exits": ("boots-used-up", 2, "rolled_back"),
    "2.6.0-lies": ("preflight-version", 0, "failed"),
    "2.7.0-says-no": ("pre-activate", 0, "failed"),
    "2.8.0-hook-fails": ("post-activate", 1, "rolled_back"),
}
RECORDS_OF_A_TRIAL = 3
"""Besides one for each start: armed, rolling back, rolled back."""


@dataclass(frozen=True)
class Story:
    host: Host
    rollout: int
    before: slots.Record


@pytest.fixture(scope="module")
def stories(world):
    """A host and a rollout for each version, all under way."""
    versions = [*ENDS, "2.5.0-exits-when-good"]
    world.publish(*versions)
    hosts = world.hosts(*(world.cohort() for _ in versions))
    before = [host.record for host in hosts]  # once it is asked for, a version may be on trial at any moment
    return {
        version: Story(host, world.roll_out(version, host.cohort), record)
        for version, host, record in zip(versions, hosts, before, strict=True)
    }


@pytest.fixture(params=ENDS)
def bad(request):
    return request.param


def test_a_bad_version_is_left_for_the_good_one_within_its_boots(stories, world, bad):
    reason, boots, _ = ENDS[bad]
    story = stories[bad]
    assert story.host.await_skip(bad) == reason
    story.host.await_good("1.0.0")
    written = story.host.record.seq - story.before.seq
    assert written == (RECORDS_OF_A_TRIAL + boots if boots else 1)
    assert boots <= 2
    assert slots.link(story.host.root, slots.CURRENT) == story.before.good


def test_the_server_hears_why_a_version_was_left_and_its_rollout_halts(stories, world, bad):
    reason, boots, state = ENDS[bad]
    story = stories[bad]
    halted = world.await_rollout(story.rollout, "paused")
    assert (halted["reason"], halted["counters"][state]) == ("max-failed", 1)
    last = story.host.events(bad)[-1]
    assert (last["state"], last["reason"]) == (state, reason)
    assert story.host.states(bad)[:2] == (["downloading", "staged"] if boots else ["downloading", "failed"])
    assert story.host.await_seen(version="1.0.0", phase="idle")


def test_a_version_that_failed_here_is_not_installed_again(stories, world, bad):
    host = stories[bad].host
    host.await_skip(bad)
    host.await_good("1.0.0")
    world.await_rollout(stories[bad].rollout, "paused")
    host.await_reason("suspended")  # so that what is heard next is the answer to the pin
    world.pin(host.cohort, bad)
    host.await_reason("skipped")
    before = host.record
    host.await_look("skipped")
    assert host.record == before
    assert host.states(bad).count("downloading") == 1


def starts(host):
    return host.log.read_text().count('"workload started"')


def test_a_committed_version_whose_workload_exits_is_restarted_and_never_flipped(stories, world):
    host = stories["2.5.0-exits-when-good"].host
    host.await_good("2.5.0-exits-when-good")
    world.await_rollout(stories["2.5.0-exits-when-good"].rollout, "completed")
    committed, agent, before = host.record, host.await_agent(), starts(host)
    (host.root / "leave").touch()
    until("the workload to be started again and again", lambda: starts(host) >= before + 3)
    assert host.record == committed
    assert committed.skip == ()
    assert host.pid() == agent
    assert host.states("2.5.0-exits-when-good")[-1] == "healthy"


def test_a_version_that_cannot_update_itself_is_called_back_by_a_word_that_only_the_good_one_hears(world):
    host = world.host(world.cohort())
    rollout = world.roll_out("2.8.1-hears-nothing", host.cohort)
    failed = '"poll failed"'
    until("its checks to fail again and again", lambda: host.log.read_text().count(failed) > PATIENCE)
    assert (host.record.phase, slots.version_of(host.record.candidate)) == ("trial", "2.8.1-hears-nothing")
    assert host.await_seen(phase="trial")  # by the good version: this one tells nobody anything either
    world.client.post(f"/rollouts/{rollout}/abort", {"rollback": True})
    assert host.await_skip("2.8.1-hears-nothing") == "cannot-update"
    host.await_good("1.0.0")
    assert host.await_seen(version="1.0.0", phase="idle")
