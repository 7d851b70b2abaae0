from __future__ import annotations

import ssl
import sys
import time
from subprocess import run
from typing import TYPE_CHECKING

import pytest
from cryptography.hazmat.primitives import serialization
from hypothesis import given
from hypothesis import strategies as st

from agent_core.errors import SettingsError, TrustError, UnreachableError
from agent_core.settings import AGENT, AgentSettings
from tests.certificates import Authority
from tests.http_origin import Chunked, Endless, Gzip, Origin, Proxy, Raw, Slow, Status, Truncated
from updater import transport as transport_module
from updater.device import connect
from updater.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CONTENT = b"0123456789" * 1000


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    directory = tmp_path / "www"
    directory.mkdir()
    (directory / "file").write_bytes(CONTENT)
    with Origin(directory) as origin:
        yield origin


@pytest.fixture
def transport(origin: Origin) -> Transport:
    return Transport(origin.url, proxies={}, timeout_s=1.0, user_agent="relfleet-test")


def test_get_returns_status_headers_and_body(origin: Origin, transport: Transport) -> None:
    answer = transport.get("/file", {"X-Extra": "1"}, max_length=len(CONTENT))
    assert (answer.status, answer.body) == (200, CONTENT)
    assert answer.headers["etag"].startswith('"')
    asked = origin.requests[0].headers
    assert asked["user-agent"] == "relfleet-test"
    assert asked["accept-encoding"] == "identity"
    assert asked["x-extra"] == "1"
    assert asked["host"] == origin.url.removeprefix("http://")


def test_a_path_prefix_of_the_server_is_kept(origin: Origin) -> None:
    (origin.directory / "below").mkdir()
    (origin.directory / "below" / "file").write_bytes(b"deep")
    assert Transport(f"{origin.url}/below/", proxies={}).get("/file", max_length=9).body == b"deep"


def test_post_sends_the_body(origin: Origin, transport: Transport) -> None:
    origin.answer("POST", "/api", lambda request: Status(201, {}, request.body[::-1]))
    answer = transport.post("/api", b"abc", {"Content-Type": "text/plain"})
    assert (answer.status, answer.body) == (201, b"cba")


def test_an_asked_304_is_an_answer(transport: Transport) -> None:
    etag = transport.get("/file", max_length=len(CONTENT)).headers["etag"]
    answer = transport.get("/file", {"If-None-Match": etag}, max_length=10)
    assert (answer.status, answer.body) == (304, b"")


def test_a_missing_file_is_an_answer(transport: Transport) -> None:
    assert transport.get("/nothing", max_length=10).status == 404


def test_a_chunked_body_arrives_whole(origin: Origin, transport: Transport) -> None:
    origin.misbehave("file", Chunked())
    assert transport.get("/file", max_length=len(CONTENT)).body == CONTENT


def test_open_yields_the_body_in_pieces(transport: Transport) -> None:
    with transport.open("/file", {"Range": "bytes=9990-"}) as stream:
        assert (stream.status, stream.length) == (206, 10)
        assert stream.headers["content-range"] == "bytes 9990-9999/10000"
        assert b"".join(stream.chunks) == CONTENT[-10:]


def test_an_error_of_the_reader_is_not_taken_for_the_networks(transport: Transport) -> None:
    def read() -> None:
        with transport.open("/file") as stream:
            next(iter(stream.chunks))
            raise OSError("disk is full")

    with pytest.raises(OSError, match="disk is full"):
        read()


LIES = {
    "redirect": Status(302, {"Location": "http://127.0.0.1:1/"}),
    "permanent redirect": Status(308, {"Location": "https://elsewhere.example/"}),
    "gzip": Gzip(),
    "unasked 304": Status(304),
    "unasked 206": Status(206, {"Content-Range": "bytes 0-1/2"}, b"ab"),
    "early hints only": Raw(b"HTTP/1.1 103 Early Hints\r\n\r\n"),
    "no HTTP": Raw(b"SSH-2.0-OpenSSH_9.9\r\n"),
    "two lengths": Raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nab"),
    "negative length": Raw(b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\nab"),
    "gzip transfer": Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    "announced too long": Status(200, {}, b"x" * 101),
    "without end": Endless(),
    "long header": Raw(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000 + b"\r\n\r\n"),
    "many headers": Raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\n"),
    "endless continues": Raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 5000),
    "endless trailers": Raw(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n" + b"X: y\r\n" * 90_000 + b"\r\n"
    ),
}


