"""The headers that every answer carries, whoever made it: page, API, file or refusal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Start = Callable[..., Any]
    Application = Callable[[dict[str, Any], Start], Iterable[bytes]]

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
TLS_ONLY = {"Strict-Transport-Security": "max-age=31536000"}
"""Said only where the request came by TLS: a browser that heard it by HTTP would have to ignore it."""


class SafeHeaders:
    """Adds what an answer of `app` lacks of `HEADERS`; what it says itself stays, as the page's does."""

    def __init__(self, app: Application) -> None:
        self.app = app

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        wanted = HEADERS | (TLS_ONLY if environ.get("wsgi.url_scheme") == "https" else {})

        def start_safely(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            said = {name.lower() for name, _ in headers}
            missing = [entry for entry in wanted.items() if entry[0].lower() not in said]
            return start(status, [*headers, *missing], *rest)

        return self.app(environ, start_safely)
