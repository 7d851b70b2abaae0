"""Commands by which a person on the host decides: hold, go back, try again."""

from __future__ import annotations

import os
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import click

from agent_core import clock, console, disk, slots
from agent_core.errors import ConflictError, NotFoundError, TrustError, UsageError
from agent_core.wire import Reason
from updater import control, known
from updater.commands.common import ask, own_root_option, unreadable
from updater.decide import Hold
from updater.device import Device

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@own_root_option
@click.option(
    "--to", "version", metavar="VERSION", help="Not the version before, but this one; see `versions`."
)
def rollback(root: Path, version: str | None) -> None:
    """Go back to the version before; the one left is not installed again until `agent retry`.

    With --to, any version that is whole on this host, did not fail here, and is allowed by the release keys.
    In a trial it goes back to the good version.
    """
    device = Device.load_anyway(root)
    record = slots.read(root)
    if record is None:
        raise NotFoundError(
            "there is no version to go back to", why="nothing is installed", then="agent once"
        )
    target = _target(device, record, version)
    leaves = record.candidate or record.good
    if leaves == target:
        raise NotFoundError(
            f"this host runs {target} already", why="there is none to leave", then="agent versions"
        )
    if target != record.good:
        _check_allowed(device, record, target)
    console.confirm(f"This host leaves {leaves} for {target}.")
    after = ask(device, control.Request(control.ROLLBACK, target), lambda now: now.good == target)
    console.emit(
        {"good": after.good, "left": leaves},
        text=f"{after.good} is good again; {leaves} is skipped until: agent retry",
    )


def _target(device: Device, record: slots.Record, version: str | None) -> str:
    """The directory of the version to go back to; its digest need not be given where it is the only one."""
    if version is None:
        target = record.good if record.phase != slots.IDLE else record.previous
        if target in ("", record.candidate or record.good):
            raise NotFoundError(
                "there is no version before this one", then="agent versions; agent rollback --to"
            )
        if record.phase != slots.IDLE:
            return target  # a trial is ended whatever the disk says
        version = target
    faults = {
        name: _fault(device, name) for name in _names(device) if version in (name, slots.version_of(name))
    }
    whole = [name for name, fault in faults.items() if not fault]
    if len(whole) == 1:
        return whole[0]
    if whole:
        raise UsageError(
            f"{version} is here more than once", why=", ".join(whole), then="give one of these names"
        )
    if unseen := {name: fault for name, fault in faults.items() if isinstance(fault, OSError)}:
        name, error = next(iter(unseen.items()))
        why = f"its files cannot be read: {error.strerror}"
        raise unreadable(f"cannot go back to {name}", why) from error
    if not faults:
        why, then = "it is not on this host", "agent versions lists what is"
    else:
        why = f"it is here, and not whole: {'; '.join(map(str, faults.values()))}"
        then = "agent install FILE brings it anew, or agent rollback --to another; see agent versions"
    raise NotFoundError(f"cannot go back to {version}", why=why, then=then)


def _fault(device: Device, name: str) -> str | OSError:
    """What is wrong with a version, each of its files hashed: what runs now is not left for a half of one.

    That the disk does not say is one fault too: another version of that number may be whole.
    """
    from updater import wholeness  # it knows indexes, which no help needs

    try:
        if not slots.looks_complete(device.layout.root, name):
            return "a part of it is missing"
        return wholeness.fault(device.layout.version_dir(name))
    except OSError as error:
        return error


def _names(device: Device) -> list[str]:
    directory = device.layout.versions
    return sorted(disk.listdir(directory)) if disk.exists(directory) else []


def _check_allowed(device: Device, record: slots.Record, name: str) -> None:
    """Refuse what failed here, or what the release keys forbid as far as this host knows."""
    if slots.skips(record, slots.digest_of(name)):
        raise ConflictError(
            f"{name} failed here before", then="agent retry, then again", reason=Reason.SKIPPED
        )
    policy, facts = known.policy(device.layout, device.identity.product), device.facts(name)
    floor = max(policy.floor_seq, record.floor)
    if facts is None and (floor or policy.revoked_seq):
        raise TrustError(
            f"{name} may be forbidden",
            why="its signed facts were not kept, so it cannot be held against the floor and the revocations",
            then="agent install FILE, with a release file of that version",
            reason=Reason.BAD_METADATA,
        )
    if facts is not None and facts.seq < floor:
        why = f"it has seq {facts.seq}, the floor is {floor}"
        raise TrustError(f"{name} is below the floor", why=why, reason=Reason.BELOW_FLOOR)
    if facts is not None and facts.seq in policy.revoked_seq:
        why = f"the release keys revoked seq {facts.seq}"
        raise TrustError(
            f"{name} is revoked", why=why, then="agent versions lists others", reason=Reason.REVOKED
        )


@click.command()
@own_root_option
def retry(root: Path) -> None:
    """Let bundles that failed here be tried once more."""
    device = Device.load_anyway(root)
    after = ask(device, control.Request(control.RETRY), lambda now: not now.skip)
    console.emit({"good": after.good, "skipped": []}, text="nothing is skipped any more")


@click.command()
@own_root_option
@click.option("--until", metavar="TIME", help="2h, 3d, or 2026-01-31T12:00:00Z; without it until `unhold`.")
@click.option("--reason", default="", help="For whoever finds this host held.")
def hold(root: Path, until: str | None, reason: str) -> None:
    """Take nothing new. A rollback still works."""
    device = Device.load_anyway(root)
    moment = _moment(until) if until is not None else None
    reason = reason or f"by {os.environ.get('USER', 'an operator')}"
    device.set_hold(Hold(moment, reason))
    control.wake(device.layout)
    shown = clock.iso(moment) if moment else "agent unhold"
    said = {"held": True, "until": moment and clock.iso(moment), "reason": reason}
    console.emit(said, text=f"held until {shown}")


def _moment(text: str) -> datetime:
    """A moment to come: a duration from now, or a date with its zone; nobody guesses whose noon is meant."""
    if text.strip().isdecimal():
        why = "seconds, hours, or a date as 20261231 is"
        raise UsageError(
            f"{text!r} may mean anything", why=why, then="--until 2h, or --until 2026-12-31T12:00:00Z"
        )
    moment = _read_moment(text)
    if moment <= clock.now():
        raise UsageError(f"{text} is past", why=f"it is {clock.iso(clock.now())} here", then="--until 2h")
    return moment


def _read_moment(text: str) -> datetime:
    with suppress(ValueError, OverflowError):
        return clock.now() + timedelta(seconds=console.duration_s(text))
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is not None:
            return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise UsageError(
            f"{text!r} is no time", why="it is neither a duration nor a date", then="--until 2h"
        ) from None
    whole = moment.isoformat()  # a date alone is its midnight, and takes a zone only when that is written out
    raise UsageError(f"{text!r} has no time zone", then=f"--until {whole}Z for UTC, or {whole}+01:00")


@click.command()
@own_root_option
def unhold(root: Path) -> None:
    """End a hold."""
    device = Device.load_anyway(root)
    disk.remove(device.layout.hold)
    control.wake(device.layout)
    console.emit({"held": False}, text="not held")
