"""Puts a staged version on trial, or makes it the first; the note of its attempt and the record go together.

A check by hand may run beside the resident agent's own. What it says of an attempt is true of the record that
it decided by; a trial begun meanwhile has a story of its own, and a trial without its note would have none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_core import disk, slots
from agent_core.bundle import INDEX_NAME, Index
from agent_core.errors import ConflictError
from agent_core.spool import Spool
from agent_core.wire import AttemptState
from updater import attempt as attempts
from updater import report
from updater.attempt import Attempt
from updater.offline import SALT

if TYPE_CHECKING:
    from updater.device import Device, Outcome


def activate(device: Device, outcome: Outcome) -> slots.Record:
    """Put on trial what a check of the server's word staged, unless a later check has let go of it.

    Raises:
        ConflictError: the attempt has ended; the later check says what is wanted now.
        slots.IllegalTransitionError, OSError: as of `slots.begin_trial`.
    """
    with attempts.alone(device.layout):
        attempt = attempts.load(device.attempt_file)
        if attempt is None or attempt.name != outcome.candidate or attempt.has_ended:
            raise ConflictError(
                f"{outcome.candidate} is not put on trial",
                why="a later check has ended its attempt",
                then="agent once",
            )
        return slots.begin_trial(
            device.layout.root,
            outcome.candidate,
            outcome.boots,
            outcome.deadman_s,
            retry_epoch=outcome.retry_epoch,
            floor=outcome.floor,
        )


def activate_by_hand(device: Device, name: str, retry_epoch: int) -> slots.Record:
    """Put on trial what a person brought in a file, whatever a check of the server's word has said since.

    Whether it may be is asked before its note takes the place of another's: the note of a trial that runs is
    what the server hears of that trial by. The note comes before the trial, which would have none if cut off.

    Raises:
        slots.IllegalTransitionError, OSError: as of `slots.begin_trial`, or the version cannot be read.
        RelfleetError: it is none, or its attempt could not be noted.
    """
    index = Index.from_bytes(disk.read_file(device.layout.version_dir(name) / INDEX_NAME))
    root = device.layout.root
    with attempts.alone(device.layout):
        record = slots.recover(root) or slots.Record()
        if record.phase != slots.TRIAL or record.candidate != name:
            slots.armed(record, name, index.boots, index.deadman_s, retry_epoch)
        _note_by_hand(device, record, name, retry_epoch)
        return slots.begin_trial(root, name, index.boots, index.deadman_s, retry_epoch=retry_epoch)


def _note_by_hand(device: Device, record: slots.Record, name: str, retry_epoch: int) -> None:
    """Note the attempt of a person, unless it is the one noted; what came of another one is told first."""
    before = attempts.load(device.attempt_file)
    if before is not None and before.name == name and not before.has_ended:
        return
    version, digest = slots.version_of(name), slots.digest_of(name)
    told = Attempt(version, digest, SALT, AttemptState.STAGED, retry_epoch=retry_epoch)
    ended = attempts.settled(before, record)
    with Spool(device.layout.spool) as spool:
        if ended is not None:
            report.record_transition(device, spool, ended)
        report.record_transition(device, spool, told)


def activate_first(device: Device, outcome: Outcome) -> None:
    """The first version ever is good without a trial: there is nothing to go back to."""
    with attempts.alone(device.layout):
        record = slots.install_first(device.layout.root, outcome.candidate)
        if outcome.floor:
            record = slots.raise_floor(device.layout.root, outcome.floor)
        attempt = attempts.settled(attempts.load(device.attempt_file), record)
        if attempt is not None and attempt.state is AttemptState.HEALTHY:
            with Spool(device.layout.spool) as spool:
                report.record_transition(device, spool, attempt)
