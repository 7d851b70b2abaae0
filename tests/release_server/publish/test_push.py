"""Pushing: what is sent in which order, what a cut leaves, and what two at once do to each other."""

import contextlib
import json
import os
import pty
import subprocess
import sys
import threading
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from agent_core.bundle import host_platforms
from agent_core.errors import (
    ConflictError,
    MalformedError,
    NotAllowedError,
    RelfleetError,
    TrustError,
    UnreachableError,
    UsageError,
)
from release_server.publish import push as pushing
from release_server.publish import sign
from release_server.publish.commands.rollout import rollout
from release_server.publish.sign import Blob
from tests.release_origin import PASSPHRASE, PRODUCT, Answer

API = "/api/v1"
REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def push(origin, held, keys_dir, tmp_path, make_client, waits):
    """Pushes archives as one release manager; `who` keeps what each has seen apart."""

    def opened(trusted):
        return sign.release_signers(keys_dir, trusted.root.signed, lambda _prompt: PASSPHRASE)

    def run(*archives, who="ada", gates=(), notes="", **how):
        client = make_client(origin.url, sleep=waits.append, attempts=2)
        return pushing.push(
            client,
            [pushing.load(archive, gates=gates, notes=notes) for archive in archives],
            trust=held.root.to_bytes(),
            state=tmp_path / who,
            signers=lambda trusted: sign.release_signers(
                keys_dir, trusted.root.signed, lambda _prompt: PASSPHRASE
            ),
            **how,
        )

    return run


def listed(origin):
    return sorted(path for path in origin.targets.signed.targets if path.endswith(".tar.zst"))


def test_a_push_publishes_the_bundle_and_its_index(push, origin, make_bundle):
    archive = make_bundle("1.0.0")
    outcome = push(archive, notes="first", gates=("canary",))
    digest = sha256(archive.read_bytes()).hexdigest()
    assert (outcome.state, outcome.seq, outcome.targets_version) == ("published", 1, 2)
    assert outcome.bundles[0]["sha256"] == digest
    assert origin.blobs[digest] == archive.read_bytes()
    facts = sign.releases(origin.targets.signed, PRODUCT)[listed(origin)[0]]
    assert (facts.version, facts.seq, facts.notes, facts.gates) == ("1.0.0", 1, "first", ("canary",))
    assert (
        origin.blobs[facts.index_sha256]
        == archive.with_name(archive.name.replace(".tar.zst", ".index.json")).read_bytes()
    )
    assert origin.products == [PRODUCT]


def test_metadata_goes_last(push, origin, make_bundle):
    push(make_bundle())
    writes = [(seen.method, seen.path) for seen in origin.seen if seen.method in ("PATCH", "POST")]
    assert writes[-1] == ("POST", f"{API}/metadata/targets")
    assert [method for method, _ in writes] == ["POST", "PATCH", "PATCH", "POST"]


def test_the_next_version_has_the_next_seq(push, make_bundle):
    push(make_bundle("1.0.0"))
    outcome = push(make_bundle("1.1.0"))
    assert (outcome.seq, outcome.targets_version) == (2, 3)


def test_the_same_bytes_again_are_done_at_once(push, origin, make_bundle):
    archive = make_bundle()
    push(archive)
    before = len(origin.seen)
    outcome = push(archive)
    assert (outcome.state, outcome.uploaded, outcome.targets_version, outcome.seq) == ("already", 0, 2, 1)
    assert {seen.method for seen in origin.seen[before:]} == {"GET"}


def test_other_bytes_under_a_published_version_are_a_conflict(push, origin, make_bundle, tmp_path):
    push(make_bundle())
    before = origin.targets
    with pytest.raises(ConflictError) as caught:
        push(make_bundle(content=b"print('other')\n", into=tmp_path / "other"))
    assert caught.value.reason == "version-exists"
    assert origin.targets is before
    assert len(origin.blobs) == 2


def test_all_platforms_of_a_version_go_in_one_edition(push, origin, make_bundle):
    host, other = host_platforms()[0], "linux-riscv64"
    outcome = push(make_bundle(), make_bundle(platform=other))
    assert outcome.targets_version == 2
    assert listed(origin) == sorted(f"bundles/{PRODUCT}/1.0.0/{name}.tar.zst" for name in (host, other))
    assert {facts.seq for facts in sign.releases(origin.targets.signed, PRODUCT).values()} == {1}


