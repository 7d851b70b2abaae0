"""The page operators look at: three files, no build step, nothing from elsewhere.

The page shows nothing by itself: it asks the API with the token of whoever looks. The token reaches it in the
URL's fragment, which browsers never send.
"""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

from flask import Blueprint, Response, request

blueprint = Blueprint("dashboard", __name__)

STATIC = Path(__file__).parent / "static"
TYPES = {
    "index.html": "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@blueprint.get("/")
def page() -> Response:
    return _send("index.html")


@blueprint.get("/dashboard/page.css")
def style() -> Response:
    return _send("page.css")


@blueprint.get("/dashboard/page.js")
def script() -> Response:
    return _send("page.js")


def _send(name: str) -> Response:
    """One file of the page; a browser that has it already is told so."""
    content, digest = _load(name)
    response = Response(content, content_type=TYPES[name])
    response.headers["Content-Security-Policy"] = POLICY
    response.headers["Cache-Control"] = "no-cache"
    response.set_etag(digest)
    return response.make_conditional(request)  # type: ignore[return-value]


@cache
def _load(name: str) -> tuple[bytes, str]:
    # By content: files of two wheels may agree in size and time.
    content = (STATIC / name).read_bytes()
    return content, sha256(content).hexdigest()
