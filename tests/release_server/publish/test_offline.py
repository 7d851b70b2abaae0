"""`release sign` on machines without a network, and `release push --signed` from one that has no key."""

from __future__ import annotations

import json
import shutil

import pytest

from agent_core.errors import Exit
from keys import signers
from tests.release_server.publish.house import Desk, ceremony_at, serve

PRODUCT = "demo"
NOWHERE = {"RELFLEET_SERVER": "http://127.0.0.1:9", "RELFLEET_TOKEN": ""}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("house") / "server") as running:
        yield running


@pytest.fixture(scope="module")
def desks(house, tmp_path_factory):
    """Ada and Bo hold one of two release keys each and reach nothing; a courier has a token and no key."""
    place = tmp_path_factory.mktemp("desks")
    root = Desk(house, place / "root", role="admin")
    ceremony_at(root, house, release_keys=2, release_threshold=2)
    assert root("key", "gen", "--release-keys", "2", "--release-threshold", "2")[0] == Exit.DONE
    made = [Desk(house, place / name) for name in ("ada", "bo", "courier")]
    for desk, keys in zip(made, (["release-1"], ["release-2"], []), strict=True):
        desk.take(root.keys / "root.json", *(root.keys / f"{key}{signers.SUFFIX}" for key in keys))
    for desk in made[:2]:
        desk.environ |= NOWHERE
    assert made[2]("policy", "show")[0] == Exit.DONE  # what the ceremony made is published
    return made


@pytest.fixture
def stick(house, tmp_path):
    """What the courier carries: the server's metadata on the way there."""
    return shutil.copytree(house.config.repository / "metadata", tmp_path / "stick" / "metadata").parent


@pytest.fixture
def archive(make_bundle, request):
    name = request.node.name
    version = f"1.{len(name)}.{name.count('_')}"
    return make_bundle(version, product=PRODUCT, content=name.encode())


@pytest.fixture
def sign(stick, archive):
    """`release sign` of the bundle at a desk, onto the stick's file."""

    def call(desk, *words):
        where = ("--metadata", stick / "metadata", "-o", stick / "next.json", "--json", "--yes")
        return desk("sign", archive, *where, *words)

    return call


def test_two_people_sign_without_a_network_and_a_third_without_a_key_publishes(desks, stick, archive, sign):
    ada, bo, courier = desks
    code, out, said = sign(ada, "--notes", "/dev/null")
    assert (code, json.loads(out)["missing"]) == (Exit.DONE, 1), said
    assert sign(ada)[0] == Exit.CONFLICT  # her signature is there already
    code, out, said = sign(bo)
    assert (code, json.loads(out)["missing"], "added" in said) == (Exit.DONE, 0, True), said
    outcome = courier.json("push", archive, "--signed", stick / "next.json", "--wait")
    assert outcome["state"] == "published"
    assert courier.json("push", archive, "--signed", stick / "next.json")["state"] == "already"


def test_what_only_one_has_signed_is_staged(desks, stick, archive, sign):
    ada, _, courier = desks
    assert sign(ada)[0] == Exit.DONE
    outcome = courier.json("push", archive, "--signed", stick / "next.json")
    assert (outcome["state"], outcome["proposal"]["missing"]) == ("staged", 1)
    assert courier("withdraw", outcome["proposal"]["id"], "--reason", "tried", "--yes")[0] == Exit.DONE


def without(file, name):
    """The signed file less one signature, as whoever carries it can make it."""
    body = json.loads(file.read_text())
    body["signatures"] = [entry for entry in body["signatures"] if entry["keyid"] != name]
    file.write_text(json.dumps(body))


def test_a_file_that_more_people_have_signed_than_the_open_proposal_is_published(desks, stick, archive, sign):
    ada, bo, courier = desks
    assert sign(ada)[0] == Exit.DONE
    file = stick / "next.json"
    staged = courier.json("push", archive, "--signed", file)
    assert courier.json("push", archive, "--signed", file)["proposal"]["id"] == staged["proposal"]["id"]
    assert sign(bo)[0] == Exit.DONE
    assert courier.json("push", archive, "--signed", file, "--wait")["state"] == "published"
    assert courier.json("approve", "--list") == []
    listed = {entry["id"]: entry["state"] for entry in courier.json("approve", "--list", "--all")}
    assert listed[staged["proposal"]["id"]] == "published"  # the same targets: not outdated by themselves


