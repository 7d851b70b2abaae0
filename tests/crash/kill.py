"""This module is the kill tier: real agents, killed before each call that changes their directory.

An upgrade, each way back and a first install are cut into phases with a prepared host each. Every phase is
run once unharmed; then once for each call that changed a file under ROOT, and all is killed before that call.
What is left is checked at once, then the host is started as after a reboot, and must come to rest where it
would have without the kill. Kills that leave the same files are recovered once.

Two more phases are a whole upgrade and a whole way back under a launcher that stays. Only the process that
makes the call is killed there (the agent, its checker, or what the launcher is about to become), and the
others have to see to it.
"""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from agent_core import slots
from tests.crash import tracer
from tests.crash.host import Host, environment, names_in
from tests.crash.rig import BAD, BOOTS, FLOOR, GOOD, NEW, Rig
from tests.crash.tally import Tally
from tests.crash.tracer import Call, Trace

WORKERS = 2 * (os.cpu_count() or 1)
EVERY = os.environ.get("RELFLEET_CRASH") == "all"
QUICK = 12
DECISIVE = re.compile(
    r"state/(slots|counter|spool\.high|attempt\.json|outcome\.json|poll\.json)|\.?(current|previous)(\.new)?|versions/[^/]+"
)
"""What decides which version runs, and what is known of it."""


@dataclass(frozen=True)
class Phase:
    """One stretch of a flow, which is run from a prepared host.

    Attributes:
        start: the directory that is copied for each case.
        argv: what runs, of a host.
        ends: where that run comes to its end by itself; empty when the program ends.
        rests: the version on which it comes to rest, killed or not.
        skipped: the version that is skipped then.
        unasked: where it rests when it was killed before what a person asked for was on the disk.
        only_one: one process is killed, not all.
        again: how it is started again; the launcher if not said.
    """

    name: str
    start: Path
    argv: Callable[[Host], list[str]]
    rests: str
    stdin: bytes = b""
    skipped: str = ""
    unasked: str = ""
    only_one: bool = False
    ends: bool = True
    again: Callable[[Host], list[str]] | None = None


@dataclass(frozen=True)
class Case:
    """A phase that is killed before its `cut`-th call; `call` is that of the unharmed run."""

    phase: Phase
    cut: int
    call: str = ""

    @property
    def name(self) -> str:
        return f"{self.phase.name} killed before call {self.cut} ({self.call})"


def unavailable() -> str:
    return tracer.unavailable()


