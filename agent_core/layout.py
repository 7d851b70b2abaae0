"""This module knows what lies where under a device's root, and writes files that survive a power cut."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_core import disk, slots
from agent_core.errors import DiskError, MalformedError
from agent_core.late import late_dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BALLAST_LENGTH = 4 << 20
MAX_JSON = 4 << 20
PRIVATE_MODE = 0o700
PUBLIC_MODE = 0o755
_LEFT_OVER = re.compile(r"\..+\.[0-9a-f-]+\.new")

__all__ = [
    "Layout",
    "clear_left_overs",
    "read_json",
    "write_durable",
    "write_json",
    "write_launcher",
    "write_news",
]


@late_dataclass(frozen=True)
class Layout:
    """The names under a device's root (design section 4); nothing is read or made before `make`."""

    root: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))

    @property
    def launcher_file(self) -> Path:
        return self.root / "launcher" / "launcher.pyz"

    @property
    def launcher_previous(self) -> Path:
        return self.root / "launcher" / "launcher.prev.pyz"

    @property
    def versions(self) -> Path:
        return self.root / "versions"

    @property
    def current(self) -> Path:
        return self.root / slots.CURRENT

    @property
    def previous(self) -> Path:
        return self.root / slots.PREVIOUS

    @property
    def staging(self) -> Path:
        return self.root / "staging"

    @property
    def trash(self) -> Path:
        return self.root / "trash"

    @property
    def download(self) -> Path:
        return self.root / "download"

    @property
    def state(self) -> Path:
        return self.root / "state"

    @property
    def slots(self) -> Path:
        return self.state / "slots"

    @property
    def tuf(self) -> Path:
        return self.state / "tuf"

    @property
    def file_targets(self) -> Path:
        """Targets that a release file brought; apart from TUF's cache, which only servers fill."""
        return self.state / "file-targets.json"

    @property
    def spool(self) -> Path:
        return self.state / "spool.db"

    @property
    def root_history(self) -> Path:
        return self.tuf / "root_history"

    @property
    def identity(self) -> Path:
        return self.state / "identity.json"

    @property
    def identity_copy(self) -> Path:
        """The same once more: what is damaged in one place is taken from the other."""
        return self.state / "identity.copy.json"

    @property
    def key(self) -> Path:
        return self.state / "agent.key"

    @property
    def next_key(self) -> Path:
        """The key of a change that the server may have heard of, or not."""
        return self.state / "agent.key.next"

    @property
    def poll(self) -> Path:
        return self.state / "poll.json"

    @property
    def trust_root(self) -> Path:
        return self.state / "root.json"

    @property
    def ballast(self) -> Path:
        return self.root / "ballast"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    @property
    def hold(self) -> Path:
        return self.root / "hold"

    @property
    def settings(self) -> Path:
        return self.root / "agent.toml"

    @property
    def settings_dir(self) -> Path:
        return self.root / "agent.d"

    @property
    def logs(self) -> Path:
        return self.root / "log"

    def version_dir(self, name: str) -> Path:
        """The directory of the version named `VERSION-DIGEST12`."""
        return self.versions / name

    def make(self) -> None:
        """Make what is missing, and wait until it is on the disk. What is there stays as it is.

        The launcher is written only when there is none: a version on trial must not replace the program that
        would roll it back (`write_launcher` does that on purpose). A disk too full for the ballast is no
        reason not to start; the ballast comes back with the next call that finds room.

        Raises:
            DiskError: a directory or file cannot be made.
        """
        with _as_disk_error(self.root):
            disk.make_dirs(self.root.parent)
            made = [
                _make_dir(self.root),
                _make_dir(self.launcher_file.parent),
                _make_dir(self.versions),
                _make_dir(self.staging, PRIVATE_MODE),
                _make_dir(self.trash, PRIVATE_MODE),
                _make_dir(self.download, PRIVATE_MODE),
                _make_dir(self.state, PRIVATE_MODE),
                _make_dir(self.settings_dir),
                _make_dir(self.logs),
            ]
            _make_dir(self.tuf, PRIVATE_MODE)
            _make_file(self.slots, slots.SLOTS_LENGTH)
            _make_lock(self.root)
            _make_ballast(self.ballast)
            if any(made):
                disk.fsync_dir(self.root.parent)
            disk.fsync_dir(self.state)
            disk.fsync_dir(self.root)
            if not disk.exists(self.launcher_file):
                write_launcher(self)


def write_launcher(layout: Layout) -> Path:
    """Write this code's launcher, one file outside every bundle, unless it is there with the same bytes.

    Returns:
        The file; run it as `python -I -S -B FILE --root ROOT`.

    Raises:
        DiskError: it cannot be written; the old one still stands.
    """
    from agent_core.archive import launcher_archive  # zipfile is seldom needed

    archive = launcher_archive()
    with _as_disk_error(layout.launcher_file):
        if not disk.exists(layout.launcher_file) or disk.read_file(layout.launcher_file) != archive:
            write_durable(layout.launcher_file, archive, 0o755)
    return layout.launcher_file


