"""This module writes and reads a release file: one signed release and its metadata, to be carried by hand.

It is an uncompressed tar whose members have the names that a server publishes them under, so what reads a
server's answers reads this file too. Nothing in it is believed because it is in it: the metadata is verified
from the host's own root on, and the rest by the digests that it signs. The reader takes only what the writer
writes, byte for byte: regular files, of known names, each once, within limits, and nothing after the end.
"""

from __future__ import annotations

import json
import os
import re
import stat
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Self

from agent_core import disk
from agent_core.bundle import BLOCK, CHUNK, MAX_FILE, MAX_INDEX, File, fault_of_path, header
from agent_core.errors import DiskError, MalformedError, NotFoundError, TrustError
from agent_core.late import late_dataclass
from agent_core.wire import NAME, PLATFORM, SCHEMA, VERSION, Getter, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

TITLE = "release.json"
TARGETS = "metadata/targets.json"
MAX_TITLE = 64 * 1024
MAX_ROOT = 256 * 1024
MAX_TARGETS = 16 * 2**20
MAX_MEMBERS = 256
END = bytes(2 * BLOCK)

_BUNDLE = r"targets/bundles/[a-z0-9._-]+/[A-Za-z0-9.+_-]+/[0-9a-f]{64}\.[a-z0-9_.-]+"
_LIMITS = (
    (re.compile(re.escape(TITLE)), MAX_TITLE),
    (re.compile(r"metadata/[1-9][0-9]{0,8}\.root\.json"), MAX_ROOT),
    (re.compile(re.escape(TARGETS)), MAX_TARGETS),
    (re.compile(_BUNDLE + r"\.index\.json"), MAX_INDEX),
    (re.compile(_BUNDLE + r"\.tar\.zst"), MAX_FILE),
)
_OCTAL = re.compile(rb"[0-7]{11}\0")


@late_dataclass(frozen=True)
class Title:
    """What the file says it is; it only chooses among what is signed."""

    product: str
    version: str
    platforms: tuple[str, ...]

    def to_bytes(self) -> bytes:
        said = {"schema": SCHEMA, "product": self.product, "version": self.version}
        return (json.dumps({**said, "platforms": list(self.platforms)}, sort_keys=True) + "\n").encode()

    @classmethod
    def from_json(cls, body: object, path: str = TITLE) -> Self:
        get = Getter(body, path)
        get.integer("schema", low=1, high=SCHEMA)
        platforms = tuple(get.texts("platforms"))
        if not platforms or not all(PLATFORM.fullmatch(platform) for platform in platforms):
            raise get.refuse("platforms", "it names none, or one that is no platform")
        return cls(get.text("product", form=NAME), get.text("version", form=VERSION), platforms)


# --- writing --------------------------------------------------------------------------------------------


@late_dataclass(frozen=True)
class Member:
    """One member to be written: bytes, or a file whose digest is known."""

    name: str
    content: bytes | Path
    length: int
    sha256: str

    @classmethod
    def of(cls, name: str, content: bytes) -> Self:
        return cls(name, content, len(content), sha256(content).hexdigest())


def write(
    out: Path, title: Title, members: Sequence[Member], progress: Callable[[int, int], None] | None = None
) -> None:
    """Write a release file, whole or not at all; the same release always gives the same bytes.

    Raises:
        TrustError: `digest-mismatch`, a file is not what it should be.
        DiskError: it cannot be written.
    """
    planned = [Member.of(TITLE, title.to_bytes()), *members]
    total, done = sum(member.length for member in planned), 0
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("wb") as stream:
            for member in planned:
                stream.write(header(File(member.name, 0o644, member.length, "")))
                for piece in _pieces(member):
                    stream.write(piece)
                    done += len(piece)
                    if progress:
                        progress(done, total)
                stream.write(bytes(-member.length % BLOCK))
            stream.write(END)
            stream.flush()
            disk.fsync(stream.fileno())
        part.replace(out)
        disk.fsync_dir(out.parent)
    except OSError as error:
        why = error.strerror or str(error)
        raise DiskError(f"{out} cannot be written", why=why, then="name another place with -o") from error
    finally:
        part.unlink(missing_ok=True)


def _pieces(member: Member) -> Iterator[bytes]:
    if isinstance(member.content, bytes):
        yield member.content
        return
    digest, length = sha256(), 0
    with member.content.open("rb") as source:
        while piece := source.read(CHUNK):
            digest.update(piece)
            length += len(piece)
            yield piece
    if (length, digest.hexdigest()) != (member.length, member.sha256):
        raise TrustError(
            f"{member.content} is not what the release keys signed",
            why=f"its sha256 is not {member.sha256}",
            reason=Reason.DIGEST_MISMATCH,
        )


