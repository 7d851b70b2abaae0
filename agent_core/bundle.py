"""This module packs a tree into a bundle and takes a bundle apart again, believing only the signed index.

The index (path, mode, size and sha256 of every file) is what the release keys sign, by digest. The archive
is not trusted: the reader knows from the index which 512 header bytes must come next, and anything else (a
link, a device, a long-name or sparse header, a second copy, one byte too many) differs from them and is
refused. So there is no parser to trick, and nothing is ever written that the index does not name.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
import sys
import sysconfig
import unicodedata
from contextlib import suppress
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol, Self

from agent_core import disk
from agent_core.errors import DiskError, MalformedError, TrustError, UsageError
from agent_core.hooks import NO_HOOKS, Hooks, parse_hooks
from agent_core.late import late_dataclass
from agent_core.wire import NAME, PLATFORM, SCHEMA, SHA256, VERSION, Getter, Reason

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

INDEX_NAME = ".bundle.json"
"""Where a version directory keeps its index; a directory under `versions/` without it is not complete."""

HEALTH_KINDS = frozenset({"exec", "http", "tcp", "process", "memory", "cpu"})
MODES = {"0644": 0o644, "0755": 0o755}

MAX_INDEX = 16 * 2**20
MAX_FILES = 50_000
MAX_PATH = 255
MAX_DEPTH = 32
MAX_FILE = 8 * 2**30 - 1
MAX_UNPACKED = 16 * 2**30
MAX_CHECKS = 32

BLOCK = 512
CHUNK = 256 * 1024
LEVEL = 9
"""Measured on a bundle of 23 MB: 12 takes twice the time for 1 % less, 19 fifteen times for 10 %."""
WINDOW_LOG = 23  # the reader never holds more than 8 MiB, whatever a frame asks for


def _refused(what: str, why: str = "", *, reason: Reason = Reason.BAD_ARCHIVE) -> TrustError:
    return TrustError(what, why=why, reason=reason)


# --- the index --------------------------------------------------------------------------------------------


@late_dataclass(frozen=True)
class File:
    """One regular file of a bundle: a relative path with slashes, 0o644 or 0o755, and bytes."""

    path: str
    mode: int
    size: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"path": self.path, "mode": f"{self.mode:04o}", "size": self.size, "sha256": self.sha256}

    @classmethod
    def from_json(cls, entry: object, path: str) -> Self:
        get = Getter(entry, path)
        mode = get.text("mode")
        if mode not in MODES:
            raise get.refuse("mode", f"{mode[:80]!r} is not 0644 or 0755")
        return cls(
            path=get.text("path"),
            mode=MODES[mode],
            size=get.integer("size", high=MAX_FILE),
            sha256=get.text("sha256", form=SHA256),
        )


@late_dataclass(frozen=True)
class Index:
    """What a bundle holds and how it is run and judged; its bytes, by digest, are what the release keys sign.

    Attributes:
        platform: one of `host_platforms()` of the hosts it runs on.
        entry: argv of the workload; the program first, relative to the version, or `{python}`.
        observe_s: seconds without a fault before a trial is committed.
        boots: how often the launcher may start the version while it is on trial.
        deadman_s: seconds without a passed check after which a trial is killed from outside.
        health: the checks, `{kind, …}`; `agent_core.health` gives each its meaning.
        hooks: what runs before and after the version is activated.
        files: every file, sorted by path.
    """

    product: str
    version: str
    platform: str
    entry: tuple[str, ...]
    files: tuple[File, ...]
    health: tuple[dict[str, Any], ...] = ()
    hooks: Hooks = NO_HOOKS
    observe_s: float = 60
    boots: int = 3
    deadman_s: int = 120
    min_launcher: int = 1

    @property
    def unpacked(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    @property
    def directories(self) -> tuple[str, ...]:
        """Every directory the files need, parents before children."""
        return tuple(sorted({parent for file in self.files for parent in _with_parents(file.path)[1:]}))

    def room(self, block: int) -> int:
        """Bytes the unpacked bundle takes on a file system that hands out blocks of `block` bytes."""
        whole = sum(-(-file.size // block) * block for file in self.files)
        return whole + (len(self.directories) + 2) * block

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "product": self.product,
            "version": self.version,
            "platform": self.platform,
            "entry": list(self.entry),
            "observe_s": float(self.observe_s),
            "boots": self.boots,
            "deadman_s": self.deadman_s,
            "min_launcher": self.min_launcher,
            "health": list(self.health),
            "hooks": self.hooks.to_json(),
            "files": [file.to_json() for file in self.files],
        }

    def to_bytes(self) -> bytes:
        """The canonical form: the same index always has the same bytes, so its digest can be signed."""
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return text.encode() + b"\n"

    @classmethod
    def from_json(cls, document: object, path: str = "index") -> Self:
        get = Getter(document, path)
        get.integer("schema", low=1, high=SCHEMA)
        entry = get.texts("entry", most=256)
        if not entry or not entry[0]:
            raise get.refuse("entry", "it names no program")
        health = get.items("health", most=MAX_CHECKS)
        for place, check in enumerate(health):
            checked = Getter(check, f"{path}.health[{place}]")
            if checked.text("kind") not in HEALTH_KINDS:
                raise checked.refuse("kind", f"it is not one of {', '.join(sorted(HEALTH_KINDS))}")
        listed = get.items("files", most=MAX_FILES)
        files = tuple(File.from_json(file, f"{path}.files[{place}]") for place, file in enumerate(listed))
        if why := fault_of_files(files):
            raise get.refuse("files", why)
        return cls(
            product=get.text("product", form=NAME),
            version=get.text("version", form=VERSION),
            platform=get.text("platform", form=PLATFORM),
            entry=entry,
            files=files,
            health=tuple(health),
            hooks=parse_hooks(get.object("hooks", {}), f"{path}.hooks"),
            observe_s=get.number("observe_s", high=30 * 86_400),
            boots=get.integer("boots", low=1, high=100),
            deadman_s=get.integer("deadman_s", low=1, high=86_400),
            min_launcher=get.integer("min_launcher", 1),
        )

    @classmethod
    def from_bytes(cls, raw: bytes) -> Self:
        """Read the bytes of an index, whose digest the caller has compared with the signed one.

        The same bytes give the same object while it is remembered: one update reads two indexes, of what is
        here and of what is to come, six times.

        Raises:
            TrustError: `bad-index`, with the path of the key that does not fit.
        """
        return cls._read(raw)

    @classmethod
    @lru_cache(maxsize=2)
    def _read(cls, raw: bytes) -> Self:
        if len(raw) > MAX_INDEX:
            raise _refused("the index is too long", f"over {MAX_INDEX} bytes", reason=Reason.BAD_INDEX)
        try:
            return cls.from_json(json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant))
        except MalformedError as error:
            raise _refused("the index cannot be used", str(error), reason=Reason.BAD_INDEX) from error
        except (ValueError, RecursionError) as error:
            raise _refused("the index is not JSON", str(error), reason=Reason.BAD_INDEX) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object names a key twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def fault_of_path(path: str) -> str:
    """Why a bundle cannot hold a file at `path`, in words; empty when it can."""
    parts = path.split("/")
    if path.startswith("/"):
        return "it is absolute"
    if any(part in ("", ".", "..") for part in parts):
        return "it has an empty, `.` or `..` part"
    if "\\" in path or not path.isprintable():
        return "it has a backslash or a character that does not print"
    if unicodedata.normalize("NFC", path) != path:
        return "it is not in Unicode's composed form (NFC)"
    if len(parts) > MAX_DEPTH:
        return f"it is more than {MAX_DEPTH} directories deep"
    if _split(path) is None:
        return f"it is longer than {MAX_PATH} bytes, or its last name than 100"
    if parts[0].casefold() == INDEX_NAME:
        return "that place is the index's own"
    return ""


def fault_of_files(files: tuple[File, ...]) -> str:
    """Why these files cannot stand in one tree, in words; empty when they can."""
    if sum(file.size for file in files) > MAX_UNPACKED:
        return f"they are more than {MAX_UNPACKED} bytes together"
    seen: dict[str, str] = {}
    last = ""
    for file in files:
        if why := fault_of_path(file.path):
            return f"{file.path[:300]!r}: {why}"
        if file.path <= last:
            return f"{file.path!r} is listed twice or out of order"
        last = file.path
        for name in _with_parents(file.path):
            if seen.setdefault(name.casefold(), name) != name:
                return f"{name!r} and {seen[name.casefold()]!r} are equal but for case"
    paths = {file.path for file in files}
    for file in files:
        for parent in _with_parents(file.path)[1:]:
            if parent in paths:
                return f"{file.path!r} would be inside the file {parent!r}"
    return ""


def _with_parents(path: str) -> list[str]:
    """The path and every directory above it, longest first."""
    found = [path]
    while (end := path.rfind("/")) >= 0:
        path = path[:end]
        found.append(path)
    return found


def host_platforms() -> list[str]:
    """What runs on this host, best first: its Python's ABI, any Python the bundle brings, anything."""
    libc = "musllinux" if "musl" in (sysconfig.get_config_var("SOABI") or "") else "linux"
    system = libc if sys.platform == "linux" else re.sub(r"[^a-z0-9]", "", sys.platform.lower())
    machine = f"{system}-{os.uname().machine.lower()}"
    major, minor = sys.version_info[:2]
    return [f"{machine}-cp{major}{minor}{sys.abiflags}", machine, "any"]


