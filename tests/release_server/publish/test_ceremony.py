"""Keys that are lost, stolen and moved: people at their machines, a real server, the agent's client."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from securesystemslib.signer import CryptoSigner

from agent_core.errors import Exit, TrustError
from keys import ceremony, signers
from release_server import repository, signer
from release_server.demo.processes import wait_for
from release_server.models import MetadataFile
from tests import forger
from tests.release_server.publish.house import PRODUCT, WORDS, Desk, ceremony_at, serve
from updater.catalog import Catalog
from updater.transport import Transport


@pytest.fixture
def house(tmp_path):
    with serve(tmp_path / "server") as running:
        yield running


@pytest.fixture
def desk(house, tmp_path):
    """Makes people's machines, each with the trusted root."""

    def make(name, role="reader", *, root=None):
        made = Desk(house, tmp_path / name, role=role)
        if root is not None:
            made.take(root)
        return made

    return make


@pytest.fixture
def begun(house, desk):
    """Holds the first ceremony at one desk and publishes it; where its keys are."""

    def begin(**numbers):
        ada = desk("ada", "admin")
        ceremony_at(ada, house, **numbers)
        words = {
            "root_keys": "--keys",
            "root_threshold": "--threshold",
            "release_keys": "--release-keys",
            "release_threshold": "--release-threshold",
        }
        said = [word for name, count in numbers.items() for word in (words[name], count)]
        code, _, error = ada("key", "gen", *said)
        assert code == Exit.DONE, error
        return ada

    return begin


@pytest.fixture
def agent(house, tmp_path):
    """The agent's own client, with its own memory, from the root it was installed with."""

    class Agent:
        def __init__(self):
            self.directory = tmp_path / "agent-tuf"
            self.transport = Transport(house.url, proxies={}, timeout_s=5.0)
            self.root = b""

        def look(self, now=None):
            with Catalog(self.directory, self.transport, PRODUCT, self.root) as catalog:
                return catalog.refresh(now or datetime.now(UTC), None)

    return Agent()


def move(key, here, there):
    """Carry a key file to another machine; it is nowhere else then."""
    file = here.keys / f"{key}{signers.SUFFIX}"
    there.take(file)
    file.unlink()


def public_half(desk, name):
    """What its holder sends of a key: the answer of `release key show`."""
    file = desk.home / f"{name}.pub.json"
    file.write_text(json.dumps(desk.json("key", "show", name)))
    return file


def test_a_lost_root_key_is_replaced_across_three_machines(begun, desk, house, agent):
    ada = begun(root_keys=3, root_threshold=2)
    root = ada.keys / "root.json"
    agent.root = root.read_bytes()
    assert agent.look().root_version == 1
    bo, dee = desk("bo", root=root), desk("dee", root=root)
    move("root-2", ada, bo)
    lost = signers.read(ada.keys / f"root-3{signers.SUFFIX}")
    dee.make_key("root", "root-d")
    file = ada.home / "next.json"
    made = ada.json("key", "revoke", "root-3", "--with", public_half(dee, "root-d"), "-o", file, "--yes")
    # root-3 is still at Ada's here and signs for the old root; without it Bo's is needed for both.
    assert made["state"] == "waiting"
    assert [(change["kind"], change["what"]) for change in made["changes"]] == [
        ("removed", "root key"),
        ("added", "root key"),
        ("expiry", "root 2"),
    ]
    assert ada("key", "publish", file, "--yes")[0] == Exit.USAGE
    code, _, said = bo("key", "sign", file, RELFLEET_SERVER="http://127.0.0.1:9")
    assert (code, "removed" in said, "add --yes" in said) == (Exit.USAGE, True, True)
    assert bo.json("key", "sign", file, "--yes", RELFLEET_SERVER="http://127.0.0.1:9")["state"] == "signed"
    assert ada.json("key", "publish", file, "--yes")["state"] == "published"
    assert agent.look().root_version == 2
    held = ceremony.parse_root((house.data / "repository/metadata/2.root.json").read_bytes()).signed
    assert lost.keyid not in held.roles["root"].keyids
    assert signers.read(dee.keys / f"root-d{signers.SUFFIX}").keyid in held.roles["root"].keyids


