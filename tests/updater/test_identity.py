from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agent_core import clock
from agent_core.errors import DiskError, MalformedError, NotAllowedError, NotFoundError
from agent_core.layout import Layout
from updater import identity as identities
from updater.identity import Identity

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def paths(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    made.state.mkdir()
    return made


ENROLLED = Identity(
    server="https://releases.example.org",
    product="warehouse-agent",
    agent_id="web-17",
    platform="linux-x86_64",
    cohort="eu-web",
    gate="canary",
    labels={"region": "eu"},
)


def test_an_identity_is_read_as_it_was_written(paths: Layout) -> None:
    identities.save(paths, ENROLLED)
    assert identities.load(paths) == ENROLLED
    assert paths.identity.stat().st_mode & 0o777 == 0o600


def test_an_identity_without_a_cohort_is_one_too(paths: Layout) -> None:
    alone = Identity("https://h", "p", "a", "any")
    identities.save(paths, alone)
    assert identities.load(paths) == alone


def test_a_host_that_is_not_enrolled_says_what_to_type(paths: Layout) -> None:
    with pytest.raises(NotFoundError) as caught:
        identities.load(paths)
    assert "agent enroll" in caught.value.then


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema": 1, "server": "x", "product": "../x"}'])
def test_a_damaged_identity_is_malformed(paths: Layout, content: str) -> None:
    paths.identity.write_text(content)
    with pytest.raises(MalformedError):
        identities.load(paths)


def test_a_key_is_made_once_private_and_signs(paths: Layout) -> None:
    public = identities.make_key(paths)
    assert paths.key.stat().st_mode & 0o777 == 0o600
    assert identities.make_key(paths) == public == identities.public_key(paths)
    signature = identities.sign(paths, b"text")
    Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, b"text")


def test_the_public_half_is_not_what_lies_on_the_disk(paths: Layout) -> None:
    assert identities.make_key(paths) not in paths.key.read_text()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o666])
def test_a_key_that_others_may_use_is_refused(paths: Layout, mode: int) -> None:
    identities.make_key(paths)
    paths.key.chmod(mode)
    with pytest.raises(NotAllowedError) as caught:
        identities.sign(paths, b"text")
    assert "chmod 600" in caught.value.then


def test_a_missing_key_and_a_link_in_its_place_are_refused(paths: Layout) -> None:
    with pytest.raises(NotFoundError):
        identities.sign(paths, b"text")
    elsewhere = paths.root / "key"
    elsewhere.write_text("00" * 32)
    elsewhere.chmod(0o600)
    paths.key.symlink_to(elsewhere)
    with pytest.raises(DiskError):
        identities.sign(paths, b"text")


@pytest.mark.parametrize("content", ["", "secret", "00" * 31, "zz" * 32])
def test_a_damaged_key_is_malformed_and_not_quoted(paths: Layout, content: str) -> None:
    paths.key.write_text(content)
    paths.key.chmod(0o600)
    with pytest.raises(MalformedError) as caught:
        identities.sign(paths, b"text")
    assert caught.value.__cause__ is None
    assert "secret" not in str(caught.value)


def test_the_counter_only_grows(paths: Layout) -> None:
    numbers = [identities.next_counter(paths) for _ in range(20)]
    assert numbers == sorted(set(numbers))


def test_the_counter_is_on_the_disk_before_it_is_used(paths: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (kept.append(int(os.pread(fd, 64, 0))), real(fd))[1])
    counter = identities.next_counter(paths)
    assert kept == [counter]


def test_a_clock_set_back_does_not_take_the_counter_back(paths: Layout) -> None:
    (paths.state / "counter").write_text(f"{2**40:020d}\n")
    assert identities.next_counter(paths) == 2**40 + 1


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 21, b"nonsense", b"00000000000000000007\n", b"9" * 20, b"-7"]
)
def test_a_counter_that_is_lost_or_old_goes_on_from_the_clock(paths: Layout, content: bytes) -> None:
    (paths.state / "counter").write_bytes(content)
    before = int(clock.now().timestamp())
    assert before <= identities.next_counter(paths) <= before + 60


def test_two_processes_never_draw_the_same_number(paths: Layout) -> None:
    drawn: list[int] = []
    threads = [
        threading.Thread(target=lambda: drawn.extend(identities.next_counter(paths) for _ in range(25)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(drawn)) == 100


def test_a_counter_that_cannot_be_kept_is_a_disk_error(paths: Layout) -> None:
    (paths.state / "counter").symlink_to("elsewhere")
    with pytest.raises(DiskError) as caught:
        identities.next_counter(paths)
    assert caught.value.reason == "disk"
