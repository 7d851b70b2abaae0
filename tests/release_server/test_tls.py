"""TLS by the server itself: real processes, a private authority, and a real agent that believes it or not."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
from contextlib import contextmanager

import pytest

from agent_core.errors import SettingsError
from release_server.cli import main
from release_server.config import Config
from release_server.publish.client import Client
from release_server.tls import Pair
from tests.certificates import Authority
from tests.release_server.test_serve import LONGEST_S, SOURCE, Running, wait_for


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@contextmanager
def speaking_tls(directory, authority, limits=""):
    certificate, key = authority.issue("server")
    assert main(["init", "--data", str(directory / "server"), "--port", "0", "-q"]) == 0
    with (directory / "server" / "server.toml").open("a") as settings:
        settings.write(f'tls_cert = "{certificate}"\ntls_key = "{key}"\n{limits}')
    running = Running(directory / "server", directory / "log")
    yield running
    running.end(signal.SIGTERM)


@pytest.fixture(scope="module")
def server(tmp_path_factory, authority):
    with speaking_tls(tmp_path_factory.mktemp("tls"), authority) as running:
        yield running


@pytest.fixture
def hasty(tmp_path, authority):
    """One that gives a request's head half a second: too little for whoever else is busy."""
    with speaking_tls(tmp_path, authority, "[limits]\nhead_s = 0.5\n") as running:
        yield running


class Person:
    """Types commands, with everything that belongs to them below one directory."""

    def __init__(self, home, server, authority):
        self.home, self.root = home, home / "host"
        (home / "passphrase").write_text("correct horse\n")
        (home / "passphrase").chmod(0o600)
        own = {name: value for name, value in os.environ.items() if not name.startswith("RELFLEET_")}
        self.environ = own | {
            "PYTHONPATH": str(SOURCE),
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_STATE_HOME": str(home / "state"),
            "RELFLEET_SERVER": server.url,
            "RELFLEET_TOKEN_FILE": str(server.data / "admin.token"),
            "RELFLEET_PASSPHRASE_FILE": str(home / "passphrase"),
            "REQUESTS_CA_BUNDLE": str(authority.file),
        }

    def types(self, module, *words, **environ):
        argv = [sys.executable, "-m", module, *map(str, words)]
        return subprocess.run(
            argv,
            env=self.environ | environ,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=LONGEST_S,
            check=False,
        )

    def release(self, *words):
        done = self.types("release_server.publish.cli", *words)
        assert done.returncode == 0, done.stderr
        return done

    def agent(self, *words, **environ):
        return self.types("updater", *words, **environ)


@pytest.fixture(scope="module")
def person(tmp_path_factory, server, authority):
    """With keys, a root on the server, and a token for hosts."""
    made = Person(tmp_path_factory.mktemp("person"), server, authority)
    (made.home / "relfleet.toml").write_text('[product]\nname = "demo"\n')
    made.release("key", "gen")
    made.release("key", "export-trust", "-o", made.home / "root.json")
    made.release(
        "token", "create", "--role", "enroller", "--name", "hosts", "--out", made.home / "hosts.token"
    )
    token = (server.data / "admin.token").read_text().strip()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REQUESTS_CA_BUNDLE", str(authority.file))
        Client(server.url, token).post("/products", {"name": "demo"})
    timestamp = server.data / "repository" / "metadata" / "timestamp.json"
    wait_for("the timestamp", timestamp.exists)
    return made


def connect(server, authority, most=None):
    host, port = re.fullmatch(r"https://(.*):(\d+)", server.url).groups()
    context = ssl.create_default_context(cafile=authority.file)
    if most:
        context.minimum_version, context.maximum_version = ssl.TLSVersion.MINIMUM_SUPPORTED, most
        context.set_ciphers("DEFAULT@SECLEVEL=0")
    return context.wrap_socket(socket.create_connection((host, int(port)), timeout=30), server_hostname=host)


