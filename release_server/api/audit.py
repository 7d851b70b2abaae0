"""The audit log, newest first."""

from __future__ import annotations

from typing import Any

from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from agent_core.clock import iso, parse_iso
from agent_core.errors import MalformedError
from release_server import audit
from release_server.api import PREFIX, services
from release_server.api.people import SECURITY
from release_server.auth import requires

blueprint = APIBlueprint(
    "audit", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="audit")], abp_security=SECURITY
)


class AuditQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")
    since: str | None = None
    actor: str | None = Field(None, max_length=128)
    limit: int = Field(100, ge=1, le=audit.MOST)


@blueprint.get("/audit")
@requires("reader")
def list_entries(query: AuditQuery) -> dict[str, Any]:
    """Who did what to what."""
    try:
        since = parse_iso(query.since) if query.since else None
    except ValueError:
        raise MalformedError("since is not a time", why="it must look like 2026-01-31T12:00:00Z") from None
    with services().sessions.read() as session:
        found = audit.entries(session, since=since, actor=query.actor, limit=query.limit)
        return {
            "items": [
                {
                    "id": entry.id,
                    "at": iso(entry.at),
                    "actor": entry.actor,
                    "action": entry.action,
                    "subject": entry.subject,
                    "detail": entry.detail,
                }
                for entry in found
            ]
        }
