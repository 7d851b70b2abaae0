"""The bytes of bundles and indexes: kept by sha256, uploaded in pieces, verified before they count."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import stat
from hashlib import sha256
from itertools import islice
from typing import IO, TYPE_CHECKING

from agent_core.errors import ConflictError, DiskError, MalformedError, TrustError, UsageError
from agent_core.wire import SHA256, Reason

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

PIECE = 1 << 18


class UploadConflictError(ConflictError):
    """The sender is at another place than the upload.

    Args:
        offset: where the upload is.
    """

    def __init__(self, what: str, *, offset: int, why: str = "") -> None:
        super().__init__(what, why=why, then="continue at the answer's Upload-Offset")
        self.offset = offset


class Blobs:
    """A directory store. A blob is there whole and verified, or it is not there.

    Args:
        directory: `blobs/`, with `ab/abcdef…` inside.
        uploads: `uploads/`, on the same file system, with what has not arrived whole.
    """

    def __init__(self, directory: Path, uploads: Path) -> None:
        self.directory = directory
        self.uploads = uploads

    def path(self, digest: str) -> Path:
        """Where the blob is, or would be.

        Raises:
            MalformedError: `digest` is no sha256.
        """
        if not SHA256.fullmatch(digest):
            raise MalformedError("that is no sha256", why="it is not 64 lower-case hex digits")
        return self.directory / digest[:2] / digest

    def length(self, digest: str) -> int | None:
        """Bytes of the blob, or None when it is not there."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            return None

    def upload_offset(self, digest: str) -> int | None:
        """Bytes that have arrived of an upload, or None when none was begun or it is whole."""
        try:
            return self._part(digest).stat().st_size
        except FileNotFoundError:
            return None

    def append(self, digest: str, offset: int, total: int, body: IO[bytes]) -> int:
        """Add the next piece of an upload; the last one makes it a blob.

        What arrived before the sender went away is kept, so that it can go on there.

        Args:
            digest: sha256 of the whole.
            offset: where this piece begins.
            total: bytes of the whole.
            body: read to its end.

        Returns:
            Bytes that are durable now; `total` when the blob is whole.

        Raises:
            UploadConflictError: the upload is elsewhere, or someone else is sending it now.
            UsageError: the piece is longer than the rest.
            TrustError: reason `digest-mismatch`; the bytes were dropped.
            DiskError: the disk is full or failing.
        """
        whole = self.length(digest)
        if whole is not None:
            if offset != whole:
                raise UploadConflictError("the blob is whole already", offset=whole)
            return whole
        try:
            return self._append(digest, offset, total, body)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
                raise DiskError("the server cannot store the upload", why=os.strerror(error.errno)) from error
            raise

    def _append(self, digest: str, offset: int, total: int, body: IO[bytes]) -> int:
        part = self._part(digest)
        self.uploads.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_locked(part) as file:
            arrived = file.seek(0, os.SEEK_END)
            if offset != arrived:
                raise UploadConflictError(
                    "the upload is elsewhere", offset=arrived, why=f"{arrived} bytes arrived, not {offset}"
                )
            try:
                for piece in pieces(body):
                    if arrived + len(piece) > total:
                        file.truncate(offset)
                        raise UsageError(
                            "the piece is longer than the rest of the upload", reason="malformed"
                        )
                    file.write(piece)
                    arrived += len(piece)
            finally:
                file.flush()
                os.fsync(file.fileno())
            if arrived == total:
                self._complete(digest, part, file)
            return arrived

    def _complete(self, digest: str, part: Path, file: IO[bytes]) -> None:
        file.seek(0)
        if digest_of(file) != digest:
            part.unlink()
            raise TrustError(
                "the upload is not what its name says",
                why="its sha256 differs; the bytes were dropped",
                then="push again",
                reason=Reason.DIGEST_MISMATCH,
            )
        place = self.path(digest)
        place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.chmod(0o444)
        part.rename(place)
        sync_directory(place.parent)
        sync_directory(self.directory)

    def drop_abandoned(self, before: float, most: int, after: str = "") -> tuple[int, str | None]:
        """Remove uploads of which nothing has arrived since `before` (seconds since 1970).

        Whoever sends one after all begins anew.

        Args:
            most: how many are tried, by name, beginning after `after`.

        Returns:
            How many went, and after which name to go on; None when there is none behind.
        """
        if not self.uploads.is_dir():
            return 0, None
        names = sorted(part.name for part in self.uploads.iterdir() if SHA256.fullmatch(part.name))
        old = (name for name in names if name > after and _changed(self.uploads / name) < before)
        tried = list(islice(old, most))
        dropped, refused = 0, []
        for name in tried:
            try:
                dropped += _drop(self.uploads / name, before)
            except OSError as error:  # one that cannot be opened keeps none of the others
                refused.append(f"{name}: {error.strerror}")
        if refused:
            said = {"count": len(refused), "first": refused[0]}
            log.warning("uploads that stopped cannot be removed", extra=said)
        return dropped, tried[-1] if len(tried) == most else None

    def link(self, digest: str, place: Path) -> None:
        """Make the blob appear at `place` too, whole or not at all; does nothing when it is there."""
        if place.exists():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        beside = place.with_name(f".{place.name}.{os.getpid()}")
        beside.unlink(missing_ok=True)
        try:
            os.link(self.path(digest), beside)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.EMLINK):
                raise
            shutil.copyfile(self.path(digest), beside)
            with beside.open("rb") as copied:
                os.fsync(copied.fileno())
        beside.rename(place)
        sync_directory(place.parent)

    def _part(self, digest: str) -> Path:
        return self.uploads / self.path(digest).name


def open_locked(path: Path) -> IO[bytes]:
    """Open for appending, alone.

    Raises:
        UploadConflictError: someone else has it open, or has just ended it.
    """
    file = path.open("a+b")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        arrived = file.seek(0, os.SEEK_END)
        file.close()
        raise UploadConflictError("someone else is sending this upload now", offset=arrived) from None
    if not _is_at(file, path):
        file.close()
        raise UploadConflictError("the upload was ended meanwhile", offset=0)
    return file


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one of that name: it may have gone while its lock was waited for."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _changed(path: Path) -> float:
    """When a file was last written to; what is gone, or no file (lost+found), was so just now."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return float("inf")
    return found.st_mtime if stat.S_ISREG(found.st_mode) else float("inf")


def _drop(part: Path, before: float) -> bool:
    try:
        with open_locked(part):
            if _changed(part) >= before:
                return False
            part.unlink()
    except UploadConflictError:
        return False
    return True


def pieces(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        yield piece


def digest_of(file: IO[bytes]) -> str:
    """The sha256 of what is left of an open file."""
    digest = sha256()
    for piece in pieces(file):
        digest.update(piece)
    return digest.hexdigest()


def write_file(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Put a whole file in place atomically and durably: a reader sees the old bytes or the new ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    beside.rename(path)
    sync_directory(path.parent)


def copy_file(source: Path, target: Path) -> None:
    """On the disk when this returns: what is said to be whole stays so when the power goes."""
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        shutil.copy2(source, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):  # it would name the source, which has room
            raise OSError(error.errno, error.strerror, str(target)) from error
        raise
    with target.open("rb") as copied:
        os.fsync(copied.fileno())


def sync_directory(directory: Path) -> None:
    """Make renames inside a directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
