"""A release carried by hand: exported, brought to hosts that reach no server, tried, and kept or left."""

from __future__ import annotations

import pytest

from agent_core import slots
from agent_core.layout import Layout
from tests.integration.world import HASTY, PRODUCT, Host, until

NOWHERE = "http://127.0.0.1:9"
BROKEN = "2.9.0-exits-by-file"
"""Of these stories alone: what others publish before 1.1.0 is older than it, by the order of signing."""


@pytest.fixture(scope="module")
def files(world):
    """Release files, made while there is a server; by version."""
    versions = ("1.0.0", "1.1.0", BROKEN)
    world.publish(*versions)
    made = {version: world.home / f"probe-{version}.release" for version in versions}
    for version, file in made.items():
        world.release("export", version, "-o", str(file))
    return made


@pytest.fixture
def host(world):
    """One that never reached a server, and never does."""
    host = Host(world, f"island-{next(world.numbers)}", "island")
    host.layout = Layout(host.root)
    words = ("--server", NOWHERE, "--product", PRODUCT, "--name", host.name, "--trust", str(world.trust))
    assert host.agent("enroll", "--offline", *words)[0] == 0
    host.layout.settings.write_text(HASTY)
    return host


def test_a_host_without_a_server_is_installed_updated_and_kept_well_by_files(host, files):
    assert host.agent("install", str(files["1.0.0"]))[0] == 0
    assert host.good == "1.0.0"
    host.start()
    host.await_agent()
    code, printed, said = host.agent("install", str(files["1.1.0"]), "--wait")
    assert (code, host.good) == (0, "1.1.0"), (printed, said)
    agent = host.await_agent()
    # A broken one comes back by itself, and the command says so.
    code, _, said = host.agent("install", str(files[BROKEN]), "--wait")
    assert (code, host.good, "rolled back" in said) == (11, "1.1.0", True), said
    host.await_agent(other_than=agent)
    code, _, said = host.agent("install", str(files[BROKEN]))
    assert (code, "agent retry" in said) == (6, True)
    code, _, said = host.agent("install", str(files["1.0.0"]))
    assert (code, "--older" in said) == (6, True)
    code, printed, said = host.agent("install", str(files["1.0.0"]), "--older", "--wait")
    assert (code, host.good) == (0, "1.0.0"), (printed, said)


def test_a_held_host_and_a_spoilt_file_install_nothing(host, files, world):
    assert host.agent("install", str(files["1.0.0"]))[0] == 0
    assert host.agent("install", str(files["1.0.0"]))[0] == 0  # already
    before = host.record
    assert host.agent("hold")[0] == 0
    code, _, said = host.agent("install", str(files["1.1.0"]))
    assert (code, "agent unhold" in said) == (6, True)
    assert host.agent("unhold")[0] == 0
    content = bytearray(files["1.1.0"].read_bytes())
    content[-100_000] ^= 1
    spoilt = world.home / "spoilt"
    spoilt.write_bytes(content)
    code, _, said = host.agent("install", str(spoilt))
    assert (code, "what the release managers signed" in said) == (3, True)
    assert host.agent("install", str(world.archive("1.1.0")))[0] == 3  # no release file at all
    assert host.agent("install", str(world.home / "nothing"))[0] == 7
    assert host.record == before
    # Where no agent runs the trial is recorded, and begins with the next start.
    assert host.agent("install", str(files["1.1.0"]))[0] == 0
    assert (host.record.phase, slots.version_of(host.record.candidate)) == (slots.TRIAL, "1.1.0")
    host.start()
    host.await_good("1.1.0")


def test_an_enrolled_host_whose_server_is_away_is_updated_by_a_file_and_reports_it_afterwards(world, files):
    host = world.host(world.cohort())
    host.await_agent()
    world.stop_server()
    try:
        code, printed, said = host.agent("install", str(files["1.1.0"]), "--wait")
        assert (code, host.good) == (0, "1.1.0"), (printed, said)
    finally:
        world.start_server()
    host.await_seen(version="1.1.0")
    until("the server to hear all of it", lambda: host.states("1.1.0")[-1:] == ["healthy"])


def test_the_same_release_is_exported_to_the_same_bytes_with_a_server_or_without(world, files):
    other = world.home / "again.release"
    words = ("--metadata", str(world.metadata), "--bundle", str(world.archive("1.1.0")))
    world.release("export", "1.1.0", "-o", str(other), *words)
    assert other.read_bytes() == files["1.1.0"].read_bytes()
    code, _, said = world.exit_of("release", "export", "9.9.9", "-o", str(other))
    assert (code, "there is no signed probe 9.9.9" in said) == (7, True)
