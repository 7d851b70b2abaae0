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
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path

from agent_core import slots
from tests.crash import tracer
from tests.crash.host import Host, environment, names_in
from tests.crash.phases import Phase, prepare
from tests.crash.rig import BOOTS, Rig
from tests.crash.tally import Tally
from tests.crash.tracer import Call, Trace

WORKERS = 2 * (os.cpu_count() or 1)
EVERY = os.environ.get("RELFLEET_CRASH") == "all"
QUICK = 12
DECISIVE = re.compile(
    r"state/(slots|counter|spool\.high|(attempt|deltas|outcome|poll)\.json)|\.?(current|previous)(\.new)?|versions/[^/]+"
    r"|launcher/[^/]+"
)
"""What decides which version runs, and what is known of it."""


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
        phases = prepare(prepared)
        with ProcessPoolExecutor(WORKERS, get_context("fork"), _keep, (prepared,)) as pool:
            whole = {phase.name: pool.submit(_unharmed, phase) for phase in phases}
            cases = [case for phase in phases for case in _cases(phase, whole[phase.name].result(), tally)]
            if quick:
                cases = cases[:: max(1, len(cases) // QUICK)]
            left: dict[str, Case] = {}
            for case, (found, state) in tally.answers(pool, _cut, cases):
                tally.fail_each(case.name, found)
                if state:
                    left.setdefault(state, case)
            for case, found in tally.answers(pool, _recovered, left.values(), left):
                tally.fail_each(case.name, found)


def _cases(phase: Phase, unharmed: tuple[Trace, str], tally: Tally) -> list[Case]:
    whole, wrong = unharmed
    if wrong or whole.late or whole.killed or not whole.calls:
        ended = f"{whole.code}, {len(whole.calls)} calls"
        tally.fail(f"{phase.name}: it does not come to its end unharmed ({wrong or ended})")
    found = [
        Case(phase, cut, call.site) for cut, call in enumerate(whole.calls, 1) if EVERY or _matters(call, cut)
    ]
    return found if EVERY else found[:: phase.share]


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


def _unharmed(phase: Phase) -> tuple[Trace, str]:
    """The run that nobody kills, and what is wrong with what it did."""
    host = _copy(phase, f"whole-{phase.name}")
    trace = _trace(host, Case(phase, 0))
    if phase.ends and trace.code not in (0, 75):
        trace.late = True
    wrong = phase.done(host) or "; ".join([*host.faults(), *phase.faults(host)])
    _remove(host.root)
    return trace, wrong


def _cut(case: Case) -> tuple[list[str], str]:
    """What is wrong right after the kill, and a name for the state it left; the first of a state is kept."""
    phase = case.phase
    host = _copy(phase, f"{phase.name}-{case.cut}")
    before = host.record
    trace = _trace(host, case)
    found = [*host.faults(before), *phase.faults(host)]
    if trace.late:
        found.append("what was left running did not end")
    if host.runs() > BOOTS:
        found.append(f"the bad version ran {host.runs()} times, {BOOTS} are allowed")
    if trace.late or trace.ended or not trace.killed:
        _remove(host.root)
        return found, ""
    state = _state(host, phase)
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
    found = [*host.faults(before), *phase.faults(host), *([wrong] if wrong else [])]
    if host.runs() > BOOTS:
        found.append(f"the bad version ran {host.runs()} times, {BOOTS} are allowed")
    _remove(host.root)
    return found


def _remove(root: Path) -> None:
    subprocess.run(["rm", "-rf", root, root.with_suffix(".log")], check=True)


def _state(host: Host, phase: Phase) -> str:
    """A digest of everything that a restart could see, without times and without what chance named."""
    digest = sha256(f"{phase.rests} {phase.skipped} {phase.again} {phase.faults}".encode())
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
