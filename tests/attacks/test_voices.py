"""Who speaks for whom: row 36 of docs/cases.md. The device's own code reports to the real application.

A hostile proxy stands between the two; it keeps what it sees, changes it, and says it again.
"""

from __future__ import annotations

import json
import threading
from datetime import timedelta
from http.client import HTTPConnection

import pytest
from werkzeug.serving import WSGIRequestHandler, make_server

from agent_core import wire
from agent_core.errors import NotAllowedError
from agent_core.layout import Layout
from agent_core.settings import AGENT, AgentSettings
from release_server import auth
from tests.http_origin import Origin, Status
from tests.release_server.conftest import (  # noqa: F401 - fixtures
    app,
    clock,
    config,
    data,
    database_url,
    sessions,
    template,
)
from tests.release_server.fleet_world import World
from tests.repository_simulator import RepositorySimulator
from updater import install, report
from updater.device import Device

REPORT = "/api/v1/report"


class _Quiet(WSGIRequestHandler):
    def log(self, *_):
        """Quiet."""


class Line:
    """The application on loopback, and the proxy that every device here speaks through."""

    def __init__(self, application, fleet, home):
        self.fleet, self.home = fleet, home
        self.server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=_Quiet)
        self.proxy = Origin()
        self.trust = RepositorySimulator(home / "www", "demo")
        self.trust.publish()
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,))

    def __enter__(self):
        self._thread.start()
        for path in (REPORT, "/api/v1/enroll"):
            self.proxy.answer("POST", path, self.say)
        self.proxy.__enter__()
        return self

    def __exit__(self, *_):
        self.proxy.__exit__()
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()

    def say(self, request, **changed):
        """Hand a request on, as it is or with other `headers` or `body`; the server's answer."""
        body = changed.pop("body", request.body)
        headers = {**request.headers, **{name.lower(): text for name, text in changed.items()}}
        headers.pop("content-length", None)
        connection = HTTPConnection("127.0.0.1", self.server.server_port, timeout=20)
        connection.request(request.method, request.path, body, headers)
        answer = connection.getresponse()
        status = Status(answer.status, {"Content-Type": answer.getheader("Content-Type", "")}, answer.read())
        connection.close()
        return status

    def refused(self, request, **changed):
        answer = self.say(request, **changed)
        return answer.status, json.loads(answer.body)["reason"]

    def enroll(self, name, token=None):
        """A host that becomes an agent through the proxy."""
        layout = Layout(self.home / name)
        made = install.enroll(
            layout, self.proxy.url, "demo", token or self.fleet.token, self.trust.trusted_root, name, {}, ""
        )
        settings = AgentSettings.of(AGENT.load(environ={}, flags={}))
        return Device(layout, settings, made.identity)

    def heard(self, path=REPORT):
        return [request for request in self.proxy.requests if request.path == path]

    def reason_of(self, name):
        return self.fleet.agent(name).agent.reason


@pytest.fixture
def line(app, sessions, clock, tmp_path):  # noqa: F811 - the fixtures above
    fleet = World(sessions, clock)
    fleet.cohort()
    with Line(app, fleet, tmp_path) as line:
        yield line


def test_a_report_is_not_said_twice(line):
    device = line.enroll("web-1")
    report.send_signed(device)
    kept = line.heard()[-1]
    assert line.refused(kept) == (401, "replayed")
    report.send_signed(device)
    assert line.refused(kept) == (401, "replayed")
    report.send_signed(device)


def test_a_report_with_an_older_counter_or_a_later_one_is_not_its_hosts(line):
    device = line.enroll("web-1")
    report.send_signed(device)
    kept = line.heard()[-1]
    for counter in ("0", "1", "999"):
        assert line.refused(kept, **{wire.HEADER_COUNTER: counter})[0] == 401
    report.send_signed(device)  # the forged 999 has not moved what the server expects


def test_a_changed_report_is_refused_and_what_it_said_is_not_kept(line):
    device = line.enroll("web-1")
    report.send_signed(device)
    kept, before = line.heard()[-1], line.reason_of("web-1")
    told = json.loads(kept.body) | {"reason": "healthy, says the thief"}
    counter = {wire.HEADER_COUNTER: str(int(kept.headers[wire.HEADER_COUNTER.lower()]) + 1)}
    assert line.refused(kept, body=json.dumps(told).encode(), **counter) == (401, "bad-signature")
    assert line.reason_of("web-1") == before
    report.send_signed(device)


def test_no_agent_speaks_for_another(line):
    one, other = line.enroll("web-1"), line.enroll("web-2")
    report.send_signed(one)
    kept = line.heard()[-1]
    assert line.refused(kept, **{wire.HEADER_AGENT: "web-2"})[0] == 401
    report.send_signed(other)
    report.send_signed(one)


def test_a_session_is_nobody_elses_and_carries_no_transition(line):
    one, other = line.enroll("web-1"), line.enroll("web-2")
    report.send_signed(one)
    report.send_signed(other)
    session = report.session(one)
    assert session
    report.send_heartbeat(one, session, {})
    kept = line.heard()[-1]
    assert line.refused(kept, **{wire.HEADER_AGENT: "web-2"})[0] in (401, 403)
    step = {"number": 9, "at": "2026-05-01T12:00:00Z", "version": "1.1.0", "digest": "d" * 12, "salt": ""}
    told = json.loads(kept.body) | {"transitions": [step | {"state": "healthy", "reason": "", "detail": ""}]}
    assert line.refused(kept, body=json.dumps(told).encode()) == (403, "unsigned")
    report.send_heartbeat(one, session, {})


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"role": "reader"}, "scope"),
        ({"role": "operator"}, "scope"),
        ({"product": "other"}, "scope"),
        ({"uses": 1}, "token-used-up"),
        ({}, "token-revoked"),
        ({"expires": timedelta(hours=1)}, "token-expired"),
    ],
    ids=["a reader's", "an operator's", "of another product", "used up", "revoked", "past its date"],
)
def test_a_token_that_may_not_enrol_makes_no_agent(line, limits, reason):
    fleet, role = line.fleet, auth.Role(limits.get("role", "enroller"))
    made = {"name": "t", "actor": "test"} | limits | {"role": role}
    with fleet.write() as database:
        row, token = auth.add_token(database, fleet.clock(), **made)
        number = row.id
    if "uses" in limits:
        line.enroll("web-0", token)
    if reason == "token-revoked":
        with fleet.write() as database:
            auth.revoke_token(database, fleet.clock(), number, "olga")
    fleet.clock.step(hours=1)
    with pytest.raises(NotAllowedError) as refused:
        line.enroll("web-1", token)
    assert refused.value.reason == reason
    assert line.enroll("web-1").identity.agent_id == "web-1"
