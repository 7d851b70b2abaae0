"""Rollouts: a release on its way through the stages of one cohort."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flask import g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import Field

from release_server import explain, fleet, launch, rehearsal, rollout_view
from release_server.api import PREFIX, editions, pages, services
from release_server.api.access import requires
from release_server.api.fleet_schemas import (
    Abort,
    Approve,
    Because,
    NewRollout,
    Rehearsal,
    RolloutPath,
    render_rollout,
)
from release_server.api.people import SECURITY
from release_server.rollout import State  # noqa: TC001 - read when a request comes

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

blueprint = APIBlueprint(
    "rollouts", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="rollouts")], abp_security=SECURITY
)


class RolloutQuery(pages.PageQuery):
    product: str | None = Field(None, max_length=64)
    cohort: str | None = Field(None, max_length=64)
    version: str | None = Field(None, max_length=64)
    state: State | None = None
    limit: int = Field(100, ge=1, le=pages.MOST)


Answer = tuple[dict[str, Any], int, dict[str, str]]


def _render(session: Session, rollout_id: int, status: int = 200) -> Answer:
    view = rollout_view.show(session, rollout_id)
    body = render_rollout(view, rollout_view.events(session, rollout_id))
    return editions.tagged(body, editions.of_rollout(view), status)


def _ask(path: RolloutPath, service: Callable[..., None], **said: Any) -> Answer:
    """Ask one thing of a rollout in one transaction, and show what has come of it."""
    hub = services()
    with hub.sessions.write() as session:
        view = rollout_view.show(session, path.id)
        editions.refuse_stale(f"r-{path.id}", editions.of_rollout(view))
        service(session, hub.clock(), g.person.name, path.id, **said)
        return _render(session, path.id)


@blueprint.get("/rollouts")
@requires("reader")
def list_rollouts(query: RolloutQuery) -> dict[str, Any]:
    """Rollouts, the newest first."""
    wanted = query.model_dump(exclude={"limit", "after"})
    with services().sessions.read() as session:
        return pages.page(
            query,
            lambda most: rollout_view.list_rollouts(session, **wanted, limit=most, after=query.number),
            render_rollout,
            lambda view: view.rollout.id,
        )


@blueprint.post("/rollouts")
@requires("operator")
def start_rollout(body: NewRollout) -> Answer:
    """Send a release through a cohort."""
    hub = services()
    said = body.said() | {"reason": body.reason, "supersede": body.supersede, "draft": body.draft}
    with hub.sessions.write() as session:
        rollout = launch.start_rollout(session, hub.clock(), g.person.name, **said)
        return _render(session, rollout.id, 201)


@blueprint.get("/rollouts/<int:id>")
@requires("reader")
def show_rollout(path: RolloutPath) -> Answer:
    """One rollout with its history."""
    with services().sessions.read() as session:
        return _render(session, path.id)


@blueprint.get("/rollouts/<int:id>/why")
@requires("reader")
def why(path: RolloutPath) -> dict[str, Any]:
    """Why a rollout is where it is, as a chain of reasons, and what it does next by itself."""
    hub = services()
    with hub.sessions.read() as session:
        return explain.why_of_rollout(session, hub.clock(), path.id)


@blueprint.post("/rollouts/<int:id>/pause")
@requires("operator")
def pause(path: RolloutPath, body: Because) -> Answer:
    """Stop a rollout where it is."""
    return _ask(path, fleet.pause, reason=body.reason)


@blueprint.post("/rollouts/<int:id>/resume")
@requires("operator")
def resume(path: RolloutPath, body: Because) -> Answer:
    """Let a paused or halted rollout go on."""
    return _ask(path, fleet.resume, reason=body.reason)


@blueprint.post("/rollouts/<int:id>/advance")
@requires("operator")
def advance(path: RolloutPath, body: Because) -> Answer:
    """Open the next stage without waiting."""
    return _ask(path, fleet.advance, reason=body.reason)


@blueprint.post("/rollouts/<int:id>/abort")
@requires("operator")
def abort(path: RolloutPath, body: Abort) -> Answer:
    """End a rollout; with `rollback` its agents go back."""
    return _ask(path, fleet.abort, reason=body.reason, rollback=body.rollback)


@blueprint.post("/rollouts/rehearse")
@requires("operator")
def rehearse(body: Rehearsal) -> dict[str, Any]:
    """Say what a rollout would do if every agent took it well; changes nothing."""
    hub = services()
    with hub.sessions.read() as session:
        return rehearsal.rehearse(session, hub.clock(), **body.said())


@blueprint.post("/rollouts/<int:id>/approve")
@requires("operator")
def approve(path: RolloutPath, body: Approve) -> Answer:
    """Let a rollout begin that waits for a second person."""
    return _ask(path, fleet.approve, reason=body.reason, digest=body.digest)


@blueprint.post("/rollouts/<int:id>/undo")
@requires("operator")
def undo(path: RolloutPath, body: Because) -> Answer:
    """Take every agent back to the release before, also after completion."""
    return _ask(path, fleet.undo, reason=body.reason)


@blueprint.post("/rollouts/<int:id>/retry")
@requires("operator")
def retry(path: RolloutPath, body: Because) -> Answer:
    """Let agents that failed try once more."""
    return _ask(path, fleet.retry, reason=body.reason)
