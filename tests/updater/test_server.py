from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agent_core import wire
from agent_core.errors import (
    ConflictError,
    MalformedError,
    NotAllowedError,
    NotFoundError,
    RelfleetError,
    TrustError,
    UnreachableError,
    UsageError,
)
from agent_core.layout import Layout
from tests.http_origin import Endless, Origin, Request, Status
from updater import identity as identities
from updater import server
from updater.identity import Identity
from updater.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

WHO = Identity("http://127.0.0.1", "warehouse-agent", "web-17", "any", "stable")
REPORT = wire.Report("web-17", "warehouse-agent", "1.0.0", "ab" * 6, wire.Phase.IDLE, "any", "up-to-date")
STEP = wire.Transition(1, "2026-06-01T12:00:00Z", "1.0.0", "ab" * 6, "s", wire.AttemptState.HEALTHY)
JSON = {"Content-Type": "application/json"}
PROBLEM_JSON = {"Content-Type": "application/problem+json; charset=utf-8"}


@pytest.fixture
def origin() -> Iterator[Origin]:
    with Origin() as origin:
        yield origin


@pytest.fixture
def transport(origin: Origin) -> Transport:
    return Transport(origin.url, proxies={}, timeout_s=2.0)


@pytest.fixture
def paths(tmp_path: Path) -> Layout:
    made = Layout(tmp_path)
    made.state.mkdir()
    identities.make_key(made)
    return made


def answering(origin: Origin, path: str, body: dict[str, object], status: int = 200) -> None:
    origin.answer("POST", path, Status(status, JSON, json.dumps(body).encode()))


def request_of(paths: Layout) -> wire.EnrollRequest:
    return wire.EnrollRequest("warehouse-agent", "web-17", identities.public_key(paths), "any", "canary")


def test_enrolment_trades_a_token_for_an_identity(
    origin: Origin, transport: Transport, paths: Layout
) -> None:
    answering(origin, "/api/v1/enroll", wire.EnrollAnswer("web-17-2", "stable").to_json(), 201)
    answer = server.enroll(transport, "  rf_token\n", request_of(paths))
    assert (answer.agent_id, answer.cohort) == ("web-17-2", "stable")
    asked = origin.requests[0]
    assert asked.headers["authorization"] == "Bearer rf_token"
    assert asked.headers["content-type"] == "application/json"
    assert wire.EnrollRequest.from_json(json.loads(asked.body)) == request_of(paths)
    assert paths.key.read_text().strip() not in asked.body.decode()


@pytest.mark.parametrize("token", ["", "  ", "a b", "a\r\nX: y", "t\u00f6ken"])
def test_a_token_that_is_none_is_not_sent(
    origin: Origin, transport: Transport, paths: Layout, token: str
) -> None:
    with pytest.raises(UsageError):
        server.enroll(transport, token, request_of(paths))
    assert origin.requests == []


@pytest.mark.parametrize("reason", ["token-expired", "scope"])
def test_a_refused_token_is_advised_as_a_host_needs_it(
    origin: Origin, transport: Transport, paths: Layout, reason: str
) -> None:
    refusal = wire.Problem(403, "no", reason=reason, then="release login").to_json()
    origin.answer("POST", "/api/v1/enroll", Status(403, PROBLEM_JSON, json.dumps(refusal).encode()))
    with pytest.raises(NotAllowedError) as refused:
        server.enroll(transport, "rf_token", request_of(paths))
    assert refused.value.then == server.ADVICE


def is_signed(request: Request, public: str) -> bool:
    text = wire.signed_text(
        request.method,
        request.path,
        sha256(request.body).hexdigest(),
        int(request.headers[wire.HEADER_COUNTER.lower()]),
    )
    signature = bytes.fromhex(request.headers[wire.HEADER_SIGNATURE.lower()])
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public)).verify(signature, text)
    except InvalidSignature:
        return False
    return True


def test_a_signed_report_proves_who_sent_what_and_each_one_once(
    origin: Origin, transport: Transport, paths: Layout
) -> None:
    answering(origin, "/api/v1/report", wire.ReportAnswer("stable", 1, "session", 3600).to_json())
    sent = wire.Report(**{**REPORT.__dict__, "transitions": (STEP,)})
    for _ in range(2):
        answer = server.report_signed(transport, WHO, paths, sent)
    assert (answer.cohort, answer.accepted, answer.session, answer.session_s) == (
        "stable",
        1,
        "session",
        3600,
    )
    first, second = origin.requests
    assert first.headers["relfleet-agent"] == "web-17"
    assert wire.Report.from_json(json.loads(first.body)) == sent
    assert is_signed(first, identities.public_key(paths))
    assert is_signed(second, identities.public_key(paths))
    assert int(second.headers["relfleet-counter"]) > int(first.headers["relfleet-counter"])
    forged = Request(first.method, first.path, first.headers, first.body.replace(b"healthy", b"failed"))
    assert not is_signed(forged, identities.public_key(paths))


