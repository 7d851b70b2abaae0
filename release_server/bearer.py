"""Makes secrets that speak for whoever has them: tokens and sessions. The database has their hashes alone."""

from __future__ import annotations

import secrets
from datetime import timedelta
from hashlib import sha256

TOUCH_EVERY = timedelta(minutes=1)
"""How old the note of a secret's last use may be; not every request writes."""


def make(prefix: str = "") -> str:
    """A new one of 256 random bits, behind a prefix that scanners can look for; shown once."""
    return prefix + secrets.token_urlsafe(32)


def hash_of(secret: str) -> str:
    """What is kept of it. No salt is needed: nobody can try 2^256 of them."""
    return sha256(secret.encode()).hexdigest()
