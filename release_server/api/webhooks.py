"""Webhooks: who elsewhere is told of what, and what has become of it. Admins only: URLs may be secret."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

from flask import g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import Field, StringConstraints

from agent_core.clock import iso
from release_server.api import PREFIX, pages, services
from release_server.api.access import requires
from release_server.api.fleet_schemas import NAME_FORM, Because, Shape
from release_server.api.people import SECURITY
from release_server.api.shapes import NumberPath, when
from release_server.webhooks import outbox, subscriptions
from release_server.webhooks.outbox import Kept  # noqa: TC001 - read when a request comes
from release_server.webhooks.vault import Vault

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.models import Webhook, WebhookDelivery

blueprint = APIBlueprint(
    "webhooks", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="webhooks")], abp_security=SECURITY
)
Event = Annotated[str, StringConstraints(min_length=1, max_length=64)]


class NewWebhook(Shape):
    """`plain`: plain HTTP to another host is meant."""

    url: str = Field(min_length=1, max_length=subscriptions.MOST_URL)
    events: list[Event] = Field(min_length=1, max_length=64)
    product: str | None = Field(None, pattern=NAME_FORM)
    plain: bool = False


class Rotation(Shape):
    """`stays_s`: how long the secret that is valid now stays valid beside the new one."""

    stays_s: int = Field(int(subscriptions.STAYS.total_seconds()), ge=0, le=30 * 86_400)


class DeliveriesQuery(pages.PageQuery):
    state: Kept | None = None
    limit: int = Field(100, ge=1, le=500)


def render(webhook: Webhook, counted: dict[str, dict[int, int]]) -> dict[str, Any]:
    """A webhook as admins see it; never its secret, nor what that is made of."""
    return {
        "id": webhook.id,
        "url": webhook.url,
        "events": webhook.events,
        "product": webhook.product,
        "created_at": iso(webhook.created_at),
        "created_by": webhook.created_by,
        "failures": webhook.failures,
        "due_at": iso(webhook.due_at),
        **{str(state): of.get(webhook.id, 0) for state, of in counted.items()},
    }


def render_delivery(row: WebhookDelivery) -> dict[str, Any]:
    return {
        "id": row.event_id,
        "sequence": row.sequence,
        "type": row.type,
        "state": row.state,
        "tries": row.tries,
        "created_at": iso(row.created_at),
        "tried_at": when(row.tried_at),
        "answer": row.answer,
        "body": row.body,
    }


def _show(session: Session, now: datetime, webhook_id: int) -> dict[str, Any]:
    webhook = subscriptions.find(session, webhook_id)
    secrets = outbox.secrets_of(session, now, webhook.id)
    ends = [when(secret.until) for secret in secrets]
    return {**render(webhook, outbox.counts(session)), "secrets": [{"until": until} for until in ends]}


@blueprint.get("/webhooks")
@requires("admin")
def list_webhooks(query: pages.PageQuery) -> dict[str, Any]:
    """Webhooks by number, with how much each has not taken."""
    with services().sessions.read() as session:
        counted = outbox.counts(session)
        return pages.page(
            query,
            lambda most: subscriptions.list_all(session, limit=most, after=query.number or 0),
            lambda webhook: render(webhook, counted),
            lambda webhook: webhook.id,
        )


@blueprint.post("/webhooks")
@requires("admin")
def add_webhook(body: NewWebhook) -> tuple[dict[str, Any], int]:
    """Tell a receiver of events from now on; the answer is the only place its secret ever appears.

    Sent again with the same `Idempotency-Key` it is answered with `secret: null`: rotate it then.
    """
    hub = services()
    g.secrets = ("secret",)
    with hub.sessions.write() as session:
        webhook, secret = subscriptions.add(
            session,
            hub.clock(),
            g.person.name,
            Vault(hub.config.webhook_key),
            url=body.url,
            wanted=body.events,
            product=body.product,
            plain=body.plain,
        )
        return {**_show(session, hub.clock(), webhook.id), "secret": secret}, 201


@blueprint.get("/webhooks/<int:id>")
@requires("admin")
def show_webhook(path: NumberPath) -> dict[str, Any]:
    """One webhook, and until when its secrets are valid."""
    hub = services()
    with hub.sessions.read() as session:
        return _show(session, hub.clock(), path.id)


@blueprint.delete("/webhooks/<int:id>")
@requires("admin")
def remove_webhook(path: NumberPath) -> tuple[str, int]:
    """End a webhook; what it has not taken is never sent."""
    hub = services()
    with hub.sessions.write() as session:
        subscriptions.remove(session, hub.clock(), g.person.name, path.id)
    return "", 204


@blueprint.post("/webhooks/<int:id>/rotate")
@requires("admin")
def rotate_secret(path: NumberPath, body: Rotation) -> dict[str, Any]:
    """Give a webhook another secret; the answer is the only place it ever appears."""
    hub = services()
    g.secrets = ("secret",)
    stays, vault = timedelta(seconds=body.stays_s), Vault(hub.config.webhook_key)
    with hub.sessions.write() as session:
        secret = subscriptions.rotate(session, hub.clock(), g.person.name, vault, path.id, stays)
        return {**_show(session, hub.clock(), path.id), "secret": secret}


@blueprint.post("/webhooks/<int:id>/test")
@requires("admin")
def test_webhook(path: NumberPath, body: Because) -> tuple[dict[str, Any], int]:
    """Put `webhook.test` into its outbox; `deliveries` says what has come of it."""
    hub = services()
    with hub.sessions.write() as session:
        return render_delivery(
            subscriptions.try_out(session, hub.clock(), g.person.name, path.id, body.reason)
        ), 202


@blueprint.post("/webhooks/<int:id>/retry")
@requires("admin")
def retry_dead(path: NumberPath, body: Because) -> dict[str, Any]:
    """Send what was given up once more, in its order."""
    hub = services()
    with hub.sessions.write() as session:
        again = subscriptions.retry(session, hub.clock(), g.person.name, path.id, body.reason)
        return {**_show(session, hub.clock(), path.id), "again": again}


@blueprint.get("/webhooks/<int:id>/deliveries")
@requires("admin")
def list_deliveries(path: NumberPath, query: DeliveriesQuery) -> dict[str, Any]:
    """What a webhook was and is to be told, the newest first."""
    with services().sessions.read() as session:
        subscriptions.find(session, path.id)
        return pages.page(
            query,
            lambda most: outbox.deliveries(
                session, path.id, state=query.state, limit=most, after=query.number
            ),
            render_delivery,
            lambda row: row.sequence,
        )
