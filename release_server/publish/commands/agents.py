"""`release agents`: how each one is, why it does what it does, and where it belongs."""

from __future__ import annotations

import csv
import sys
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from agent_core import clock, console
from agent_core.errors import NotFoundError
from release_server.publish import render
from release_server.publish.commands.operate import (
    LABELS,
    MATCH,
    client,
    confirm_reach,
    entries,
    product,
    reason_option,
)
from release_server.publish.words import given

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import TextIO

STATES = ("ok", "late", "held", "failed", "silent", "gone", "pending", "retired")
INVENTORY = ("os", "distro", "arch", "kernel", "python")
COLUMNS = (
    "id",
    "product",
    "version",
    "digest",
    "cohort",
    "state",
    "phase",
    "reason",
    "detail",
    "platform",
    "gate",
    "labels",
    "seen_at",
    "enrolled_at",
    *INVENTORY,
)
"""What `export` writes, in this order; scripts rely on it, so what comes later comes last."""


@click.group("agents", cls=console.Group, short_help="Look at agents, and say where they belong.")
def agents() -> None:
    """The agents of a product: how each one is, and why it does what it does."""


def path_of(agent: str, *rest: str) -> str:
    return "/".join(["/agents", quote(agent, safe=""), *rest])


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options that choose agents."""
    for option in (
        click.option("--cohort", help="In this cohort."),
        click.option("--state", type=click.Choice(STATES), help="In this state."),
        click.option("--version", metavar="VERSION", help="Running this version."),
        click.option(
            "-l",
            "--labels",
            type=MATCH,
            multiple=True,
            help="That match, as cohorts do: 'region=eu,tier!=db', 'version<1.4', 'os=linux'.",
        ),
    ):
        command = option(command)
    return command


def pages(labels: Iterable[str], **wanted: str | None) -> Iterator[list[dict[str, Any]]]:
    """The agents of the product that fit everything that was said, a page of the server's at a time."""
    query = given(product=product(), **wanted, match=",".join(filter(None, labels)) or None)
    after: str | None = ""
    while after is not None:
        page = client().get("/agents", **query, **given(after=after or None))
        yield entries(page)
        after = page.get("next")


def find(labels: Iterable[str], **wanted: str | None) -> list[dict[str, Any]]:
    """All of them at once."""
    return [agent for page in pages(labels, **wanted) for agent in page]


@agents.command("list", short_help="List agents.")
@filter_options
def list_agents(labels: tuple[str, ...], **wanted: str | None) -> None:
    """List the agents of a product."""
    found = find(labels, **wanted)
    console.emit(found, lambda: render.agent_table(found, clock.now()))


@agents.command("show", short_help="Show one agent and what it did lately.")
@click.argument("agent")
def show(agent: str) -> None:
    """Show one agent and what it did lately."""
    answer = client().get(path_of(agent))
    console.emit(answer, lambda: render.agent_view(answer, clock.now()))


@agents.command("why", short_help="Explain why an agent runs what it runs.")
@click.argument("agent")
def why(agent: str) -> None:
    """Explain why an agent runs what it runs: what holds, what does not, and what to do."""
    answer = client().get(path_of(agent, "why"))
    console.emit(answer, lambda: render.why(answer))


@agents.command("move", short_help="Put agents into a cohort by hand.")
@click.argument("names", nargs=-1, metavar="[AGENT]...")
@click.option("-l", "--labels", type=MATCH, help="All that match, as cohorts do: 'site=b,version<1.4'.")
@click.option("--cohort", help="The cohort they belong to from now on.")
@click.option("--by-labels", is_flag=True, help="Let their labels decide again.")
@reason_option()
def move(
    names: tuple[str, ...], *, labels: str | None, cohort: str | None, by_labels: bool, reason: str | None
) -> None:
    """Put agents into a cohort by hand, whatever their labels say. They follow with their next report.

    Moved one by one: where one is refused those before it have moved, and the same command goes on.
    """
    if (cohort is None) != by_labels:
        raise click.UsageError("say either --cohort NAME or --by-labels")
    if bool(names) is (labels is not None):
        raise click.UsageError("name the agents, or say -l QUERY")
    chosen = names
    if labels is not None:
        chosen = tuple(str(agent["id"]) for agent in find([labels]))
        confirm_reach(f"This moves {{}} to {cohort or 'where their labels say'}.", len(chosen))
    body = {"cohort": cohort, **given(reason=reason)}
    answers = []
    for name in chosen:
        answers.append(client().post(path_of(name, "move"), body))
        console.say(f"{name} is in {answers[-1].get('cohort') or 'no cohort'}")
    if len(names) == 1:
        console.emit(answers[0], lambda: render.agent_view(answers[0], clock.now()))
    else:
        console.emit(answers, lambda: render.agent_table(answers, clock.now()))


@agents.command("label", short_help="Set or remove an agent's labels.")
@click.argument("agent")
@click.argument("changes", nargs=-1, required=True, metavar="KEY=VALUE|KEY-...")
@reason_option()
def label(agent: str, changes: tuple[str, ...], reason: str | None) -> None:
    """Set labels (`tier=web`) or remove them (`tier-`). They override what the host says of itself."""
    found, seen = client().look(path_of(agent))
    labels = changed(found.get("operator_labels") or {}, changes)
    answer = client().post(path_of(agent, "label"), {"labels": labels, **given(reason=reason)}, seen=seen)
    _show(answer, f"{agent} labelled")


