"""This module keeps what webhooks are to be told, from when it happened until it was taken.

One webhook is told one thing after the other: while the oldest is not taken and not dead, the next ones wait.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select, update
from sqlalchemy.orm import aliased

from release_server.models import Webhook, WebhookDelivery, WebhookSecret
from release_server.webhooks import events, schedule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session


class Kept(StrEnum):
    """What has become of a delivery."""

    PENDING = "pending"
    SENT = "sent"
    DEAD = "dead"


@dataclass(frozen=True)
class Letter:
    """A delivery that is to be sent now.

    Attributes:
        secrets: salt and mark of each secret that is valid now.
    """

    id: int
    webhook_id: int
    url: str
    event_id: str
    body: bytes
    secrets: tuple[tuple[str, str], ...]


# --- in the transaction in which something happens -------------------------------------------------------


def tell(
    session: Session, now: datetime, kind: str, product: str, happened: datetime | None = None, /, **data: Any
) -> None:
    """Put an event into the outbox of each webhook that wants it; it is sent exactly when this is committed.

    Args:
        session: of `Sessions.write()`.
        kind: one of `events.TYPES`.
        product: what it is about; a webhook may be for one product only.
        happened: when, where that was not just now.
        data: plain JSON values; never a secret.
    """
    for webhook in session.scalars(select(Webhook).order_by(Webhook.id)):
        if webhook.product in (None, product) and events.is_wanted(kind, webhook.events):
            put(session, now, webhook, kind, {"product": product, **data}, happened)


def put(
    session: Session,
    now: datetime,
    webhook: Webhook,
    kind: str,
    data: Mapping[str, Any],
    happened: datetime | None = None,
) -> WebhookDelivery:
    """Put one event into the outbox of one webhook; `happened` as of `tell`."""
    # Counted by the statement itself: another one of this transaction may have counted on a copy.
    sequence = session.execute(
        update(Webhook)
        .where(Webhook.id == webhook.id)
        .values(sequence=Webhook.sequence + 1)
        .returning(Webhook.sequence)
        .execution_options(synchronize_session=False)
    ).scalar_one()
    delivery = WebhookDelivery(
        webhook_id=webhook.id,
        event_id=f"msg_{secrets.token_hex(16)}",
        sequence=sequence,
        type=kind,
        body=events.body(kind, happened or now, sequence, data),
        created_at=now,
        state=Kept.PENDING,
    )
    session.add(delivery)
    session.flush()
    return delivery


# --- after its commit ------------------------------------------------------------------------------------


def due(session: Session, now: datetime, most: int) -> list[Letter]:
    """The oldest delivery that each webhook has not taken, of those that may be tried now."""
    waiting = aliased(WebhookDelivery)
    oldest = (
        select(func.min(waiting.sequence))
        .where(waiting.webhook_id == Webhook.id, waiting.state == Kept.PENDING)
        .scalar_subquery()
    )
    found = session.execute(
        select(Webhook, WebhookDelivery)
        .join(WebhookDelivery, WebhookDelivery.webhook_id == Webhook.id)
        # A time further away than any pause is from a clock that was ahead; it does not count.
        .where((Webhook.due_at <= now) | (Webhook.due_at > now + schedule.MOST))
        .where(WebhookDelivery.sequence == oldest)
        .order_by(Webhook.due_at, Webhook.id)
        .limit(most)
    ).all()
    return [
        Letter(
            delivery.id,
            webhook.id,
            webhook.url,
            delivery.event_id,
            delivery.body.encode(),
            tuple((secret.salt, secret.mark) for secret in secrets_of(session, now, webhook.id)),
        )
        for webhook, delivery in found
    ]


def secrets_of(session: Session, now: datetime, webhook_id: int) -> Sequence[WebhookSecret]:
    """The secrets of a webhook that are valid, the newest first."""
    query = (
        select(WebhookSecret)
        .where(WebhookSecret.webhook_id == webhook_id)
        .where(WebhookSecret.until.is_(None) | (WebhookSecret.until > now))
    )
    return session.scalars(query.order_by(WebhookSecret.id.desc())).all()


def settle(
    session: Session, now: datetime, letter: Letter, answer: schedule.Answer, spread: float
) -> Kept | None:
    """Note what has come of a try.

    Args:
        now: when it ended.
        spread: of `schedule.pause`.

    Returns:
        What has become of the delivery; None when it is gone, with its webhook, or was settled by another.
    """
    webhook = session.get(Webhook, letter.webhook_id, populate_existing=True)
    delivery = session.get(WebhookDelivery, letter.id, populate_existing=True)
    if webhook is None or delivery is None or delivery.state != Kept.PENDING:
        return None
    delivery.tries += 1
    delivery.tried_at, delivery.answer = now, answer.says[:128]
    if answer.took:
        delivery.state = Kept.SENT
        webhook.failures, webhook.due_at = 0, now
        return Kept.SENT
    webhook.failures += 1
    webhook.due_at = now + schedule.pause(webhook.failures, spread, answer.later)
    age = now - delivery.created_at
    if schedule.is_dead(age, delivery.tries, answer):
        delivery.state = Kept.DEAD
    if age >= schedule.LONGEST:
        _give_up_old(session, now, webhook.id)
    return Kept(delivery.state)


def _give_up_old(session: Session, now: datetime, webhook_id: int) -> None:
    """Give up all that has waited for too long: by a try for each the outbox would grow for ever."""
    session.execute(
        update(WebhookDelivery)
        .where(WebhookDelivery.webhook_id == webhook_id, WebhookDelivery.state == Kept.PENDING)
        .where(WebhookDelivery.created_at <= now - schedule.LONGEST)
        .values(state=Kept.DEAD)
        .execution_options(synchronize_session=False)
    )


# --- looking at it ---------------------------------------------------------------------------------------


def deliveries(
    session: Session,
    webhook_id: int,
    *,
    state: Kept | None = None,
    after: int | None = None,
    limit: int = 100,
) -> Sequence[WebhookDelivery]:
    """What a webhook was and is to be told, the newest first.

    Args:
        after: only what has a smaller sequence, to go on behind a page.
    """
    query = select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
    if state is not None:
        query = query.where(WebhookDelivery.state == state)
    if after is not None:
        query = query.where(WebhookDelivery.sequence < after)
    return session.scalars(query.order_by(WebhookDelivery.sequence.desc()).limit(limit)).all()


def counts(session: Session) -> dict[str, dict[int, int]]:
    """How many deliveries of each webhook are pending and dead, by state and webhook."""
    found: dict[str, dict[int, int]] = {Kept.PENDING: {}, Kept.DEAD: {}}
    query = (
        select(WebhookDelivery.state, WebhookDelivery.webhook_id, func.count())
        .where(WebhookDelivery.state.in_([Kept.PENDING, Kept.DEAD]))
        .group_by(WebhookDelivery.state, WebhookDelivery.webhook_id)
    )
    for state, webhook_id, count in session.execute(query):
        found[state][webhook_id] = count
    return found


def oldest_pending(session: Session) -> datetime | None:
    """Since when the delivery waits that has waited longest."""
    query = select(func.min(WebhookDelivery.created_at)).where(WebhookDelivery.state == Kept.PENDING)
    found: datetime | None = session.scalar(query)
    return found
