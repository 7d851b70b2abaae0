"""Each ceremony of the runbook in docs/security.md, under a running fleet that no hand touches."""

from __future__ import annotations

import json
import re
import shutil
from datetime import UTC, datetime, timedelta

import pytest

from agent_core.errors import Exit
from keys import rotation, signers
from keys.ceremony import parse_root
from release_server import repository, signer
from release_server.config import Config
from release_server.database import Sessions, make_engine
from release_server.publish import ceremony as ceremonies
from release_server.publish import sign
from tests import forger
from tests.integration.world import until

PASSPHRASE = {"passphrase": "correct horse", "scrypt_n": 2**4}


@pytest.fixture(scope="module")
def hosts(world):
    world.publish("1.1.0")
    hosts = world.hosts(world.cohort(), world.cohort())
    for host in hosts:
        host.await_look("up-to-date")
    return hosts


def follows(host, root):
    return (host.layout.tuf / "root_history" / f"{root}.root.json").exists()


def make_key(directory, role, name):
    directory.mkdir(mode=0o700, exist_ok=True)
    place = directory / f"{name}{signers.SUFFIX}"
    signers.create(place, role=role, now=datetime.now(UTC), **PASSPHRASE)
    return place


@pytest.fixture
def ceremony(world, hosts, tmp_path):
    """Holds one with the keys that are there; until every host has followed, by itself."""

    def hold(*words):
        agents = {host: host.await_agent() for host in hosts}
        number = world.client.get("/trust")["root_version"] + 1
        world.release("key", *words, "--yes", "-o", str(tmp_path / f"{number}.json"))
        until(f"the hosts to follow root {number}", lambda: all(follows(host, number) for host in hosts))
        assert {host: host.pid() for host in hosts} == agents

    return hold


@pytest.fixture
def desk(world):
    """`release WORDS…` as somebody with other keys and a token of his own; exit code, output, errors."""

    def sit(keys, role="releaser"):
        token = world.make_token(role)

        def call(*words):
            where = ("--keys-dir", str(keys), "--trust", str(world.trust), "--token-file", str(token))
            return world.exit_of("release", *words, *where)

        return call

    return sit


def goes_on(world, hosts, *versions):
    """People and server say what runs, as before."""
    for version in versions:
        for host in hosts:
            world.pin(host.cohort, version)
        for host in hosts:
            host.await_good(version)


def test_every_stolen_key_is_changed_under_a_running_fleet(world, hosts, tmp_path):
    agents = {host: host.await_agent() for host in hosts}
    stolen = world.keys / f"release{signers.SUFFIX}"
    online = signer.public_halves(world.server_data / "keys")
    number = world.client.get("/trust")["root_version"] + 1

    # The signer makes other online keys, somebody makes another release key, and one root names them all.
    world.processes.run("release-server", "signer", "--next-keys", "--data", str(world.server_data))
    make_key(world.keys, "release", "release-b")
    words = ("--online", "--remove", "release", "--add-release", "release-b", "--yes")
    world.release("key", "rotate", *words, "-o", str(tmp_path / "next.json"))
    until("the hosts to follow the new root", lambda: all(follows(host, number) for host in hosts))
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
    assert "1.1.0" in world.release("list")
    for host in hosts:
        world.pin(host.cohort, "1.1.0")
        host.await_good("1.1.0")
    world.release("policy", "revoke", "1.0.0", "--yes")
    world.steer(hosts[0].cohort, "pin", version="1.0.0")
    hosts[0].await_reason("revoked")
    assert hosts[0].good == "1.1.0"
    world.release("policy", "revoke", "1.0.0", "--undo", "--yes")
    hosts[0].await_good("1.0.0")


def test_root_keys_are_stolen_and_lost_and_their_threshold_rises(world, hosts, ceremony, desk, tmp_path):
    stolen = tmp_path / "stolen"
    stolen.mkdir(mode=0o700)
    for name in ("root-b", "root-c", "root-d", "root-e", "root-f", "root-g"):
        make_key(world.keys, "root", name)
    shutil.copy2(world.keys / f"root{signers.SUFFIX}", stolen)  # a thief had all there was of the root
    ceremony("rotate", "--add-root", "root-b", "--add-root", "root-c", "--threshold", "2")
    number = world.client.get("/trust")["root_version"]

    # Below the threshold he can make a next root, and neither he nor the server can publish it.
    thief, file = desk(stolen, "admin"), tmp_path / "thief.json"
    make_key(stolen, "release", "thief")
    code, said, error = thief("key", "rotate", "--add-release", "thief", "--yes", "--json", "-o", str(file))
    assert (code, json.loads(said)["state"]) == (Exit.DONE, "waiting"), error
    code, _, said = thief("key", "publish", str(file), "--yes")
    assert (code, "not signed by enough" in said) == (Exit.USAGE, True), said
    assert world.client.get("/trust")["root_version"] == number

    ceremony("revoke", "root", "--with", "root-d")
    (world.keys / f"root-b{signers.SUFFIX}").rename(tmp_path / "lost")
    lost = json.loads((tmp_path / "lost").read_bytes())["keyid"]
    ceremony("revoke", lost, "--with", "root-e")
    assert set(roots(world).keyids) == {keyid(world, name) for name in ("root-c", "root-d", "root-e")}
    gone = ("--remove", "root-d", "--remove", "root-e")  # as many as it takes to sign, and people were first
    ceremony("rotate", *gone, "--add-root", "root-f", "--add-root", "root-g")
    assert set(roots(world).keyids) == {keyid(world, name) for name in ("root-c", "root-f", "root-g")}
    assert roots(world).threshold == 2
    goes_on(world, hosts, "1.1.0", "1.0.0")


