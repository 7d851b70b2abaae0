"""`Idempotency-Key`: a POST that is sent again, because its answer was lost, is done once and answered alike.

The answer is kept in the transaction of the deed: both are there, or neither. Since one transaction writes at
a time (docs/decisions/0019), of two that come at once the second waits, and finds the first one's answer.
"""

from __future__ import annotations

import re
import zlib
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from flask import Response, current_app, g, json, request

from agent_core.errors import MalformedError, UsageError
from release_server.api.contract import PLAIN_POSTS, READ_BY_HAND, route_of
from release_server.models import KeptAnswer
from release_server.retention.settings import ANSWERS

if TYPE_CHECKING:
    from collections.abc import Callable

    from release_server.api import Services

HEADER = "Idempotency-Key"
REPLAYED = "Idempotency-Replayed"
FORM = re.compile(r"[!-~]{1,128}")
HEADERS = ("Content-Type", "ETag")
"""What of an answer's headers is part of it."""


def answer(hub: Services, who: str, view: Callable[[], Any]) -> Any:
    """Carry out the view of this request, or answer as it was answered the first time.

    A refusal is not kept: nothing was done, so the same request may do it later.

    Args:
        who: whose request it is; two people's keys have nothing to do with each other.

    Raises:
        MalformedError: the key has another form.
        UsageError: `key-reused`; the key came with another request before.
    """
    key = request.headers.get(HEADER)
    if key is None or request.method != "POST" or route_of(request) in PLAIN_POSTS:
        return view()
    if not FORM.fullmatch(key):
        raise MalformedError(f"{HEADER} cannot be used", why="it has 1 to 128 visible ASCII characters")
    asked = _digest(hub)
    with hub.sessions.together() as session:
        now = hub.clock()
        kept = session.get(KeptAnswer, (who, key))
        if kept is not None and kept.at > now - ANSWERS:
            return _again(kept, asked)
        response: Response = current_app.make_response(view())
        if kept is not None:
            session.delete(kept)
            session.flush()
        session.add(_kept(response, asked, person=who, key=key, at=now))
        return response


def _digest(hub: Services) -> str:
    """What was asked: another path, edition or body is another request. Reads the body, before any lock."""
    if route_of(request) in READ_BY_HAND:
        request.max_content_length = hub.config.metadata_limit
    said = (request.method, request.full_path, request.headers.get("If-Match", ""))
    return sha256(json.dumps(said).encode() + request.get_data(cache=True)).hexdigest()


def _again(kept: KeptAnswer, asked: str) -> Response:
    if kept.digest != asked:
        raise UsageError(
            f"this {HEADER} came with another request before",
            why="a key stands for one request: its path, its If-Match and its body",
            then="send a new key with a new request",
            reason="key-reused",
        )
    return Response(zlib.decompress(kept.body), kept.status, {**kept.headers, REPLAYED: "true"})


def _kept(response: Response, asked: str, **whose: Any) -> KeptAnswer:
    return KeptAnswer(
        digest=asked,
        status=response.status_code,
        headers={name: response.headers[name] for name in HEADERS if name in response.headers},
        body=zlib.compress(_without_secrets(response)),
        **whose,
    )


def _without_secrets(response: Response) -> bytes:
    """The body as it is kept: a view names in `g.secrets` the fields that are shown once and kept nowhere."""
    secrets = g.get("secrets", ())
    if not secrets:
        return response.get_data()
    return json.dumps({**response.get_json(), **dict.fromkeys(secrets)}).encode()
