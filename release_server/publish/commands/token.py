"""`release token`: who may do what at the server, and until when."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console
from agent_core.errors import ConflictError, RelfleetError
from release_server.publish import profile, render
from release_server.publish.commands.operate import LABELS, SECONDS, client
from release_server.publish.words import given

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

ROLES = ("reader", "releaser", "operator", "enroller", "admin")


@click.group("token", cls=console.Group, short_help="Make and revoke tokens.")
def token() -> None:
    """Tokens of people, pipelines and enrolments. The server keeps only a hash of each."""


@token.command("create", short_help="Make a token; it is shown once.")
@click.option("--role", type=click.Choice(ROLES), required=True, help="What it may do.")
@click.option(
    "--expires", "expires_s", type=SECONDS, default="30d", show_default=True, help="How long it lasts."
)
@click.option("--uses", type=click.IntRange(1), help="How often it may be used; for enrolments.")
@click.option("--approve", is_flag=True, help="Whom it enrols waits until an operator accepts.")
@click.option("--cohort", help="Whom it enrols belongs to this cohort; needs a product.")
@click.option("-l", "--label", "said", type=LABELS, multiple=True, help="Labels of whom it enrols.")
@click.option("--name", help="What it is for; without it the role and today's date.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write it to this new file, mode 0600."
)
def create(
    role: str,
    out: Path | None,
    name: str | None,
    said: tuple[list[tuple[str, str]], ...],
    *,
    approve: bool,
    **limits: Any,
) -> None:
    """Make a token, for all products or for --product only.

    It is printed once, on stdout or into a file, and cannot be shown again.
    """
    place = reserve(out) if out else None
    try:
        labels = dict(pair for group in said for pair in group)
        limits |= given(approve=approve or None, labels=labels or None)
        named = name or f"{role} {clock.now():%Y-%m-%d}"
        answer = client().post(
            "/tokens", given(name=named, role=role, product=profile.said().product, **limits)
        )
        refuse_lost(answer)
    except BaseException:
        if out:
            out.unlink(missing_ok=True)
        raise
    public = {key: value for key, value in answer.items() if key != "token"}
    if place is not None:
        with os.fdopen(place, "w") as file:
            file.write(f"{answer['token']}\n")
        console.say(f"token {answer['id']} written to {out}")
        if console.options().json:
            console.emit({**public, "file": str(out)})
        return
    console.say(f"token {answer['id']} ({role}); keep it now, it is not shown again:")
    console.emit(answer, str(answer["token"]))


def refuse_lost(answer: Mapping[str, Any]) -> None:
    """Refuse a token that was made at the first try, when what came is the answer to the second.

    Raises:
        RelfleetError: `token-lost`.
    """
    if answer.get("token") is None:
        raise RelfleetError(
            f"token {answer['id']} was made, and its text is lost",
            why="the answer did not arrive, and the server keeps no token's text",
            then=f"release token revoke {answer['id']}, then make another",
            reason="token-lost",
        )


def reserve(out: Path) -> int:
    """Make the file before the token, so that no token is made that cannot be kept.

    Raises:
        ConflictError: the file exists.
    """
    try:
        return os.open(out, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConflictError(f"{out} exists", then="name another file, or remove it first") from None


@token.command("list", short_help="List tokens, without their secrets.")
def list_tokens() -> None:
    """List tokens, without their secrets."""
    found = client().items("/tokens")
    console.emit(found, lambda: token_table(found))


def token_table(found: Iterable[Mapping[str, Any]]) -> str:
    now = clock.now()
    rows = [
        [
            entry["id"],
            entry.get("name"),
            entry.get("role"),
            entry.get("product") or "any",
            standing(entry),
            "any" if entry.get("uses_left") is None else entry["uses_left"],
            render.ago(entry.get("used_at"), now),
            entry.get("created_by"),
        ]
        for entry in found
    ]
    heads = ["id", "name", "role", "product", "valid", "uses left", "used", "by"]
    return console.table(heads, rows, empty="no tokens")


def standing(entry: Mapping[str, Any]) -> str:
    """Whether a token still works, and until when: `until …`, `for ever`, `expired`, `revoked`."""
    if entry.get("revoked_at"):
        return "revoked"
    if not entry.get("expires_at"):
        return "for ever"
    expired = clock.parse_iso(entry["expires_at"]) <= clock.now()
    return "expired" if expired else f"until {entry['expires_at']}"


@token.command("revoke", short_help="Make a token useless at once.")
@click.argument("number", type=click.IntRange(1), metavar="ID")
def revoke(number: int) -> None:
    """Make a token useless from the next request on. Tokens made with it still work, and are named."""
    console.confirm(f"Revoking token {number} locks out whoever uses it.")
    server = client()
    server.delete(f"/tokens/{number}")
    console.say(f"token {number} revoked")
    heirs = made_with(server.items("/tokens"), number)
    for entry in heirs:
        made = f"{entry['created_by']} made token {entry['id']} ({entry['name']}, {entry['role']})"
        console.say(f"{made}, which still works: release token revoke {entry['id']}")
    if console.options().json:
        console.emit({"id": number, "revoked": True, "made_with_it": [entry["id"] for entry in heirs]})


def made_with(found: Iterable[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    """The tokens that still work and were made by whoever a token spoke for."""
    tokens = list(found)
    makers = {entry.get("name") for entry in tokens if entry["id"] == number}
    return [
        entry
        for entry in tokens
        if entry.get("created_by") in makers and standing(entry) not in {"revoked", "expired"}
    ]
