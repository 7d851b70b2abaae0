"""`release key rotate|revoke|sign|publish`: the next root, across as many machines as it takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console
from agent_core.errors import ConflictError, NotAllowedError, UsageError
from keys import cli as keys_cli
from keys.cli import keys_dir_option, passphrase_option, passphrases
from release_server.publish import profile as profiles
from release_server.publish.commands.trust import changes_table, manager, signing_options, wait_s
from release_server.publish.profile import trust_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from keys.rotation import NextRoot, Wanted
    from release_server.publish.propose import Manager

THRESHOLD = click.IntRange(1, 15)


def file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of commands that make the file of a next root."""
    for option in (
        click.option(
            "--output",
            "-o",
            type=click.Path(path_type=Path, dir_okay=False),
            help="The file that is carried to other holders; next-root-N.json when left out.",
        ),
        click.option(
            "--offline",
            is_flag=True,
            help="Begin from what was verified here last, whatever is served now; publish nothing.",
        ),
    ):
        command = option(command)
    return signing_options(command)


@click.command("rotate", short_help="Make the next root: other keys, thresholds, or one more year.")
@click.option("--add-root", multiple=True, metavar="KEY", help="A root key to add: a name here, or a file.")
@click.option("--add-release", multiple=True, metavar="KEY", help="A release key to add.")
@click.option("--remove", multiple=True, metavar="KEY", help="A key to remove: a name, a file, or its id.")
@click.option("--threshold", type=THRESHOLD, help="How many root keys change the root from now on.")
@click.option("--release-threshold", type=THRESHOLD, help="How many release keys sign from now on.")
@click.option("--online", is_flag=True, help="Name the keys that the server made to take its keys' place.")
@file_options
def rotate(
    *,
    add_root: tuple[str, ...],
    add_release: tuple[str, ...],
    remove: tuple[str, ...],
    online: bool,
    threshold: int | None,
    release_threshold: int | None,
    **where: Any,
) -> None:
    """Make the next root, sign it with the keys here, and publish it when that is enough.

    Without options it changes nothing and holds for another year. Old root keys and new ones sign it, as many
    as each threshold asks for. Where that takes other people, the file goes to them: release key sign FILE.
    """

    def wanted(who: Manager, root: Any, directory: Path) -> Wanted:
        from keys import rotation
        from release_server.publish import ceremony

        thresholds = {"root": threshold, "targets": release_threshold}
        return rotation.Wanted(
            {
                "root": [ceremony.public_key(directory, name) for name in add_root],
                "targets": [ceremony.public_key(directory, name) for name in add_release],
            },
            frozenset(ceremony.held_key(root, directory, name) for name in remove),
            {role: count for role, count in thresholds.items() if count is not None},
            _next_online(who, root) if online else None,
        )

    _make(wanted, **where)


@click.command("revoke", short_help="Take a stolen or lost key out of the root.")
@click.argument("key")
@click.option("--with", "heir", metavar="KEY", help="The key that takes its place: a name here, or a file.")
@file_options
def revoke(key: str, *, heir: str | None, **where: Any) -> None:
    """Take KEY out of every role it has; with --with another one takes its place.

    KEY is a name here, a file, or the beginning of its id. It goes on as `release key rotate` does.
    """

    def wanted(_who: Manager, root: Any, directory: Path) -> Wanted:
        from keys import rotation
        from release_server.publish import ceremony

        keyid = ceremony.held_key(root, directory, key)
        heirs = [ceremony.public_key(directory, heir)] if heir else []
        roles = ceremony.roles_of(root, keyid)
        return rotation.Wanted(dict.fromkeys(roles, heirs), frozenset([keyid]))

    _make(wanted, **where)


def _next_online(who: Manager, root: Any) -> Any:
    """The keys made to take the place of today's, or those of a signer that lost the ones the root names."""
    from keys.ceremony import OnlineKeys

    trust = who.client.get("/trust")
    if waiting := trust.get("upcoming"):
        return OnlineKeys.from_json(waiting, "trust.upcoming")
    online = OnlineKeys.from_json(trust["online"], "trust.online")
    if all(root.roles[role].keyids == [online.of(role)[0].keyid] for role in ("snapshot", "timestamp")):
        raise ConflictError(
            "the server has made no keys to take the place of today's",
            then="on the server: release-server signer --next-keys --data DIR; it is seen within a minute",
            reason="no-next-keys",
        )
    return online


