"""SIGKILL at every moment of an upgrade, on the host and on the server: the end is the same as without."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from agent_core import slots
from release_server.signing.client import over_socket
from release_server.signing.log import verify
from tests.integration.world import Host, until

if TYPE_CHECKING:
    from tests.integration.world import World

NEW = "1.2.0"
"""Its index allows four boots: the kills during its trial use up some of them."""

WAITING = "1.4.0-waits"

SLOW = "[download]\nrate_bps = 8000000\n"
"""Slow enough for a kill to come while the bundle is on its way."""


def is_downloading(host: Host) -> bool:
    with suppress(FileNotFoundError):  # whole, and gone between the two
        return any(part.stat().st_size > 0 for part in host.layout.download.glob("*.part"))
    return False


def is_staging(host: Host) -> bool:
    return any(host.layout.staging.iterdir())


def is_armed(host: Host) -> bool:
    return host.record.phase == slots.TRIAL


def is_tried(host: Host) -> bool:
    return is_armed(host) and bool(host.record.is_up) and host.news["version"] == host.record.candidate


def is_committed(host: Host) -> bool:
    return host.record.phase == slots.IDLE and host.good == NEW


MOMENTS = (is_downloading, is_staging, is_armed, is_tried, is_committed)


def kill(number: int | None) -> None:
    with suppress(ProcessLookupError):
        if number:
            os.kill(number, signal.SIGKILL)


def kill_agent(host: Host) -> None:
    kill(host.pid())


def kill_launcher(host: Host) -> None:
    host.kill()
    host.start_again()


def kill_everything(host: Host) -> None:
    host.kill(everything=True)
    host.start_again()


@pytest.fixture
def hosts(world):
    """One for each victim; all of one cohort, so one rollout goes on while all are killed."""
    world.publish(NEW)
    cohort = world.cohort()
    victims = (kill_agent, kill_launcher, kill_everything)
    hosts = world.hosts(*[cohort] * len(victims), start=False)
    for host in hosts:
        (host.layout.settings_dir / "slow.toml").write_text(SLOW)
        host.start()
    return dict(zip(victims, hosts, strict=True))


def test_an_upgrade_survives_kills_of_agent_launcher_and_everything_at_each_of_its_moments(world, hosts):
    rollout = world.roll_out(NEW, next(iter(hosts.values())).cohort)
    left = {host: list(MOMENTS) for host in hosts.values()}

    def all_were_killed() -> bool:
        for kill_victim, host in hosts.items():
            # A moment that passed unseen (a busy machine) is not waited for; the others still come.
            for moment in left[host]:
                if moment(host):
                    kill_victim(host)
                    del left[host][: left[host].index(moment) + 1]
                    break
        return not any(left.values())

    until("every victim to be killed at every moment", all_were_killed, every_s=0.002)
    for host in hosts.values():
        host.await_good(NEW)
        host.await_agent()
        assert host.skipped == {}
        assert slots.links_follow(host.root, host.record)
    ended = world.await_rollout(rollout, "completed")
    assert ended["counters"]["healthy"] == len(hosts)


def test_a_rollout_goes_on_to_its_end_after_the_server_was_killed_and_started_again(world):
    cohort = world.cohort()
    hosts = world.hosts(cohort, cohort)
    rollout = world.roll_out(WAITING, cohort, 1, "all")
    tried = until("the first trial", lambda: next((host for host in hosts if is_armed(host)), None))
    (other,) = set(hosts) - {tried}
    agent = other.await_agent()
    world.kill_server()
    until("the workload of the trial", lambda: is_tried(tried) and tried.news["workload_pid"])
    assert (other.pid(), other.good) == (agent, "1.0.0")
    world.start_server()
    for host in hosts:
        (host.root / "go").touch()
    ended = world.await_rollout(rollout, "completed")
    assert (ended["counters"]["healthy"], ended["stage"]) == (2, 1)
    for host in hosts:
        host.await_good(WAITING)
        assert host.skipped == {}
        assert host.states(WAITING) == ["downloading", "staged", "trial", "healthy"]


def test_a_rollout_goes_on_to_its_end_while_the_signer_is_killed_again_and_again(world):
    cohort = world.cohort()
    host = world.host(cohort)
    killed = set()

    def one_more_was_killed() -> bool:
        for one in world.server_processes():
            with suppress(psutil.Error):
                if "signer" in one.cmdline():
                    one.kill()
                    killed.add(one.pid)
        return len(killed) > 2

    rollout = world.roll_out("1.1.0", cohort)
    until("three kills", one_more_was_killed, every_s=0.05)
    host.await_good("1.1.0")
    world.await_rollout(rollout, "completed")
    verify(world.server_data / "signer" / "log")
    until("the server to give out what was signed last", lambda: given_out(world) == signed(world))


def signed(world: World) -> tuple[int, int]:
    """The newest versions of cohorts and snapshot that the signer knows of."""
    newest = over_socket(world.server_data / "run" / "signer.sock").known().signed
    return newest["cohorts"], newest["snapshot"]


def given_out(world: World) -> tuple[int, int]:
    """The versions of the same that an agent comes to."""
    snapshot = _named(world.timestamp())["snapshot.json"]["version"]
    named = _named((world.metadata / f"{snapshot}.snapshot.json").read_bytes())
    return named["cohorts.json"]["version"], snapshot


def _named(metadata: bytes) -> dict[str, Any]:
    """The metadata that a snapshot or a timestamp names."""
    named: dict[str, Any] = json.loads(metadata)["signed"]["meta"]
    return named
