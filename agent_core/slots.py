"""This module keeps the device's record of what is good and on trial, and makes the two links follow it.

The record says what is good, the link follows: every change of mind is first written to `state/slots`, then
shown by `current` and `previous`. Whatever is cut short in between, `recover` finishes. The launcher imports
this file and runs on the host's own Python, so it needs the standard library and `disk` only, Python 3.9 or
newer.

| from    | function        | durable steps, in order                                         | to    |
|---------|-----------------|-----------------------------------------------------------------|-------|
| nothing | `install_first` | record idle{good} → links                                       | idle  |
| idle    | `begin_trial`   | record trial{good A, candidate B, boots_left N} → links B, A    | trial |
| trial   | `boot`          | links B, A → record boots_left - 1                              | trial |
| trial   | `refund`        | record boots_left + 1 (bounded)                                 | trial |
| trial   | `recover`       | the host itself went down: record boots_left + 1 (bounded)      | trial |
| trial   | `commit`        | record idle{good B, previous A} → links B, A                    | idle  |
| trial   | `roll_back`     | record rollback{reason} → links A, P → record idle{skip + B}    | idle  |
| idle    | `go_back`       | record idle{good P, previous A, skip + A} → links P, A (*)      | idle  |
| idle    | `refuse`        | record idle{skip + B}                                           | idle  |
| any     | `recover`       | whatever the record says is unfinished                          | same  |

(*) P is the version before, or one that a person named; nothing but a person ever goes to a third version.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import struct
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Tuple

from agent_core import disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Union

    Root = Union[str, os.PathLike[str]]

IDLE, TRIAL, ROLLBACK = "idle", "trial", "rollback"
CURRENT, PREVIOUS = "current", "previous"
SLOT_LENGTH = 4096
SLOTS_LENGTH = 2 * SLOT_LENGTH
SKIPS_MOST = 32
"""How many failed bundles are remembered; the oldest is forgotten first, so that a record always fits."""
REFUNDS_MOST = 16
"""How many clean stops give a trial its boot back: what is stopped for ever must not be tried for ever."""
REBOOTS_MOST = 8
"""How many times a host that went down gives the boot back: it may be the candidate that takes it down."""

# Reasons, as `agent_core.wire.Reason` spells them; this file may not import it.
OBSERVED, OPERATOR, DISK = "observed", "operator", "disk"
UNREADABLE = "unreadable"
"""Of a refusal: the disk does not say whether a version is whole."""

_MAGIC = b"RFSLOT1\n"
_HEAD = struct.Struct(">8sI32s")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,79}")
_CODE_LENGTH = 64
_LOCK_WAIT_S = 5.0
_LOCK_FLAGS = os.O_RDONLY | os.O_CREAT | os.O_NONBLOCK
_NO_FILE = frozenset({errno.ENOENT, errno.EISDIR, errno.ESPIPE, errno.ENXIO, errno.ELOOP})
"""What a name answers that is missing, a directory, a pipe, a socket, or a link in a circle. No failing disk
does so: what cannot be read now may hold a record, and is not passed over."""

Skip = Tuple[str, str, int]
"""A bundle that failed here: the first 12 hex of its digest, why, and the retry epoch it failed in."""


class IllegalTransitionError(Exception):
    """The record's phase does not allow this step; nothing was changed. `reason` is the stable code."""

    def __init__(self, what: str, reason: str) -> None:
        super().__init__(what)
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """What this device believes about its versions.

    Attributes:
        seq: counts writes; the valid slot with the higher one is the record.
        phase: `idle`, `trial` or `rollback`.
        good: the version that runs when in doubt; versions are named `VERSION-DIGEST12`.
        previous: the good version before it (the same one when there was none).
        candidate: the version on trial or being rolled back, else empty.
        boots_left: how often the candidate may still be started.
        boots_max: how often it might be at first.
        deadman_s: seconds until the kernel kills a candidate that does not postpone it.
        retry_epoch: the directive's at the time of the trial; a skip lasts until it grows.
        boot_id: the host's boot in which the candidate was last started.
        is_up: a boot was counted and not given back since.
        refunds: boots given back during this trial after clean stops.
        reboots: boots given back during this trial because the host went down with the candidate.
        tried: the version the last trial, commit, rollback or operator's rollback was about.
        reason: how that ended.
        skip: bundles that failed here, oldest first.
        floor: the highest floor seen; it only grows.
    """

    seq: int = 0
    phase: str = IDLE
    good: str = ""
    previous: str = ""
    candidate: str = ""
    boots_left: int = 0
    boots_max: int = 0
    deadman_s: int = 0
    retry_epoch: int = 0
    boot_id: str = ""
    is_up: bool = False
    refunds: int = 0
    reboots: int = 0
    tried: str = ""
    reason: str = ""
    skip: tuple[Skip, ...] = ()
    floor: int = 0