def run(tally: Tally, *, quick: bool) -> None:
    """Every call of every phase; with `quick` a handful of them."""
    with Rig() as prepared:
        phases = _phases(prepared)
        with ProcessPoolExecutor(WORKERS, get_context("fork"), _keep, (prepared,)) as pool:
            whole = {phase.name: pool.submit(_unharmed, phase) for phase in phases}
            cases = [case for phase in phases for case in _cases(phase, whole[phase.name].result(), tally)]
            if quick:
                cases = cases[:: max(1, len(cases) // QUICK)]
            left: dict[str, Case] = {}
            for case, (found, state) in _each(pool, _cut, cases):
                tally.count(doing=case.name)
                _note(tally, case, found)
                if state:
                    left.setdefault(state, case)
            for case, found in _each(pool, _recovered, list(left.values()), list(left)):
                tally.count(doing=case.name)
                _note(tally, case, found)


def _note(tally: Tally, case: Case, found: list[str]) -> None:
    for sentence in found:
        tally.fail(f"{case.name}: {sentence}")


def _each(
    pool: ProcessPoolExecutor, work: Callable[..., Any], cases: list[Case], *more: list[Any]
) -> Iterator[Any]:
    jobs = {pool.submit(work, *given): given[0] for given in zip(cases, *more, strict=True)}
    try:
        for job in as_completed(jobs):
            yield jobs[job], job.result()
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise


# --- the phases ---------------------------------------------------------------------------------------------


def _phases(prepared: Rig) -> list[Phase]:
    """Prepare a host for each phase by letting a phase before it come to its end."""
    home = prepared.home / "starts"
    home.mkdir()
    first = prepared.enrolled(home / "enrolled")
    prepared.installed(home / "installed")

    def become(name: str, source: str, version: str, *steps: Callable[[Host], object]) -> Path:
        host = prepared.copy(home / source, home / name)
        host.lead_to(version)
        for step in steps:
            step(host)
        return host.root

    def check(host: Host) -> None:
        done = subprocess.run(
            host.agent(GOOD, "checker"),
            input=b"check\n",
            env=environment(),
            check=True,
            stdout=subprocess.PIPE,
        )
        assert b'"candidate": "1' in done.stdout, done.stdout

    def arm(host: Host) -> None:
        outcome = host.device.outcome()
        assert outcome
        slots.begin_trial(host.root, outcome.candidate, BOOTS, 20, floor=FLOOR)

    def use_up(host: Host) -> None:
        for _ in range(BOOTS):
            slots.boot(host.root, "")

    return [
        Phase("check", become("check", "installed", NEW), _checker, NEW, b"check\n"),
        Phase("arm", become("arm", "installed", NEW, check), _launcher, NEW),
        Phase("trial", become("trial", "arm", NEW, arm), _launcher, NEW, ends=False),
        Phase("judged", become("judged", "installed", BAD, check, arm), _launcher, GOOD, skipped=BAD),
        Phase("used up", become("used-up", "judged", BAD, use_up), _launcher, GOOD, skipped=BAD, ends=False),
        Phase(
            "operator",
            become("operator", "trial", NEW, lambda host: _rested(host, NEW)),
            _operator,
            GOOD,
            skipped=NEW,
            unasked=NEW,
        ),
        Phase("first", first.root, _run, GOOD, ends=False, again=_run),
        Phase(
            "upgrade", become("upgrade", "installed", NEW), Host.supervised, NEW, only_one=True, ends=False
        ),
        Phase(
            "way back",
            become("way-back", "installed", BAD),
            Host.supervised,
            GOOD,
            skipped=BAD,
            only_one=True,
            ends=False,
        ),
    ]


def _rested(host: Host, version: str) -> None:
    wrong = host.settle(version)
    assert not wrong, wrong


def _checker(host: Host) -> list[str]:
    return host.agent(GOOD, "checker")


def _launcher(host: Host) -> list[str]:
    return host.launcher()


def _operator(host: Host) -> list[str]:
    return host.agent(NEW, "rollback", "--yes")


def _run(host: Host) -> list[str]:
    """What a person types on a new host."""
    return [sys.executable, "-I", "-B", "-m", "updater", "run", "--root", str(host.root)]


def _cases(phase: Phase, whole: Trace, tally: Tally) -> list[Case]:
    if whole.late or whole.killed or not whole.calls:
        tally.fail(
            f"{phase.name}: it does not come to its end unharmed ({whole.code}, {len(whole.calls)} calls)"
        )
    found = [
        Case(phase, cut, call.site) for cut, call in enumerate(whole.calls, 1) if EVERY or _matters(call, cut)
    ]
    return found if EVERY or not phase.only_one else found[::4]


def _matters(call: Call, cut: int) -> bool:
    """Whether `make crash` has time for it: all that decides what runs, and every sixth of the rest.

    A kill before an fsync leaves what a kill before the next call leaves: the kernel keeps what was written.
    """
    if call.name in ("fsync", "fdatasync", "syncfs"):
        return False
    return cut % 6 == 0 or any(DECISIVE.fullmatch(file) for file in call.files)


# --- what the workers do ----------------------------------------------------------------------------------

_rig: Rig
"""The workers' own; they are forked, so it is the parent's as it was."""


def _keep(prepared: Rig) -> None:
    global _rig  # noqa: PLW0603 - an initializer has no other way to hand something over
    _rig = prepared


def _copy(phase: Phase, name: str) -> Host:
    return _rig.copy(phase.start, _rig.home / name)


def _trace(host: Host, case: Case) -> Trace:
    phase = case.phase
    return tracer.run(
        phase.argv(host),
        host.root,
        cut=case.cut,
        only_one=phase.only_one,
        stdin=phase.stdin,
        environ=environment(),
        output=host.root.with_suffix(".log"),
        until=lambda: not phase.ends and host.rests_on(phase.rests, phase.skipped),
    )


def _unharmed(phase: Phase) -> Trace:
    host = _copy(phase, f"whole-{phase.name}")
    trace = _trace(host, Case(phase, 0))
    if phase.ends and trace.code not in (0, 75):
        trace.late = True
    _remove(host.root)
    return trace


def _cut(case: Case) -> tuple[list[str], str]:
    """What is wrong right after the kill, and a name for the state it left; the first of a state is kept."""
    host = _copy(case.phase, f"{case.phase.name}-{case.cut}")
    before = host.record
    trace = _trace(host, case)
    found = host.faults(before)
    if trace.late:
        found.append("what was left running did not end")
    if host.runs() > BOOTS:
        found.append(f"the bad version ran {host.runs()} times, {BOOTS} are allowed")
    if trace.late or trace.ended or not trace.killed:
        _remove(host.root)
        return found, ""
    state = _state(host, case.phase)
    try:
        host.root.rename(_rig.home / f"left-{state}")
    except OSError:
        _remove(host.root)
    return found, state


def _recovered(case: Case, state: str) -> list[str]:
    """Start what a kill left as after a reboot; what is wrong when it has come to rest."""
    phase = case.phase
    host = Host(_rig, _rig.home / f"left-{state}")
    before = host.record
    rests, skipped = phase.rests, phase.skipped
    if phase.unasked and before is not None and before.good == _rig.names[phase.unasked]:
        rests, skipped = phase.unasked, ""
    wrong = host.settle(rests, skipped=skipped, again=phase.again)
    found = [*host.faults(before), *([wrong] if wrong else [])]
    if host.runs() > BOOTS:
        found.append(f"the bad version ran {host.runs()} times, {BOOTS} are allowed")
    _remove(host.root)
    return found


def _remove(root: Path) -> None:
    subprocess.run(["rm", "-rf", root, root.with_suffix(".log")], check=True)


def _state(host: Host, phase: Phase) -> str:
    """A digest of everything that a restart could see, without times and without what chance named."""
    digest = sha256(f"{phase.rests} {phase.skipped} {phase.again}".encode())
    unread = {host.layout.logs, *host.layout.staging.iterdir(), *host.layout.trash.iterdir()}
    digest.update(
        b"staging" * bool(names_in(host.layout.staging)) + b"trash" * bool(names_in(host.layout.trash))
    )
    for place, directories, files in os.walk(host.root):
        directories[:] = sorted(name for name in directories if Path(place, name) not in unread)
        for name in sorted([*files, *directories]):
            path = Path(place, name)
            inside = tracer.steady(str(path.relative_to(host.root)))
            digest.update(f"\0{inside} {path.lstat().st_mode:o} ".encode())
            if path.is_symlink():
                digest.update(bytes(path.readlink()))
            elif path.is_file():
                digest.update(_content(host, path))
    return digest.hexdigest()[:16]


def _content(host: Host, path: Path) -> bytes:
    layout = host.layout
    if path == layout.slots:
        return repr(
            [replace(one, boot_id="") if one else None for one in slots.Slots(host.root)._both()]
        ).encode()
    if path.name.startswith(layout.spool.name):
        return _rows(path) if path == layout.spool else b""
    if path.name.endswith(".new") or path.is_relative_to(layout.staging) or path.is_relative_to(layout.trash):
        return b""  # thrown away unread
    body = path.read_bytes()
    if path.parent == layout.state and ".json" in path.name:
        return re.sub(rb"\d{4}-\d\d-\d\dT[0-9:.]+Z|\b\d{3,}\b(\.\d+)?|\d+\.\d+", b"#", body)
    return body


def _rows(path: Path) -> bytes:
    """What a restart would find in the spool: its rows without their times."""
    beside = Path(f"{path}.read")
    try:
        for tail in ("", "-journal"):
            with suppress(FileNotFoundError):
                shutil.copy(f"{path}{tail}", f"{beside}{tail}")
        with closing(sqlite3.connect(beside)) as database:
            rows = [line for line in database.iterdump() if line]
        return re.sub(r"\d{4}-\d\d-\d\dT[0-9:.]+Z", "#", "\n".join(rows)).encode()
    except sqlite3.Error:
        return path.read_bytes()
    finally:
        for one in path.parent.glob(f"{beside.name}*"):
            one.unlink()
