"""The adapter for the public conformance suite: its command line, its requests, files and recovery."""

from __future__ import annotations

import json
import subprocess
from datetime import timedelta

import pytest
from tuf.api.metadata import TargetFile

from tests.conformance.runner import OK, PROGRAM, REFUSED

DAY = timedelta(days=1)


def test_the_program_speaks_the_suites_command_line(runner):
    for words in (runner.words("init"), runner.words("refresh")):
        subprocess.run([PROGRAM, *words], check=True)
    assert runner.versions() == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}
    names = ["--target-name", "no-file.txt", "--target-name", "file.txt"]
    rest = ["--target-dir", runner.files, "--target-base-url", f"{runner.origin.url}/targets/"]
    refused = subprocess.run(
        [PROGRAM, *runner.words("download", *names, *rest)], check=False, capture_output=True
    )
    assert (refused.returncode, runner.downloaded()) == (REFUSED, [])
    assert b"Traceback" not in refused.stderr


def test_a_first_refresh_asks_for_each_role_once(runner):
    assert runner.refresh() == OK
    names = ["2.root", "timestamp", "1.snapshot", "1.targets"]
    assert runner.origin.paths() == [f"/metadata/{name}.json" for name in names]


def test_an_idle_refresh_is_one_conditional_get(runner):
    assert runner.refresh() == OK
    runner.origin.requests.clear()
    assert runner.refresh() == OK
    assert [request.path for request in runner.origin.requests] == ["/metadata/timestamp.json"]
    assert "if-none-match" in runner.origin.requests[0].headers


def test_a_download_refreshes_first(runner, repository):
    assert runner.download("no-file.txt") == REFUSED
    assert runner.versions()["targets"] == 1
    assert runner.download("file.txt") == OK
    assert runner.downloaded() == [b"content"]


@pytest.mark.parametrize(
    "spoil", [lambda body: body["signed"].pop("version"), lambda body: body["signatures"].clear()]
)
def test_a_first_root_that_is_none_asks_the_server_nothing(runner, spoil):
    body = json.loads(runner.root.read_bytes())
    spoil(body)
    runner.root.write_text(json.dumps(body))
    runner.init()
    assert runner.refresh() == REFUSED
    assert runner.origin.requests == []


@pytest.mark.parametrize("role", ["timestamp", "1.snapshot", "1.targets"])
def test_what_is_not_signed_is_not_kept(runner, repository, role):
    repository.unsign(f"{role}.json")
    assert runner.refresh() == REFUSED
    assert role.rpartition(".")[2] not in runner.versions()


# --- rollback --------------------------------------------------------------------------------------------


def test_an_older_repository_is_refused_and_what_was_kept_stays(runner, repository):
    old = repository.tree()
    repository.publish()
    assert runner.refresh() == OK
    kept = runner.versions()
    repository.replay(old)
    assert runner.refresh() == REFUSED
    assert runner.versions() == kept


@pytest.mark.parametrize(
    "roles", [("timestamp",), ("snapshot", "timestamp"), ("targets", "snapshot", "timestamp")]
)
def test_versions_that_ran_forward_are_given_up_once_keys_were_changed(runner, repository, roles):
    named = {
        "timestamp": repository.timestamp,
        "snapshot": repository.snapshot,
        "targets": repository.targets,
    }
    for role in roles:
        named[role].version = 999
    repository.publish()
    assert runner.refresh() == OK
    assert runner.versions()[roles[0]] == 1000
    for role in {"snapshot", "timestamp"} & {*roles, "snapshot"}:
        repository.rotate(role)
    if roles == ("timestamp",):
        repository.rotate("timestamp")
    repository.publish_root()
    for role in roles:
        named[role].version = 1
    repository.timestamp.version = 1
    repository.publish()
    assert runner.refresh() == OK
    assert runner.versions()[roles[0]] == 2


# --- expiry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "kept"),
    [("timestamp", (1, 1, 1)), ("snapshot", (2, 1, 1)), ("targets", (2, 2, 1))],
)
def test_what_has_expired_is_not_kept(runner, repository, role, kept):
    assert runner.refresh() == OK
    getattr(repository, role).expires = repository.now - DAY
    repository.publish()
    assert runner.refresh() == REFUSED
    found = runner.versions()
    assert (found["timestamp"], found["snapshot"], found["targets"]) == kept


def test_an_expired_root_is_kept_and_nothing_follows_it(runner, repository):
    assert runner.refresh() == OK
    repository.root.expires = repository.now - DAY
    repository.publish_root()
    repository.publish()
    assert runner.refresh() == REFUSED
    assert (runner.versions()["root"], runner.versions()["timestamp"]) == (2, 1)


