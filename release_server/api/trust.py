"""The keys: the server's public online keys for a ceremony, and the root that the ceremony made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import g, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, ValidationError

from agent_core.errors import MalformedError
from keys.roles import ROOT, TARGETS
from release_server import acceptance, repository, signer
from release_server.api import PREFIX, problems, services
from release_server.api.access import requires
from release_server.api.people import SECURITY

if TYPE_CHECKING:
    from release_server.api import Services

blueprint = APIBlueprint(
    "trust", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="trust")], abp_security=SECURITY
)


@blueprint.get("/trust")
@requires("reader")
def show_trust() -> dict[str, Any]:
    """The public online keys, and which root and targets the server has."""
    hub = services()
    online = signer.read_public(hub.config.trust)
    with hub.sessions.read() as session:
        return {
            "online": online.to_json(),
            "upcoming": online.upcoming.to_json() if online.upcoming else None,
            "root_version": repository.newest_version(session, ROOT),
            "targets_version": repository.newest_version(session, TARGETS),
        }


@blueprint.put("/trust/root")
@requires("admin")
def put_root() -> tuple[dict[str, Any], int]:
    """Trust the first root, or the next one."""
    hub = services()
    body = signed_body(hub)
    online = signer.read_public(hub.config.trust)
    with hub.sessions.write() as session:
        version = acceptance.accept_root(session, body, now=hub.clock(), actor=g.person.name, online=online)
    return {"version": version}, 202


class CeremonyBody(BaseModel):
    """A root and targets as they were signed, each as the text of its file."""

    model_config = ConfigDict(extra="forbid")
    root: str
    targets: str


@blueprint.put("/trust/ceremony")
@requires("admin")
def put_ceremony() -> tuple[dict[str, Any], int]:
    """Trust the next root with the targets that its release keys signed: `{root, targets}` as texts."""
    hub = services()
    try:
        said = CeremonyBody.model_validate_json(signed_body(hub))
    except ValidationError as error:
        place, why = problems.first_fault(error)
        raise MalformedError("this is no root with its targets", why=f"{place}: {why}") from None
    online = signer.read_public(hub.config.trust)
    with hub.sessions.write() as session:
        root, targets = acceptance.accept_ceremony(
            session,
            hub.blobs,
            said.root.encode(),
            said.targets.encode(),
            now=hub.clock(),
            actor=g.person.name,
            online=online,
        )
    return {"version": root, "targets_version": targets}, 202


def signed_body(hub: Services) -> bytes:
    """The request's body, byte for byte as it was signed."""
    request.max_content_length = hub.config.metadata_limit
    return request.get_data(cache=False)
