"""Transfers: how many threads of a web process clients can hold, so that polls are answered whatever they do.

A body that arrives and a file that leaves each hold a thread until the client has done its part. Half of the
threads at most do that at one time, and of this half three quarters with one kind; who comes beside them is
answered 503 at once, and comes again by itself. All else is handed to the web server whole, and so holds no
thread while it is sent. `slow` ends the ones that do not get on.
"""

from __future__ import annotations

import json
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from agent_core.clock import boot_s
from agent_core.errors import UnreachableError
from agent_core.wire import Problem

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from typing import IO

    Start = Callable[..., Any]
    Application = Callable[[dict[str, Any], Start], Iterable[bytes]]

    Kind = Literal["body", "file"]

FILE_TYPE = "application/octet-stream"
"""What bundles and indexes are sent as, and nothing else is: every other answer is in memory already."""
SHORT = 1 << 18
"""A file of no more bytes is handed over whole as well: policies, indexes, deltas of a few lines."""
RETRY_AFTER_S = 5
BUSY = "the server has as many transfers as it takes at once"
THEN = "it is tried again after Retry-After"


@dataclass(frozen=True, eq=False)
class Transfer:
    """One thread that waits for a client.

    Attributes:
        client: the address at the other end of the connection, and our port: what the connection is found by.
        begun: seconds since the host started.
    """

    kind: Kind
    client: tuple[str, int]
    begun: float


class Slots:
    """Who holds a thread of this process. At least one transfer of each kind is possible at a time.

    Args:
        threads: of the process.
        entered: called after each that was let in.
    """

    def __init__(self, threads: int, entered: Callable[[], None] = lambda: None) -> None:
        self.most = max(1, threads // 2)
        self.most_of_a_kind = max(1, self.most * 3 // 4)
        self.entered = entered
        self._held: set[Transfer] = set()
        self._lock = threading.Lock()

    def enter(self, kind: Kind, client: tuple[str, int]) -> Transfer | None:
        """Begin a transfer, or not: None when there are enough."""
        with self._lock:
            alike = sum(transfer.kind == kind for transfer in self._held)
            if len(self._held) >= self.most or alike >= self.most_of_a_kind:
                return None
            transfer = Transfer(kind, client, boot_s())
            self._held.add(transfer)
        self.entered()
        return transfer

    def leave(self, transfer: Transfer) -> None:
        """End it; any number of times."""
        with self._lock:
            self._held.discard(transfer)

    def held(self) -> frozenset[Transfer]:
        with self._lock:
            return frozenset(self._held)


class Body:
    """A request's body that is a transfer from the first read to its last byte."""

    def __init__(self, inner: IO[bytes], length: int | None, slots: Slots, client: tuple[str, int]) -> None:
        self.inner = inner
        self.left = length
        self._slots = slots
        self._client = client
        self._transfer: Transfer | None = None
        self._is_over = length == 0

    def read(self, size: int = -1) -> bytes:
        """As a file's.

        Raises:
            UnreachableError: reason `overloaded`; as many bodies as may are being read.
        """
        self._begin()
        piece = self.inner.read() if size is None or size < 0 else self.inner.read(size)
        if self.left is not None:
            self.left -= len(piece)
        if size != 0 and (size is None or size < 0 or not piece or self.left == 0):
            self.close()
        return piece

    def _begin(self) -> None:
        if self._transfer is None and not self._is_over:
            self._transfer = self._slots.enter("body", self._client)
            if self._transfer is None:
                raise UnreachableError(BUSY, then=THEN, reason="overloaded", retry_after_s=RETRY_AFTER_S)

    def close(self) -> None:
        """The thread waits for it no longer."""
        self._is_over = True
        if self._transfer is not None:
            self._slots.leave(self._transfer)


class Sending:
    """A file's answer, a transfer until the web server closes it: at its end, or the client's."""

    def __init__(self, answer: Iterable[bytes], transfer: Transfer, slots: Slots) -> None:
        self._answer = answer
        self._pieces = iter(answer)
        self._transfer = transfer
        self._slots = slots

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        return next(self._pieces)

    def close(self) -> None:
        self._slots.leave(self._transfer)
        _close(self._answer)


class Transfers:
    """Lets transfers of `app` happen as far as there are slots."""

    def __init__(self, app: Application, slots: Slots) -> None:
        self.app = app
        self.slots = slots

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        said: list[tuple[Any, ...]] = []
        body = self._wrap_body(environ)
        # The web server's own way to send a file goes past `Sending`, which has to know the end.
        wrapper = environ.pop("wsgi.file_wrapper", None)
        try:
            answer = self.app(environ, lambda *words: said.append(words))
        finally:
            if wrapper is not None:  # gunicorn looks for it afterwards
                environ["wsgi.file_wrapper"] = wrapper
            if body is not None:
                body.close()
        if isinstance(answer, list):
            start(*said[-1])
            return answer
        return self._send(environ, start, said[-1], answer)

    def _wrap_body(self, environ: dict[str, Any]) -> Body | None:
        length = environ.get("CONTENT_LENGTH", "")
        if length in ("", "0") and "HTTP_TRANSFER_ENCODING" not in environ:
            return None
        known = int(length) if length.isascii() and length.isdigit() else None
        environ["wsgi.input"] = body = Body(environ["wsgi.input"], known, self.slots, _client(environ))
        return body

    def _send(
        self, environ: dict[str, Any], start: Start, said: tuple[Any, ...], answer: Iterable[bytes]
    ) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] == "HEAD" or not _is_long_file(dict(said[1])):
            start(*said)
            try:
                return [b"".join(answer)]
            finally:
                _close(answer)
        transfer = self.slots.enter("file", _client(environ))
        if transfer is None:
            _close(answer)
            return _refuse(start)
        start(*said)
        return Sending(answer, transfer, self.slots)


def _is_long_file(headers: dict[str, str]) -> bool:
    named = {name.lower(): value for name, value in headers.items()}
    length = named.get("content-length", "")
    return named.get("content-type") == FILE_TYPE and not (length.isdigit() and int(length) <= SHORT)


def _client(environ: dict[str, Any]) -> tuple[str, int]:
    """Who is connected to us: a proxy in front, if there is one."""
    own = environ.get("werkzeug.proxy_fix.orig", environ)
    return own.get("REMOTE_ADDR") or "", int(own.get("SERVER_PORT") or 0)


def _refuse(start: Start) -> list[bytes]:
    body = json.dumps(Problem(503, BUSY, "", "overloaded", THEN).to_json()).encode()
    start(
        "503 Service Unavailable",
        [
            ("Content-Type", "application/problem+json"),
            ("Content-Length", str(len(body))),
            ("Retry-After", str(RETRY_AFTER_S)),
        ],
    )
    return [body]


def _close(answer: Iterable[bytes]) -> None:
    close = getattr(answer, "close", None)
    if close is not None:
        close()