# --- the archive: ustar headers and one zstd frame -------------------------------------------------------


def _split(path: str) -> tuple[bytes, bytes] | None:
    """The prefix and name fields of a ustar header, or None when the path does not fit into them."""
    raw = path.encode("utf-8", "surrogateescape")
    if len(raw) > MAX_PATH:
        return None
    if len(raw) <= 100:
        return b"", raw
    slash = raw.find(b"/", len(raw) - 101)
    if not 0 < slash <= 155 or slash == len(raw) - 1:
        return None
    return raw[:slash], raw[slash + 1 :]


def header(file: File) -> bytes:
    """The only 512 bytes that may stand before this file in an archive."""
    split = _split(file.path)
    assert split is not None, "an index is checked before it is used"
    prefix, name = split
    fields = b"".join(
        [
            name.ljust(100, b"\0"),
            b"%07o\0" % file.mode,
            b"%07o\0" % 0,
            b"%07o\0" % 0,
            b"%011o\0" % file.size,
            b"%011o\0" % 0,
            b" " * 8,
            b"0",
            bytes(100),
            b"ustar\x0000",
            bytes(64),
            b"%07o\0" % 0,
            b"%07o\0" % 0,
            prefix.ljust(155, b"\0"),
            bytes(12),
        ]
    )
    return fields[:148] + b"%06o\0 " % sum(fields) + fields[156:]


