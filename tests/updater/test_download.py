from __future__ import annotations

import errno
import os
import random
import time
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent_core import disk
from agent_core.errors import DiskError, TrustError, UnreachableError
from tests.http_origin import (
    Chunked,
    ContentRange,
    Endless,
    Gzip,
    Origin,
    Raw,
    Slow,
    Status,
    Truncated,
    Whole,
    WithoutEtag,
)
from tests.updater.stepped import Stepped
from updater.download import fetch, fetch_small, hashed_path
from updater.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT = random.Random(1).randbytes(300_000)
OTHER = random.Random(2).randbytes(300_000)
DIGEST = sha256(CONTENT).hexdigest()
PATH = hashed_path("bundles/warehouse-agent/1.0.0/any.tar.zst", DIGEST)


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    file = tmp_path / "www" / PATH.lstrip("/")
    file.parent.mkdir(parents=True)
    file.write_bytes(CONTENT)
    with Origin(tmp_path / "www") as origin:
        yield origin


@pytest.fixture
def transport(origin: Origin) -> Transport:
    return Transport(origin.url, proxies={}, timeout_s=2.0)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return tmp_path / f"{DIGEST}.part"


def get(transport: Transport, part: Path, **options) -> Path:
    return fetch(transport, PATH, DIGEST, len(CONTENT), part, **options)


def leftovers(part: Path) -> list[str]:
    return sorted(file.name for file in part.parent.iterdir() if file.name.startswith(DIGEST))


def interrupted(origin: Origin, transport: Transport, part: Path, after: int = 100_000) -> None:
    """Leave a part file as a connection that broke leaves it."""
    origin.misbehave("any.tar.zst", Truncated(after), times=1)
    with pytest.raises(UnreachableError):
        get(transport, part)
    assert part.read_bytes() == CONTENT[:after]


def test_consistent_snapshots_put_the_digest_before_the_name() -> None:
    assert hashed_path("policy/x.json", "ab") == "/targets/policy/ab.x.json"
    assert hashed_path("x.json", "ab") == "/targets/ab.x.json"


def test_a_download_arrives_whole_and_alone(transport: Transport, part: Path) -> None:
    told = []
    done = get(transport, part, progress=lambda received, length: told.append((received, length)))
    assert done.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    assert [received for received, _ in told] == sorted(received for received, _ in told)
    assert leftovers(part) == [part.name]


def test_a_complete_file_is_hashed_again_and_not_fetched_again(
    origin: Origin, transport: Transport, part: Path
) -> None:
    get(transport, part)
    get(transport, part)
    assert len(origin.requests) == 1


def test_an_empty_target_is_complete_at_once(transport: Transport, tmp_path: Path) -> None:
    empty = sha256(b"").hexdigest()
    assert fetch(transport, "/targets/none", empty, 0, tmp_path / "e.part").read_bytes() == b""


def test_a_broken_download_goes_on_where_it_ended(origin: Origin, transport: Transport, part: Path) -> None:
    interrupted(origin, transport, part)
    get(transport, part)
    assert part.read_bytes() == CONTENT
    asked = origin.requests[-1].headers
    assert asked["range"] == "bytes=100000-"
    assert asked["if-range"] == f'"{DIGEST[:16]}"'


def test_a_server_without_etags_is_resumed_without_a_condition(
    origin: Origin, transport: Transport, part: Path
) -> None:
    part.write_bytes(CONTENT[:100_000])
    origin.misbehave("any.tar.zst", WithoutEtag())
    get(transport, part)
    assert part.read_bytes() == CONTENT
    assert "if-range" not in origin.requests[0].headers
    assert len(origin.requests) == 1


def test_a_server_that_ignores_ranges_starts_over(origin: Origin, transport: Transport, part: Path) -> None:
    interrupted(origin, transport, part)
    origin.misbehave("any.tar.zst", Whole())
    get(transport, part)
    assert part.read_bytes() == CONTENT
    assert len(origin.requests) == 2