def _make(
    wanted: Callable[[Manager, Any, Path], Wanted],
    *,
    offline: bool,
    output: Path | None,
    keys_dir: Path | None,
    trust: Path | None,
    passphrase_file: Path | None,
) -> None:
    from keys import rotation
    from release_server.publish import ceremony, sign

    who = manager(keys_dir, trust)
    directory = profiles.current(keys_dir=keys_dir).keys_dir
    cache = sign.cache_dir(who.state, who.client.url, who.trust)
    trusted = sign.recall(cache) if offline else who.look()
    chain = ceremony.read_chain(cache) if offline else ceremony.fetch_chain(who.client, trusted)
    change = wanted(who, trusted.root.signed, directory)
    following = rotation.make_next(chain, trusted.targets, change, clock.now())
    file = output or Path(f"next-root-{following.root.signed.version}.json")
    if file.exists():
        raise ConflictError(f"{file} exists", then="name another file with -o, or remove it", reason="exists")
    _sign_here(following, file, directory, passphrases(passphrase_file))
    done = not offline and rotation.missing(following).is_none
    _finish(following, file, directory, who if done else None)


def _sign_here(following: NextRoot, file: Path, directory: Path, passphrase: Callable[[str], str]) -> int:
    """Show what changes, ask, sign with every key here that is of use, write the file; how many signed."""
    from keys import rotation
    from release_server.publish import ceremony

    console.say(changes_table(rotation.describe(following)))
    opened = ceremony.open_signers(following, directory, passphrase)
    console.confirm(f"This makes root {following.root.signed.version}, as above.")
    rotation.sign(following, opened)
    keys_cli.write_public(file, following.to_bytes())
    return len(opened)


def _finish(following: NextRoot, file: Path, directory: Path, who: Manager | None) -> None:
    """Publish when somebody is to, and say what is so and what to type next."""
    from keys import rotation
    from release_server.publish import ceremony

    version, missing = following.root.signed.version, rotation.missing(following)
    state = "signed" if missing.is_none else "waiting"
    if who is not None:
        state = "published" if ceremony.publish(who, following, wait_s()) else "accepted"
    if missing.is_none:
        keys_cli.write_public(directory / keys_cli.NEWEST_ROOT_FILE, following.root.to_bytes())
    words = {
        "published": f"root {version} is published; every agent follows it at its next poll",
        "accepted": f"root {version} is with the server, which has not published it yet; it will by itself",
        "signed": f"root {version} is signed by enough; next: release key publish {file}",
        "waiting": f"root {version} needs {_words(missing)} more; there: release key sign {file}",
    }
    console.say(words[state])
    found = [change.to_json() for change in rotation.describe(following)]
    needs = {"old_root": missing.old, "new_root": missing.new, "release": missing.targets}
    console.emit(
        {"state": state, "version": version, "file": str(file), "missing": needs, "changes": found}, state
    )


def _words(missing: Any) -> str:
    named = {"old root": missing.old, "new root": missing.new, "release": missing.targets}
    return " and ".join(f"{count} {name} signature(s)" for name, count in named.items() if count)


# --- other machines ----------------------------------------------------------------------------------------

file_argument = click.argument("file", type=click.Path(path_type=Path, dir_okay=False, exists=True))


@click.command("sign", short_help="Sign a next root that somebody else has made; needs no server.")
@file_argument
@trust_option()
@keys_dir_option()
@passphrase_option()
def sign_file(file: Path, trust: Path | None, keys_dir: Path | None, passphrase_file: Path | None) -> None:
    """Verify the next root in FILE from the root that is trusted here, show what it changes, and sign it.

    Needs no server and no network. The signatures go into FILE, beside those that are there.
    """
    following = _read(file, trust)
    directory = profiles.current(keys_dir=keys_dir).keys_dir
    if not _sign_here(following, file, directory, passphrases(passphrase_file)):
        raise NotAllowedError(
            "nothing was signed",
            why=f"{directory} holds no key whose signature is of use and missing",
            then="name the directory of your keys with --keys-dir",
            reason="no-root-key",
        )
    _finish(following, file, directory, None)


@click.command("publish", short_help="Bring a next root that enough have signed to the server.")
@file_argument
@trust_option()
@keys_dir_option()
def publish(file: Path, trust: Path | None, keys_dir: Path | None) -> None:
    """Publish the next root in FILE; the server verifies it and cannot make one."""
    from keys import rotation

    following = _read(file, trust)
    missing = rotation.missing(following)
    if not missing.is_none:
        raise UsageError(
            f"root {following.root.signed.version} is not signed by enough",
            why=f"it needs {_words(missing)} more",
            then=f"on the other holders' machines: release key sign {file}",
            reason="bad-signature",
        )
    console.say(changes_table(rotation.describe(following)))
    console.confirm(f"This publishes root {following.root.signed.version}, as above.")
    directory = profiles.current(keys_dir=keys_dir).keys_dir
    _finish(following, file, directory, manager(keys_dir, trust))


def _read(file: Path, trust: Path | None) -> NextRoot:
    from keys import ceremony, rotation
    from release_server.publish import sign

    following = rotation.NextRoot.from_bytes(file.read_bytes())
    trusted = ceremony.parse_root(sign.read_trust(profiles.current(trust=trust).trust))
    rotation.check(following, trusted, clock.now())
    return following
