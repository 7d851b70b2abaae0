"""Two people, two machines, one release: against a real server, and against one that lies."""

from __future__ import annotations

import json

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole

from agent_core.errors import Exit
from keys import ceremony, signers
from release_server.models import Proposal
from tests.release_server.publish.house import WORDS, Desk, ceremony_at, serve

PRODUCT = "demo"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("house") / "server") as running:
        yield running


@pytest.fixture(scope="module")
def desks(house, tmp_path_factory):
    """Ada and Bo hold one of two release keys each, after a ceremony at Ada's; both are needed."""
    place = tmp_path_factory.mktemp("desks")
    ada, bo = (Desk(house, place / name, role="releaser") for name in ("ada", "bo"))
    root = Desk(house, place / "root", role="admin")
    ceremony_at(root, house, release_keys=2, release_threshold=2)
    for desk, key in ((ada, "release-1"), (bo, "release-2")):
        desk.take(root.keys / f"{key}{signers.SUFFIX}", root.keys / "root.json")
    return ada, bo, root


@pytest.fixture
def people(desks, make_bundle):
    """Ada and Bo with nothing staged, 0.9.0 published, and a floor there."""
    ada, bo, root = desks
    code, _, said = root("key", "gen", "--release-keys", "2", "--release-threshold", "2")
    assert code == Exit.DONE, said
    for entry in ada.json("approve", "--list"):
        assert ada("withdraw", entry["id"], "--reason", "the test before", "--yes")[0] == Exit.DONE
    if ada("show", "0.9.0")[0] == Exit.NOT_FOUND:
        for words in (("push", make_bundle("0.9.0", product=PRODUCT)), ("policy", "set", "--floor", "0.9.0")):
            assert ada.json(*words, "--yes")["state"] == "staged"
            assert bo.json("approve", "--yes")["state"] == "published"
    return ada, bo


@pytest.fixture
def version(request):
    """A version of this test's own."""
    return f"1.0.0-{request.node.name[5:30].replace('_', '-').strip('-')}".split("[")[0]


@pytest.fixture
def staged(people, make_bundle, version):
    """What Ada has proposed: one new version."""
    ada, _ = people
    outcome = ada.json("push", make_bundle(version, product=PRODUCT, content=version.encode()))
    assert outcome["state"] == "staged"
    return outcome


@pytest.fixture
def tamper(house, staged):
    """Change the proposal in the database, as a thief of the server would, under signatures of his choice."""

    def change(how, *keys):
        with house.hub.sessions.write() as session:
            row = session.get_one(Proposal, staged["proposal"]["id"])
            metadata = ceremony.parse_targets(row.body)
            how(metadata.signed)
            if keys:
                metadata.signatures.clear()
                ceremony.sign(metadata, keys)
            row.body = metadata.to_bytes()

    return change


@pytest.fixture
def ada_key(people):
    """Ada's key, stolen as well: what the server shows then has a signature that counts."""
    path = people[0].keys / f"release-1{signers.SUFFIX}"
    return signers.load(path, lambda _prompt: WORDS)


def newest(house):
    metadata = house.data / "repository" / "metadata"
    version = max(int(file.name.partition(".")[0]) for file in metadata.glob("*.targets.json"))
    return json.loads((metadata / f"{version}.targets.json").read_bytes())["signed"]


def is_served(house, version):
    return any(f"/{version}/" in path for path in newest(house)["targets"])


# --- the way it goes ---


