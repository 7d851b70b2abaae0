"""`release audit`: who did what to what, and when."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console
from agent_core.errors import MalformedError, UnreachableError
from release_server import audit_chain
from release_server.audit_chain import Head
from release_server.publish.commands.operate import (
    PAST,
    SECONDS,
    Words,
    client,
    entries,
)
from release_server.publish.words import given

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import IO

MOST = 1000
"""As many entries as the server gives in one answer."""


@click.group("audit", cls=console.Group, short_help="Read who did what.")
def audit() -> None:
    """The audit log: who did what to what, and when; each entry carries the hash of the one before."""


def read(**wanted: Any) -> list[dict[str, Any]]:
    """Entries, the oldest first; the server gives the newest first."""
    found = client().items("/audit", **given(**wanted))
    return sorted(found, key=lambda entry: int(entry["id"]))


@audit.command("log", short_help="Print the audit log, the oldest entry first.")
@click.option(
    "--since", type=PAST, help="From this time on: 2026-01-31T12:00:00Z, or 2h for the last two hours."
)
@click.option("--actor", help="Only what this one did.")
@click.option("--action", metavar="VERB", help="Only deeds of this kind, e.g. cohort.pin.")
@click.option("--subject", help="Only what was done to this, e.g. warehouse-agent/main.")
@click.option(
    "--limit",
    type=click.IntRange(1, MOST),
    default=100,
    show_default=True,
    help="At most the newest so many.",
)
@click.option("--follow", "-f", is_flag=True, help="Stay, and print what comes; --timeout ends it.")
@click.option("--every", type=SECONDS, default="2s", show_default=True, help="How often --follow looks.")
def log(since: str | None, limit: int, *, follow: bool, every: int, **wanted: str | None) -> None:
    """Print the audit log, the oldest entry first. With --follow --json each entry is one line of JSON."""
    found = read(since=since, limit=limit, **wanted)
    if follow:
        _follow(found, wanted, every)
    else:
        console.emit(found, lambda: "\n".join(map(line, found)) or "nothing yet")


def _follow(found: list[dict[str, Any]], wanted: Mapping[str, str | None], every_s: float) -> None:
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
            found = read(since=since, limit=MOST, **wanted)
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


# --- whether it is whole ---------------------------------------------------------------------------------

HEAD = Words("head", Head.parse)


class Chain:
    """The whole log as the server gives it, the oldest entry first, and the head that it names."""

    def __init__(self) -> None:
        self.head = Head()
        self.count = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        after: int | None = 0
        while after is not None:
            page = client().get("/audit/chain", after=after)
            for entry in entries(page):
                self.count += 1
                yield entry
            following = page.get("next")
            self.head = _head(page.get("head"))
            after = following if isinstance(following, int) and following > after else None


def _head(text: object) -> Head:
    try:
        return Head.parse(str(text))
    except ValueError as error:
        raise MalformedError("the server's answer cannot be read", why=str(error)) from None


def lines_of(file: IO[str]) -> Iterator[dict[str, Any]]:
    """The entries of an export, a line each."""
    for number, text in enumerate(file, 1):
        try:
            entry = json.loads(text)
        except (ValueError, RecursionError):
            entry = None
        if not isinstance(entry, dict):
            raise audit_chain.broken(f"line {number} of the file is no entry")
        yield entry


@audit.command("export", short_help="Write the whole audit log, with its hashes.")
@click.option(
    "-o", "--out", type=click.File("w", atomic=True), default="-", help="Write here, not to stdout."
)
def export(out: IO[str]) -> None:
    """Write the whole audit log, a line of JSON an entry, the oldest first; checked on the way."""
    chain = Chain()

    def written() -> Iterator[dict[str, Any]]:
        for entry in chain:
            out.write(json.dumps(entry, ensure_ascii=False) + "\n")
            yield entry

    head = audit_chain.follow(written())
    audit_chain.check_end(head, chain.head)
    console.say(f"{chain.count} {'entry' if chain.count == 1 else 'entries'}, head {head}")


@audit.command("verify", short_help="Check that no entry was changed, dropped or put in.")
@click.argument("file", required=False, type=click.File("r"))
@click.option(
    "--head", "known", type=HEAD, metavar="ID:HASH", help="A head noted earlier, which must be there still."
)
def verify(file: IO[str] | None, known: Head | None) -> None:
    """Check on this machine that every entry follows from the one before.

    FILE is an export: no server is asked then.

    The head that is printed proves everything up to it: note it where nobody who holds the server can write.
    """
    chain = Chain()
    head = audit_chain.follow(chain if file is None else lines_of(file), known=known)
    if file is None:
        audit_chain.check_end(head, chain.head)
    console.say("every entry follows from the one before")
    console.emit({"whole": True, "head": str(head)}, text=str(head))
