"""The fast path in front of Flask: metadata and targets as plain files, without a database query.

An idle agent asks for `timestamp.json` and gets 304; nothing else happens here (design section 2).
"""

from __future__ import annotations

import errno
import os
import re
import stat
import threading
from collections import OrderedDict
from dataclasses import dataclass
from hashlib import sha256
from typing import IO, TYPE_CHECKING, Any

from agent_core.wire import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    Start = Callable[..., Any]
    Application = Callable[[dict[str, Any], Start], Iterable[bytes]]

METADATA = "/metadata/"
TARGETS = "/targets/"
SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,254}")
HASHED = re.compile(r"([0-9a-f]{64})\.")
VERSIONED = re.compile(r"[0-9]+\.")
RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
IMMUTABLE = "public, max-age=31536000, immutable"
REVALIDATE = "no-cache"
PIECE = 1 << 18
CACHED_BYTES = 64 << 20

STATUS = {
    200: "200 OK",
    206: "206 Partial Content",
    304: "304 Not Modified",
    404: "404 Not Found",
    405: "405 Method Not Allowed",
    416: "416 Range Not Satisfiable",
}


@dataclass(frozen=True)
class Cached:
    """One metadata file in memory, good while `stamp` (inode, mtime in ns, size) is the file's."""

    stamp: tuple[int, int, int]
    body: bytes
    digest: str


class Slice:
    """Part of an open file as a response body; closed by the server when the client is done or gone."""

    def __init__(self, file: IO[bytes], length: int) -> None:
        self.file = file
        self.left = length

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        piece = self.file.read(min(PIECE, self.left))
        if not piece:
            raise StopIteration
        self.left -= len(piece)
        return piece

    def close(self) -> None:
        self.file.close()


