"""`release-server signer`: the process that alone opens the online keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent_core.errors import NotFoundError, UsageError
from release_server.config import DATA_VARIABLE, Config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from release_server.signing.desk import Desk

file_option = click.Path(path_type=Path, dir_okay=False)
MADE = "made; they sign once people have signed a root that names them: release key rotate --online"
directory_option = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--data", envvar=DATA_VARIABLE, type=directory_option, help="The server's data directory.")
@click.option("--keys", type=directory_option, help="The online keys, where the signer is a user of its own.")
@click.option("--state", type=directory_option, help="What it remembers, and its log; beside --keys.")
@click.option("--socket", "place", type=file_option, help="Where it listens; beside --keys.")
@click.option("--user", help="The user of the jobs process, the only one who may ask; beside --keys.")
@click.option("--root", type=file_option, help="The first root, from a way of its own.")
@click.option("--make-keys", is_flag=True, help="Make the keys that are not there; with --data end then.")
@click.option("--token", "tokens", multiple=True, metavar="ROLE=URI", help="Use a PKCS#11 key; then end.")
@click.option("--next-keys", is_flag=True, help="Make the keys that the next root is to name, and end.")
@click.option("--check", is_flag=True, help="Check the log from its first line on, and end.")
def signer(
    data: Path | None,
    keys: Path | None,
    state: Path | None,
    place: Path | None,
    user: str | None,
    root: Path | None,
    make_keys: bool,
    tokens: tuple[str, ...],
    next_keys: bool,
    check: bool,
) -> int:
    """Sign directives, snapshots and timestamps for the jobs process, as far as the policy allows.

    `release-server run` starts one. As a user of its own it takes --keys, --state, --socket and --user
    instead of --data, and reads nothing of the server.
    """
    from release_server import serve

    trust = None
    if keys is None:
        config = Config.load(data or Path("relfleet-server"))
        keys, state, place = config.keys, config.signer_state, config.signer_socket
        trust = config.trust
    elif not next_keys and (state is None or place is None or user is None):
        raise UsageError("a signer of its own user needs --keys, --state, --socket and --user")
    if next_keys:
        return _make_next(keys, trust)
    if make_keys and trust is not None:
        return _make_lost(keys, trust)
    if state is None or place is None:
        raise UsageError("the signer's places are not known")
    if check:
        return _check(state)
    if tokens:
        return _use_tokens(keys, tokens)
    serve.die_with_parent()
    serve.show_logs("info")
    users = frozenset({_user_id(user)}) if user else frozenset()
    return serve.run_signer(_open(keys, state, root, make=make_keys), place, users)


def _open(keys: Path, state: Path, root: Path | None, *, make: bool) -> Desk:
    from agent_core import clock
    from release_server import signer as online
    from release_server.signing.desk import open_desk
    from release_server.signing.process import harden

    harden()
    if make:
        online.make_keys(keys, clock.now())
    pinned = root.read_bytes() if root else None
    return open_desk(keys, state, clock=clock.now, pinned=pinned, passphrase=_secrets())


def _secrets() -> Callable[[str], str]:
    """Passphrases and PINs from a file, the environment or systemd; nobody is there to be asked."""
    import os

    from keys.signers import passphrase_source

    return passphrase_source(None, os.environ, None)


def _use_tokens(keys: Path, tokens: Sequence[str]) -> int:
    from agent_core import clock, console
    from keys.roles import ONLINE_ROLES
    from release_server import signer as online

    for text in tokens:
        role, _, uri = text.partition("=")
        if role not in ONLINE_ROLES:
            raise UsageError(f"{role!r} has no online key", why=f"roles are {', '.join(ONLINE_ROLES)}")
        online.use_token(keys, role, uri, clock.now(), _secrets())
        console.say(f"{role}: signed by {uri}")
    return 0


def _make_next(keys: Path, trust: Path | None) -> int:
    """Make the next keys; a ceremony sees them at once where `trust` is known, else within a minute."""
    from agent_core import clock, console
    from release_server import signer as online

    online.make_keys(keys, clock.now(), beside=online.NEXT)
    made = online.upcoming_halves(keys)
    if trust is not None:
        online.follow_public(trust, online.public_halves(keys), made)
    console.say(MADE)
    console.emit(made.to_json() if made else {})
    return 0


def _make_lost(keys: Path, trust: Path) -> int:
    """Make keys in the place of lost ones; the signer of `release-server run` opens them by itself."""
    from agent_core import clock, console
    from release_server import signer as online

    lost = [role for role in online.ONLINE if not online.key_path(keys, role).exists()]
    online.make_keys(keys, clock.now())
    halves = online.public_halves(keys)
    online.follow_public(trust, halves, online.upcoming_halves(keys))
    console.say(f"{', '.join(lost)}: {MADE}" if lost else "every online key is there; none was made")
    console.emit(halves.to_json())
    return 0


def _check(state: Path) -> int:
    from agent_core import console
    from release_server.signing.log import verify

    count = verify(state / "log")
    console.emit({"ok": True, "entries": count}, f"{count} entries, each follows from the one before")
    return 0


def _user_id(name: str) -> int:
    import pwd

    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError:
        raise NotFoundError(f"there is no user {name}", then=f"useradd --system {name}") from None
