"""The commands of `agent` that people type."""

from __future__ import annotations

import os
import socket
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from agent_core import clock, console, slots
from agent_core.errors import (
    ConflictError,
    Exit,
    NotFoundError,
    RelfleetError,
    UnreachableError,
    UsageError,
)
from agent_core.layout import Layout
from agent_core.settings import AGENT, load_agent
from updater import control, install, poll
from updater.decide import Action, Hold
from updater.device import Device, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

DEFAULT_ROOT = "/var/lib/relfleet"

root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    envvar="RELFLEET_ROOT",
    default=DEFAULT_ROOT,
    show_default=True,
    help="The device's directory.",
)


def _bar() -> Callable[[int, int], None] | None:
    """A progress line on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty() or console.options().quiet:
        return None
    last = [-1]

    def show(received: int, length: int) -> None:
        percent = received * 100 // max(length, 1)
        if percent != last[0]:
            last[0] = percent
            filled = "#" * (percent * 30 // 100)
            ending = "\n" if received >= length else ""
            click.echo(f"\rdownload [{filled:<30}] {percent:3d} %{ending}", err=True, nl=False)

    return show


@click.command()
@root_option
@click.option("--server", required=True, metavar="URL", help="The release server.")
@click.option("--product", required=True, help="What this host is to run.")
@click.option(
    "--token-file", type=click.File("r"), required=True, help="Enrolment token; `-` reads standard input."
)
@click.option(
    "--trust",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    required=True,
    help="root.json, as `release key export-trust` wrote it; bring it another way than from the server.",
)
@click.option("--name", default=socket.gethostname, help="What the host calls itself [default: its name].")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="What this host is; repeatable.")
@click.option("--gate", default="", help="Only releases signed for this gate, e.g. canary.")
@click.option("--install/--no-install", "wanted", default=True, help="Install the first version now.")
def enroll(
    root: Path,
    server: str,
    product: str,
    token_file: IO[str],
    trust: Path,
    name: str,
    labels: tuple[str, ...],
    gate: str,
    wanted: bool,
) -> None:
    """Make this host an agent: identity, trust, first version."""
    token = token_file.read(4096).strip()
    pairs = dict(_pair(label) for label in labels)
    device = install.enroll(Layout(root), server, product, token, trust.read_bytes(), name, pairs, gate)
    who = device.identity
    console.say(f"enrolled as {who.agent_id} in cohort {who.cohort or '(none yet)'}")
    outcome = None
    if wanted:
        outcome = install.first_version(device, progress=_bar())
        console.say(_sentence(outcome))
    console.emit(
        {
            "agent_id": who.agent_id,
            "cohort": who.cohort,
            "root": str(root),
            "outcome": outcome.to_json() if outcome else None,
        },
        text=who.agent_id,
    )


def _pair(label: str) -> tuple[str, str]:
    key, equals, value = label.partition("=")
    if not equals:
        raise UsageError(f"{label!r} is no label", why="a label is KEY=VALUE", then="--label region=eu")
    return key, value


@click.command()
@root_option
@click.option(
    "--supervise",
    is_flag=True,
    help="Stay and restart the agent when it ends: for containers, runit, or no service manager at all.",
)
def run(root: Path, supervise: bool) -> int:
    """Run the agent; installs the first version if there is none."""
    install.wait_for_first_version(Device.load(root), progress=_bar())
    return install.exec_launcher(Layout(root), supervise=supervise)


@click.command()
@root_option
@click.option("--detailed-exitcode", is_flag=True, help="Wait for the trial: 10 updated, 11 rolled back.")
def once(root: Path, detailed_exitcode: bool) -> int:
    """Look for an update now."""
    device = Device.load(root)
    outcome = poll.check(device, progress=_bar())
    activated = bool(outcome.candidate) and _activate(device, outcome)
    console.emit(outcome.to_json(), text=_sentence(outcome))
    if outcome.failed:
        return _exit_of(outcome)
    if not (detailed_exitcode and outcome.candidate):
        return Exit.DONE
    if not activated:
        raise RelfleetError(
            f"{outcome.version} is staged, and no agent runs to try it", then="start the agent"
        )
    return _await_trial(device, outcome)


def _activate(device: Device, outcome: Outcome) -> bool:
    """Put the staged version on trial; True when a running agent does it now."""
    if slots.read(device.layout.root) is None:
        install.activate_first(device, outcome)
        poll.tell(device)
        return False
    if control.wake(device.layout):
        return True
    with control.alone(device.layout) as is_alone:
        if is_alone:
            slots.begin_trial(
                device.layout.root,
                outcome.candidate,
                outcome.boots,
                outcome.deadman_s,
                retry_epoch=outcome.retry_epoch,
                floor=outcome.floor,
            )
    return not is_alone


def _await_trial(device: Device, outcome: Outcome) -> int:
    deadline = time.monotonic() + (console.options().timeout_s or 900.0)
    digest = slots.digest_of(outcome.candidate)
    while time.monotonic() < deadline:
        record = slots.read(device.layout.root)
        if record and record.phase == slots.IDLE:
            if record.good == outcome.candidate:
                console.say(f"{outcome.version} is healthy")
                return Exit.UPDATED
            if slots.skips(record, digest, outcome.retry_epoch):
                console.warn(f"{outcome.version} was rolled back: {record.reason}")
                return Exit.ROLLED_BACK
        time.sleep(0.2)
    raise UnreachableError(
        f"the trial of {outcome.version} is not over yet", then="agent status", reason="timeout"
    )


def _exit_of(outcome: Outcome) -> int:
    trust = {"bad-signature", "expired", "replayed", "bad-metadata", "bad-delegation", "bad-directive"}
    trust |= {"digest-mismatch", "length-mismatch", "bad-archive", "bad-index", "bad-answer"}
    if outcome.reason in trust:
        return Exit.TRUST
    return Exit.UNREACHABLE if outcome.reason in ("offline", "overloaded") else Exit.FAILED


def _sentence(outcome: Outcome) -> str:
    """One line that says what a check came to."""
    if outcome.candidate:
        return f"{outcome.version} is verified and staged ({outcome.reason})"
    word = {Action.STAY: "nothing to do", Action.REFUSE: "refused", Action.INSTALL: "to be installed"}
    verb = "failed" if outcome.failed and not outcome.verified else word[outcome.action]
    return f"{verb} ({outcome.reason}): {outcome.detail}".rstrip(": ")


# --- looking --------------------------------------------------------------------------------------------


@click.command()
@root_option
def status(root: Path) -> None:
    """What runs, what is on trial, how the last check went."""
    device = Device.load(root)
    console.emit(_status(device), text=lambda: console.facts(_status_lines(device)))


def _status(device: Device) -> dict[str, Any]:
    record = slots.read(device.layout.root)
    news = control.read_status(device.layout)
    outcome, hold = device.outcome(), device.hold()
    return {
        "agent_id": device.identity.agent_id,
        "product": device.identity.product,
        "cohort": device.identity.cohort,
        "server": device.server,
        "running": bool(news) and control.is_running(device.layout),
        "good": record.good if record else None,
        "previous": record.previous if record else None,
        "candidate": (record.candidate or None) if record else None,
        "phase": record.phase if record else None,
        "boots_left": record.boots_left if record else None,
        "reason": record.reason if record else None,
        "skipped": [{"digest": entry[0], "reason": entry[1]} for entry in record.skip] if record else [],
        "hold": {"until": hold.until and clock.iso(hold.until), "reason": hold.reason} if hold else None,
        "last_check": outcome.to_json() if outcome else None,
        "news": news,
    }


def _status_lines(device: Device) -> list[tuple[str, Any]]:
    found = _status(device)
    outcome, news = device.outcome(), found["news"]
    lines: list[tuple[str, Any]] = [
        ("agent", f"{found['agent_id']}, cohort {found['cohort'] or '(none)'}, {found['server']}"),
        ("runs", f"{found['good'] or 'nothing yet'}{'' if found['running'] else '  (the agent is stopped)'}"),
    ]
    if found["candidate"]:
        lines.append(("on trial", f"{found['candidate']}, {found['boots_left']} boots left"))
    if found["previous"] and found["previous"] != found["good"]:
        lines.append(("before", found["previous"]))
    lines += [("skipped", f"{entry['digest']}  {entry['reason']}") for entry in found["skipped"]]
    if found["hold"]:
        lines.append(("held", f"{found['hold']['reason']} (until {found['hold']['until'] or 'unhold'})"))
    lines.append(("last check", f"{outcome.at}  {_sentence(outcome)}" if outcome else "never"))
    lines += [(key, news[key]) for key in ("trial", "settings") if news.get(key)]
    return lines


@click.command()
@root_option
def why(root: Path) -> None:
    """Why this host does, or does not, update."""
    device = Device.load(root)
    chain = _chain(device)
    record = slots.read(device.layout.root)
    running = slots.version_of(record.good) if record else "nothing yet"
    summary = f"{device.identity.agent_id} runs {running}"
    rows = "\n".join(f"  {'ok' if link['ok'] else 'no'}  {link['text']}" for link in chain)
    console.emit({"summary": summary, "chain": chain}, text=f"{summary}\n{rows}")


def _chain(device: Device) -> list[dict[str, Any]]:
    """What had to be so for an update, in order; the last link is the decision."""
    outcome, hold = device.outcome(), device.hold()
    links = [(device.identity.cohort is not None, "cohort", f"cohort {device.identity.cohort or 'none'}")]
    if outcome is None:
        return [_link(*link) for link in [*links, (False, "unchecked", "no check was done yet: agent once")]]
    links.append((outcome.verified, "verified", f"manifest checked at {outcome.at}"))
    if hold:
        links.append((not hold.holds(clock.now()), "held", f"hold: {hold.reason}"))
    moves = outcome.action is Action.INSTALL or outcome.reason == "up-to-date"
    links.append((moves, outcome.reason, _sentence(outcome)))
    return [_link(*link) for link in links]


def _link(ok: bool, code: str, text: str) -> dict[str, Any]:
    return {"ok": ok, "code": code, "text": text}


@click.command()
@root_option
def versions(root: Path) -> None:
    """Versions on this host."""
    layout = Layout(root)
    record = slots.read(root)
    found = []
    for directory in sorted(layout.versions.iterdir()) if layout.versions.is_dir() else []:
        name = directory.name
        found.append(
            {
                "version": slots.version_of(name),
                "digest": slots.digest_of(name),
                "role": _role(record, name),
                "whole": slots.is_complete(root, name),
            }
        )
    console.emit(found, text=lambda: console.as_text(found) if found else "no version is installed")


def _role(record: slots.Record | None, name: str) -> str:
    if record is None:
        return ""
    roles = {record.candidate: "on trial", record.previous: "before", record.good: "good"}
    return roles.get(name, "skipped" if slots.skips(record, slots.digest_of(name)) else "")


# --- steering -------------------------------------------------------------------------------------------


@click.command()
@root_option
@click.option("--to", "version", metavar="VERSION", help="Must be the version before; said for certainty.")
def rollback(root: Path, version: str | None) -> None:
    """Go back to the version before; the one left is not installed again until `agent retry`."""
    device = Device.load(root)
    record = slots.read(root)
    if record is None:
        raise NotFoundError("there is no version to go back to", why="nothing is installed")
    target = record.good if record.phase == slots.TRIAL else record.previous
    if version and version not in (target, slots.version_of(target)):
        raise NotFoundError(f"cannot go back to {version}", why=f"the version before is {target}")
    leaves = record.candidate or record.good
    if leaves == target:
        raise NotFoundError("there is no version before this one", then="agent versions")
    console.confirm(f"This host leaves {leaves} for {target}.")
    after = _ask(device, control.Request(control.ROLLBACK), lambda now: now.good == target)
    console.emit(
        {"good": after.good, "left": leaves}, text=f"{after.good} is good again; {leaves} is skipped"
    )


@click.command()
@root_option
def retry(root: Path) -> None:
    """Let bundles that failed here be tried once more."""
    device = Device.load(root)
    after = _ask(device, control.Request(control.RETRY), lambda now: not now.skip)
    console.emit({"good": after.good, "skipped": []}, text="nothing is skipped any more")


def _ask(device: Device, request: control.Request, done: Callable[[slots.Record], bool]) -> slots.Record:
    """Have the request carried out: here where no agent runs, else by the agent."""
    with control.alone(device.layout) as is_alone:
        if is_alone:
            try:
                return control.carry_out(device, request)
            except slots.IllegalTransitionError as error:
                raise ConflictError(f"cannot {request.verb}", why=str(error), reason=error.reason) from error
    control.leave_request(device.layout, request)
    control.wake(device.layout)
    deadline = time.monotonic() + (console.options().timeout_s or 30.0)
    while time.monotonic() < deadline:
        record = slots.read(device.layout.root)
        if record is not None and done(record) and control.read_request(device.layout) is None:
            return record
        time.sleep(0.05)
    raise UnreachableError(
        "the running agent did not answer yet",
        why="the request is kept and will be carried out when it looks",
        then="agent status",
        reason="timeout",
    )


@click.command()
@root_option
@click.option("--until", metavar="TIME", help="2h, 3d, or 2026-01-31T12:00:00Z; without it until `unhold`.")
@click.option("--reason", default="", help="For whoever finds this host held.")
def hold(root: Path, until: str | None, reason: str) -> None:
    """Take nothing new. A rollback still works."""
    device = Device.load(root)
    moment = _moment(until) if until else None
    device.set_hold(Hold(moment, reason or f"by {os.environ.get('USER', 'an operator')}"))
    control.wake(device.layout)
    shown = clock.iso(moment) if moment else "agent unhold"
    console.emit({"held": True, "until": moment and clock.iso(moment)}, text=f"held until {shown}")


def _moment(text: str) -> datetime:
    try:
        return clock.now() + timedelta(seconds=console.duration_s(text))
    except ValueError:
        pass
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"{text!r} is no time", why="it is neither a duration nor a date", then="--until 2h"
        ) from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


@click.command()
@root_option
def unhold(root: Path) -> None:
    """End a hold."""
    device = Device.load(root)
    device.layout.hold.unlink(missing_ok=True)
    control.wake(device.layout)
    console.emit({"held": False}, text="not held")


# --- settings -------------------------------------------------------------------------------------------


@click.group()
def config() -> None:
    """Check or show the settings of this host."""


@config.command("show")
@root_option
def config_show(root: Path) -> None:
    """Each setting, its value and where it came from."""
    settings = load_agent(Layout(root)).settings
    rows = [{"setting": name, "value": value, "from": origin} for name, value, origin in settings.show()]
    console.emit(rows)


@config.command("check")
@root_option
def config_check(root: Path) -> None:
    """Say whether the settings can be used."""
    load_agent(Layout(root))
    console.emit({"ok": True}, text=f"the settings of {root} can be used ({len(list(AGENT))} known)")
