"""Resumable downloads of large targets into one part file, which is trusted only once its digest is right.

The part file's size is the number of bytes received: room is reserved without growing it. A prefix left by an
earlier attempt is hashed again before anything is added to it.
"""

from __future__ import annotations

import errno
import os
import re
import time
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Protocol

from agent_core import clock, disk
from agent_core.errors import DiskError, TrustError, UnreachableError
from agent_core.late import late_dataclass
from agent_core.wire import Reason

if TYPE_CHECKING:
    import hashlib
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from updater.transport import Origin, Stream

READ = 1024 * 1024
CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
STRONG_ETAG = re.compile(r'"[\x21\x23-\x7e]{1,256}"')
MIN_RATE_BPS = 1024.0
GRACE_S = 30.0


def no_ceiling() -> float | None:
    """As fast as it comes."""
    return None


class Progress(Protocol):
    """Told after every piece how many bytes are there, of how many."""

    def __call__(self, received: int, length: int, /) -> None: ...


@late_dataclass(frozen=True)
class _Wanted:
    """What is being fetched, where to, and how patiently."""

    path: str
    sha256: str
    length: int
    part: Path
    progress: Progress | None
    ceiling: Callable[[], float | None]
    min_rate_bps: float
    grace_s: float
    deadline_s: float | None

    @property
    def etag_file(self) -> Path:
        return self.part.with_name(self.part.name + ".etag")


def hashed_path(target_path: str, digest: str) -> str:
    """Where consistent snapshots publish a target: `/targets/DIRECTORY/DIGEST.NAME`."""
    directory, slash, name = target_path.rpartition("/")
    return f"/targets/{directory}{slash}{digest}.{name}"


def fetch(
    transport: Origin,
    path: str,
    sha256: str,
    length: int,
    into: Path,
    *,
    progress: Progress | None = None,
    ceiling: Callable[[], float | None] = no_ceiling,
    min_rate_bps: float = MIN_RATE_BPS,
    grace_s: float = GRACE_S,
    deadline_s: float | None = None,
) -> Path:
    """Download one target, going on where an earlier attempt ended.

    Args:
        transport: of the server that has it.
        path: as `hashed_path` says.
        sha256: signed digest, hex.
        length: signed length in bytes.
        into: the part file, `download/DIGEST.part`; its directory exists.
        progress: told how far it is.
        ceiling: bytes a second at most from now on; asked before the transfer and after each piece. It may
            end it with an error of its own; what arrived is kept.
        min_rate_bps: bytes a second, over the whole transfer, under which it is given up for now; never more
            than half of the ceiling.
        grace_s: seconds before `min_rate_bps` counts.
        deadline_s: seconds for this attempt.

    Returns:
        `into`, complete, verified and on the disk.

    Raises:
        UnreachableError: cut short, away, too slow; what arrived is kept for the next attempt.
        TrustError: `digest-mismatch`, `length-mismatch`, `bad-answer`; nothing is kept.
        DiskError: `no-room`, or `disk`.
    """
    wanted = _Wanted(path, sha256, length, into, progress, ceiling, min_rate_bps, grace_s, deadline_s)
    with _disk_errors(into):
        resumed = _run(transport, wanted)
        if resumed is None:
            return into
        if resumed:
            # The prefix may be another attempt's, of another file, or torn by a power cut: the server is
            # accused only over bytes that all came from it just now. Once, so this cannot loop.
            _clear(wanted)
            if _run(transport, wanted) is None:
                return into
        _clear(wanted)
    raise TrustError(
        f"{path} is not what the release managers signed",
        why=f"its sha256 is not {sha256}",
        then="the server, or something between, changed it: it is not tried again unchanged",
        reason=Reason.DIGEST_MISMATCH,
    )


def fetch_small(transport: Origin, path: str, sha256: str, length: int) -> bytes:
    """Download a small target into memory, e.g. a bundle's index. Errors as of `fetch`."""
    answer = transport.get(path, max_length=length)
    if answer.status != 200:
        raise _absent(path, answer.status)
    if len(answer.body) != length:
        raise _wrong_length(path, len(answer.body), length)
    if _digest(answer.body) != sha256:
        raise TrustError(
            f"{path} is not what the release managers signed",
            why=f"its sha256 is not {sha256}",
            reason=Reason.DIGEST_MISMATCH,
        )
    return answer.body


