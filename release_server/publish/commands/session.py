"""`release session`: who is signed in at the page with the provider."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console
from release_server.publish import render
from release_server.publish.commands.operate import client

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping


@click.group("session", cls=console.Group, short_help="See who is signed in at the page, and end it.")
def session() -> None:
    """Sessions of people who signed in with the provider. The server keeps only a hash of each."""


@session.command("list", short_help="List sessions that are not past their date.")
def list_sessions() -> None:
    """List sessions that are not past their date, those that were ended before it among them."""
    found = client().items("/sessions")
    console.emit(found, lambda: session_table(found))


def session_table(found: Iterable[Mapping[str, Any]]) -> str:
    now = clock.now()
    rows = [
        [
            entry["id"],
            entry.get("name"),
            entry.get("rule"),
            f"ended by {entry.get('ended_by')}"
            if entry.get("ended_at")
            else f"until {entry.get('expires_at')}",
            render.ago(entry.get("used_at"), now),
        ]
        for entry in found
    ]
    return console.table(["id", "name", "rule", "valid", "used"], rows, empty="nobody is signed in")


@session.command("end", short_help="End a session at once.")
@click.argument("number", type=click.IntRange(1), metavar="ID")
def end(number: int) -> None:
    """End a session: its next request is refused. Its person may sign in again; see `oidc.roles` for that."""
    console.confirm(f"Ending session {number} signs out whoever uses it.")
    client().delete(f"/sessions/{number}")
    console.say(f"session {number} ended")
    if console.options().json:
        console.emit({"id": number, "ended": True})
