"""Sessions of people who signed in with the provider: begun, checked, listed, ended; kept as hashes."""

from __future__ import annotations

import hmac
from typing import TYPE_CHECKING

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError

from agent_core.errors import NotAllowedError, NotFoundError
from release_server import audit, bearer
from release_server.models import PersonSession

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.signin.flow import Attempt
    from release_server.signin.rules import Identity, Rule
    from release_server.signin.settings import Oidc

PREFIX = "rfs_"
AGAIN = "sign in again"


def begin(session: Session, now: datetime, oidc: Oidc, identity: Identity, attempt: Attempt) -> str:
    """Make the session of one sign-in; its secret is returned here and nowhere again.

    Raises:
        NotAllowedError: `signin-replayed`; this sign-in has made its session already.
    """
    session.execute(delete(PersonSession).where(PersonSession.expires_at <= now))
    secret = bearer.make(PREFIX)
    row = PersonSession(
        name=identity.name,
        issuer=oidc.issuer,
        subject=identity.subject,
        rule=identity.rule.text,
        hash=bearer.hash_of(secret),
        attempt=attempt.hash,
        created_at=now,
        used_at=now,
        expires_at=now + oidc.lasts,
        ended_at=None,
    )
    session.add(row)
    try:
        session.flush()
    except IntegrityError:
        raise NotAllowedError(
            "you are not signed in",
            why="this sign-in was used already",
            then=AGAIN,
            reason="signin-replayed",
        ) from None
    said = {"id": row.id, "role": identity.rule.role, "provider": oidc.issuer, "sub": identity.subject}
    audit.record(session, now, row.name, "session.begin", row.name, **said)
    return secret


def check(session: Session, secret: str, oidc: Oidc | None, now: datetime) -> tuple[PersonSession, Rule]:
    """Say whose session a cookie is, and what its rule allows now.

    Raises:
        NotAllowedError: `session-unknown`, `session-ended`, `session-expired`, `session-idle`, or
            `session-unmapped`, when the rule that let the person in is gone from the settings.
    """
    digest = bearer.hash_of(secret)
    row = session.scalar(select(PersonSession).where(PersonSession.hash == digest))
    if row is None or not hmac.compare_digest(row.hash, digest):
        raise NotAllowedError("the session is not known here", then=AGAIN, reason="session-unknown")
    if row.ended_at is not None:
        raise NotAllowedError("the session was ended", then=AGAIN, reason="session-ended")
    rule = oidc.rule(row.rule) if oidc is not None and oidc.issuer == row.issuer else None
    if oidc is None or rule is None:
        raise NotAllowedError(
            "the session counts no more",
            why="the settings changed since it began",
            then=AGAIN,
            reason="session-unmapped",
        )
    # By what is set now as well: a shorter time holds for sessions that have begun.
    if now >= min(row.expires_at, row.created_at + oidc.lasts):
        raise NotAllowedError("the session is over", then=AGAIN, reason="session-expired")
    if now >= row.used_at + oidc.idle:
        raise NotAllowedError("the session was not used for too long", then=AGAIN, reason="session-idle")
    return row, rule


def is_touch_due(row: PersonSession, now: datetime) -> bool:
    return now - row.used_at >= bearer.TOUCH_EVERY


def touch(session: Session, number: int, now: datetime) -> None:
    """Note that a session was used; callers do so at most once a minute."""
    session.execute(update(PersonSession).where(PersonSession.id == number).values(used_at=now))


def list_all(
    session: Session, now: datetime, *, name: str | None = None, limit: int | None = None, after: int = 0
) -> Sequence[PersonSession]:
    """Sessions that are not past their date, those that were ended before it among them.

    By number, at most `limit`, those that come after the number `after`.
    """
    query = select(PersonSession).where(PersonSession.expires_at > now, PersonSession.id > after)
    if name is not None:
        query = query.where(PersonSession.name == name)
    return session.scalars(query.order_by(PersonSession.id).limit(limit)).all()


def end(session: Session, now: datetime, number: int, actor: str) -> None:
    """End a session: the next request with it is refused.

    Raises:
        NotFoundError: no such session.
    """
    row = session.get(PersonSession, number)
    if row is None:
        raise NotFoundError(f"there is no session {number}", then="release session list")
    if row.ended_at is None:
        row.ended_at, row.ended_by = now, actor
        audit.record(session, now, actor, "session.end", row.name, id=row.id)
