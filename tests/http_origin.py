"""A small real HTTP server on loopback that serves a directory and misbehaves when a test says so.

with Origin(directory) as origin:
    origin.misbehave("timestamp.json", Status(503, {"Retry-After": "7"}), times=1)
    Transport(origin.url).get("/metadata/timestamp.json", max_length=1000)
    assert origin.paths() == ["/metadata/timestamp.json"]
"""

from __future__ import annotations

import gzip
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import ssl
    from pathlib import Path


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Status:
    """Answer with this, whatever was asked."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


@dataclass(frozen=True)
class Truncated:
    """Announce the whole body and hang up after so many bytes of it."""

    after: int


@dataclass(frozen=True)
class Slow:
    """Send pieces of so many bytes with pauses between them; `headers` drips the header block too."""

    piece: int = 1
    pause_s: float = 0.02
    headers: bool = False


@dataclass(frozen=True)
class Endless:
    """A body without length and without end."""


@dataclass(frozen=True)
class Gzip:
    """Compress though nobody asked."""


@dataclass(frozen=True)
class ContentRange:
    """Answer a range with this Content-Range instead of the right one."""

    value: str


@dataclass(frozen=True)
class Whole:
    """Ignore ranges and send everything."""


@dataclass(frozen=True)
class WithoutEtag:
    """Serve as usual, without an ETag and deaf to conditions."""


@dataclass(frozen=True)
class Chunked:
    """Serve as usual, with chunked transfer instead of a length."""


@dataclass(frozen=True)
class Raw:
    """Send exactly these bytes and hang up."""

    content: bytes


Fault = Status | Truncated | Slow | Endless | Gzip | ContentRange | Whole | WithoutEtag | Chunked | Raw
Handler = Callable[[Request], Status]


class Origin:
    """Serves `directory` until left; knows strong ETags, If-None-Match, Range and If-Range.

    Args:
        directory: what GET serves; None serves nothing.
        tls: a server context for https.
    """

    def __init__(self, directory: Path | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.directory = directory
        self.requests: list[Request] = []
        self.stopping = threading.Event()
        self._faults: list[list[Any]] = []
        self._handlers: dict[tuple[str, str], Handler] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.origin = self
        self._server.tls = tls
        self.port: int = self._server.server_address[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def misbehave(self, ending: str, fault: Fault, times: int = 1_000_000) -> None:
        """Spoil the next `times` answers to paths with this ending; later calls come first."""
        self._faults.insert(0, [ending, fault, times])

    def behave(self) -> None:
        self._faults.clear()

    def show(self, tls: ssl.SSLContext) -> None:
        """Another certificate, from the next connection on."""
        self._server.tls = tls

    def answer(self, method: str, path: str, handler: Handler | Status) -> None:
        """Answer one method and path by a function, e.g. an API's."""
        self._handlers[method, path] = (lambda _: handler) if isinstance(handler, Status) else handler

    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def fault_for(self, path: str) -> Fault | None:
        for entry in self._faults:
            if path.endswith(entry[0]) and entry[2] > 0:
                entry[2] -= 1
                return entry[1]
        return None

    def handler_for(self, request: Request) -> Handler | None:
        return self._handlers.get((request.method, request.path))


