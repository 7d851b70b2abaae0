"""TLS by the server itself: which certificate and key it shows, and why a pair is refused at the start."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent_core.errors import SettingsError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """A certificate with its chain, and its private key: PEM files, read when a web process starts."""

    certificate: Path
    key: Path

    def check(self) -> None:
        """Refuse what could not be served, or what others on the host could serve as well.

        Raises:
            SettingsError: a file is missing, the key is open to others, has a passphrase or fits not.
        """
        try:
            mode = self.key.stat().st_mode
        except OSError as error:
            raise _refused(
                f"{self.key}: {error.strerror}", "check server.tls_key, and who may open it"
            ) from error
        if mode & 0o077:
            raise _refused(f"others on this host can open {self.key}", f"chmod 600 {self.key}")
        try:
            # A passphrase is never asked for: nobody sits at the terminal of a server.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.certificate, self.key, password="")
        except (OSError, ssl.SSLError) as error:
            raise _refused(
                f"{self.certificate} with {self.key}: {error}",
                "check that both are PEM, belong together, and that the key has no passphrase",
            ) from error


def _refused(why: str, then: str) -> SettingsError:
    return SettingsError("the server's TLS files cannot be used", why=why, then=then)


def unverified() -> ssl.SSLContext:
    """For asking our own port whether it answers: no secret is said, and it may be named otherwise."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
