"""The part of `release key` that needs no server: a ceremony's files, and `list`, `show`, `export-trust`.

`release key gen` is in `release_server.publish`, since it brings what is made here to a server.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent_core import console
from agent_core.errors import ConflictError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime

    from securesystemslib.signer import Signer
    from tuf.api.metadata import Metadata, Root, Targets

    from keys.ceremony import OnlineKeys
    from keys.signers import KeyFile

RELEASE = "release"
"""The role that key files of release managers carry; in TUF's words they sign `targets`."""
ROOT_FILE = "root.json"
TARGETS_FILE = "targets.json"
NEWEST_ROOT_FILE = "newest-root.json"
"""The root that took the place of the ceremony's own, where one was made or signed here."""


def default_dir() -> Path:
    """Where key files are unless a flag or RELFLEET_KEYS says otherwise."""
    if said := os.environ.get("RELFLEET_KEYS"):
        return Path(said)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "relfleet" / "keys"


def keys_dir_option() -> Callable[[Any], Any]:
    return click.option(
        "--keys-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Where the key files are (RELFLEET_KEYS; else in the user's config).",
    )


def passphrase_option() -> Callable[[Any], Any]:
    return click.option(
        "--passphrase-file",
        type=click.Path(path_type=Path, dir_okay=False),
        help="Holds the passphrase, - is stdin; else RELFLEET_PASSPHRASE, a systemd credential, or a prompt.",
    )


def passphrases(file: Path | None, *, new: bool = False) -> Callable[[str], str]:
    """Where the running command gets passphrases from.

    Args:
        file: the --passphrase-file.
        new: a new one is chosen, so a person types it twice.
    """
    from keys.signers import passphrase_source

    def ask(prompt: str) -> str:
        typed: str = click.prompt(prompt, hide_input=True, err=True, confirmation_prompt=new)
        return typed

    return passphrase_source(file, os.environ, ask if console.can_ask() else None)


# --- the ceremony's files ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceremony:
    """The metadata that a server starts from, and whether this call made it."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    made: bool


def hold_ceremony(
    directory: Path,
    online: OnlineKeys,
    passphrase: Callable[[str], str],
    now: datetime,
    *,
    root_keys: int = 1,
    root_threshold: int = 1,
    release_keys: int = 1,
    release_threshold: int = 1,
    scrypt_n: int | None = None,
) -> Ceremony:
    """Make the keys, root 1 and targets 1 in a directory; a ceremony that was cut short goes on.

    Args:
        directory: gets one file a key, `root.json` and `targets.json`.
        online: the server's public keys.
        passphrase: seals the new keys, and opens those that a cut ceremony left.
        scrypt_n: see `keys.signers.create`.

    Raises:
        ConflictError: the directory holds a root of other keys or thresholds.
        UsageError, TrustError: see `keys.ceremony.make_root`.
    """
    from keys import ceremony

    asked = (root_keys, root_threshold, release_keys, release_threshold)
    if (found := read_ceremony(directory)) is not None:
        _refuse_other(found, asked, online, directory)
        return found
    ceremony.check_threshold("root", root_keys, root_threshold)
    ceremony.check_threshold("targets", release_keys, release_threshold)
    how: dict[str, Any] = {"passphrase": passphrase, "now": now, "scrypt_n": scrypt_n}
    roots = ensure_keys(directory, "root", root_keys, **how)
    releases = ensure_keys(directory, RELEASE, release_keys, **how)
    root = ceremony.make_root(
        root_keys=[signer.public_key for signer in roots],
        release_keys=[signer.public_key for signer in releases],
        online=online,
        now=now,
        root_threshold=root_threshold,
        targets_threshold=release_threshold,
    )
    targets = ceremony.make_targets(online.cohorts, now)
    ceremony.sign(root, roots)
    ceremony.sign(targets, releases)
    ceremony.check_targets(targets.signed, root.signed)
    # The root last: it is what says that the ceremony is over.
    write_public(directory / TARGETS_FILE, targets.to_bytes())
    write_public(directory / ROOT_FILE, ceremony.export_trust(root))
    return Ceremony(root, targets, made=True)


def read_ceremony(directory: Path) -> Ceremony | None:
    """What an earlier ceremony left in a directory, verified; None when there was none.

    Raises:
        TrustError: what is there does not verify.
        NotFoundError: the root is there without its targets.
    """
    from keys import ceremony

    try:
        root = ceremony.parse_root((directory / ROOT_FILE).read_bytes())
    except FileNotFoundError:
        return None
    ceremony.verify_root(root)
    try:
        targets = ceremony.parse_targets((directory / TARGETS_FILE).read_bytes())
    except FileNotFoundError:
        raise NotFoundError(
            f"{directory} holds a root but no {TARGETS_FILE}",
            why="the first targets of the ceremony are missing",
            then="copy them here from where the ceremony was held",
        ) from None
    ceremony.check_targets(targets.signed, root.signed)
    return Ceremony(root, targets, made=False)


def _refuse_other(
    found: Ceremony, asked: tuple[int, int, int, int], online: OnlineKeys, directory: Path
) -> None:
    roles = found.root.signed.roles
    root, release = roles["root"], roles["targets"]
    held = (len(root.keyids), root.threshold, len(release.keyids), release.threshold)
    known = {*roles["snapshot"].keyids, *roles["timestamp"].keyids}
    if held == asked and known == {online.snapshot.keyid, online.timestamp.keyid}:
        return
    why = "it was made for another server" if held == asked else "it has other numbers of keys or thresholds"
    raise ConflictError(
        f"{directory} holds the root of another ceremony",
        why=why,
        then="use another --keys-dir; a root is never replaced by a new beginning",
        reason="root-exists",
    )


def ensure_keys(
    directory: Path,
    role: str,
    count: int,
    *,
    passphrase: Callable[[str], str],
    now: datetime,
    scrypt_n: int | None = None,
) -> Sequence[Signer]:
    """Open the keys of a role that are there, and make those that are not; one passphrase seals them all."""
    from keys import signers

    names = [role] if count == 1 else [f"{role}-{number}" for number in range(1, count + 1)]
    chosen = passphrase(f"Passphrase of the {role} {'key' if count == 1 else 'keys'}")
    opened: list[Signer] = []
    for name in names:
        path = directory / f"{name}{signers.SUFFIX}"
        if path.exists():
            opened.append(signers.load(path, lambda _prompt: chosen))
        else:
            cost = {} if scrypt_n is None else {"scrypt_n": scrypt_n}
            opened.append(signers.create(path, role=role, now=now, passphrase=chosen, **cost))
    return opened


def write_public(path: Path, body: bytes) -> None:
    """Write a public file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as stream:
        stream.write(body)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


