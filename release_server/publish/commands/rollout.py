"""`release rollout`: a release on its way through the stages of one cohort."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console
from agent_core.errors import Exit, NotFoundError, UnreachableError
from release_server.publish import render
from release_server.publish.commands.operate import (
    AMOUNT,
    MOMENT,
    ROLLOUT,
    SECONDS,
    STEPS,
    client,
    confirm_reach,
    product,
    reason_option,
)
from release_server.publish.words import Amount, Step, given

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PATIENCE_S = 60.0
"""How long a watch without --timeout puts up with a server that does not answer."""
LOOKED_AT = 100
"""The newest so many rollouts are looked at for the one that people mean."""
BUSY = ("draft", "awaiting_approval", "scheduled", "running", "paused", "rolling_back")
ENDS: dict[str, Exit] = {
    "completed": Exit.DONE,
    "aborted": Exit.HALTED,
    "rolled_back": Exit.HALTED,
    "superseded": Exit.HALTED,
}
BY_PEOPLE = frozenset({"manual", "pinned", "frozen", "", None})
"""Reasons of a pause that a person asked for."""
MOVED = ("downloading", "staged", "trial", "healthy")
"""Attempts that going back would reach."""


@click.group("rollout", cls=console.Group, short_help="Take a release through a cohort, step by step.")
def rollout() -> None:
    """A rollout takes one release through the stages of one cohort. IDs are written r-31 or 31."""


def read(number: int) -> dict[str, Any]:
    answer: dict[str, Any] = client().get(f"/rollouts/{number}")
    return answer


def newest(cohort: str | None) -> int:
    """The rollout people mean when they name none: the newest that is not over, else the newest."""
    found = client().items("/rollouts", product=product(), limit=LOOKED_AT, **given(cohort=cohort))
    if not found:
        raise NotFoundError("there is no rollout yet", then="release rollout start VERSION --cohort NAME")
    return int(max(found, key=lambda entry: (entry["state"] in BUSY, entry["id"]))["id"])


def show_rollout(answer: Mapping[str, Any], done: str) -> None:
    console.say(done)
    console.emit(answer, lambda: render.rollout_line(answer))


def plan_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What a rollout is to do: the same words for the rehearsal and for the real one."""
    command = click.option("--cohort", required=True, help="The cohort it goes through.")(
        gate_options(command)
    )
    return click.argument("version")(command)


def gate_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """By which steps and gates a rollout goes, and on what terms."""
    for option in reversed(
        (
            click.option(
                "--steps",
                type=STEPS,
                default="1%,10%,50%,100%",
                show_default=True,
                help="Shares, or counts of agents: 1,5,20. A step may have a gate of its own: 1%:soak=2h.",
            ),
            click.option(
                "--soak",
                type=SECONDS,
                default="30m",
                show_default=True,
                help="How long each step must stay good.",
            ),
            click.option(
                "--max-failed",
                type=AMOUNT,
                default="1%",
                show_default=True,
                help="How many may fail: a share or a count.",
            ),
            click.option(
                "--max-silent",
                type=click.IntRange(0),
                help="How many may be silent; without it a silent agent counts as a failed one.",
            ),
            click.option(
                "--min-sample",
                type=click.IntRange(0),
                default=1,
                show_default=True,
                help="Outcomes a step must see, healthy or failed.",
            ),
            click.option(
                "--deadline",
                type=SECONDS,
                default="2h",
                show_default=True,
                help="How long each step may take.",
            ),
            click.option("--at", "not_before", type=MOMENT, help="Start then: a time, or how long from now."),
            click.option("--stratified", is_flag=True, help="Begin with an agent of each site and platform."),
            click.option("--approval", is_flag=True, help="Wait until a second person approves."),
            click.option(
                "--regression-watch",
                "watch_s",
                type=SECONDS,
                help="How long it is still watched after completion; 1h unless said.",
            ),
            click.option(
                "--compare/--no-compare",
                default=True,
                help="Hold failures and health figures against what is usual here.",
            ),
            click.option("--downgrade", is_flag=True, help="Go to an older release, on purpose."),
        )
    ):
        command = option(command)
    return command


