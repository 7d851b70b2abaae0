"""The device's HTTP client: standard library only, and strict, because the resident agent carries it all day.

It follows no redirect, decodes nothing, and keeps its own pace: every read has a timeout, every call a
deadline, every body and header block to a size. What it returns is what was asked for, or an error.
"""

from __future__ import annotations

import base64
import io
import os
import re
import socket
import ssl
from contextlib import contextmanager
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPResponse, IncompleteRead
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import SplitResult, unquote, urlsplit

from agent_core import clock
from agent_core.errors import SettingsError, TrustError, UnreachableError
from agent_core.late import late_dataclass
from agent_core.retry_after import retry_after_s
from agent_core.wire import Reason

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

MAX_HEADERS = 64 * 1024
"""Bytes of status line and headers; no honest server comes near."""
MAX_ANSWER = 1024 * 1024
"""Bytes of an API answer."""
CHUNK = 64 * 1024
MAX_STEP = 4 * CHUNK
"""Bytes that one piece of a body may take with all that stands around it: sizes of chunks, trailers."""
PATIENCE = 3
"""One step (the headers, the next piece of a body) may take so many read timeouts, however it drips."""
DEFAULT_PORTS = {"http": 80, "https": 443}
ENVIRONMENT = (
    ("ALL_PROXY", "all"),
    ("all_proxy", "all"),
    ("HTTPS_PROXY", "https"),
    ("https_proxy", "https"),
    ("http_proxy", "http"),
    ("NO_PROXY", "no_proxy"),
    ("no_proxy", "no_proxy"),
)
"""Later ones win. HTTP_PROXY is missing on purpose: behind CGI a client's `Proxy:` header would set it."""


