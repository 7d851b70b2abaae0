"""Who the caller is, and whether the server is there."""

from __future__ import annotations

from typing import Any

from flask import g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from release_server.api import PREFIX
from release_server.api.access import requires
from release_server.api.shapes import when

SECURITY: list[dict[str, list[str]]] = [{"bearer": []}, {"session": []}]

blueprint = APIBlueprint("people", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="people")])


@blueprint.get("/whoami", security=SECURITY)
@requires("reader", "enroller")
def whoami() -> dict[str, Any]:
    """Whom the token or session speaks for, for which product alone, and until when."""
    person = g.person
    return {
        "name": person.name,
        "role": str(person.role),
        "product": person.product,
        "expires_at": when(person.expires_at),
    }


@blueprint.get("/health")
def health() -> dict[str, Any]:
    """The web process answers; says nothing about the rest."""
    return {"status": "ok"}
