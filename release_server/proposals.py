"""Targets that too few people have signed: kept where no agent looks, and published once enough have.

The server adds signatures that it has checked, and nothing else: it cannot make one. Whoever approves sends a
signature alone, so what is published is what was proposed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import select
from tuf.api.metadata import Signature

from agent_core.clock import iso
from agent_core.errors import ConflictError, NotAllowedError, NotFoundError, TrustError
from agent_core.wire import Reason
from keys import ceremony, changes
from keys.roles import TARGETS
from release_server import acceptance, audit
from release_server.models import Proposal
from release_server.repository import newest_version

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session
    from tuf.api.metadata import Metadata, Targets

    from keys.ceremony import OnlineKeys
    from release_server.auth import Person
    from release_server.blobs import Blobs

HOLDS = timedelta(days=7)
MOST_OPEN = 32
"""More than people will ever look at; one token cannot fill the database."""
MOST_LISTED = 100
"""Each is as large as the targets, and is read to be shown."""
OPEN, PUBLISHED, WITHDRAWN = "open", "published", "withdrawn"
EXPIRED, OUTDATED = "expired", "outdated"
"""What an open proposal becomes without anybody's doing: too old, or made from targets that are gone by."""


@dataclass(frozen=True)
class View:
    """A proposal as people see it.

    Attributes:
        state: `open`, `published`, `withdrawn`, `expired` or `outdated`.
        signers: key id → the name of who brought its signature; signatures that count today only.
        missing: how many more it needs.
        summary: what it changes, while it is open.
    """

    row: Proposal
    state: str
    signers: dict[str, str]
    missing: int
    summary: list[changes.Change]

    def to_json(self) -> dict[str, Any]:
        row = self.row
        return {
            "id": row.id,
            "state": self.state,
            "version": row.version,
            "created_at": iso(row.created_at),
            "created_by": row.created_by,
            "expires_at": iso(row.expires_at),
            "signers": [{"keyid": keyid, "by": name} for keyid, name in self.signers.items()],
            "missing": self.missing,
            "closed_at": iso(row.closed_at) if row.closed_at else None,
            "closed_by": row.closed_by,
            "reason": row.reason,
            "changes": [change.to_json() for change in self.summary],
        }


# --- looking ---------------------------------------------------------------------------------------------


def find(session: Session, number: int) -> Proposal:
    """One proposal.

    Raises:
        NotFoundError: there is none of that number.
    """
    row = session.get(Proposal, number)
    if row is None:
        raise NotFoundError(f"there is no proposal {number}", then="release approve --list")
    return row


def list_proposals(
    session: Session,
    now: datetime,
    *,
    everything: bool = False,
    limit: int = MOST_LISTED,
    after: int | None = None,
) -> list[View]:
    """Those that wait for signatures, the newest first; with `everything` all of them.

    At most `limit`, those that come after the number `after`.
    """
    query = select(Proposal).order_by(Proposal.id.desc()).limit(limit)
    if not everything:
        open_still = (Proposal.state == OPEN, Proposal.expires_at > now)
        query = query.where(*open_still, Proposal.version == newest_version(session, TARGETS) + 1)
    if after is not None:
        query = query.where(Proposal.id < after)
    return [show(session, now, row) for row in session.scalars(query)]


def show(session: Session, now: datetime, row: Proposal) -> View:
    """A proposal, with what it is by today's root, today's targets and the clock."""
    metadata = ceremony.parse_targets(row.body)
    root = acceptance.trusted_root(session)
    signed = ceremony.signed_by(root, TARGETS, metadata)
    state = _state(session, now, row)
    before = acceptance.current_targets(session)
    return View(
        row,
        state,
        {keyid: row.signers[keyid]["by"] for keyid in signed if keyid in row.signers},
        ceremony.missing_signatures(root, TARGETS, metadata) if state == OPEN else 0,
        changes.changes(before, metadata.signed) if before and state == OPEN else [],
    )


def _state(session: Session, now: datetime, row: Proposal) -> str:
    if row.state != OPEN:
        return row.state
    if row.expires_at <= now:
        return EXPIRED
    return OPEN if row.version == newest_version(session, TARGETS) + 1 else OUTDATED


def listed_blobs(row: Proposal) -> set[str]:
    """The sha256 of everything a proposal lists, to be fetched by who is to sign it."""
    files = ceremony.parse_targets(row.body).signed.targets
    return {target.hashes["sha256"] for path, target in files.items() if not changes.POLICY.fullmatch(path)}


# --- proposing and signing -------------------------------------------------------------------------------


def propose(
    session: Session, blobs: Blobs, body: bytes, *, now: datetime, person: Person, online: OnlineKeys
) -> View:
    """Keep targets that hold every rule but the number of their signatures.

    Args:
        session: of `Sessions.write()`.
        body: `targets.json` with at least one signature that counts.

    Raises:
        ConflictError: the same is proposed already, too much is, or see `acceptance.check_targets`.
        TrustError: `bad-signature`, or see `acceptance.check_targets`.
    """
    metadata = ceremony.parse_targets(body)
    acceptance.check_targets(session, blobs, metadata.signed, now=now, online=online)
    signed = ceremony.signed_by(acceptance.trusted_root(session), TARGETS, metadata)
    if not signed:
        raise _refuse("no release key has signed it")
    waiting = list_proposals(session, now)
    for view in waiting:
        if ceremony.parse_targets(view.row.body).signed == metadata.signed:
            raise ConflictError(
                f"this is proposal {view.row.id} already",
                then=f"release approve {view.row.id}",
                reason="proposed",
            )
    if len(waiting) >= MOST_OPEN:
        raise ConflictError(f"{MOST_OPEN} proposals wait already", then="release approve --list")
    metadata.signatures = {keyid: metadata.signatures[keyid] for keyid in signed}
    row = Proposal(
        version=metadata.signed.version,
        body=metadata.to_bytes(),
        signers={keyid: _by(person) for keyid in signed},
        state=OPEN,
        created_at=now,
        created_by=person.name,
        expires_at=now + HOLDS,
        closed_at=None,
    )
    session.add(row)
    session.flush()
    audit.record(session, now, person.name, "proposal.create", _name(row), version=row.version)
    _publish_when_signed(session, blobs, row, now=now, person=person, online=online)
    return show(session, now, row)


