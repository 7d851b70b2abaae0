"""This module turns a downloaded bundle into a complete version directory, tries it, and clears up.

A directory stands under `versions/` only when all of it is on the disk: it is unpacked in `staging/`,
fsynced, and renamed. Whatever is thrown away is renamed into `trash/` first, so a half-deleted version is
never met. Callers hold the agent's lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import secrets
import stat
import subprocess
import sys
from contextlib import contextmanager, suppress
from hashlib import sha256
from typing import TYPE_CHECKING

from agent_core import delta, disk, slots
from agent_core.bundle import INDEX_NAME, Index, unpack
from agent_core.errors import DiskError, MalformedError, RelfleetError, TrustError
from agent_core.late import late_dataclass
from agent_core.processes import TRIES, finish, was_killed
from agent_core.wire import Getter, Reason, ReleaseFacts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent_core.layout import Layout
    from agent_core.slots import Record

log = logging.getLogger(__name__)

RESERVE = 32 * 2**20
"""Bytes left free on the disk after a bundle is unpacked: an updater does not take a host's last block."""

PREFLIGHT_S = 60.0
MOST_OUTPUT = 64 * 1024


def version_name(facts: ReleaseFacts) -> str:
    """The directory's name under `versions/`: one version built twice stands twice.

    The digest is the index's: two bundles may hold the same files and still be judged by other checks.
    """
    return f"{facts.version}-{facts.index_sha256[:12]}"


# --- staging ----------------------------------------------------------------------------------------------


def stage(
    layout: Layout,
    archive: Path,
    index_bytes: bytes,
    facts: ReleaseFacts,
    archive_sha256: str,
    *,
    reserve: int = RESERVE,
    base: tuple[Path, Index] | None = None,
) -> str:
    """Make the bundle a complete, durable, read-only version directory. Idempotent.

    Args:
        layout: of this host; its directories exist.
        archive: the downloaded file.
        index_bytes: as downloaded; believed only when they are what `facts` names.
        facts: what the release keys signed of this bundle.
        archive_sha256: the signed digest of the archive.
        reserve: bytes that must stay free afterwards.
        base: when `archive` is a delta: the version that it is applied to, with its index.

    Returns:
        The directory's name under `versions/`.

    Raises:
        TrustError: index or archive are not what was signed.
        DiskError: `no-room` before anything is written, or `disk`.
    """
    index = believe(index_bytes, facts)
    name = version_name(facts)
    final, fresh = layout.versions / name, layout.staging / name
    with _disk_errors(f"{name} could not be staged"):
        if not is_complete(final, index_bytes):
            if in_use(final):
                raise DiskError(f"{name} is damaged, and in use", then="restart the agent")
            discard(layout, final)
            discard(layout, fresh)
            check_room(layout, index, reserve)
            try:
                _unpack(archive, index, fresh, archive_sha256, base)
                _write_index(fresh, index_bytes)
                disk.rename_new(fresh, final)
            except BaseException:
                with _logged(name):
                    discard(layout, fresh)
                raise
        # Also when it stood there already: an earlier call may have been killed right after the rename.
        _seal(final)
        disk.fsync_dir(layout.staging)
        disk.fsync_dir(layout.versions)
    return name


def believe(index_bytes: bytes, facts: ReleaseFacts) -> Index:
    """Read an index that has the signed digest and says the same as the signed facts.

    Raises:
        TrustError: `digest-mismatch`, `bad-index`, or the `wrong-…` of what differs.
    """
    if len(index_bytes) != facts.index_length or sha256(index_bytes).hexdigest() != facts.index_sha256:
        raise TrustError("the index is not the one that was signed", reason=Reason.DIGEST_MISMATCH)
    index = Index.from_bytes(index_bytes)
    said = {
        Reason.WRONG_PRODUCT: (index.product, facts.product),
        Reason.WRONG_PLATFORM: (index.platform, facts.platform),
        Reason.BAD_INDEX: (
            (index.version, index.unpacked, len(index.files), index.min_launcher),
            (facts.version, facts.unpacked, facts.files, facts.min_launcher),
        ),
    }
    for reason, (inside, signed) in said.items():
        if inside != signed:
            why = f"it says {inside}, the release {signed}"
            raise TrustError("the index does not fit its release", why=why, reason=reason)
    return index


