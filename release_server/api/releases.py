"""Products and releases, and the signed targets that make releases."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import Response, g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, ConfigDict, Field

from agent_core.clock import iso
from agent_core.errors import NotFoundError
from agent_core.wire import NAME
from keys.roles import TARGETS
from release_server import acceptance, comparison, proposals, releases, repository, signer, yanks
from release_server.api import PREFIX, pages, services
from release_server.api.access import requires
from release_server.api.fleet_schemas import Because  # noqa: TC001 - read when a request comes
from release_server.api.people import SECURITY
from release_server.api.trust import signed_body

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from release_server.models import Product, Release

blueprint = APIBlueprint(
    "releases", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="releases")], abp_security=SECURITY
)


class NewProduct(BaseModel):
    model_config = ConfigDict(extra="forbid")
    name: str = Field(pattern=f"^{NAME.pattern}$")


class ReleaseQuery(pages.PageQuery):
    product: str | None = Field(None, max_length=64)
    yanked: bool | None = None


class CompareQuery(BaseModel):
    model_config = ConfigDict(extra="forbid")
    product: str = Field(max_length=64)
    a: str = Field(max_length=64)
    b: str = Field(max_length=64)
    by: comparison.By | None = None


class ReleasePath(BaseModel):
    product: str = Field(max_length=64)
    version: str = Field(max_length=64)


def render_product(product: Product) -> dict[str, Any]:
    return {"name": product.name, "created_at": iso(product.created_at)}


def render_release(release: Release) -> dict[str, Any]:
    """A release with what is signed of each of its bundles."""
    return {
        "product": release.product.name,
        "version": release.version,
        "seq": release.seq,
        "notes": release.notes,
        "published_at": iso(release.published_at),
        "published_by": release.published_by,
        "yanked": {"at": iso(release.yanked_at), "by": release.yanked_by, "reason": release.yank_reason}
        if release.yanked_at
        else None,
        "bundles": [
            {
                "platform": bundle.platform,
                "sha256": bundle.sha256,
                "length": bundle.length,
                "unpacked": bundle.unpacked,
                "facts": bundle.facts,
            }
            for bundle in sorted(release.bundles, key=lambda bundle: bundle.platform)
        ],
    }


@blueprint.get("/products")
@requires("reader")
def list_products(query: pages.PageQuery) -> dict[str, Any]:
    """Products by name."""
    with services().sessions.read() as session:
        return pages.page(
            query,
            lambda most: releases.list_products(session, limit=most, after=query.after or ""),
            render_product,
            lambda product: product.name,
        )


@blueprint.post("/products")
@requires("releaser", "operator")
def make_product(body: NewProduct) -> tuple[dict[str, Any], int]:
    """Make a product before its first release."""
    hub = services()
    with hub.sessions.write() as session:
        product = releases.make_product(session, body.name, hub.clock(), g.person.name)
        return render_product(product), 201


@blueprint.get("/releases")
@requires("reader")
def list_releases(query: ReleaseQuery) -> dict[str, Any]:
    """Releases, the newest of each product first."""
    place = query.place
    after = None if place is None else (place[0], pages.number_of(place[1], pages.LARGEST))
    with services().sessions.read() as session:
        return pages.page(
            query,
            lambda most: releases.list_releases(
                session, query.product, yanked=query.yanked, limit=most, after=after
            ),
            render_release,
            lambda release: f"{release.product_id}.{release.seq}",
        )


@blueprint.get("/releases/<product>/<version>")
@requires("reader")
def show_release(path: ReleasePath) -> dict[str, Any]:
    """One release, and who has to do with it now."""
    with services().sessions.read() as session:
        return _show(session, releases.get_release(session, path.product, path.version))


@blueprint.get("/compare")
@requires("reader")
def compare(query: CompareQuery) -> dict[str, Any]:
    """Two releases, or two cohorts, side by side: agents, failures and health figures."""
    with services().sessions.read() as session:
        return comparison.compare(session, query.product, (query.a, query.b), query.by)


def _show(session: Session, release: Release) -> dict[str, Any]:
    return {**render_release(release), "reach": releases.reach(session, release).to_json()}


@blueprint.post("/releases/<product>/<version>/yank")
@requires("releaser", "operator")
def yank_release(path: ReleasePath, body: Because) -> dict[str, Any]:
    """Stop offering a release; rollouts of it pause."""
    hub = services()
    with hub.sessions.write() as session:
        release = yanks.yank(session, hub.clock(), g.person.name, path.product, path.version, body.reason)
        return _show(session, release)


@blueprint.post("/releases/<product>/<version>/unyank")
@requires("releaser", "operator")
def unyank_release(path: ReleasePath, body: Because) -> dict[str, Any]:
    """Let a yanked release be offered again."""
    hub = services()
    with hub.sessions.write() as session:
        release = yanks.unyank(session, hub.clock(), g.person.name, path.product, path.version, body.reason)
        return _show(session, release)


@blueprint.get("/metadata/targets")
@requires("reader")
def newest_targets() -> Response:
    """The newest signed targets, also when they are not published yet: what the next push changes."""
    with services().sessions.read() as session:
        row = repository.newest(session, TARGETS)
    if row is None:
        raise NotFoundError("there are no targets yet", then="release push")
    return Response(row.body, content_type="application/json")


@blueprint.post("/metadata/targets")
@requires("releaser")
def push_targets() -> tuple[dict[str, Any], int]:
    """Take in signed targets; they are published within about a second."""
    hub = services()
    body = signed_body(hub)
    online = signer.read_public(hub.config.trust)
    with hub.sessions.write() as session:
        version = acceptance.accept_targets(
            session, hub.blobs, body, now=hub.clock(), actor=g.person.name, online=online
        )
        proposals.close_published(session, body, hub.clock(), g.person)
    return {"version": version}, 202