def add_signature(
    session: Session,
    blobs: Blobs,
    number: int,
    signature: dict[str, str],
    *,
    now: datetime,
    person: Person,
    online: OnlineKeys,
) -> View:
    """Add one signature to a proposal; the last one it needs publishes it.

    Args:
        session: of `Sessions.write()`.
        signature: `{keyid, sig}` over the proposed targets.

    Raises:
        NotFoundError: there is no such proposal.
        ConflictError: it is no longer open, its base has gone by, or this key has signed it.
        TrustError: `bad-signature`; the signature is none of a release key over these targets.
        NotAllowedError: `self-approval`; the same token has signed it with another key.
    """
    row = _open(session, now, number)
    metadata = ceremony.parse_targets(row.body)
    keyid = signature["keyid"]
    if keyid in ceremony.signed_by(acceptance.trusted_root(session), TARGETS, metadata):
        raise ConflictError(
            f"key {keyid[:12]} has signed proposal {number} already",
            then="somebody else has to sign it",
            reason="signed-already",
        )
    metadata.signatures[keyid] = Signature(keyid, signature["sig"])
    if keyid not in ceremony.signed_by(acceptance.trusted_root(session), TARGETS, metadata):
        raise _refuse(f"the signature of {keyid[:12]} is not one of a release key over these targets")
    _refuse_self_approval(row, person)
    row.body = metadata.to_bytes()
    row.signers = {**row.signers, keyid: _by(person)}
    audit.record(session, now, person.name, "proposal.sign", _name(row), keyid=keyid)
    _publish_when_signed(session, blobs, row, now=now, person=person, online=online)
    return show(session, now, row)


def close_published(session: Session, body: bytes, now: datetime, person: Person) -> None:
    """Targets were published that somebody brought with every signature: whoever proposed the same has them.

    Args:
        session: of `Sessions.write()`; `acceptance.accept_targets` has taken `body` in it.
    """
    published = ceremony.parse_targets(body).signed
    waiting = select(Proposal).where(Proposal.state == OPEN, Proposal.version == published.version)
    for row in session.scalars(waiting):
        if ceremony.parse_targets(row.body).signed == published:
            _close(row, PUBLISHED, now, person)


def withdraw(session: Session, now: datetime, person: Person, number: int, reason: str) -> View:
    """Take a proposal back, whoever made it; what was uploaded for it stays.

    Raises:
        NotFoundError, ConflictError: there is none, or it is published or withdrawn.
    """
    row = find(session, number)
    if row.state != OPEN:
        raise ConflictError(f"proposal {number} is {row.state}", then="release approve --list")
    _close(row, WITHDRAWN, now, person)
    row.reason = reason
    audit.record(session, now, person.name, "proposal.withdraw", _name(row), reason=reason)
    return show(session, now, row)


def _open(session: Session, now: datetime, number: int) -> Proposal:
    row = find(session, number)
    state = _state(session, now, row)
    why = {
        EXPIRED: f"it waited for signatures until {iso(row.expires_at)}",
        OUTDATED: f"it would be targets {row.version}, and others were published as these meanwhile",
    }
    if state != OPEN:
        raise ConflictError(
            f"proposal {number} is {state}",
            why=why.get(state, f"by {row.closed_by}"),
            then="its author proposes it anew with the same command as before"
            if state in why
            else "release approve --list",
            reason="old-base" if state == OUTDATED else state,
        )
    return row


def _refuse_self_approval(row: Proposal, person: Person) -> None:
    """By who it is: two tokens of one person are one person."""
    if audit.identity(person.name) in {audit.identity(entry["by"]) for entry in row.signers.values()}:
        raise NotAllowedError(
            f"{person.name} has signed proposal {row.id} already",
            why="a second signature is a second person's, with a token of their own and another name",
            then="somebody else has to sign it",
            reason="self-approval",
        )


def _publish_when_signed(
    session: Session, blobs: Blobs, row: Proposal, *, now: datetime, person: Person, online: OnlineKeys
) -> None:
    metadata: Metadata[Targets] = ceremony.parse_targets(row.body)
    if ceremony.missing_signatures(acceptance.trusted_root(session), TARGETS, metadata):
        return
    acceptance.accept_targets(session, blobs, row.body, now=now, actor=row.created_by, online=online)
    _close(row, PUBLISHED, now, person)


def _close(row: Proposal, state: str, now: datetime, person: Person) -> None:
    row.state, row.closed_at, row.closed_by = state, now, person.name


def _by(person: Person) -> dict[str, Any]:
    return {"by": person.name, "token": person.token_id}


def _name(row: Proposal) -> str:
    return f"proposal {row.id}"


def _refuse(why: str) -> TrustError:
    return TrustError("the proposal is refused", why=why, reason=Reason.BAD_SIGNATURE)