def test_a_chunked_answer_is_counted_too(origin: Origin, transport: Transport, part: Path) -> None:
    origin.misbehave("any.tar.zst", Chunked())
    get(transport, part)
    assert part.read_bytes() == CONTENT


def test_a_file_changed_in_the_middle_of_a_resume_is_refused_and_not_kept(
    origin: Origin, transport: Transport, part: Path
) -> None:
    interrupted(origin, transport, part)
    (origin.directory / PATH.lstrip("/")).write_bytes(OTHER)
    with pytest.raises(TrustError) as caught:
        get(transport, part)
    assert caught.value.reason == "digest-mismatch"
    assert leftovers(part) == []
    assert len(origin.requests) == 2  # If-Range made it a whole one at once: nothing is fetched twice


def test_a_prefix_of_another_file_is_dropped_once_and_fetched_whole(
    origin: Origin, transport: Transport, part: Path
) -> None:
    part.write_bytes(OTHER[:50_000])
    get(transport, part)
    assert part.read_bytes() == CONTENT
    assert ["range" in request.headers for request in origin.requests] == [True, False]


def test_wrong_bytes_of_full_length_left_behind_are_dropped(transport: Transport, part: Path) -> None:
    part.write_bytes(OTHER)
    assert get(transport, part).read_bytes() == CONTENT


def test_a_part_longer_than_the_target_is_dropped(transport: Transport, part: Path) -> None:
    part.write_bytes(CONTENT + b"more")
    assert get(transport, part).read_bytes() == CONTENT


def test_wrong_bytes_are_refused_deleted_and_asked_for_once(
    origin: Origin, transport: Transport, part: Path
) -> None:
    (origin.directory / PATH.lstrip("/")).write_bytes(OTHER)
    with pytest.raises(TrustError) as caught:
        get(transport, part)
    assert caught.value.reason == "digest-mismatch"
    assert leftovers(part) == []
    assert len(origin.requests) == 1


@pytest.mark.parametrize("length", [len(CONTENT) + 1, len(CONTENT) - 1])
@pytest.mark.parametrize("chunked", [False, True], ids=["announced", "chunked"])
def test_another_length_is_refused(
    origin: Origin, transport: Transport, part: Path, length: int, chunked: bool
) -> None:
    (origin.directory / PATH.lstrip("/")).write_bytes((CONTENT + b"x")[:length])
    if chunked:
        origin.misbehave("any.tar.zst", Chunked())
    with pytest.raises((TrustError, UnreachableError)) as caught:
        get(transport, part)
    # A chunked body that ends early cannot be told from one that was cut: it is resumed, and then refused.
    shorter_and_unsaid = chunked and length < len(CONTENT)
    assert caught.value.reason == ("offline" if shorter_and_unsaid else "length-mismatch")


@pytest.mark.parametrize(
    "said",
    [
        "bytes 0-299999/300000",
        "bytes 100001-299999/300000",
        "bytes 100000-299998/300000",
        "bytes 100000-299999/300001",
        "bytes 100000-299999/*",
        "bytes */300000",
        "",
        "100000-299999",
    ],
)
def test_a_wrong_content_range_is_refused_and_the_part_blocks_nothing(
    origin: Origin, transport: Transport, part: Path, said: str
) -> None:
    interrupted(origin, transport, part)
    origin.misbehave("any.tar.zst", ContentRange(said), times=1)
    with pytest.raises(TrustError) as caught:
        get(transport, part)
    assert caught.value.reason == "bad-answer"
    assert leftovers(part) == []
    assert get(transport, part).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [404, 410, 416, 403])
def test_a_server_that_cannot_complete_a_part_clears_it(
    origin: Origin, transport: Transport, part: Path, status: int
) -> None:
    interrupted(origin, transport, part)
    origin.misbehave("any.tar.zst", Status(status), times=1)
    with pytest.raises(UnreachableError) as caught:
        get(transport, part)
    assert caught.value.reason == "offline"
    assert leftovers(part) == []
    assert get(transport, part).read_bytes() == CONTENT


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_overloaded_server_keeps_the_part_and_its_word(
    origin: Origin, transport: Transport, part: Path, status: int
) -> None:
    interrupted(origin, transport, part)
    origin.misbehave("any.tar.zst", Status(status, {"Retry-After": "9"}), times=1)
    with pytest.raises(UnreachableError) as caught:
        get(transport, part)
    assert (caught.value.reason, caught.value.retry_after_s) == ("overloaded", 9.0)
    assert part.read_bytes() == CONTENT[:100_000]


