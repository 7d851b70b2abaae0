"""Who did what to what, and when: chained by hashes, and written in the same transaction as the deed."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, select, update
from sqlalchemy.orm import Session

from agent_core.clock import iso
from release_server import audit_chain
from release_server.audit_chain import Head
from release_server.models import AuditEntry, AuditHead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import SessionTransaction

MOST = 1000
WAITING = "relfleet_audit"
SERVER = "server"
"""Who did what the server decided by itself."""


def identity(name: str) -> str:
    """Whom a name means, when it matters whether two deeds are of one person.

    `ada@example.org/ci` is a token of ada's for her pipeline, and so is it in capital letters.
    """
    return name.partition("/")[0].strip().casefold()


def record(session: Session, now: datetime, actor: str, action: str, subject: str, **detail: Any) -> None:
    """Note one deed; it is kept exactly when the caller's transaction is.

    Args:
        session: of `Sessions.write()`.
        now: when.
        actor: the person's name, or `SERVER` for what the server decided by itself.
        action: a verb of the glossary with its noun, e.g. `cohort.pin`.
        subject: what it was done to, e.g. `warehouse-agent/eu`.
        detail: plain JSON values and times; never a secret.
    """
    plain = {name: iso(value) if isinstance(value, datetime) else value for name, value in detail.items()}
    entry = AuditEntry(
        at=now,
        actor=actor[:128],
        action=action[:64],
        subject=subject[:256],
        detail=json.loads(json.dumps(plain)),  # as it comes back: the hash is over what can be read again
    )
    owner = session.get_nested_transaction() or session.get_transaction()
    session.info.setdefault(WAITING, []).append((owner, entry))


@event.listens_for(Session, "before_commit")
def _append(session: Session) -> None:
    """Chain what was noted, as the last thing a transaction does.

    The head is locked until the commit, so entries stand in the order in which deeds became real. Taken any
    earlier, two deeds that wait for each other's rows could also wait for each other's entry.
    """
    if session.in_nested_transaction() or not session.info.get(WAITING):
        return
    waiting = session.info.pop(WAITING)
    session.flush()
    head = locked_head(session)
    for _, entry in waiting:
        entry.id, entry.previous = head.id + 1, head.hash
        entry.hash = audit_chain.link(head.hash, said(entry))
        head = Head(entry.id, entry.hash)
        session.add(entry)
    session.execute(update(AuditHead).values(entry=head.id, hash=head.hash))


@event.listens_for(Session, "after_soft_rollback")
def _forget(session: Session, transaction: SessionTransaction) -> None:
    """What was rolled back was not done."""
    waiting = session.info.pop(WAITING, [])
    session.info[WAITING] = [(owner, entry) for owner, entry in waiting if owner is not transaction]


def locked_head(session: Session) -> Head:
    """The head, held against every other writer until this transaction ends."""
    row = session.execute(select(AuditHead.entry, AuditHead.hash).with_for_update()).one()
    return Head(row.entry, row.hash)


def head_of(session: Session) -> Head:
    row = session.execute(select(AuditHead.entry, AuditHead.hash)).one()
    return Head(row.entry, row.hash)


def said(entry: AuditEntry) -> dict[str, Any]:
    """An entry as people see it, and as its hash covers it."""
    return {
        "id": entry.id,
        "at": iso(entry.at),
        "actor": entry.actor,
        "action": entry.action,
        "subject": entry.subject,
        "detail": entry.detail,
        "previous": entry.previous,
        "hash": entry.hash,
    }


@dataclass(frozen=True)
class Wanted:
    """Which deeds to list; what is None does not matter.

    Attributes:
        until: what was done at that time is not among them.
    """

    since: datetime | None = None
    until: datetime | None = None
    actor: str | None = None
    action: str | None = None
    subject: str | None = None


ALL = Wanted()


def entries(
    session: Session, wanted: Wanted = ALL, *, limit: int = 100, after: int | None = None
) -> Sequence[AuditEntry]:
    """The newest deeds first, at most `limit`, those that come after the number `after`."""
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(limit)
    if after is not None:
        query = query.where(AuditEntry.id < after)
    if wanted.since is not None:
        query = query.where(AuditEntry.at >= wanted.since)
    if wanted.until is not None:
        query = query.where(AuditEntry.at < wanted.until)
    for column in (AuditEntry.actor, AuditEntry.action, AuditEntry.subject):
        if (value := getattr(wanted, column.key)) is not None:
            query = query.where(column == value)
    return session.scalars(query).all()


def stretch(session: Session, *, after: int = 0, limit: int = MOST) -> tuple[Sequence[AuditEntry], Head]:
    """The oldest deeds behind entry `after`, and the head, which is never older than they are."""
    query = select(AuditEntry).where(AuditEntry.id > after).order_by(AuditEntry.id)
    query = query.limit(max(1, min(limit, MOST)))
    found = session.scalars(query).all()
    head = head_of(session)
    if not found and head.id > after:  # written between the two; what it wrote can be seen now
        found = session.scalars(query).all()
    return found, head


def verify(session: Session) -> Head:
    """Check the whole log; nothing is ever removed from it, so it begins with the first entry of all.

    Raises:
        TrustError: `audit-broken`, naming the first entry that does not follow from the one before.
    """
    head = Head()
    while True:
        found, named = stretch(session, after=head.id)
        if not found:
            audit_chain.check_end(head, named)
            return head
        head = audit_chain.follow(map(said, found), start=head)
