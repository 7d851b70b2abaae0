"""This module makes of an installed bundle's files those of another, by a delta that says only what differs.

A delta names nothing. Both signed indexes say what comes next: for each file of the new index, in its order,
nothing at all where the old bundle has the same content anywhere, else one byte and one zstd frame. The byte
says whether the frame needs the old file of the same path as its prefix. So there is no path, no length and
no count to lie about, and what is written is held to the new index, byte for byte, like an unpacked archive.
"""

from __future__ import annotations

import os
import sys
from hashlib import sha256
from typing import TYPE_CHECKING, BinaryIO

from agent_core import disk
from agent_core.bundle import CHUNK, LEVEL, WINDOW_LOG, Sink, write_tree
from agent_core.errors import TrustError
from agent_core.wire import Reason

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent_core.bundle import File, Index

WHOLE, PREFIX = b"\0", b"\1"
MOST_PREFIX = 32 * 2**20
"""Bytes of an old file and a new one together: a device holds both in memory, and not much more."""
WORTH = 0.9
"""Of a whole frame's length: what spares less is not worth reading the old file for."""
LEAST_PREFIX = 8  # zstd takes none that is shorter
LEAST_WINDOW_LOG = 10  # zstd knows none that is smaller


def _refused(why: str, reason: Reason = Reason.BAD_ARCHIVE) -> TrustError:
    return TrustError("the delta is refused", why=why, reason=reason)


def _prefix_of(file: File, old: dict[str, File]) -> File | None:
    """The old file that may serve as prefix of this one, by rules that both ends go by."""
    before = old.get(file.path)
    fits = before is not None and before.size >= LEAST_PREFIX and before.size + file.size <= MOST_PREFIX
    return before if fits else None


# --- making -----------------------------------------------------------------------------------------------


def make(base: Path, old: Index, tree: Path, new: Index, out: Path) -> int:
    """Write what turns the files below `base` into those below `tree`; the same files give the same bytes.

    Args:
        base, tree: hold what `old` and `new` list.
        out: is written over.

    Returns:
        The delta's length.
    """
    there, by_path = {file.sha256 for file in old.files}, {file.path: file for file in old.files}
    with out.open("wb") as delta:
        for file in new.files:
            if file.sha256 not in there:
                before = _prefix_of(file, by_path)
                _pack(tree / file.path, (base / file.path).read_bytes() if before else None, delta)
        return delta.tell()


def _options(window_log: int) -> dict[int, int]:
    parameter = zstd.CompressionParameter
    return {
        parameter.compression_level: LEVEL,
        parameter.window_log: window_log,
        # Without it, matches in a prefix of more than a few MB are not found: 8 MB instead of 1 kB, measured.
        parameter.enable_long_distance_matching: 1,
        parameter.nb_workers: 0,
    }


def _pack(source: Path, prefix: bytes | None, delta: BinaryIO) -> None:
    """Write one file whole, or by its prefix when that is clearly shorter."""
    start = delta.tell()
    press = zstd.ZstdCompressor(options=_options(WINDOW_LOG))
    press.set_pledged_input_size(source.stat().st_size)
    with source.open("rb") as content:
        delta.write(WHOLE)
        while chunk := content.read(CHUNK):
            delta.write(press.compress(chunk))
    delta.write(press.flush(press.FLUSH_FRAME))
    if prefix is None:
        return
    whole = source.read_bytes()
    frame = zstd.compress(
        whole,
        options=_options(max(LEAST_WINDOW_LOG, (len(prefix) + len(whole)).bit_length())),
        zstd_dict=zstd.ZstdDict(prefix, is_raw=True).as_prefix,
    )
    if len(frame) < WORTH * (delta.tell() - start):
        delta.seek(start)
        delta.write(PREFIX + frame)
        delta.truncate()


# --- applying ---------------------------------------------------------------------------------------------


def apply(delta: Path, base: Path, old: Index, new: Index, into: Path) -> str:
    """Write exactly what `new` lists into a new directory, as `bundle.unpack` does, from a delta.

    Args:
        delta: not trusted at all.
        base: a version directory, which may be damaged: what is read of it is hashed.
        old, new: trusted; their digests were compared with signed ones.
        into: as of `bundle.unpack`.

    Returns:
        The sha256 of the delta's bytes, as they were read.

    Raises:
        TrustError: `bad-archive`, or `digest-mismatch` for the content of a file, old or new.
        DiskError: `no-room`, or `disk` for any other failure of the file system.
    """
    return write_tree(into, new, lambda sink: _read(delta, _Base(base, old), new, sink), delta.name)