def test_two_people_have_to_sign_a_policy_once_the_threshold_is_two(world, hosts, ceremony, desk, tmp_path):
    """What one of them signed changes nothing until the other has; then hosts go by it."""
    bo_keys = tmp_path / "bo"
    bo = make_key(bo_keys, "release", "release-bo")
    public = json.loads(world.release("key", "show", "release-bo", "--keys-dir", str(bo_keys), "--json"))
    (tmp_path / "bo.pub.json").write_text(json.dumps(public))
    shutil.copy2(bo, world.keys)  # a root needs both; Ada gives hers back
    ceremony("rotate", "--add-release", str(tmp_path / "bo.pub.json"), "--release-threshold", "2")
    (world.keys / bo.name).unlink()
    goes_on_with = hosts[0]
    world.release("policy", "revoke", "1.1.0", "--yes")
    code, said, error = desk(world.keys)("approve", "--yes", "--json")
    assert code != Exit.DONE, said + error
    world.pin(goes_on_with.cohort, "1.1.0")
    goes_on_with.await_good("1.1.0")  # what one of two said is nothing yet
    world.pin(goes_on_with.cohort, "1.0.0")
    goes_on_with.await_good("1.0.0")
    code, said, error = desk(bo_keys)("approve", "--yes", "--json")
    assert (code, json.loads(said)["state"]) == (Exit.DONE, "published"), error
    world.steer(goes_on_with.cohort, "pin", version="1.1.0")
    goes_on_with.await_reason("revoked")
    assert goes_on_with.good == "1.0.0"
    ceremony("rotate", "--remove", public["keyid"], "--release-threshold", "1")
    world.release("policy", "revoke", "1.1.0", "--undo", "--yes")
    goes_on_with.await_good("1.1.0")


def test_versions_that_stolen_online_keys_ran_forward_are_over_with_other_keys(world, hosts, ceremony):
    config = Config.load(world.server_data, environ={})
    stolen = forger.steal(config.keys)
    world.stop_server()
    sessions = Sessions(make_engine(config.database_url))
    with sessions.write() as session:  # he has the database as well, and the server goes on from it
        for role, forged in forger.run_forward(world.metadata, stolen, 2**31).items():
            repository.store(session, role, forged, forged.to_bytes(), datetime.now(UTC))
    sessions.close()
    world.start_server()
    until("the hosts to follow the thief", lambda: all(newest(host) >= 2**31 for host in hosts))
    world.processes.run("release-server", "signer", "--next-keys", "--data", str(world.server_data))
    ceremony("rotate", "--online")
    until("the hosts to follow the server's numbers", lambda: all(newest(host) < 2**20 for host in hosts))
    goes_on(world, hosts, "1.0.0", "1.1.0")
    forged = forger.run_forward(world.metadata, stolen, 2**31 + 1)["timestamp"].to_bytes()
    with world.jobs_stopped():
        honest = world.timestamp()
        (world.metadata / "timestamp.json").write_bytes(forged)
        for host in hosts:
            host.await_look("bad-signature")
        (world.metadata / "timestamp.json").write_bytes(honest)
    for host in hosts:
        host.await_look("up-to-date")
        assert host.good == "1.1.0"


# --- lost keys, a year that is over, one more person ---


def test_a_release_key_whose_file_is_gone_is_replaced_and_the_next_release_arrives(
    world, hosts, ceremony, tmp_path
):
    lost = signs(world, "targets")
    held = keyid(world, lost)
    (world.keys / f"{lost}{signers.SUFFIX}").rename(tmp_path / "gone")
    archive = world.derive("4.0.0", {})
    code, _, said = world.exit_of("release", "push", str(archive))
    assert (code, "no release key" in said) == (Exit.NOT_ALLOWED, True), said
    world.release("key", "gen", "--role", "release", "--name", "release-new")
    # Nobody knows ids by heart: whoever names the key by its old name is told which one has no file.
    code, _, said = world.exit_of("release", "key", "revoke", lost, "--with", "release-new", "--yes")
    assert code == Exit.NOT_FOUND
    found = re.search(r"release ([0-9a-f]{12})", said)[1]
    assert held.startswith(found)
    ceremony("revoke", found, "--with", "release-new")
    world.release("push", str(archive), "--wait")
    arrives(world, hosts, "4.0.0")


