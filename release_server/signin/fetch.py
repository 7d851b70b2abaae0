"""Talks to the provider over HTTP, bounded in time and size whatever it answers."""

from __future__ import annotations

import contextlib
import io
import socket
import threading
from typing import TYPE_CHECKING, Any

from requests import PreparedRequest, RequestException, Response
from requests.adapters import HTTPAdapter
from urllib3.connection import HTTPConnection, HTTPSConnection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

from agent_core.clock import boot_s
from agent_core.errors import UnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from requests import Session

LONGEST_S = 6.0
"""For one answer as a whole; `requests` knows a timeout per read only, so a drip would last for ever."""
CONNECT_S = 3.0
MOST_BYTES = 512 * 1024
"""The key sets of the largest providers have some ten thousand bytes."""


class Bounded(HTTPAdapter):
    """Sends over connections that are cut at the deadline, and reads no more than `MOST_BYTES`."""

    def __init__(self, longest_s: float = LONGEST_S) -> None:
        self.longest_s = longest_s
        self._open: list[socket.socket] = []
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        opened = self._open

        class Plain(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                return _watched(super()._new_conn(), opened)

        class Secure(HTTPSConnection):
            def _new_conn(self) -> socket.socket:
                return _watched(super()._new_conn(), opened)

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(HTTPSConnectionPool):
            ConnectionCls = Secure

        self.poolmanager.pool_classes_by_scheme = {"http": PlainPool, "https": SecurePool}

    def send(self, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
        """The whole answer, read.

        Raises:
            RequestException: the provider is away, or was cut at the deadline.
            UnreachableError: it was too slow, or says too much.
        """
        kwargs |= {"stream": True, "timeout": (min(CONNECT_S, self.longest_s), self.longest_s)}
        ends = boot_s() + self.longest_s
        cutter = threading.Timer(self.longest_s, self._cut)
        cutter.daemon = True
        cutter.start()
        try:
            response = super().send(request, *args, **kwargs)
            response.raw = io.BytesIO(b"".join(_pieces(response)))
        except (RequestException, OSError) as error:
            if boot_s() >= ends:
                raise unavailable("it took too long to answer") from error
            raise
        finally:
            cutter.cancel()
            self._forget()
        if boot_s() >= ends:  # cut in the middle, which an answer without a length does not show
            raise unavailable("it took too long to answer")
        return response

    def _cut(self) -> None:
        for watched in list(self._open):
            with contextlib.suppress(OSError):
                watched.shutdown(socket.SHUT_RDWR)

    def _forget(self) -> None:
        while self._open:
            self._open.pop().close()


def _watched(sock: socket.socket, opened: list[socket.socket]) -> socket.socket:
    # A copy, since TLS takes the socket itself over before it has shaken hands.
    opened.append(sock.dup())
    return sock


def _pieces(response: Response) -> Iterator[bytes]:
    length = 0
    while piece := response.raw.read(16_384, decode_content=False):
        length += len(piece)
        if length > MOST_BYTES:
            response.close()
            raise unavailable("its answer has no end")
        yield piece
    response.close()


def guard(session: Session, ca_file: str | None = None) -> None:
    """Have a session send by `Bounded` alone, certificates verified; its callers follow no redirect."""
    session.trust_env = False  # no .netrc, no proxy, no other authorities than the settings name
    session.verify = ca_file or True
    session.headers["Accept-Encoding"] = "identity"
    for scheme in ("http://", "https://"):
        session.mount(scheme, Bounded())


def unavailable(why: str) -> UnreachableError:
    return UnreachableError(
        "the provider cannot be asked",
        why=why,
        then="try again later; a token works without it",
        reason="signin-unavailable",
    )
