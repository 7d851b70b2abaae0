"""Who speaks to the API: bearer tokens, kept as hashes, each with one role, and the page's sessions.

Nothing here knows of requests (`api.access` does): commands and the jobs process make and check tokens too.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from sqlalchemy import and_, not_, or_, select, update

from agent_core.errors import NotAllowedError, NotFoundError, UsageError
from release_server import audit, bearer
from release_server.models import Token
from release_server.signin import sessions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime, timedelta

    from sqlalchemy.orm import Session

    from release_server.signin.settings import Oidc

PREFIX = "rft_"
"""Lets scanners find a token that was committed by mistake."""


class Role(StrEnum):
    READER = "reader"
    RELEASER = "releaser"
    OPERATOR = "operator"
    ENROLLER = "enroller"
    ADMIN = "admin"


MAY_READ = frozenset({Role.READER, Role.RELEASER, Role.OPERATOR})


@dataclass(frozen=True)
class Person:
    """Who a token or a session speaks for.

    Attributes:
        token_id: the token's row; enrolments use one up, deeds are audited under `name`.
        session_id: the row of the session, where there is no token.
        product: the only product the token is good for, or None for all.
        expires_at: until when the token or session holds, if it ends by itself.
        touch_due: the note of its last use is older than a minute.
    """

    name: str
    role: Role
    token_id: int = 0
    session_id: int = 0
    product: str | None = None
    expires_at: datetime | None = None
    touch_due: bool = False

    def may(self, *roles: str) -> bool:
        """Whether this person may do what any of `roles` may; an admin may everything."""
        if self.role is Role.ADMIN:
            return True
        return self.role in roles or (Role.READER in roles and self.role in MAY_READ)


def add_token(
    session: Session,
    now: datetime,
    *,
    name: str,
    role: Role,
    actor: str,
    expires: timedelta | None = None,
    product: str | None = None,
    uses: int | None = None,
    approve: bool = False,
    cohort: str | None = None,
    labels: Mapping[str, str] | None = None,
) -> tuple[Token, str]:
    """Make a token; its text is returned here and nowhere again.

    Args:
        approve: whom it enrols waits until an operator accepts.
        cohort: whom it enrols belongs to this cohort, whatever its labels say.
        labels: the operators' labels of whom it enrols.

    Raises:
        UsageError: anything of an enrolment said of a role that enrols nobody, or a cohort of no product.
    """
    if role is not Role.ENROLLER and (uses or product or approve or cohort or labels):
        raise UsageError(
            "a token cannot be limited like that",
            why="uses, product, approve, cohort and labels are for enroller tokens",
        )
    if cohort is not None and product is None:
        raise UsageError("a cohort belongs to a product", then="name the product too")
    text = bearer.make(PREFIX)
    token = Token(
        name=name,
        role=str(role),
        hash=bearer.hash_of(text),
        product=product,
        uses_left=uses,
        approve=approve,
        cohort=cohort,
        labels=dict(labels or {}),
        created_at=now,
        created_by=actor,
        expires_at=None if expires is None else now + expires,
        used_at=None,
        revoked_at=None,
    )
    session.add(token)
    session.flush()
    audit.record(session, now, actor, "token.create", name, id=token.id, role=str(role))
    return token, text


def list_tokens(
    session: Session,
    now: datetime,
    *,
    name: str | None = None,
    role: Role | None = None,
    works: bool | None = None,
    limit: int | None = None,
    after: int = 0,
) -> Sequence[Token]:
    """Tokens by number, at most `limit`, those that come after the number `after`.

    Args:
        works: those that `check_token` takes, or those that it refuses.
    """
    query = select(Token).where(Token.id > after).order_by(Token.id).limit(limit)
    if name is not None:
        query = query.where(Token.name == name)
    if role is not None:
        query = query.where(Token.role == str(role))
    if works is not None:
        living = or_(Token.expires_at.is_(None), Token.expires_at > now)
        unused = or_(Token.uses_left.is_(None), Token.uses_left > 0)
        good = and_(Token.revoked_at.is_(None), living, unused)
        query = query.where(good if works else not_(good))
    return session.scalars(query).all()


def revoke_token(session: Session, now: datetime, token_id: int, actor: str) -> None:
    """Make a token useless from the next request on.

    Raises:
        NotFoundError: no such token.
    """
    token = session.get(Token, token_id)
    if token is None:
        raise NotFoundError(f"there is no token {token_id}", then="release token list")
    if token.revoked_at is None:
        token.revoked_at = now
        audit.record(session, now, actor, "token.revoke", token.name, id=token.id)


def check_token(session: Session, text: str, now: datetime) -> Person:
    """Say whom a token speaks for.

    The lookup is by hash, so its timing tells nothing about the secret; the last comparison is constant-time.

    Raises:
        NotAllowedError: reason `token-unknown`, `token-revoked`, `token-expired` or `token-used-up`.
    """
    digest = bearer.hash_of(text)
    token = session.scalar(select(Token).where(Token.hash == digest))
    if token is None or not hmac.compare_digest(token.hash, digest):
        raise NotAllowedError("the token is not known here", then="release login", reason="token-unknown")
    if token.revoked_at is not None:
        raise NotAllowedError("the token was revoked", then="release login", reason="token-revoked")
    if token.expires_at is not None and token.expires_at <= now:
        raise NotAllowedError("the token is past its date", then="release login", reason="token-expired")
    if token.uses_left is not None and token.uses_left <= 0:
        raise NotAllowedError(
            "the token is used up", then="release token create --role enroller", reason="token-used-up"
        )
    return Person(
        name=token.name,
        role=Role(token.role),
        token_id=token.id,
        product=token.product,
        expires_at=token.expires_at,
        touch_due=token.used_at is None or now - token.used_at >= bearer.TOUCH_EVERY,
    )


def check_session(session: Session, secret: str, oidc: Oidc | None, now: datetime) -> Person:
    """Say whom a session speaks for, which is a person as one with a token is.

    Raises:
        NotAllowedError: a reason `session-…`.
    """
    row, rule = sessions.check(session, secret, oidc, now)
    due = sessions.is_touch_due(row, now)
    return Person(row.name, Role(rule.role), session_id=row.id, expires_at=row.expires_at, touch_due=due)


def touch(session: Session, person: Person, now: datetime) -> None:
    """Note that a token or session was used; callers do so at most once a minute, see `Person.touch_due`."""
    if person.session_id:
        sessions.touch(session, person.session_id, now)
        return
    session.execute(update(Token).where(Token.id == person.token_id).values(used_at=now))


def use_up(session: Session, person: Person, now: datetime) -> None:
    """Take one use off a limited token, in the transaction of what it was used for.

    Raises:
        NotAllowedError: reason `token-used-up`; another request was faster.
    """
    taken = session.execute(
        update(Token)
        .where(Token.id == person.token_id, (Token.uses_left.is_(None)) | (Token.uses_left > 0))
        .values(uses_left=Token.uses_left - 1, used_at=now)
        .returning(Token.id)
    ).first()
    if taken is None:
        raise NotAllowedError(
            "the token is used up", then="release token create --role enroller", reason="token-used-up"
        )