@pytest.mark.parametrize("fault", LIES.values(), ids=LIES.keys())
def test_what_no_honest_server_says_is_refused(origin: Origin, transport: Transport, fault) -> None:
    origin.misbehave("file", fault)
    with pytest.raises(TrustError) as caught:
        transport.get("/file", max_length=100)
    assert caught.value.reason == "bad-answer"


@pytest.mark.parametrize("fault", [Truncated(5), Raw(b""), Raw(b"HTTP/1.1 200 OK\r\nContent-Le")])
def test_an_answer_cut_short_is_unreachable(origin: Origin, transport: Transport, fault) -> None:
    origin.misbehave("file", fault)
    with pytest.raises(UnreachableError) as caught:
        transport.get("/file", max_length=len(CONTENT))
    assert caught.value.reason == "offline"


def test_a_chunked_answer_cut_short_is_unreachable(origin: Origin, transport: Transport) -> None:
    origin.misbehave("file", Raw(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nabc"))
    with pytest.raises(UnreachableError) as caught:
        transport.get("/file", max_length=100)
    assert caught.value.reason == "offline"


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_an_overloaded_server_says_when_to_come_back(
    origin: Origin, transport: Transport, status: int
) -> None:
    origin.misbehave("file", Status(status, {"Retry-After": "17"}))
    with pytest.raises(UnreachableError) as caught:
        transport.get("/file", max_length=10)
    assert (caught.value.reason, caught.value.retry_after_s) == ("overloaded", 17.0)


def test_nobody_listening_is_offline() -> None:
    with Origin() as origin:
        url = origin.url
    with pytest.raises(UnreachableError) as caught:
        Transport(url, proxies={}, timeout_s=1).get("/file", max_length=10)
    assert (caught.value.reason, caught.value.retry_after_s) == ("offline", None)


def test_a_silent_server_meets_the_read_timeout(origin: Origin) -> None:
    origin.misbehave("file", Slow(pause_s=30))
    began = time.monotonic()
    with pytest.raises(UnreachableError):
        Transport(origin.url, proxies={}, timeout_s=0.2).get("/file", max_length=len(CONTENT))
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("headers", [False, True], ids=["body", "headers"])
def test_a_slow_drip_meets_the_deadline_of_the_call(origin: Origin, headers: bool) -> None:
    origin.misbehave("file", Slow(pause_s=0.05, headers=headers))
    began = time.monotonic()
    with pytest.raises(UnreachableError):
        Transport(origin.url, proxies={}).get("/file", max_length=len(CONTENT), deadline_s=0.4)
    assert 0.3 < time.monotonic() - began < 2


def test_dripping_headers_meet_a_deadline_even_where_the_call_has_none(origin: Origin) -> None:
    origin.misbehave("file", Slow(pause_s=0.05, headers=True))
    transport = Transport(origin.url, proxies={}, timeout_s=0.2)
    with pytest.raises(UnreachableError), transport.open("/file"):
        pass


def test_a_long_body_that_keeps_coming_is_not_cut_by_the_patience_for_one_step(origin: Origin) -> None:
    origin.misbehave("file", Slow(piece=500, pause_s=0.05))
    with Transport(origin.url, proxies={}, timeout_s=0.2).open("/file") as stream:
        assert b"".join(stream.chunks) == CONTENT


@pytest.mark.parametrize(
    "url",
    ["ftp://host", "host", "https://", "http://u:p@host", "http://host?x", "http://host:0", "http://h:x"],
)
def test_an_address_that_cannot_be_used_is_refused_at_once(url: str) -> None:
    with pytest.raises(SettingsError):
        Transport(url)


# --- proxies -------------------------------------------------------------------------------------------


def test_an_explicit_proxy_is_asked_with_its_credentials(origin: Origin) -> None:
    with Proxy() as proxy:
        address = proxy.url.replace("//", "//us%40er:pass@")
        answer = Transport(origin.url, proxies={"http": address}).get("/file", max_length=len(CONTENT))
    assert answer.body == CONTENT
    assert proxy.heads[0].startswith(f"GET {origin.url}/file HTTP/1.1\r\n")
    assert "Proxy-Authorization: Basic dXNAZXI6cGFzcw==" in proxy.heads[0]


def test_the_environment_names_the_proxy_and_whom_to_reach_directly(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        monkeypatch.setenv("no_proxy", "example.org")
        Transport(origin.url).get("/file", max_length=len(CONTENT))
        assert len(proxy.heads) == 1
        monkeypatch.setenv("no_proxy", "example.org, 127.0.0.1")
        Transport(origin.url).get("/file", max_length=len(CONTENT))
    assert len(proxy.heads) == 1


@pytest.mark.parametrize(
    ("host", "no_proxy", "direct"),
    [
        ("releases.example.org", "*", True),
        ("releases.example.org", "releases.example.org", True),
        ("releases.example.org", "example.org", True),
        ("releases.example.org", ".example.org", True),
        ("releases.example.org", "*.example.org", True),
        ("releases.example.org", "other.net, EXAMPLE.org.net example.org", True),
        ("releases.example.org.", "example.org", True),
        ("releases.example.org", "example.org:8443", True),
        ("releases.example.org", "example.org:443", False),
        ("releases.example.org", "ample.org", False),
        ("releases.example.org", "", False),
        ("releases.example.org", ",", False),
        ("releases.example.org", "0.0.0.0/0", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.200/24", True),
        ("10.1.2.3", "10.1.2.3:8443", True),
        ("10.1.2.3", "10.1.2.3:443", False),
        ("10.1.2.3", "192.168.0.0/16", False),
        ("10.1.2.3", "10.0.0.0/33", False),
        ("10.1.2.3", "1.2.3", False),
        ("10.1.2.3", "::/0", False),
        ("[fd00::1]", "fd00::/8", True),
        ("[fd00::1]", "fd00:0:0::1", True),
        ("[fd00::1]", "[fd00::1]:8443", True),
        ("[fd00::1]", "[fd00::1]:443", False),
        ("[fd00::1]", "10.0.0.0/8", False),
    ],
)
def test_no_proxy_names_hosts_domains_addresses_networks_and_ports(
    host: str, no_proxy: str, direct: bool
) -> None:
    proxies = {"https": "http://127.0.0.1:9", "no_proxy": no_proxy}
    transport = Transport(f"https://{host}:8443", proxies=proxies)
    assert (transport._proxy() is None) is direct


@given(st.text(max_size=40), st.sampled_from(["releases.example.org", "10.1.2.3", "fd00::1"]))
def test_no_text_whatever_in_no_proxy_stops_a_poll(no_proxy: str, host: str) -> None:
    assert transport_module._is_direct(host, 443, no_proxy) in (True, False)


def test_the_settings_name_the_proxy_and_the_environment_what_they_leave_open(
    origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(**values: str | list[str]) -> None:
        set_here = {f"server.{name}": value for name, value in values.items()}
        settings = AgentSettings.of(AGENT.load(environ={}, flags=set_here))
        connect(origin.url, settings).get("/file", max_length=len(CONTENT))

    with Proxy() as ours, Proxy() as of_the_environment:
        monkeypatch.setenv("http_proxy", of_the_environment.url)
        ask()
        assert (len(ours.heads), len(of_the_environment.heads)) == (0, 1)
        ask(proxy=ours.url)
        assert (len(ours.heads), len(of_the_environment.heads)) == (1, 1)
        ask(no_proxy=["127.0.0.0/8"])
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        ask(proxy=ours.url)
        assert (len(ours.heads), len(of_the_environment.heads)) == (1, 1)
        ask(proxy=ours.url, no_proxy=["example.org"])
        assert (len(ours.heads), len(of_the_environment.heads)) == (2, 1)


def test_an_unsupported_proxy_is_a_settings_error(origin: Origin) -> None:
    with pytest.raises(SettingsError, match=r"127\.0\.0\.1:9"):
        Transport(origin.url, proxies={"http": "socks5://127.0.0.1:9"}).get("/file")


@pytest.mark.parametrize(
    "proxy", ["socks5://me:hidden@proxy", "http://me:hidden@proxy:x", "http://hidd€n@proxy"]
)
def test_an_address_with_a_password_is_refused_without_it(origin: Origin, proxy: str) -> None:
    with pytest.raises(SettingsError, match="proxy") as caught:
        Transport(origin.url, proxies={"http": proxy}).get("/file")
    assert "hidd" not in str(caught.value)


# --- TLS -----------------------------------------------------------------------------------------------


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def server_context(authority: Authority) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("server"))
    return context


def test_https_is_verified_against_the_given_authority(
    tmp_path: Path, authority: Authority, server_context: ssl.SSLContext
) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with Origin(tmp_path, server_context) as origin:
        transport = Transport(origin.url, ca_file=authority.file, proxies={})
        assert transport.get("/file", max_length=len(CONTENT)).body == CONTENT
        with pytest.raises(TrustError) as caught:
            Transport(origin.url, proxies={}).get("/file", max_length=len(CONTENT))
        assert caught.value.reason == "bad-certificate"


def test_with_an_authority_of_ones_own_the_hosts_are_not_believed(
    tmp_path: Path, authority: Authority, server_context: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    other = tmp_path / "other"
    other.mkdir()
    other_file = Authority(other, "another").file
    monkeypatch.setenv("SSL_CERT_FILE", str(authority.file))  # where OpenSSL looks for the host's own
    with Origin(tmp_path, server_context) as origin:
        by_the_host = Transport(origin.url, proxies={})
        assert by_the_host.get("/file", max_length=len(CONTENT)).body == CONTENT
        with pytest.raises(TrustError):
            Transport(origin.url, ca_file=other_file, proxies={}).get("/file")


def test_a_certificate_for_another_host_is_refused(
    tmp_path: Path, authority: Authority, server_context: ssl.SSLContext
) -> None:
    with Origin(tmp_path, server_context) as origin:
        transport = Transport(
            origin.url.replace("127.0.0.1", "localhost"), ca_file=authority.file, proxies={}
        )
        with pytest.raises(TrustError):
            transport.get("/file")


def test_mutual_tls_shows_the_client_certificate(
    tmp_path: Path, authority: Authority, server_context: ssl.SSLContext
) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    server_context.verify_mode = ssl.CERT_REQUIRED
    server_context.load_verify_locations(authority.file)
    pair = authority.issue("client")
    with Origin(tmp_path, server_context) as origin:
        known = Transport(origin.url, ca_file=authority.file, client_cert=pair, proxies={})
        assert known.get("/file", max_length=len(CONTENT)).body == CONTENT
        with pytest.raises(UnreachableError):
            Transport(origin.url, ca_file=authority.file, proxies={}).get("/file")


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o666], ids=oct)
def test_a_client_key_that_others_can_open_is_refused(
    tmp_path: Path, authority: Authority, server_context: ssl.SSLContext, mode: int
) -> None:
    pair = authority.issue("client")
    pair[1].chmod(mode)
    with Origin(tmp_path, server_context) as origin:
        transport = Transport(origin.url, ca_file=authority.file, client_cert=pair, proxies={})
        with pytest.raises(SettingsError, match="is not private"):
            transport.get("/file")
        assert origin.requests == []


def test_a_client_key_with_a_passphrase_is_refused_and_nobody_is_asked(
    tmp_path: Path, authority: Authority, server_context: ssl.SSLContext
) -> None:
    certificate, key_file = authority.issue("client")
    key = serialization.load_pem_private_key(key_file.read_bytes(), None)
    sealed = serialization.BestAvailableEncryption(b"secret")
    key_file.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, sealed)
    )
    with Origin(tmp_path, server_context) as origin:
        pair = (certificate, key_file)
        transport = Transport(origin.url, ca_file=authority.file, client_cert=pair, proxies={})
        with pytest.raises(SettingsError, match="no passphrase"):
            transport.get("/file")


def test_https_goes_through_a_proxy_by_connect(
    tmp_path: Path, authority: Authority, server_context: ssl.SSLContext
) -> None:
    (tmp_path / "file").write_bytes(CONTENT)
    with Origin(tmp_path, server_context) as origin, Proxy() as proxy:
        transport = Transport(origin.url, ca_file=authority.file, proxies={"https": proxy.url})
        assert transport.get("/file", max_length=len(CONTENT)).body == CONTENT
    assert proxy.heads[0].startswith(f"CONNECT 127.0.0.1:{origin.port} HTTP/1.1\r\n")


def test_a_proxy_that_refuses_to_connect_is_unreachable() -> None:
    with Proxy(refuse=407) as proxy, pytest.raises(UnreachableError) as caught:
        Transport("https://127.0.0.1:9", proxies={"https": proxy.url}).get("/file")
    assert "407" in caught.value.why


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_that_is_not_there_is_named_and_the_server_is_not_blamed(scheme: str) -> None:
    with Proxy() as proxy:
        url = proxy.url
    with pytest.raises(UnreachableError) as caught:
        Transport(f"{scheme}://127.0.0.1:9", proxies={scheme: url}).get("/file")
    assert caught.value.why.startswith(f"the proxy {url.partition('//')[2]}: ")
    assert "server.proxy" in caught.value.then


def test_tls_files_that_cannot_be_read_are_a_settings_error(tmp_path: Path) -> None:
    with Origin(tmp_path) as origin:
        url = origin.url.replace("http:", "https:")
        with pytest.raises(SettingsError):
            Transport(url, ca_file=tmp_path / "none.pem", proxies={}).get("/file")


def test_the_resident_process_loads_no_cryptography_and_no_tuf() -> None:
    code = (
        "import sys, updater.transport, updater.freshness, updater.server\n"
        "heavy = {'tuf', 'cryptography', 'securesystemslib', 'urllib3'} & set(sys.modules)\n"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
