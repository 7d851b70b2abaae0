"""Targets that wait for more signatures: propose, look, fetch, sign, withdraw."""

from __future__ import annotations

from typing import Any, Literal

from flask import Response, g, send_file
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from agent_core.errors import NotFoundError
from agent_core.wire import SHA256
from release_server import proposals, signer
from release_server.api import PREFIX, pages, services
from release_server.api.access import requires
from release_server.api.fleet_schemas import Because  # noqa: TC001 - read when a request comes
from release_server.api.people import SECURITY
from release_server.api.shapes import NumberPath
from release_server.api.trust import signed_body

blueprint = APIBlueprint(
    "proposals", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="proposals")], abp_security=SECURITY
)


class BlobPath(NumberPath):
    sha256: str = Field(pattern=f"^{SHA256.pattern}$")


class ProposalQuery(pages.PageQuery):
    state: Literal["open", "all"] = "open"
    limit: int = Field(proposals.MOST_LISTED, ge=1, le=proposals.MOST_LISTED)


class NewSignature(BaseModel):
    model_config = ConfigDict(extra="forbid")
    keyid: str = Field(pattern="^[0-9a-f]{1,128}$")
    sig: str = Field(pattern="^[0-9a-f]{1,4096}$")


@blueprint.get("/proposals")
@requires("reader")
def list_proposals(query: ProposalQuery) -> dict[str, Any]:
    """What waits for signatures, the newest first; or everything."""
    hub = services()
    with hub.sessions.read() as session:
        return pages.page(
            query,
            lambda most: proposals.list_proposals(
                session, hub.clock(), everything=query.state == "all", limit=most, after=query.number
            ),
            proposals.View.to_json,
            lambda view: view.row.id,
        )


@blueprint.post("/proposals")
@requires("releaser")
def make_proposal() -> tuple[dict[str, Any], int]:
    """Keep signed targets, as POST /metadata/targets takes them, until enough people have signed."""
    hub = services()
    body = signed_body(hub)
    online = signer.read_public(hub.config.trust)
    with hub.sessions.write() as session:
        view = proposals.propose(session, hub.blobs, body, now=hub.clock(), person=g.person, online=online)
        return view.to_json(), 201


@blueprint.get("/proposals/<id>")
@requires("reader")
def show_proposal(path: NumberPath) -> dict[str, Any]:
    """One proposal."""
    hub = services()
    with hub.sessions.read() as session:
        return proposals.show(session, hub.clock(), proposals.find(session, path.id)).to_json()


@blueprint.get("/proposals/<id>/metadata")
@requires("reader")
def fetch_proposal(path: NumberPath) -> Response:
    """The proposed targets with the signatures so far."""
    with services().sessions.read() as session:
        row = proposals.find(session, path.id)
    return Response(row.body, content_type="application/json")


@blueprint.get("/proposals/<id>/blobs/<sha256>")
@requires("releaser")
def fetch_blob(path: BlobPath) -> Response:
    """A bundle or an index that the proposal lists, for who is to sign it."""
    hub = services()
    with hub.sessions.read() as session:
        listed = proposals.listed_blobs(proposals.find(session, path.id))
    if path.sha256 not in listed or hub.blobs.length(path.sha256) is None:
        raise NotFoundError(f"proposal {path.id} lists no such blob")
    return send_file(hub.blobs.path(path.sha256), mimetype="application/octet-stream")


@blueprint.post("/proposals/<id>/signatures")
@requires("releaser")
def sign_proposal(path: NumberPath, body: NewSignature) -> dict[str, Any]:
    """Add a signature; the last one that is needed publishes the targets."""
    hub = services()
    online = signer.read_public(hub.config.trust)
    with hub.sessions.write() as session:
        view = proposals.add_signature(
            session,
            hub.blobs,
            path.id,
            body.model_dump(),
            now=hub.clock(),
            person=g.person,
            online=online,
        )
        return view.to_json()


@blueprint.post("/proposals/<id>/withdraw")
@requires("releaser")
def withdraw_proposal(path: NumberPath, body: Because) -> dict[str, Any]:
    """Take a proposal back."""
    hub = services()
    with hub.sessions.write() as session:
        return proposals.withdraw(session, hub.clock(), g.person, path.id, body.reason).to_json()
