"""This module watches a run through `agent_core.disk`, keeps its journal, and lets operations fail."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Any, NamedTuple

from tests.crash.journal import Directory, File, Journal, Link, Tree

if TYPE_CHECKING:
    from collections.abc import Callable

UMASK = 0o022
CHANGES = frozenset(
    [
        "open",
        "write",
        "pwrite",
        "ftruncate",
        "allocate",
        "fsync",
        "fdatasync",
        "fchmod",
        "chmod",
        "rename",
        "rename_new",
        "rename_exchange",
        "symlink",
        "unlink",
        "mkdir",
        "rmdir",
    ]
)
TAKES_ROOM = frozenset(["write", "pwrite", "mkdir", "symlink", "allocate", "reserve", "rename", "rename_new"])
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
NEVER_FAILS = frozenset({"close", "flock", "syncfs"})


class Fault(NamedTuple):
    """Operation number `at` (and, if `stays`, every one after it that can) fails with `code`."""

    code: int
    at: int
    stays: bool = False

    def __str__(self) -> str:
        when = "from then on" if self.stays else "once"
        return f"{errno.errorcode[self.code]} at operation {self.at}, {when}"


class Watch:
    """An observer of the disk under one root.

    Args:
        root: its name is `Journal.ROOT`; what lies elsewhere is not looked at.
        tree: what is there, all of it safe.
        step: called after each change with the journal as it stands.
        fault: what to let fail, if anything.
    """

    def __init__(
        self, root: str, tree: Tree, step: Callable[[Journal], None] | None, fault: Fault | None = None
    ) -> None:
        self.above = os.path.dirname(root)
        self.journal = Journal(tree)
        self.step = step
        self.keeps_journal = step is not None
        self.fault = fault
        self.seen = 0
        self.changed = 0
        self.failed = 0
        self._handles: dict[int, list[int]] = {}

    # --- letting things fail --------------------------------------------------------------------------

    def before(self, name: str, words: tuple[Any, ...], options: dict[str, Any]) -> None:
        fault = self.fault
        if fault is None or not can_fail(fault, name, words):
            return
        self.seen += 1
        if self.seen == fault.at or (fault.stays and self.seen > fault.at):
            self.failed += 1
            raise OSError(fault.code, os.strerror(fault.code))

    @property
    def stays_bad(self) -> bool:
        return self.fault is not None and self.fault.stays

    @property
    def is_blind(self) -> bool:
        """No file can be opened any more, so nothing in one can be known."""
        return self.stays_bad and self.fault is not None and self.fault.code == errno.EMFILE

    # --- keeping the journal --------------------------------------------------------------------------

    def after(self, name: str, words: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        if isinstance(result, OSError):
            return
        if not self.keeps_journal:
            self.changed += name in CHANGES and not (name == "open" and not words[1] & os.O_CREAT)
            return
        handler = getattr(self, f"_{name}", None)
        if handler is None:
            return
        dir_fd = options.get("dir_fd")
        if handler(*words, dir_fd=dir_fd, result=result) is not False and name in CHANGES:
            self.changed += 1
            if self.step:
                self.step(self.journal)

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[int, str]:
        """The directory's inode and the name in it; (0, "") for what lies elsewhere."""
        text = os.fspath(path)
        if dir_fd is None:
            if not text.startswith(f"{self.above}/"):
                return 0, ""
            number, parts = Journal.ABOVE, text[len(self.above) + 1 :].split("/")
        else:
            number, parts = self._handles[dir_fd][0], text.split("/")
        for part in parts[:-1]:
            number = self.journal.inodes[number].names[part]
        return number, parts[-1]

    def _open(self, path: Any, flags: int, mode: int, *, dir_fd: int | None, result: int) -> bool:
        above, name = self._place(path, dir_fd)
        if not above:
            self._handles[result] = [Journal.ABOVE if os.fspath(path) == self.above else 0, 0]
            return False
        number, made = self.journal.inodes[above].names.get(name, 0), False
        if not number:
            number, made = self.journal.make(above, name, "file", mode & ~UMASK), True
        self._handles[result] = [number, 0]
        if flags & os.O_TRUNC and not made:
            self.journal.write(number, 0, None)
            return True
        return made

    def _close(self, handle: int, **_: Any) -> bool:
        self._handles.pop(handle, None)
        return False

    def _read(self, handle: int, _most: int, *, result: bytes, **_: Any) -> bool:
        self._handles[handle][1] += len(result)
        return False

    def _write(self, handle: int, content: Any, *, result: int, **_: Any) -> None:
        number, offset = self._handles[handle]
        self.journal.write(number, offset, bytes(content[:result]))
        self._handles[handle][1] += result

    def _pwrite(self, handle: int, content: Any, offset: int, *, result: int, **_: Any) -> None:
        self.journal.write(self._handles[handle][0], offset, bytes(content[:result]))

    def _ftruncate(self, handle: int, length: int, **_: Any) -> None:
        self.journal.write(self._handles[handle][0], length, None)

    def _allocate(self, handle: int, _offset: int, length: int, **_: Any) -> bool:
        number = self._handles[handle][0]
        if self.journal.length(number) >= length:
            return False
        self.journal.write(number, length, None)
        return True

    def _fsync(self, handle: int, **_: Any) -> None:
        self.journal.sync(self._handles[handle][0])

    def _fdatasync(self, handle: int, **_: Any) -> None:
        self.journal.sync(self._handles[handle][0], with_mode=False)

    def _fchmod(self, handle: int, mode: int, **_: Any) -> None:
        self.journal.chmod(self._handles[handle][0], mode)

    def _chmod(self, path: Any, mode: int, **_: Any) -> None:
        above, name = self._place(path)
        self.journal.chmod(self.journal.inodes[above].names[name], mode)

    def _rename(self, source: Any, target: Any, **_: Any) -> None:
        self.journal.move(self._place(source), self._place(target))

    _rename_new = _rename

    def _rename_exchange(self, one: Any, other: Any, **_: Any) -> None:
        self.journal.exchange(self._place(one), self._place(other))

    def _symlink(self, text: str, path: Any, **_: Any) -> None:
        self.journal.make(*self._place(path), "link", 0o777, text)

    def _mkdir(self, path: Any, mode: int, *, dir_fd: int | None, **_: Any) -> None:
        self.journal.make(*self._place(path, dir_fd), "directory", mode & ~UMASK)

    def _unlink(self, path: Any, *, dir_fd: int | None, **_: Any) -> None:
        self.journal.remove(*self._place(path, dir_fd))

    _rmdir = _unlink


