"""What holds one attempt to sign in together: a secret in a cookie, from which all else is derived. Pure.

The server keeps nothing of an attempt, so strangers who begin many of them fill nothing. Whoever comes back
must hold the cookie (state), the provider must have been asked for this attempt (nonce), and the code is
worth nothing without it (the verifier of RFC 7636).
"""

from __future__ import annotations

import hmac
import secrets
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from hashlib import sha256

PREFIX = "rfa_"


@dataclass(frozen=True)
class Attempt:
    """One attempt; `secret` stays in the browser that began it."""

    secret: str

    @classmethod
    def begin(cls) -> Attempt:
        """A new one, of 256 random bits."""
        return cls(PREFIX + secrets.token_urlsafe(32))

    @property
    def state(self) -> str:
        return self._derive("state")

    @property
    def nonce(self) -> str:
        return self._derive("nonce")

    @property
    def verifier(self) -> str:
        return self._derive("verifier")

    @property
    def hash(self) -> str:
        """What the session that comes of it remembers, so that no second one does."""
        return sha256(self.secret.encode()).hexdigest()

    def is_answered_by(self, state: str) -> bool:
        return hmac.compare_digest(self.state.encode(), state.encode())

    def _derive(self, purpose: str) -> str:
        made = hmac.digest(self.secret.encode(), purpose.encode(), "sha256")
        return urlsafe_b64encode(made).rstrip(b"=").decode()
