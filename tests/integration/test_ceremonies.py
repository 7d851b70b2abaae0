"""A thief has a release key and all online keys: people change them, and no host is touched by hand."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from agent_core.errors import Exit
from keys import signers
from release_server import signer
from tests.integration.world import until


@pytest.fixture(scope="module")
def hosts(world):
    world.publish("1.1.0")
    hosts = world.hosts(world.cohort(), world.cohort())
    for host in hosts:
        assert host.look() == "up-to-date"
    return hosts


def follows(host, root):
    return (host.layout.tuf / "root_history" / f"{root}.root.json").exists()


def test_every_stolen_key_is_changed_under_a_running_fleet(world, hosts, tmp_path):
    agents = {host: host.await_agent() for host in hosts}
    stolen = world.keys / f"release{signers.SUFFIX}"
    online = signer.public_halves(world.server_data / "keys")

    # The signer makes other online keys, somebody makes another release key, and one root names them all.
    world.processes.run("release-server", "signer", "--next-keys", "--data", str(world.server_data))
    how = {"role": "release", "now": datetime.now(UTC), "passphrase": "correct horse", "scrypt_n": 2**4}
    signers.create(world.keys / f"release-b{signers.SUFFIX}", **how)
    words = ("--online", "--remove", "release", "--add-release", "release-b", "--yes")
    world.release("key", "rotate", *words, "-o", str(tmp_path / "next.json"))
    until("the hosts to follow the new root", lambda: all(follows(host, 2) for host in hosts))
    assert signer.public_halves(world.server_data / "keys") != online
    known = world.server_data / "trust" / "online.json"
    until("the server to tell its new keys", lambda: signer.read_public(known) != online)
    assert {host: host.pid() for host in hosts} == agents

    # The thief's key signs nothing that the server takes.
    thief = tmp_path / "thief"
    thief.mkdir()
    (thief / stolen.name).write_bytes(stolen.read_bytes())
    (thief / stolen.name).chmod(0o600)
    code, _, said = world.exit_of("release", "renew", "--keys-dir", str(thief), "--trust", str(world.trust))
    assert code == Exit.NOT_ALLOWED, said

    # And what people sign and the server says goes on as before, on the same agents.
    for host in hosts:
        world.pin(host.cohort, "1.1.0")
        host.await_good("1.1.0")
    world.release("policy", "revoke", "1.0.0", "--yes")
    world.steer(hosts[0].cohort, "pin", version="1.0.0")
    hosts[0].await_reason("revoked")
    assert hosts[0].good == "1.1.0"
    world.release("policy", "revoke", "1.0.0", "--undo", "--yes")
    hosts[0].await_good("1.0.0")
