"""A server, or something before it, that serves what it should not: refused, told, and over when mended."""

from __future__ import annotations

import json
import os
import re
from contextlib import ExitStack, contextmanager
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

from tests.integration.world import until
from updater import freshness

MIB = 2**20
MOST_OF_A_PROCESS = 64 * MIB
"""As in tests/attacks/test_memory.py; the checker is the largest."""


@contextmanager
def served(file, content):
    """Have the server give out `content` in the place of a file, and the right one again afterwards."""
    right, mode = file.read_bytes(), file.stat().st_mode
    file.chmod(0o644)
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(right)
        file.chmod(mode)


@contextmanager
def blown_up(file):
    """Have the server give out half a gigabyte in the place of a file: its bytes, then zeros."""
    length, mode = file.stat().st_size, file.stat().st_mode
    file.chmod(0o644)
    os.truncate(file, 512 * MIB)
    try:
        yield
    finally:
        os.truncate(file, length)
        file.chmod(mode)


def with_one_byte_changed(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def cut_short(content: bytes) -> bytes:
    return content[: len(content) // 2]


# --- bundles ---------------------------------------------------------------------------------------------


def test_a_changed_and_a_truncated_bundle_are_refused_until_the_server_is_mended(world):
    world.publish("1.1.0", "1.2.0")
    changed, truncated = world.hosts(world.cohort(), world.cohort())
    agents = {host: host.await_agent() for host in (changed, truncated)}
    one, other = world.target("1.1.0"), world.target("1.2.0")
    with (
        served(one, with_one_byte_changed(one.read_bytes())),
        served(other, cut_short(other.read_bytes())),
    ):
        world.pin(changed.cohort, "1.1.0")
        world.pin(truncated.cohort, "1.2.0")
        changed.await_seen(reason="digest-mismatch", version="1.0.0", phase="idle")
        truncated.await_seen(reason="length-mismatch", version="1.0.0", phase="idle")
        for host, agent in agents.items():
            assert (host.good, host.record.phase, host.skipped) == ("1.0.0", "idle", {})
            assert host.pid() == agent
            # It tries again meanwhile: whatever arrives is gone again as well.
            until(
                "what was fetched to be gone", lambda host=host: not list(host.layout.download.glob("*.part"))
            )
    changed.await_good("1.1.0")
    truncated.await_good("1.2.0")


def peaks(world, host):
    """The most bytes that each process of a host has had: launcher, agent, checker and workload."""
    launcher = psutil.Process(world.processes.pids()[host.name])
    found = {}
    for process in (launcher, *launcher.children(recursive=True)):
        status = Path(f"/proc/{process.pid}/status").read_text()
        found[" ".join(process.cmdline()[-3:])] = int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024
    return found


def test_half_a_gigabyte_in_the_place_of_any_file_costs_a_running_host_no_memory(world):
    world.publish("1.1.0")
    host = world.host(world.cohort())
    host.await_look("up-to-date")
    agent = host.await_agent()
    with world.jobs_stopped(), blown_up(world.metadata / "timestamp.json"):
        host.await_look("bad-answer")
        costs = [peaks(world, host)]
    with blown_up(world.target("1.1.0")):
        world.pin(host.cohort, "1.1.0")
        host.await_seen(reason="length-mismatch", version="1.0.0")
        costs.append(peaks(world, host))
        assert (host.pid(), host.good, host.skipped) == (agent, "1.0.0", {})
    assert len(costs[1]) >= 3
    for cost in costs:
        assert max(cost.values()) < MOST_OF_A_PROCESS, cost
    host.await_good("1.1.0")


# --- metadata --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(world):
    host = world.host(world.cohort())
    host.await_look("up-to-date")
    return host


def has_verified(host, timestamp: bytes) -> bool:
    """Whether a check under this timestamp has come to its end."""
    return (
        freshness.believed(host.layout.poll, host.layout.tuf)[0].timestamp_sha256
        == sha256(timestamp).hexdigest()
    )


def replayed(world, host):
    """The timestamp before the one that the host has verified."""
    old = world.timestamp()
    world.client.patch(f"/cohorts/probe/{host.cohort}", {"splay_s": 0, "report_s": 2})
    until("a newer timestamp", lambda: world.timestamp() != old)
    until("the host to be done with it", lambda: has_verified(host, world.timestamp()))
    return old


def unsigned(world, _host):
    timestamp = json.loads(world.timestamp())
    timestamp["signatures"] = []
    timestamp["signed"]["version"] += 1
    return json.dumps(timestamp).encode()


def garbage(_world, _host):
    return b"<html>Sign in to this network</html>"


@pytest.mark.parametrize(
    ("forged", "reason"),
    [(replayed, "replayed"), (unsigned, "bad-signature"), (garbage, "bad-metadata")],
    ids=["replayed", "unsigned", "garbage"],
)
def test_a_forged_timestamp_changes_nothing_and_the_next_honest_one_is_taken(world, host, forged, reason):
    before, agent = host.record, host.await_agent()
    content = forged(world, host)
    with ExitStack() as stack:
        stack.enter_context(world.jobs_stopped())
        # What is newest now stays it; whoever looks meanwhile has its last change of honest files behind him.
        until("the host to be done with what is newest", lambda: has_verified(host, world.timestamp()))
        stack.enter_context(served(world.metadata / "timestamp.json", content))
        trusted = {file.name: file.read_bytes() for file in host.layout.tuf.glob("*.json")}
        host.await_seen(reason=reason, version="1.0.0")
        assert {file.name: file.read_bytes() for file in host.layout.tuf.glob("*.json")} == trusted
        assert (host.record, host.pid()) == (before, agent)
    host.await_seen(reason="up-to-date")


def test_a_host_that_was_shown_forged_metadata_still_updates(world, host):
    world.pin(host.cohort, "1.1.0")
    host.await_good("1.1.0")