def digest_of(name: str) -> str:
    """The DIGEST12 in `VERSION-DIGEST12`."""
    return name.rpartition("-")[2]


def version_of(name: str) -> str:
    """The VERSION in `VERSION-DIGEST12`."""
    return name.rpartition("-")[0]


# --- The table, pure ------------------------------------------------------------------------------


def skips(record: Record, digest: str, retry_epoch: int = 0) -> bool:
    """Whether this bundle failed here and nobody has asked for another try since.

    Args:
        record: the device's.
        digest: of the bundle; its first 12 hex digits count.
        retry_epoch: the directive's; a higher one than that of the failure allows one more try.
    """
    return any(entry[0] == digest[:12] and entry[2] >= retry_epoch for entry in record.skip)


def kept(record: Record) -> frozenset[str]:
    """The versions that must not be collected."""
    return frozenset({record.good, record.previous, record.candidate} - {""})


def first(record: Record | None, name: str) -> Record:
    """The first version ever is good without a trial: there is nothing to go back to."""
    if record is not None and record.good:
        raise IllegalTransitionError(f"{record.good} is installed already", "conflict")
    return replace(
        record or Record(), phase=IDLE, good=_named(name), previous=name, tried=name, reason="first-install"
    )


def armed(record: Record, candidate: str, boots: int, deadman_s: int, retry_epoch: int = 0) -> Record:
    """From idle to trial.

    Args:
        record: idle, with a good version.
        candidate: the staged version to try.
        boots: how often it may be started, at least 1.
        deadman_s: seconds until it is killed unless it postpones that itself, at least 1.
        retry_epoch: the directive's.

    Raises:
        IllegalTransitionError: `in-trial`, `up-to-date`, `skipped`, `malformed`, `bad-settings`, `no-record`.
    """
    _need(record, IDLE, "in-trial")
    if not record.good:
        raise IllegalTransitionError("there is no good version to go back to", "no-record")
    if _named(candidate) == record.good:
        raise IllegalTransitionError(f"{candidate} is the good version already", "up-to-date")
    if skips(record, digest_of(candidate), retry_epoch):
        raise IllegalTransitionError(f"{candidate} failed here before", "skipped")
    if boots < 1 or deadman_s < 1:
        raise IllegalTransitionError(f"a trial of {boots} boots and {deadman_s} s is none", "bad-settings")
    return replace(
        record,
        phase=TRIAL,
        candidate=candidate,
        boots_left=boots,
        boots_max=boots,
        deadman_s=deadman_s,
        retry_epoch=retry_epoch,
        boot_id="",
        is_up=False,
        refunds=0,
        reboots=0,
        tried=candidate,
        reason="",
    )


def booted(record: Record, boot_id: str) -> Record:
    """From trial to trial: one start of the candidate is counted before it happens."""
    _need(record, TRIAL, "not-on-trial")
    if record.boots_left < 1:
        raise IllegalTransitionError(f"{record.candidate} has no boot left", "boots-used-up")
    return replace(record, boots_left=record.boots_left - 1, boot_id=boot_id[:64], is_up=True)


