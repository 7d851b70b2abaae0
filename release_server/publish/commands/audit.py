"""`release audit`: who did what to what, and when."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console
from agent_core.errors import UnreachableError
from release_server.publish.commands.operate import PAST, SECONDS, client, given

if TYPE_CHECKING:
    from collections.abc import Mapping

MOST = 1000
"""As many entries as the server gives in one answer."""


@click.group("audit", cls=console.Group, short_help="Read who did what.")
def audit() -> None:
    """The audit log: who did what to what, and when."""


def read(**wanted: Any) -> list[dict[str, Any]]:
    """Entries, the oldest first; the server gives the newest first."""
    found = client().items("/audit", **given(**wanted))
    return sorted(found, key=lambda entry: int(entry["id"]))


@audit.command("log", short_help="Print the audit log, the oldest entry first.")
@click.option(
    "--since", type=PAST, help="From this time on: 2026-01-31T12:00:00Z, or 2h for the last two hours."
)
@click.option("--actor", help="Only what this one did.")
@click.option(
    "--limit",
    type=click.IntRange(1, MOST),
    default=100,
    show_default=True,
    help="At most the newest so many.",
)
@click.option("--follow", "-f", is_flag=True, help="Stay, and print what comes; --timeout ends it.")
@click.option("--every", type=SECONDS, default="2s", show_default=True, help="How often --follow looks.")
def log(since: str | None, actor: str | None, limit: int, *, follow: bool, every: int) -> None:
    """Print the audit log, the oldest entry first. With --follow --json each entry is one line of JSON."""
    found = read(since=since, actor=actor, limit=limit)
    if follow:
        _follow(found, actor, every)
    else:
        console.emit(found, lambda: "\n".join(map(line, found)) or "nothing yet")


def _follow(found: list[dict[str, Any]], actor: str | None, every_s: float) -> None:
    """Print entries as they come; a server that is away for a while is waited for."""
    timeout_s = console.options().timeout_s
    began_s = clock.boot_s()
    last = 0
    since = clock.iso(clock.now())
    while True:
        for entry in found:
            if int(entry["id"]) > last:
                last, since = int(entry["id"]), entry["at"]
                click.echo(json.dumps(entry, ensure_ascii=False) if console.options().json else line(entry))
        if timeout_s is not None and clock.boot_s() - began_s + every_s > timeout_s:
            return
        time.sleep(every_s)
        try:
            found = read(since=since, actor=actor, limit=MOST)
        except UnreachableError as error:
            console.say(f"{error.what}; still trying")
            found = []


def line(entry: Mapping[str, Any]) -> str:
    """One entry as one line: when, who, what, to what, and its particulars."""
    detail = " ".join(f"{key}={console.cell(value)}" for key, value in (entry.get("detail") or {}).items())
    text = (
        f"{entry['at']}  {entry['actor']:<16}  {entry['action']:<20}  {entry['subject']}  {detail}".rstrip()
    )
    return text.replace("\n", " ")