def test_it_says_https_and_tells_browsers_to_stay_there(server, authority):
    assert (server.data / "run" / "url").read_text().startswith("https://")
    with connect(server, authority) as client:
        client.sendall(b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = http.client.HTTPResponse(client)
        answer.begin()
        assert answer.status == 200
        assert answer.headers["Strict-Transport-Security"] == "max-age=31536000"


def test_tls_before_1_2_is_refused_and_1_2_is_spoken(server, authority):
    with connect(server, authority, ssl.TLSVersion.TLSv1_2) as client:
        assert client.version() == "TLSv1.2"
    with pytest.warns(DeprecationWarning, match="TLSVersion"), pytest.raises((ssl.SSLError, ConnectionError)):
        connect(server, authority, ssl.TLSVersion.TLSv1_1).close()


def test_plain_http_gets_no_answer(server):
    host, port = re.fullmatch(r"https://(.*):(\d+)", server.url).groups()
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(b"GET /api/v1/health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"200" not in client.recv(1000)


def test_an_agent_enrols_and_polls_with_the_authority_it_is_set_to_and_with_no_other(
    person, server, authority, tmp_path
):
    words = ("--root", person.root, "--server", server.url, "--product", "demo", "--name", "web")
    words += (
        "--trust",
        person.home / "root.json",
        "--token-file",
        person.home / "hosts.token",
        "--no-install",
    )
    stranger = person.agent("enroll", *words)
    assert stranger.returncode != 0
    assert "certificate" in stranger.stderr
    believed = {"RELFLEET_SERVER_CA_FILE": str(authority.file)}
    enrolled = person.agent("enroll", *words, **believed)
    assert enrolled.returncode == 0, enrolled.stderr
    assert outcome(person, believed)["verified"]
    other = {"RELFLEET_SERVER_CA_FILE": str(Authority(tmp_path, "another").file)}
    refused = outcome(person, other)
    assert (refused["reason"], refused["verified"]) == ("bad-certificate", False)
    assert outcome(person, believed)["verified"]


def outcome(person, environ):
    done = person.agent("once", "--root", person.root, "--json", **environ)
    return json.loads(done.stdout)


def test_a_fleet_file_is_compared_and_applied_over_tls(person, server):
    (person.home / "fleet.toml").write_text('product = "demo"\n[cohorts.eu]\nmatch = "region=eu"\n')
    stranger = person.types("release_server.publish.cli", "diff", REQUESTS_CA_BUNDLE="")
    assert (stranger.returncode, "certificate" in stranger.stderr) == (3, True)
    assert "eu" in person.types("release_server.publish.cli", "diff").stdout
    person.release("apply", "--yes")
    same = person.release("diff", "--json")
    assert json.loads(same.stdout)["steps"] == []


def test_a_backup_follows_what_is_published_over_tls(person, server, tmp_path):
    backup, whole = tmp_path / "backup", tmp_path / "whole"
    words = ("release_server.cli", "db")
    made = person.types(*words, "backup", backup, "--data", server.data)
    assert made.returncode == 0, made.stderr
    restore = (*words, "restore", backup, "--data", whole, "--published", server.url, "--json")
    stranger = person.types(*restore, REQUESTS_CA_BUNDLE="")
    assert (stranger.returncode, "SSLError" in stranger.stderr, whole.exists()) == (8, True, False)
    done = person.types(*restore)
    assert done.returncode == 0, done.stderr
    assert whole.is_dir()


def test_a_head_that_does_not_end_is_ended_by_the_server_itself(hasty, authority):
    with connect(hasty, authority) as client:
        client.settimeout(20)  # granian itself would wait for 30 s
        client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
        said = client.recv(65_536)
        assert said == b"" or said.split()[1] == b"408"


# --- what is refused at the start ------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_a_key_that_others_can_open_is_refused(authority, mode):
    certificate, key = authority.issue("open")
    key.chmod(mode)
    with pytest.raises(SettingsError, match="TLS files") as caught:
        Pair(certificate, key).check()
    assert "others on this host" in caught.value.why
    assert caught.value.then == f"chmod 600 {key}"


def test_a_pair_that_does_not_fit_is_refused(authority):
    certificate, key = authority.issue("fits")
    Pair(certificate, key).check()
    for wrong in (Pair(authority.file, key), Pair(key, key), Pair(certificate, key.with_name("none"))):
        with pytest.raises(SettingsError):
            wrong.check()


def test_a_certificate_without_its_key_is_refused_before_plain_http_is_spoken(data, authority):
    named = {"RELFLEET_SERVER_TLS_CERT": str(authority.issue("half")[0])}
    with pytest.raises(SettingsError, match="go together"):
        Config.load(data, environ=named)


def test_run_refuses_an_open_key_in_words(data, authority, monkeypatch, capsys):
    certificate, key = authority.issue("run")
    key.chmod(0o644)
    monkeypatch.setenv("RELFLEET_SERVER_TLS_CERT", str(certificate))
    monkeypatch.setenv("RELFLEET_SERVER_TLS_KEY", str(key))
    assert main(["run", "--data", str(data), "--port", "0"]) != 0
    assert f"chmod 600 {key}" in capsys.readouterr().err