def test_signatures_of_a_file_are_added_to_the_open_proposal_of_the_same_targets(
    house, desks, stick, archive, sign, tmp_path
):
    ada, bo, courier = desks
    file = stick / "next.json"
    assert sign(ada)[0] == Exit.DONE
    number = courier.json("push", archive, "--signed", file)["proposal"]["id"]
    assert sign(bo)[0] == Exit.DONE
    without(file, signers.read(next(ada.keys.glob("release-1*"))).keyid)
    code, _, said = courier("push", archive, "--signed", file)  # brought the first as well
    assert (code, "somebody else has to sign it" in said) == (Exit.NOT_ALLOWED, True), said
    second = Desk(house, tmp_path / "second-courier")
    second.take(courier.keys / "root.json")
    assert second.json("push", archive, "--signed", file, "--wait")["state"] == "published"
    listed = {entry["id"]: entry for entry in courier.json("approve", "--list", "--all")}
    assert (listed[number]["state"], len(listed[number]["signers"])) == ("published", 2)


def test_a_file_of_the_same_bundles_in_other_targets_is_refused_while_those_are_open(
    house, desks, stick, archive, sign
):
    ada, bo, courier = desks
    online = {"RELFLEET_SERVER": house.url, "RELFLEET_TOKEN": house.token("releaser", "ada")}
    number = ada.json("push", archive, **online)["proposal"]["id"]
    file = stick / "next.json"
    assert sign(bo)[0] == Exit.DONE
    code, _, said = courier("push", archive, "--signed", file)
    assert (code, f"release withdraw {number}" in said) == (Exit.CONFLICT, True), said
    assert courier("withdraw", number, "--reason", "tried", "--yes")[0] == Exit.DONE
    staged = courier.json("push", archive, "--signed", file)
    assert (staged["state"], staged["proposal"]["missing"]) == ("staged", 1)
    assert courier("withdraw", staged["proposal"]["id"], "--reason", "tried", "--yes")[0] == Exit.DONE


def test_a_file_of_other_bundles_unsigned_or_of_a_base_that_has_gone_by_is_refused(
    desks, stick, archive, sign, make_bundle
):
    ada, bo, courier = desks
    assert (sign(ada)[0], sign(bo)[0]) == (Exit.DONE, Exit.DONE)
    file = stick / "next.json"
    other = make_bundle("7.7.7", product=PRODUCT)
    code, _, said = courier("push", other, "--signed", file)
    assert (code, "not among the bundles here" in said) == (Exit.TRUST, True), said
    code, _, said = bo("sign", other, "--metadata", stick / "metadata", "-o", file, "--yes")
    assert (code, "not among the bundles here" in said) == (Exit.TRUST, True), said
    bare = json.loads(file.read_text()) | {"signatures": []}
    (stick / "bare.json").write_text(json.dumps(bare))
    code, _, said = courier("push", archive, "--signed", stick / "bare.json")
    assert (code, "not signed" in said) == (Exit.TRUST, True), said
    assert courier("show", json.loads(courier("list", "--json")[1])[0]["version"])[0] == Exit.DONE
    # Signed twice from one base: the second has gone by when the first is published.
    (stick / "second.json").write_bytes(file.read_bytes())
    assert courier.json("push", archive, "--signed", file, "--wait")["state"] == "published"
    later = make_bundle("7.7.8", product=PRODUCT)
    words = ("sign", later, "--metadata", stick / "metadata", "-o", stick / "later.json", "--yes")
    assert (ada(*words)[0], bo(*words)[0]) == (Exit.DONE, Exit.DONE)
    code, _, said = courier("push", later, "--signed", stick / "later.json")
    assert (code, "make it anew from the current one" in said) == (Exit.CONFLICT, True), said
