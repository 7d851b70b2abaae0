"""Slow clients of a real server, on real sockets, with no proxy in front."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import threading
from hashlib import sha256

import pytest

from release_server.cli import main
from release_server.transfers import RETRY_AFTER_S
from tests.release_server.test_serve import LONGEST_S, Running, wait_for

THREADS, OF_A_KIND = 8, 3
"""Of 8 threads 4 may wait for clients, and of these 3 with one kind."""
CONTENT = os.urandom(12_000_000)
"""More than the kernel keeps for a client that reads nothing."""
DIGEST = sha256(CONTENT).hexdigest()
FILE = f"/targets/{DIGEST}.any.tar.zst"
STAMP = b'{"version": 1}'


@pytest.fixture(scope="module")
def make_running(tmp_path_factory):
    made = []

    def make(slow_s):
        directory = tmp_path_factory.mktemp("slow")
        data = directory / "server"
        assert main(["init", "--data", str(data), "--port", "0", "-q"]) == 0
        with (data / "server.toml").open("a") as settings:
            settings.write(f"threads = {THREADS}\n[limits]\nslow_s = {slow_s}\nleast_rate_bps = 20000\n")
        made.append(Running(data, directory / "log"))
        (data / "repository" / "targets" / FILE.rpartition("/")[2]).write_bytes(CONTENT)
        (data / "repository" / "metadata" / "timestamp.json").write_bytes(STAMP)
        return made[-1]

    yield make
    for running in made:
        running.end(signal.SIGTERM)


@pytest.fixture(scope="module")
def patient(make_running):
    """A server that would wait for an hour."""
    return make_running(3600)


@pytest.fixture(scope="module")
def strict(make_running):
    """One that gives a transfer two seconds for 40,000 bytes."""
    return make_running(2)


CLIENTS = []


@pytest.fixture(autouse=True)
def all_go_away():
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def connect(running):
    host, port = re.fullmatch(r"http://(.*):(\d+)", running.url).groups()
    client = socket.socket()
    CLIENTS.append(client)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8192)
    client.settimeout(LONGEST_S)
    client.connect((host, int(port)))
    return client


class Unread:
    """Asks for a file, reads the answer's head and no more."""

    def __init__(self, running):
        self.client = connect(running)
        self.client.sendall(f"GET {FILE} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.client.recv(1)
        self.head = head.decode()
        self.status = int(self.head.split()[1])


class Unsent:
    """Somebody who is known says that a body comes, and sends its first byte."""

    def __init__(self, running, path="/api/v1/products"):
        self.client = connect(running)
        token = (running.data / "admin.token").read_text().strip()
        fields = f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\nContent-Length: 1000"
        self.client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\n{fields}\r\n\r\n{{".encode())

    def is_answered(self):
        self.client.setblocking(False)
        try:
            return bool(self.client.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return False
        finally:
            self.client.settimeout(LONGEST_S)


def is_over(slow):
    """Whether the server has ended its connection; what it sent before is read away."""
    slow.client.setblocking(False)
    try:
        while slow.client.recv(1 << 20):
            pass
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


def polls_and_health_are_answered(running):
    """One after the other, each on a connection of its own."""
    for _ in range(2 * THREADS):
        assert running.ask("GET", "/api/v1/health").status == 200
        assert running.ask("GET", "/metadata/timestamp.json").body == STAMP


# --- how many --------------------------------------------------------------------------------------------


def test_downloads_that_nobody_reads_leave_threads_for_polls_and_are_told_to_come_again(patient):
    slow = [Unread(patient) for _ in range(2 * THREADS)]
    assert [client.status for client in slow] == [200] * OF_A_KIND + [503] * (2 * THREADS - OF_A_KIND)
    assert f"retry-after: {RETRY_AFTER_S}" in slow[-1].head.lower()
    polls_and_health_are_answered(patient)
    for one in slow:
        one.client.close()
    wait_for("their threads being free", lambda: patient.ask("GET", FILE).body == CONTENT)


def test_bodies_that_do_not_come_leave_threads_for_polls_and_downloads(patient):
    slow = [Unsent(patient) for _ in range(2 * THREADS)]
    told = wait_for("the others being told", lambda: those_told(slow, 2 * THREADS - OF_A_KIND))
    answer = told[0].client.recv(65_536).decode()
    assert answer.startswith("HTTP/1.1 503")
    assert f"retry-after: {RETRY_AFTER_S}" in answer.lower()
    assert json.loads(answer.partition("\r\n\r\n")[2])["reason"] == "overloaded"
    polls_and_health_are_answered(patient)
    assert patient.ask("GET", FILE).body == CONTENT


def those_told(slow, number):
    told = [one for one in slow if one.is_answered()]
    return told if len(told) == number else None


def test_slow_clients_of_both_kinds_hold_half_of_the_threads(patient):
    bodies = [Unsent(patient) for _ in range(THREADS)]
    wait_for("the bodies", lambda: those_told(bodies, THREADS - OF_A_KIND))
    files = [Unread(patient) for _ in range(THREADS)]
    assert [one.status for one in files].count(200) == THREADS // 2 - OF_A_KIND
    polls_and_health_are_answered(patient)


def test_a_body_of_nobody_known_is_not_waited_for(patient):
    client = connect(patient)
    client.sendall(b"POST /api/v1/enroll HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{")
    assert client.recv(65_536).startswith(b"HTTP/1.1 401")


# --- how long --------------------------------------------------------------------------------------------


def test_downloads_that_nobody_reads_are_ended(strict):
    slow = [Unread(strict) for _ in range(OF_A_KIND)]
    assert [one.status for one in slow] == [200] * OF_A_KIND  # as many as may; two seconds later none is left
    wait_for("another download", lambda: strict.ask("GET", FILE).status == 200)
    assert "it is too slow" in strict.log.read_text()
    wait_for("their end", lambda: all(is_over(one) for one in slow))


def test_bodies_that_do_not_come_are_ended(strict):
    slow = [Unsent(strict) for _ in range(OF_A_KIND)]
    wait_for("their end", lambda: all(is_over(one) for one in slow))


@pytest.mark.parametrize("make", [Unread, Unsent])
def test_one_that_drips_is_ended(strict, make):
    slow, stop = make(strict), threading.Event()

    def drip():
        while not stop.wait(0.05):
            try:
                done = slow.client.recv(256) if make is Unread else slow.client.send(b" ")
            except OSError:
                return
            if not done:
                return

    dripping = threading.Thread(target=drip)
    dripping.start()
    dripping.join(LONGEST_S)
    went_on = dripping.is_alive()
    stop.set()
    dripping.join()
    assert not went_on


def test_one_that_gets_on_is_left_alone_however_long_it_takes(strict):
    """At a few hundred kB a second for longer than the two seconds; then all that is left at once."""
    reader, stop = Unread(strict), threading.Event()
    arrived = 0
    for _ in range(70):
        arrived += len(reader.client.recv(1 << 15))
        stop.wait(0.06)
    while arrived < len(CONTENT):
        piece = reader.client.recv(1 << 20)
        assert piece, "it was ended"
        arrived += len(piece)
