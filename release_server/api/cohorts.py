"""Cohorts: who belongs together, and what holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import Field

from release_server import cohort_view, cohorts
from release_server import preview as whom
from release_server.api import PREFIX, editions, pages, services
from release_server.api.access import requires
from release_server.api.fleet_schemas import (
    Because,
    CohortChange,
    CohortPath,
    Freeze,
    NewCohort,
    Pin,
    PreviewQuery,
    moment,
    render_cohort,
    render_preview,
)
from release_server.api.people import SECURITY

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from sqlalchemy.orm import Session

blueprint = APIBlueprint(
    "cohorts", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="cohorts")], abp_security=SECURITY
)
Answer = tuple[dict[str, Any], int, dict[str, str]]
ONE = "/cohorts/<product>/<name>"


class CohortQuery(pages.PageQuery):
    product: str | None = Field(None, max_length=64)
    pinned: bool | None = None
    frozen: bool | None = None


def _change(path: CohortPath, service: Callable[..., Any], **said: Any) -> Answer:
    """Ask one thing of a cohort in one transaction, and show what has come of it."""
    hub = services()
    now = hub.clock()
    with hub.sessions.write() as session:
        _refuse_stale(session, now, path)
        service(session, now, g.person.name, path.product, path.name, **said)
        return _show(session, now, path.product, path.name)


def _refuse_stale(session: Session, now: datetime, path: CohortPath) -> None:
    view = cohort_view.show(session, now, path.product, path.name)
    editions.refuse_stale(f"cohort {path.name}", editions.of_cohort(view))


def _show(session: Session, now: datetime, product: str, name: str, status: int = 200) -> Answer:
    view = cohort_view.show(session, now, product, name)
    return editions.tagged(render_cohort(view), editions.of_cohort(view), status)


@blueprint.get("/cohorts")
@requires("reader")
def list_cohorts(query: CohortQuery) -> dict[str, Any]:
    """Cohorts by name, with what people want of them and what is so.

    `frozen` says who takes nothing new just now, by whatever freezes it. A page that it thins out may be
    short or empty, and have a next one.
    """
    hub = services()
    with hub.sessions.read() as session:
        return pages.page(
            query,
            lambda most: cohort_view.list_cohorts(
                session, hub.clock(), query.product, pinned=query.pinned, limit=most, after=query.place
            ),
            render_cohort,
            lambda view: f"{view.cohort.product_id}.{view.cohort.name}",
            lambda view: query.frozen in (None, view.freeze is not None),
        )


@blueprint.post("/cohorts")
@requires("operator")
def create_cohort(body: NewCohort) -> Answer:
    """Make a cohort; agents whose labels match join it."""
    hub = services()
    now = hub.clock()
    with hub.sessions.write() as session:
        cohorts.create(session, now, g.person.name, **body.model_dump())
        return _show(session, now, body.product, body.name, 201)


@blueprint.get(ONE)
@requires("reader")
def show_cohort(path: CohortPath) -> Answer:
    """One cohort."""
    hub = services()
    with hub.sessions.read() as session:
        return _show(session, hub.clock(), path.product, path.name)


@blueprint.patch(ONE)
@requires("operator")
def edit_cohort(path: CohortPath, body: CohortChange) -> Answer:
    """Change what is given, as a new revision."""
    return _change(path, cohorts.edit, **body.model_dump(exclude_unset=True))


@blueprint.delete(ONE)
@requires("operator")
def delete_cohort(path: CohortPath) -> tuple[str, int]:
    """Delete a cohort; its agents go where their labels say."""
    hub = services()
    with hub.sessions.write() as session:
        _refuse_stale(session, hub.clock(), path)
        cohorts.delete(session, hub.clock(), g.person.name, path.product, path.name)
    return "", 204


@blueprint.post(f"{ONE}/pin")
@requires("operator")
def pin(path: CohortPath, body: Pin) -> Answer:
    """Keep a cohort on one version."""
    return _change(path, cohorts.pin, version=body.version, reason=body.reason)


@blueprint.post(f"{ONE}/unpin")
@requires("operator")
def unpin(path: CohortPath, body: Because) -> Answer:
    """Let a cohort take new releases again."""
    return _change(path, cohorts.unpin, reason=body.reason)


@blueprint.post(f"{ONE}/freeze")
@requires("operator")
def freeze(path: CohortPath, body: Freeze) -> Answer:
    """Let a cohort take nothing new, until a time or until it is unfrozen."""
    return _change(path, cohorts.freeze, until=moment(body.until, "until"), reason=body.reason)


@blueprint.post(f"{ONE}/unfreeze")
@requires("operator")
def unfreeze(path: CohortPath, body: Because) -> Answer:
    """End a freeze."""
    return _change(path, cohorts.unfreeze, reason=body.reason)


@blueprint.get(f"{ONE}/preview")
@requires("reader")
def preview(path: CohortPath, query: PreviewQuery) -> dict[str, Any]:
    """Whom a match would put into the cohort, there already or not; changes nothing."""
    hub = services()
    with hub.sessions.read() as session:
        found = whom.preview(session, hub.clock(), path.product, path.name, **query.model_dump())
        return render_preview(path.name, found)