class _Server(ThreadingHTTPServer):
    daemon_threads = False
    origin: Origin
    tls: ssl.SSLContext | None

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self.tls is None:
            super().finish_request(request, client_address)
            return
        # In the request's own thread: a client that refuses the certificate must not stop the server.
        request.settimeout(5)
        with self.tls.wrap_socket(request, server_side=True) as wrapped:
            super().finish_request(wrapped, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing to say: clients here hang up on purpose."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def _serve(self) -> None:
        origin = self.server.origin
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        # As a proxy it is asked by the whole address: a hostile one answers by itself, whoever was meant.
        path = re.sub(r"^http://[^/]+", "", self.path)
        request = Request(self.command, path, headers, body)
        origin.requests.append(request)
        fault = origin.fault_for(request.path)
        self.close_connection = True
        if isinstance(fault, Raw):
            self.wfile.write(fault.content)
            return
        if isinstance(fault, Status):
            answer = fault
        elif handler := origin.handler_for(request):
            answer = handler(request)
        else:
            answer = self._file(request, fault)
        self._send(answer, fault)

    def _file(self, request: Request, fault: Fault | None) -> Status:
        root = self.server.origin.directory
        file = root / request.path.lstrip("/") if root else None
        if file is None or ".." in request.path.split("/") or not file.is_file():
            return Status(404)
        content = file.read_bytes()
        etag = f'"{sha256(content).hexdigest()[:16]}"'
        headers = {} if isinstance(fault, WithoutEtag) else {"ETag": etag}
        if headers and request.headers.get("if-none-match") == etag:
            return Status(304, headers)
        wanted = re.fullmatch(r"bytes=(\d+)-", request.headers.get("range", ""))
        same = request.headers.get("if-range", etag) == etag
        if wanted and same and not isinstance(fault, Whole):
            start = int(wanted[1])
            if start >= len(content):
                return Status(416, {"Content-Range": f"bytes */{len(content)}"})
            said = f"bytes {start}-{len(content) - 1}/{len(content)}"
            if isinstance(fault, ContentRange):
                said = fault.value
            return Status(206, {**headers, "Content-Range": said}, content[start:])
        if isinstance(fault, Gzip):
            return Status(200, {**headers, "Content-Encoding": "gzip"}, gzip.compress(content))
        return Status(200, headers, content)

    def _send(self, answer: Status, fault: Fault | None) -> None:
        lines = [f"HTTP/1.1 {answer.status} Said", "Connection: close"]
        lines += [f"{name}: {value}" for name, value in answer.headers.items()]
        if isinstance(fault, Chunked):
            lines.append("Transfer-Encoding: chunked")
        elif not isinstance(fault, Endless) and answer.status != 304:
            lines.append(f"Content-Length: {len(answer.body)}")
        head = ("\r\n".join(lines) + "\r\n\r\n").encode()
        self._trickle(head, fault if isinstance(fault, Slow) and fault.headers else None)
        match fault:
            case Endless():
                while not self.server.origin.stopping.is_set():
                    self.wfile.write(b"x" * 65_536)
            case Truncated(after):
                self.wfile.write(answer.body[:after])
            case Chunked():
                for start in range(0, len(answer.body), 1000):
                    piece = answer.body[start : start + 1000]
                    self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
                self.wfile.write(b"0\r\n\r\n")
            case _:
                self._trickle(answer.body, fault if isinstance(fault, Slow) else None)

    def _trickle(self, content: bytes, slow: Slow | None) -> None:
        if slow is None:
            self.wfile.write(content)
            return
        for start in range(0, len(content), slow.piece):
            if self.server.origin.stopping.wait(slow.pause_s):
                return
            self.wfile.write(content[start : start + slow.piece])
            self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """Quiet."""


class Proxy:
    """A small forward proxy: CONNECT and absolute URIs, to any loopback port; keeps what it was asked.

    While `elsewhere` is a port, that is where it leads, whatever was asked for.
    """

    def __init__(self, refuse: int | None = None) -> None:
        self.heads: list[str] = []
        self.elsewhere: int | None = None
        self._refuse = refuse
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._accept)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            thread = threading.Thread(target=self._serve, args=(client,))
            thread.start()
            self._threads.append(thread)

    def _serve(self, client: socket.socket) -> None:
        with client:
            client.settimeout(5)
            head = b""
            while b"\r\n\r\n" not in head:
                if not (piece := client.recv(4096)):
                    return
                head += piece
            self.heads.append(head.decode())
            if self._refuse is not None:
                client.sendall(f"HTTP/1.1 {self._refuse} No\r\nContent-Length: 0\r\n\r\n".encode())
                return
            target = head.split(b" ")[1].decode()
            port = int(re.search(r":(\d+)", target.removeprefix("http"))[1])
            with socket.create_connection(("127.0.0.1", self.elsewhere or port), 5) as upstream:
                if head.startswith(b"CONNECT"):
                    client.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
                else:
                    upstream.sendall(head.replace(f"http://127.0.0.1:{port}".encode(), b"", 1))
                _both_ways(client, upstream)


def _both_ways(client: socket.socket, upstream: socket.socket) -> None:
    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while piece := source.recv(65_536):
                sink.sendall(piece)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            return

    back = threading.Thread(target=pump, args=(upstream, client))
    back.start()
    pump(client, upstream)
    back.join()
