"""Brings the next targets to the server: whatever changes in them, they go one way.

Fetch what is current as a TUF client of one's own, make the next version of it, sign, send, and wait until
the own client sees it published.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from agent_core import clock
from agent_core.errors import ConflictError, NotFoundError, UnreachableError
from release_server.publish import sign

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tuf.api.metadata import Metadata, Targets

    from release_server.publish.client import Client
    from release_server.publish.sign import Trusted

PUBLISH_S = 60.0
POLL_S = 0.25


@dataclass(frozen=True)
class Sent:
    """What became of proposed targets.

    Attributes:
        state: `published`, or `accepted` (taken, published any moment now).
        version: of the targets.
        expires: until when they hold.
    """

    state: str
    version: int
    expires: str

    def to_json(self) -> dict[str, Any]:
        return {"state": self.state, "targets_version": self.version, "expires": self.expires}


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
    """Sign the next targets and bring them to the server.

    Args:
        trusted: what `metadata` was made from.
        wait_s: how long to wait until they are published.

    Raises:
        ConflictError: somebody else published meanwhile.
        TrustError: the server refuses them, or serves what it should not.
        NotAllowedError: there are too few release keys here, or the token lacks the role.
        UnreachableError: the server does not answer.
    """
    body = sign.sign_targets(metadata, trusted.root.signed, manager.signers(trusted))
    manager.client.post("/metadata/targets", body)
    published = wait_published(manager.look, metadata.signed, wait_s)
    expires = clock.iso(metadata.signed.expires)
    return Sent("published" if published else "accepted", metadata.signed.version, expires)


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
