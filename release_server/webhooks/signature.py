"""This module signs what is sent, as the Standard Webhooks specification (1.0.0) has it; pure.

A secret is not kept: it follows from the server's key and a salt. The salt lies in the database, the key in a
file beside it, and neither is of use without the other (docs/decisions/0025).
"""

from __future__ import annotations

import hmac
from base64 import b64encode
from hashlib import sha256
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

PREFIX = "whsec_"
VERSION = "v1"
PURPOSE = b"relfleet webhook secret 1\0"


def secret_of(key: bytes, salt: str) -> bytes:
    """The 32 bytes that one webhook's receiver knows, too."""
    return hmac.digest(key, PURPOSE + salt.encode(), "sha256")


def shown(secret: bytes) -> str:
    """A secret as receivers' libraries take it."""
    return PREFIX + b64encode(secret).decode()


def mark_of(secret: bytes) -> str:
    """What tells whether a secret is still the one that was shown, and nothing else of it."""
    return sha256(PURPOSE + secret).hexdigest()


def headers(event_id: str, at: datetime, body: bytes, secrets: Iterable[bytes]) -> dict[str, str]:
    """What goes with a body: its id, when it is sent, and a signature by each secret that is valid.

    Args:
        event_id: without a full stop, which parts what is signed.
        at: of this try, so that a receiver can refuse what somebody sends again much later.
    """
    stamp = str(int(at.timestamp()))
    signed = f"{event_id}.{stamp}.".encode() + body
    made = (b64encode(hmac.digest(secret, signed, "sha256")).decode() for secret in secrets)
    return {
        "webhook-id": event_id,
        "webhook-timestamp": stamp,
        "webhook-signature": " ".join(f"{VERSION},{text}" for text in made),
    }
