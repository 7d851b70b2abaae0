"""`release cohort`: who belongs together, and what holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from agent_core import clock, console
from release_server.publish import fleet_text, render
from release_server.publish.commands.operate import (
    BUDGET,
    ENTRY,
    LEASE,
    MOMENT,
    SECONDS,
    WINDOW,
    client,
    confirm_reach,
    product,
    reason_option,
)
from release_server.publish.words import ALWAYS, NONE, given

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


@click.group("cohort", cls=console.Group, short_help="Name sets of agents and say what holds them.")
def cohort() -> None:
    """A cohort is a named set of agents of one product that are steered together."""


def path_of(name: str, *rest: str) -> str:
    return "/".join(["/cohorts", quote(product(), safe=""), quote(name, safe=""), *rest])


def read(name: str) -> dict[str, Any]:
    answer: dict[str, Any] = client().get(path_of(name))
    return answer


def members(name: str) -> int:
    """How many agents a cohort has."""
    return render.reach(read(name))


def show_cohort(answer: Mapping[str, Any], done: str) -> None:
    """Say what was done, and print the cohort as it is now."""
    console.say(done)
    console.emit(answer, lambda: render.cohort_view(answer))


def spec_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of `create` and `edit` that set how a cohort behaves."""
    for option in (
        click.option("--splay", "splay_s", type=SECONDS, help="Begin updates at random within so long."),
        click.option(
            "--lease",
            type=LEASE,
            help="How many of one label's value may change version at once: site=2, rack=10%, none;"
            " site=2,10% is the smaller of both.",
        ),
        click.option(
            "--budget",
            type=BUDGET,
            help="Bytes a second into each value of one label: site=500kB, none;"
            " site=2MB,4 is divided among four agents at once.",
        ),
        click.option(
            "--calendar",
            type=ENTRY,
            multiple=True,
            help="Frozen then: 'year-end=12-20..01-04 Europe/Berlin', 'weekend=sat,sun UTC'; none.",
        ),
        click.option(
            "--approval/--no-approval", default=None, help="Each rollout here needs a second person."
        ),
        click.option("--report", "report_s", type=SECONDS, help="How often agents report."),
        click.option("--poll", "poll_s", type=SECONDS, help="How often agents poll."),
        click.option("--window", type=WINDOW, help="'mon-fri 22:00-04:00 Europe/Berlin', or `always`."),
        click.option("--priority", type=int, help="The highest matching cohort gets an agent."),
    ):
        command = option(command)
    return command


@cohort.command("list", short_help="List the cohorts of a product.")
def list_cohorts() -> None:
    """List the cohorts of a product with what holds them."""
    found = client().items("/cohorts", product=product())
    console.emit(found, lambda: render.cohort_table(found))


@cohort.command("show", short_help="Show one cohort.")
@click.argument("name")
def show(name: str) -> None:
    """Show one cohort."""
    answer = read(name)
    console.emit(answer, lambda: render.cohort_view(answer))


@cohort.command("create", short_help="Make a cohort.")
@click.argument("name")
@click.option("--match", default="", help="Which labels: 'region=eu,tier!=db'. Nothing matches every agent.")
@click.option("--release", metavar="VERSION", help="The version its agents should run from the start.")
@spec_options
def create(name: str, match: str, release: str | None, **spec: Any) -> None:
    """Make a cohort. Agents whose labels match join with their next report."""
    spec = {key: value for key, value in with_calendar(spec).items() if value not in (ALWAYS, NONE)}
    body = given(product=product(), name=name, match=match, release=release, **spec)
    show_cohort(client().post("/cohorts", body), f"cohort {name} made")


@cohort.command("edit", short_help="Change a cohort.")
@click.argument("name")
@click.option("--match", help="Which labels: 'region=eu,tier!=db'.")
@reason_option()
@spec_options
def edit(name: str, **spec: Any) -> None:
    """Change what is given; everything else stays. Each change is kept as a revision of its own."""
    body = given(**with_calendar(spec))
    if body.get("window") == ALWAYS:
        body["window"] = None
    body |= {key: None for key in ("lease", "budget") if body.get(key) == NONE}
    if not body.keys() - {"reason"}:
        raise click.UsageError(
            "nothing to change: give --match, --priority, --window, --poll, --report, --splay, --lease,"
            " --budget, --calendar or --approval"
        )
    if "match" in body:
        confirm_match(name, body["match"])
    show_cohort(client().patch(path_of(name), body), f"cohort {name} changed")


