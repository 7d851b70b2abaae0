"""Webhooks of the real jobs process: killed between an answer and its note; kept waiting."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import requests
from sqlalchemy import select, update

from agent_core import clock
from release_server.models import Lease, WebhookDelivery
from release_server.webhooks import outbox, subscriptions
from release_server.webhooks.vault import Vault
from tests.release_server.test_serve import wait_for
from tests.release_server.webhook_world import receiver

HOUSE = Path(__file__).parents[2]


@contextmanager
def worker(config):
    """A jobs process. It has no signer, so nothing is signed: webhooks are told all the same."""
    environ = os.environ | {"RELFLEET_JOBS_LEASE_S": "1"}
    words = [sys.executable, "-m", "release_server.cli", "worker", "--data", str(config.data)]
    with subprocess.Popen(words, env=environ, cwd=HOUSE, stderr=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.terminate()
            process.communicate(timeout=20)


@pytest.fixture
def tell(sessions, config):
    """Subscribe once, then tell one event after the other."""

    def subscribe(url):
        with sessions.write() as session:
            vault = Vault(config.webhook_key)
            return subscriptions.add(session, clock.now(), "ada", vault, url=url, wanted=["*"])[1]

    def say(count=1):
        with sessions.write() as session:
            for _ in range(count):
                outbox.tell(session, clock.now(), "release.published", "demo", version="1.0.0")

    say.subscribe = subscribe
    return say


def states(sessions):
    with sessions.read() as session:
        return session.scalars(select(WebhookDelivery.state).order_by(WebhookDelivery.sequence)).all()


def test_killed_between_the_answer_and_the_note_it_sends_the_same_again_and_goes_on(sessions, config, tell):
    with receiver() as heard:
        tell.subscribe(heard.url)
        tell(3)
        with worker(config) as first:
            heard.hook = first.kill
            first.wait(30)
            heard.hook = None
            assert first.returncode == -signal.SIGKILL
        assert (heard.sequences(), states(sessions)[0]) == ([1], "pending")
        with worker(config):
            wait_for("all being sent", lambda: states(sessions) == ["sent"] * 3)
        assert heard.sequences() == [1, 1, 2, 3]
        assert heard.ids()[0] == heard.ids()[1]
        assert heard.got[0][1] == heard.got[1][1]


def test_a_receiver_that_does_not_answer_holds_up_nobody_else(sessions, config, tell):
    """The thread that reconciles and signs renews the lease; and the process ends when it is told to."""
    never = threading.Event()

    def renewed():
        with sessions.read() as session:
            return session.scalar(select(Lease.until))

    with receiver() as heard:
        heard.hook = lambda: never.wait(30)
        tell.subscribe(heard.url)
        tell()
        try:
            with worker(config) as process:
                wait_for("a request", lambda: heard.got)
                before = renewed()
                wait_for("a renewal", lambda: renewed() > before)
                before = renewed()
                wait_for("a renewal", lambda: renewed() > before)
                process.terminate()
                assert process.wait(10) == 0
            assert states(sessions) == ["pending"]
        finally:
            never.set()


def test_the_example_takes_each_event_once_and_believes_nobody_else(sessions, config, tmp_path, tell):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    secret = tell.subscribe(url)
    tell(2)
    environ = os.environ | {"WEBHOOK_SECRET": secret, "WEBHOOK_TAKEN": str(tmp_path / "taken.db")}
    words = [sys.executable, str(HOUSE / "examples" / "webhook_receiver.py"), str(port)]
    with subprocess.Popen(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as example:
        try:
            wait_for("the receiver", lambda: _status(url) == 401)
            with worker(config):
                wait_for("all being sent", lambda: states(sessions) == ["sent"] * 2)
                with sessions.write() as session:
                    session.execute(update(WebhookDelivery).values(state=outbox.Kept.PENDING))
                wait_for("all being sent again", lambda: states(sessions) == ["sent"] * 2)
            forged = {"webhook-id": "msg_1", "webhook-timestamp": str(int(clock.now().timestamp()))}
            assert _status(url, {**forged, "webhook-signature": "v1,AAAA"}) == 401
        finally:
            example.terminate()
            printed = example.communicate(timeout=10)[0].decode()
    assert [line.split()[:2] for line in printed.splitlines()] == [
        ["1", "release.published"],
        ["2", "release.published"],
    ]


def _status(url, headers=None):
    try:
        return requests.post(url, b'{"type": "rollout.completed"}', headers=headers, timeout=5).status_code
    except requests.ConnectionError:
        return None
