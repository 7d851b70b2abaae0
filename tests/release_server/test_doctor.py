"""What doctor says of TLS certificates: the server's own, and a proxy's by the public URL."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from contextlib import contextmanager
from datetime import timedelta

import pytest

from agent_core.errors import Exit
from release_server.cli import main
from tests.certificates import Authority


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "server"
    assert main(["init", "--data", str(directory), "--port", "0", "-q"]) == Exit.DONE
    return directory


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def found(data, capsys, monkeypatch):
    """What doctor says of the certificate under these settings."""

    def ask(**settings):
        for name, value in settings.items():
            monkeypatch.setenv(f"RELFLEET_SERVER_{name.upper()}", str(value))
        capsys.readouterr()
        main(["doctor", "--data", str(data), "--json"])
        findings = json.loads(capsys.readouterr().out)
        return [finding for finding in findings if finding["check"] == "certificate"]

    return ask


@pytest.mark.parametrize(
    ("since", "left", "state", "words"),
    [
        (60, 30, "ok", "29 days"),
        (69, 20.9, "note", "20 days"),
        (3, 3, "ok", "2 days"),
        (5, 1, "note", "23 h"),
        (90, -1, "bad", "expired"),
    ],
    ids=["a month left", "three weeks left", "half of a short life", "the end of a short life", "over"],
)
def test_the_days_that_the_servers_own_certificate_has_left(found, authority, since, left, state, words):
    certificate, key = authority.issue("server", since=timedelta(since), left=timedelta(left))
    (said,) = found(tls_cert=certificate, tls_key=key)
    assert (said["state"], words in said["detail"]) == (state, True), said
    assert bool(said["then"]) is (state != "ok")


@contextmanager
def proxy(certificate, key):
    """Whatever stands in front and speaks TLS; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def answer():
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                try:
                    context.wrap_socket(connection, server_side=True).close()
                except OSError:
                    connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join()


def test_a_proxys_certificate_is_seen_at_the_public_url_whoever_signed_it(found, authority):
    with proxy(*authority.issue("proxy", since=timedelta(80), left=timedelta(10, 60))) as port:
        (said,) = found(url=f"https://127.0.0.1:{port}")
    assert (said["state"], "10 days" in said["detail"]) == ("note", True), said
    (said,) = found(url=f"https://127.0.0.1:{port}")
    assert (said["state"], "cannot be seen from here" in said["detail"]) == ("note", True), said


def test_without_tls_there_is_nothing_to_say_of_a_certificate(found):
    assert found() == []
