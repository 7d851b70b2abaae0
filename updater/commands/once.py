"""The command that looks for an update now, and can wait for what comes of it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from agent_core import console, slots
from agent_core.errors import Exit, RelfleetError, UnreachableError
from updater import activation, control, poll
from updater.commands.common import exit_of, own_root_option, sentence
from updater.decide import Action
from updater.device import Device, Outcome

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@own_root_option
@click.option("--detailed-exitcode", is_flag=True, help="Wait for the trial: 10 updated, 11 rolled back.")
def once(root: Path, detailed_exitcode: bool) -> int:
    """Look for an update now."""
    device = Device.load(root)
    outcome = poll.check(device, progress=console.progress_line("download"))
    activated = bool(outcome.candidate) and _activate(device, outcome)
    console.emit(outcome.to_json(), text=sentence(outcome))
    if outcome.action is Action.REFUSE:
        return exit_of(outcome.reason)
    if not (detailed_exitcode and outcome.candidate):
        return Exit.DONE
    if not activated:
        raise RelfleetError(
            f"{outcome.version} is staged, and no agent runs to try it", then="start the agent"
        )
    return await_trial(device, outcome)


def _activate(device: Device, outcome: Outcome) -> bool:
    """Put the staged version on trial; True when a running agent does it now."""
    if slots.read(device.layout.root) is None:
        activation.activate_first(device, outcome)
        poll.tell(device)
        return False
    if control.wake(device.layout):
        return True
    with control.alone(device.layout) as is_alone:
        if is_alone:
            activation.activate(device, outcome)
    return not is_alone


def await_trial(device: Device, outcome: Outcome) -> int:
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
