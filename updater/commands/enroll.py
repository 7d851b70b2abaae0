"""Commands by which a host becomes an agent, and runs as one."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import click

from agent_core import console, secret_file, slots
from agent_core.errors import Exit, UsageError
from agent_core.layout import Layout
from updater import install
from updater import server as api
from updater.commands.common import own_root_option, root_option, sentence
from updater.device import Device


@click.command()
@root_option
@click.option("--server", required=True, metavar="URL", help="The release server.")
@click.option("--product", required=True, help="What this host is to run.")
@click.option("--token-file", metavar="FILE", help="Enrolment token; `-` reads standard input.")
@click.option("--offline", is_flag=True, help="No server is in reach: releases will come by `agent install`.")
@click.option(
    "--trust",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="root.json, as `release key export-trust` wrote it; bring it another way than from the server.",
)
@click.option("--name", default=socket.gethostname, help="What the host calls itself [default: its name].")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="What this host is; repeatable.")
@click.option("--gate", default="", help="Only releases signed for this gate, e.g. canary.")
@click.option("--new-key", is_flag=True, help="Become another agent than before, with a key of its own.")
@click.option("--install/--no-install", "wanted", default=True, help="Install the first version now.")
def enroll(
    root: Path,
    server: str,
    product: str,
    token_file: str | None,
    trust: Path,
    name: str,
    labels: tuple[str, ...],
    gate: str,
    wanted: bool,
    offline: bool,
    new_key: bool,
) -> None:
    """Make this host an agent: identity, trust, first version."""
    if (token_file is None) is not offline:
        raise UsageError(
            "say how this host is enrolled",
            then="--token-file FILE; without a server in reach --offline",
        )
    token = _token(token_file) if token_file else None
    pairs = dict(_pair(label) for label in labels)
    device = install.enroll(
        Layout(root), server, product, token, trust.read_bytes(), name, pairs, gate, new_key=new_key
    )
    who = device.identity
    if offline:
        console.say(f"{who.agent_id} is unknown to the server; next: agent install FILE --root {root}")
    elif who.standing:
        console.say(f"enrolled as {who.agent_id}; next, an operator: release agents accept {who.agent_id}")
    else:
        console.say(f"enrolled as {who.agent_id} in cohort {who.cohort or '(none yet)'}")
    outcome = None
    if wanted and not offline:
        outcome = install.first_version(device, progress=console.progress_line("download"))
        console.say(sentence(outcome))
    console.emit(
        {
            "agent_id": who.agent_id,
            "cohort": who.cohort,
            "pending": bool(who.standing),
            "root": str(root),
            "outcome": outcome.to_json() if outcome else None,
        },
        text=who.agent_id,
    )


@click.command("rotate-key")
@own_root_option
def rotate_key(root: Path) -> None:
    """Give this host another key. The old one signs for it, and is refused from then on."""
    device = Device.load(root)
    public_key = api.rotate_key(device.transport(), device.identity, device.layout)
    console.emit(
        {"agent_id": device.identity.agent_id, "public_key": public_key},
        text=f"{device.identity.agent_id} has the key {public_key} now",
    )


def _token(named: str) -> str:
    text = sys.stdin.read(secret_file.MOST) if named == "-" else secret_file.read(Path(named), "token")
    return text.strip()


def _pair(label: str) -> tuple[str, str]:
    key, equals, value = label.partition("=")
    if not equals:
        raise UsageError(f"{label!r} is no label", why="a label is KEY=VALUE", then="--label region=eu")
    return key, value


@click.command()
@own_root_option
@click.option(
    "--supervise",
    is_flag=True,
    help="Stay and restart the agent when it ends: for containers, runit, or no service manager at all.",
)
def run(root: Path, supervise: bool) -> int:
    """Run the agent; installs the first version if there is none."""
    # The first process of a container gets no signal that it did not ask for. The launcher asks for its own.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(Exit.DONE))
    device = Device.load_running(root)
    if slots.recover(device.layout.root) is None:
        install.wait_for_first_version(Device.load(root), progress=console.progress_line("download"))
    return install.exec_launcher(Layout(root), supervise=supervise)
