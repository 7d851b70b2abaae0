"""Commands by which a person on the host decides: hold, go back, try again."""

from __future__ import annotations

import os
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from agent_core import clock, console, disk, slots
from agent_core.errors import ConflictError, NotFoundError, UnreachableError, UsageError
from updater import control
from updater.commands.common import root_option
from updater.decide import Hold
from updater.device import Device

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


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
    disk.remove(device.layout.hold)
    control.wake(device.layout)
    console.emit({"held": False}, text="not held")
