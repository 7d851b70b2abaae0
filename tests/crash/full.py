"""This module is the full-disk tier: real agents on file systems without a free block, or a free file.

The disk is filled in each phase of an upgrade and of the ways back, and in their middle. The agent stays
on the good version or goes back to it, says `no-room`, and is where it should be once there is room again.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import psutil

from agent_core import slots
from tests.crash import tracer, volumes
from tests.crash.host import PATIENCE_S, Host, environment
from tests.crash.rig import BAD, BOOTS, FLOOR, GOOD, NEW, OLD, Rig
from tests.crash.tally import Tally

KINDS = ("tmpfs", "ext4")
FULL = ("blocks", "inodes")
EVERY = 20
"""In the middle of a run the disk is filled at each so manieth change."""
WORKERS = 2 * (os.cpu_count() or 1)


@dataclass(frozen=True)
class Phase:
    """How far the host has come when its disk is full.

    Attributes:
        offer: the version that the server leads it to.
        runs: what it runs while the disk is full.
        rests: what it runs when there is room again.
        skipped: the version that is skipped, with room and without.
        says: what its log says meanwhile; nothing when it has nothing to write.
    """

    offer: str
    runs: str
    rests: str
    skipped: str = ""
    says: str = "no-room"


PHASES = {
    "nothing new begun": Phase(NEW, GOOD, NEW),
    "a good version on trial": Phase(NEW, NEW, NEW),
    "a bad version on trial": Phase(BAD, GOOD, GOOD, BAD),
    "its last boot used up": Phase(BAD, GOOD, GOOD, BAD),
    "an operator goes back": Phase(GOOD, OLD, OLD, GOOD, says=""),
}


@dataclass(frozen=True)
class Case:
    """A phase on a file system that lacks blocks or files; `at` is a call in the middle of a run, or 0."""

    kind: str
    lacks: str
    phase: str
    at: int = 0

    @property
    def name(self) -> str:
        when = f"at call {self.at} of a run with {self.phase} on offer" if self.at else f"with {self.phase}"
        return f"{self.kind} without free {self.lacks} {when}"


def unavailable() -> str:
    return volumes.unavailable() or tracer.unavailable()


def run(tally: Tally, *, quick: bool) -> None:
    """Each phase on each full file system, and every twentieth call of two whole runs; with `quick` a few."""
    with Rig() as rig, ProcessPoolExecutor(WORKERS, get_context("fork"), _begin, (rig,)) as pool:
        rig.installed(rig.home / "installed")
        cases = [Case(kind, lacks, phase) for phase in PHASES for kind in KINDS for lacks in FULL]
        for version in (NEW, BAD):
            length = pool.submit(_length, version).result()
            places = range(EVERY, length, EVERY)
            cases += [Case(KINDS[at // EVERY % 2], FULL[at // EVERY // 2 % 2], version, at) for at in places]
        for case, found in tally.answers(pool, _try, cases[::6] if quick else cases):
            tally.fail_each(case.name, found)


_rig: Rig


def _begin(rig: Rig) -> None:
    global _rig  # noqa: PLW0603 - an initializer has no other way to hand something over
    _rig = rig
    volumes.alone()


@contextmanager
def _host(kind: str, offer: str) -> Iterator[Host]:
    """An installed host on a small file system of its own."""
    place, image = (_rig.home / f"{os.getpid()}.{end}" for end in ("mnt", kind))
    image.unlink(missing_ok=True)
    small = (
        volumes.memory(place, 24, 400)
        if kind == "tmpfs"
        else volumes.mounted(kind, volumes.make(kind, image, 32), place)
    )
    with small:
        host = _rig.copy(_rig.home / "installed", place / "root")
        host.lead_to(offer)
        yield host


def _try(case: Case) -> list[str]:
    log = _rig.home / f"{os.getpid()}.log"
    log.write_text("")
    if case.at:
        return _full_at(case, log)
    phase = PHASES[case.phase]
    with _host(case.kind, phase.offer) as host:
        _bring(host, case.phase, phase.offer)
        volumes.fill(host.root.parent, case.lacks)
        found = []
        if case.phase == "an operator goes back":
            found = _goes_back(host)
        with host.running(log=log) as launcher:
            if not _comes(
                lambda: _runs(launcher.pid, host, phase.runs) and phase.says in {"", *_reasons(log)}
            ):
                found.append(
                    f"it does not run {phase.runs} and say {phase.says}: {_reasons(log)} {host.describe()}"
                )
            if phase.skipped and not _skips(host, phase.skipped):
                found.append(f"{phase.skipped} is not skipped: {host.describe()}")
            found += host.faults()
        return [*found, *_with_room(host, phase.rests, phase.skipped)]


def _full_at(case: Case, log: Path) -> list[str]:
    """Fill the disk while a run changes something; it may end on the good version or on the new one."""
    rests, skipped = (NEW, "") if case.phase == NEW else (GOOD, BAD)
    with _host(case.kind, case.phase) as host:
        before = host.record

        def is_calm() -> bool:
            record = host.record
            rested = host.rests_on(rests, skipped)
            return rested or (
                record is not None and record.phase == slots.IDLE and "no-room" in _reasons(log)
            )

        trace = tracer.run(
            host.supervised(),
            host.root,
            cut=case.at,
            kills=False,
            at_cut=lambda: volumes.fill(host.root.parent, case.lacks),
            environ=environment(),
            output=log,
            until=is_calm,
        )
        found = host.faults(before)
        if trace.late and (host.record or slots.Record()).phase != slots.TRIAL:
            found.append(f"it neither rests nor says no-room: {_reasons(log)} {host.describe()}")
        return [*found, *_with_room(host, rests, skipped)]


def _with_room(host: Host, rests: str, skipped: str) -> list[str]:
    volumes.room(host.root.parent)
    wrong = host.settle(rests, skipped=skipped)
    return [f"with room again {wrong}"] if wrong else []


def _bring(host: Host, phase: str, offer: str) -> None:
    """Bring the host as far as the phase says, with room."""
    if phase in ("nothing new begun", "an operator goes back"):
        return
    check = host.agent(GOOD, "checker")
    subprocess.run(check, input=b"check\n", env=environment(), check=True, stdout=subprocess.PIPE)
    slots.begin_trial(host.root, _rig.names[offer], BOOTS, 20, floor=FLOOR)
    for _ in range(BOOTS if phase == "its last boot used up" else 0):
        slots.boot(host.root, "")


def _goes_back(host: Host) -> list[str]:
    argv = host.agent(GOOD, "rollback", "--yes")
    done = subprocess.run(argv, env=environment(), capture_output=True, check=False)
    return [] if done.returncode == 0 else [f"agent rollback: {done.stderr.decode()}"]


def _length(version: str) -> int:
    """How many calls a whole run makes with room."""
    with _host("tmpfs", version) as host:
        rests, skipped = (NEW, "") if version == NEW else (GOOD, BAD)
        argv, until = host.supervised(), lambda: host.rests_on(rests, skipped)
        return len(tracer.run(argv, host.root, environ=environment(), until=until).calls)


def _skips(host: Host, version: str) -> bool:
    record = host.record
    return record is not None and slots.skips(record, slots.digest_of(_rig.names[version]))


def _runs(launcher: int, host: Host, version: str) -> bool:
    """Whether the resident agent is of this version; on a full disk its status cannot say so."""
    program = str(host.layout.version_dir(_rig.names[version]) / "agent.py")
    try:
        children = psutil.Process(launcher).children(recursive=True)
        return any({program, "run"} <= set(child.cmdline()) for child in children)
    except psutil.NoSuchProcess:
        return False


def _reasons(log: Path) -> set[str]:
    """The reasons of failed polls that its log names."""
    found = set()
    for line in log.read_text().splitlines():
        if line.startswith("{"):
            found.add(json.loads(line).get("relfleet", {}).get("reason", ""))
    return found - {""}


def _comes(wanted: Callable[[], bool]) -> bool:
    until_s = time.monotonic() + PATIENCE_S
    while not (found := wanted()) and time.monotonic() < until_s:
        time.sleep(0.05)
    return found