def test_a_stolen_release_key_is_replaced_and_signs_nothing_more(begun, desk, house, agent, make_bundle):
    ada = begun()
    agent.root = (ada.keys / "root.json").read_bytes()
    assert ada("push", make_bundle("1.0.0", product=PRODUCT), "--wait")[0] == Exit.DONE
    agent.look()
    thief = desk("thief", "releaser", root=ada.keys / "root.json")
    thief.take(ada.keys / f"release{signers.SUFFIX}")
    ada.make_key("release", "release-b")
    made = ada.json("key", "revoke", "release", "--with", "release-b", "-o", ada.home / "next.json", "--yes")
    assert made["state"] == "published"
    seen = agent.look()
    assert (seen.root_version, seen.targets_version) == (2, 3)
    signs = {row["name"]: row["signs"] for row in ada.json("key", "list")}
    assert (signs["release"], signs["release-b"], signs["root"]) == ([], ["targets"], ["root"])
    code, _, said = thief("push", make_bundle("6.6.6", product=PRODUCT))
    assert (code, "no release key" in said) == (Exit.NOT_ALLOWED, True), said
    assert ada.json("push", make_bundle("1.1.0", product=PRODUCT), "--wait")["state"] == "published"


def test_a_second_person_joins_and_both_are_needed_from_then_on(begun, desk, agent, make_bundle):
    ada = begun()
    agent.root = (ada.keys / "root.json").read_bytes()
    bo = desk("bo", "releaser", root=ada.keys / "root.json")
    bo.make_key("release", "release-bo")
    file = ada.home / "next.json"
    words = ("--add-release", public_half(bo, "release-bo"), "--release-threshold", "2")
    made = ada.json("key", "rotate", *words, "-o", file, "--yes")
    assert (made["state"], made["missing"]) == ("waiting", {"old_root": 0, "new_root": 0, "release": 1})
    assert ("threshold", "release") in [(change["kind"], change["what"]) for change in made["changes"]]
    assert bo.json("key", "sign", file, "--yes")["state"] == "signed"
    code, _, said = bo("key", "publish", file, "--yes")
    assert (code, "admin" in said) == (Exit.NOT_ALLOWED, True), said
    assert ada.json("key", "publish", file, "--yes")["state"] == "published"
    assert agent.look().root_version == 2
    staged = ada.json("push", make_bundle("1.0.0", product=PRODUCT))
    assert staged["state"] == "staged"
    assert bo.json("approve", "--yes")["state"] == "published"


def test_a_root_is_renewed_and_its_threshold_raised(begun, agent, house):
    ada = begun(root_keys=2, root_threshold=1)
    agent.root = (ada.keys / "root.json").read_bytes()
    for number, words in enumerate((["rotate"], ["rotate", "--threshold", "2"]), 2):
        made = ada.json("key", *words, "-o", ada.home / f"{number}.json", "--yes")
        assert (made["state"], made["version"]) == ("published", number)
        assert agent.look().root_version == number
    held = ceremony.parse_root((house.data / "repository/metadata/3.root.json").read_bytes()).signed
    assert held.roles["root"].threshold == 2


def test_stolen_online_keys_are_moved_and_versions_that_ran_forward_end(begun, agent, house, make_bundle):
    ada = begun()
    agent.root = (ada.keys / "root.json").read_bytes()
    assert ada("push", make_bundle("1.0.0", product=PRODUCT), "--wait")[0] == Exit.DONE
    stolen = forger.steal(house.config.keys)
    metadata = house.data / "repository" / "metadata"
    with house.hub.sessions.write() as session:  # the thief has the database as well
        for role, forged in forger.run_forward(metadata, stolen, 2**31).items():
            repository.store(session, role, forged, forged.to_bytes(), datetime.now(UTC))
    wait_for("the forged timestamp", lambda: agent.look().timestamp_version >= 2**31, within_s=20)
    code, _, said = ada("key", "rotate", "--online", "--yes")
    assert (code, "--next-keys" in said) == (Exit.CONFLICT, True), said
    signer.make_keys(house.config.keys, datetime.now(UTC), beside=signer.NEXT)
    fresh = signer.upcoming_halves(house.config.keys)
    signer.follow_public(house.config.trust, signer.public_halves(house.config.keys), fresh)
    made = ada.json("key", "rotate", "--online", "-o", ada.home / "next.json", "--yes")
    assert made["state"] == "published", made
    kinds = {(change["kind"], change["what"]) for change in made["changes"]}
    assert {("added", "timestamp key"), ("added", "snapshot key"), ("delegation", "cohorts")} <= kinds
    seen = agent.look()
    assert (seen.root_version, seen.timestamp_version < 1000) == (2, True)
    assert signer.public_halves(house.config.keys) == fresh
    assert not list(house.config.keys.glob("*.next.*"))
    with house.hub.sessions.read() as session:
        assert session.query(MetadataFile).filter(MetadataFile.version > 1000).count() == 0
    house.stop_jobs()
    forged = forger.run_forward(metadata, stolen, 2**31 + 1)["timestamp"].to_bytes()
    (metadata / "timestamp.json").write_bytes(forged)
    with pytest.raises(TrustError) as caught:
        agent.look()
    assert caught.value.reason == "bad-signature"