def _run(transport: Origin, wanted: _Wanted) -> bool | None:
    """One attempt: None when the file is right, else whether the wrong bytes include an older prefix."""
    fd = disk.open(wanted.part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        digest, had = _rehash(fd, wanted.length)
        resumed = had > 0
        if had < wanted.length:
            wanted.ceiling()
            disk.reserve(fd, wanted.length)
            digest, resumed = _transfer(transport, wanted, fd, digest, had)
        if digest.hexdigest() != wanted.sha256:
            return resumed
        disk.fsync(fd)
    finally:
        disk.close(fd)
    disk.remove(wanted.etag_file)
    disk.fsync_dir(wanted.part.parent)
    return None


def _transfer(
    transport: Origin, wanted: _Wanted, fd: int, digest: hashlib._Hash, had: int
) -> tuple[hashlib._Hash, bool]:
    """Fetch what is missing; the digest of all bytes, and whether the old prefix is among them."""
    headers = {}
    if had:
        headers["Range"] = f"bytes={had}-"
        if etag := _read_etag(wanted):
            headers["If-Range"] = etag
    with transport.open(wanted.path, headers, deadline_s=wanted.deadline_s) as stream:
        if stream.status == 206:
            _check_range(wanted, stream, had)
        elif stream.status == 200:
            _check_whole(wanted, stream)
            if had:
                disk.ftruncate(fd, 0)
            digest, had = _new_digest(), 0
        else:
            # A part that the server does not know how to complete would block every later attempt.
            _clear(wanted)
            raise _absent(wanted.path, stream.status)
        _keep_etag(wanted, stream.headers.get("etag", ""))
        _receive(wanted, stream, fd, digest, had)
    return digest, had > 0


def _receive(wanted: _Wanted, stream: Stream, fd: int, digest: hashlib._Hash, had: int) -> None:
    pace, total = _Pace(wanted), had
    for piece in stream.chunks:
        if total + len(piece) > wanted.length:
            _clear(wanted)
            raise _wrong_length(wanted.path, total + len(piece), wanted.length)
        _write(fd, piece, total)
        digest.update(piece)
        total += len(piece)
        if wanted.progress:
            wanted.progress(total, wanted.length)
        if total < wanted.length:
            pace.keep(total - had)
    if total < wanted.length:
        raise _unfinished(wanted, f"it ended after {total} of {wanted.length} bytes")


class _Pace:
    """How fast a transfer may be and must be; its ceiling may change under way.

    What was not used of a ceiling is gone after a second: another host may have had it.
    """

    def __init__(self, wanted: _Wanted) -> None:
        self._wanted = wanted
        self._began = self._seen = clock.boot_s()
        self._may = self._must = 0.0
        self._rate = wanted.ceiling()

    def keep(self, received: int) -> None:
        """Wait when faster than the ceiling, give up when slower than the floor."""
        wanted, now = self._wanted, clock.boot_s()
        self._count(received, now - self._seen)
        self._seen, elapsed = now, now - self._began
        if wanted.deadline_s is not None and elapsed > wanted.deadline_s:
            raise _unfinished(wanted, f"it was not complete within {wanted.deadline_s:g} s")
        if elapsed > wanted.grace_s and received < self._must:
            raise _unfinished(wanted, f"{received} bytes in {elapsed:.0f} s is too slow")
        self._rate = wanted.ceiling()
        if self._rate and (ahead := received - self._may) > 0:
            time.sleep(ahead / self._rate)

    def _count(self, received: int, passed: float) -> None:
        floor, rate = self._wanted.min_rate_bps, self._rate
        self._must += passed * (floor if rate is None else min(floor, rate / 2))
        if rate is not None:
            self._may = min(self._may + passed * rate, received + rate)


def _check_range(wanted: _Wanted, stream: Stream, had: int) -> None:
    said = stream.headers.get("content-range", "")
    match = CONTENT_RANGE.fullmatch(said.strip())
    wrong = match is None or tuple(map(int, match.groups())) != (had, wanted.length - 1, wanted.length)
    if wrong or stream.length not in (None, wanted.length - had):
        _clear(wanted)
        raise TrustError(
            f"the answer to {wanted.path} is refused",
            why=f"asked for bytes {had}-{wanted.length - 1}/{wanted.length}, it sent {said[:80]!r}",
            reason=Reason.BAD_ANSWER,
        )


def _check_whole(wanted: _Wanted, stream: Stream) -> None:
    if stream.length not in (None, wanted.length):
        _clear(wanted)
        raise _wrong_length(wanted.path, stream.length or 0, wanted.length)


def _rehash(fd: int, length: int) -> tuple[hashlib._Hash, int]:
    """Hash what is there; more than `length` cannot be a prefix and is dropped."""
    if disk.fstat(fd).st_size > length:
        disk.ftruncate(fd, 0)
    digest, had = _new_digest(), 0
    while piece := disk.pread(fd, READ, had):
        digest.update(piece)
        had += len(piece)
    return digest, had


def _write(fd: int, piece: bytes, offset: int) -> None:
    view = memoryview(piece)
    while view:
        written = disk.pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def _read_etag(wanted: _Wanted) -> str:
    try:
        etag = disk.read_file(wanted.etag_file).decode("ascii")
    except (OSError, ValueError):
        return ""
    return etag if STRONG_ETAG.fullmatch(etag) else ""


def _keep_etag(wanted: _Wanted, etag: str) -> None:
    """Only strong ones: a weak one does not promise equal bytes. Losing it costs a rehash, no more."""
    disk.remove(wanted.etag_file)
    if STRONG_ETAG.fullmatch(etag):
        handle = disk.open(wanted.etag_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            disk.write_all(handle, etag.encode("ascii"))
        finally:
            disk.close(handle)


def _clear(wanted: _Wanted) -> None:
    disk.remove(wanted.part)
    disk.remove(wanted.etag_file)


@contextmanager
def _disk_errors(part: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        no_room = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if no_room:
            # Give the reserved room back; a half that keeps the disk full helps nobody.
            with suppress(OSError):
                disk.remove(part)
        raise DiskError(
            f"{part} cannot be written",
            why=error.strerror or str(error),
            then="free some room" if no_room else "check the disk and its permissions",
            reason=Reason.NO_ROOM if no_room else Reason.DISK,
        ) from error


def _new_digest() -> hashlib._Hash:
    return sha256()


def _digest(content: bytes) -> str:
    return sha256(content).hexdigest()


def _absent(path: str, status: int) -> UnreachableError:
    return UnreachableError(
        f"the server does not give out {path}",
        why=f"it answered {status}",
        then="it may still be publishing; the next poll tries again",
        reason=Reason.OFFLINE,
    )


def _unfinished(wanted: _Wanted, why: str) -> UnreachableError:
    return UnreachableError(f"the download of {wanted.path} was not finished", why=why, reason=Reason.OFFLINE)


def _wrong_length(path: str, got: int, length: int) -> TrustError:
    return TrustError(
        f"{path} is not what the release managers signed",
        why=f"it has {got} bytes or more instead of {length}",
        reason=Reason.LENGTH_MISMATCH,
    )