def plan_body(
    version: str,
    *,
    cohort: str,
    steps: tuple[Step, ...],
    soak: int,
    max_failed: Amount,
    max_silent: int | None,
    min_sample: int,
    deadline: int,
    **terms: Any,
) -> dict[str, Any]:
    """The plan as the server reads it; terms that were not given are left to it."""
    gate = {"soak_s": soak, "min_sample": min_sample, "deadline_s": deadline, **given(max_silent=max_silent)}
    limit = max_failed.as_limit()
    stages = []
    for step in steps:
        own = dict(step.gate)
        own_limit = {} if own.keys() & {"max_failed", "max_failed_bp"} else limit
        stages.append({**step.as_reach(), **gate, **own_limit, **own})
    compare, watch_s = terms.pop("compare"), terms.pop("watch_s")
    said = {name: value for name, value in terms.items() if value} | given(watch_s=watch_s)
    said |= {} if compare else {"figures": False, "false_halt_bp": 0}
    body = {"product": product(), "cohort": cohort, "version": version, "stages": stages}
    return body | ({"terms": said} if said else {})


@rollout.command("start", short_help="Start a rollout.")
@plan_options
@click.option("--supersede", is_flag=True, help="Take the place of a rollout that is going on there.")
@click.option("--draft", is_flag=True, help="Keep it ready; it begins by: release rollout resume ID.")
@reason_option()
def start(version: str, *, supersede: bool, draft: bool, reason: str | None, **plan: Any) -> None:
    """Take VERSION through a cohort in steps; it stops by itself when too many agents fail."""
    body = plan_body(version, **plan) | given(reason=reason, supersede=supersede or None, draft=draft or None)
    tell_begun(client().post("/rollouts", body))


def tell_begun(answer: Mapping[str, Any]) -> None:
    """Show a rollout that has just been asked for, with what to type next."""
    said, begins = BEGUN.get(answer["state"], BEGUN[""]), (answer.get("terms") or {}).get("not_before")
    show_rollout(answer, said.format(render.name_of(answer), f", not before {begins}" if begins else ""))


BEGUN = {
    "": "{0} started; watch it with: release rollout status {0} --watch",
    "draft": "{0} is a draft; begin it with: release rollout resume {0}",
    "awaiting_approval": "{0} waits for a second person: release rollout approve {0}",
    "scheduled": "{0} is scheduled{1}; what it waits for: release rollout why {0}",
}


@rollout.command("rehearse", short_help="Say what a rollout would do, and do nothing.")
@plan_options
def rehearse(version: str, **plan: Any) -> None:
    """Say whom each step of a rollout of VERSION would reach, and when at the earliest; changes nothing.

    Each rollout shuffles anew: the real one begins with other agents.
    """
    answer = client().post("/rollouts/rehearse", plan_body(version, **plan))
    console.emit(answer, lambda: render.rehearsal_view(answer))


@rollout.command("list", short_help="List rollouts, the newest first.")
@click.option("--cohort", help="Of this cohort only.")
@click.option("--state", type=click.Choice([*BUSY, *ENDS]), help="In this state only.")
@click.option("--version", metavar="VERSION", help="Of this version only.")
@click.option(
    "--limit", type=click.IntRange(1, 1000), default=100, show_default=True, help="At most so many."
)
def list_rollouts(limit: int, **wanted: str | None) -> None:
    """List the rollouts of a product, the newest first."""
    found = client().items("/rollouts", product=product(), limit=limit, **given(**wanted))
    found.sort(key=lambda entry: -int(entry["id"]))
    console.emit(found, lambda: render.rollout_table(found, clock.now()))


