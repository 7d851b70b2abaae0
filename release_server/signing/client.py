"""How the jobs process asks the signer; the only way to an online signature."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tuf.api.serialization.json import JSONSerializer

from agent_core.clock import boot_s
from agent_core.errors import TrustError, UnreachableError
from agent_core.wire import Getter
from keys.ceremony import OnlineKeys
from release_server.signing import protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tuf.api.metadata import Metadata

ASK_S = 5.0
"""How long the jobs process waits for an answer; it holds a transaction meanwhile."""
PASSING = frozenset({"rate", "disk"})
"""Refusals that the same request may not meet again."""
SERIALIZER = JSONSerializer(compact=True)


@dataclass(frozen=True)
class Known:
    """What the signer knows: versions of root, targets and of what it has signed; 0 before the first.

    Attributes:
        upcoming: keys that wait for a root that names them.
        signed_by: role → the id of the key that made its newest signature.
    """

    keys: OnlineKeys
    upcoming: OnlineKeys | None
    root: int
    targets: int
    signed: dict[str, int]
    signed_by: dict[str, str]
    entries: int

    @classmethod
    def from_json(cls, status: object) -> Known:
        get = Getter(status, "status")
        signed = Getter(get.object("signed"), "status.signed")
        by, waiting = Getter(get.object("signed_by"), "status.signed_by"), get.mapping.get("upcoming")
        return cls(
            OnlineKeys.from_json(get.object("keys"), "status.keys"),
            OnlineKeys.from_json(waiting, "status.upcoming") if waiting else None,
            get.integer("root"),
            get.integer("targets"),
            {role: signed.integer(role) for role in signed.mapping},
            {role: by.text(role) for role in by.mapping},
            get.integer("entries"),
        )


class SignerClient:
    """One signer, as the jobs process sees it.

    Args:
        ask: sends `{op, role}` and a body, and returns the answer's; see `over_socket`.

    Attributes:
        briefed: what the caller has last shown the signer; forgotten whenever something goes wrong.
    """

    def __init__(self, ask: Callable[[dict[str, Any], bytes], tuple[Getter, bytes]]) -> None:
        self._ask = ask
        self.briefed: tuple[int, ...] = ()

    def forget(self) -> None:
        """Brief it anew before the next signature: something was rolled back, or others have worked."""
        self.briefed = ()

    def known(self) -> Known:
        head, _ = self._ask({"op": "status"}, b"")
        return Known.from_json(head.object("status"))

    def trust(self, role: str, body: bytes) -> None:
        """Show it a root, targets, or what its own key signed; it follows what it can verify.

        Raises:
            TrustError: it does not follow this.
            UnreachableError: it is away.
        """
        self._ask({"op": "trust", "role": role}, body)

    def last(self, role: str) -> bytes:
        """The newest envelope it has signed; empty before the first."""
        return self._ask({"op": "last", "role": role}, b"")[1]

    def sign(self, role: str, metadata: Metadata[Any]) -> bytes:
        """Have metadata signed; the same again gives the same.

        Returns:
            The envelope.

        Raises:
            TrustError: the policy speaks against it; `reason` is one of `policy.Refusal`.
            UnreachableError: the signer is away, or asks to wait; the same may work later.
        """
        return self._ask({"op": "sign", "role": role}, metadata.to_bytes(SERIALIZER))[1]


def over_socket(place: Path) -> SignerClient:
    """The signer that listens at `place`; nothing is connected before something is asked."""

    def ask(head: dict[str, Any], body: bytes) -> tuple[Getter, bytes]:
        deadline = boot_s() + ASK_S
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(ASK_S)
                with protocol.reachable(place) as name:
                    connection.connect(name)
                protocol.send(connection, head, body, deadline)
                answer, content = protocol.receive(connection, deadline)
        except OSError as error:
            raise UnreachableError(
                "the signer is away",
                why=f"{place}: {error.strerror or error}",
                then="release-server run starts it; or: release-server signer",
                reason="signer-away",
            ) from error
        _raise_refusal(answer)
        return answer, content

    return SignerClient(ask)


def _raise_refusal(answer: Getter) -> None:
    if "refused" not in answer.mapping:
        return
    get = Getter(answer.object("refused"), "refused")
    error = UnreachableError if get.text("reason") in PASSING else TrustError
    raise error(
        get.text("what"),
        why=get.text("why", ""),
        then="the signer's log has the request",
        reason=get.text("reason"),
    )