def test_a_signature_covers_the_path_the_server_sees_behind_a_prefix(origin: Origin, paths: Layout) -> None:
    answering(origin, "/fleet/api/v1/report", wire.ReportAnswer(None, 0).to_json())
    server.report_signed(Transport(f"{origin.url}/fleet", proxies={}), WHO, paths, REPORT)
    asked = origin.requests[0]
    behind_proxy = Request(asked.method, asked.path.removeprefix("/fleet"), asked.headers, asked.body)
    assert is_signed(behind_proxy, identities.public_key(paths))


def test_a_heartbeat_goes_under_the_session(origin: Origin, transport: Transport) -> None:
    answering(origin, "/api/v1/report", wire.ReportAnswer("stable", 5).to_json())
    answer = server.report_session(transport, "session-token", REPORT)
    assert (answer.accepted, answer.session) == (5, None)
    asked = origin.requests[0].headers
    assert (asked["authorization"], asked["relfleet-agent"]) == ("Bearer session-token", "web-17")
    assert "relfleet-signature" not in asked


def test_transitions_never_go_unsigned(origin: Origin, transport: Transport) -> None:
    with pytest.raises(UsageError):
        server.report_session(transport, "s", wire.Report(**{**REPORT.__dict__, "transitions": (STEP,)}))
    assert origin.requests == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, MalformedError),
        (401, NotAllowedError),
        (403, NotAllowedError),
        (404, NotFoundError),
        (409, ConflictError),
        (413, MalformedError),
        (415, MalformedError),
        (418, RelfleetError),
        (422, MalformedError),
    ],
)
def test_a_problem_becomes_the_error_of_its_status_with_what_why_and_then(
    origin: Origin, transport: Transport, status: int, kind: type[RelfleetError]
) -> None:
    told = wire.Problem(status, "the token is used up", "it was for 1 agent", "token-used", "make another")
    origin.answer("POST", "/api/v1/report", Status(status, PROBLEM_JSON, json.dumps(told.to_json()).encode()))
    with pytest.raises(RelfleetError) as caught:
        server.report_session(transport, "s", REPORT)
    error = caught.value
    assert type(error) is kind
    assert (error.what, error.why) == ("the token is used up", "it was for 1 agent")
    assert (error.reason, error.then) == ("token-used", "make another")


@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({}, b"<html>no</html>"),
        (PROBLEM_JSON, b"<html>"),
        (PROBLEM_JSON, b"[]"),
        (PROBLEM_JSON, b'{"status":1}'),
    ],
)
def test_a_refusal_without_a_readable_problem_still_says_its_status(
    origin: Origin, transport: Transport, headers: dict[str, str], body: bytes
) -> None:
    origin.answer("POST", "/api/v1/report", Status(403, headers, body))
    with pytest.raises(NotAllowedError) as caught:
        server.report_session(transport, "s", REPORT)
    assert (caught.value.reason, "403" in caught.value.why) == ("not-allowed", True)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_server_that_sheds_load_is_unreachable_for_as_long_as_it_says(
    origin: Origin, transport: Transport, status: int
) -> None:
    origin.answer("POST", "/api/v1/report", Status(status, {"Retry-After": "120"}))
    with pytest.raises(UnreachableError) as caught:
        server.report_session(transport, "s", REPORT)
    assert (caught.value.reason, caught.value.retry_after_s) == ("overloaded", 120.0)


@pytest.mark.parametrize("body", [b"", b"<html>", b"[" * 60_000], ids=["empty", "html", "deep"])
def test_an_answer_that_is_no_json_is_refused(origin: Origin, transport: Transport, body: bytes) -> None:
    origin.answer("POST", "/api/v1/report", Status(200, JSON, body))
    with pytest.raises(TrustError) as caught:
        server.report_session(transport, "s", REPORT)
    assert caught.value.reason == "bad-answer"


def test_an_answer_of_another_shape_is_malformed(origin: Origin, transport: Transport) -> None:
    answering(origin, "/api/v1/report", {"cohort": 5, "accepted": 0})
    with pytest.raises(MalformedError):
        server.report_session(transport, "s", REPORT)


def test_an_answer_without_end_is_refused(origin: Origin, transport: Transport) -> None:
    origin.answer("POST", "/api/v1/report", Status(200, JSON))
    origin.misbehave("/api/v1/report", Endless())
    with pytest.raises(TrustError):
        server.report_session(transport, "s", REPORT)