def test_online_keys_whose_files_are_gone_are_made_anew_and_the_fleet_goes_on(world, hosts, ceremony):
    keys, data = Config.load(world.server_data, environ={}).keys, ("--data", str(world.server_data))
    lost = signer.public_halves(keys)
    for file in keys.iterdir():
        file.unlink()
    code, said, _ = world.exit_of("release-server", "doctor", *data)
    assert (code, "release-server signer --make-keys" in said) == (Exit.FAILED, True), said
    world.processes.run("release-server", "signer", "--make-keys", *data)
    assert signer.public_halves(keys) != lost
    ceremony("rotate", "--online")
    archive = world.derive("4.1.0", {})
    world.release("push", str(archive), "--wait")
    arrives(world, hosts, "4.1.0")
    assert world.exit_of("release-server", "doctor", *data)[0] == Exit.DONE


def test_a_root_that_is_about_to_expire_holds_another_year_by_the_same_keys(world, hosts, ceremony):
    before, data = publish_old_root(world, timedelta(days=364)), ("--data", str(world.server_data))
    until("the hosts to follow it", lambda: all(follows(host, before.version) for host in hosts))
    assert "release key rotate" in world.exit_of("release-server", "doctor", *data)[1]
    ceremony("rotate")
    after = newest_root(world)
    assert (after.keys, after.roles) == (before.keys, before.roles)
    assert after.expires - datetime.now(UTC) > timedelta(days=364)
    assert "release key rotate" not in world.exit_of("release-server", "doctor", *data)[1]
    archive = world.derive("4.2.0", {})
    world.release("push", str(archive), "--wait")
    arrives(world, hosts, "4.2.0")


def test_one_more_release_manager_pushes_with_a_key_and_a_token_of_his_own(
    world, hosts, ceremony, desk, tmp_path
):
    (mine := tmp_path / "cy").mkdir(mode=0o700)
    cy, public = desk(mine), tmp_path / "release-cy.pub.json"
    world.release("key", "gen", "--role", "release", "--name", "release-cy", "--keys-dir", str(mine))
    public.write_text(world.release("key", "show", "release-cy", "--keys-dir", str(mine), "--json"))
    archive = world.derive("4.3.0", {})
    code, _, said = cy("push", str(archive))
    assert (code, "no release key" in said) == (Exit.NOT_ALLOWED, True), said
    ceremony("rotate", "--add-release", str(public))
    code, _, said = cy("push", str(archive), "--wait")
    assert code == Exit.DONE, said
    arrives(world, hosts, "4.3.0")
    # He leaves: by his token he may do nothing any more, and then by his key neither.
    archive = world.derive("4.4.0", {})
    his = max(row["id"] for row in json.loads(world.release("token", "list", "--json")))
    world.release("token", "revoke", str(his), "--yes")
    code, _, said = cy("push", str(archive))
    assert (code, "no release key" in said) == (Exit.NOT_ALLOWED, False), said
    ceremony("rotate", "--remove", json.loads(public.read_text())["keyid"][:12])
    code, _, said = cy("push", str(archive))
    assert (code, "no release key" in said) == (Exit.NOT_ALLOWED, True), said
    world.release("push", str(archive), "--wait")
    arrives(world, hosts, "4.4.0")


def arrives(world, hosts, version):
    """A release that was pushed just now runs on every host in the end."""
    world.published.add(version)
    goes_on(world, hosts, version)


def publish_old_root(world, age):
    """The root as it is when nobody has renewed it for so long; signed by the keys that are there."""
    trust, now = world.trust.read_bytes(), datetime.now(UTC)
    trusted = sign.fetch(world.client, trust, world.home / "cache")
    chain = ceremonies.fetch_chain(world.client, trusted)
    following = rotation.make_next(chain, trusted.targets, rotation.Wanted(), now - age)
    rotation.sign(following, ceremonies.open_signers(following, world.keys, lambda _: "correct horse"))
    assert rotation.missing(following).is_none
    world.client.put("/trust/root", following.root.to_bytes())
    return following.root.signed


def signs(world, role):
    """The name of a key that is here and signs for this role today."""
    rows = json.loads(world.release("key", "list", "--json"))
    return next(row["name"] for row in rows if role in row["signs"])


def newest(host):
    """The version of the timestamp that a host has verified."""
    return json.loads((host.layout.tuf / "timestamp.json").read_bytes())["signed"]["version"]


def newest_root(world):
    number = world.client.get("/trust")["root_version"]
    return parse_root((world.metadata / f"{number}.root.json").read_bytes()).signed


def roots(world):
    return newest_root(world).roles["root"]


def keyid(world, name):
    return signers.read(world.keys / f"{name}{signers.SUFFIX}").keyid