@rollout.command("status", short_help="Show how a rollout stands; --watch until it is done.")
@click.argument("number", type=ROLLOUT, required=False, metavar="[ID]")
@click.option("--cohort", help="Without an ID: the newest of this cohort.")
@click.option("--watch", "-w", is_flag=True, help="Stay until it is done; the exit code says how it went.")
@click.option("--every", type=SECONDS, default="1s", show_default=True, help="How often a watch looks.")
def status(number: int | None, cohort: str | None, *, watch: bool, every: int) -> int:
    """Show how a rollout stands; without an ID the newest one.

    With --watch: 0 when it completed, 5 when it halted, was aborted, superseded or rolled back, 8 after
    --timeout. Ctrl-C ends the watch, never the rollout.
    """
    wanted = newest(cohort) if number is None else number
    if watch:
        return watch_rollout(wanted, every)
    answer = read(wanted)
    console.emit(answer, lambda: render.rollout_view(answer, clock.now()))
    return Exit.DONE


@rollout.command("why", short_help="Explain why a rollout is where it is.")
@click.argument("number", type=ROLLOUT, required=False, metavar="[ID]")
def why(number: int | None) -> None:
    """Explain why a rollout is where it is: what holds, what it waits for, what to type, and what comes next.

    Without an ID the newest one.
    """
    answer = client().get(f"/rollouts/{newest(None) if number is None else number}/why")
    console.emit(answer, lambda: render.why(answer))


def ending(answer: Mapping[str, Any]) -> Exit | None:
    """How a watch of this rollout ends, or None while there is something to wait for.

    A rollout that a person paused goes on when a person says so; one that halted by itself has ended.
    """
    if answer["state"] == "paused":
        by_itself = answer.get("stage_state") == "halted" or answer.get("reason") not in BY_PEOPLE
        return Exit.HALTED if by_itself else None
    return ENDS.get(str(answer["state"]))


def watch_rollout(number: int, every_s: float) -> int:
    """Show a rollout until it is done, and say by the exit code how it went."""
    with_json = console.options().json
    terminal = None if with_json or not sys.stdout.isatty() else _terminal()
    write: Callable[[str], None] = console.say if with_json else click.echo
    try:
        with render.RolloutView(terminal, write) as view:
            answer, code = _follow(number, every_s, view.show)
    except KeyboardInterrupt:
        click.echo(
            f"no longer watching; r-{number} goes on. To stop it: release rollout pause r-{number}", err=True
        )
        return Exit.INTERRUPTED
    if with_json:
        console.emit(answer)
    if code is not Exit.DONE:
        click.echo(
            f"r-{number} is {render.condition(answer)}; see: release rollout history r-{number}", err=True
        )
    return code


def _terminal() -> Any:
    from rich.console import Console

    return Console(no_color=console.options().no_color or None)


def _follow(number: int, every_s: float, show: Callable[..., None]) -> tuple[dict[str, Any], Exit]:
    """Look until the rollout has ended.

    Raises:
        UnreachableError: --timeout has passed, or the server has been away for too long.
    """
    api = client()
    timeout_s = console.options().timeout_s
    answer: dict[str, Any] = api.get(f"/rollouts/{number}")
    api.attempts = 1  # from here on this loop is what tries again
    heard_s = began_s = clock.boot_s()
    note = ""
    while True:
        show(answer, note)
        if (code := ending(answer)) is not None:
            return answer, code
        if timeout_s is not None and clock.boot_s() - began_s + every_s > timeout_s:
            raise _too_long(number, timeout_s)
        time.sleep(every_s)
        try:
            answer = api.get(f"/rollouts/{number}")
            note, heard_s = "", clock.boot_s()
        except UnreachableError:
            if timeout_s is None and clock.boot_s() - heard_s > PATIENCE_S:
                raise
            note = "the server does not answer; still trying"


def _too_long(number: int, timeout_s: float) -> UnreachableError:
    return UnreachableError(
        f"r-{number} is not done after {render.duration(timeout_s)}",
        why="the watch ended, the rollout goes on",
        then=f"release rollout status r-{number} --watch",
        reason="timeout",
    )


# --- what people ask of a rollout ------------------------------------------------------------------------


def act(number: int, verb: str, done: str, **body: Any) -> None:
    """Ask one thing of a rollout, and print how it stands."""
    answer = client().post(f"/rollouts/{number}/{verb}", given(**body))
    show_rollout(answer, f"r-{number} {done}")