def test_under_another_time_what_has_expired_here_is_brought_up_to_date(runner, repository):
    assert runner.refresh() == OK
    later = repository.now + 18 * DAY
    assert runner.at(later, runner.words("refresh")) == REFUSED
    for signed in (repository.timestamp, repository.snapshot):
        signed.expires = later + DAY
    repository.publish()
    assert runner.at(later, runner.words("refresh")) == OK
    assert runner.versions()["timestamp"] == 2


# --- keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_threshold_is_met_by_so_many_keys_and_by_no_fewer(runner, repository, role):
    for _ in range(2):
        repository.add_signer(role)
    repository.root.roles[role].threshold = 3
    repository.publish_root()
    repository.publish()
    assert runner.refresh() == OK
    repository.signers[role].pop()
    repository.publish()
    assert runner.refresh() == REFUSED


def test_one_key_listed_many_times_counts_once(runner, repository):
    keyid = repository.signers["snapshot"][0].public_key.keyid
    repository.root.roles["snapshot"].keyids += [keyid] * 3
    repository.root.roles["snapshot"].threshold = 2
    repository.publish_root()
    repository.publish()
    assert runner.refresh() == REFUSED
    assert "snapshot" not in runner.versions()


@pytest.mark.parametrize(
    ("signed_by", "outcome"), [("both", OK), ("old", REFUSED), ("new", REFUSED)], ids=["both", "old", "new"]
)
def test_a_root_is_followed_when_old_and_new_keys_signed_it(runner, repository, signed_by, outcome):
    old = list(repository.signers["root"])
    repository.rotate("root")
    new = list(repository.signers["root"])
    repository.publish_root({"both": [*old, *new], "old": old, "new": new}[signed_by])
    assert runner.refresh() == outcome
    assert runner.versions()["root"] == (2 if outcome == OK else 1)


# --- files -----------------------------------------------------------------------------------------------


def test_a_file_in_a_directory_is_downloaded(runner, repository):
    repository.add_target("path/to/file.txt", b"deep")
    repository.publish()
    assert runner.download("path/to/file.txt", "file.txt") == OK
    assert runner.downloaded() == [b"content", b"deep"]


def test_a_file_that_was_exchanged_is_refused_and_leaves_what_was_there(runner, repository):
    repository.add_target("other.txt", b"other")
    repository.publish()
    assert runner.download("file.txt") == OK
    for name in ("file.txt", "other.txt"):
        digest = repository.targets.targets[name].hashes["sha256"]
        repository.target_file(name, digest).write_bytes(b"CONTENT")
        assert runner.download(name) == REFUSED
    assert runner.downloaded() == [b"content"]


def test_a_file_that_changes_again_and_again_is_always_the_one_that_is_signed(runner, repository):
    known = [b"content"]
    for number in range(4):
        content = b"content %d" % number
        repository.add_target("file.txt", content)
        repository.add_target(f"new-{number}.txt", b"new %d" % number)
        repository.publish()
        if number % 2 == 0:  # the client sees every other one
            assert runner.download("file.txt", f"new-{number}.txt") == OK
            known = [content, *known[1:], b"new %d" % number]
            digest = repository.targets.targets["file.txt"].hashes["sha256"]
            repository.target_file("file.txt", digest).write_bytes(b"CONTENT %d" % number)
            repository.publish()
            assert runner.download("file.txt") == REFUSED
        assert runner.downloaded() == sorted(known) or number == 1


@pytest.mark.parametrize("hashes", [["sha256"], ["sha512"], ["sha256", "sha512"]], ids="+".join)
def test_a_file_is_known_by_any_hash_of_the_specification(runner, repository, hashes):
    target = TargetFile.from_data("other.txt", b"other", hashes)
    for digest in target.hashes.values():
        repository.target_file("other.txt", digest).write_bytes(b"other")
    repository.targets.targets["other.txt"] = target
    repository.publish()
    assert runner.download("other.txt") == OK
    assert runner.downloaded() == [b"other"]
    repository.target_file("other.txt", target.hashes[hashes[0]]).write_bytes(b"OTHER")
    assert runner.download("other.txt") == REFUSED
    assert runner.downloaded() == [b"other"]


def test_a_file_whose_only_hash_nobody_knows_is_refused(runner, repository):
    target = TargetFile.from_data("other.txt", b"other", ["sha256"])
    target.hashes = {"unknown": target.hashes["sha256"]}
    repository.target_file("other.txt", target.hashes["unknown"]).write_bytes(b"other")
    repository.targets.targets["other.txt"] = target
    repository.publish()
    assert runner.download("other.txt") == REFUSED
    assert runner.downloaded() == []


def test_without_consistent_snapshots_names_have_no_versions(runner, repository):
    repository.root.consistent_snapshot = False
    repository.publish_root()
    for name in ("snapshot", "targets"):
        repository.write(f"{name}.json", repository.read(f"1.{name}.json"))
    (repository.directory / "targets" / "file.txt").write_bytes(b"content")
    assert runner.download("file.txt") == OK
    assert runner.downloaded() == [b"content"]
