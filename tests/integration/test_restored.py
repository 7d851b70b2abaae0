"""A server is lost and comes back from a backup that is older than what its agents have seen."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack

import pytest

from tests import postgres
from tests.integration.world import running, until


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One of its own: its server is lost."""
    with running(tmp_path_factory.mktemp("restored")) as world:
        yield world


@pytest.fixture
def another_database():
    """The URL of an empty one, where the server's is PostgreSQL's; else nothing."""
    with ExitStack() as stack:
        yield stack.enter_context(postgres.cluster().database(empty=True)) if postgres.WANTED else ""


def versions_on(host):
    """What the device has verified last, by role."""
    found = {}
    for role in ("timestamp", "snapshot", "targets", "cohorts"):
        signed = json.loads((host.layout.tuf / f"{role}.json").read_bytes())["signed"]
        found[role] = signed["version"]
    return found


def lose_server(world):
    """Everything of it is gone but the files that something in front of it still gives out."""
    world.kill_server()
    in_front = world.home / "in-front"
    shutil.move(world.server_data / "repository", in_front)
    shutil.rmtree(world.server_data)
    return in_front


def test_an_agent_goes_on_with_a_restored_server_and_takes_its_next_release(world, another_database):
    cohort = world.cohort()
    host = world.host(cohort)
    assert world.await_rollout(world.roll_out("1.1.0", cohort), "completed")
    backup = world.home / "backup"
    world.processes.run("release-server", "db", "backup", str(backup), "--data", str(world.server_data))
    first = world.roll_out("1.2.0", cohort)
    assert world.await_rollout(first, "completed")
    host.await_seen(version="1.2.0", phase="idle")
    host.await_look("up-to-date")
    seen, agent = versions_on(host), host.pid()

    in_front = lose_server(world)
    if another_database:
        world.processes.environ["RELFLEET_DATABASE_URL"] = another_database
    place = ("--data", str(world.server_data))
    words = ("db", "restore", str(backup), *place, "--published", str(in_front))
    said = world.processes.ask("release-server", *words)
    assert {"targets", "snapshot", "timestamp"} <= said["taken_over"].keys()
    world.start_server()

    # It is believed. What it leads to is what the cohort was on when the backup was made, for the rollout
    # that came after is lost; no host goes back to that unless somebody says so.
    until("the device to verify what is newer", lambda: versions_on(host)["timestamp"] > seen["timestamp"])
    assert all(versions_on(host)[role] >= version for role, version in seen.items())
    host.await_look("older")
    host.await_seen(version="1.2.0", phase="idle")
    assert (host.pid(), host.good) == (agent, "1.2.0")

    rollout = world.roll_out("1.3.0", cohort)
    assert world.await_rollout(rollout, "completed")["counters"]["healthy"] == 1
    host.await_good("1.3.0")
    host.await_seen(version="1.3.0", phase="idle")
    assert host.states("1.3.0") == ["downloading", "staged", "trial", "healthy"]
    numbers = [event["number"] for event in host.events("1.3.0")]
    assert min(numbers) > max(event["number"] for event in host.events("1.1.0"))
