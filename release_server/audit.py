"""Who did what to what, and when: written in the same transaction as the deed."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from agent_core.clock import iso
from release_server.models import AuditEntry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy.orm import Session

MOST = 1000


def record(session: Session, now: datetime, actor: str, action: str, subject: str, **detail: Any) -> None:
    """Note one deed; it is kept exactly when the caller's transaction is.

    Args:
        session: of `Sessions.write()`.
        now: when.
        actor: the person's name, or `server` for what the server decided by itself.
        action: a verb of the glossary with its noun, e.g. `cohort.pin`.
        subject: what it was done to, e.g. `warehouse-agent/eu`.
        detail: plain JSON values and times; never a secret.
    """
    plain = {name: iso(value) if isinstance(value, datetime) else value for name, value in detail.items()}
    session.add(AuditEntry(at=now, actor=actor, action=action, subject=subject[:256], detail=plain))


def entries(
    session: Session, *, since: datetime | None = None, actor: str | None = None, limit: int = 100
) -> Sequence[AuditEntry]:
    """The newest deeds first."""
    query = select(AuditEntry).order_by(AuditEntry.id.desc()).limit(max(1, min(limit, MOST)))
    if since is not None:
        query = query.where(AuditEntry.at >= since)
    if actor is not None:
        query = query.where(AuditEntry.actor == actor)
    return session.scalars(query).all()
