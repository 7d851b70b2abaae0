"""The signer's log: one line of JSON for each decision, each with the hash of the line before.

A signature leaves only after its line is on the disk, so the log is also what the signer remembers. It is
cut into numbered segments; each begins with what is needed to read it without the ones before.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from agent_core.errors import ConflictError, TrustError
from release_server.blobs import sync_directory

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

FIRST = "0" * 64
"""What the first line of all names as the line before."""
SEGMENT = 16 * 2**20
"""Bytes after which a new segment begins."""


@dataclass
class Log:
    """The newest segment, open for appending; made by `open_log`.

    Attributes:
        head: hash of the newest line.
        newest: role → the newest entry that changed what is remembered of it.
    """

    directory: Path
    lock: int
    descriptor: int
    number: int
    head: str
    sequence: int
    length: int
    newest: dict[str, dict[str, Any]] = field(default_factory=dict)

    def append(self, entry: dict[str, Any]) -> None:
        """Write one entry; when this returns, it is on the disk.

        Raises:
            OSError: it is not; whatever was to follow from it must not happen.
        """
        if self.length >= SEGMENT:
            self._begin_segment()
        self._write(entry)

    def _write(self, entry: dict[str, Any]) -> None:
        line = _encode({"seq": self.sequence + 1, "prev": self.head} | entry)
        try:
            _write_whole(self.descriptor, line)
            os.fsync(self.descriptor)
        except OSError:
            # Half a line must not become the beginning of the next one.
            os.ftruncate(self.descriptor, self.length)
            raise
        self.head, self.sequence, self.length = _hash(line), self.sequence + 1, self.length + len(line)
        _remember(self.newest, entry)

    def _begin_segment(self) -> None:
        descriptor = _open_segment(_segment(self.directory, self.number + 1))
        os.close(self.descriptor)
        self.descriptor, self.number, self.length = descriptor, self.number + 1, 0
        self._write({"op": "opened", "newest": self.newest})

    def close(self) -> None:
        os.close(self.descriptor)
        os.close(self.lock)


def open_log(directory: Path) -> Log:
    """Open the log for this process alone, and check its newest segment.

    The end of a line that a kill cut off is taken away: nothing followed from it.

    Raises:
        ConflictError: another signer writes it.
        TrustError: `log-broken`; a line does not follow from the one before.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = _lock(directory)
    try:
        return _open(directory, lock)
    except BaseException:
        os.close(lock)
        raise


def _open(directory: Path, lock: int) -> Log:
    numbers = _numbers(directory)
    if len(numbers) > 1 and not _segment(directory, numbers[-1]).stat().st_size:
        _segment(directory, numbers.pop()).unlink()  # a kill came before its first line
    number = numbers[-1] if numbers else 1
    place = _segment(directory, number)
    body = place.read_bytes() if numbers else b""
    whole = _whole(body)
    entries = list(check(whole, place.name, FIRST if number == 1 else None))
    descriptor = _open_segment(place)
    if len(whole) < len(body):
        os.ftruncate(descriptor, len(whole))
        os.fsync(descriptor)
    log = Log(directory, lock, descriptor, number, FIRST, 0, len(whole))
    for entry in entries:
        _remember(log.newest, entry)
    if entries:
        log.head, log.sequence = _hash(whole.splitlines(keepends=True)[-1]), entries[-1]["seq"]
    return log


def check(body: bytes, name: str, previous: str | None) -> Iterator[dict[str, Any]]:
    """Read the entries of a segment, checking that each follows from the one before.

    Args:
        previous: hash of the line before the first; None believes what the first says.
    """
    sequence = None
    for number, line in enumerate(body.splitlines(keepends=True), 1):
        try:
            entry = json.loads(line)
            follows = previous in (None, entry["prev"]) and sequence in (None, entry["seq"] - 1)
        except (ValueError, KeyError, TypeError):
            follows = False
        if not follows:
            raise TrustError(
                "the signer's log is broken",
                why=f"line {number} of {name} does not follow from the one before",
                then="find out who changed it; then restore the signer's directory from a backup",
                reason="log-broken",
            )
        previous, sequence = _hash(line), entry["seq"]
        yield entry


def verify(directory: Path) -> int:
    """Check the whole log, every segment; the number of its entries.

    Raises:
        TrustError: `log-broken`.
    """
    count, previous = 0, FIRST
    for number in _numbers(directory):
        body = _whole(_segment(directory, number).read_bytes())
        count += sum(1 for _ in check(body, _segment(directory, number).name, previous))
        previous = _hash(body.splitlines(keepends=True)[-1]) if body else previous
    return count


def _numbers(directory: Path) -> list[int]:
    return sorted(int(place.stem) for place in directory.glob("[0-9]*.jsonl"))


def _segment(directory: Path, number: int) -> Path:
    return directory / f"{number:06}.jsonl"


def _whole(body: bytes) -> bytes:
    """Without the line at the end that a kill cut off."""
    return body[: body.rfind(b"\n") + 1]


def _open_segment(place: Path) -> int:
    descriptor = os.open(place, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    sync_directory(place.parent)
    return descriptor


def _lock(directory: Path) -> int:
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise ConflictError(
            f"another signer works with {directory.parent}",
            why="two memories of one key would sign one version twice",
            then="stop it first",
        ) from None
    return descriptor


def _encode(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"


def _hash(line: bytes) -> str:
    return sha256(line.removesuffix(b"\n")).hexdigest()


def _remember(newest: dict[str, dict[str, Any]], entry: dict[str, Any]) -> None:
    if entry.get("op") == "opened":
        newest.update(entry["newest"])
    elif entry.get("remember"):
        newest[entry["role"]] = entry


def _write_whole(descriptor: int, body: bytes) -> None:
    while body:
        body = body[os.write(descriptor, body) :]