@late_dataclass(frozen=True)
class Answer:
    """What the server said: `headers` have lower-case names, `body` is whole."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@late_dataclass(frozen=True)
class Stream:
    """An answer whose body is still arriving; `length` is None when the server did not say.

    `chunks` ends when the body is whole and raises `UnreachableError` when it was cut short.
    """

    status: int
    headers: Mapping[str, str]
    length: int | None
    chunks: Iterator[bytes]


class Origin(Protocol):
    """What metadata and bundles come from: a server (`Transport`), or a file (`updater.offline`)."""

    def get(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        max_length: int = ...,
        deadline_s: float = ...,
    ) -> Answer: ...

    def open(
        self, path: str, headers: Mapping[str, str] | None = None, *, deadline_s: float | None = None
    ) -> AbstractContextManager[Stream]: ...


@late_dataclass(frozen=True)
class _Proxy:
    host: str
    port: int
    authorization: str | None


class Transport:
    """Asks one server. Nothing is opened or read before the first call; calls share no connection.

    Args:
        base_url: `http://` or `https://`, with an optional path prefix.
        ca_file: certificates to trust instead of the host's own.
        client_cert: certificate and key files for mutual TLS; the key must be its owner's alone.
        proxies: `{"http": URL, "https": URL, "no_proxy": "host,.domain,10.0.0.0/8"}`; None asks the
            environment, an empty mapping means none.
        timeout_s: for connecting and for each single read.
        user_agent: of every request.
        max_headers: bytes of status line and headers.

    Raises:
        SettingsError: the address cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        ca_file: Path | str | None = None,
        client_cert: tuple[Path | str, Path | str] | None = None,
        proxies: Mapping[str, str] | None = None,
        timeout_s: float = 10.0,
        user_agent: str = "relfleet",
        max_headers: int = MAX_HEADERS,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._url = _parse(self.base_url, "server address")
        self._host = self._url.hostname or ""
        self._port = self._url.port or DEFAULT_PORTS[self._url.scheme]
        self._ca_file = ca_file
        self._client_cert = client_cert
        self._proxies = proxies
        self.timeout_s = timeout_s
        self._user_agent = user_agent
        self._max_headers = max_headers

    def get(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        max_length: int = MAX_ANSWER,
        deadline_s: float = 60.0,
    ) -> Answer:
        """Fetch a small thing whole.

        Args:
            path: absolute, quoted, below the base address.
            headers: besides the client's own.
            max_length: bytes the body may have; a longer one is a lie.
            deadline_s: seconds for the whole call.

        Returns:
            Any 2xx or 4xx answer, and a 304 or 206 that was asked for.

        Raises:
            UnreachableError: `offline`, or `overloaded` (429, 5xx) with `retry_after_s`.
            TrustError: `bad-answer`, for what no honest server says to this request; `bad-certificate`.
        """
        with self._exchange("GET", path, headers or {}, None, deadline_s) as stream:
            return _whole(path, stream, max_length)

    def post(
        self,
        path: str,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        *,
        max_length: int = MAX_ANSWER,
        deadline_s: float = 60.0,
    ) -> Answer:
        """Send `body`; otherwise as `get`."""
        with self._exchange("POST", path, headers or {}, body, deadline_s) as stream:
            return _whole(path, stream, max_length)

    @contextmanager
    def open(
        self, path: str, headers: Mapping[str, str] | None = None, *, deadline_s: float | None = None
    ) -> Iterator[Stream]:
        """Fetch a large thing piece by piece; the caller counts and checks. Errors as of `get`."""
        with self._exchange("GET", path, headers or {}, None, deadline_s) as stream:
            yield stream

    @contextmanager
    def _exchange(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str],
        body: bytes | None,
        deadline_s: float | None,
    ) -> Iterator[Stream]:
        deadline = None if deadline_s is None else clock.boot_s() + deadline_s
        connection = _Connection(self.timeout_s, deadline, self._max_headers)
        response: HTTPResponse | None = None
        try:
            with _sorted_errors(self.base_url, path):
                proxy = self._proxy()
                target = self._dial(connection, proxy, path)
                own = {
                    "Host": self._url.netloc,
                    "User-Agent": self._user_agent,
                    "Accept-Encoding": "identity",
                    "Connection": "close",
                }
                if proxy and proxy.authorization and self._url.scheme == "http":
                    own["Proxy-Authorization"] = proxy.authorization
                response = connection.ask(method, target, {**own, **headers}, body)
            _check_status(path, response, {name.lower() for name in headers})
            length = _body_length(path, response)
            answered = {name.lower(): value for name, value in response.getheaders()}
            chunks = self._chunks(connection, response, path, length)
            yield Stream(response.status, answered, length, chunks)
        finally:
            if response is not None:
                response.close()
            connection.shut()

    def _chunks(
        self, connection: _Connection, response: HTTPResponse, path: str, length: int | None
    ) -> Iterator[bytes]:
        received = 0
        while length is None or received < length:
            with _sorted_errors(self.base_url, path):
                connection.begin_step()
                piece = response.read1(CHUNK if length is None else min(CHUNK, length - received))
            if not piece:
                break
            received += len(piece)
            yield piece
        if length is not None and received < length:
            why = f"the answer ended after {received} of {length} bytes"
            raise _offline(self.base_url, path, why)

    def _dial(self, connection: _Connection, proxy: _Proxy | None, path: str) -> str:
        """Connect, through the proxy if there is one; the request target to ask for."""
        target = self._url.path + path
        if proxy is None:
            connection.dial(self._host, self._port)
        else:
            try:
                connection.dial(proxy.host, proxy.port)
            except OSError as error:
                why = f"the proxy {proxy.host}:{proxy.port}: {str(error) or type(error).__name__}"
                then = "check server.proxy and server.no_proxy, or the environment's"
                raise _offline(self.base_url, path, why, then) from error
            if self._url.scheme == "http":
                return self.base_url + path
            status = connection.tunnel(f"{_bracketed(self._host)}:{self._port}", proxy.authorization)
            if status != 200:
                then = "check the proxy's address and credentials"
                why = f"the proxy {proxy.host}:{proxy.port} answered {status}"
                raise _offline(self.base_url, path, why, then)
        if self._url.scheme == "https":
            connection.secure(self._tls, self._host)
        return target

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        if self._client_cert is not None:
            _check_private(self._client_cert[1])
        try:
            context = ssl.create_default_context(cafile=self._ca_file)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self._client_cert is not None:
                # A passphrase is never asked for: nobody sits at the terminal of an agent.
                context.load_cert_chain(*self._client_cert, password="")
        except (OSError, ssl.SSLError) as error:
            which = f"{self._ca_file or ''} {self._client_cert or ''}".strip()
            raise SettingsError(
                "the TLS files cannot be used",
                why=f"{which}: {error}",
                then="check the paths, that they are PEM, and that the key has no passphrase",
            ) from error
        return context

    def _proxy(self) -> _Proxy | None:
        settings = environment() if self._proxies is None else self._proxies
        address = settings.get(self._url.scheme) or settings.get("all")
        if not address or _is_direct(self._host, self._port, settings.get("no_proxy", "")):
            return None
        url = _parse(address if "://" in address else f"http://{address}", "proxy address", bare=False)
        if url.scheme != "http":
            raise SettingsError(
                f"the proxy {url.hostname} cannot be used", why="only http:// proxies are spoken to"
            )
        authorization = None
        if url.username is not None:
            pair = f"{unquote(url.username)}:{unquote(url.password or '')}"
            authorization = "Basic " + base64.b64encode(pair.encode()).decode()
        return _Proxy(url.hostname or "", url.port or 80, authorization)


