"""Brings the next targets to the server: whatever changes in them, they go one way.

Fetch what is current as a TUF client of one's own, make the next version of it, sign, send, and wait until
the own client sees it published.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from agent_core import clock
from agent_core.errors import ConflictError, NotFoundError, UnreachableError
from keys import ceremony
from keys.roles import TARGETS
from release_server.publish import sign

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tuf.api.metadata import Metadata, Targets

    from release_server.publish.client import Client
    from release_server.publish.sign import Trusted

PUBLISH_S = 60.0
POLL_S = 0.1
PUBLISHED, ACCEPTED, STAGED = "published", "accepted", "staged"


@dataclass(frozen=True)
class Sent:
    """What became of proposed targets.

    Attributes:
        state: `published`, `accepted` (taken, published any moment now), or `staged` (others have to sign).
        version: of the targets.
        expires: until when they hold.
        proposal: what the server says of it when it is staged.
    """

    state: str
    version: int
    expires: str
    proposal: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "state": self.state,
            "targets_version": self.version,
            "expires": self.expires,
            "proposal": self.proposal,
        }


@dataclass(frozen=True)
class Manager:
    """A release manager at work: a server, the root that is trusted, and the keys at hand.

    Attributes:
        trust: the first root, from `sign.read_trust`.
        state: where verified metadata is remembered.
        signers: opens the release keys; called only when there is something to sign.
    """

    client: Client
    trust: bytes
    state: Path
    signers: Callable[[Trusted], Sequence[Any]]

    def look(self) -> Trusted:
        """The current metadata, verified by this manager's own client."""
        return sign.fetch(self.client, self.trust, sign.cache_dir(self.state, self.client.url, self.trust))


def send(
    manager: Manager, trusted: Trusted, metadata: Metadata[Targets], *, wait_s: float = PUBLISH_S
) -> Sent:
    """Sign the next targets, bring them to the server, and wait until they are published.

    Args:
        trusted: what `metadata` was made from.
        wait_s: how long to wait; what is staged is not waited for.

    Raises:
        ConflictError: somebody else published meanwhile.
        TrustError: the server refuses them, or serves what it should not.
        NotAllowedError: there is no release key here, or the token lacks the role.
        UnreachableError: the server does not answer.
    """
    sent = deliver(manager.client, trusted, metadata, manager.signers(trusted))
    if sent.state == ACCEPTED and wait_published(manager.look, metadata.signed, wait_s):
        return replace(sent, state=PUBLISHED)
    return sent


def deliver(client: Client, trusted: Trusted, metadata: Metadata[Targets], opened: Sequence[Any]) -> Sent:
    """Sign the next targets and bring them to the server: to be published, or to wait for more signatures.

    Raises:
        ConflictError, TrustError, NotAllowedError, UnreachableError: see `send`.
    """
    missing = sign.sign_targets(metadata, trusted.root.signed, opened)
    sent = Sent(ACCEPTED, metadata.signed.version, clock.iso(metadata.signed.expires))
    if not missing:
        client.post("/metadata/targets", metadata.to_bytes())
        return sent
    return replace(sent, state=STAGED, proposal=client.post("/proposals", metadata.to_bytes()))


def find_staged(client: Client, trusted: Trusted, is_it: Callable[[Targets], bool]) -> dict[str, Any] | None:
    """The open proposal that holds what is to be proposed; None when there is none, or nobody else signs."""
    if trusted.root.signed.roles[TARGETS].threshold == 1:
        return None
    for proposal in client.items("/proposals"):
        metadata = fetch_proposal(client, proposal["id"])
        if metadata.signed.version == trusted.version + 1 and is_it(metadata.signed):
            return proposal
    return None


def join(
    client: Client, trusted: Trusted, signed: Metadata[Targets] | None, is_it: Callable[[Targets], bool]
) -> tuple[str, dict[str, Any] | None] | None:
    """Find the open proposal that holds what is to be proposed, and bring it the signatures of a file.

    Args:
        signed: targets that came in a file; None when nothing was signed elsewhere.

    Returns:
        `staged` with the proposal, or `accepted` when a signature of the file was the last it needed. None
        when there is nothing to join: no such proposal is open, or the file is signed by enough people to be
        published as it is.

    Raises:
        ConflictError: `proposed-otherwise`; the same is proposed in other targets, to which no signature of
            the file belongs.
        TrustError: no signature of the file counts.
        NotAllowedError: `self-approval`; who brings them has brought another signature of it already.
    """
    if signed is None:
        staged = find_staged(client, trusted, is_it)
        return (STAGED, staged) if staged else None
    if not sign.sign_targets(signed, trusted.root.signed, ()):
        return None
    staged = find_staged(client, trusted, signed.signed.__eq__)
    if staged is not None:
        return _add_signatures(client, trusted, staged, signed)
    if other := find_staged(client, trusted, is_it):
        raise _proposed_otherwise(int(other["id"]))
    return None


def _add_signatures(
    client: Client, trusted: Trusted, proposal: dict[str, Any], signed: Metadata[Targets]
) -> tuple[str, dict[str, Any] | None]:
    """Bring those signatures of a file that the proposal lacks; the last one that it needs publishes it."""
    there = fetch_proposal(client, proposal["id"]).signatures
    for keyid in ceremony.signed_by(trusted.root.signed, TARGETS, signed):
        if keyid not in there:
            body = {"keyid": keyid, "sig": signed.signatures[keyid].signature}
            proposal = client.post(f"/proposals/{proposal['id']}/signatures", body)
            if proposal.get("state") == PUBLISHED:
                return ACCEPTED, None
    return STAGED, proposal


def _proposed_otherwise(number: int) -> ConflictError:
    return ConflictError(
        f"proposal {number} holds these bundles in other targets than the signed file",
        why="a signature counts for the targets that it was made for, and these were made anew",
        then=f"go on with it: release approve {number}; or with the file: release withdraw {number}, "
        "then the same command",
        reason="proposed-otherwise",
    )


def fetch_proposal(client: Client, number: int) -> Metadata[Targets]:
    """Proposed targets as the server has them; nothing in them is trusted yet."""
    body = bytearray()
    client.download(f"/proposals/{number}/metadata", sign.MAX_TARGETS, body.extend)
    return ceremony.parse_targets(bytes(body))


def wait_published(look: Callable[[], Trusted], wanted: Targets, wait_s: float) -> bool:
    """Wait until these very targets are current; False when the time was up first.

    Raises:
        ConflictError: others took their place.
    """
    until = clock.boot_s() + wait_s
    pause_s = POLL_S
    while True:
        try:
            current = look().targets.signed
        except (UnreachableError, NotFoundError):
            pass
        else:
            if current == wanted:
                return True
            if current.version >= wanted.version:
                raise ConflictError(
                    "someone else published meanwhile",
                    why=f"targets {current.version} are others than these",
                    then="run the same command again",
                )
        if clock.boot_s() + pause_s > until:
            return False
        time.sleep(pause_s)
        pause_s = min(2.0, pause_s * 1.5)