# --- commands ----------------------------------------------------------------------------------------------


@click.command("list", short_help="List the key files here.")
@keys_dir_option()
def list_keys(keys_dir: Path | None) -> None:
    """List the key files of this user, with the roles they have in the trusted root."""
    directory = keys_dir or default_dir()
    from keys import signers

    rows = [described(entry, directory) for entry in signers.find(directory)]
    columns = ["name", "role", "keyid", "protection", "created", "signs"]

    def text() -> str:
        short = [{**row, "keyid": row["keyid"][:12], "signs": ", ".join(row["signs"])} for row in rows]
        shown = [[row[name] for name in columns] for row in short]
        return console.table(columns, shown, empty=f"no keys in {directory}; release key gen makes some")

    console.emit(rows, text)


@click.command("show", short_help="Show one key, without opening it.")
@click.argument("name")
@keys_dir_option()
def show_key(name: str, keys_dir: Path | None) -> None:
    """Show the public half of a key, by its name or the beginning of its id."""
    found = described(one_key(keys_dir or default_dir(), name), keys_dir or default_dir())
    console.emit(found, lambda: console.facts({**found, "signs": ", ".join(found["signs"])}.items()))


@click.command("export-trust", short_help="Write the trust file that agents are installed with.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path, dir_okay=False), help="The file; else stdout."
)
@keys_dir_option()
def export_trust(output: Path | None, keys_dir: Path | None) -> None:
    """Write the trusted root: the one file that says which keys an agent believes."""
    from keys import ceremony

    directory = keys_dir or default_dir()
    try:
        body = (directory / ROOT_FILE).read_bytes()
    except FileNotFoundError:
        raise NotFoundError(f"there is no root in {directory}", then="release key gen") from None
    root = ceremony.parse_root(body)
    ceremony.export_trust(root)
    if output is None:
        sys.stdout.buffer.write(body)
        return
    write_public(output, body)
    console.say(f"wrote root {root.signed.version} to {output}")


def described(entry: KeyFile, directory: Path) -> dict[str, Any]:
    """What a key file says, and which roles of the directory's root its key has."""
    root = _newest_root(directory)
    roles = root.signed.roles if root else {}
    return {**entry.to_json(), "signs": [name for name, role in roles.items() if entry.keyid in role.keyids]}


def _newest_root(directory: Path) -> Metadata[Root] | None:
    from keys import ceremony

    for name in (NEWEST_ROOT_FILE, ROOT_FILE):
        if (directory / name).exists():
            return ceremony.parse_root((directory / name).read_bytes())
    return None


def one_key(directory: Path, name: str) -> KeyFile:
    """The key file of this name, or whose key id begins so.

    Raises:
        NotFoundError: none, or more than one.
    """
    from keys import signers

    entries = signers.find(directory)
    fits = [entry for entry in entries if entry.name == name]
    fits = fits or [entry for entry in entries if len(name) >= 6 and entry.keyid.startswith(name)]
    if len(fits) != 1:
        raise NotFoundError(f"there is no key {name} in {directory}", then="release key list")
    return fits[0]