def is_complete(directory: Path, index_bytes: bytes) -> bool:
    """Whether this bundle stands there, down to the last byte.

    The rename made it appear whole; but disks rot and people delete, and what is damaged would be taken for
    staged at every poll and never start.
    """
    try:
        return disk.read_file(directory / INDEX_NAME) == index_bytes and all(
            sha256(disk.read_file(directory / file.path)).hexdigest() == file.sha256
            for file in Index.from_bytes(index_bytes).files
        )
    except (FileNotFoundError, NotADirectoryError):
        return False


def hold(directory: Path) -> int:
    """Keep a version from being collected for as long as this process lives, or until the handle is closed.

    Raises:
        OSError: there is no such directory.
    """
    handle = disk.open_dir(directory)
    disk.flock(handle, fcntl.LOCK_SH)
    return handle


def in_use(directory: Path) -> bool:
    """Whether some process holds the directory by `flock`, as every running version `hold`s its own."""
    try:
        handle = disk.open_dir(directory)
    except OSError:
        return False
    try:
        disk.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        disk.close(handle)
    return False


def check_room(
    layout: Layout, index: Index, reserve: int, archive: Path | None = None, length: int = 0
) -> None:
    """Say before anything is written that a bundle has no room here.

    Args:
        layout: of this host.
        index: of the bundle.
        reserve: bytes that must stay free afterwards.
        archive: the part file, when the archive has still to be downloaded; what it has taken is not counted.
        length: of the whole archive, in bytes.

    Raises:
        DiskError: `no-room`, with how much is missing.
    """
    found = disk.statvfs(layout.staging)
    block = found.f_frsize or found.f_bsize or 4096
    taken = disk.stat(archive).st_blocks * 512 if archive and disk.exists(archive) else 0
    to_come = max(0, -(-length // block) * block - taken)
    need, free = index.room(block) + to_come + reserve, found.f_bavail * block
    if free < need:
        why = f"{need} bytes are needed, {free} are free: {need - free} are missing"
        raise DiskError("the disk has no room for the bundle", why=why, reason=Reason.NO_ROOM)
    nodes = len(index.files) + len(index.directories) + 2
    if found.f_files and found.f_favail < nodes:
        why = f"{nodes} files are needed, {found.f_favail} are free: {nodes - found.f_favail} are missing"
        raise DiskError("the disk has no room for the bundle's files", why=why, reason=Reason.NO_ROOM)


def _unpack(
    archive: Path, index: Index, fresh: Path, archive_sha256: str, base: tuple[Path, Index] | None
) -> None:
    found = delta.apply(archive, *base, index, fresh) if base else unpack(archive, index, fresh)
    if found != archive_sha256:
        raise TrustError("the archive is not the one that was signed", reason=Reason.DIGEST_MISMATCH)


def _write_index(directory: Path, index_bytes: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    handle = disk.open(directory / INDEX_NAME, flags, 0o444)
    try:
        disk.write_all(handle, index_bytes)
        disk.fchmod(handle, 0o444)
        disk.fsync(handle)
    finally:
        disk.close(handle)
    disk.fsync_dir(directory)


def _seal(directory: Path) -> None:
    handle = disk.open_dir(directory)
    try:
        disk.fchmod(handle, 0o555)
        disk.fsync(handle)
    finally:
        disk.close(handle)


@contextmanager
def _disk_errors(what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = Reason.NO_ROOM if full else Reason.DISK
        raise DiskError(what, why=str(error), reason=reason) from error


# --- preflight --------------------------------------------------------------------------------------------


@late_dataclass(frozen=True)
class Preflight:
    """What the new version said of itself before it was trusted with anything; a refusal is a value.

    `killed` when somebody else ended it, so that it says nothing of the version.
    """

    ok: bool
    reason: Reason | None = None
    detail: str = ""
    killed: bool = False


def interpreter(directory: Path) -> str:
    """The Python that runs the version in `directory`: its own, or the one that runs this."""
    own = directory / "python" / "bin" / "python3"
    return str(own) if own.exists() else sys.executable


def preflight(layout: Layout, name: str, facts: ReleaseFacts, *, limit_s: float = PREFLIGHT_S) -> Preflight:
    """Let the staged version import itself and read today's state in a process of its own.

    One that is killed, as the kernel does for want of memory, is tried again: only a version that never comes
    through is refused, for a refusal is remembered.

    Args:
        layout: of this host.
        name: the directory under `versions/`; the version runs where it will stay.
        facts: the signed ones; a program that reports another version would be updated for ever.
        limit_s: seconds after which it counts as hanging; all its processes are killed then.
    """
    for _ in range(TRIES):
        verdict = _try(layout, name, facts, limit_s)
        if not verdict.killed:
            break
    return verdict


def _try(layout: Layout, name: str, facts: ReleaseFacts, limit_s: float) -> Preflight:
    directory = layout.versions / name
    argv = [interpreter(directory), "-I", "-S", "-B", str(directory / "agent.py")]
    environment = {key: value for key, value in os.environ.items() if key not in _NOT_FOR_PREFLIGHT}
    try:
        process = subprocess.Popen(
            [*argv, "preflight", "--root", str(layout.root)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=layout.root,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return Preflight(ok=False, reason=Reason.PREFLIGHT, detail=f"it could not be started: {error}")
    ended, (said, complained) = finish(process, limit_s, MOST_OUTPUT)
    if not ended:
        return Preflight(ok=False, reason=Reason.PREFLIGHT, detail=f"it was not done after {limit_s:g} s")
    if process.returncode != 0:
        told = "; ".join(_lines(complained or said)[-3:])
        detail, killed = f"exit {process.returncode}: {told}", was_killed(process.returncode)
        return Preflight(ok=False, reason=Reason.PREFLIGHT, detail=detail, killed=killed)
    return _judge("".join(_lines(said)[-1:]), facts)


_NOT_FOR_PREFLIGHT = frozenset({"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "RELFLEET_BOOT"})


def _judge(line: str, facts: ReleaseFacts) -> Preflight:
    try:
        get = Getter(json.loads(line), "preflight")
        version, product = get.text("version"), get.text("product")
        if not get.boolean("ok"):
            return Preflight(ok=False, reason=Reason.PREFLIGHT, detail=get.text("detail", ""))
    except (MalformedError, ValueError, RecursionError) as error:
        return Preflight(ok=False, reason=Reason.PREFLIGHT, detail=f"its answer cannot be read: {error}")
    if (version, product) != (facts.version, facts.product):
        detail = f"it says {product} {version}, the manifest {facts.product} {facts.version}"
        return Preflight(ok=False, reason=Reason.PREFLIGHT_VERSION, detail=detail)
    return Preflight(ok=True)


def _lines(output: bytes) -> list[str]:
    lines = output.decode("utf-8", "replace").splitlines()
    return [line.strip()[:1000] for line in lines if line.strip()]


# --- throwing away ----------------------------------------------------------------------------------------


def discard(layout: Layout, path: Path) -> None:
    """Take `path` out of sight by one rename into the trash, then delete it; nothing there is fine."""
    try:
        status = disk.stat(path, follow=False)
    except FileNotFoundError:
        return
    if stat.S_ISDIR(status.st_mode):
        disk.chmod(path, 0o755)  # a directory that its owner may not write cannot be renamed elsewhere
    gone = f"{path.name}.{secrets.token_hex(4)}"
    disk.rename(path, layout.trash / gone)
    disk.fsync_dir(path.parent)
    _delete_trash(layout, gone)


@late_dataclass(frozen=True)
class Retention:
    """How many versions a host keeps; those that are needed stay whatever these say.

    Attributes:
        count: of all versions together.
        total: bytes on the disk of all versions together; 0 for no ceiling.
    """

    count: int = 2
    total: int = 0


NEEDED_ONLY = Retention(count=0)


def collect(layout: Layout, record: Record | None, retention: Retention = NEEDED_ONLY) -> tuple[str, ...]:
    """Delete every version that nothing needs, what an older staging left, and the trash.

    Good, previous and candidate stay, so does what the two links show and what a process holds by `flock`.
    Of the others the newest stay, as far as `retention` has room for them. Without a record, or when the good
    version is not there, no version is touched: it may be the last one. What cannot be deleted is logged and
    met again next time. No link is followed.

    Returns:
        The names of the versions that are gone.
    """
    collected = []
    for name in _surplus(layout, record, retention):
        with _logged(name):
            discard(layout, layout.versions / name)
            collected.append(name)
    for name in _names(layout.staging):
        with _logged(name):
            discard(layout, layout.staging / name)
    for name in _names(layout.trash):
        with _logged(name):
            _delete_trash(layout, name)
    return tuple(collected)


def _surplus(layout: Layout, record: Record | None, retention: Retention) -> list[str]:
    names = _names(layout.versions)
    if record is None or record.good not in names:
        return []
    keep = set(slots.kept(record))
    for link in (layout.current, layout.previous):
        with suppress(OSError):
            keep.add(os.path.basename(disk.readlink(link)))  # noqa: PTH119 - text, not a place
    needed = {name for name in names if name in keep or in_use(layout.versions / name)}
    spare = [name for name in names if name not in needed and _may_serve_again(layout, record, name)]
    retained = _retained(layout, needed, spare, retention)
    return [name for name in names if name not in needed | retained]


def _may_serve_again(layout: Layout, record: Record, name: str) -> bool:
    """A version that is not whole, or that failed here, would be refused by whoever asked for it."""
    failed = any(entry[0] == slots.digest_of(name) for entry in record.skip)
    return not failed and slots.is_complete(layout.root, name)


def _retained(layout: Layout, needed: set[str], spare: list[str], retention: Retention) -> set[str]:
    """The newest of the spare versions for which there is room beside the needed ones."""
    retained: set[str] = set()
    if not spare or retention.count <= len(needed):
        return retained
    handle = disk.open_dir(layout.versions)
    try:
        spare.sort(key=lambda name: disk.stat(name, dir_fd=handle, follow=False).st_mtime, reverse=True)
        total = sum(_taken(name, handle) for name in needed) if retention.total else 0
        for name in spare[: retention.count - len(needed)]:
            total += _taken(name, handle) if retention.total else 0
            if total > retention.total > 0:
                break
            retained.add(name)
    finally:
        disk.close(handle)
    return retained


def _taken(name: str, above: int) -> int:
    """Bytes on the disk of an entry and all below it, in whole blocks."""
    status = disk.stat(name, dir_fd=above, follow=False)
    taken = status.st_blocks * 512
    if stat.S_ISDIR(status.st_mode):
        handle = disk.open_dir(name, dir_fd=above)
        try:
            taken += sum(_taken(inside, handle) for inside in disk.listdir(handle))
        finally:
            disk.close(handle)
    return taken


def _names(directory: Path) -> list[str]:
    try:
        return sorted(disk.listdir(directory))
    except OSError:
        return []


@contextmanager
def _logged(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RelfleetError) as error:
        log.warning("could not be deleted", extra={"entry": name, "error": str(error)})


def _delete_trash(layout: Layout, name: str) -> None:
    trash = disk.open_dir(layout.trash, follow=True)
    try:
        _delete(name, trash)
    finally:
        disk.close(trash)


def _delete(name: str, above: int) -> None:
    """Remove an entry and all below it, by directory handles: a link is removed and never followed."""
    if not stat.S_ISDIR(disk.stat(name, dir_fd=above, follow=False).st_mode):
        disk.unlink(name, dir_fd=above)
        return
    handle = disk.open_dir(name, dir_fd=above)
    try:
        disk.fchmod(handle, 0o700)
        for inside in disk.listdir(handle):
            _delete(inside, handle)
    finally:
        disk.close(handle)
    disk.rmdir(name, dir_fd=above)
