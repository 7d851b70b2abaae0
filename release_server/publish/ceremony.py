"""Brings the next root along: what it stands on is fetched and verified, and what is signed is published.

The rules and the file are `keys.rotation`'s; this reads keys and roots, and speaks to the server.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from agent_core import clock
from agent_core.errors import ConflictError, MalformedError, NotFoundError, TrustError, UnreachableError
from keys import ceremony, rotation, signers
from keys.cli import one_key
from release_server.publish import sign

if TYPE_CHECKING:
    from collections.abc import Callable

    from securesystemslib.signer import Key, Signer
    from tuf.api.metadata import Metadata, Root

    from keys.rotation import NextRoot
    from release_server.publish.client import Client
    from release_server.publish.propose import Manager
    from release_server.publish.sign import Trusted

POLL_S = 0.1


def fetch_chain(client: Client, trusted: Trusted) -> list[Metadata[Root]]:
    """Every root from the first to the one that is trusted now, each signed by the one before it.

    Raises:
        TrustError: the server serves others.
        NotFoundError: one is missing.
    """
    chain: list[Metadata[Root]] = []
    for version in range(1, trusted.root.signed.version + 1):
        body = bytearray()
        client.download(f"/metadata/{version}.root.json", sign.MAX_ROOT, body.extend, static=True)
        root = ceremony.parse_root(bytes(body))
        ceremony.verify_root(root, chain[-1] if chain else None)
        chain.append(root)
    if chain[-1].signed != trusted.root.signed:
        raise TrustError("the roots of this server do not lead to the trusted one", reason="other-root")
    return chain


def read_chain(cache: Path) -> list[Metadata[Root]]:
    """The same from what this machine has verified last, with no server.

    Raises:
        NotFoundError: it has verified nothing yet, or not the first root.
    """
    found = sorted((int(place.name.split(".")[0]), place) for place in cache.glob("root_history/*.root.json"))
    if not found or found[0][0] != 1:
        raise NotFoundError(
            "this machine does not have every root",
            why=f"there is none in {cache}" if not found else "its trusted root is not the first one",
            then="run this once without --offline",
        )
    return [ceremony.parse_root(place.read_bytes()) for _, place in found]


# --- keys --------------------------------------------------------------------------------------------------


def public_key(directory: Path, name: str) -> Key:
    """A key that is to be added: a key file, what `release key show NAME --json` wrote, or a name here.

    Raises:
        NotFoundError, MalformedError: there is none, or it cannot be read.
    """
    path = Path(name)
    if not path.is_file():
        return one_key(directory, name).public
    if path.name.endswith(signers.SUFFIX):
        return signers.read(path).public
    try:
        return signers.public_key(json.loads(path.read_bytes()), path.name)
    except ValueError as error:
        raise MalformedError(f"{path} is no public key", why=str(error)) from None


def held_key(root: Root, directory: Path, name: str) -> str:
    """The id of a root or release key that is to go: by a name or a file here, or the beginning of its id.

    Raises:
        NotFoundError: no such key, or more than one.
    """
    known = {keyid for role in rotation.PEOPLE for keyid in root.roles[role].keyids}
    fits = [keyid for keyid in known if len(name) >= 6 and keyid.startswith(name)]
    if len(fits) == 1:
        return fits[0]
    try:
        keyid = public_key(directory, name).keyid
    except NotFoundError as error:
        why = _without_file(root, directory)
        raise NotFoundError(error.what, why=why, then="name a lost key by the beginning of its id") from None
    if keyid not in known:
        raise NotFoundError(f"{name} is neither a root nor a release key", then="release key list")
    return keyid


def _without_file(root: Root, directory: Path) -> str:
    """Who lost a key file has its id from here: which keys of the root are not in this directory."""
    here = {entry.keyid for entry in signers.find(directory)}
    away = [
        f"{word} {keyid[:12]}"
        for role, word in rotation.PEOPLE.items()
        for keyid in root.roles[role].keyids
        if keyid not in here
    ]
    return f"of the keys that count, these have no file here: {', '.join(away)}" if away else ""


def roles_of(root: Root, keyid: str) -> list[str]:
    """The people's roles that a key has."""
    return [role for role in rotation.PEOPLE if keyid in root.roles[role].keyids]


def open_signers(following: NextRoot, directory: Path, passphrase: Callable[[str], str]) -> list[Signer]:
    """Every key here whose signature is of use and is not there yet; others stay closed."""
    wanted = rotation.may_sign(following)
    mine = [entry for entry in signers.find(directory) if entry.keyid in wanted]
    return [signers.load(entry.path, passphrase) for entry in mine]


# --- publishing --------------------------------------------------------------------------------------------


def publish(manager: Manager, following: NextRoot, wait_s: float) -> bool:
    """Bring a signed root to the server, with the targets that go with it; whether it is published in time.

    Raises:
        ConflictError: the server is at another root or other targets meanwhile.
        TrustError: it refuses them.
        NotAllowedError: the token is no admin's.
    """
    root, targets = following.root.to_bytes(), following.targets
    if targets is None:
        manager.client.put("/trust/root", root)
    else:
        body = {"root": root.decode(), "targets": targets.to_bytes().decode()}
        manager.client.put("/trust/ceremony", body)
    return _wait_published(manager, following, wait_s)


def _wait_published(manager: Manager, following: NextRoot, wait_s: float) -> bool:
    """Wait until this machine's own client follows the new root, and verifies all that hangs on it."""
    until = clock.boot_s() + wait_s
    while True:
        try:
            seen = manager.look()
        except (UnreachableError, NotFoundError):
            pass
        except TrustError:
            # Between the new root and what is signed under it: a moment, unless it stays so.
            if clock.boot_s() + POLL_S > until:
                raise
        else:
            if seen.root.signed == following.root.signed:
                return True
            if seen.root.signed.version > following.root.signed.version:
                raise ConflictError("another root has taken the place of this one", reason="old-base")
        if clock.boot_s() + POLL_S > until:
            return False
        time.sleep(POLL_S)
