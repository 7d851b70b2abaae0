"""Errors of the API as RFC 9457 `application/problem+json`: what, why, and what to do next."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from flask import Response, json
from flask.json.provider import DefaultJSONProvider
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from agent_core import errors
from agent_core.wire import Problem
from release_server.api.editions import STALE
from release_server.limits import RATE_LIMITED

if TYPE_CHECKING:
    from flask import Flask
    from pydantic import ValidationError

log = logging.getLogger(__name__)

CONTENT_TYPE = "application/problem+json"
STATUS: tuple[tuple[type[errors.RelfleetError], int], ...] = (
    (errors.MalformedError, 400),
    (errors.UsageError, 422),
    (errors.TrustError, 422),
    (errors.NotAllowedError, 403),
    (errors.NotFoundError, 404),
    (errors.ConflictError, 409),
    (errors.UnreachableError, 503),
    (errors.DiskError, 507),
)
NOT_SIGNED_IN = frozenset(
    {
        "not-signed-in",
        "token-unknown",
        "token-revoked",
        "token-expired",
        "token-used-up",
        "session-unknown",
        "session-ended",
        "session-expired",
        "session-idle",
        "session-unmapped",
    }
)
"""Reasons that another token, or signing in, would cure: 401 instead of 403."""
RETRY_AFTER_S = 5


def status_of(error: errors.RelfleetError) -> int:
    if error.reason in NOT_SIGNED_IN:
        return 401
    if error.reason == STALE:
        return 412
    if error.reason == RATE_LIMITED:
        return 429
    return next((status for kind, status in STATUS if isinstance(error, kind)), 500)


def answer(problem: Problem, headers: dict[str, str] | None = None) -> Response:
    """The response that carries one problem."""
    response = Response(json.dumps(problem.to_json()), problem.status, content_type=CONTENT_TYPE)
    response.headers.update(headers or {})
    if problem.status == 401:
        response.headers["WWW-Authenticate"] = 'Bearer realm="relfleet"'
    return response


def answer_error(error: errors.RelfleetError) -> Response:
    """The response to an error of ours."""
    headers = {}
    if isinstance(error, errors.UnreachableError):
        headers["Retry-After"] = str(round(error.retry_after_s or RETRY_AFTER_S))
    return answer(Problem(status_of(error), error.what, error.why, error.reason, error.then), headers)


def first_fault(error: ValidationError) -> tuple[str, str]:
    """Where a body or query is of the wrong shape, and why; never its values.

    Of several faults a field that is unknown comes first: it is what makes a misspelt one seem missing.
    """
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = min(found, key=lambda fault: fault["type"] != "extra_forbidden")
    return ".".join(str(step) for step in first["loc"]) or "body", first["msg"]


def answer_invalid(error: ValidationError) -> Response:
    """The response to a body or query of the wrong shape."""
    place, why = first_fault(error)
    return answer(Problem(422, f"{place} is not acceptable", why, errors.MalformedError.reason))


def _answer_http(error: HTTPException) -> Response:
    if error.response is not None:  # made by `abort(response)`: it is a problem already
        return error.response  # type: ignore[return-value]
    reason = {404: "not-found", 405: "usage", 413: "too-large", 415: "malformed", 400: "malformed"}
    detail = "" if error.code == 404 else error.description or ""
    status = error.code or 500
    headers = {name: value for name, value in error.get_headers() if name in ("Allow", "Retry-After")}
    return answer(Problem(status, error.name, detail, reason.get(status, "failed")), headers)


def _answer_busy(error: Exception) -> Response:
    # The driver's own words only: SQLAlchemy's would show the statement's values.
    log.warning("the database is busy or away: %s", getattr(error, "orig", None) or type(error).__name__)
    return answer(
        Problem(503, "the database is busy", "", "overloaded", "try again"),
        {"Retry-After": str(RETRY_AFTER_S)},
    )


def _answer_unexpected(error: Exception) -> Response:
    log.error("a view failed", exc_info=error)
    return answer(Problem(500, "the server made a mistake", "it is in the server's log", "internal"))


class ShallowJSON(DefaultJSONProvider):
    """JSON from outside: nested deeper than it can be read, it is no JSON, and no mistake of the server's."""

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        try:
            return super().loads(s, **kwargs)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None


def install(app: Flask) -> None:
    """Answer every error of `app` as a problem; a client never sees a stack trace."""
    app.json = ShallowJSON(app)
    app.register_error_handler(errors.RelfleetError, answer_error)
    app.register_error_handler(HTTPException, _answer_http)
    app.register_error_handler(OperationalError, _answer_busy)
    app.register_error_handler(PoolTimeoutError, _answer_busy)
    app.register_error_handler(Exception, _answer_unexpected)


def too_large(most: int) -> RequestEntityTooLarge:
    """What to raise for a body over its limit."""
    return RequestEntityTooLarge(f"the body may have at most {most} bytes")
