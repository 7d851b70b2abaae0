"""Signing in to the page with an OpenID provider, and out again; what a browser goes through on the way.

`GET /signin` sends it to the provider, which sends it back to `GET /signin/callback`, which gives it the
session's cookie and sends it to the page. There is no `next`: nobody is sent anywhere else.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

from flask import Blueprint, Response, redirect, request
from markupsafe import Markup

from agent_core.errors import NotAllowedError, NotFoundError, RelfleetError, UnreachableError, UsageError
from release_server import audit
from release_server.api import access, problems, services
from release_server.limits import RATE_LIMITED
from release_server.signin import sessions
from release_server.signin.flow import Attempt
from release_server.signin.rules import admit
from release_server.signin.settings import CALLBACK

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from release_server.api import Services
    from release_server.signin.provider import Provider
    from release_server.signin.rules import Identity
    from release_server.signin.settings import Oidc

log = logging.getLogger(__name__)
blueprint = Blueprint("signin", __name__)

ATTEMPT = "__Host-relfleet-attempt"
ATTEMPT_S = 600
"""As long as people may take at the provider."""
MOST_CODE = 4096
PAGE = Markup("""\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Sign-in · relfleet</title></head>
<body><h1>{what}</h1><p>{why}</p><p>Next: {then}</p>
<p><a href="{home}">Back to the page</a></p><p><code>{reason}</code></p></body></html>
""")


@blueprint.get("/signin")
def begin() -> Response:
    """Begin an attempt, and send the browser to the provider."""
    hub, provider, _ = _parts()
    attempt = Attempt.begin()
    response = cast("Response", redirect(provider.where(attempt, hub.clock()), 303))
    # Lax: the provider's site sends the browser back, and a Strict cookie would not come along.
    response.set_cookie(ATTEMPT, attempt.secret, ATTEMPT_S, secure=True, httponly=True, samesite="Lax")
    return response


@blueprint.get(CALLBACK)
def finish() -> Response:
    """Verify what the provider says of whoever comes back, and begin a session."""
    hub, provider, oidc = _parts()
    now = hub.clock()
    with hub.limits.counting_guesses(request.remote_addr, now):
        attempt = _attempt(oidc)
        claims = provider.redeem(attempt, _code(oidc), now)
    secret = _begin_session(hub, oidc, attempt, claims, now)
    response = cast("Response", redirect(f"{oidc.site}/", 303))
    response.set_cookie(access.COOKIE, secret, secure=True, httponly=True, samesite="Strict")
    response.delete_cookie(ATTEMPT, secure=True, httponly=True, samesite="Lax")
    return response


@blueprint.post("/signout")
def end() -> Response:
    """End the session that asks for it; the cookie is worth nothing from then on, wherever a copy is."""
    hub = services()
    now = hub.clock()
    person = access.whoever(hub, now)
    if not person.session_id:
        raise UsageError("this is a token, not a session", then=f"release token revoke {person.token_id}")
    with hub.sessions.write() as session:
        sessions.end(session, now, person.session_id, person.name)
    response = Response(status=204)
    response.delete_cookie(access.COOKIE, secure=True, httponly=True, samesite="Strict")
    return response


def _parts() -> tuple[Services, Provider, Oidc]:
    hub = services()
    if hub.provider is None:
        raise NotFoundError("nobody signs in like this here", why="no provider is set", then="use a token")
    return hub, hub.provider, hub.provider.oidc


def _attempt(oidc: Oidc) -> Attempt:
    """The attempt that this browser began, when the answer is one to it."""
    attempt, states = Attempt(request.cookies.get(ATTEMPT, "")), request.args.getlist("state")
    if not attempt.secret or len(states) != 1 or not attempt.is_answered_by(states[0]):
        raise NotAllowedError(
            "you are not signed in",
            why="this is no answer to a sign-in that this browser began within ten minutes",
            then=f"begin at {oidc.site}/",
            reason="signin-not-begun",
        )
    return attempt


def _code(oidc: Oidc) -> str:
    from release_server.signin.provider import refused, word

    if request.args.getlist("iss") not in ([], [oidc.issuer]):
        raise refused("another provider answered", "signin-issuer")
    codes = request.args.getlist("code")
    if "error" in request.args:
        raise refused(f"the provider says {word(request.args['error'])}", "signin-denied")
    if len(codes) != 1 or not 0 < len(codes[0]) <= MOST_CODE:
        raise refused("the provider sent no code", "signin-code")
    return codes[0]


def _begin_session(
    hub: Services, oidc: Oidc, attempt: Attempt, claims: Mapping[str, Any], now: datetime
) -> str:
    """The secret of a new session, for a person whom a rule admits."""
    subject = str(claims["sub"])
    hub.limits.take(hub.sessions, now, (hub.limits.signins, f"{oidc.issuer} {subject}"))
    identity = _admitted(hub, oidc, claims, now)
    with hub.sessions.write() as session:
        return sessions.begin(session, now, oidc, identity, attempt)


def _admitted(hub: Services, oidc: Oidc, claims: Mapping[str, Any], now: datetime) -> Identity:
    try:
        return admit(claims, oidc.rules, oidc.name_claim)
    except NotAllowedError as error:
        said = {"reason": error.reason, "provider": oidc.issuer}
        with hub.sessions.write() as session:
            audit.record(session, now, "server", "session.refuse", str(claims["sub"]), **said)
        raise


@blueprint.errorhandler(RelfleetError)
def _say(error: RelfleetError) -> Response:
    """A refusal, as a page: people see it, and no script is there to read a problem document."""
    if error.reason != RATE_LIMITED:  # whoever guesses writes no more lines than he may guess
        log.warning("a sign-in was refused: %s (%s)", error.why, error.reason)
    oidc = services().config.oidc
    page = PAGE.format(
        what=error.what,
        why=error.why,
        then=error.then,
        reason=error.reason,
        home=f"{oidc.site}/" if oidc else "/",
    )
    response = Response(page, problems.status_of(error), content_type="text/html; charset=utf-8")
    if isinstance(error, UnreachableError):
        response.headers["Retry-After"] = str(round(error.retry_after_s or problems.RETRY_AFTER_S))
    return response
