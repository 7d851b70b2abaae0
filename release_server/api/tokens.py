"""Tokens of people, pipelines and enrolments."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from flask import g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from agent_core.wire import NAME, Getter
from release_server import audit, auth, cohorts
from release_server.api import PREFIX, pages, services
from release_server.api.access import requires
from release_server.api.fleet_schemas import Label  # noqa: TC001 - read when a request comes
from release_server.api.people import SECURITY
from release_server.api.shapes import NumberPath, when
from release_server.auth import Role  # noqa: TC001 - read when a request comes

if TYPE_CHECKING:
    from release_server.api import Services
    from release_server.models import Token

blueprint = APIBlueprint(
    "tokens", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="tokens")], abp_security=SECURITY
)


class NewToken(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(min_length=1, max_length=128, pattern=r"^[^\x00-\x1f]+$")
    role: Role
    expires_s: int | None = Field(None, ge=1, le=10 * 366 * 86_400)
    product: str | None = Field(None, pattern=f"^{NAME.pattern}$")
    uses: int | None = Field(None, ge=1, le=10**9)
    approve: bool = False
    cohort: str | None = Field(None, pattern=f"^{NAME.pattern}$")
    labels: dict[Label, Label] = Field(default_factory=dict, max_length=64)


class TokenQuery(pages.PageQuery):
    name: str | None = Field(None, max_length=128)
    role: Role | None = None
    works: bool | None = None


def _hub() -> Services:
    """The services, for a person who has not asked too often."""
    hub = services()
    hub.limits.take(hub.sessions, hub.clock(), (hub.limits.tokens, audit.identity(g.person.name)))
    return hub


def render(token: Token) -> dict[str, Any]:
    """A token as people see it; never the secret, never its hash."""
    return {
        "id": token.id,
        "name": token.name,
        "role": token.role,
        "product": token.product,
        "uses_left": token.uses_left,
        "approve": token.approve,
        "cohort": token.cohort,
        "labels": token.labels,
        "created_by": token.created_by,
        "created_at": when(token.created_at),
        "expires_at": when(token.expires_at),
        "used_at": when(token.used_at),
        "revoked_at": when(token.revoked_at),
    }


@blueprint.get("/tokens")
@requires("admin")
def list_tokens(query: TokenQuery) -> dict[str, Any]:
    """Tokens by number, without their secrets."""
    hub = _hub()
    wanted = query.model_dump(exclude={"limit", "after"})
    with hub.sessions.read() as session:
        return pages.page(
            query,
            lambda most: auth.list_tokens(
                session, hub.clock(), **wanted, limit=most, after=query.number or 0
            ),
            render,
            lambda token: token.id,
        )


@blueprint.post("/tokens")
@requires("admin")
def create_token(body: NewToken) -> tuple[dict[str, Any], int]:
    """Make a token; the answer is the only place its text ever appears.

    Sent again with the same `Idempotency-Key` it makes no other one, and `token` is null: the text is kept
    nowhere. Revoke that token and make another.
    """
    hub = _hub()
    g.secrets = ("token",)
    labels = Getter({"labels": body.labels}, "body").labels("labels")
    with hub.sessions.write() as session:
        if body.cohort is not None and body.product is not None:
            cohorts.find(session, body.product, body.cohort)
        token, text = auth.add_token(
            session,
            hub.clock(),
            name=body.name,
            role=body.role,
            actor=g.person.name,
            expires=None if body.expires_s is None else timedelta(seconds=body.expires_s),
            product=body.product,
            uses=body.uses,
            approve=body.approve,
            cohort=body.cohort,
            labels=labels,
        )
        return {**render(token), "token": text}, 201


@blueprint.delete("/tokens/<int:id>")
@requires("admin")
def revoke_token(path: NumberPath) -> tuple[str, int]:
    """Make a token useless from the next request on."""
    hub = _hub()
    with hub.sessions.write() as session:
        auth.revoke_token(session, hub.clock(), path.id, g.person.name)
    return "", 204
