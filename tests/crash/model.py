"""This module is the model tier: every state of the disk that a power cut may leave, as POSIX allows it.

Each story runs once on a real directory while its journal is kept. For every moment of it, every state that
the disk may be left in is built, and the real code starts from there; its own run is cut at every moment again.
Equal states (with equal promises) are tried once. Then each operation of each story fails, once and for
good.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from tests.crash.journal import Journal, Tree
from tests.crash.life import LIFE, ROUNDS_MOST, Host, fast_motion
from tests.crash.script import BrokenPromise, Ledger, Script
from tests.crash.stories import stories
from tests.crash.watch import Fault, plant

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tests.crash.tally import Tally

CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EMFILE)
ROUNDS_OF_A_BAD_DISK = 5
CHANGES_MOST = 400
"""Of a life: three times those of the longest story. What tries without end is told so, not looked at without end."""
Cut = tuple[int, int]
"""Which change the power went after, and which of the states that it might have left."""


class Bounds(NamedTuple):
    """How far enumeration goes.

    Attributes:
        first: combinations of unsynced changes that are all tried at a cut of a story.
        widths: how many deviations at a time from the two ends are tried beyond that.
        depth: cuts in a row. What follows a cut is cut again where either nothing or all of what was not safe
            had happened, and both times into these two ends.
        shares: one of so many states is looked at, and of so many squared operations that fail.
        goes_on: whether what comes after a failure is looked at too.
    """

    first: int
    widths: tuple[int, ...]
    depth: int
    shares: int = 1
    goes_on: bool = True


FULL = Bounds(first=64, widths=(1, 2), depth=2)
QUICK = Bounds(first=1, widths=(), depth=1, shares=8)
ENDS = 2
EVERY = os.environ.get("RELFLEET_CRASH") == "all"


@dataclass
class Told:
    """What came of one story."""

    tried: int = 0
    failures: list[str] = field(default_factory=list)


class _State(NamedTuple):
    tree: Tree
    ledger: Ledger
    cuts: tuple[Cut, ...]


def unavailable() -> str:
    return ""


def run(tally: Tally, *, quick: bool) -> None:
    bounds = QUICK if quick else FULL
    tasks = [(kind, name, bounds) for kind in (explore, break_disk) for name in stories()]
    if quick:
        _count(tally, map(_task, tasks))
        return
    with multiprocessing.get_context("fork").Pool(min(2, os.cpu_count() or 1)) as pool:
        _count(tally, pool.imap_unordered(_task, tasks))


def _count(tally: Tally, results: Iterable[tuple[str, Told]]) -> None:
    for name, told in results:
        tally.count(told.tried, name)
        for sentence in told.failures:
            tally.fail(sentence)


def _task(words: tuple[Callable[[Script, Bounds], Told], str, Bounds]) -> tuple[str, Told]:
    kind, name, bounds = words
    return name, kind(stories()[name], bounds)


# --- power cuts ---------------------------------------------------------------------------------------


def explore(script: Script, bounds: Bounds) -> Told:
    """Cut a story everywhere, and what follows each cut again."""
    told, seen = Told(), set[int]()
    with playground() as place, fast_motion():
        todo = [_State(script.tree, script.ledger, ())]
        while todo and (bounds.goes_on or not told.failures):
            state = todo.pop()
            told.tried += 1
            found = _live(place, script, state, bounds, seen, told)
            todo += found[:: bounds.shares * _share(script)]
    return told


def _live(
    place: str, script: Script, state: _State, bounds: Bounds, seen: set[int], told: Told
) -> list[_State]:
    """One life from `state` to rest; the new states that a cut in it may leave."""
    depth, found, changes = len(state.cuts), list[_State](), 0
    is_cut = depth < bounds.depth and all(number < ENDS for _, number in state.cuts)
    reach = (1, ()) if depth else (bounds.first, bounds.widths)

    def step(journal: Journal, ledger: Ledger) -> None:
        nonlocal changes
        changes += 1
        if changes > CHANGES_MOST:
            raise BrokenPromise(f"it changed the disk {changes} times, and does not rest")
        for number, tree in enumerate(journal.states(*reach)):
            if (key := hash((tuple(sorted(tree.items())), ledger))) not in seen:
                seen.add(key)
                found.append(_State(tree, ledger, (*state.cuts, (changes, number))))

    def fail(why: str) -> None:
        told.failures.append(f"{script.name}, cut {_chain(state.cuts)}: {why}")

    with planted(place, state.tree) as root:
        LIFE.begin(depth)
        host = Host(root, script, state.ledger, step if is_cut else None)
        try:
            if not host.live():
                fail(f"it never comes to rest: {host.troubles[-1:]}")
        except BrokenPromise as broken:
            fail(str(broken))
    return found


def _share(script: Script) -> int:
    return 1 if EVERY else script.share


def _chain(cuts: tuple[Cut, ...]) -> str:
    return " then ".join(f"after change {change} (state {number})" for change, number in cuts) or "nowhere"


# --- a disk that refuses ------------------------------------------------------------------------------


def break_disk(script: Script, bounds: Bounds) -> Told:
    """Let each operation of a story fail, once and from then on; then the disk is well again."""
    told, step = Told(), bounds.shares**2 * _share(script)
    with playground() as place, fast_motion():
        for code in CODES:
            for stays in (False, True):
                for at in range(1, _operations(place, script, code, stays=stays) + 1, step):
                    if told.failures and not bounds.goes_on:
                        return told
                    told.tried += 1
                    fault = Fault(code, at, stays)
                    if why := _endure(place, script, fault):
                        told.failures.append(f"{script.name}, {fault}: {why}")
    return told


def _operations(place: str, script: Script, code: int, *, stays: bool) -> int:
    with planted(place, script.tree) as root:
        LIFE.begin(0)
        host = Host(root, script, script.ledger, fault=Fault(code, 10**9, stays))
        host.live()
        return host.watch.seen


def _endure(place: str, script: Script, fault: Fault) -> str:
    """Why a promise does not hold; empty when all do."""
    with planted(place, script.tree) as root:
        LIFE.begin(0)
        host = Host(root, script, script.ledger, fault=fault)
        try:
            rests = host.live(ROUNDS_OF_A_BAD_DISK if fault.stays else ROUNDS_MOST, tidy=False)
            if not rests and not fault.stays:
                return f"it never comes to rest: {host.troubles[-1:]}"
            LIFE.begin(1)
            mended = Host(root, script, host.ledger)
            return "" if mended.live() else f"mended, it never comes to rest: {mended.troubles[-1:]}"
        except BrokenPromise as broken:
            return str(broken)


# --- where it happens ---------------------------------------------------------------------------------


class playground(tempfile.TemporaryDirectory[str]):
    """A directory in memory, where fsync costs nothing; or wherever temporary files go."""

    def __init__(self) -> None:
        memory = "/dev/shm"
        super().__init__(prefix="crash-", dir=memory if os.access(memory, os.W_OK) else None)


class planted:
    """A root that holds `tree`, for one life."""

    def __init__(self, place: str, tree: Tree) -> None:
        self.above = tempfile.mkdtemp(dir=place)
        plant(f"{self.above}/{Journal.ROOT}", tree)

    def __enter__(self) -> str:
        return f"{self.above}/{Journal.ROOT}"

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.above)
