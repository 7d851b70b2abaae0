"""The device's side of the API: enrolment and reports; problem+json becomes the error a caller can act on."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from agent_core import disk, wire
from agent_core.errors import (
    ConflictError,
    MalformedError,
    NotAllowedError,
    NotFoundError,
    RelfleetError,
    TrustError,
    UsageError,
)
from agent_core.wire import Reason

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from agent_core.layout import Layout
    from updater.identity import Identity
    from updater.transport import Answer, Transport

ADVICE = "get another token: release token create --role enroller"
ENROLL_PATH = "/api/v1/enroll"
REPORT_PATH = "/api/v1/report"
ROTATE_PATH = "/api/v1/rotate-key"
LEASE_PATH = "/api/v1/lease"
SHARE_PATH = "/api/v1/share"
MAX_ANSWER = 64 * 1024
DEADLINE_S = 30.0

ERRORS: Mapping[int, type[RelfleetError]] = {
    400: MalformedError,
    401: NotAllowedError,
    403: NotAllowedError,
    404: NotFoundError,
    409: ConflictError,
    413: MalformedError,
    415: MalformedError,
    422: MalformedError,
}


def enroll(transport: Transport, token: str, request: wire.EnrollRequest) -> wire.EnrollAnswer:
    """Trade an enrolment token for an identity.

    Raises:
        NotAllowedError: the token is unknown, used up, expired or of another scope.
        ConflictError, MalformedError: the server does not take this name or these labels.
        UnreachableError, TrustError: as of `Transport.get`.
    """
    try:
        answer = _post(transport, ENROLL_PATH, _encode(request.to_json()), {"Authorization": _bearer(token)})
    except NotAllowedError as error:
        if error.reason == "scope" or error.reason.startswith("token-"):
            error.then = ADVICE  # the server advises people, who sign in
        raise
    return wire.EnrollAnswer.from_json(answer)


def report_signed(
    transport: Transport, identity: Identity, paths: Layout, report: wire.Report
) -> wire.ReportAnswer:
    """Send a report under this host's key; the only kind that may carry transitions, and that buys a session.

    Raises:
        NotAllowedError: the server does not know this key or agent, or has seen the counter.
        UnreachableError, TrustError: as of `Transport.get`.
    """
    answer = _post_signed(transport, identity, paths, REPORT_PATH, _encode(report.to_json()))
    return wire.ReportAnswer.from_json(answer)


def rotate_key(transport: Transport, identity: Identity, paths: Layout) -> str:
    """Give this host another key. Done again after a cut, it goes on with the key it had made.

    Returns:
        The new public half.

    Raises:
        NotAllowedError: the server knows neither of the keys, or has retired this agent.
        UnreachableError, TrustError: as of `Transport.get`; the next request tells whether it was heard.
    """
    from updater.identity import make_next_key, sign, take_next_key

    public_key = make_next_key(paths)
    proof = sign(paths, wire.key_text(identity.agent_id, public_key), paths.next_key).hex()
    body = _encode(wire.KeyChange(public_key, proof).to_json())
    _post_signed(transport, identity, paths, ROTATE_PATH, body)
    take_next_key(paths)
    return public_key


def ask_lease(
    transport: Transport, identity: Identity, paths: Layout, request: wire.LeaseRequest
) -> wire.LeaseAnswer:
    """Ask for leave to activate a version; errors as of `report_signed`."""
    answer = _post_signed(transport, identity, paths, LEASE_PATH, _encode(request.to_json()))
    return wire.LeaseAnswer.from_json(answer)


def ask_share(
    transport: Transport, identity: Identity, paths: Layout, request: wire.ShareRequest
) -> wire.ShareAnswer:
    """Ask how fast to download, or give that back; errors as of `report_signed`."""
    answer = _post_signed(transport, identity, paths, SHARE_PATH, _encode(request.to_json()))
    return wire.ShareAnswer.from_json(answer)


def _post_signed(transport: Transport, identity: Identity, paths: Layout, path: str, body: bytes) -> Any:
    """Post under this host's key; after a change of it that was cut, under whichever the server knows."""
    # Late: signing loads `cryptography`, which the resident process never does.
    from updater.identity import take_next_key

    try:
        return _post(transport, path, body, _signature(identity, paths, path, body, paths.key))
    except NotAllowedError as error:
        if error.reason != Reason.BAD_SIGNATURE or not disk.exists(paths.next_key):
            raise
    answer = _post(transport, path, body, _signature(identity, paths, path, body, paths.next_key))
    take_next_key(paths)
    return answer


def _signature(identity: Identity, paths: Layout, path: str, body: bytes, key: Path) -> dict[str, str]:
    from updater.identity import next_counter, sign

    counter = next_counter(paths)
    text = wire.signed_text("POST", path, sha256(body).hexdigest(), counter)
    return {
        wire.HEADER_AGENT: identity.agent_id,
        wire.HEADER_COUNTER: str(counter),
        wire.HEADER_SIGNATURE: sign(paths, text, key).hex(),
    }


def report_session(transport: Transport, session: str, report: wire.Report) -> wire.ReportAnswer:
    """Send a heartbeat under a session token; standard library only.

    Raises:
        NotAllowedError: the session is over; `report_signed` buys a new one.
        UsageError: the report carries transitions, which must be signed.
        UnreachableError, TrustError: as of `Transport.get`.
    """
    if report.transitions:
        raise UsageError("transitions are reported signed", then="use report_signed")
    headers = {"Authorization": _bearer(session), wire.HEADER_AGENT: report.agent_id}
    return wire.ReportAnswer.from_json(_post(transport, REPORT_PATH, _encode(report.to_json()), headers))


def _post(transport: Transport, path: str, body: bytes, headers: Mapping[str, str]) -> Any:
    sent = {"Content-Type": "application/json", "Accept": "application/json", **headers}
    answer = transport.post(path, body, sent, max_length=MAX_ANSWER, deadline_s=DEADLINE_S)
    if answer.status not in (200, 201, 202):
        raise problem(path, answer)
    return _decode(path, answer.body)


def problem(path: str, answer: Answer) -> RelfleetError:
    """The error that a 4xx answer is; `problem+json` says why and what next, others only the status."""
    kind = ERRORS.get(answer.status, RelfleetError)
    if answer.headers.get("content-type", "").split(";")[0].strip().lower() == "application/problem+json":
        try:
            told = wire.Problem.from_json(_decode(path, answer.body))
        except RelfleetError:
            pass
        else:
            return kind(told.title, why=told.detail, then=told.then, reason=told.reason)
    return kind(f"the server refused {path}", why=f"it answered {answer.status}")


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":"), sort_keys=True).encode()


def _decode(path: str, body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise TrustError(
            f"the answer to {path} is refused", why="it is no JSON", reason=Reason.BAD_ANSWER
        ) from error


def _bearer(token: str) -> str:
    token = token.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(
            "this is no token", then="give the token as it was printed, from a file or standard input"
        )
    return f"Bearer {token}"
