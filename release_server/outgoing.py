"""This module asks servers elsewhere over HTTP, bounded in time and size whatever they answer."""

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
from urllib3.exceptions import HTTPError

from agent_core.clock import boot_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from requests import Session
    from urllib3 import ProxyManager

    Refuse = Callable[[str], Exception]

CONNECT_S = 3.0
MOST_BYTES = 512 * 1024
"""The key sets of the largest providers have some ten thousand bytes."""
SLOW = "it took too long to answer"


class Bounded(HTTPAdapter):
    """Sends over connections that are cut at the deadline, and reads no more than `MOST_BYTES`.

    Args:
        refuse: makes what is raised of why; it is the caller's word for a server that serves badly.
        longest_s: for one answer as a whole; `requests` knows a timeout per read only, so a drip would last
            for ever.
        check_peer: looks at the address that a connection was made to, before anything is sent there, and
            raises OSError when it is not to be talked to: a name may lead anywhere, and elsewhere next time.
    """

    def __init__(
        self,
        refuse: Refuse,
        longest_s: float,
        check_peer: Callable[[str], None] | None = None,
    ) -> None:
        self.refuse = refuse
        self.longest_s = longest_s
        self.check_peer = check_peer
        self._ends = 0.0
        self._open: list[socket.socket] = []
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
        super().init_poolmanager(*args, **kwargs)
        watch = self._watch

        class Plain(HTTPConnection):
            def _new_conn(self) -> socket.socket:
                return watch(super()._new_conn())

        class Secure(HTTPSConnection):
            def _new_conn(self) -> socket.socket:
                return watch(super()._new_conn())

        class PlainPool(HTTPConnectionPool):
            ConnectionCls = Plain

        class SecurePool(HTTPSConnectionPool):
            ConnectionCls = Secure

        self._pools = {"http": PlainPool, "https": SecurePool}
        self.poolmanager.pool_classes_by_scheme = self._pools

    def proxy_manager_for(self, *args: Any, **kwargs: Any) -> ProxyManager:
        manager: ProxyManager = super().proxy_manager_for(*args, **kwargs)
        manager.pool_classes_by_scheme = self._pools  # a proxy may drip as well
        return manager

    def send(self, request: PreparedRequest, *args: Any, **kwargs: Any) -> Response:
        """The whole answer, read.

        Raises:
            RequestException: the other server is away, or was cut at the deadline.
            Exception: of `refuse`: it was too slow, says too much, or breaks off.
        """
        kwargs |= {"stream": True, "timeout": (min(CONNECT_S, self.longest_s), self.longest_s)}
        self._ends = boot_s() + self.longest_s
        cutter = threading.Timer(self.longest_s, self._cut)
        cutter.daemon = True
        cutter.start()
        try:
            response = super().send(request, *args, **kwargs)
            response.raw = io.BytesIO(self._body(response))
        except (RequestException, OSError) as error:
            if self._is_over():
                raise self.refuse(SLOW) from error
            raise
        finally:
            cutter.cancel()
            self._forget()
        if self._is_over():  # cut in the middle, which an answer without a length does not show
            raise self.refuse(SLOW)
        return response

    def _is_over(self) -> bool:
        return boot_s() >= self._ends

    def _cut(self) -> None:
        for watched in list(self._open):
            with contextlib.suppress(OSError):
                watched.shutdown(socket.SHUT_RDWR)

    def _forget(self) -> None:
        while self._open:
            self._open.pop().close()

    def _watch(self, sock: socket.socket) -> socket.socket:
        if self.check_peer is not None:
            try:
                self.check_peer(sock.getpeername()[0])
            except OSError:
                sock.close()
                raise
        # A copy, since TLS takes the socket itself over before it has shaken hands.
        self._open.append(sock.dup())
        if self._is_over():  # slow names and dead addresses took it all; the cutter cuts once, and was here
            sock.close()
            raise TimeoutError(SLOW)
        return sock

    def _body(self, response: Response) -> bytes:
        try:
            return b"".join(self._pieces(response))
        except HTTPError as error:  # `requests` turns urllib3's errors into its own around the head only
            raise self.refuse(SLOW if self._is_over() else "its answer broke off") from error

    def _pieces(self, response: Response) -> Iterator[bytes]:
        length = 0
        while piece := response.raw.read(16_384, decode_content=False):
            length += len(piece)
            if length > MOST_BYTES:
                response.close()
                raise self.refuse("its answer has no end")
            yield piece
        response.close()


def guard(
    session: Session, adapter: Callable[[], HTTPAdapter], ca_file: str | None = None, proxy: str = ""
) -> None:
    """Have a session send by such adapters alone, certificates verified; its callers follow no redirect.

    Args:
        proxy: what is asked by https goes through it, sealed to its end; empty for none.
    """
    session.trust_env = False  # no .netrc, no other proxy, no other authorities than the settings name
    session.proxies = {"https": proxy} if proxy else {}
    session.verify = ca_file or True
    session.headers["Accept-Encoding"] = "identity"
    for scheme in ("http://", "https://"):
        session.mount(scheme, adapter())
