"""The audit log: newest first for people, oldest first for whoever checks that it is whole."""

from __future__ import annotations

from typing import Any

from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from release_server import audit
from release_server.api import PREFIX, pages, services
from release_server.api.access import requires
from release_server.api.fleet_schemas import moment
from release_server.api.people import SECURITY

blueprint = APIBlueprint(
    "audit", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="audit")], abp_security=SECURITY
)


class AuditQuery(pages.PageQuery):
    since: str | None = Field(None, max_length=32)
    until: str | None = Field(None, max_length=32)
    actor: str | None = Field(None, max_length=128)
    action: str | None = Field(None, max_length=64)
    subject: str | None = Field(None, max_length=256)
    limit: int = Field(100, ge=1, le=audit.MOST)


@blueprint.get("/audit")
@requires("reader")
def list_entries(query: AuditQuery) -> dict[str, Any]:
    """Who did what to what, the newest first."""
    wanted = audit.Wanted(
        since=moment(query.since, "since"),
        until=moment(query.until, "until"),
        actor=query.actor,
        action=query.action,
        subject=query.subject,
    )
    with services().sessions.read() as session:
        return pages.page(
            query,
            lambda most: audit.entries(session, wanted, limit=most, after=query.number),
            audit.said,
            lambda entry: entry.id,
        )


class ChainQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")
    after: int = Field(0, ge=0, le=pages.LARGEST_ID)
    limit: int = Field(audit.MOST, ge=1, le=audit.MOST)


@blueprint.get("/audit/chain")
@requires("reader")
def read_chain(query: ChainQuery) -> dict[str, Any]:
    """The oldest entries behind `after`, with their hashes, and the head; `next` is null at the end."""
    with services().sessions.read() as session:
        found, head = audit.stretch(session, after=query.after, limit=query.limit)
        following = found[-1].id if found and found[-1].id < head.id else None
        return {"items": [audit.said(entry) for entry in found], "head": str(head), "next": following}


@blueprint.get("/audit/verify")
@requires("reader")
def verify_chain() -> dict[str, Any]:
    """Check every entry here and now. Whoever does not believe the server checks `/audit/chain` at home."""
    with services().sessions.read() as session:
        return {"head": str(audit.verify(session))}