def write_durable(
    path: str | os.PathLike[str],
    content: bytes,
    mode: int = 0o644,
    earn: Callable[[Path], None] | None = None,
) -> None:
    """Replace a file in one step: after a power cut it has the old bytes or the new, never some of each.

    Args:
        path: the file; its directory exists.
        content: all of its bytes.
        mode: its permissions, whatever the umask.
        earn: told where the new bytes lie, whole and durable, before they take the name; may raise instead.

    Raises:
        DiskError: it was not replaced; the old file still stands.
    """
    _replace(Path(path), content, mode, durable=True, earn=earn)


def write_news(path: str | os.PathLike[str], content: bytes, mode: int = 0o644) -> None:
    """Replace a file in one step that a power cut may undo or empty: for what is only news.

    Raises:
        DiskError: it was not replaced; the old file still stands.
    """
    _replace(Path(path), content, mode, durable=False)


def _replace(
    path: Path, content: bytes, mode: int, *, durable: bool, earn: Callable[[Path], None] | None = None
) -> None:
    with _as_disk_error(path):
        with _fresh_beside(path) as (fresh, handle):
            disk.write_all(handle, content)
            disk.fchmod(handle, mode)
            if durable:
                disk.fsync(handle)
            if earn:
                earn(fresh)
            disk.rename(fresh, path)
        if durable:
            disk.fsync_dir(path.parent)


@contextmanager
def _fresh_beside(path: Path) -> Iterator[tuple[Path, int]]:
    """A new file beside `path` with a name that is used once, and a handle that locks it until the end.

    The lock says that its writer lives: it goes with the last handle, however that ends, and with the power.
    A number of a process in the name said less, for numbers are given again. When what is done with it
    fails, the file is taken away.
    """
    fresh, handle = _make_fresh(path)
    try:
        yield fresh, handle
    except BaseException:
        with suppress(OSError):
            disk.unlink(fresh)
        raise
    finally:
        disk.close(handle)


def _make_fresh(path: Path) -> tuple[Path, int]:
    while True:
        fresh = path.with_name(f".{path.name}.{_chance()}.new")
        # 0600 from the start, so that a key is never readable, not even for a moment.
        handle = disk.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            disk.flock(handle, fcntl.LOCK_EX)
            if disk.fstat(handle).st_nlink:
                return fresh, handle
        except BaseException:
            disk.close(handle)
            disk.remove(fresh)
            raise
        disk.close(handle)  # a clean-up was quicker than the lock


def _chance() -> str:
    return os.urandom(4).hex()


def clear_left_overs(layout: Layout) -> None:
    """Take away what writers that were killed have left, so that a thousand kills leave no thousand files.

    A file that is locked is being written. What cannot be taken away is met again next time.
    """
    for place in (layout.root, layout.launcher_file.parent, layout.state, layout.tuf, layout.root_history):
        with suppress(FileNotFoundError):
            for name in disk.listdir(place):
                if _LEFT_OVER.fullmatch(name):
                    with suppress(OSError):
                        _clear_unlocked(place / name)


def _clear_unlocked(path: Path) -> None:
    """Take a file away unless it is locked; under the lock, so that whoever made it a moment ago notices."""
    handle = disk.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        disk.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        disk.unlink(path)
    finally:
        disk.close(handle)


def write_json(path: str | os.PathLike[str], value: Any, mode: int = 0o644) -> None:
    """Write a value as JSON, durably; keys are sorted."""
    write_durable(path, (json.dumps(value, sort_keys=True, indent=1) + "\n").encode(), mode)


def read_json(path: str | os.PathLike[str], default: Any = None) -> Any:
    """Read what `write_json` wrote.

    Args:
        path: the file.
        default: what to return when there is no such file.

    Raises:
        MalformedError: it holds no JSON.
        DiskError: it cannot be read, or is longer than anything that was written here.
    """
    with _as_disk_error(path):
        try:
            content = disk.read_file(path, MAX_JSON)
        except FileNotFoundError:
            return default
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"{path} holds no JSON", why=str(error)) from error


def _make_dir(path: Path, mode: int = PUBLIC_MODE) -> bool:
    """Make a directory with exactly this mode unless it exists; say whether it was made."""
    try:
        disk.mkdir(path)
    except FileExistsError:
        return False
    disk.chmod(path, mode)
    return True


def _make_file(path: Path, length: int) -> None:
    """A private file with all its room taken, now; what it holds already stays."""
    handle = disk.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        held = disk.fstat(handle).st_size
        if held == 0:
            disk.fchmod(handle, 0o600)
        if held < length:
            disk.allocate(handle, length)
            disk.fsync(handle)
    finally:
        disk.close(handle)


def _make_lock(root: Path) -> None:
    """The file that holds the root; what is no file in its place is put aside, as the launcher does."""
    handle = slots.open_lock(root)
    try:
        if disk.fstat(handle).st_size == 0:
            disk.fchmod(handle, 0o600)
    finally:
        disk.close(handle)


def _make_ballast(path: Path) -> None:
    """Room that only a way back may use; `slots` gives it away when the disk is full."""
    try:
        _make_file(path, BALLAST_LENGTH)
    except OSError as error:
        disk.remove(path)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


@contextmanager
def _as_disk_error(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        then = "free some space" if full else "look at the disk and at the owner of the directory"
        raise DiskError(
            f"{path} cannot be read or written",
            why=str(error),
            then=then,
            reason="no-room" if full else None,
        ) from error
