"""`release key`: the keys that say what may run, and the ceremonies that make and change them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console
from agent_core.errors import ConflictError, MalformedError
from keys import cli as keys_cli
from keys.cli import keys_dir_option, passphrase_option, passphrases
from release_server.publish import profile as profiles
from release_server.publish.commands import ceremony as ceremonies
from release_server.publish.profile import connect

if TYPE_CHECKING:
    from collections.abc import Callable

    from keys.ceremony import OnlineKeys
    from release_server.publish.client import Client


@click.group("key", cls=console.Group)
def key() -> None:
    """The keys that say what may run: root changes keys, release keys sign releases."""


@key.command("gen", short_help="Hold the first ceremony, or make one more key.")
@click.option("--role", type=click.Choice(["root", keys_cli.RELEASE]), help="Only make keys of this role.")
@click.option("--name", help="With --role: the key's name.")
@click.option("--keys", "root_keys", type=click.IntRange(1, 15), default=1, help="How many root keys.")
@click.option(
    "--threshold", type=click.IntRange(1, 15), default=1, help="How many root keys change the root."
)
@click.option("--release-keys", type=click.IntRange(1, 15), default=1, help="How many release keys.")
@click.option(
    "--release-threshold", type=click.IntRange(1, 15), default=1, help="How many release keys sign a release."
)
@click.option("--offline", is_flag=True, help="Bring nothing to the server; needs --online.")
@click.option(
    "--online",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The server's public keys: what GET /api/v1/trust says, or its trust/online.json.",
)
@click.option(
    "--trust-file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the trust file for agents here, too.",
)
@keys_dir_option()
@passphrase_option()
def gen(
    role: str | None,
    name: str | None,
    keys_dir: Path | None,
    passphrase_file: Path | None,
    trust_file: Path | None,
    *,
    offline: bool,
    online: Path | None,
    **numbers: int,
) -> None:
    """Make the root key, the release key and the first metadata, and bring it to the server.

    One root key with threshold 1 is fine for a trial; for production: --keys 3 --threshold 2, each file on a
    medium of its own. Run again after an interruption, it goes on where it stopped.
    """
    directory = keys_dir or keys_cli.default_dir()
    source = passphrases(passphrase_file, new=True)
    if role is not None:
        _make_key(directory, role, name or role, source)
        return
    if name is not None:
        raise click.UsageError("--name goes with --role")
    if offline and online is None:
        raise click.UsageError("--offline needs --online FILE: the server's public keys")
    client = None if offline else connect(profiles.current())
    trust = client.get("/trust") if client else None
    keys = _online_keys(online, trust)
    if client is not None and keys_cli.read_ceremony(directory) is None:
        _refuse_begun(trust)
    held = keys_cli.hold_ceremony(
        directory,
        keys,
        source,
        clock.now(),
        root_keys=numbers["root_keys"],
        root_threshold=numbers["threshold"],
        release_keys=numbers["release_keys"],
        release_threshold=numbers["release_threshold"],
    )
    root_file = directory / keys_cli.ROOT_FILE
    if trust_file is not None:
        keys_cli.write_public(trust_file, root_file.read_bytes())
    published = bring_trust(client, held, trust) if client else False
    _tell_ceremony(held, directory, trust_file or root_file, published=published, offline=offline)


def _make_key(directory: Path, role: str, name: str, source: Callable[[str], str]) -> None:
    from keys import signers

    path = directory / f"{name}{signers.SUFFIX}"
    signers.create(path, role=role, now=clock.now(), passphrase=source(f"Passphrase of key {name}"))
    made = keys_cli.described(signers.read(path), directory)
    console.say(f"made {path}")
    console.emit(made, lambda: console.facts({**made, "signs": "nothing yet"}.items()))


def _online_keys(file: Path | None, trust: Any) -> OnlineKeys:
    from keys.ceremony import OnlineKeys

    found = trust
    if file is not None:
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise MalformedError(f"{file} is not JSON", why=str(error)) from None
    inner = found.get("online", found) if isinstance(found, dict) else found
    return OnlineKeys.from_json(inner, str(file) if file else "trust.online")


def _refuse_begun(trust: Any) -> None:
    if trust.get("root_version"):
        raise ConflictError(
            "this server has a root already",
            why=f"it is at root {trust['root_version']}, made with other keys",
            then="use those keys with --keys-dir, or get the trust file from who made them",
            reason="root-exists",
        )


def bring_trust(client: Client, held: keys_cli.Ceremony, trust: Any) -> bool:
    """Bring root 1 and targets 1 to a server that lacks them, and wait until they are published.

    Raises:
        ConflictError: the server has another root.
    """
    from release_server.publish import push, sign

    body = held.root.to_bytes()
    if not trust.get("root_version"):
        client.put("/trust/root", body)
    else:
        _refuse_another_root(client, body)
    if not trust.get("targets_version"):
        client.post("/metadata/targets", held.targets.to_bytes())
    cache = sign.cache_dir(profiles.state_dir(os.environ), client.url, body)
    wait_s = console.options().timeout_s or push.PUBLISH_S
    return push.wait_published(lambda: sign.fetch(client, body, cache), (), wait_s)


def _refuse_another_root(client: Client, body: bytes) -> None:
    from keys import ceremony

    served = client.call("GET", "/metadata/1.root.json", static=True).content
    if ceremony.parse_root(served).signed != ceremony.parse_root(body).signed:
        raise ConflictError(
            "this server has another root",
            why="its root 1 was made with other keys",
            then="use those keys with --keys-dir, or get the trust file from who made them",
            reason="root-exists",
        )


def _tell_ceremony(
    held: keys_cli.Ceremony, directory: Path, trust: Path, *, published: bool, offline: bool
) -> None:
    root, targets = held.root.signed.roles["root"], held.root.signed.roles["targets"]
    made = {
        "keys_dir": str(directory),
        "trust_file": str(trust),
        "root": {"version": held.root.signed.version, "keys": root.keyids, "threshold": root.threshold},
        "release": {"keys": targets.keyids, "threshold": targets.threshold},
        "made": held.made,
        "published": published,
    }
    state = "published" if published else "not yet published by the server"
    if offline:
        state = "not brought to a server; run this again without --offline where the server can be reached"

    def text() -> str:
        return console.facts(
            [
                ("keys", f"{directory}{'' if held.made else ' (made earlier)'}"),
                ("root", f"{root.threshold} of {len(root.keyids)} key(s)"),
                ("release", f"{targets.threshold} of {len(targets.keyids)} key(s)"),
                ("trust file", trust),
                ("metadata", state),
            ]
        )

    console.emit(made, text)
    if held.made:
        console.say("Keep the root keys offline: move their files to a medium of their own, with a copy.")


for command in (keys_cli.list_keys, keys_cli.show_key, keys_cli.export_trust):
    key.add_command(command)
for command in (ceremonies.rotate, ceremonies.revoke, ceremonies.sign_file, ceremonies.publish):
    key.add_command(command)