class _Base:
    """The files of the old version."""

    def __init__(self, directory: Path, index: Index) -> None:
        self.directory = directory
        self.by_path = {file.path: file for file in index.files}
        self.by_content = {file.sha256: file for file in index.files}

    def chunks(self, file: File) -> Iterator[bytes]:
        """The content of a file, never more than its index says."""
        handle, left = disk.open(self.directory / file.path, os.O_RDONLY | os.O_NOFOLLOW), file.size
        try:
            while left and (chunk := disk.read(handle, min(CHUNK, left))):
                left -= len(chunk)
                yield chunk
        finally:
            disk.close(handle)

    def prefix_of(self, file: File) -> bytes:
        before = _prefix_of(file, self.by_path)
        if before is None:
            raise _refused(f"it asks for an old {file.path!r} that may not serve")
        content = b"".join(self.chunks(before))
        if sha256(content).hexdigest() != before.sha256:
            raise _refused(f"the installed {file.path!r} is damaged", Reason.DIGEST_MISMATCH)
        return content


class _Frames:
    """Gives out the bytes of a delta, and of the frames in it, and hashes all as it goes by."""

    def __init__(self, raw: int) -> None:
        self._raw, self._rest = raw, b""
        self.digest = sha256()

    def _next(self) -> bytes:
        if chunk := self._rest:
            self._rest = b""
        else:
            chunk = disk.read(self._raw, CHUNK)
            self.digest.update(chunk)
        return chunk

    def _some(self) -> bytes:
        if chunk := self._next():
            return chunk
        raise _refused("it ends too early")

    def kind(self) -> bytes:
        chunk = self._some()
        self._rest = chunk[1:]
        return chunk[:1]

    def frame(self, file: File, prefix: bytes | None) -> Iterator[bytes]:
        """The content of one frame, which may be longer or shorter than the file but is refused then."""
        window = WINDOW_LOG if prefix is None else max(LEAST_WINDOW_LOG, file.size.bit_length())
        known = None if prefix is None else zstd.ZstdDict(prefix, is_raw=True).as_prefix
        press = zstd.ZstdDecompressor(known, {zstd.DecompressionParameter.window_log_max: window})
        left = file.size
        while not press.eof:
            chunk = self._some() if press.needs_input else b""
            try:
                found = press.decompress(chunk, max_length=min(CHUNK, left + 1))
            except zstd.ZstdError as error:
                raise _refused(f"{file.path!r} cannot be decompressed: {error}") from error
            left -= len(found)
            if left < 0:
                raise _refused(f"it holds more of {file.path!r} than the index lists")
            yield found
        self._rest = press.unused_data

    def end(self) -> str:
        if self._next():
            raise _refused("it has bytes after its end")
        return self.digest.hexdigest()


def _read(delta: Path, base: _Base, new: Index, sink: Sink) -> str:
    """Drive the delta by the new index into `sink`; returns the delta's sha256."""
    raw = disk.open(delta, os.O_RDONLY)
    try:
        frames = _Frames(raw)
        for file in new.files:
            sink.begin(file)
            digest = sha256()
            for chunk in _content(file, base, frames):
                digest.update(chunk)
                sink.write(chunk)
            if digest.hexdigest() != file.sha256:
                why = f"{file.path!r} comes out otherwise than the index lists"
                raise _refused(why, Reason.DIGEST_MISMATCH)
            sink.end()
        return frames.end()
    finally:
        disk.close(raw)


def _content(file: File, base: _Base, frames: _Frames) -> Iterator[bytes]:
    if same := base.by_content.get(file.sha256):
        return base.chunks(same)
    kind = frames.kind()
    if kind not in (WHOLE, PREFIX):
        raise _refused(f"{file.path!r} comes in a way that is not known: {kind!r}")
    return frames.frame(file, base.prefix_of(file) if kind == PREFIX else None)
