"""The command that installs a release from a file, where the server is out of reach."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import click

from agent_core import console, disk, release_file, slots
from agent_core.errors import ConflictError, Exit, NotFoundError, RelfleetError, TrustError
from agent_core.wire import Reason
from updater import activation, control, poll, stage
from updater.commands.common import ask, own_root_option, sentence
from updater.commands.once import await_trial
from updater.device import Device, Outcome

MENDED_BY = {
    Reason.HELD: "agent unhold",
    Reason.STOP_FILE: "whoever stopped updates takes the file away",
    Reason.SKIPPED: "agent retry",
    Reason.IN_TRIAL: "wait for its end (agent status), or agent rollback",
    Reason.OLDER: "agent install --older FILE",
    Reason.STEPPING_STONE: "install a release in between first",
    Reason.OLD_LAUNCHER: "agent upgrade-launcher",
}
"""Refusals that something on this host can mend, and what."""


@click.command("install")
@own_root_option
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--older", is_flag=True, help="Take it also when it is older than the version that runs.")
@click.option("--wait", is_flag=True, help="Stay until its trial is over: 0 kept, 11 rolled back.")
def install_file(root: Path, file: Path, older: bool, wait: bool) -> int:
    """Install the release in FILE, which `release export` made; asks no server.

    The release keys decide as ever: signatures, expiry, floor, revocations, gate and platform are checked,
    and so are hold and skips. The version goes on trial, and back if it fails.
    """
    device = Device.load(root)
    with ExitStack() as held:

        def hold(name: str) -> None:  # so that no check that ends meanwhile clears it away
            held.callback(disk.close, stage.hold(device.layout.version_dir(name)))

        with release_file.opened(file) as opened:
            progress = console.progress_line("read")
            outcome = poll.check_file(device, opened, older=older, progress=progress, staged=hold)
        if not outcome.candidate:
            return _say_refused(outcome)
        words = _activate(device, outcome)
    console.emit(outcome.to_json(), text=f"{outcome.version} {words}")
    if not wait or words != ON_TRIAL:
        return Exit.DONE
    ended = await_trial(device, outcome)
    return Exit.DONE if ended == Exit.UPDATED else ended


def _say_refused(outcome: Outcome) -> int:
    if outcome.reason != Reason.UP_TO_DATE:
        raise _refusal(outcome)
    console.emit(outcome.to_json(), text=sentence(outcome))
    return Exit.DONE


ON_TRIAL = "is on trial now"


def _activate(device: Device, outcome: Outcome) -> str:
    """Have the staged version tried, or make it the first; what became of it, in words."""
    if slots.read(device.layout.root) is None:
        activation.activate_first(device, outcome)
        return "is installed; agent run starts it"
    ask(device, control.Request(control.ACTIVATE, outcome.candidate), lambda now: _is_taken(outcome, now))
    with control.alone(device.layout) as is_alone:
        return "goes on trial when the agent is started" if is_alone else ON_TRIAL


def _is_taken(outcome: Outcome, record: slots.Record) -> bool:
    """On trial, or through it already: one that ends at once is back before anybody looks."""
    if outcome.candidate in (record.candidate, record.good):
        return True
    return slots.skips(record, slots.digest_of(outcome.candidate), outcome.retry_epoch)


def _refusal(outcome: Outcome) -> RelfleetError:
    what = f"{outcome.version or 'the release'} is not installed"
    reason = Reason(outcome.reason)
    if reason in MENDED_BY:
        return ConflictError(what, why=outcome.detail, then=MENDED_BY[reason], reason=reason)
    if reason is Reason.NO_BUNDLE:
        return NotFoundError(what, why=outcome.detail, reason=reason)
    then = "ask who made the file for another release"
    if reason in (Reason.PREFLIGHT, Reason.PREFLIGHT_VERSION, Reason.PRE_ACTIVATE):
        return RelfleetError(what, why=outcome.detail, then=then, reason=reason)
    return TrustError(what, why=outcome.detail, then=then, reason=reason)