def test_a_platform_that_comes_later_keeps_the_seq_of_its_version(push, make_bundle):
    push(make_bundle("1.0.0"))
    push(make_bundle("1.1.0"))
    archives = [make_bundle("1.0.0"), make_bundle("1.0.0", platform="linux-riscv64")]
    outcome = push(*archives)
    assert (outcome.state, outcome.seq) == ("published", 1)


def test_bundles_of_two_versions_or_twice_one_platform_are_a_usage_error(push, make_bundle, tmp_path):
    with pytest.raises(UsageError, match="one version"):
        push(make_bundle("1.0.0"), make_bundle("1.1.0"))
    with pytest.raises(UsageError, match="same platform"):
        push(make_bundle("1.0.0"), make_bundle("1.0.0"))


def test_a_dry_run_changes_nothing(push, origin, make_bundle):
    before = origin.targets
    outcome = push(make_bundle(), dry_run=True)
    assert (outcome.state, outcome.seq, outcome.targets_version) == ("dry-run", 1, 2)
    assert origin.targets is before
    assert {seen.method for seen in origin.seen} == {"GET"}


def test_a_bundle_that_is_not_what_its_index_says_is_never_sent(push, origin, make_bundle):
    archive = make_bundle()
    body = bytearray(archive.read_bytes())
    body[len(body) // 2] ^= 1
    archive.write_bytes(bytes(body))
    with pytest.raises(TrustError):
        push(archive)
    assert origin.seen == []


def test_without_a_release_key_nothing_is_uploaded(origin, held, client, make_bundle, tmp_path):
    def none_here(trusted):
        return sign.release_signers(tmp_path / "none", trusted.root.signed, lambda _prompt: "")

    with pytest.raises(NotAllowedError):
        pushing.push(
            client,
            [pushing.load(make_bundle())],
            trust=held.root.to_bytes(),
            state=tmp_path,
            signers=lambda trusted: sign.release_signers(
                tmp_path / "none", trusted.root.signed, lambda _p: ""
            ),
        )
    assert origin.calls("PATCH") == []


def test_metadata_of_a_lying_server_is_never_signed_over(push, origin, make_bundle):
    origin.files["1.targets.json"] = origin.files["1.targets.json"].replace(b"cohorts/*/*", b"bundles/*/*")
    origin.publish()
    with pytest.raises(TrustError):
        push(make_bundle())
    assert origin.calls("POST") == []


# --- uploads that are cut ---


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(pushing, "CHUNK", 1000)


@pytest.fixture
def blob(tmp_path):
    path = tmp_path / "blob"
    body = bytes(range(256)) * 40
    path.write_bytes(body)
    return Blob(path, sha256(body).hexdigest(), len(body))


def test_an_upload_goes_up_in_chunks_and_says_how_far_it_is(client, origin, held, blob, small_chunks):
    told = []
    sent = pushing.upload(client, blob, lambda name, done, total: told.append((done, total)))
    assert sent == blob.length
    assert [done for done, _ in told] == [*range(0, 10_001, 1000), 10_240]
    assert {total for _, total in told} == {blob.length}
    offsets = [int(seen.headers["Upload-Offset"]) for seen in origin.calls("PATCH")]
    assert offsets == list(range(0, 10_240, 1000))
    assert {seen.headers["Upload-Length"] for seen in origin.calls("PATCH")} == {"10240"}
    assert origin.blobs[blob.sha256] == blob.path.read_bytes()


@pytest.mark.parametrize("cut", [0, 1, 999])
def test_an_upload_that_is_cut_goes_on_where_the_server_stopped(
    client, origin, held, blob, small_chunks, cut
):
    origin.parts[blob.sha256] = blob.path.read_bytes()[:3000]
    origin.cut_after = cut
    pushing.upload(client, blob)
    assert origin.blobs[blob.sha256] == blob.path.read_bytes()
    offsets = [int(seen.headers["Upload-Offset"]) for seen in origin.calls("PATCH")]
    assert offsets[0] == 3000 + cut


def test_a_chunk_whose_answer_is_lost_is_not_sent_twice(client, origin, held, blob, small_chunks):
    origin.lose_answer_to = f"PATCH {API}/uploads/{blob.sha256}"
    pushing.upload(client, blob)
    assert origin.blobs[blob.sha256] == blob.path.read_bytes()
    assert len(origin.calls("PATCH")) == 11


def test_a_server_that_knows_another_offset_is_believed(client, origin, held, blob, small_chunks):
    origin.instead.append(Answer(200, b"", {"Upload-Offset": "5000"}, method="HEAD"))
    pushing.upload(client, blob)
    assert origin.blobs[blob.sha256] == blob.path.read_bytes()


def test_what_is_there_already_is_not_sent(client, origin, held, blob):
    origin.blobs[blob.sha256] = blob.path.read_bytes()
    told = []
    assert pushing.upload(client, blob, lambda *words: told.append(words)) == 0
    assert origin.calls("PATCH") == []
    assert told == []


def test_a_part_of_something_else_is_dropped_and_sent_anew(client, origin, held, blob, small_chunks):
    origin.parts[blob.sha256] = b"x" * 4000
    pushing.upload(client, blob)
    assert origin.blobs[blob.sha256] == blob.path.read_bytes()


def test_a_file_that_is_not_what_its_digest_says_is_refused(client, origin, held, blob):
    wrong = replace(blob, sha256="0" * 64)
    with pytest.raises(TrustError) as caught:
        pushing.upload(client, wrong)
    assert caught.value.reason == "digest-mismatch"
    assert len(origin.calls("PATCH")) == 2
    with pytest.raises(TrustError) as caught:
        pushing.upload(client, replace(blob, length=blob.length + 1, sha256="1" * 64))
    assert caught.value.reason == "length-mismatch"


def test_an_upload_that_does_not_get_on_ends(client, origin, held, blob):
    origin.instead.extend([Answer(409, b"{}", {"Upload-Offset": "0"}, method="PATCH")] * 50)
    with pytest.raises(UnreachableError) as caught:
        pushing.upload(client, blob)
    assert "again" in caught.value.then
    assert len(origin.calls("PATCH")) == pushing.STALLS + 1


@pytest.mark.parametrize("offset", ["", "many", "-1", "99999999"])
def test_an_offset_that_makes_no_sense_is_refused(client, origin, held, blob, offset):
    headers = {"Upload-Offset": offset} if offset else {}
    origin.instead.append(Answer(200, b"", headers, method="HEAD"))
    with pytest.raises(RelfleetError) as caught:
        pushing.upload(client, blob)
    assert caught.value.reason == "bad-answer"


def test_a_cut_push_is_finished_by_the_same_command(push, origin, make_bundle, small_chunks):
    archive = make_bundle(content=b"x = 1\n" * 5000)
    refused = Answer(507, b"{}", method="POST", path="/metadata/targets")
    origin.instead.append(refused)
    with pytest.raises(RelfleetError):
        push(archive)
    sent = len(origin.calls("PATCH"))
    outcome = push(archive)
    assert (outcome.state, outcome.uploaded) == ("published", 0)
    assert len(origin.calls("PATCH")) == sent


# --- others, and lost answers ---


def test_somebody_else_who_publishes_meanwhile_is_a_conflict_the_next_try_works(push, origin, make_bundle):
    mine, theirs = make_bundle("1.1.0"), make_bundle("1.0.0")
    origin.before_targets = lambda: push(theirs, who="bob")
    with pytest.raises(ConflictError) as caught:
        push(mine)
    assert caught.value.what == "someone else published meanwhile"
    assert "same command again" in caught.value.then
    outcome = push(mine)
    assert (outcome.state, outcome.seq, outcome.uploaded) == ("published", 2, 0)
    assert len(listed(origin)) == 2


def test_two_who_publish_the_same_bytes_at_once_are_both_done(push, origin, make_bundle):
    archive = make_bundle()
    origin.before_targets = lambda: push(archive, who="bob")
    assert push(archive).state == "published"
    assert origin.targets.signed.version == 2


def test_two_pushes_at_once_lose_nothing(push, origin, make_bundle):
    archives = {who: make_bundle(version) for who, version in (("ada", "1.0.0"), ("bob", "2.0.0"))}
    failures = []

    def go(who):
        for _ in range(3):
            try:
                push(archives[who], who=who)
                return
            except ConflictError:
                continue
        failures.append(who)

    threads = [threading.Thread(target=go, args=(who,)) for who in archives]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(listed(origin)) == 2
    assert {facts.seq for facts in sign.releases(origin.targets.signed, PRODUCT).values()} == {1, 2}


def test_a_push_whose_answer_was_lost_finds_out_that_it_went_through(push, origin, make_bundle):
    origin.lose_answer_to = f"POST {API}/metadata/targets"
    outcome = push(make_bundle())
    assert (outcome.state, outcome.targets_version) == ("published", 2)


def test_a_server_that_takes_but_does_not_publish_is_waited_for(push, origin, make_bundle, monkeypatch):
    monkeypatch.setattr(pushing, "SETTLE_S", 0.5)
    origin.publishing = False
    archive = make_bundle()
    assert push(archive, wait_s=0.1).state == "accepted"
    with pytest.raises(ConflictError, match="meanwhile"):
        push(make_bundle("1.1.0"), wait_s=0.1)
    origin.publish()
    assert push(archive, wait_s=0.1).state == "already"


def test_wait_makes_an_unpublished_release_an_error_that_may_be_tried_again(push, origin, make_bundle):
    origin.publishing = False
    with pytest.raises(UnreachableError) as caught:
        push(make_bundle(), wait_s=0.1, must_publish=True)
    assert caught.value.reason == "not-published"


def test_a_release_that_is_published_late_is_seen(push, origin, make_bundle):
    origin.publishing = False
    timer = threading.Timer(0.5, origin.publish)
    origin.before_targets = timer.start
    outcome = push(make_bundle(), wait_s=20, must_publish=True)
    timer.join()
    assert outcome.state == "published"


def test_malformed_metadata_is_the_servers_word(push, origin, make_bundle):
    body = json.dumps({"status": 400, "title": "no", "reason": "malformed"}).encode()
    origin.instead.append(Answer(400, body, method="POST", path="/metadata/targets"))
    with pytest.raises(MalformedError):
        push(make_bundle())


# --- rollouts ---


def test_a_rollout_starts_in_the_stages_that_rollout_start_would_take(client, origin, held):
    started = pushing.start_rollout(client, PRODUCT, "1.0.0", "eu-web", reason="now")
    assert started["name"] == "r-1"
    context = rollout.commands["start"].make_context("start", ["1.0.0", "--cohort", "eu-web"])
    said = context.params
    expected = [
        {
            **step.as_reach(),
            "soak_s": said["soak"],
            **said["max_failed"].as_limit(),
            "min_sample": said["min_sample"],
            "deadline_s": said["deadline"],
        }
        for step in said["steps"]
    ]
    assert origin.rollouts[0]["stages"] == expected


def test_a_rollout_that_is_under_way_is_not_started_twice(client, origin, held):
    first = pushing.start_rollout(client, PRODUCT, "1.0.0", "eu-web")
    assert pushing.start_rollout(client, PRODUCT, "1.0.0", "eu-web") == first
    origin.rollouts[0]["state"] = "aborted"
    assert pushing.start_rollout(client, PRODUCT, "1.0.0", "eu-web")["name"] == "r-2"


# --- what people see ---


@pytest.mark.parametrize(
    ("length", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (1_300_000, "1.3 MB"), (5 * 10**12, "5000.0 GB")],
)
def test_sizes_are_short(length, text):
    assert pushing.size(length) == text


def test_without_a_terminal_an_upload_is_one_line_a_file(capsys):
    with pushing.progress_bar() as progress:
        progress("a.tar.zst", 0, 2000)
        progress("a.tar.zst", 2000, 2000)
    assert capsys.readouterr().err == "uploaded a.tar.zst (2.0 kB)\n"


def test_on_a_terminal_an_upload_is_a_bar_that_goes_away():
    program = (
        "from release_server.publish.push import progress_bar\n"
        "with progress_bar() as progress:\n"
        "    for done in range(0, 2001, 1000): progress('a.tar.zst', done, 2000)\n"
    )
    leader, follower = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdin=follower,
        stdout=subprocess.PIPE,
        stderr=follower,
        env=environ,
    ) as process:
        os.close(follower)
        printed = b""
        with contextlib.suppress(OSError):
            while block := os.read(leader, 4096):
                printed += block
        assert process.stdout.read() == b""
        assert process.wait(timeout=20) == 0
    os.close(leader)
    assert b"a.tar.zst" in printed
    assert b"\x1b[" in printed
