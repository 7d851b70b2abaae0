"""The API's document, completed: which answers a route may give, and what the bodies read by hand are.

Routes declare what they take; what they may answer is the same for nearly all of them, so it is said once.
`tests/release_server/api/test_contract.py` holds the application to it with generated requests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from release_server.api import PREFIX
from release_server.api.problems import CONTENT_TYPE

if TYPE_CHECKING:
    from flask import Request

REFUSALS = {
    "400": "it has no form that can be read",
    "401": "nobody who may ask is named",
    "403": "not with this role",
    "404": "there is no such thing",
    "409": "it was changed meanwhile, or it exists",
    "412": "it is another edition by now than `If-Match` says",
    "413": "it is larger than the limit",
    "415": "the body is of another type",
    "422": "it is understood and refused",
    "429": "too often; `Retry-After` says when",
    "503": "not now; `Retry-After` says when",
    "507": "no room on the server's disk",
}
PROBLEM: dict[str, Any] = {
    "type": "object",
    "description": "RFC 9457, with a stable `reason` and what to do next",
    "required": ["title", "status", "reason"],
    "properties": {
        "title": {"type": "string"},
        "status": {"type": "integer", "minimum": 400, "maximum": 599},
        "detail": {"type": "string"},
        "reason": {"type": "string", "pattern": "^[a-z0-9-]+$"},
        "then": {"type": "string"},
    },
}
OTHER_SUCCESS = {
    ("post", "/products"): "201",
    ("post", "/tokens"): "201",
    ("post", "/cohorts"): "201",
    ("post", "/rollouts"): "201",
    ("post", "/proposals"): "201",
    ("post", "/webhooks"): "201",
    ("post", "/webhooks/{id}/test"): "202",
    ("post", "/metadata/targets"): "202",
    ("put", "/trust/root"): "202",
    ("put", "/trust/ceremony"): "202",
    ("patch", "/uploads/{sha256}"): "204",
    ("delete", "/tokens/{id}"): "204",
    ("delete", "/sessions/{id}"): "204",
    ("delete", "/webhooks/{id}"): "204",
    ("delete", "/cohorts/{product}/{name}"): "204",
}
"""Routes whose success is not 200 and that do not declare it themselves."""
READ_BY_HAND = {
    ("post", "/enroll"): "application/json",
    ("post", "/report"): "application/json",
    ("post", "/rotate-key"): "application/json",
    ("post", "/metadata/targets"): "application/json",
    ("post", "/proposals"): "application/json",
    ("put", "/trust/root"): "application/json",
    ("put", "/trust/ceremony"): "application/json",
    ("patch", "/uploads/{sha256}"): "application/octet-stream",
}
"""Routes that read their body themselves: its bytes are what is signed, or there are too many of them."""
PLAIN_POSTS = frozenset(
    {
        ("post", "/enroll"),
        ("post", "/report"),
        ("post", "/lease"),
        ("post", "/share"),
        ("post", "/rotate-key"),
        ("post", "/rollouts/rehearse"),
    }
)
"""POSTs without an `Idempotency-Key`: agents number what they say or prove it by their key, and a rehearsal
changes nothing."""
IDEMPOTENCY_KEY: dict[str, Any] = {
    "name": "Idempotency-Key",
    "in": "header",
    "required": False,
    "description": "chosen by the sender, new for each request: sent again with the same key within 24 hours "
    "it is answered as the first time (`Idempotency-Replayed: true`; secrets are null) and done once. The "
    "same key with another path, `If-Match` or body is refused (422, `key-reused`). A refusal is not kept.",
    "schema": {"type": "string", "minLength": 1, "maxLength": 128, "pattern": "^[!-~]+$"},
}
CONDITIONAL = ("/agents/{id}", "/cohorts/{product}/{name}", "/rollouts/{id}")
"""What has an ETag; whatever changes it takes `If-Match`."""
IF_MATCH: dict[str, Any] = {
    "name": "If-Match",
    "in": "header",
    "required": False,
    "description": "the ETag of what was looked at; refused with 412 when it has changed since",
    "schema": {"type": "string", "maxLength": 256},
}
BYTES = frozenset({"/proposals/{id}/blobs/{sha256}"})


def route_of(request: Request) -> tuple[str, str]:
    """Method and route of a request; as the tables here name it where the route has no arguments."""
    rule = request.url_rule.rule if request.url_rule else ""
    return request.method.lower(), rule.removeprefix(PREFIX)


def complete(document: dict[str, Any]) -> dict[str, Any]:
    """Say in an OpenAPI document what every route may answer; what a route declares itself stays.

    Args:
        document: as the routes make it; changed in place.
    """
    document["components"].setdefault("schemas", {})["Problem"] = PROBLEM
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(operation, (method, path.removeprefix(PREFIX)))
    return document


def _complete(operation: dict[str, Any], route: tuple[str, str]) -> None:
    declared = {code: said for code, said in operation.get("responses", {}).items() if code[0] in "123"}
    operation["responses"] = {
        **(declared or _success(route)),
        **{code: _refusal(why) for code, why in REFUSALS.items()},
    }
    if route[0] != "get" and route[1].startswith(CONDITIONAL):
        operation["parameters"] = [*operation.get("parameters", ()), IF_MATCH]
    if route[0] == "post" and route not in PLAIN_POSTS:
        operation["parameters"] = [*operation.get("parameters", ()), IDEMPOTENCY_KEY]
    if route in READ_BY_HAND and "requestBody" not in operation:
        kind = READ_BY_HAND[route]
        schema = {"type": "object"} if kind == "application/json" else {}
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": schema}}}


def _success(route: tuple[str, str]) -> dict[str, Any]:
    code = OTHER_SUCCESS.get(route, "200")
    if code == "204":
        return {code: {"description": "done"}}
    if route[1] in BYTES:
        return {code: {"description": "the bytes", "content": {"application/octet-stream": {"schema": {}}}}}
    return {
        code: {"description": "done", "content": {"application/json": {"schema": {"type": "object"}}}},
    }


def _refusal(why: str) -> dict[str, Any]:
    return {
        "description": why,
        "content": {CONTENT_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
