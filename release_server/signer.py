"""The online keys: they say who gets a release and when, and that metadata is fresh; never what may run.

Only the signer process opens them (`release_server.signing`). Everyone else knows the public halves, from
`trust/online.json`.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from agent_core.errors import MalformedError, NotFoundError, UsageError
from keys import roles, signers
from keys.ceremony import OnlineKeys
from release_server.blobs import write_file

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path


ONLINE = roles.ONLINE_ROLES
NEXT = ".next"
"""In the names of key files that wait to take the place of today's."""
UPCOMING = "upcoming.json"
"""Beside `online.json`: the public halves of keys that wait for a root that names them."""


def key_path(directory: Path, role: str) -> Path:
    return directory / f"{role}{signers.SUFFIX}"


def make_keys(directory: Path, now: datetime, *, beside: str = "") -> None:
    """Make the key of each online role; one that is there already is kept.

    Args:
        beside: `NEXT` for keys that wait until people have signed a root that names them.
    """
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for role in ONLINE:
        place = key_path(directory, f"{role}{beside}")
        if not place.exists():
            signers.create(place, role=role, now=now, passphrase=None)


def use_token(directory: Path, role: str, uri: str, now: datetime, pin: Callable[[str], str]) -> None:
    """Take the key of an online role from a PKCS#11 token; the private half never leaves it.

    Args:
        uri: `hsm:KEYID?label=TOKEN`; PYKCS11LIB names the token's library.
        pin: asked for the token's PIN, when the public half needs it.

    Raises:
        ConflictError: the role has a key already.
        UsageError: there is no such key, or no library for tokens.
    """
    from urllib.parse import parse_qs, urlsplit

    from securesystemslib.signer import HSMSigner

    parts = urlsplit(uri)
    label = parse_qs(parts.query).get("label", [None])[0]
    try:
        if parts.scheme != HSMSigner.SCHEME:
            raise ValueError(f"it is not of the form {HSMSigner.SCHEME}:KEYID?label=TOKEN")
        found, public = HSMSigner.import_(int(parts.path or HSMSigner.SCHEME_KEYID), label, pin)
    except Exception as error:
        # The token's library raises what its vendor likes; whatever it is, there is no key.
        why = f"{type(error).__name__}: {error}"
        raise UsageError(f"the key {uri} cannot be used", why=why, reason="no-signer") from error
    signers.refer(key_path(directory, role), found, public, role=role, now=now)


def public_halves(directory: Path) -> OnlineKeys:
    """What a root ceremony needs of the online keys; the private halves stay closed."""
    return OnlineKeys.of_roles({role: signers.read(key_path(directory, role)).public for role in ONLINE})


def upcoming_halves(directory: Path) -> OnlineKeys | None:
    """The keys that are to take the place of today's; None when none were made."""
    found = {role: key_path(directory, f"{role}{NEXT}") for role in ONLINE}
    if not any(place.exists() for place in found.values()):
        return None
    places = {role: place if place.exists() else key_path(directory, role) for role, place in found.items()}
    return OnlineKeys.of_roles({role: signers.read(place).public for role, place in places.items()})


def write_public(place: Path, halves: OnlineKeys) -> None:
    """Leave the public halves where web processes read them."""
    write_file(place, json.dumps(halves.to_json(), indent=2).encode() + b"\n")


def read_public(place: Path) -> OnlineKeys:
    """The public online keys.

    Raises:
        NotFoundError: the server was never initialised.
        MalformedError: the file was changed by hand.
    """
    try:
        decoded = json.loads(place.read_bytes())
    except FileNotFoundError:
        raise NotFoundError(f"{place} does not exist", then="release-server init") from None
    except ValueError as error:
        raise MalformedError(f"{place} cannot be read", why=str(error)) from None
    online = OnlineKeys.from_json(decoded, place.name)
    beside = place.with_name(UPCOMING)
    if place.name == UPCOMING or not beside.exists():
        return online
    return replace(online, upcoming=read_public(beside))


def follow_public(place: Path, keys: OnlineKeys, upcoming: OnlineKeys | None) -> None:
    """Have the files say what the signer says; they are how web processes know its keys."""
    beside = place.with_name(UPCOMING)
    if read_public(place) != keys:
        write_public(place, keys)
    if upcoming is None:
        beside.unlink(missing_ok=True)
    elif not beside.exists() or read_public(beside) != upcoming:
        write_public(beside, upcoming)