_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a directory",
    b"6": "a FIFO",
    b"S": "a GNU sparse file",
    b"L": "a GNU long name",
    b"K": "a GNU long link",
    b"x": "a pax header",
    b"g": "a global pax header",
}


def _describe(found: bytes) -> str:
    """What a header that was not expected seems to be; for people only, nothing is decided by it."""
    if not any(found):
        return "the archive ends here"
    total = sum(found[:148]) + 8 * 32 + sum(found[156:])
    if found[148:156] != b"%06o\0 " % total:
        return "its header's checksum is wrong"
    kind = found[156:157]
    name = found[:100].rstrip(b"\0").decode("utf-8", "replace")
    prefix = found[345:500].rstrip(b"\0").decode("utf-8", "replace")
    path = f"{prefix}/{name}" if prefix else name
    return f"it holds {_KINDS.get(kind, 'a member')} {path!r}, or another size, mode or owner for it"


def pack(tree: Path, out: Path) -> tuple[File, ...]:
    """Write every file under `tree` into the archive `out`; the same tree always gives the same bytes.

    Args:
        tree: holds regular files and directories only; empty directories are not carried.
        out: replaced as a whole when the archive is complete.

    Returns:
        The files, as the index lists them.

    Raises:
        UsageError: a link, a device or a path that a bundle cannot hold.
    """
    plan = sorted(_files_under(tree))
    if len(plan) > MAX_FILES:
        raise UsageError(f"{tree} holds {len(plan)} files", why=f"a bundle holds at most {MAX_FILES}")
    parameter = zstd.CompressionParameter
    press = zstd.ZstdCompressor(
        options={
            parameter.compression_level: LEVEL,
            parameter.window_log: WINDOW_LOG,
            parameter.checksum_flag: 1,
            parameter.nb_workers: 0,
        }
    )
    part = out.with_name(out.name + ".part")
    try:
        with part.open("wb") as archive:
            packed = tuple(_pack_file(tree, path, archive, press) for path in plan)
            archive.write(press.compress(bytes(2 * BLOCK)))
            archive.write(press.flush(press.FLUSH_FRAME))
        if why := fault_of_files(packed):
            raise UsageError(f"{tree} cannot be packed", why=why)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return packed