def test_a_release_is_staged_by_one_and_published_by_the_second_signature(
    people, house, staged, version, make_bundle
):
    ada, bo = people
    number = staged["proposal"]["id"]
    assert not is_served(house, version)
    assert not list((house.data / "repository" / "targets").rglob(f"{version}/*"))
    again = ada.json("push", make_bundle(version, product=PRODUCT, content=version.encode()))
    assert (again["state"], again["proposal"]["id"], again["uploaded"]) == ("staged", number, 0)
    first, *others = ada.json("list")
    assert (first["version"], first["state"], first["proposal"]["id"]) == (version, "staged", number)
    assert len(first["bundles"]) == 1
    assert {row["state"] for row in others} <= {"published"}
    assert f"release approve {number}" in ada("list")[1].splitlines()[1]
    code, _, said = bo("approve")
    assert code == Exit.USAGE
    assert "added" in said
    assert version in said
    assert "add --yes" in said
    approved = bo.json("approve", "--yes")
    assert (approved["state"], approved["proposal"]) == ("published", number)
    kinds = {change["kind"] for change in approved["changes"]}
    assert kinds == {"added", "expiry"}
    assert is_served(house, version)
    assert bo.json("approve", "--list", "--all")[0]["state"] == "published"
    again = ada.json("push", make_bundle(version, product=PRODUCT, content=version.encode()))
    assert again["state"] == "already"
    assert house.audit()[-4:] == ["proposal.create", "proposal.sign", "release.publish", "targets.accept"]


def test_a_push_to_a_cohort_that_is_only_staged_does_not_end_as_if_the_rollout_had_begun(
    people, version, make_bundle
):
    ada, bo = people
    archive = make_bundle(version, product=PRODUCT, content=version.encode())
    code, out, said = ada("push", archive, "--to", "main", "--json")
    assert code == Exit.UNREACHABLE
    assert json.loads(out)["state"] == "staged"
    assert "no rollout to main has begun" in said
    bo.json("approve", "--yes")
    assert ada.json("list")[0]["state"] == "published"


def test_a_policy_and_a_renewal_go_the_same_way(people):
    ada, bo = people
    for words in (("policy", "revoke", "0.9.0"), ("policy", "revoke", "0.9.0", "--undo"), ("renew",)):
        before = ada.json("policy", "show")
        assert ada.json(*words, "--yes")["state"] == "staged"
        assert ada.json("policy", "show") == before
        assert bo.json("approve", "--yes")["state"] == "published"
        assert ada.json("policy", "show") != before


def test_the_same_key_does_not_count_twice(people, staged):
    ada, bo = people
    code, _, said = ada("approve", "--yes")
    assert (code, "has signed this already" in said) == (Exit.CONFLICT, True), said
    number = staged["proposal"]["id"]
    assert ada.json("approve", number, "--dry-run")["missing"] == 1
    assert bo.json("approve", number, "--dry-run")["missing"] == 1


def test_one_person_with_both_keys_cannot_approve_what_he_proposed(people, staged):
    ada, bo = people
    code, _, said = ada("approve", "--yes", "--keys-dir", bo.keys)
    assert code == Exit.NOT_ALLOWED
    assert "second person" in said
    assert bo.json("approve", "--yes")["state"] == "published"


def test_a_proposal_whose_base_is_gone_by_says_what_to_do(people, staged, house, make_bundle):
    ada, bo = people
    number = staged["proposal"]["id"]
    other = ada.json("renew")["proposal"]["id"]
    code, _, said = bo("approve", "--yes")
    assert (code, f"{number}, {other}" in said) == (Exit.USAGE, True), said
    assert bo.json("approve", other, "--yes")["state"] == "published"
    code, _, said = bo("approve", number, "--yes")
    assert code == Exit.CONFLICT
    assert "make it anew from the current one" in said
    assert bo("approve")[0] == Exit.NOT_FOUND
    states = {row["id"]: row["state"] for row in bo.json("approve", "--list", "--all")}
    assert (states[number], states[other]) == ("outdated", "published")


def test_a_withdrawn_proposal_is_signed_no_more(people, staged):
    _, bo = people
    number = staged["proposal"]["id"]
    assert bo("withdraw", number, "--reason", "wrong branch")[0] == Exit.USAGE
    assert bo("withdraw", number, "--reason", "wrong branch", "--yes")[0] == Exit.DONE
    assert bo("approve", number, "--yes")[0] == Exit.CONFLICT
    assert bo("withdraw", number, "--reason", "again", "--yes")[0] == Exit.CONFLICT