def refunded(record: Record) -> Record:
    """From trial to trial: a clean stop gives the boot back, once a boot and `REFUNDS_MOST` times a trial."""
    _need(record, TRIAL, "not-on-trial")
    if not record.is_up or record.refunds >= REFUNDS_MOST:
        return record
    left = min(record.boots_left + 1, record.boots_max)
    return replace(record, boots_left=left, is_up=False, refunds=record.refunds + 1)


def rebooted(record: Record, boot_id: str) -> Record:
    """On trial, and the host went down under the candidate: the boot back, `REBOOTS_MOST` times a trial.

    A power cut is no fault of the version that ran; but a version that takes its host down must not be tried
    for ever either. A host that does not say which boot this is has not gone down.
    """
    went_down = record.is_up and boot_id and record.boot_id not in ("", boot_id[:64])
    if record.phase != TRIAL or not went_down or record.reboots >= REBOOTS_MOST:
        return record
    left = min(record.boots_left + 1, record.boots_max)
    return replace(record, boots_left=left, is_up=False, reboots=record.reboots + 1)


def committed(record: Record) -> Record:
    """From trial to idle: the candidate is good, and the version it replaces is what to go back to."""
    _need(record, TRIAL, "not-on-trial")
    digest = digest_of(record.candidate)
    skip = tuple(entry for entry in record.skip if entry[0] != digest)
    done = replace(record, good=record.candidate, previous=record.good, reason=OBSERVED, skip=skip)
    return _rested(done)


def rolling_back(record: Record, reason: str) -> Record:
    """From trial to rollback: from here on the candidate is never started again."""
    _need(record, TRIAL, "not-on-trial")
    return replace(record, phase=ROLLBACK, reason=_code(reason))


def rolled_back(record: Record, reason: str = "") -> Record:
    """From rollback to idle: the good version runs on, and the candidate is skipped by its digest."""
    _need(record, ROLLBACK, "not-rolling-back")
    reason = _code(reason or record.reason)
    skip = _with_skip(record, record.candidate, reason, record.retry_epoch)
    return _rested(replace(record, reason=reason, skip=skip))


def gone_back(record: Record, retry_epoch: int = 0, to: str = "") -> Record:
    """From idle to idle: the operator prefers the version before, or one by name; the one left is skipped."""
    _need(record, IDLE, "in-trial")
    to = _named(to) if to else record.previous
    if to in ("", record.good):
        raise IllegalTransitionError("there is no previous version to go back to", "not-found")
    if any(entry[0] == digest_of(to) for entry in record.skip):
        raise IllegalTransitionError(f"{to} failed here before", "skipped")
    skip = _with_skip(record, record.good, OPERATOR, retry_epoch)
    swapped = replace(record, good=to, previous=record.good, tried=record.good)
    return replace(swapped, reason=OPERATOR, skip=skip)


def refused(record: Record, name: str, reason: str, retry_epoch: int = 0) -> Record:
    """From idle to idle: a version that does not even start is skipped like one that failed its trial."""
    _need(record, IDLE, "in-trial")
    return replace(record, skip=_with_skip(record, _named(name), _code(reason), retry_epoch))


def unskipped(record: Record, digest: str = "") -> Record:
    """Forget that one bundle failed here, or, without a digest, that any did."""
    return replace(record, skip=tuple(entry for entry in record.skip if digest and entry[0] != digest[:12]))


def healed(record: Record, complete: frozenset[str]) -> Record:
    """idle, and the good version is damaged: the previous one is good, if that is whole. Never a third."""
    if record.phase != IDLE or record.good in complete or record.previous not in complete:
        return record
    return replace(record, good=record.previous, tried=record.good, reason=DISK)


