"""This module is a disk as POSIX promises it, and no better: what is not fsynced may be there, half there, or not.

The rules, which `docs/reliability.md` tells people:

* Bytes of a file are safe from its `fsync` or `fdatasync` on. Until then each file has, on its own, the old
  bytes, or all new ones, or those up to any write, the last write torn in its middle, or zeros in the place of
  the new ones.
* A change of names (`open` that makes a file, `mkdir`, `symlink`, `unlink`, `rmdir`, `rename`) is safe from the
  `fsync` of its directory on, and not by the `fsync` of the file. Until then any subset of the changes happened.
* A rename or an exchange happened or did not; it never loses what it moves. A rename between directories is
  safe from the `fsync` of either, but its old name may show up again until the directory it left is synced too.
* Modes are safe from the `fsync` of what has them on. `syncfs` promises nothing.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator


class File(NamedTuple):
    content: bytes
    mode: int


class Link(NamedTuple):
    text: str


class Directory(NamedTuple):
    mode: int


Entry = File | Link | Directory
Tree = dict[str, Entry]
"""What a disk holds: paths below the root, the root itself as the empty path."""


@dataclass
class _Inode:
    """One file, link or directory; `stable` is what an fsync has made safe, `writes` came after it."""

    kind: str
    mode: int
    stable_mode: int
    text: str = ""
    stable: bytes = b""
    writes: list[tuple[int, bytes | None]] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    stable_names: dict[str, int] = field(default_factory=dict)

    def copy(self) -> _Inode:
        return _Inode(
            self.kind, self.mode, self.stable_mode, self.text, self.stable, list(self.writes),
            dict(self.names), dict(self.stable_names),
        )  # fmt: skip


class Change(NamedTuple):
    """One step in the names: what each name shows afterwards, 0 for nothing."""

    sets: tuple[tuple[int, str, int], ...]
    is_move: bool


def written(content: bytes, offset: int, piece: bytes | None) -> bytes:
    """`content` after one write; a piece that is None cuts it off, or fills it up with zeros, at `offset`."""
    if piece is None:
        return content[:offset].ljust(offset, b"\0")
    return content[:offset].ljust(offset, b"\0") + piece + content[offset + len(piece) :]


class Journal:
    """The disk under one root, and all that it may hold if the power goes now.

    Args:
        tree: what is safe at the beginning; the parent of the root is there and never lost.
    """

    ABOVE = 1
    ROOT = "root"

    def __init__(self, tree: Tree) -> None:
        self.inodes: dict[int, _Inode] = {self.ABOVE: _Inode("directory", 0o755, 0o755)}
        self.changes: list[Change] = []
        self._last = self.ABOVE
        for path, entry in sorted(tree.items()):
            self._plant(path, entry)

    def _plant(self, path: str, entry: Entry) -> None:
        parts = [self.ROOT, *path.split("/")] if path else [self.ROOT]
        above = self.find(parts[:-1])
        if isinstance(entry, File):
            number = self._new("file", entry.mode)
            self.inodes[number].stable = entry.content
        elif isinstance(entry, Link):
            number = self._new("link", 0o777, entry.text)
        else:
            number = self._new("directory", entry.mode)
        self.inodes[above].names[parts[-1]] = self.inodes[above].stable_names[parts[-1]] = number

    def _new(self, kind: str, mode: int, text: str = "") -> int:
        self._last += 1
        self.inodes[self._last] = _Inode(kind, mode, mode, text)
        return self._last

    def copy(self) -> Journal:
        """The same disk at the same moment, to look at later."""
        twin = Journal({})
        twin.inodes = {number: inode.copy() for number, inode in self.inodes.items()}
        twin.changes = list(self.changes)
        twin._last = self._last
        return twin

    def find(self, parts: list[str]) -> int:
        """The inode that these names lead to now, 0 for none; links are not followed."""
        number = self.ABOVE
        for part in parts:
            number = self.inodes[number].names.get(part, 0)
            if not number:
                return 0
        return number

    # --- what happens to it ---------------------------------------------------------------------------

    def make(self, above: int, name: str, kind: str, mode: int, text: str = "") -> int:
        number = self._new(kind, mode, text)
        self._change(Change(((above, name, number),), is_move=False))
        return number

    def remove(self, above: int, name: str) -> None:
        self._change(Change(((above, name, 0),), is_move=False))

    def move(self, source: tuple[int, str], target: tuple[int, str]) -> None:
        number = self.inodes[source[0]].names[source[1]]
        self._change(Change(((*target, number), (*source, 0)), is_move=True))

    def exchange(self, one: tuple[int, str], other: tuple[int, str]) -> None:
        first, second = (self.inodes[place[0]].names[place[1]] for place in (one, other))
        self._change(Change(((*one, second), (*other, first)), is_move=True))

    def _change(self, change: Change) -> None:
        self.changes.append(change)
        for above, name, number in change.sets:
            _set(self.inodes[above].names, name, number)

    def write(self, number: int, offset: int, piece: bytes | None) -> None:
        self.inodes[number].writes.append((offset, piece))

    def length(self, number: int) -> int:
        return len(self._content(number))

    def _content(self, number: int) -> bytes:
        content = self.inodes[number].stable
        for offset, piece in self.inodes[number].writes:
            content = written(content, offset, piece)
        return content

    def chmod(self, number: int, mode: int) -> None:
        self.inodes[number].mode = mode

    def sync(self, number: int, *, with_mode: bool = True) -> None:
        inode = self.inodes[number]
        if with_mode:
            inode.stable_mode = inode.mode
        if inode.kind == "file":
            inode.stable, inode.writes = self._content(number), []
        elif inode.kind == "directory":
            self._sync_names(number)

    def _sync_names(self, directory: int) -> None:
        left = []
        for change in self.changes:
            rest = change.sets
            if any(above == directory for above, _, _ in rest):
                leaves_old_name = change.is_move and rest[0][0] == directory != rest[-1][0]
                safe = rest[:1] if leaves_old_name else rest
                for above, name, number in safe:
                    _set(self.inodes[above].stable_names, name, number)
                rest = rest[1:] if leaves_old_name else ()
            if rest:
                left.append(Change(rest, change.is_move))
        self.changes = left

    # --- what it may hold -----------------------------------------------------------------------------

    def states(self, most: int, widths: tuple[int, ...]) -> Iterator[Tree]:
        """What may be there after a power cut at this moment, the two ends first; equal ones may come twice.

        Args:
            most: up to so many combinations, all of them.
            widths: beyond, both ends with so many deviations at a time: `(1, 2)` is every single one and every pair.

        The ends are that nothing unsynced happened, and that all of it did.
        """
        files = [number for number, inode in self.inodes.items() if inode.writes]
        options = [2] * len(self.changes) + [len(self._contents(number)) for number in files]
        for choice in _choices(options, most, widths):
            applied = [change for change, taken in zip(self.changes, choice, strict=False) if taken]
            picked = dict(zip(files, choice[len(self.changes) :], strict=True))
            yield self._tree(applied, picked)

    def _contents(self, number: int) -> list[bytes]:
        """The old bytes first, all new ones last, and between them what a cut may leave."""
        inode = self.inodes[number]
        stages = [inode.stable]
        for offset, piece in inode.writes:
            stages.append(written(stages[-1], offset, piece))
        offset, piece = inode.writes[-1]
        between = stages[1:-1]
        if piece:
            half = max(1, len(piece.rstrip(b"\0")) // 2)
            between.append(written(stages[-2], offset, piece[:half]))
            between.append(written(stages[-2], offset, bytes(len(piece))))
        if len(inode.writes) > 1:
            between.append(inode.stable.ljust(len(stages[-1]), b"\0")[: len(stages[-1])])
        return list(dict.fromkeys([stages[0], *(each for each in between if each != stages[-1]), stages[-1]]))

    def _tree(self, applied: list[Change], picked: dict[int, int]) -> Tree:
        names: dict[int, dict[str, int]] = {}
        for change in applied:
            for above, name, number in change.sets:
                if above not in names:
                    names[above] = dict(self.inodes[above].stable_names)
                _set(names[above], name, number)
        tree: Tree = {}
        root = names.get(self.ABOVE, self.inodes[self.ABOVE].stable_names).get(self.ROOT, 0)
        if root:
            self._grow(tree, "", root, names, picked)
        return tree

    def _grow(
        self, tree: Tree, path: str, number: int, names: dict[int, dict[str, int]], picked: dict[int, int]
    ) -> None:
        inode = self.inodes[number]
        if inode.kind == "file":
            content = self._contents(number)[picked[number]] if number in picked else inode.stable
            tree[path] = File(content, inode.mode if picked.get(number) else inode.stable_mode)
        elif inode.kind == "link":
            tree[path] = Link(inode.text)
        else:
            tree[path] = Directory(inode.stable_mode)
            for name, inside in names.get(number, inode.stable_names).items():
                self._grow(tree, f"{path}/{name}" if path else name, inside, names, picked)

    def now(self) -> Tree:
        """What it holds if the power stays on."""
        full = {
            number: len(self._contents(number)) - 1 for number, inode in self.inodes.items() if inode.writes
        }
        tree = self._tree(self.changes, full)
        return {
            path: entry._replace(
                mode=self.inodes[self.find([self.ROOT, *filter(None, path.split("/"))])].mode
            )
            if not isinstance(entry, Link)
            else entry
            for path, entry in tree.items()
        }


def _set(names: dict[str, int], name: str, number: int) -> None:
    if number:
        names[name] = number
    else:
        names.pop(name, None)


def _choices(options: list[int], most: int, widths: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    ends = tuple(0 for _ in options), tuple(several - 1 for several in options)
    yield from ends
    if math.prod(options) <= most:
        yield from (choice for choice in itertools.product(*map(range, options)) if choice not in ends)
        return
    for end in ends:
        for width in widths:
            for places in itertools.combinations(range(len(options)), width):
                for values in itertools.product(*(range(options[place]) for place in places)):
                    yield tuple(
                        values[places.index(place)] if place in places else value
                        for place, value in enumerate(end)
                    )