def test_push_waits_for_the_approval_when_asked_and_gives_up_in_time(people, staged, make_bundle, version):
    ada, _ = people
    archive = make_bundle(version, product=PRODUCT, content=version.encode())
    code, _, said = ada("push", archive, "--wait", "--timeout", "1s")
    assert code == Exit.UNREACHABLE
    assert f"release approve {staged['proposal']['id']}" in said


def test_other_bytes_under_a_proposed_version_are_a_conflict(people, staged, make_bundle, version, tmp_path):
    ada, _ = people
    other = make_bundle(version, product=PRODUCT, content=b"other", into=tmp_path / "other")
    assert ada("push", other)[0] == Exit.CONFLICT


def test_without_a_release_key_nothing_is_approved(people, staged, tmp_path):
    _, bo = people
    code, _, said = bo("approve", "--yes", "--keys-dir", tmp_path / "none", "--trust", bo.keys / "root.json")
    assert (code, "no release key" in said) == (Exit.NOT_ALLOWED, True), said


# --- a server that lies ---


def first_bundle(targets):
    """The one that was published before any test."""
    return next(path for path in targets.targets if "/0.9.0/" in path and path.endswith(".tar.zst"))


def jump(targets):
    targets.version += 1


def drop(targets):
    path = first_bundle(targets)
    del targets.targets[path]
    del targets.targets[path.replace(".tar.zst", ".index.json")]


def exchange(targets):
    targets.targets[first_bundle(targets)].hashes["sha256"] = "0" * 64


def delegate(targets):
    role = targets.delegations.roles["cohorts"]
    targets.delegations.roles["more"] = DelegatedRole(
        "more", role.keyids, 1, terminating=True, paths=["bundles/*/*/*"]
    )


def lower_floor(targets):
    for path, target in targets.targets.items():
        if path.startswith("policy/"):
            target.custom["floor_seq"] = 0


def lie(targets):
    """What is signed of the new bundle is not what is in it."""
    bundles = [target for path, target in targets.targets.items() if path.endswith(".tar.zst")]
    max(bundles, key=lambda target: target.custom["seq"]).custom["files"] += 1


def hold_long(targets):
    targets.expires = targets.expires.replace(year=targets.expires.year + 5)


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        (jump, Exit.CONFLICT, "versions go up by one"),
        (drop, Exit.TRUST, "what was published stays"),
        (exchange, Exit.TRUST, "a version never changes"),
        (delegate, Exit.TRUST, "targets delegate to"),
        (lower_floor, Exit.TRUST, "its floor 0 is lower"),
        (hold_long, Exit.TRUST, "60 days are the most"),
        (lie, Exit.TRUST, "not what is signed of it"),
    ],
)
def test_what_the_rules_forbid_is_refused_whoever_has_signed_it(
    people, staged, tamper, ada_key, how, code, words
):
    _, bo = people
    tamper(how, ada_key)
    found, _, said = bo("approve", staged["proposal"]["id"], "--yes")
    assert (found, words in said) == (code, True), said


def test_a_proposal_that_no_release_key_signed_is_refused(people, staged, tamper):
    _, bo = people
    tamper(lambda targets: None, CryptoSigner.generate_ed25519())
    code, _, said = bo("approve", staged["proposal"]["id"], "--yes")
    assert (code, "no release key of the trusted root" in said) == (Exit.TRUST, True), said


def test_a_bundle_that_is_not_what_is_signed_of_it_is_refused(people, staged, house, version):
    _, bo = people
    digest = staged["bundles"][0]["sha256"]
    blob = house.hub.blobs.path(digest)
    right = blob.read_bytes()
    blob.chmod(0o644)
    for wrong in (right[:-1] + b"!", right + b"!", right[:-1]):
        blob.write_bytes(wrong)
        code, _, said = bo("approve", staged["proposal"]["id"], "--yes")
        assert (code, "is refused" in said) == (Exit.TRUST, True), said
    blob.write_bytes(right)
    assert bo.json("approve", staged["proposal"]["id"], "--yes")["state"] == "published"
