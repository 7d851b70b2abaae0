"""Real processes on loopback."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import psutil
import pytest
from sqlalchemy.orm import Session

from agent_core.errors import Exit, RelfleetError
from release_server import serve
from release_server.cli import main
from release_server.config import Config
from release_server.database import make_engine
from release_server.models import Lease

SOURCE = Path(serve.__file__).parents[1]
LONGEST_S = 90
"""Generous, since the tests of others may keep the machine busy; reached only when something is broken."""


def wait_for(what, condition):
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen")


class Running:
    """A `release-server run` of its own."""

    def __init__(self, data, log):
        self.data = data
        self.log = log
        environ = os.environ | {"PYTHONPATH": str(SOURCE), "RELFLEET_JOBS_TICK_S": "0.1"}
        argv = [sys.executable, "-m", "release_server.cli", "run", "--data", str(data), "--workers", "1"]
        with log.open("wb") as stderr:
            self.process = subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=stderr, env=environ, cwd=data.parent
            )
        self.said = self.process.stdout.readline().decode()
        assert self.said.startswith("listening on "), self.log.read_text()
        self.url = self.said.removeprefix("listening on ").strip()
        self.family = psutil.Process(self.process.pid)

    def ask(self, method, path, body=None, **headers):
        host, port = re.fullmatch(r"http://(.*):(\d+)", self.url).groups()
        connection = http.client.HTTPConnection(host, int(port), timeout=30)
        token = (self.data / "admin.token").read_text().strip()
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers | {"Authorization": f"Bearer {token}"})
        answer = connection.getresponse()
        answer.body = answer.read()
        connection.close()
        return answer

    def child(self, command):
        for child in self.family.children():
            with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):
                if command in child.cmdline():
                    return child
        return None

    def end(self, number):
        """Send a signal; seconds until it and everything below it are gone."""
        below = self.family.children(recursive=True)
        begun = time.monotonic()
        self.process.send_signal(number)
        self.process.wait(LONGEST_S)
        self.process.stdout.close()
        _, alive = psutil.wait_procs(below, timeout=LONGEST_S)
        assert alive == []
        return time.monotonic() - begun


@pytest.fixture(scope="module")
def make_running(tmp_path_factory):
    made = []

    def make():
        directory = tmp_path_factory.mktemp("serve")
        assert main(["init", "--data", str(directory / "server"), "--port", "0", "-q"]) == 0
        made.append(Running(directory / "server", directory / "log"))
        return made[-1]

    yield make
    for running in made:
        if running.process.poll() is None:
            running.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def running(make_running):
    return make_running()


def test_it_says_where_it_listens_once_it_really_answers(running):
    assert running.ask("GET", "/api/v1/whoami").status == 200
    assert (running.data / "run" / "url").read_text().strip() == running.url


def test_bytes_go_in_and_come_out_of_the_real_web_server_unchanged(running):
    content = os.urandom(3_000_000)
    digest = sha256(content).hexdigest()
    path = f"/api/v1/uploads/{digest}"
    for offset in (0, 1_500_000):
        piece = content[offset : offset + 1_500_000]
        numbers = {"Upload_Offset": str(offset), "Upload_Length": str(len(content))}
        assert running.ask("PATCH", path, piece, **numbers).status == 204
    assert running.ask("HEAD", path).headers["Upload-Complete"] == "1"
    place = running.data / "repository" / "targets" / "bundles" / "demo" / "1.0+a" / f"{digest}.any.tar.zst"
    place.parent.mkdir(parents=True)
    place.hardlink_to(running.data / "blobs" / digest[:2] / digest)
    for name in ("1.0+a", "1.0%2Ba"):
        path = f"/targets/bundles/demo/{name}/{digest}.any.tar.zst"
        assert running.ask("GET", path).body == content
        part = running.ask("GET", path, Range="bytes=1000000-")
        assert (part.status, part.body) == (206, content[1_000_000:])
        assert part.headers["Content-Range"] == "bytes 1000000-2999999/3000000"
        head = running.ask("HEAD", path)
        assert (head.headers["Content-Length"], head.body) == ("3000000", b"")
        assert running.ask("GET", path, If_None_Match=head.headers["ETag"]).status == 304


@pytest.mark.parametrize(
    "path",
    ["/metadata/../../server.toml", "/metadata/%2e%2e/%2e%2e/server.toml", "/targets/..%2f..%2fadmin.token"],
)
def test_no_path_leads_out_over_the_real_web_server(running, path):
    answer = running.ask("GET", path)
    assert answer.status == 404
    assert b"rft_" not in answer.body


def test_a_jobs_process_works_beside_it(running, capsys):
    def is_well():
        """By doctor: jobs process, signer and web server are there, and nothing is bad."""
        capsys.readouterr()
        code = main(["doctor", "--data", str(running.data), "--json"])
        found = {finding["check"]: finding["state"] for finding in json.loads(capsys.readouterr().out)}
        well = (code, found["jobs"], found["signer"], found["web"]) == (Exit.DONE, "ok", "ok", "ok")
        return well and presence_noted(running.data)

    wait_for("the lease being taken", is_well)


@pytest.mark.parametrize("command", ["signer", "worker", "web"])
def test_a_child_that_dies_is_started_again(running, command):
    dead = wait_for("the child", lambda: running.child(command))
    below = dead.children(recursive=True)
    dead.send_signal(signal.SIGKILL)
    wait_for("a new child", lambda: running.child(command) not in (None, dead))
    psutil.wait_procs(below, timeout=LONGEST_S)
    assert not any(process.is_running() for process in below)

    def answers():
        try:
            return running.ask("GET", "/api/v1/health").status == 200
        except OSError:
            return False

    wait_for("an answer", answers)


def test_term_ends_everything_within_seconds(running):
    assert running.end(signal.SIGTERM) < 10
    assert running.process.returncode == 0
    assert not (running.data / "run" / "url").exists()
    assert "Traceback" not in running.log.read_text()


def test_a_killed_parent_leaves_no_process(make_running):
    make_running().end(signal.SIGKILL)


def presence_noted(data):
    """Whether a web process has noted in the database that it listens."""
    engine = make_engine(Config.load(data).database_url)
    with Session(engine) as session:
        noted = session.get(Lease, Lease.WEB)
    engine.dispose()
    return noted is not None


# --- gunicorn --------------------------------------------------------------------------------------------


def test_gunicorn_serves_the_same_application(data, tmp_path):
    log = tmp_path / "gunicorn.log"
    argv = [sys.executable, "-m", "gunicorn", "release_server.app:wsgi()"]
    argv += ["--bind", "127.0.0.1:0", "--log-file", str(log), "--no-control-socket"]
    environ = os.environ | {"PYTHONPATH": str(SOURCE), "RELFLEET_SERVER_DATA": str(data)}
    process = subprocess.Popen(argv, env=environ, cwd=tmp_path)
    try:
        port = wait_for(
            "gunicorn", lambda: log.exists() and re.search(r"http://127.0.0.1:(\d+)", log.read_text())
        )[1]
        wait_for("an answer", lambda: serve.is_answering("127.0.0.1", int(port)))
        content = os.urandom(700_000)
        digest = sha256(content).hexdigest()
        place = data / "repository" / "targets" / f"{digest}.any"
        place.write_bytes(content)
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
        for asked, expected in (
            ("bytes=0-", content),
            ("bytes=100-", content[100:]),
            ("bytes=5-9", content[5:10]),
        ):
            connection.request("GET", f"/targets/{digest}.any", headers={"Range": asked})
            assert connection.getresponse().read() == expected
        connection.close()
        wait_for("its note that it listens", lambda: presence_noted(data))
    finally:
        process.terminate()
        process.wait(LONGEST_S)


# --- the parts -------------------------------------------------------------------------------------------


def test_a_taken_port_is_refused_in_words():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(RelfleetError) as caught:
            serve.reserve("127.0.0.1", other.getsockname()[1])
    assert caught.value.reason == "port-taken"


def test_a_second_server_cannot_join_a_port_silently():
    with serve.reserve("127.0.0.1", 0) as held, pytest.raises(RelfleetError):
        serve.reserve("127.0.0.1", held.getsockname()[1])


def test_an_address_of_another_host_is_refused():
    with pytest.raises(RelfleetError):
        serve.reserve("192.0.2.1", 8080)


def test_a_child_that_keeps_dying_is_started_less_and_less_often():
    child = serve.Child("short", [sys.executable, "-c", ""], os.environ)
    now, starts = 0.0, []
    while len(starts) < 5:
        child.keep(now)
        if child.process is not None:
            starts.append(now)
            child.process.wait()
            child.keep(now)
        now = child.not_before
    pauses = [round(later - earlier, 3) for earlier, later in itertools.pairwise(starts)]
    assert pauses == [0.4, 0.8, 1.6, 3.2]


def test_a_child_that_does_not_stop_is_killed(tmp_path):
    ignoring = (
        "import pathlib, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "pathlib.Path('ready').touch(); time.sleep(99)"
    )
    argv = ["sh", "-c", 'cd "$0" && exec "$1" -c "$2"', str(tmp_path), sys.executable, ignoring]
    child = serve.Child("stubborn", argv, os.environ)
    child.keep(0.0)
    wait_for("the child being deaf", (tmp_path / "ready").exists)
    child.stop()
    child.wait(serve.boot_s() + 0.3)
    assert child.process.returncode == -signal.SIGKILL
