"""Speaks to the release server: JSON both ways, retries that stop, and every refusal as the right error."""

from __future__ import annotations

import random
import time
import uuid
from contextlib import closing
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import requests

from agent_core import clock
from agent_core.errors import (
    ConflictError,
    DiskError,
    MalformedError,
    NotAllowedError,
    NotFoundError,
    RelfleetError,
    TrustError,
    UnreachableError,
    UsageError,
)
from agent_core.retry_after import retry_after_s
from agent_core.wire import Problem, Reason

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

API = "/api/v1"
CONNECT_S = 10.0
READ_S = 60.0
TOTAL_S = 120.0
ATTEMPTS = 6
FIRST_WAIT_S = 0.5
MOST_WAIT_S = 20.0
OVERLOADED = frozenset({429, 500, 502, 503, 504})
NOT_DONE = frozenset({429, 503})
"""Answers that promise that nothing was done, so that even a POST may be sent again."""
REPEATABLE = frozenset({"GET", "HEAD", "PUT", "DELETE"})
SIGNED = tuple(f"{API}/{part}" for part in ("metadata/", "trust/", "uploads/", "proposals"))
"""Paths that take what keys or digests vouch for: what is refused there was not what it should be."""


class _Bearer(requests.auth.AuthBase):
    """Signs in with a token, or with nothing; either way it keeps `requests` from reading a .netrc."""

    def __init__(self, token: str | None) -> None:
        self.token = token

    def __call__(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.token:
            request.headers["Authorization"] = f"Bearer {self.token}"
        return request


class Client:
    """One server, one token. Certificates are always verified and redirects never followed.

    Args:
        url: the server's, without the API's path.
        token: None for what needs none.
        timeout_s: how long one call may take with all its retries; `TOTAL_S` when None.
        sleep, jitter: how to wait, and a random number in [0, 1); for tests.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout_s: float | None = None,
        attempts: int = ATTEMPTS,
        sleep: Callable[[float], None] = time.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        parts = urlsplit(url)
        if "@" in parts.netloc:  # which would take the token's place in each request, and be in every error
            raise UsageError(
                "the URL of the server has credentials in it", then="leave them out: the token says who asks"
            )
        if parts.scheme not in {"http", "https"} or not parts.hostname or parts.query or parts.fragment:
            raise UsageError(f"{url!r} is not the URL of a server", then="write it as https://HOST[:PORT]")
        self.url = url.rstrip("/")
        self.total_s = timeout_s or TOTAL_S
        self.attempts = attempts
        self.session = requests.Session()
        self.session.auth = _Bearer(token)
        self.session.headers["User-Agent"] = "relfleet-release"
        self._signed_in = bool(token)
        self._sleep = sleep
        self._jitter = jitter

    def close(self) -> None:
        """Let go of the connections."""
        self.session.close()

    def get(self, path: str, **params: Any) -> Any:
        """The JSON at an API path; parameters that are None are left out."""
        return self._json(self.call("GET", path, params=params))

    def items(self, path: str, **params: Any) -> list[dict[str, Any]]:
        """The entries of a list: of its first page where `limit` is given, else of all of them."""
        after: str | None = None
        everything: list[dict[str, Any]] = []
        seen: set[str | None] = set()
        while after not in seen:
            seen.add(after)
            found = self.get(path, **params, **({} if after is None else {"after": after}))
            entries = found.get("items") if isinstance(found, dict) else None
            if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
                raise _bad_answer(self.url, f"{path} is no list")
            everything += entries
            after = found.get("next") if "limit" not in params else None
        return everything

    def look(self, path: str) -> tuple[Any, str]:
        """The JSON at an API path and its edition, to be named by a change; empty where it has none."""
        response = self.call("GET", path)
        return self._json(response), response.headers.get("ETag", "")

    def post(self, path: str, body: Any = None, *, seen: str = "") -> Any:
        """Send JSON, or bytes as they are; with a key by which it is done once however often it is sent.

        Args:
            seen: of `look`; refused when it is another edition by now.
        """
        headers = {"Idempotency-Key": str(uuid.uuid4())} | ({"If-Match": seen} if seen else {})
        return self._json(self._send("POST", path, body, headers))

    def put(self, path: str, body: Any) -> Any:
        return self._json(self._send("PUT", path, body))

    def patch(self, path: str, body: Any) -> Any:
        return self._json(self._send("PATCH", path, body))

    def delete(self, path: str) -> Any:
        return self._json(self.call("DELETE", path))

    def download(self, path: str, length: int, sink: Callable[[bytes], Any], *, static: bool = False) -> None:
        """Hand the bytes at an API path to `sink`, piece by piece.

        Args:
            length: how many there may be; one more is refused before it is kept.
            static: the path is of a public file instead.

        Raises:
            TrustError: `length-mismatch`; there are more.
            UnreachableError: they stopped coming.
        """
        arrived = 0
        with closing(self.call("GET", path, static=static, stream=True)) as response:
            try:
                for chunk in response.iter_content(64 * 1024):
                    arrived += len(chunk)
                    if arrived > length:
                        why = f"it is longer than {length} bytes"
                        raise TrustError(f"{path} is refused", why=why, reason=Reason.LENGTH_MISMATCH)
                    sink(chunk)
            except requests.RequestException as error:
                raise self._no_answer(error) from error

    def _send(
        self, method: str, path: str, body: Any, key: Mapping[str, str] | None = None
    ) -> requests.Response:
        said: dict[str, Any] = {"repeatable": True if key else None, "headers": dict(key or {})}
        if isinstance(body, bytes):
            said["headers"]["Content-Type"] = "application/json"
            return self.call(method, path, data=body, **said)
        return self.call(method, path, json={} if body is None else body, **said)

    def call(
        self,
        method: str,
        path: str,
        *,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
        json: Any = None,
        repeatable: bool | None = None,
        accept: frozenset[int] = frozenset(),
        static: bool = False,
        stream: bool = False,
    ) -> requests.Response:
        """Make one call, again and again while that may help.

        Args:
            path: below the API, e.g. `/cohorts`.
            repeatable: sending it twice does no harm; by the method when None.
            accept: error statuses that the caller reads itself.
            static: the path is of a public file instead; no token is sent, and the body is left to stream.
            stream: leave the body to the caller, who reads no more of it than it should have.

        Raises:
            UnreachableError: no answer, or 429 and 5xx, to the last attempt or until the time was up.
            RelfleetError: the class that fits any other refusal, see `refusal`.
        """
        raw = static or stream
        again = method in REPEATABLE if repeatable is None else repeatable
        said = {key: value for key, value in (params or {}).items() if value is not None}
        until = clock.boot_s() + self.total_s
        for attempt in range(self.attempts):
            failure: RelfleetError
            try:
                response = self.session.request(
                    method,
                    f"{self.url}{'' if static else API}{path}",
                    params=said,
                    headers={**(headers or {}), **({"Accept-Encoding": "identity"} if raw else {})},
                    data=data,
                    json=json,
                    auth=_Bearer(None) if static else None,
                    stream=raw,
                    timeout=(CONNECT_S, max(1.0, min(READ_S, until - clock.boot_s()))),
                    allow_redirects=False,
                )
            except requests.RequestException as error:
                failure = self._no_answer(error)
                if not isinstance(failure, UnreachableError) or not (again or _was_not_sent(error)):
                    raise failure from error
            else:
                if response.status_code < 300 or response.status_code in accept:
                    return response
                failure = self.refusal(response)
                response.close()
                may_help = isinstance(failure, UnreachableError)
                if not may_help or not (again or response.status_code in NOT_DONE):
                    raise failure
            self._wait(failure, attempt, until)
        raise AssertionError("the last attempt raises")

    def _wait(self, failure: RelfleetError, attempt: int, until: float) -> None:
        """Wait before the next attempt, or raise the failure when there is none to make."""
        asked = failure.retry_after_s if isinstance(failure, UnreachableError) else None
        wait_s = min(MOST_WAIT_S, FIRST_WAIT_S * 2**attempt) * (0.5 + self._jitter() / 2)
        wait_s = max(wait_s, asked or 0.0)
        if attempt + 1 >= self.attempts or clock.boot_s() + wait_s >= until:
            raise failure
        self._sleep(wait_s)

    def _no_answer(self, error: requests.RequestException) -> RelfleetError:
        if isinstance(error, requests.exceptions.SSLError):
            return TrustError(
                f"the certificate of {self.url} is refused",
                why=str(error),
                then="check the URL; a certificate of your own authority goes into REQUESTS_CA_BUNDLE",
                reason="bad-certificate",
            )
        if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidProxyURL)):
            return UsageError(f"{self.url} cannot be called", why=str(error))
        why = "it did not answer in time" if isinstance(error, requests.Timeout) else _cause(error)
        return UnreachableError(
            f"{self.url} cannot be reached", why=why, then="check the URL and the network, then try again"
        )

    def refusal(self, response: requests.Response) -> RelfleetError:
        """What an answer other than 2xx means to the caller."""
        if response.status_code < 400:
            target = response.headers.get("Location", "elsewhere")
            return RelfleetError(
                f"{self.url} redirects",
                why=f"it points to {target}; redirects are not followed, a token could go astray",
                then="use the final URL as the server",
                reason="redirect",
            )
        problem = _problem(response)
        kind = _kind(response.status_code, problem.reason, urlsplit(response.url).path)
        if kind is UnreachableError:
            return UnreachableError(
                f"{self.url} cannot serve this now",
                why=": ".join(filter(None, (str(response.status_code), problem.title, problem.detail))),
                then=problem.then or "try again in a moment",
                reason=problem.reason,
                retry_after_s=retry_after_s(response.headers.get("Retry-After")),
            )
        then = problem.then
        if kind is NotAllowedError and not then:
            then = "ask for a token with the right role" if self._signed_in else "release login URL"
        return kind(problem.title, why=problem.detail, then=then, reason=problem.reason)

    def _json(self, response: requests.Response) -> Any:
        if response.status_code == 204 or not response.content:
            return None
        try:
            return response.json()
        except ValueError:
            raise _bad_answer(self.url, "it is not JSON") from None


def _bad_answer(url: str, why: str) -> RelfleetError:
    return RelfleetError(
        f"the answer of {url} cannot be read", why=why, then="check that the URL is that of a release server"
    )


def _was_not_sent(error: requests.RequestException) -> bool:
    """Whether no connection came about at all, so the server cannot have acted."""
    from urllib3.exceptions import NewConnectionError

    if isinstance(error, requests.ConnectTimeout):
        return True
    inner = error.args[0] if error.args else None
    return isinstance(getattr(inner, "reason", inner), NewConnectionError)


def _cause(error: requests.RequestException) -> str:
    """The last sentence of an error that wraps errors, which is the one that says what happened."""
    inner = error.args[0] if error.args else error
    reason = getattr(inner, "reason", None) or inner
    return str(reason).rpartition(": ")[2] or type(error).__name__


def _kind(status: int, reason: str, path: str) -> type[RelfleetError]:
    if status in OVERLOADED:
        return UnreachableError
    if status == 422 and reason != MalformedError.reason and path.startswith(SIGNED):
        return TrustError
    kinds: dict[int, type[RelfleetError]] = {
        400: MalformedError,
        401: NotAllowedError,
        403: NotAllowedError,
        404: NotFoundError,
        409: ConflictError,
        410: NotFoundError,
        412: ConflictError,
        413: MalformedError,
        415: MalformedError,
        422: UsageError,
        507: DiskError,
    }
    return kinds.get(status, RelfleetError)


def _problem(response: requests.Response) -> Problem:
    """The problem+json of an answer, or the nearest to it when something in between answered."""
    try:
        return Problem.from_json(response.json())
    except (ValueError, RelfleetError):
        reason = _kind(response.status_code, "", "").reason
        return Problem(
            response.status_code, response.reason or f"status {response.status_code}", reason=reason
        )
