"""Sessions of people who signed in with the provider: who is in, and out with whom."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import Field

from agent_core.clock import iso
from release_server.api import PREFIX, pages, services
from release_server.api.access import requires
from release_server.api.people import SECURITY
from release_server.api.shapes import NumberPath, when
from release_server.signin import sessions

if TYPE_CHECKING:
    from release_server.models import PersonSession

blueprint = APIBlueprint("sessions", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="sessions")])


class SessionQuery(pages.PageQuery):
    name: str | None = Field(None, max_length=128)


def render(row: PersonSession) -> dict[str, Any]:
    """A session as people see it; never its hashes."""
    return {
        "id": row.id,
        "name": row.name,
        "provider": row.issuer,
        "subject": row.subject,
        "rule": row.rule,
        "created_at": iso(row.created_at),
        "used_at": iso(row.used_at),
        "expires_at": iso(row.expires_at),
        "ended_at": when(row.ended_at),
        "ended_by": row.ended_by,
    }


@blueprint.get("/signin")
def how() -> dict[str, Any]:
    """With whom people may sign in at the page: the provider's name for itself, or null for tokens only."""
    oidc = services().config.oidc
    return {"provider": None if oidc is None else oidc.issuer}


@blueprint.get("/sessions", security=SECURITY)
@requires("admin")
def list_sessions(query: SessionQuery) -> dict[str, Any]:
    """Who has signed in with the provider, but for sessions that are past their date."""
    hub = services()
    with hub.sessions.read() as session:
        return pages.page(
            query,
            lambda most: sessions.list_all(
                session, hub.clock(), name=query.name, limit=most, after=query.number or 0
            ),
            render,
            lambda row: row.id,
        )


@blueprint.delete("/sessions/<int:id>", security=SECURITY)
@requires("admin")
def end_session(path: NumberPath) -> tuple[str, int]:
    """End a session; its next request is refused."""
    hub = services()
    with hub.sessions.write() as session:
        sessions.end(session, hub.clock(), path.id, g.person.name)
    return "", 204