def _rested(record: Record) -> Record:
    """Idle again, with nothing of the trial left but how it ended."""
    ended = replace(record, phase=IDLE, candidate="", boots_left=0, boots_max=0, deadman_s=0)
    return replace(ended, is_up=False, refunds=0, reboots=0)


def _need(record: Record, phase: str, reason: str) -> None:
    if record.phase != phase:
        raise IllegalTransitionError(f"the record is in phase {record.phase}, not {phase}", reason)


def _named(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise IllegalTransitionError(f"{name!r} is no name of a version's directory", "malformed")
    return name


def _code(reason: str) -> str:
    """A reason short and plain enough for the record; a rollback must not fail over its own words."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", reason)[:_CODE_LENGTH]


def _with_skip(record: Record, name: str, reason: str, retry_epoch: int) -> tuple[Skip, ...]:
    others = [entry for entry in record.skip if entry[0] != digest_of(name)]
    return (*others, (digest_of(name), reason, retry_epoch))[-SKIPS_MOST:]


# --- The two slots --------------------------------------------------------------------------------


class Slots:
    """The record's two places in `state/slots`: one write fills the older, so the newer is never at risk.

    Args:
        root: the device's directory.
    """

    def __init__(self, root: Root) -> None:
        self.root = os.fspath(root)
        self.path = os.path.join(self.root, "state", "slots")

    def read(self) -> Record | None:
        """The newest valid record, or None when neither slot, or what is no file, holds one.

        Raises:
            OSError: the file is there and cannot be read.
        """
        return max(filter(None, self._both()), key=lambda record: record.seq, default=None)

    def write(self, record: Record) -> Record:
        """Write `record` over the older slot and wait until it is on the disk.

        Returns:
            The record with the number it was written under; old skips were dropped if it did not fit.

        Raises:
            OSError: it is not written; the newest record is the old one.
            IllegalTransitionError: `malformed`, it does not fit a slot; nothing was written.
        """
        seqs = [held.seq if held else 0 for held in self._both()]
        place = 0 if seqs[0] <= seqs[1] else 1
        record = replace(record, seq=max(seqs) + 1)
        block = _encoded(record)
        while block is None and record.skip:
            record = replace(record, skip=record.skip[1:])
            block = _encoded(record)
        if block is None:
            raise IllegalTransitionError("the record does not fit its slot", "malformed")
        _with_room(self.root, lambda: self._put(block, place * SLOT_LENGTH))
        return record

    def _both(self) -> list[Record | None]:
        try:
            handle = disk.open(self.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would never open
            try:
                return [_decoded(disk.pread(handle, SLOT_LENGTH, place * SLOT_LENGTH)) for place in (0, 1)]
            finally:
                disk.close(handle)
        except OSError as error:
            if error.errno in _NO_FILE:
                return [None, None]
            raise

    def _put(self, block: bytes, offset: int) -> None:
        try:
            self._overwrite(block, offset, os.O_RDWR)
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise
            # One that is short is as good as one with two garbage slots.
            self._make_way()
            self._overwrite(block, offset, os.O_RDWR | os.O_CREAT)
            disk.fsync_dir(os.path.dirname(self.path))
            disk.fsync_dir(self.root)

    def _overwrite(self, block: bytes, offset: int, flags: int) -> None:
        handle = disk.open(self.path, flags, 0o600)
        try:
            if disk.pwrite(handle, block, offset) != len(block):
                raise OSError(errno.EIO, "short write", self.path)
            disk.fdatasync(handle)
        finally:
            disk.close(handle)

    def _make_way(self) -> None:
        """Somebody removed the file, or put there what is none."""
        disk.make_dirs(os.path.dirname(self.path), 0o700)
        with suppress(FileNotFoundError):
            disk.rename(self.path, _beside(self.path))


def read(root: Root) -> Record | None:
    """The device's record; None when there is none that is valid."""
    return Slots(root).read()


def _encoded(record: Record) -> bytes | None:
    body = json.dumps({"schema": 1, **asdict(record)}, sort_keys=True, separators=(",", ":")).encode()
    if len(body) > SLOT_LENGTH - _HEAD.size:
        return None
    return (_HEAD.pack(_MAGIC, len(body), hashlib.sha256(body).digest()) + body).ljust(SLOT_LENGTH, b"\0")


def _decoded(block: bytes) -> Record | None:
    """The record in one slot; None for anything torn, foreign or odd. Unknown keys are a newer writer's."""
    if len(block) < _HEAD.size:
        return None
    magic, length, digest = _HEAD.unpack_from(block)
    body = block[_HEAD.size : _HEAD.size + length]
    if magic != _MAGIC or hashlib.sha256(body).digest() != digest:
        return None
    try:
        held = dict(json.loads(body))
        known = {key.name: _typed(key.name, held[key.name]) for key in fields(Record) if key.name in held}
        record = Record(**known)
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    return record if record.phase in (IDLE, TRIAL, ROLLBACK) else None


def _typed(key: str, value: Any) -> Any:
    if key == "skip":
        return tuple((str(digest), str(reason), int(epoch)) for digest, reason, epoch in value)
    if type(value) is not type(getattr(Record, key)):
        raise TypeError(key)
    return value


# --- The two links --------------------------------------------------------------------------------


def link(root: Root, name: str) -> str:
    """The version that `current` or `previous` points to; empty when there is no such link."""
    try:
        return os.path.basename(disk.readlink(os.path.join(root, name)))
    except OSError:
        return ""


def links_follow(root: Root, record: Record) -> bool:
    """Whether both links show what the record says."""
    return (link(root, CURRENT), link(root, PREVIOUS)) == _shown(record)


def point(root: Root, name: str, version: str) -> None:
    """Make one link point to a version, whether or not it existed; there is no moment without it."""
    _with_room(root, lambda: _point(root, name, version))
    disk.fsync_dir(root)


def switch(root: Root, to: str, back: str = "") -> None:
    """Make `current` point to `to`, and `previous` to `back` (default: to what `current` was).

    Going back exchanges the two links and needs no room on the disk. An exchange done twice undoes itself, so
    each step looks first; a call cut short anywhere may be repeated.
    """
    if not link(root, CURRENT):
        point(root, CURRENT, to)
    if link(root, CURRENT) != to:
        if link(root, PREVIOUS) != to:
            point(root, PREVIOUS, to)
        was = link(root, CURRENT)
        _exchange(root, to)
        back = back or was
    if link(root, PREVIOUS) != (back or to):
        point(root, PREVIOUS, back or to)


def is_complete(root: Root, name: str) -> bool:
    """Whether a version's directory is whole, as far as the disk says.

    A disk that does not say is not believed to have lost it: one failed read must not unseat what is good. It
    is started, and if that fails the next one is.
    """
    try:
        return looks_complete(root, name)
    except OSError:
        return True


def looks_complete(root: Root, name: str) -> bool:
    """Whether a version's directory is whole: it is renamed there only when every file is on the disk.

    Raises:
        OSError: the disk does not say.
    """
    if not _NAME.fullmatch(name):
        return False
    place = os.path.join(root, "versions", name)
    parts = (os.path.join(place, part) for part in (".bundle.json", "agent.py"))
    return not disk.is_link(place) and all(map(disk.is_file, parts))


def complete(root: Root, record: Record | None) -> frozenset[str]:
    """Those of the record's versions that are whole."""
    return frozenset(name for name in (kept(record) if record else ()) if is_complete(root, name))


def by_links(root: Root) -> Record | None:
    """What the links say when no slot is valid: `current` if it is whole, else `previous`, else nothing."""
    whole = [name for name in (link(root, CURRENT), link(root, PREVIOUS)) if is_complete(root, name)]
    return Record(good=whole[0], previous=whole[-1], tried=whole[0], reason=DISK) if whole else None


def believed(root: Root) -> Record | None:
    """The best that can be known without writing: the record, or else what the links say."""
    with suppress(OSError):
        return read(root) or by_links(root)
    return by_links(root)


def seq_on_trial(root: Root) -> int | None:
    """The record's number during a trial, else None: whether it grew says whether a boot was counted."""
    with suppress(OSError):
        record = read(root)
        return record.seq if record is not None and record.phase == TRIAL else None
    return None


def _shown(record: Record) -> tuple[str, str]:
    return (record.candidate, record.good) if record.phase == TRIAL else (record.good, record.previous)


def _follow(root: Root, record: Record) -> None:
    """Let the links follow the record. A link that cannot follow stops nothing: programs start by path."""
    with suppress(OSError):
        switch(root, *_shown(record))


def _point(root: Root, name: str, version: str) -> None:
    fresh = _fresh(root, name)
    disk.remove(fresh)
    disk.symlink(os.path.join("versions", version), fresh)
    disk.rename(fresh, os.path.join(root, name))


def _forget_fresh_links(root: Root) -> None:
    """A link that was made beside, and never took its place, is not left for ever."""
    for name in (CURRENT, PREVIOUS):
        with suppress(OSError):
            disk.remove(_fresh(root, name))


def _fresh(root: Root, name: str) -> str:
    return os.path.join(root, f".{name}.new")


def _exchange(root: Root, to: str) -> None:
    """Swap `current` and `previous`, the latter of which points to `to`, in one step of the file system."""
    try:
        disk.rename_exchange(os.path.join(root, CURRENT), os.path.join(root, PREVIOUS))
    except OSError:
        # An old kernel, C library or file system: `previous` shows `to` as well, until `switch` looks again.
        point(root, CURRENT, to)
    else:
        disk.fsync_dir(root)


def _with_room(root: Root, step: Callable[[], None]) -> None:
    """Going back must work on a full disk: when there is no room, the ballast goes, and `step` runs again."""
    try:
        step()
    except OSError as error:
        ballast = os.path.join(root, "ballast")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not disk.exists(ballast):
            raise
        disk.unlink(ballast)
        step()


# --- The table, done ------------------------------------------------------------------------------


def recover(root: Root) -> Record | None:
    """Finish whatever the record says was begun: a switch, a rollback, or a record that was lost.

    Returns:
        The record as it stands now, or None when nothing is installed.

    Raises:
        OSError: the record cannot be read or written.
    """
    with _alone(root):
        return _recovered(root)


def install_first(root: Root, name: str) -> Record:
    """Make the first version ever the good one.

    Raises:
        IllegalTransitionError: `conflict` (another is installed) or `not-found` (the directory is not whole).
    """
    with _alone(root):
        record = _recovered(root)
        if record is not None and record.good == name:
            return record
        _need_complete(root, name)
        return _write_and_follow(root, first(record, name))


def begin_trial(
    root: Root,
    candidate: str,
    boots: int,
    deadman_s: int,
    *,
    retry_epoch: int = 0,
    floor: int = 0,
) -> Record:
    """Put a staged version on trial; the caller then exits 75, and the launcher starts the candidate.

    Doing it again for the candidate on trial changes nothing; above all it gives no boots back.

    Args:
        root: the device's directory.
        candidate: name of its directory under `versions/`.
        boots: how often it may be started until it is healthy.
        deadman_s: seconds until the kernel kills it unless it postpones that.
        retry_epoch: of the directive that wants it.
        floor: of the policy it was checked against.

    Raises:
        IllegalTransitionError: see `armed`; `not-found` when the directory is not whole.
        OSError: the record could not be written; nothing has changed.
    """
    with _alone(root):
        record = _recovered(root)
        if record is None:
            raise IllegalTransitionError("there is no good version to go back to", "no-record")
        if record.phase == TRIAL and record.candidate == candidate:
            return record
        _need_complete(root, candidate)
        fresh = armed(record, candidate, boots, deadman_s, retry_epoch)
        return _write_and_follow(root, replace(fresh, floor=max(floor, fresh.floor)))


def boot(root: Root, boot_id: str) -> Record:
    """Count one start of the candidate; only when this returns may it be started.

    Raises:
        IllegalTransitionError: `not-on-trial` or `boots-used-up`.
        OSError: the boot could not be counted.
    """
    with _alone(root):
        record = _needed(root)
        counted = booted(record, boot_id)
        _follow(root, record)
        return Slots(root).write(counted)


def host_boot_id() -> str:
    """Which boot of the host this is; empty where the kernel does not say."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id", encoding="ascii") as stream:
        return stream.read().strip()
    return ""


def refund(root: Root) -> Record:
    """Give the candidate its boot back after a clean stop; else, or again, nothing changes."""
    with _alone(root):
        record = _needed(root)
        after = refunded(record) if record.phase == TRIAL else record
        return record if after == record else Slots(root).write(after)


def commit(root: Root, version: str = "") -> Record:
    """Make the candidate the good version.

    Args:
        root: the device's directory.
        version: the version the caller means, so that it never commits another.

    Raises:
        IllegalTransitionError: `not-on-trial`, unless this very commit was done already.
    """
    with _alone(root):
        record = _needed(root)
        if version and version != (record.candidate or record.good):
            raise IllegalTransitionError(f"{version} is not on trial", "not-on-trial")
        if record.phase == IDLE and record.reason == OBSERVED:
            return _recovered(root) or record
        return _write_and_follow(root, committed(record))


def roll_back(root: Root, reason: str) -> Record:
    """End the trial: back to the good version, and never this bundle again without a retry.

    A rollback that was begun is finished with the reason it was begun with. One that is done stays done.

    Raises:
        IllegalTransitionError: `not-on-trial`: what is good is never rolled back, see `go_back`.
        OSError: the record could not be written; `recover` goes on from where it stopped.
    """
    with _alone(root):
        record = _needed(root)
        if record.phase == IDLE and skips(record, digest_of(record.tried), record.retry_epoch):
            return record
        if record.phase != ROLLBACK:
            record = Slots(root).write(rolling_back(record, reason))
        return _finish_rollback(root, record)


def go_back(root: Root, retry_epoch: int = 0, to: str = "") -> Record:
    """The operator's rollback: end the trial, or prefer another version; done again it changes nothing.

    Args:
        root: the device's directory.
        retry_epoch: of the last directive, so that a later retry brings the version back.
        to: the version to go to, by a person's explicit word only; without it the one before. From a trial
            it can only be the good one.

    Raises:
        IllegalTransitionError: `not-found` (no whole such version), `skipped` (it failed here), `in-trial`;
            `unreadable`: the disk does not say whether it is whole, and asked again it may.
    """
    with _alone(root):
        record = _needed(root)
        if record.phase != IDLE and to not in ("", record.good):
            raise IllegalTransitionError(f"a trial goes back to {record.good} first", "in-trial")
        if record.phase == TRIAL:
            record = Slots(root).write(rolling_back(record, OPERATOR))
        if record.phase == ROLLBACK:
            return _finish_rollback(root, record)
        if to == record.good or (not to and _went_back(record)):
            return _recovered(root) or record
        fresh = gone_back(record, retry_epoch, to)
        _need_seen(root, fresh.good)
        return _write_and_follow(root, fresh)


def _went_back(record: Record) -> bool:
    """Whether the operator's rollback was the last thing to happen: a second one must not undo it."""
    left = record.tried != record.good and skips(record, digest_of(record.tried))
    return left and record.reason == OPERATOR


def refuse(root: Root, name: str, reason: str, retry_epoch: int = 0) -> Record:
    """Remember a version that failed before it could be put on trial; errors as of `refused`."""
    return _change(root, lambda record: refused(record, name, reason, retry_epoch))


def unskip(root: Root, digest: str = "") -> Record:
    """Let one bundle that failed here, or all of them, be tried again."""
    return _change(root, lambda record: unskipped(record, digest))


def raise_floor(root: Root, floor: int) -> Record:
    """Remember the highest floor seen; a lower one changes nothing."""
    return _change(root, lambda record: replace(record, floor=max(floor, record.floor)))


def open_lock(root: Root) -> int:
    """A handle of the file by which a launcher, and the agent that it becomes, hold the root.

    What is no file in its place is put aside: nobody can hold what cannot be opened.

    Raises:
        OSError: there is no such root, or it cannot be written.
    """
    path = os.path.join(root, "lock")
    handle = _opened_lock(path)
    if handle is None:
        with _alone(root):  # somebody else may have made the file by now, and hold it
            handle = _opened_lock(path)
            if handle is None:
                disk.rename(path, _beside(path))
                handle = disk.open(path, _LOCK_FLAGS, 0o600)
    return handle


def _opened_lock(path: str) -> int | None:
    try:
        return disk.open(path, _LOCK_FLAGS, 0o600)
    except OSError as error:
        if error.errno not in _NO_FILE:
            raise
    return None


def _beside(path: str) -> str:
    """Where what is no file is kept, for whoever wonders."""
    return f"{path}.damaged-{os.urandom(4).hex()}"


@contextmanager
def _alone(root: Root) -> Iterator[None]:
    """One writer at a time: the agent, the launcher and an operator's command all change the record.

    The lock is on the directory, so it needs no file and works on a read-only disk. A stopped command must
    not keep the launcher from starting the agent, so waiting ends, as an `OSError`.
    """
    handle = disk.open_dir(root, follow=True)
    try:
        patience = time.monotonic() + _LOCK_WAIT_S
        while True:
            try:
                disk.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > patience:
                    raise
                time.sleep(0.02)
        yield
    finally:
        disk.close(handle)


def _recovered(root: Root) -> Record | None:
    record = Slots(root).read()
    if record is None:
        lost = by_links(root)
        record = Slots(root).write(lost) if lost else None
    if record is None:
        return None
    if record.phase == ROLLBACK:
        return _finish_rollback(root, record)
    whole = rebooted(healed(record, complete(root, record)), host_boot_id())
    if whole != record:
        record = Slots(root).write(whole)
    if record.good:
        _follow(root, record)
        _forget_fresh_links(root)
    return record


def _finish_rollback(root: Root, record: Record) -> Record:
    after = rolled_back(record)
    _follow(root, record)
    return Slots(root).write(after)


def _write_and_follow(root: Root, record: Record) -> Record:
    record = Slots(root).write(record)
    _follow(root, record)
    return record


def _change(root: Root, change: Callable[[Record], Record]) -> Record:
    with _alone(root):
        record = _needed(root)
        after = change(record)
        return record if after == record else Slots(root).write(after)


def _needed(root: Root) -> Record:
    record = Slots(root).read()
    if record is None:
        raise IllegalTransitionError("there is no record of a good version", "no-record")
    return record


def _need_complete(root: Root, name: str) -> None:
    if not is_complete(root, name):
        raise IllegalTransitionError(f"versions/{name} is not a whole version", "not-found")


def _need_seen(root: Root, name: str) -> None:
    """For a choice of a person's a disk that does not say has not said yes: what runs can run on."""
    try:
        is_whole = looks_complete(root, name)
    except OSError as error:
        why = f"whether versions/{name} is whole could not be read: {error.strerror}"
        raise IllegalTransitionError(why, UNREADABLE) from error
    if not is_whole:
        raise IllegalTransitionError(f"versions/{name} is not a whole version", "not-found")