def _files_under(tree: Path, inside: str = "") -> Iterator[str]:
    with os.scandir(tree / inside) as entries:
        for entry in entries:
            path = f"{inside}{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                yield from _files_under(tree, f"{path}/")
            elif not entry.is_file(follow_symlinks=False):
                why = "a bundle holds regular files and directories only"
                raise UsageError(f"{path} cannot be packed", why=why, then="put a copy in its place")
            elif why := fault_of_path(path):
                raise UsageError(f"{path!r} cannot be packed", why=why)
            else:
                yield path


def _pack_file(tree: Path, path: str, archive: BinaryIO, press: zstd.ZstdCompressor) -> File:
    digest = sha256()
    with (tree / path).open("rb") as source:
        status = os.fstat(source.fileno())
        mode = 0o755 if status.st_mode & stat.S_IXUSR else 0o644
        if status.st_size > MAX_FILE:
            raise UsageError(f"{path} cannot be packed", why=f"it has more than {MAX_FILE} bytes")
        archive.write(press.compress(header(File(path, mode, status.st_size, ""))))
        left = status.st_size
        while left and (chunk := source.read(min(CHUNK, left))):
            left -= len(chunk)
            digest.update(chunk)
            archive.write(press.compress(chunk))
        if left or source.read(1):
            raise UsageError(f"{path} cannot be packed", why="it changed while it was read")
    archive.write(press.compress(bytes(-status.st_size % BLOCK)))
    return File(path, mode, status.st_size, digest.hexdigest())


class _Stream:
    """Gives out at most what is asked of one zstd frame, and hashes the archive as it goes by."""

    def __init__(self, raw: int) -> None:
        self._raw = raw
        self._zstd = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: WINDOW_LOG})
        self.digest = sha256()

    def _next(self, most: int) -> bytes:
        chunk = b""
        if self._zstd.needs_input:
            chunk = disk.read(self._raw, CHUNK)
            self.digest.update(chunk)
            if not chunk:
                raise _refused("the archive ends too early")
        try:
            return self._zstd.decompress(chunk, max_length=most)
        except zstd.ZstdError as error:
            raise _refused("the archive cannot be decompressed", str(error)) from error

    def some(self, most: int) -> bytes:
        """Between one and `most` bytes."""
        while not self._zstd.eof:
            if found := self._next(most):
                return found
        raise _refused("the archive ends too early")

    def exactly(self, length: int) -> bytes:
        found = b""
        while len(found) < length:
            found += self.some(length - len(found))
        return found

    def end(self) -> None:
        """Refuse whatever comes after the last member: more tar, another frame, any byte."""
        while not self._zstd.eof:
            if self._next(1):
                raise _refused("the archive holds more than the index lists")
        if self._zstd.unused_data or disk.read(self._raw, 1):
            raise _refused("the archive has bytes after its end")


class Sink(Protocol):
    """Where the reader puts files, in the index's order; content is not yet verified when it comes."""

    def begin(self, file: File) -> None: ...
    def write(self, chunk: bytes) -> None: ...
    def end(self) -> None: ...


def _read(archive: Path, index: Index, sink: Sink) -> str:
    """Drive the archive by the index into `sink`; returns the archive's sha256."""
    raw = disk.open(archive, os.O_RDONLY)
    try:
        stream = _Stream(raw)
        for file in index.files:
            found = stream.exactly(BLOCK)
            if found != header(file):
                raise _refused(f"{file.path!r} is not the archive's next member", _describe(found))
            sink.begin(file)
            digest, left = sha256(), file.size
            while left:
                chunk = stream.some(min(CHUNK, left))
                left -= len(chunk)
                digest.update(chunk)
                sink.write(chunk)
            if digest.hexdigest() != file.sha256:
                why = "its content is not what the index lists"
                raise _refused(f"{file.path!r} was refused", why, reason=Reason.DIGEST_MISMATCH)
            sink.end()
            if any(stream.exactly(-file.size % BLOCK)):
                raise _refused(f"{file.path!r} is followed by bytes that are not zero")
        if any(stream.exactly(2 * BLOCK)):
            raise _refused("the archive holds more than the index lists")
        stream.end()
        return stream.digest.hexdigest()
    finally:
        disk.close(raw)


