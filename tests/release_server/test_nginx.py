"""The block of docs/operations.md in a real nginx, before a real server."""

from __future__ import annotations

import http.client
import re
import shutil
import signal
import socket
import ssl
import subprocess
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from release_server.cli import main
from tests.release_server.test_serve import LONGEST_S, Running, wait_for

NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
HOST = "releases.example.org"
MAIN = """
user root; daemon off; worker_processes 1; pid {home}/pid; error_log {home}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy;
  fastcgi_temp_path {home}/f; uwsgi_temp_path {home}/u; scgi_temp_path {home}/s;
  {block}
}}
"""
pytestmark = pytest.mark.skipif(
    NGINX is None, reason="nginx is not installed (scripts/test-setup installs it)"
)


def make_certificate(home):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (home / "tls.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (home / "tls.key").write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Front:
    """nginx with the documented block; only places, ports and the time-outs' lengths are the test's."""

    def __init__(self, home, server):
        make_certificate(home)
        self.home, self.port = home, free_port()
        (home / "www").mkdir()
        block = re.search(r"```nginx\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
        for said, here in {
            "listen 443 ssl": f"listen 127.0.0.1:{self.port} ssl",
            "/etc/ssl/relfleet.pem": f"{home}/tls.pem",
            "/etc/ssl/relfleet.key": f"{home}/tls.key",
            "http://127.0.0.1:8470": server.url,
            "/srv/www/relfleet": f"{server.data}/repository",
            "client_header_timeout 10s": "client_header_timeout 1s",
            "client_body_timeout 30s": "client_body_timeout 1s",
        }.items():
            assert said in block, said
            block = block.replace(said, here)
        (home / "nginx.conf").write_text(MAIN.format(home=home, block=block))
        self.process = subprocess.Popen(
            [NGINX, "-p", home, "-c", home / "nginx.conf"], stderr=subprocess.DEVNULL
        )
        wait_for("nginx", self.is_up)

    def is_up(self):
        assert self.process.poll() is None, (self.home / "error.log").read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def connect(self):
        context = ssl.create_default_context(cafile=self.home / "tls.pem")
        plain = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return context.wrap_socket(plain, server_hostname=HOST)

    def ask(self, path, **headers):
        with self.asking() as ask:
            return ask(path, **headers)

    @contextmanager
    def asking(self):
        """Ask on one connection as often as one likes."""
        connection = http.client.HTTPSConnection(HOST, timeout=LONGEST_S)
        connection.sock = self.connect()

        def ask(path, **headers):
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            answer.body = answer.read()
            return answer

        with closing(connection):
            yield ask


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("behind")
    assert main(["init", "--data", str(directory / "server"), "--port", "0", "-q"]) == 0
    with (directory / "server" / "server.toml").open("a") as settings:
        settings.write("trusted_proxies = 1\n")
    running = Running(directory / "server", directory / "log")
    metadata = running.data / "repository" / "metadata"
    (metadata / "timestamp.json").write_bytes(b'{"version": 1}')
    (metadata / "1.root.json").write_bytes(b"{}")
    yield running
    if running.process.poll() is None:
        running.end(signal.SIGTERM)


@pytest.fixture(scope="module")
def front(tmp_path_factory, server):
    made = Front(tmp_path_factory.mktemp("nginx"), server)
    yield made
    made.process.terminate()
    made.process.wait(30)


def test_the_server_knows_that_it_is_asked_by_tls(front):
    answer = front.ask("/api/v1/health")
    assert (answer.status, answer.headers["Strict-Transport-Security"]) == (200, "max-age=31536000")
    assert "nginx/" not in answer.headers["Server"]


def test_what_a_client_says_of_its_address_does_not_reach_the_server(front):
    """Sixty guesses a minute from one address: a made-up X-Forwarded-For would give each its own.

    One more is allowed each second, so as many as a slow machine needs are made, on one connection.
    """
    with front.asking() as ask:

        def guess(number):
            made_up = {"X-Forwarded-For": f"198.51.{number // 250}.{number % 250}"}
            return ask("/api/v1/whoami", Authorization="Bearer rft_x", **made_up).status

        assert any(guess(number) == 429 for number in range(900))


def test_the_etag_of_the_timestamp_names_the_root_through_nginx(front, server):
    before = front.ask("/metadata/timestamp.json").headers["ETag"]
    assert front.ask("/metadata/timestamp.json", **{"If-None-Match": before}).status == 304
    (server.data / "repository" / "metadata" / "2.root.json").write_bytes(b"{}")
    after = front.ask("/metadata/timestamp.json", **{"If-None-Match": before})
    assert (after.status, after.body) == (200, b'{"version": 1}')
    assert (before[:3], after.headers["ETag"][:3]) == ('"1-', '"2-')


@pytest.mark.parametrize(
    "begun",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: releases.example.org\r\nX-Slow: ", id="head"),
        pytest.param(
            b"POST /api/v1/report HTTP/1.1\r\nHost: releases.example.org\r\nContent-Length: 99\r\n\r\n{",
            id="body",
        ),
    ],
)
def test_a_request_that_does_not_end_is_ended(front, begun):
    with front.connect() as client:
        client.sendall(begun)
        said = client.recv(65_536)
        assert said == b"" or said.split()[1] in (b"400", b"408")


def test_polls_go_on_from_the_files_while_the_server_is_away(front, server):
    named = front.ask("/metadata/timestamp.json").headers["ETag"]
    server.end(signal.SIGTERM)
    answer = front.ask("/metadata/timestamp.json", **{"If-None-Match": named})
    assert (answer.status, answer.body) == (200, b'{"version": 1}')
    assert front.ask("/api/v1/health").status == 502