def with_calendar(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The options with their entries of a calendar as one; `none` empties it, nothing said leaves it."""
    entries = [entry for entry in spec["calendar"] if entry != NONE]
    return {**spec, "calendar": dict(entries) if spec["calendar"] else None}


def confirm_match(name: str, match: str) -> None:
    """Ask before agents change cohort for a new match; nobody is asked when none does."""
    answer = client().get(path_of(name, "preview"), match=match)
    counts = answer.get("counts") or {}
    joins, leaves = (counts.get(key, len(answer.get(key) or [])) for key in ("joins", "leaves"))
    if joins or leaves:
        moves = f"{joins} join, {leaves} leave"
        confirm_reach(f"Changing the match of {name} reaches {{}}: {moves}.", joins + leaves)


@cohort.command("delete", short_help="Delete a cohort.")
@click.argument("name")
def delete(name: str) -> None:
    """Delete a cohort. Its agents go to the next cohort that matches them, or to none."""
    confirm_reach(f"Deleting cohort {name} reaches {{}}: they change cohort or have none.", members(name))
    client().delete(path_of(name))
    console.say(f"cohort {name} deleted")
    if console.options().json:
        console.emit({"name": name, "deleted": True})


@cohort.command("pin", short_help="Keep a cohort on one version.")
@click.argument("name")
@click.argument("version")
@reason_option(required=True)
def pin(name: str, version: str, reason: str) -> None:
    """Keep a cohort on VERSION: its agents go there, forward or back, and stay until it is unpinned."""
    confirm_reach(
        f"Pinning {name} to {version} reaches {{}}: all that run another version change.", members(name)
    )
    answer = client().post(path_of(name, "pin"), {"version": version, "reason": reason})
    show_cohort(answer, f"cohort {name} pinned to {version}")


@cohort.command("unpin", short_help="Let a cohort follow rollouts again.")
@click.argument("name")
@reason_option()
def unpin(name: str, reason: str | None) -> None:
    """Let a cohort follow rollouts again; its agents stay on what they run until one begins."""
    show_cohort(client().post(path_of(name, "unpin"), given(reason=reason)), f"cohort {name} unpinned")


@cohort.command("freeze", short_help="Let a cohort take nothing new.")
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Every cohort of the product.")
@click.option("--until", type=MOMENT, help="When it ends: 2026-12-27T08:00:00Z, or from now on: 36h.")
@reason_option(required=True)
def freeze(name: str | None, until: str | None, reason: str, *, every: bool) -> None:
    """Let a cohort take nothing new until it is unfrozen, or until a time. Trials that run go on."""
    if (name is None) is not every:
        raise click.UsageError("say either NAME or --all")
    ends = f" until {until} ({render.ago(until, clock.now())})" if until else ""
    names = [name] if name else _named(lambda each: not _frozen_by_hand(each), "Freezing")
    _each(names, "freeze", given(until=until, reason=reason), f"frozen{ends}", every=every)


@cohort.command("unfreeze", short_help="Let a frozen cohort move again.")
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Every cohort of the product that is frozen by hand.")
@reason_option()
def unfreeze(name: str | None, reason: str | None, *, every: bool) -> None:
    """Let a frozen cohort move again. What its calendar says goes on: see `edit --calendar`."""
    if (name is None) is not every:
        raise click.UsageError("say either NAME or --all")
    names = [name] if name else _named(_frozen_by_hand, "Unfreezing")
    _each(names, "unfreeze", given(reason=reason), "unfrozen", every=every)


def _frozen_by_hand(each: Mapping[str, Any]) -> bool:
    return fleet_text.freeze_by_hand(each) is not None


def _named(is_meant: Callable[[Mapping[str, Any]], bool], doing: str) -> list[str]:
    """The product's cohorts that are meant, once somebody has agreed to reach them all."""
    found = [each for each in client().items("/cohorts", product=product()) if is_meant(each)]
    confirm_reach(f"{doing} {len(found)} cohorts reaches {{}}.", sum(render.reach(each) for each in found))
    return [each["name"] for each in found]


def _each(names: list[str], verb: str, body: dict[str, Any], done: str, *, every: bool) -> None:
    """Ask the same of each cohort, and print what has come of it."""
    answers = [client().post(path_of(name, verb), body) for name in names]
    for name in names:
        console.say(f"cohort {name} {done}")
    console.emit(
        answers if every else answers[0],
        lambda: render.cohort_table(answers) if every else render.cohort_view(answers[0]),
    )


@cohort.command("preview", short_help="Show whom a match would reach.")
@click.argument("name")
@click.option("--match", help="The match to try; without it the cohort's own.")
@click.option("--priority", type=int, help="The priority to try; without it the cohort's own.")
@click.option("--version", metavar="VERSION", help="The release that agents should be ready for.")
def preview(name: str, **tried: Any) -> None:
    """Show which agents a match would put into the cohort, there already or not; nothing is changed."""
    answer = client().get(path_of(name, "preview"), **given(**tried))
    console.emit(answer, lambda: render.preview(answer))