class StaticFiles:
    """Answers GET and HEAD below `/metadata/` and `/targets/`; everything else goes on to `app`.

    Args:
        app: the WSGI application behind.
        repository: holds `metadata/` and `targets/`, written by `repository.export`.
    """

    def __init__(self, app: Application, repository: Path) -> None:
        self.app = app
        self.metadata = repository / "metadata"
        self.targets = repository / "targets"
        self._real_targets = self.targets.resolve()
        self._cache: OrderedDict[str, Cached] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()
        self._root_version = 0

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        path: str = environ.get("PATH_INFO", "")
        if not path.startswith((METADATA, TARGETS)):
            return self.app(environ, start)
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refuse(environ, start, 405, ("Allow", "GET, HEAD"))
        try:
            if path.startswith(METADATA):
                return self._answer_metadata(environ, start, path[len(METADATA) :])
            return self._answer_target(environ, start, path[len(TARGETS) :])
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return _refuse(environ, start, 404)
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            return _refuse(environ, start, 404)

    # --- metadata ----------------------------------------------------------------------------------------

    def _answer_metadata(self, environ: dict[str, Any], start: Start, name: str) -> Iterable[bytes]:
        if not SEGMENT.fullmatch(name) or not name.endswith(".json"):
            return _refuse(environ, start, 404)
        # The root's version is looked at first: a root that appears between the two reads then shows in the
        # next ETag, instead of hiding behind one that was remembered too early.
        root_version = self._newest_root() if name == "timestamp.json" else 0
        cached = self._load(name)
        etag = f'"{root_version}-{cached.digest}"' if name == "timestamp.json" else f'"{cached.digest}"'
        headers = [
            ("ETag", etag),
            ("Cache-Control", IMMUTABLE if VERSIONED.match(name) else REVALIDATE),
            ("X-Content-Type-Options", "nosniff"),
        ]
        if _matches(environ.get("HTTP_IF_NONE_MATCH"), etag):
            start(STATUS[304], headers)
            return []
        headers += [("Content-Type", "application/json"), ("Content-Length", str(len(cached.body)))]
        start(STATUS[200], headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [cached.body]

    def _newest_root(self) -> int:
        version = self._root_version
        while (self.metadata / f"{version + 1}.root.json").exists():
            version += 1
        self._root_version = version
        return version

    def _load(self, name: str) -> Cached:
        path = self.metadata / name
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):  # a link could lead anywhere
            raise FileNotFoundError(path)
        stamp = (found.st_ino, found.st_mtime_ns, found.st_size)
        cached = self._cache.get(name)
        if cached is not None and cached.stamp == stamp:
            return cached
        with path.open("rb") as file:
            opened = os.fstat(file.fileno())
            body = file.read()
        fresh = Cached((opened.st_ino, opened.st_mtime_ns, opened.st_size), body, sha256(body).hexdigest())
        self._keep(name, fresh)
        return fresh

    def _keep(self, name: str, fresh: Cached) -> None:
        with self._lock:
            old = self._cache.pop(name, None)
            self._cached_bytes += len(fresh.body) - (len(old.body) if old else 0)
            self._cache[name] = fresh
            while self._cached_bytes > CACHED_BYTES:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= len(dropped.body)

    # --- targets -----------------------------------------------------------------------------------------

    def _answer_target(self, environ: dict[str, Any], start: Start, rest: str) -> Iterable[bytes]:
        segments = rest.split("/")
        hashed = HASHED.match(segments[-1])
        if not hashed or not all(SEGMENT.fullmatch(segment) for segment in segments):
            return _refuse(environ, start, 404)
        wanted = self.targets.joinpath(*segments)
        if wanted.resolve() != self._real_targets.joinpath(*segments):  # a link could lead anywhere
            return _refuse(environ, start, 404)
        file = wanted.open("rb")
        try:
            return self._send_target(environ, start, file, hashed[1])
        except BaseException:
            file.close()
            raise

    def _send_target(
        self, environ: dict[str, Any], start: Start, file: IO[bytes], digest: str
    ) -> Iterable[bytes]:
        size = os.fstat(file.fileno()).st_size
        etag = f'"{digest}-{size}"'
        headers = [
            ("ETag", etag),
            ("Cache-Control", IMMUTABLE),
            ("Accept-Ranges", "bytes"),
            ("X-Content-Type-Options", "nosniff"),
        ]
        if _matches(environ.get("HTTP_IF_NONE_MATCH"), etag):
            file.close()
            start(STATUS[304], headers)
            return []
        wanted = _range(environ, etag, size)
        if wanted is None:
            first, last, status = 0, size - 1, 200
        elif wanted[0] >= size or wanted[0] > wanted[1]:
            file.close()
            return _refuse(environ, start, 416, ("Content-Range", f"bytes */{size}"))
        else:
            first, last, status = *wanted, 206
            headers.append(("Content-Range", f"bytes {first}-{last}/{size}"))
        length = last - first + 1
        headers += [("Content-Type", "application/octet-stream"), ("Content-Length", str(length))]
        start(STATUS[status], headers)
        if environ["REQUEST_METHOD"] == "HEAD":
            file.close()
            return []
        file.seek(first)
        return Slice(file, length)


def _matches(condition: str | None, etag: str) -> bool:
    """Whether `If-None-Match` names the entity we have (weak comparison, RFC 9110 section 13.1.2)."""
    if condition is None:
        return False
    offered = [entry.strip().removeprefix("W/") for entry in condition.split(",")]
    return "*" in offered or etag in offered


def _range(environ: dict[str, Any], etag: str, size: int) -> tuple[int, int] | None:
    """The single byte range asked for, both ends in; None for the whole; first > last when out of reach."""
    text = environ.get("HTTP_RANGE")
    if text is None or environ["REQUEST_METHOD"] != "GET":
        return None
    condition = environ.get("HTTP_IF_RANGE")
    if condition is not None and condition.strip() != etag:
        return None
    parts = RANGE.fullmatch(text.strip())
    if parts is None or parts[1] == parts[2] == "":
        return None
    if parts[1] == "":
        return (max(0, size - int(parts[2])), size - 1) if int(parts[2]) else (size, size)
    first = int(parts[1])
    last = int(parts[2]) if parts[2] else size - 1
    if parts[2] and last < first:
        return None  # not a valid range: ignored (RFC 9110 section 14.1.2)
    return first, min(last, size - 1)


def _refuse(environ: dict[str, Any], start: Start, status: int, *headers: tuple[str, str]) -> Iterable[bytes]:
    import json

    title = STATUS[status].split(" ", 1)[1]
    reason = {404: "not-found", 405: "usage", 416: "malformed"}[status]
    body = json.dumps(Problem(status, title, reason=reason).to_json()).encode()
    start(
        STATUS[status],
        [
            ("Content-Type", "application/problem+json"),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            *headers,
        ],
    )
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [body]