class _Connection:
    """One socket, from dialling to the last byte; stands in for a socket towards `http.client`.

    `http.client` reads with `readline` and knows a timeout per read only, so a server that drips one byte at
    a time would hold a poll for hours. Every read passes here and keeps to the step's deadline as well.
    """

    def __init__(self, timeout_s: float, deadline: float | None, max_headers: int) -> None:
        self._timeout_s = timeout_s
        self._deadline = deadline
        self._step_ends = 0.0
        self._step_room = 0
        self._header_room: int | None = max_headers
        self._sock: socket.socket | None = None
        self.begin_step()

    def begin_step(self) -> None:
        self._step_room = MAX_STEP
        ends = clock.boot_s() + PATIENCE * self._timeout_s
        self._step_ends = ends if self._deadline is None else min(ends, self._deadline)

    def dial(self, host: str, port: int) -> None:
        """Connect to the first address of `host` that answers."""
        failure: OSError = OSError(f"{host} has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(self._patience())
                sock.connect(address)
            except OSError as error:
                sock.close()
                failure = error
            else:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._sock = sock
                return
        raise failure

    def tunnel(self, authority: str, authorization: str | None) -> int:
        lines = [f"CONNECT {authority} HTTP/1.1", f"Host: {authority}"]
        if authorization:
            lines.append(f"Proxy-Authorization: {authorization}")
        self.sendall(("\r\n".join(lines) + "\r\n\r\n").encode("ascii"))
        response = HTTPResponse(cast("socket.socket", self), method="CONNECT")
        try:
            response.begin()
            return response.status
        finally:
            response.close()

    def secure(self, context: ssl.SSLContext, host: str) -> None:
        sock = self._open_socket()
        sock.settimeout(self._patience())
        # On failure `wrap_socket` has detached the plain socket and closed its own.
        self._sock = None
        self._sock = context.wrap_socket(sock, server_hostname=host)

    def ask(self, method: str, target: str, headers: Mapping[str, str], body: bytes | None) -> HTTPResponse:
        client = HTTPConnection("unused")
        client.auto_open = 0
        client.sock = cast("socket.socket", self)
        client.request(method, target, body, headers)
        response = client.getresponse()
        self._header_room = None
        return response

    def receive_into(self, buffer: Any) -> int:
        sock = self._open_socket()
        sock.settimeout(self._patience())
        count = sock.recv_into(buffer)
        if self._header_room is not None:
            if count == 0:
                # `http.client` would take the end of the connection for the end of the headers.
                raise ConnectionResetError("the answer ended within its headers")
            self._header_room -= count
            if self._header_room < 0:
                raise HTTPException("the headers have no end")
        self._step_room -= count
        if self._step_room < 0:
            raise HTTPException("one piece of the answer has no end")
        return count

    def shut(self) -> None:
        if self._sock is not None:
            self._sock.close()

    def _open_socket(self) -> socket.socket:
        if self._sock is None:
            raise OSError("not connected")
        return self._sock

    def _patience(self) -> float:
        left = self._step_ends - clock.boot_s()
        if left <= 0:
            raise TimeoutError("the answer came too slowly")
        return min(left, self._timeout_s)

    # What `http.client` calls on a socket.

    def sendall(self, content: Any) -> None:
        sock = self._open_socket()
        sock.settimeout(self._patience())
        sock.sendall(content)

    def makefile(self, mode: str = "rb", buffering: int = -1) -> io.BufferedReader:
        del mode, buffering  # always this one kind
        return io.BufferedReader(_Reader(self))

    def close(self) -> None:
        """Nothing: `http.client` closes early what the response still reads; `shut` is the end."""


class _Reader(io.RawIOBase):
    def __init__(self, connection: _Connection) -> None:
        super().__init__()
        self._connection = connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._connection.receive_into(buffer)


def _whole(path: str, stream: Stream, max_length: int) -> Answer:
    if stream.length is not None and stream.length > max_length:
        raise _lie(path, f"it announced {stream.length} bytes where {max_length} are the limit")
    received = bytearray()  # not a list of pieces: of a drip each is a few bytes, and fifty more to keep it
    for piece in stream.chunks:
        received += piece
        if len(received) > max_length:
            raise _lie(path, f"it sent more than the {max_length} bytes that are the limit")
    return Answer(stream.status, stream.headers, bytes(received))


def _check_status(path: str, response: HTTPResponse, asked: set[str]) -> None:
    """Refuse what was not asked for, with the names of the headers that were sent."""
    status = response.status
    if status == 429 or status >= 500:
        raise UnreachableError(
            "the server is overloaded or failing",
            why=f"it answered {status} {response.reason} to {path}",
            reason=Reason.OVERLOADED,
            retry_after_s=retry_after_s(response.getheader("Retry-After")),
        )
    if status == 304 and not asked & {"if-none-match", "if-modified-since"}:
        raise _lie(path, "it answered 304 to a request without a condition")
    if status == 206 and "range" not in asked:
        raise _lie(path, "it answered 206 to a request without a range")
    if 300 <= status < 400 and status != 304:
        raise _lie(path, f"it answered {status}: no redirect is followed", then="give the final address")
    if status < 200:
        raise _lie(path, f"it answered {status}")


def _body_length(path: str, response: HTTPResponse) -> int | None:
    """The length of the body, None when it is not said; refuses whatever would need decoding."""
    encoding = response.getheader("Content-Encoding", "identity").strip().lower()
    if encoding not in ("identity", ""):
        raise _lie(path, f"it sent content encoding {encoding[:40]!r}, and only identity was asked for")
    transfer = response.getheader("Transfer-Encoding", "").strip().lower()
    if transfer not in ("", "chunked"):
        raise _lie(path, f"it sent transfer encoding {transfer[:40]!r}")
    if response.status in (204, 304):
        return 0
    lengths = set(response.msg.get_all("Content-Length", []))
    if transfer or not lengths:
        return None
    length = lengths.pop()
    if lengths or not (length.isascii() and length.isdigit() and len(length) < 19):
        raise _lie(path, f"it sent the content length {length[:40]!r}")
    return int(length)


@contextmanager
def _sorted_errors(base_url: str, path: str) -> Iterator[None]:
    """Sort what the network raises into what a caller does about it; wraps network steps only."""
    try:
        yield
    except ssl.SSLCertVerificationError as error:
        raise TrustError(
            f"{base_url} showed a certificate that is not trusted",
            why=error.verify_message,
            then="check the CA file, the address and this host's clock",
            reason=Reason.BAD_CERTIFICATE,
        ) from error
    except IncompleteRead as error:
        raise _offline(base_url, path, "the answer was cut short") from error
    except OSError as error:
        raise _offline(base_url, path, str(error) or type(error).__name__) from error
    except HTTPException as error:
        raise _lie(path, str(error) or type(error).__name__) from error


def _lie(path: str, why: str, then: str = "") -> TrustError:
    return TrustError(f"the answer to {path} is refused", why=why, then=then, reason=Reason.BAD_ANSWER)


def _offline(base_url: str, path: str, why: str, then: str = "") -> UnreachableError:
    return UnreachableError(
        f"could not get {path} from {base_url}", why=why, then=then, reason=Reason.OFFLINE
    )


def _parse(address: str, what: str, *, bare: bool = True) -> SplitResult:
    """Split an address; `bare` ones carry no credentials, query or fragment. No error repeats credentials."""
    shown = address.rpartition("@")[2]
    try:
        url = urlsplit(address)
        port = url.port
    except ValueError:
        raise SettingsError(f"the {what} {shown!r} cannot be used", why="it is no URL") from None
    if url.scheme not in DEFAULT_PORTS or not url.hostname or port == 0 or not address.isascii():
        raise SettingsError(f"the {what} {shown!r} cannot be used", then="write it as https://host[:port]")
    if bare and ("@" in url.netloc or url.query or url.fragment or " " in address):
        raise SettingsError(f"the {what} must be a plain address", then="leave out credentials, ? and #")
    return url


def environment() -> dict[str, str]:
    """What the environment says of proxies, as `Transport` takes it."""
    found = {}
    for variable, name in ENVIRONMENT:
        if value := os.environ.get(variable):
            found[name] = value
    return found


def _is_direct(host: str, port: int, no_proxy: str) -> bool:
    """Whether `no_proxy`, entries apart by commas or blanks, has one that names this host; see `_names`."""
    host = host.lower().rstrip(".")
    return any(_names(entry, host, port) for entry in re.split(r"[\s,]+", no_proxy.lower()) if entry)


def _names(entry: str, host: str, port: int) -> bool:
    """Whether one entry names a host: `*`, a domain (with all below it), an address or a network.

    An entry may end in `:port`, and then names that port only. An address is compared as a number and with
    networks (`10.0.0.0/8`), never by its text: it is no domain, so `0.0.1` does not name `10.0.0.1`. A name
    is not looked up to see whether a network holds it: it may mean another address a moment later.
    """
    if entry == "*":
        return True
    name, wanted_port = _without_port(entry)
    if wanted_port and wanted_port != str(port):
        return False
    address = _network(host)
    if address is not None:
        network = _network(name)
        return network is not None and address.network_address in network
    domain = name.removeprefix("*").lstrip(".")
    return bool(domain) and (host == domain or host.endswith(f".{domain}"))


def _without_port(entry: str) -> tuple[str, str]:
    """`host:port`, `[v6]:port`, or either without a port; a bare v6 address has colons of its own."""
    if entry.startswith("["):
        name, _, rest = entry[1:].partition("]")
        return name, rest.removeprefix(":")
    if entry.count(":") != 1:
        return entry, ""
    name, _, port = entry.partition(":")
    return name, port


def _network(text: str) -> IPv4Network | IPv6Network | None:
    """An address or network as numbers, host bits and all; None for a name."""
    try:
        return ip_network(text, strict=False)
    except ValueError:
        return None


def _check_private(key_file: Path | str) -> None:
    """Refuse a client key that others on the host can open: it would speak for this host.

    Raises:
        SettingsError: it can, or it cannot be looked at.
    """
    try:
        mode = os.stat(key_file).st_mode  # noqa: PTH116 - a text or a path
    except OSError as error:
        raise SettingsError(
            f"the client key {key_file} cannot be used",
            why=error.strerror or str(error),
            then="check server.client_key",
        ) from error
    if mode & 0o077:
        raise SettingsError(
            f"the client key {key_file} is not private",
            why=f"its mode is {mode & 0o777:04o}: others can open it",
            then=f"chmod 600 {key_file}",
        )


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