def changed(labels: Mapping[str, str], changes: Iterable[str]) -> dict[str, str]:
    """Labels after changes such as `tier=web` and `region-`."""
    result = dict(labels)
    for change in changes:
        if "=" not in change and change.endswith("-"):
            result.pop(change[:-1], None)
            continue
        result.update(LABELS.convert(change, None, click.get_current_context(silent=True)))
    return result


def _show(answer: Mapping[str, Any], done: str) -> None:
    console.say(done)
    console.emit(answer, lambda: render.agent_view(answer, clock.now()))


@agents.command("retire", short_help="Take agents out of the fleet.")
@click.argument("names", nargs=-1, required=True, metavar="AGENT...")
@reason_option()
def retire(names: tuple[str, ...], reason: str | None) -> None:
    """Take agents out of the fleet: no longer counted, and their keys no longer accepted."""
    for name in names:
        client().get(path_of(name))
    confirm_reach("Retiring reaches {}; each must be enrolled again to come back.", len(names))
    answers = [client().post(path_of(name, "retire"), given(reason=reason)) for name in names]
    console.say(f"retired: {', '.join(names)}")
    console.emit(answers, lambda: render.agent_table(answers, clock.now()))


@agents.command("accept", short_help="Let agents in that wait for it.")
@click.argument("names", nargs=-1, metavar="AGENT...")
@click.option("--all", "every", is_flag=True, help="All that wait now.")
@reason_option()
def accept(names: tuple[str, ...], reason: str | None, *, every: bool) -> None:
    """Let agents in that a token of `--approve` enrolled. Each is told with its next report."""
    _answer_waiting("accept", "accepted", "Accepting lets {} in.", names, reason, every=every)


@agents.command("reject", short_help="Turn agents away that wait to be accepted.")
@click.argument("names", nargs=-1, metavar="AGENT...")
@click.option("--all", "every", is_flag=True, help="All that wait now.")
@reason_option()
def reject(names: tuple[str, ...], reason: str | None, *, every: bool) -> None:
    """Turn agents away that wait to be accepted: their keys are refused for good."""
    _answer_waiting("reject", "rejected", "Rejecting turns {} away for good.", names, reason, every=every)


def _answer_waiting(
    verb: str, done: str, what: str, names: tuple[str, ...], reason: str | None, *, every: bool
) -> None:
    if bool(names) is every:
        raise click.UsageError("name the agents, or say --all")
    waiting = {str(agent["id"]): agent for agent in find((), state="pending")}
    chosen = names or tuple(waiting)
    if unknown := [name for name in chosen if name not in waiting]:
        raise NotFoundError(
            f"{', '.join(unknown)} does not wait to be accepted", then="release agents list --state pending"
        )
    if not chosen:
        console.say("no agent waits to be accepted")
    else:
        confirm_reach(what, len(chosen))
    answers = [client().post(path_of(name, verb), given(reason=reason)) for name in chosen]
    if chosen:
        console.say(f"{done}: {', '.join(chosen)}")
    console.emit(answers, lambda: render.agent_table(answers, clock.now()))


@agents.command("export", short_help="Write all agents as CSV.")
@click.option("--csv", "as_csv", is_flag=True, help="As CSV; this is what it does unless --json.")
@click.option(
    "-o", "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write here, not to stdout."
)
@filter_options
def export(labels: tuple[str, ...], *, as_csv: bool, out: Path | None, **wanted: str | None) -> None:
    """Write agents as CSV with a fixed order of columns, or as JSON with --json."""
    if as_csv and console.options().json:
        raise click.UsageError("--csv and --json exclude each other")
    if console.options().json:
        if out is not None:
            raise click.UsageError("--out writes CSV; redirect the output of --json instead")
        console.emit(find(labels, **wanted))
        return
    found = pages(labels, **wanted)
    found = chain([next(found, [])], found)  # what is refused leaves a file of before as it is
    if out is None:
        write_table(sys.stdout, found)
        return
    with out.open("w", newline="") as file:
        count = write_table(file, found)
    console.say(f"{render.agents(count)} written to {out}")


def write_table(file: TextIO, found: Iterable[Iterable[Mapping[str, Any]]]) -> int:
    """Agents as CSV, page by page, so that a large fleet is never held at once; says how many there were.

    Cells that a spreadsheet would take for a formula are quoted with an apostrophe.
    """
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(COLUMNS)
    count = 0
    for agent in (agent for page in found for agent in page):
        row = {**(agent.get("inventory") or {}), **agent, "labels": render.labels(render.every_label(agent))}
        writer.writerow([harmless(str(row.get(column) or "")) for column in COLUMNS])
        count += 1
    return count


def harmless(cell: str) -> str:
    """An agent chooses its own labels and details; a spreadsheet must not run them."""
    return f"'{cell}" if cell.startswith(("=", "+", "-", "@", "\t", "\r")) else cell
