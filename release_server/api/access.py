"""This module lets a request in: who sent it, by its token or its session, and whether they may."""

from __future__ import annotations

from functools import partial, wraps
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

from flask import g, request
from flask_openapi3.request import validate_request

from agent_core.errors import NotAllowedError
from release_server.api import once, services
from release_server.auth import check_session, check_token, touch
from release_server.signin.settings import origin_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from release_server.api import Services
    from release_server.auth import Person
    from release_server.signin.settings import Oidc

P = ParamSpec("P")
R = TypeVar("R")

COOKIE = "__Host-relfleet"
"""Of the page's session. The prefix has browsers refuse it from other hosts, paths and plain HTTP."""
READS = frozenset({"GET", "HEAD", "OPTIONS"})


def bearer() -> str:
    """The token of this request.

    Raises:
        NotAllowedError: reason `not-signed-in`.
    """
    scheme, _, text = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not text.strip():
        raise NotAllowedError(
            "not signed in",
            why="the request has no bearer token",
            then="release login",
            reason="not-signed-in",
        )
    return text.strip()


def cookie() -> str:
    """The secret of the page's session that this request carries; empty for none."""
    return request.cookies.get(COOKIE, "")


def check_origin(oidc: Oidc) -> None:
    """Refuse a change that a browser sends with its cookie, but not from this server's own page.

    Browsers say where a request that is no GET comes from, and no page can say it otherwise. One that says
    nothing is refused too.

    Raises:
        NotAllowedError: `cross-site`.
    """
    if request.method in READS or request.headers.get("Origin") == origin_of(oidc.site):
        return
    raise NotAllowedError(
        "another page asked for this",
        why="the request carries a session, and its Origin is not this server's",
        then=f"use the page at {oidc.site}, or a token",
        reason="cross-site",
    )


def requires(*roles: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a view answer only those whose token has one of these roles, and put them into `g.person`.

    The token is checked before the request's body and query are: strangers learn nothing of their shape.
    """

    def decorate(view: Callable[P, R]) -> Callable[P, R]:
        checked: Callable[P, R] = validate_request()(view)  # type: ignore[no-untyped-call]

        @wraps(checked)
        def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
            g.person = _admit(roles)
            return cast("R", once.answer(services(), g.person.name, partial(checked, *args, **kwargs)))

        return guarded

    return decorate


def whoever(hub: Services, now: datetime) -> Person:
    """Who sent this request, by its token, or where it has none by its session.

    Raises:
        NotAllowedError: nobody who is known, or `cross-site`.
    """
    oidc, secret = hub.config.oidc, cookie()
    by_session = bool(secret) and "Authorization" not in request.headers
    with hub.limits.counting_strangers(request.remote_addr, now), hub.sessions.read() as session:
        if not by_session:
            return check_token(session, bearer(), now)
        person = check_session(session, secret, oidc, now)
    if oidc is not None:
        check_origin(oidc)
    return person


def _admit(roles: Sequence[str]) -> Person:
    hub = services()
    now = hub.clock()
    person = whoever(hub, now)
    if not person.may(*roles):
        raise NotAllowedError(
            f"{person.name} may not do this",
            why=f"it needs the role {' or '.join(roles)}, and yours is {person.role}",
            reason="scope",
        )
    if person.touch_due:
        with hub.sessions.write() as session:
            touch(session, person, now)
    return person