@rollout.command("pause", short_help="Stop a rollout where it is.")
@click.argument("number", type=ROLLOUT, metavar="ID")
@reason_option()
def pause(number: int, reason: str | None) -> None:
    """Stop a rollout where it is: no further agent enters, those that are in stay."""
    act(number, "pause", "paused", reason=reason)


@rollout.command("resume", short_help="Let a paused or halted rollout go on.")
@click.argument("number", type=ROLLOUT, metavar="ID")
@reason_option()
def resume(number: int, reason: str | None) -> None:
    """Let a paused or halted rollout go on; after a halt, what has failed so far is tolerated."""
    act(number, "resume", "goes on", reason=reason)


@rollout.command("advance", short_help="Open the next step without waiting.")
@click.argument("number", type=ROLLOUT, metavar="ID")
@reason_option()
def advance(number: int, reason: str | None) -> None:
    """Open the next step now, without waiting for the gate of this one."""
    act(number, "advance", "moves to its next step", reason=reason)


def confirm_return(answer: Mapping[str, Any]) -> None:
    """Ask before agents are taken back to the release before."""
    moved = sum(render.counted(answer).get(state, 0) for state in MOVED)
    back = answer.get("base") or "nothing"
    confirm_reach(f"This takes {{}} back from {answer['version']} to {back}.", moved)


@rollout.command("abort", short_help="End a rollout; --rollback takes agents back.")
@click.argument("number", type=ROLLOUT, metavar="ID")
@click.option("--rollback", is_flag=True, help="Take the agents that have it back to the release before.")
@reason_option()
def abort(number: int, *, rollback: bool, reason: str | None) -> None:
    """End a rollout for good. Agents that have the release keep it, unless --rollback."""
    if rollback:
        confirm_return(read(number))
    done = "is rolling back" if rollback else "aborted"
    act(number, "abort", done, rollback=rollback, reason=reason)


@rollout.command("retry", short_help="Let agents that failed try once more.")
@click.argument("number", type=ROLLOUT, metavar="ID")
@click.option(
    "--failed",
    is_flag=True,
    expose_value=False,
    help="The agents that failed or rolled back; this is what it does anyway.",
)
@reason_option()
def retry(number: int, reason: str | None) -> None:
    """Let the agents that failed take the release once more: their memory of it as bad is lifted."""
    act(number, "retry", "will be tried once more by agents that failed", reason=reason)


@rollout.command("undo", short_help="Take every agent back to the release before.")
@click.argument("number", type=ROLLOUT, metavar="ID")
@reason_option()
def undo(number: int, reason: str | None) -> None:
    """Take every agent back to the release before, also when the rollout has completed."""
    confirm_return(read(number))
    act(number, "undo", "is being undone", reason=reason)


@rollout.command("approve", short_help="Let a rollout begin that waits for a second person.")
@click.argument("number", type=ROLLOUT, metavar="ID")
@click.option("--digest", help="Of the plan you looked at; without it the plan is shown and asked about.")
@reason_option()
def approve(number: int, digest: str | None, reason: str | None) -> None:
    """Approve the plan of a rollout that another person asked for; bound to the plan's digest."""
    if digest is None:
        answer = read(number)
        console.say(render.rollout_view(answer, clock.now()))
        confirm_reach(f"Plan {answer['digest'][:12]} of r-{number} reaches {{}}.", answer.get("members") or 0)
        digest = str(answer["digest"])
    act(number, "approve", "approved", digest=digest, reason=reason)


@rollout.command("history", short_help="Show what happened to a rollout and why.")
@click.argument("number", type=ROLLOUT, required=False, metavar="[ID]")
def history(number: int | None) -> None:
    """Show what happened to a rollout, when, why, and by whom; without an ID the newest one."""
    answer = read(newest(None) if number is None else number)
    events = answer.get("events") or []
    if answer.get("pruned_at"):
        console.say(f"the history was removed at {answer['pruned_at']}; what people did is in the audit log")
    console.emit(events, lambda: render.event_table(events))