def test_keys_that_the_signer_lost_are_replaced_by_those_it_made(begun, agent, house, make_bundle):
    """Its disk is gone; the one that takes its place has neither its keys nor its memory."""
    ada = begun()
    agent.root = (ada.keys / "root.json").read_bytes()
    assert ada("push", make_bundle("1.0.0", product=PRODUCT), "--wait")[0] == Exit.DONE
    assert agent.look().root_version == 1
    house.stop_jobs()
    metadata, lost = house.data / "repository" / "metadata", forger.steal(house.config.keys)
    over = forger.run_forward(metadata, lost, 9, life=-timedelta(hours=1))  # as it is after a day
    with house.hub.sessions.write() as session:
        for role, signed in over.items():
            repository.store(session, role, signed, signed.to_bytes(), datetime.now(UTC))
    (metadata / "timestamp.json").write_bytes(over["timestamp"].to_bytes())
    house.lose_the_signer()
    fresh = signer.public_halves(house.config.keys)
    wait_for("the server to tell its keys", lambda: house.online == fresh, within_s=70)
    file = ada.home / "next.json"
    code, _, said = ada("key", "rotate", "--online", "-o", file, "--yes")
    assert (code, "expired" in said) == (Exit.TRUST, True), said
    made = ada.json("key", "rotate", "--online", "--offline", "-o", file, "--yes")
    assert (made["state"], made["missing"]) == ("signed", {"old_root": 0, "new_root": 0, "release": 0})
    assert ada.json("key", "publish", file, "--yes")["state"] == "published"
    seen = agent.look()
    assert (seen.root_version, seen.targets_version) == (2, 3)
    assert ada.json("push", make_bundle("1.1.0", product=PRODUCT), "--wait")["state"] == "published"


# --- files that somebody has changed on their way ---


@pytest.fixture(scope="module")
def waiting(tmp_path_factory):
    """A next root made at Ada's without the server, which Bo is to sign."""
    place = tmp_path_factory.mktemp("waiting")
    with serve(place / "server") as house:
        ada, bo = Desk(house, place / "ada", role="admin"), Desk(house, place / "bo", role="reader")
        ceremony_at(ada, house, root_keys=2, root_threshold=2)
        assert ada("key", "gen", "--keys", "2", "--threshold", "2")[0] == Exit.DONE
        bo.take(ada.keys / "root.json")
        move("root-2", ada, bo)
        file = place / "next.json"
        assert ada.json("key", "rotate", "--offline", "-o", file, "--yes")["state"] == "waiting"
        yield bo, file


@pytest.fixture
def on_the_way(waiting, tmp_path):
    """Bo, and a copy of the file of this test's own."""
    bo, file = waiting
    (tmp_path / "next.json").write_bytes(file.read_bytes())
    return bo, tmp_path / "next.json"


def edit(file, change):
    held = json.loads(file.read_bytes())
    change(held)
    file.write_text(json.dumps(held))


def slip_in_a_key(held):
    """A carrier's own key, in the new root's release role."""
    mine = CryptoSigner.generate_ed25519().public_key
    held["root"]["signed"]["keys"][mine.keyid] = mine.to_dict()
    held["root"]["signed"]["roles"]["targets"]["keyids"] = [mine.keyid]


def another_chain(held):
    held["chain"][0]["signed"]["expires"] = "2040-01-01T00:00:00Z"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (slip_in_a_key, "would no longer be signed"),
        (another_chain, "do not begin from root 1"),
        (lambda held: held["root"]["signed"].update(version=3), "versions go up by one"),
        (lambda held: held["before"]["signatures"].clear(), "not signed"),
        (lambda held: held.update(kind="something else"), "next root"),
    ],
    ids=["key", "chain", "version", "targets", "kind"],
)
def test_a_file_that_was_changed_on_its_way_is_not_signed(on_the_way, change, words):
    bo, file = on_the_way
    edit(file, change)
    code, _, said = bo("key", "sign", file, "--yes")
    assert code in (Exit.TRUST, Exit.CONFLICT, Exit.USAGE)
    assert words in said


def test_signing_takes_a_key_that_counts_and_whoever_signs_twice_is_told(on_the_way, tmp_path):
    bo, file = on_the_way
    words = ("--keys-dir", tmp_path / "none", "--trust", bo.keys / "root.json")
    code, _, said = bo("key", "sign", file, "--yes", *words)
    assert (code, "nothing was signed" in said) == (Exit.NOT_ALLOWED, True), said
    assert bo.json("key", "sign", file, "--yes")["state"] == "signed"
    assert bo("key", "sign", file, "--yes")[0] == Exit.NOT_ALLOWED
    assert WORDS not in file.read_text()
