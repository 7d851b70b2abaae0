"""`release webhook`: who elsewhere is told of rollouts, releases and agents, and whether they take it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console
from agent_core.errors import RelfleetError, UnreachableError
from release_server.publish import profile, render
from release_server.publish.commands.operate import SECONDS, Words, client, entries
from release_server.publish.commands.token import reserve
from release_server.publish.words import given

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

WAIT_S, LOOK_S = 30.0, 0.5
"""How long a test waits for the receiver, unless --timeout says otherwise."""


def _listed(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


EVENTS = Words("events", _listed)
OUT = click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the secret to this new file, mode 0600.",
)
NUMBER = click.argument("number", type=click.IntRange(1), metavar="ID")


@click.group("webhook", cls=console.Group, short_help="Tell others of rollouts, releases and agents.")
def webhook() -> None:
    """Receivers that are told of rollouts, releases and agents by signed requests (Standard Webhooks)."""


@webhook.command("add", short_help="Tell a receiver of events from now on.")
@click.argument("url")
@click.option(
    "--events",
    "wanted",
    type=EVENTS,
    required=True,
    help="What it is told: rollout.halted,release.published; all of rollouts: rollout.*; everything: *",
)
@click.option("--allow-http", "plain", is_flag=True, help="Plain http to another host is meant.")
@OUT
def add(url: str, wanted: list[str], out: Path | None, *, plain: bool) -> None:
    """Tell the receiver at URL of events, of all products or of --product only.

    Its secret is printed once, on stdout or into a file, and cannot be shown again.
    """
    said = given(url=url, events=wanted, plain=plain or None, product=profile.said().product)
    hand_over(lambda: client().post("/webhooks", said), out)


@webhook.command("rotate", short_help="Give a webhook another secret.")
@NUMBER
@click.option(
    "--keep",
    "stays_s",
    type=SECONDS,
    default="24h",
    show_default=True,
    help="How long the old secret stays valid: what is sent is signed with both.",
)
@OUT
def rotate(number: int, stays_s: int, out: Path | None) -> None:
    """Give a webhook another secret; it is printed once, on stdout or into a file."""
    hand_over(lambda: client().post(f"/webhooks/{number}/rotate", {"stays_s": stays_s}), out)


def hand_over(ask: Callable[[], Any], out: Path | None) -> None:
    """Print a secret once, or write it to a new file that is made before it is asked for."""
    place = reserve(out) if out else None
    try:
        answer = ask()
        refuse_lost(answer)
    except BaseException:
        if out:
            out.unlink(missing_ok=True)
        raise
    if place is None:
        console.say(f"webhook {answer['id']}; its secret follows, keep it now, it is not shown again:")
        console.emit(answer, str(answer["secret"]))
        return
    with os.fdopen(place, "w") as file:
        file.write(f"{answer.pop('secret')}\n")
    console.say(f"webhook {answer['id']}; its secret was written to {out}")
    if console.options().json:
        console.emit({**answer, "file": str(out)})


def refuse_lost(answer: Mapping[str, Any]) -> None:
    """Where the first answer was lost on the way, the secret was lost with it.

    Raises:
        RelfleetError: `secret-lost`.
    """
    if answer.get("secret") is None:
        raise RelfleetError(
            f"webhook {answer['id']} was made, and its secret was lost on the way",
            why="the server's first answer did not arrive, and it keeps no secret",
            then=f"release webhook rotate {answer['id']}",
            reason="secret-lost",
        )


@webhook.command("list", short_help="List webhooks, and what each has not taken.")
def list_webhooks() -> None:
    """List webhooks, and what each has not taken."""
    found = client().items("/webhooks")
    console.emit(found, lambda: webhook_table(found))


def webhook_table(found: Iterable[Mapping[str, Any]]) -> str:
    rows = [
        [
            entry["id"],
            entry["url"],
            ",".join(entry["events"]),
            entry.get("product") or "any",
            entry["pending"],
            entry["dead"],
            entry["failures"],
        ]
        for entry in found
    ]
    heads = ["id", "url", "events", "product", "pending", "given up", "failures in a row"]
    return console.table(heads, rows, empty="no webhooks")


@webhook.command("show", short_help="Show one webhook, but for its secret.")
@NUMBER
def show(number: int) -> None:
    """Show one webhook, and until when its secrets are valid."""
    answer = client().get(f"/webhooks/{number}")
    console.emit(answer, lambda: webhook_view(answer))


def webhook_view(answer: Mapping[str, Any]) -> str:
    now = clock.now()
    ends = [secret["until"] for secret in answer["secrets"]]
    return console.facts(
        [
            ("webhook", answer["id"]),
            ("url", answer["url"]),
            ("events", ", ".join(answer["events"])),
            ("product", answer.get("product") or "any"),
            ("made", f"{render.ago(answer['created_at'], now)} by {answer['created_by']}"),
            ("secrets", ", ".join("for ever" if end is None else f"until {end}" for end in ends)),
            ("pending", answer["pending"]),
            ("given up", answer["dead"]),
            ("failures", f"{answer['failures']} in a row"),
            ("next try", render.ago(answer["due_at"], now) if answer["failures"] else "at once"),
        ]
    )


@webhook.command("remove", short_help="End a webhook.")
@NUMBER
def remove(number: int) -> None:
    """End a webhook; what it has not taken is never sent."""
    answer = client().get(f"/webhooks/{number}")
    console.confirm(f"Removing webhook {number} drops {answer['pending']} deliveries it has not taken.")
    client().delete(f"/webhooks/{number}")
    console.say(f"webhook {number} removed")
    if console.options().json:
        console.emit({"id": number, "removed": True})


@webhook.command("test", short_help="Send webhook.test, and say what comes of it.")
@NUMBER
def try_out(number: int) -> None:
    """Send `webhook.test` behind whatever waits, and say what comes of it. Exits with 8 when it fails."""
    queued = client().post(f"/webhooks/{number}/test", {})
    done = _wait_for(number, int(queued["sequence"]))
    console.emit(done, f"webhook {number} took {done['type']}: it answered {done['answer']}")


def _wait_for(number: int, sequence: int) -> dict[str, Any]:
    """The delivery of this sequence, once it was taken.

    Raises:
        UnreachableError: it was tried and not taken, or not tried in time.
    """
    ends = clock.boot_s() + (console.options().timeout_s or WAIT_S)
    why = "it has not been tried yet; what happened before goes first"
    while clock.boot_s() < ends:
        page = client().get(f"/webhooks/{number}/deliveries", after=sequence + 1, limit=1)
        newest = entries(page)[0]
        if newest["state"] == "sent":
            return newest
        if newest["tries"]:
            why = f"it was tried, and: {newest['answer']}"
            break
        time.sleep(LOOK_S)
    raise UnreachableError(
        f"webhook {number} has not taken the test",
        why=why,
        then=f"release webhook deliveries {number}",
        reason="not-taken",
    )


@webhook.command("retry", short_help="Send what was given up once more.")
@NUMBER
def retry(number: int) -> None:
    """Send what was given up once more, in its order, before what waits."""
    answer = client().post(f"/webhooks/{number}/retry", {})
    console.emit(answer, f"webhook {number}: {answer['again']} deliveries are tried again")


@webhook.command("deliveries", short_help="List what a webhook was and is to be told.")
@NUMBER
@click.option("--state", type=click.Choice(["pending", "sent", "dead"]), help="Only these.")
@click.option(
    "--limit", type=click.IntRange(1, 500), default=50, show_default=True, help="The newest so many."
)
def deliveries(number: int, state: str | None, limit: int) -> None:
    """List what a webhook was and is to be told, the newest first, with what the receiver answered."""
    found = entries(client().get(f"/webhooks/{number}/deliveries", state=state, limit=limit))
    console.emit(found, lambda: delivery_table(found))


def delivery_table(found: Iterable[Mapping[str, Any]]) -> str:
    now = clock.now()
    rows = [
        [
            entry["sequence"],
            entry["id"],
            entry["type"],
            entry["state"],
            entry["tries"],
            render.ago(entry["created_at"], now),
            entry["answer"] or "-",
        ]
        for entry in found
    ]
    heads = ["sequence", "id", "event", "state", "tries", "happened", "last answer"]
    return console.table(heads, rows, empty="nothing yet")
