"""Metadata that are not what they should be: other bytes or versions, another kind, or not there."""

from __future__ import annotations

import json
from datetime import timedelta

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import MetaFile

from tests.conformance.runner import OK, REFUSED

DAY = timedelta(days=1)
HASHES = pytest.mark.parametrize("hashes", [True, False], ids=["with hashes", "without hashes"])


def test_what_is_kept_is_what_was_served_byte_for_byte(runner, repository):
    repository.write("timestamp.json", repository.read("timestamp.json") + b" ")
    assert runner.refresh() == OK
    for role in ("root", "snapshot", "targets"):
        assert runner.content(role) == repository.read(f"1.{role}.json")
    assert runner.content("timestamp") == repository.read("timestamp.json")


def test_fields_that_nobody_knows_are_signed_for_like_others(runner, repository):
    signer = CryptoSigner.generate_ed25519()
    signer.public_key.unrecognized_fields["odd"] = {"a": 1, "b": [2]}
    repository.add_signer("root", signer)
    repository.root.unrecognized_fields["odd"] = "value"
    repository.root.roles["root"].unrecognized_fields["odd"] = "value"
    repository.publish_root()
    assert runner.refresh() == OK
    assert runner.versions()["root"] == 2


def test_the_hash_algorithms_that_a_key_once_named_mean_nothing(runner, repository):
    repository.root.revoke_key(repository.signers["snapshot"].pop().public_key.keyid, "snapshot")
    signer = CryptoSigner.generate_ed25519()
    signer.public_key.unrecognized_fields["keyid_hash_algorithms"] = "md5"
    repository.add_signer("snapshot", signer)
    repository.publish_root()
    repository.publish()
    assert runner.refresh() == OK
    assert (runner.versions()["root"], runner.versions()["snapshot"]) == (2, 2)


def test_a_timestamp_of_the_same_version_with_other_content_is_not_taken(runner, repository):
    assert runner.refresh() == OK
    kept = runner.content("timestamp")
    repository.timestamp.snapshot_meta = MetaFile(100)
    repository.write("timestamp.json", repository.sign(repository.timestamp, repository.signers["timestamp"]))
    runner.origin.requests.clear()
    assert runner.refresh() == OK
    assert runner.origin.paths()[-1] == "/metadata/timestamp.json"
    assert runner.content("timestamp") == kept


# --- versions --------------------------------------------------------------------------------------------


def test_a_newer_snapshot_that_no_timestamp_names_is_not_asked_for(runner, repository):
    repository.snapshot.version += 1
    content = repository.sign(repository.snapshot, repository.signers["snapshot"])
    repository.write("2.snapshot.json", content)
    assert runner.refresh() == OK
    assert runner.versions()["snapshot"] == 1
    repository.write("1.snapshot.json", content)  # nor is one that is here already
    runner.origin.requests.clear()
    assert runner.refresh() == OK
    assert runner.origin.paths() == ["/metadata/timestamp.json"]


@HASHES
def test_an_older_timestamp_is_refused(runner, repository, hashes):
    repository.names_hashes = hashes
    old = repository.read("timestamp.json")
    repository.bump_timestamp()
    assert runner.refresh() == OK
    repository.write("timestamp.json", old)
    assert runner.refresh() == REFUSED
    assert runner.origin.paths()[-1] == "/metadata/timestamp.json"
    assert runner.versions()["timestamp"] == 2


@HASHES
@pytest.mark.parametrize("role", ["snapshot", "targets"])
def test_an_older_version_under_a_new_timestamp_is_refused(runner, repository, role, hashes):
    repository.names_hashes = hashes
    repository.publish()
    assert runner.refresh() == OK
    getattr(repository, role).version -= 2
    repository.publish()
    assert runner.refresh() == REFUSED
    assert (runner.versions()["snapshot"], runner.versions()["targets"]) == (2, 2)


@pytest.mark.parametrize("role", ["root", "snapshot", "targets"])
def test_a_version_that_is_not_the_one_of_its_name_is_refused(runner, repository, role):
    assert runner.refresh() == OK
    repository.names_hashes = False  # or they would be what is found wrong
    repository.publish_root()
    repository.publish()
    signed = getattr(repository, role)
    signed.version += 1
    repository.write(f"2.{role}.json", repository.sign(signed, repository.signers[role]))
    assert runner.refresh() == REFUSED
    assert runner.versions()[role] == 1


# --- what is named, and not served -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "kept"), [("timestamp", (1, 1, 1)), ("2.snapshot", (2, 1, 1)), ("2.targets", (2, 2, 1))]
)
def test_what_is_named_and_not_there_ends_the_refresh_and_keeps_what_came_before(
    runner, repository, role, kept
):
    assert runner.refresh() == OK
    repository.publish()
    (repository.directory / "metadata" / f"{role}.json").unlink()
    assert runner.refresh() == REFUSED
    assert runner.origin.paths()[-1] == f"/metadata/{role}.json"
    found = runner.versions()
    assert (found["timestamp"], found["snapshot"], found["targets"]) == kept


def test_targets_that_are_not_those_of_the_hash_in_snapshot_are_refused(runner, repository):
    """Signed by the right key, of the right version and length, and not what snapshot names."""
    assert runner.refresh() == OK
    repository.targets.unrecognized_fields["odd"] = "a"
    repository.publish()
    repository.targets.unrecognized_fields["odd"] = "b"
    repository.write("2.targets.json", repository.sign(repository.targets, repository.signers["targets"]))
    assert runner.refresh() == REFUSED
    assert (runner.versions()["snapshot"], runner.versions()["targets"]) == (2, 1)


def test_metadata_without_hashes_are_taken_by_their_signatures(runner, repository):
    repository.names_hashes = False
    repository.publish()
    assert runner.refresh() == OK
    assert set(runner.versions().values()) == {1, 2}


def test_a_snapshot_in_the_place_of_the_timestamp_is_refused_though_its_key_signed(runner, repository):
    repository.add_signer("snapshot", repository.signers["timestamp"][0])
    repository.publish_root()
    repository.snapshot.meta = {"snapshot.json": MetaFile(1)}
    content = repository.sign(repository.snapshot, repository.signers["snapshot"])
    assert json.loads(content)["signed"]["_type"] == "snapshot"
    repository.write("timestamp.json", content)
    assert runner.refresh() == REFUSED
    assert runner.versions() == {"root": 2}


# --- keys and time ---------------------------------------------------------------------------------------


def test_a_root_that_runs_out_ends_what_was_good_before(runner, repository):
    repository.root.expires = repository.now + 7 * DAY
    repository.publish_root()
    assert runner.refresh() == OK
    assert runner.at(repository.now + 8 * DAY, runner.words("refresh")) == REFUSED
