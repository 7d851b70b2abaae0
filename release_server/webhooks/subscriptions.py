"""Webhooks as admins make, show and end them."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from sqlalchemy import delete, select, update

from agent_core.errors import NotFoundError, UsageError
from release_server import audit, releases
from release_server.models import Webhook, WebhookDelivery, WebhookSecret
from release_server.signin.settings import is_safe
from release_server.webhooks import events, outbox

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.webhooks.vault import Vault

MOST = 100
"""Each event is a row for each webhook, in the transaction of the event."""
MOST_URL = 2048
STAYS = timedelta(hours=24)
"""How long a secret is valid beside the one that took its place, unless said otherwise."""


def add(
    session: Session,
    now: datetime,
    actor: str,
    vault: Vault,
    *,
    url: str,
    wanted: Sequence[str],
    product: str | None = None,
    plain: bool = False,
) -> tuple[Webhook, str]:
    """Tell a receiver of events from now on.

    Args:
        plain: by HTTP without TLS, also to another host; what is told can be read on the way.

    Returns:
        The webhook, and its secret, which is never told again.

    Raises:
        UsageError: a URL or an event that cannot be.
        NotFoundError: no such product.
    """
    check_url(url, plain=plain)
    if product is not None:
        releases.find_product(session, product)
    if len(list_all(session)) >= MOST:
        raise UsageError(f"there are {MOST} webhooks already", then="remove one", reason="too-many")
    webhook = Webhook(
        url=url,
        events=events.check_wanted(wanted),
        product=product,
        created_at=now,
        created_by=actor,
        due_at=now,
    )
    session.add(webhook)
    session.flush()
    secret = _give_secret(session, now, webhook, vault)
    _note(session, now, actor, "webhook.add", webhook, events=webhook.events, product=product, plain=plain)
    return webhook, secret


def check_url(url: str, *, plain: bool = False) -> None:
    """Refuse what could not be asked, or not safely.

    Raises:
        UsageError: it is no http(s) URL, holds a name and a password, or leaves this host without TLS.
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    readable = url.isascii() and url.isprintable() and " " not in url and len(url) <= MOST_URL
    if not readable or parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise UsageError("the URL cannot be used", then="for example: https://ops.example.org/relfleet")
    if parts.username is not None or parts.password is not None or parts.fragment:
        raise UsageError(
            "the URL cannot be used",
            why="it holds a name, a password or a fragment",
            then="the receiver knows who asks by the signature",
        )
    if not plain and not is_safe(url):
        raise UsageError(
            "the URL cannot be used",
            why="whoever is on the way could read what is told",
            then="use https, or say that plain http is meant (--allow-http)",
            reason="plain-http",
        )


def list_all(session: Session, *, limit: int | None = None, after: int = 0) -> Sequence[Webhook]:
    """Webhooks by number, at most `limit`, those that come after the number `after`."""
    return session.scalars(select(Webhook).where(Webhook.id > after).order_by(Webhook.id).limit(limit)).all()


def find(session: Session, webhook_id: int) -> Webhook:
    """One webhook.

    Raises:
        NotFoundError: there is none of this number.
    """
    webhook = session.get(Webhook, webhook_id)
    if webhook is None:
        raise NotFoundError(f"there is no webhook {webhook_id}", then="release webhook list")
    return webhook


def rotate(
    session: Session, now: datetime, actor: str, vault: Vault, webhook_id: int, stays: timedelta = STAYS
) -> str:
    """Give a webhook another secret; until the old one's end, what is sent is signed with both.

    Args:
        stays: how long the old one is still valid. Of two old ones the earlier end stays.

    Returns:
        The new secret, which is never told again.
    """
    webhook = find(session, webhook_id)
    end = now + stays
    here = update(WebhookSecret).where(WebhookSecret.webhook_id == webhook.id)
    later = WebhookSecret.until.is_(None) | (WebhookSecret.until > end)
    session.execute(here.where(later).values(until=end).execution_options(synchronize_session=False))
    secret = _give_secret(session, now, webhook, vault)
    _note(session, now, actor, "webhook.rotate", webhook, old_until=end)
    return secret


def remove(session: Session, now: datetime, actor: str, webhook_id: int) -> None:
    """End a webhook; what it has not taken yet is never sent."""
    webhook = find(session, webhook_id)
    _note(session, now, actor, "webhook.remove", webhook)
    for table in (WebhookDelivery, WebhookSecret):
        session.execute(delete(table).where(table.webhook_id == webhook.id))
    session.delete(webhook)


def try_out(
    session: Session, now: datetime, actor: str, webhook_id: int, reason: str = ""
) -> WebhookDelivery:
    """Put `webhook.test` into the outbox, and have it tried at once, whatever failed before."""
    webhook = find(session, webhook_id)
    webhook.due_at = now
    _note(session, now, actor, "webhook.test", webhook, reason=reason)
    return outbox.put(session, now, webhook, events.TEST, {"webhook": webhook.id, "by": actor})


def retry(session: Session, now: datetime, actor: str, webhook_id: int, reason: str = "") -> int:
    """Have what was given up tried again, in its order, and at once.

    Returns:
        How many deliveries that are.
    """
    webhook = find(session, webhook_id)
    dead = update(WebhookDelivery).where(
        WebhookDelivery.webhook_id == webhook.id, WebhookDelivery.state == outbox.Kept.DEAD
    )
    again: Any = session.execute(
        dead.values(state=outbox.Kept.PENDING, tries=0, created_at=now).execution_options(
            synchronize_session=False
        )
    )
    webhook.due_at = now
    _note(session, now, actor, "webhook.retry", webhook, reason=reason, deliveries=again.rowcount)
    return int(again.rowcount)


def _give_secret(session: Session, now: datetime, webhook: Webhook, vault: Vault) -> str:
    vault.make()
    salt, mark, text = vault.fresh()
    session.add(WebhookSecret(webhook_id=webhook.id, salt=salt, mark=mark, created_at=now))
    session.flush()
    return text


def _note(session: Session, now: datetime, actor: str, action: str, webhook: Webhook, **detail: Any) -> None:
    """The host alone: a path may hold what lets somebody in there, and readers see the log."""
    detail["host"] = urlsplit(webhook.url).hostname
    audit.record(session, now, actor, action, f"webhook-{webhook.id}", **detail)