def can_fail(fault: Fault, name: str, words: tuple[Any, ...]) -> bool:
    """Whether a disk in this state refuses this operation; a fault that stays leaves reading alone."""
    opens_to_write = name == "open" and bool(words[1] & WRITES)
    if fault.code == errno.EMFILE:
        return name in ("open", "listdir")
    if fault.code == errno.ENOSPC:
        return name in TAKES_ROOM or (name == "open" and bool(words[1] & os.O_CREAT))
    if fault.code == errno.EROFS or fault.stays:
        return opens_to_write or (name in CHANGES and name != "open")
    return name not in NEVER_FAILS


# --- trees on a real file system ----------------------------------------------------------------------


def plant(root: str, tree: Tree) -> None:
    """Make `tree` so under `root`, whose parent is there and empty."""
    for path, entry in sorted(tree.items()):
        place = f"{root}/{path}" if path else root
        if isinstance(entry, Directory):
            os.mkdir(place, 0o700)
        elif isinstance(entry, Link):
            os.symlink(entry.text, place)
        else:
            handle = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            os.write(handle, entry.content)
            if entry.mode != 0o600:
                os.fchmod(handle, entry.mode)
            os.close(handle)
    for path, entry in sorted(tree.items(), reverse=True):
        if isinstance(entry, Directory) and entry.mode != 0o700:
            os.chmod(f"{root}/{path}" if path else root, entry.mode)


def harvest(root: str) -> Tree:
    """What lies under `root`."""
    tree: Tree = {}
    if os.path.isdir(root):
        _harvest(root, "", tree)
    return tree


def _harvest(place: str, path: str, tree: Tree) -> None:
    mode = os.stat(place).st_mode & 0o7777
    tree[path] = Directory(mode)
    with os.scandir(place) as entries:
        for entry in entries:
            inside = f"{path}/{entry.name}" if path else entry.name
            if entry.is_symlink():
                tree[inside] = Link(os.readlink(entry.path))
            elif entry.is_dir(follow_symlinks=False):
                _harvest(entry.path, inside, tree)
            else:
                with open(entry.path, "rb") as stream:
                    content = stream.read()
                tree[inside] = File(content, entry.stat(follow_symlinks=False).st_mode & 0o7777)