# --- reading --------------------------------------------------------------------------------------------


class ReleaseFile:
    """An open release file: its title, and its members by name. See `opened`."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._members = dict(_scan(descriptor))
        self.title = _title(self.read(TITLE, MAX_TITLE))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._members)

    def length(self, name: str) -> int | None:
        """Bytes of a member, None when there is no such."""
        found = self._members.get(name)
        return found[1] if found else None

    def read(self, name: str, most: int) -> bytes | None:
        """A member whole, None when there is no such.

        Raises:
            TrustError: `length-mismatch`, it is longer than `most`.
        """
        length = self.length(name)
        if length is None:
            return None
        if length > most:
            why = f"{name} has {length} bytes, {most} are the most"
            raise TrustError("the release file is refused", why=why, reason=Reason.LENGTH_MISMATCH)
        return b"".join(self.pieces(name))

    def pieces(self, name: str) -> Iterator[bytes]:
        """A member's bytes; who reads them checks their digest, the file may change meanwhile."""
        offset, left = self._members[name]
        while left:
            with _disk_errors(self._path):
                piece = disk.pread(self._descriptor, min(CHUNK, left), offset)
            if not piece:
                raise _refused("it became shorter while it was read")
            offset, left = offset + len(piece), left - len(piece)
            yield piece


@contextmanager
def opened(path: Path) -> Iterator[ReleaseFile]:
    """Open a release file and check its form; nothing in it has been verified then.

    Raises:
        NotFoundError: there is no such file.
        TrustError: `bad-archive`, it is not one that `release export` writes.
        DiskError: it cannot be read.
    """
    with _disk_errors(path):
        # Not blocking: opening a FIFO would wait for ever for a writer.
        descriptor = disk.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with _disk_errors(path):
            if not stat.S_ISREG(disk.fstat(descriptor).st_mode):
                raise _refused("it is no regular file")
            opened = ReleaseFile(path, descriptor)
        yield opened
    finally:
        disk.close(descriptor)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise NotFoundError(f"there is no {path}", then="release export VERSION -o FILE makes one") from None
    except OSError as error:
        raise DiskError(f"{path} cannot be read", why=error.strerror or str(error)) from error


def _scan(descriptor: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Each member's name, offset and length, or a refusal of the whole file."""
    size, offset, seen = disk.fstat(descriptor).st_size, 0, set[str]()
    while True:
        block = disk.pread(descriptor, BLOCK, offset)
        if not any(block):
            break
        name, length = _header(block)
        if name in seen or len(seen) >= MAX_MEMBERS:
            raise _refused(f"it holds {name} twice, or more than {MAX_MEMBERS} members")
        if not seen and name != TITLE:
            raise _refused(f"its first member is {name!r}, not {TITLE}")
        seen.add(name)
        begins, ends = offset + BLOCK, offset + BLOCK + length
        offset = ends + -length % BLOCK
        if offset + len(END) > size:
            raise _refused(f"it ends in the middle of {name}")
        if any(disk.pread(descriptor, offset - ends, ends)):
            raise _refused(f"{name} is followed by bytes that are not zero")
        yield name, (begins, length)
    if disk.pread(descriptor, len(END) + 1, offset) != END or size != offset + len(END):
        raise _refused("it does not end as it should, or has bytes after its end")


def _header(block: bytes) -> tuple[str, int]:
    """Name and length of the member that begins here; every header but the writer's own is refused."""
    name, prefix = (part.rstrip(b"\0").decode("ascii", "replace") for part in (block[:100], block[345:500]))
    path = f"{prefix}/{name}" if prefix else name
    limit = next((most for form, most in _LIMITS if form.fullmatch(path)), None)
    if limit is None or fault_of_path(path) or not _OCTAL.fullmatch(block[124:136]):
        raise _refused(f"it holds {path[:200]!r}, which no release file has")
    length = int(block[124:135], 8)
    if length > limit:
        raise _refused(f"{path} has {length} bytes, {limit} are the most")
    if header(File(path, 0o644, length, "")) != block:
        raise _refused(f"the header of {path} is not one that `release export` writes")
    return path, length


def _title(raw: bytes | None) -> Title:
    try:
        body: Any = json.loads(raw or b"null")
        return Title.from_json(body)
    except (MalformedError, ValueError, RecursionError) as error:
        raise _refused(f"{TITLE}: {error}") from error


def _refused(why: str) -> TrustError:
    return TrustError(
        "this is no release file",
        why=why,
        then="make it anew with `release export VERSION -o FILE`, and copy it again",
        reason=Reason.BAD_ARCHIVE,
    )