class _Nowhere:
    def begin(self, file: File) -> None:
        """Nothing is kept."""

    def write(self, chunk: bytes) -> None:
        """Nothing is kept."""

    def end(self) -> None:
        """Nothing is kept."""


class _Tree:
    """Writes files below one directory, each step relative to a directory handle that it made itself."""

    _MAKE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW

    def __init__(self, root: int) -> None:
        self._open: list[tuple[str, int]] = [("", root)]
        self._file = -1
        self._mode = 0

    def begin(self, file: File) -> None:
        *parents, name = file.path.split("/")
        while [part for part, _ in self._open[1:]] != parents[: len(self._open) - 1]:
            disk.close(self._open.pop()[1])
        for part in parents[len(self._open) - 1 :]:
            above = self._open[-1][1]
            disk.mkdir(part, 0o700, dir_fd=above)
            self._open.append((part, disk.open_dir(part, dir_fd=above)))
        self._file = disk.open(name, self._MAKE, 0o600, dir_fd=self._open[-1][1])
        self._mode = file.mode & 0o555

    def write(self, chunk: bytes) -> None:
        disk.write_all(self._file, chunk)

    def end(self) -> None:
        disk.fchmod(self._file, self._mode)
        done, self._file = self._file, -1
        disk.close(done)

    def close(self) -> None:
        """Let go of every handle except the root's, which its owner closes."""
        handles = [handle for _, handle in self._open[1:]] + ([self._file] if self._file >= 0 else [])
        for handle in handles:
            with suppress(OSError):
                disk.close(handle)


def _settle(root: int, index: Index) -> None:
    """Make the tree durable and read-only; the root itself stays writable for whoever renames it."""
    disk.syncfs(root)
    for file in index.files:
        handle = disk.open(file.path, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=root)
        try:
            disk.fsync(handle)
        finally:
            disk.close(handle)
    for directory in reversed(index.directories):
        handle = disk.open_dir(directory, dir_fd=root)
        try:
            disk.fchmod(handle, 0o555)
            disk.fsync(handle)
        finally:
            disk.close(handle)
    disk.fsync(root)


def unpack(archive: Path, index: Index, into: Path) -> str:
    """Write exactly what the index lists into a new directory, and return only when it is on the disk.

    Files end 0444 or 0555 and directories 0555 whatever the umask; `into` itself stays 0755, because a
    directory that its owner may not write cannot be renamed. On an error `into` is left half full, for the
    caller to throw away.

    Args:
        archive: not trusted at all.
        index: trusted; its digest was compared with the signed one.
        into: must not exist; its parent must.

    Returns:
        The sha256 of the archive's bytes, as they were read.

    Raises:
        TrustError: `bad-archive`, or `digest-mismatch` for the content of a file.
        DiskError: `no-room`, or `disk` for any other failure of the file system.
    """
    return write_tree(into, index, lambda sink: _read(archive, index, sink), archive.name)


def write_tree(into: Path, index: Index, fill: Callable[[Sink], str], what: str) -> str:
    """Make a new directory of what `fill` brings, verified, and return only when it is on the disk.

    Args:
        into, index: as of `unpack`.
        fill: brings exactly what the index lists.
        what: is being unpacked, for people.

    Returns:
        What `fill` returns.
    """
    try:
        disk.mkdir(into, 0o755)
        root = disk.open_dir(into)
        try:
            disk.fchmod(root, 0o755)
            tree = _Tree(root)
            try:
                digest = fill(tree)
            finally:
                tree.close()
            _settle(root, index)
        finally:
            disk.close(root)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = Reason.NO_ROOM if full else Reason.DISK
        raise DiskError(f"{what} could not be unpacked", why=str(error), reason=reason) from error
    return digest


def verify(archive: Path, index: Index) -> str:
    """Read the whole archive as `unpack` does, but write nothing.

    Returns:
        The sha256 of the archive's bytes.

    Raises:
        TrustError: as `unpack`.
    """
    return _read(archive, index, _Nowhere())
