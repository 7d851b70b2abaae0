"""`release diff` and `release apply`: what a fleet should be, from a file under version control."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from agent_core import clock, console
from agent_core.errors import Exit, UnreachableError, UsageError
from release_server.publish import fleet_file, fleet_plan, fleet_text, profile, render
from release_server.publish.commands.operate import client, confirm_reach, entries
from release_server.publish.profile import trust_option

if TYPE_CHECKING:
    from collections.abc import Callable

    from release_server.publish.fleet_file import FleetFile, WantedPolicy
    from release_server.publish.fleet_plan import Plan, Step

FILE = "fleet.toml"


def file_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What both commands take."""
    for option in (
        trust_option(),
        click.option("--prune", is_flag=True, help="Delete cohorts that the file does not name."),
        click.option(
            "-f",
            "--file",
            "path",
            type=click.Path(path_type=Path, dir_okay=False, allow_dash=True),
            default=FILE,
            show_default=True,
            help="The fleet file; - is stdin.",
        ),
    ):
        command = option(command)
    return command


@click.command("diff")
@file_options
@click.option("--detailed-exitcode", is_flag=True, help="Exit with 10 when there is something to change.")
@click.option("--present", is_flag=True, help="Print what is so as a fleet file, and compare nothing.")
def diff(path: Path, trust: Path | None, *, prune: bool, detailed_exitcode: bool, present: bool) -> int:
    """Say what `release apply` would change; nothing is changed.

    --present > fleet.toml is where to begin with a fleet that is there.
    """
    if present:
        name = profile.current().need_product()
        click.echo(fleet_text.write(name, client().items("/cohorts", product=name)), nl=False)
        return Exit.DONE
    wanted = _read(path)
    found = _plan(wanted, prune=prune)
    unsigned = _unsigned(wanted.policy, found.product, trust)
    _say_rest(found, unsigned)
    console.emit(found.to_json() | {"policy": unsigned}, lambda: view(found))
    return CHANGES if detailed_exitcode and (found.steps or unsigned) else Exit.DONE


CHANGES = Exit.UPDATED
"""The code that says `something would change`, as `agent once` says `something has changed`."""


@click.command("apply")
@file_options
def apply(path: Path, trust: Path | None, *, prune: bool) -> None:
    """Make cohorts, pins and freezes as the file says: all of it, or nothing.

    Refused with 6 when one of the cohorts was changed since it was looked at. A policy is signed by release
    keys and by nothing else: where it differs everything else is done, and the command ends with 8.
    """
    wanted = _read(path)
    found = _plan(wanted, prune=prune)
    unsigned = _unsigned(wanted.policy, found.product, trust)
    console.say(view(found))
    _say_rest(found, unsigned)
    changed = _carry_out(found) if found.steps else []
    console.emit(
        found.to_json() | {"policy": unsigned, "cohorts": changed},
        lambda: render.cohort_table(changed) if changed else "",
    )
    if unsigned:
        raise UnreachableError(
            f"the policy of {found.product} is not what the file says",
            why="only release keys sign it",
            then="; ".join(unsigned),
            reason="not-signed",
        )


def _carry_out(plan: Plan) -> list[dict[str, Any]]:
    """Ask, and have the server do all of it in one transaction."""
    confirm_reach(f"This changes {_cohorts(plan)} and reaches {{}}.", _reach(plan))
    answer = client().post("/plan", plan.body())
    console.say(f"applied to {_cohorts(plan)}")
    return entries(answer)


def _read(path: Path) -> FleetFile:
    try:
        with click.open_file(str(path)) as stream:
            text = stream.read()
    except FileNotFoundError:
        raise UsageError(
            f"there is no {path}", then=f"release diff --present > {path} writes one of what is so"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read", why=str(error)) from None
    return fleet_file.read(text, "stdin" if str(path) == "-" else str(path))


def _plan(wanted: FleetFile, *, prune: bool) -> Plan:
    product = wanted.product or profile.current().need_product()
    present = client().items("/cohorts", product=product)
    found = fleet_plan.plan(wanted, product, present, clock.iso(clock.now()), prune=prune)
    steps = [replace(step, agents=step.agents + _joining(product, step)) for step in found.steps]
    return replace(found, steps=tuple(steps))


def _cohorts(plan: Plan) -> str:
    count = len({step.cohort for step in plan.steps})
    return "1 cohort" if count == 1 else f"{count} cohorts"


def _reach(plan: Plan) -> int:
    """How many agents a plan is about: those of the cohorts it changes, and those that join new ones."""
    cohorts = dict[str, int]()
    for step in plan.steps:
        cohorts[step.cohort] = max(step.agents, cohorts.get(step.cohort, 0))
    return sum(cohorts.values())


def _joining(product: str, step: Step) -> int:
    """How many agents a step brings into its cohort; those of the cohort itself are known without asking."""
    moves = step.verb == "create" or (step.verb == "edit" and {"match", "priority"} & step.said.keys())
    if not moves:
        return 0
    path = f"/cohorts/{quote(product, safe='')}/{quote(step.cohort, safe='')}/preview"
    usual = fleet_file.DEFAULTS if step.verb == "create" else {}
    tried = {name: step.said.get(name, usual.get(name)) for name in ("match", "priority")}
    counts = client().get(path, **tried).get("counts") or {}
    return int(counts.get("joins") or 0)


# --- policies --------------------------------------------------------------------------------------------


def _unsigned(wanted: WantedPolicy | None, product: str, trust: Path | None) -> list[str]:
    """What release keys have to sign before the policy is as the file says: what to type, line by line."""
    if wanted is None:
        return []
    from keys import changes
    from release_server.publish.commands.trust import manager

    targets = manager(None, trust).look().targets.signed.targets
    held = changes.policy_of(targets, product)
    versions = changes.versions_by_seq(targets, product)
    todo = []
    if wanted.floor is not None and versions.get(held.floor_seq) != wanted.floor:
        todo.append(f"release policy set --floor {wanted.floor}")
    revoked = {versions.get(seq, f"seq {seq}") for seq in held.revoked_seq}
    if more := sorted({*wanted.revoked} - revoked):
        todo.append(f"release policy revoke {' '.join(more)}")
    if less := sorted(revoked - {*wanted.revoked}):
        todo.append(f"release policy revoke --undo {' '.join(less)}")
    return todo


# --- showing ---------------------------------------------------------------------------------------------


def _say_rest(plan: Plan, unsigned: list[str]) -> None:
    """What differs and is not changed, and why."""
    for text in plan.kept:
        console.say(f"kept: {text}")
    if plan.left:
        console.say(f"not in the file, and left alone: {', '.join(plan.left)}")
    for command in unsigned:
        console.say(f"for release keys: {command}")


def view(plan: Plan) -> str:
    """A plan as a table: a line a cohort's value."""
    rows = [row for step in plan.steps for row in _rows(step)]
    return console.table(
        ["change", "cohort", "what", "is", "will be", "reaches"], rows, empty="nothing to change"
    )


def _rows(step: Step) -> list[list[Any]]:
    shows = step.shows or (("", "", ""),)
    reach = render.agents(step.agents)
    return [
        [step.verb, step.cohort, name, before or "-", after or "-", reach] for name, before, after in shows
    ]
