"""Commands that give a host's agent to systemd, and take it back."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import click

from agent_core import console, disk, slots
from agent_core.errors import (
    ConflictError,
    DiskError,
    NotAllowedError,
    NotFoundError,
    RelfleetError,
    UsageError,
)
from agent_core.layout import Layout, write_durable
from updater import systemd
from updater.commands.common import root_option

UNITS = Path("/etc/systemd/system")
BOOTED = Path("/run/systemd/system")
"""systemd makes it when it is process 1 (sd_booted(3))."""

name_option = click.option(
    "--name", default=systemd.UNIT_NAME, show_default=True, help="Of the unit; one for each --root."
)


@click.command("install-service")
@root_option
@name_option
@click.option(
    "--user", default="", help="Run the agent as this user, who owns the root [default: its owner]."
)
@click.option("--print", "printed", is_flag=True, help="Print the unit and do nothing.")
@click.option("--start/--no-start", default=True, help="Start the agent now, besides at each boot.")
def install_service(root: Path, name: str, user: str, printed: bool, start: bool) -> None:
    """Run the agent under systemd, from now on and after each boot. Done again, it changes what differs."""
    if printed:
        text = _unit(root, name, user)
        console.emit({"unit": f"{name}.service", "text": text}, text=text.removesuffix("\n"))
        return
    _need_systemd(root)
    _need_installed(root)
    text, file = _unit(root, name, user), UNITS / f"{name}.service"
    before = _read(file)
    _need_own(file, before, str(root))
    changed = before != text
    if changed:
        _write(file, text)
        _systemctl("daemon-reload")
    _verify(file)
    was_running = _is_active(file.name)
    _systemctl("enable", *(["--now"] if start else []), file.name)
    then = _next(file.name, restart=changed and was_running, start=start)
    console.emit(
        {
            "unit": str(file),
            "root": str(root),
            "user": user or _owner(root),
            "changed": changed,
            "running": _is_active(file.name),
            "next": then,
        },
        text="\n".join(
            [f"{file} {'written' if changed else 'is as it should be'}", *map("  next: {}".format, then)]
        ),
    )


@click.command("uninstall-service")
@name_option
def uninstall_service(name: str) -> None:
    """Stop the agent and take its unit away; the root, its identity and its versions stay."""
    file = UNITS / f"{name}.service"
    text = _read(file)
    if not text:
        console.emit({"unit": str(file), "removed": False}, text=f"there is no {file}")
        return
    root = _need_own(file, text)
    _need_systemd(Path(root))
    console.confirm(f"The agent in {root} stops, and does not start again.")
    _systemctl("disable", "--now", file.name)
    _remove(file)
    _systemctl("daemon-reload")
    text = (
        f"{file} removed; {root} is as it was\n  next: agent run --supervise --root {root}, or remove {root}"
    )
    console.emit({"unit": str(file), "removed": True, "root": root}, text=text)


# --- what has to be so ----------------------------------------------------------------------------------


def _need_systemd(root: Path) -> None:
    if not BOOTED.is_dir():
        raise NotFoundError(
            "there is no systemd here",
            why=f"{BOOTED} does not exist, so it is not what started this host",
            then=f"agent run --supervise --root {root}",
            reason="no-systemd",
        )


def _need_installed(root: Path) -> None:
    """The unit starts the launcher, and that starts what is installed: it cannot wait for a first version."""
    if not Layout(root).launcher_file.exists():
        raise NotFoundError(f"{root} is no agent's", why="nobody enrolled it", then="agent enroll --help")
    if slots.believed(root) is None:
        why = f"no version is installed in {root} yet"
        raise NotFoundError("there is nothing to start", why=why, then=f"agent once --root {root}")


def _need_own(file: Path, text: str, root: str = "") -> str:
    """The root that the unit is for: one of ours, and of no other root when one is given."""
    found = systemd.root_of(text)
    if text and not (found and root in ("", found)):
        raise ConflictError(
            f"{file} is not the unit of this agent",
            why=f"it runs the agent in {found}" if found else "it was not written by `agent install-service`",
            then="give another --name",
        )
    return found


def _owner(root: Path) -> str:
    uid = root.stat().st_uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _unit(root: Path, name: str, user: str) -> str:
    if user and root.exists() and user != _owner(root):
        raise UsageError(
            f"{user} cannot run the agent in {root}",
            why=f"{root} belongs to {_owner(root)}",
            then=f"chown -R {user}: {root}",
        )
    who = user or (_owner(root) if root.exists() else "")
    release = systemd.release_of(_output("systemctl", "--version"))
    return systemd.unit(
        str(root),
        _python(),
        name=name,
        user="" if who == "root" else who,
        steps=release >= systemd.STEPS_SINCE,
    )


def _python() -> str:
    """The host's interpreter: of no virtual environment, which may go, and by the name that stays."""
    own = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    for name in ("python3", own):
        found = Path(sys.base_prefix, "bin", name)
        if found.resolve().name == own and found.exists():
            return str(found)
    return sys.executable


# --- doing ----------------------------------------------------------------------------------------------


def _read(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise DiskError(f"{file} cannot be read", why=str(error)) from error


def _write(file: Path, text: str) -> None:
    _need_rights(file)
    write_durable(file, text.encode())


def _remove(file: Path) -> None:
    _need_rights(file)
    disk.remove(file)
    disk.fsync_dir(file.parent)


def _need_rights(file: Path) -> None:
    if not os.access(file.parent, os.W_OK):
        why = f"this user may not write in {file.parent}"
        raise NotAllowedError(f"{file} cannot be changed", why=why, then="the same with sudo")


def _verify(file: Path) -> None:
    """Have systemd read the unit; what it finds odd in a file of ours is said, and stops nothing."""
    for line in _output("systemd-analyze", "verify", str(file)).splitlines():
        console.warn(f"systemd-analyze verify: {line}")


def _is_active(unit: str) -> bool:
    return _output("systemctl", "is-active", unit).strip() in ("active", "activating", "reloading")


def _next(unit: str, *, restart: bool, start: bool) -> list[str]:
    if restart:
        return [f"systemctl restart {unit}    (the agent still runs under the unit before)"]
    if not start:
        return [f"systemctl start {unit}"]
    return [f"systemctl status {unit}", f"journalctl -u {unit} -f", "agent status"]


def _systemctl(*words: str) -> None:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RelfleetError(
            f"systemctl {' '.join(words)} failed",
            why=done.stderr.strip() or f"it exited with {done.returncode}",
            then=f"journalctl -xe -u {words[-1]}",
            reason="systemctl-failed",
        )


def _output(*words: str) -> str:
    """What a command says on both streams; nothing when this host has it not."""
    try:
        done = subprocess.run(
            words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout
