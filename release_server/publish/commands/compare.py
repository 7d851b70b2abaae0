"""`release compare`: two releases or two cohorts, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from agent_core import console
from release_server.publish.commands.operate import client, product
from release_server.publish.words import given

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

MIB = 2.0**20


@click.command("compare")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--by", type=click.Choice(["release", "cohort"]), help="What A and B are, where names are of both kinds."
)
def compare(first: str, second: str, by: str | None) -> None:
    """Hold two releases or two cohorts against each other: agents, failures with their reasons, figures.

    A figure is marked where its median is worse at B, by the limits that a rollout's gate goes by.
    """
    answer = client().get("/compare", product=product(), a=first, b=second, **given(by=by))
    console.emit(answer, lambda: view(answer))


def view(answer: Mapping[str, Any]) -> str:
    one, two = answer["sides"]
    rows = [[label, *cells] for label, *cells in _rows(one, two, set(answer["worse"]))]
    return console.table([answer["by"], one["name"], two["name"], ""], rows)


def _rows(
    one: Mapping[str, Any], two: Mapping[str, Any], worse: set[str]
) -> Iterator[tuple[str, str, str, str]]:
    def both(label: str, read: Any, mark: str = "") -> tuple[str, str, str, str]:
        return label, read(one), read(two), mark

    yield both("agents", lambda side: str(side["agents"]))
    yield both("versions", lambda side: counted(side["versions"]))
    yield both("attempts", lambda side: counted(side["attempts"]))
    yield both("failed", lambda side: share(side["failed_share"]))
    yield both("because", lambda side: counted(side["reasons"]))
    for name in sorted({*one["figures"], *two["figures"]}):
        mark = "worse" if name in worse else ""
        yield both(f"{name}, median", lambda side, name=name: figure(name, side["figures"].get(name)), mark)


def counted(counts: Mapping[str, int]) -> str:
    return (
        ", ".join(f"{count} {name.replace('_', ' ') or 'none yet'}" for name, count in counts.items()) or "-"
    )


def share(part: float | None) -> str:
    return "-" if part is None else f"{part:.1%}"


def figure(name: str, found: Mapping[str, Any] | None) -> str:
    """A median in the unit that people read, and of how many agents."""
    if found is None:
        return "-"
    value = f"{found['median'] / MIB:.1f} MiB" if name == "rss" else f"{found['median']:g}"
    return f"{value} ({found['agents']})"
