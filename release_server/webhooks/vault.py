"""This module keeps the key that secrets of webhooks follow from: a file, and never the database."""

from __future__ import annotations

import hmac
import secrets
from typing import TYPE_CHECKING

from agent_core.errors import RelfleetError
from release_server.blobs import write_file
from release_server.webhooks import signature

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

LENGTH = 32


class Vault:
    """The key of one server; replicas share it.

    Args:
        place: the file, of mode 0600.
    """

    def __init__(self, place: Path) -> None:
        self.place = place

    def make(self) -> None:
        """Make the key where there is none. Only inside `Sessions.write()`: there one writes at a time."""
        if not self.place.exists():
            write_file(self.place, secrets.token_hex(LENGTH).encode() + b"\n", mode=0o600)

    def key(self) -> bytes:
        """The key.

        Raises:
            RelfleetError: `webhook-key`: it is gone, open to others, or no key.
        """
        try:
            if self.place.stat().st_mode & 0o077:
                raise _unusable("others can read it", f"chmod 600 {self.place}, and rotate every secret")
            key = bytes.fromhex(self.place.read_text("ascii").strip())
        except (OSError, ValueError) as error:
            raise _unusable(f"{type(error).__name__}", f"restore {self.place} from a backup") from error
        if len(key) != LENGTH:
            raise _unusable("it has another length", f"restore {self.place} from a backup")
        return key

    def fresh(self) -> tuple[str, str, str]:
        """A new secret: its salt, its mark, and the text that its receiver is given."""
        salt = secrets.token_hex(16)
        secret = signature.secret_of(self.key(), salt)
        return salt, signature.mark_of(secret), signature.shown(secret)

    def open(self, made: Iterable[tuple[str, str]]) -> list[bytes]:
        """The secrets of these salts and marks.

        Raises:
            RelfleetError: `webhook-key`: the key is not the one that they were made with.
        """
        key = self.key()
        found = []
        for salt, mark in made:
            secret = signature.secret_of(key, salt)
            if not hmac.compare_digest(signature.mark_of(secret), mark):
                raise _unusable(
                    "it is not the one that the secrets were made with",
                    f"restore {self.place} from a backup, or type release webhook rotate ID",
                )
            found.append(secret)
        return found


def _unusable(why: str, then: str) -> RelfleetError:
    return RelfleetError("the key of webhooks cannot be used", why=why, then=then, reason="webhook-key")