def test_a_redirect_is_refused_and_keeps_the_part(origin: Origin, transport: Transport, part: Path) -> None:
    interrupted(origin, transport, part)
    origin.misbehave("any.tar.zst", Status(302, {"Location": "/elsewhere"}), times=1)
    with pytest.raises(TrustError) as caught:
        get(transport, part)
    assert caught.value.reason == "bad-answer"


SMALL, FOREIGN = CONTENT[:3000], OTHER[:3000]
SMALL_DIGEST = sha256(SMALL).hexdigest()
SMALL_PATH = hashed_path("bundles/small.tar.zst", SMALL_DIGEST)
FAULTS = st.one_of(
    st.builds(Truncated, st.integers(0, 3000)),
    st.builds(
        Status, st.sampled_from([206, 302, 304, 404, 416, 429, 500]), st.just({}), st.binary(max_size=9)
    ),
    st.builds(
        ContentRange, st.sampled_from(["", "bytes 0-2999/3000", "bytes 1-2999/3000", "bytes */3000", "x"])
    ),
    st.builds(Raw, st.binary(max_size=40).map(lambda more: b"HTTP/1.1 200 OK\r\n\r\n" + more)),
    st.sampled_from([Whole(), WithoutEtag(), Chunked(), Gzip(), Endless(), None]),
)
LEFT_BEHIND = st.one_of(
    st.integers(0, 3000).map(lambda length: SMALL[:length]),
    st.integers(0, 3100).map(lambda length: (FOREIGN + SMALL)[:length]),
    st.binary(max_size=50),
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(faults=st.lists(FAULTS, max_size=4), before=LEFT_BEHIND, foreign=st.booleans())
def test_whatever_a_server_answers_a_download_is_right_or_refused_and_blocks_no_later_one(
    origin: Origin, transport: Transport, tmp_path: Path, faults: list, before: bytes, foreign: bool
) -> None:
    served = origin.directory / SMALL_PATH.lstrip("/")
    part = tmp_path / "small.part"
    part.write_bytes(before)
    served.write_bytes(FOREIGN if foreign else SMALL)
    for fault in faults:
        origin.behave()
        if fault is not None:
            origin.misbehave("small.tar.zst", fault)
        try:
            fetch(transport, SMALL_PATH, SMALL_DIGEST, len(SMALL), part)
        except (TrustError, UnreachableError):
            assert not part.exists() or part.stat().st_size <= max(len(SMALL), len(before))
        else:
            assert part.read_bytes() == SMALL
    origin.behave()
    served.write_bytes(SMALL)
    fetch(transport, SMALL_PATH, SMALL_DIGEST, len(SMALL), part)
    assert part.read_bytes() == SMALL
    assert not part.with_name("small.part.etag").exists()


def test_a_slow_drip_is_given_up_and_kept(origin: Origin, transport: Transport, part: Path) -> None:
    origin.misbehave("any.tar.zst", Slow(piece=10, pause_s=0.02))
    began = time.monotonic()
    with pytest.raises(UnreachableError) as caught:
        get(transport, part, min_rate_bps=100_000, grace_s=0.3, deadline_s=5)
    assert time.monotonic() - began < 2
    assert "too slow" in caught.value.why
    kept = part.read_bytes()
    assert kept
    assert CONTENT.startswith(kept)


def test_a_download_keeps_to_its_deadline(origin: Origin, transport: Transport, part: Path) -> None:
    origin.misbehave("any.tar.zst", Slow(piece=1000, pause_s=0.02))
    with pytest.raises(UnreachableError):
        get(transport, part, deadline_s=0.3)
    assert part.stat().st_size > 0


def test_the_bandwidth_ceiling_holds(transport: Transport, part: Path) -> None:
    began = time.monotonic()
    get(transport, part, ceiling=lambda: 500_000, min_rate_bps=10_000_000, grace_s=0)
    # The floor never lies above the ceiling, and the last piece is not waited for.
    assert 0.35 < time.monotonic() - began < 3


PIECE = 64 * 1024


def test_a_ceiling_that_changes_under_way_holds_from_then_on(
    transport: Transport, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stepped, seen = Stepped(monkeypatch), []

    def ceiling() -> float:
        return 50_000 if stepped.now_s < 1_003 else 10_000

    def progress(received: int, _: int) -> None:
        seen.append((stepped.now_s - 1_000, received))

    # As slow as that is no drip: the floor goes down with the ceiling.
    get(transport, part, ceiling=ceiling, progress=progress, min_rate_bps=40_000, grace_s=0)
    for at, received in seen:
        assert received <= 50_000 * min(at, 4) + 10_000 * max(0, at - 4) + 2 * PIECE
    assert seen[-1][1] == len(CONTENT)
    assert 10 < seen[-1][0] < 20


def test_what_a_stalled_download_did_not_use_it_does_not_take_later(
    transport: Transport, part: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host may have had it: the ceiling is a part of a line that many share."""
    stepped, seen = Stepped(monkeypatch), []

    def progress(received: int, _: int) -> None:
        if not seen:
            stepped.step(3_600)
        seen.append((stepped.now_s, received))

    get(transport, part, ceiling=lambda: 10_000, progress=progress, min_rate_bps=0)
    took, received = seen[-1][0] - seen[0][0], seen[-1][1] - seen[0][1]
    assert took >= (received - 2 * PIECE) / 10_000 - 1


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOSPC, "no-room"), (errno.EDQUOT, "no-room"), (errno.EIO, "disk")]
)
def test_a_disk_that_refuses_is_a_disk_error(
    transport: Transport, part: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str
) -> None:
    def refuse(fd: int, piece: bytes, offset: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", refuse)
    with pytest.raises(DiskError) as caught:
        get(transport, part)
    assert caught.value.reason == reason
    monkeypatch.undo()
    assert get(transport, part).read_bytes() == CONTENT


def test_room_that_cannot_be_reserved_is_no_room_before_a_byte_is_fetched(
    origin: Origin, transport: Transport, part: Path
) -> None:
    with pytest.raises(DiskError) as caught:
        fetch(transport, PATH, DIGEST, 2**62, part)
    assert caught.value.reason == "no-room"
    assert origin.requests == []
    assert leftovers(part) == []


def test_room_is_reserved_while_the_size_still_says_what_has_arrived(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        disk.reserve(fd, 1_000_000)
        taken = os.fstat(fd)
    finally:
        os.close(fd)
    assert taken.st_size == 0
    assert taken.st_blocks * 512 in (0, *range(1_000_000, 2_000_000))  # 0 where the file system cannot


def test_a_link_in_place_of_the_part_is_not_followed(
    transport: Transport, part: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    part.symlink_to(precious)
    with pytest.raises(DiskError):
        get(transport, part)
    assert precious.read_bytes() == b"precious"


def test_a_small_target_is_checked_in_memory(origin: Origin, transport: Transport) -> None:
    assert fetch_small(transport, PATH, DIGEST, len(CONTENT)) == CONTENT
    with pytest.raises(UnreachableError) as absent:
        fetch_small(transport, "/targets/none", DIGEST, 5)
    assert absent.value.reason == "offline"
    with pytest.raises(TrustError) as longer:
        fetch_small(transport, PATH, DIGEST, len(CONTENT) - 1)
    assert longer.value.reason == "bad-answer"
    with pytest.raises(TrustError) as shorter:
        fetch_small(transport, PATH, DIGEST, len(CONTENT) + 1)
    assert shorter.value.reason == "length-mismatch"
    (origin.directory / PATH.lstrip("/")).write_bytes(OTHER)
    with pytest.raises(TrustError) as changed:
        fetch_small(transport, PATH, DIGEST, len(CONTENT))
    assert changed.value.reason == "digest-mismatch"
