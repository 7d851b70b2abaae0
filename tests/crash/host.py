"""This module is one prepared host: how its programs start, and what must be true of it whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from agent_core import launcher, slots
from agent_core.bundle import INDEX_NAME, Index
from agent_core.layout import Layout
from agent_core.settings import load_agent
from updater import control
from updater.device import Device

if TYPE_CHECKING:
    from tests.crash.rig import Rig

PATIENCE_S = 40.0
RUNS = "runs"
"""In ROOT: a line for each time the bad version's workload was started."""
SETTINGS = """\
[server]
url = "{url}"

[poll]
min_s = 1
max_backoff_s = 1.0

[health]
step_s = 0.05

[workload]
stop_s = 1.0

[disk]
reserve = {reserve}
"""


class Host:
    """One host, and what must be true of it whatever happened."""

    def __init__(self, rig: Rig, root: Path) -> None:
        self.rig, self.root, self.layout = rig, root, Layout(root)

    @property
    def device(self) -> Device:
        return Device.load(self.root)

    def lead_to(self, version: str, *, reserve: int = 0) -> None:
        """Point it to the server that offers this version."""
        self.layout.settings.write_text(SETTINGS.format(url=self.rig.url(version), reserve=reserve))
        load_agent(self.layout)

    # --- its programs ------------------------------------------------------------------------------------

    def launcher(self, *words: str) -> list[str]:
        return [
            sys.executable,
            "-I",
            "-S",
            "-B",
            str(self.layout.launcher_file),
            "--root",
            str(self.root),
            *words,
        ]

    def supervised(self) -> list[str]:
        return self.launcher("--supervise", "--backoff-s", "0.05", "--backoff-most-s", "0.2")

    def agent(self, version: str, *words: str) -> list[str]:
        """One of the agent's own processes, as the resident starts them."""
        program = self.layout.version_dir(self.rig.names[version]) / "agent.py"
        return [sys.executable, "-I", "-S", "-B", str(program), *words, "--root", str(self.root)]

    @contextmanager
    def running(
        self, argv: list[str] | None = None, log: Path | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """The real launcher with the real agent, until left; stopped as an operator would."""
        with open(log or os.devnull, "ab") as output:
            child = subprocess.Popen(
                argv or self.supervised(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                start_new_session=True,
            )
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()

    def rests_on(self, version: str, skipped: str = "") -> bool:
        """Whether it runs `version`, that is good, the links show it, and it knows what to skip."""
        good, record = self.rig.names[version], self.record
        return (
            record is not None
            and (record.phase, record.good) == (slots.IDLE, good)
            and slots.links_follow(self.root, record)
            and (not skipped or slots.skips(record, slots.digest_of(self.rig.names[skipped])))
            and control.read_status(self.layout).get("version") == good
            and control.is_running(self.layout)
        )

    def settle(
        self,
        version: str,
        *,
        skipped: str = "",
        again: Callable[[Host], list[str]] | None = None,
        log: Path | None = None,
    ) -> str:
        """Run it until it rests on a version and has cleared up; what is wrong, or empty.

        What is left to clear up waits for the next check, at most six hours; so it is told to check.
        """
        with self.running(again(self) if again else None, log):
            if not _comes(lambda: self.rests_on(version, skipped)):
                return f"it does not come to rest on {version}: {self.describe()}"
            if not self.garbage():
                return ""
            control.wake(self.layout)
            if not _comes(lambda: self.rests_on(version, skipped) and not self.garbage()):
                return f"it does not clear up: {self.describe()}"
        return ""

    # --- what is so --------------------------------------------------------------------------------------

    @property
    def record(self) -> slots.Record | None:
        with suppress(OSError):
            return slots.read(self.root)
        return None

    def runs(self) -> int:
        """How often the bad version's workload was started."""
        with suppress(FileNotFoundError):
            return len((self.root / RUNS).read_text().splitlines())
        return 0

    def garbage(self) -> list[str]:
        """What a clean-up should have taken away."""
        record = self.record
        keep = slots.kept(record) if record else frozenset()
        found = [f"versions/{name}" for name in names_in(self.layout.versions) if name not in keep]
        for place in (self.layout.staging, self.layout.trash, self.layout.download):
            found += [f"{place.name}/{name}" for name in names_in(place)]
        for place in (self.root, self.layout.state, self.layout.tuf, self.layout.launcher_file.parent):
            found += [str(place / name) for name in names_in(place) if _is_left_over(name)]
        return found

    def faults(self, before: slots.Record | None = None) -> list[str]:
        """What is wrong with it now, before anything was recovered.

        Args:
            before: its record before the crash: floors and skips never get lost.
        """
        found = self.false_versions()
        record = slots.believed(self.root)
        plan = launcher.decide(record, slots.complete(self.root, record))
        if before is None:
            return found
        if plan.act == launcher.REFUSE or not plan.order:
            found.append(f"the launcher finds no whole version: {plan.reason}")
        if record is None:
            return [*found, "nothing is believed to be installed"]
        if record.floor < before.floor:
            found.append(f"the floor fell from {before.floor} to {record.floor}")
        if lost := [entry for entry in before.skip if entry not in record.skip]:
            found.append(f"{lost} is no longer skipped")
        if record.boots_left > record.boots_max:
            found.append(f"{record.boots_left} boots of {record.boots_max} are left")
        return found

    def false_versions(self) -> list[str]:
        """Versions that pass for whole and are not what was signed."""
        return [
            f"versions/{name} passes for whole: {why}"
            for name in names_in(self.layout.versions)
            if slots.is_complete(self.root, name)
            and (why := _difference(self.layout.version_dir(name), name))
        ]

    def describe(self) -> str:
        links = [slots.link(self.root, name) for name in (slots.CURRENT, slots.PREVIOUS)]
        status = control.read_status(self.layout)
        said = {key: status.get(key) for key in ("version", "poll", "trial")}
        return f"{self.record} links {links} says {said} garbage {self.garbage()}"


def _comes(wanted: Callable[[], bool]) -> bool:
    """Wait for it, as long as anything may take here."""
    until_s = time.monotonic() + PATIENCE_S
    while not (found := wanted()) and time.monotonic() < until_s:
        time.sleep(0.03)
    return found


def environment() -> dict[str, str]:
    """What every program is started with: nothing of the caller's that could change what it does."""
    return {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LANG": "C.UTF-8"}


def names_in(directory: Path) -> list[str]:
    with suppress(OSError):
        return sorted(entry.name for entry in directory.iterdir())
    return []


def _is_left_over(name: str) -> bool:
    return name.startswith("tmp") or name.endswith((".new", ".tmp"))


def _difference(directory: Path, name: str) -> str:
    """Hash every file against the index, and the index against the name."""
    raw = (directory / INDEX_NAME).read_bytes()
    if sha256(raw).hexdigest()[:12] != slots.digest_of(name):
        return "its index has another digest"
    index = Index.from_bytes(raw)
    there = {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}
    if there != {file.path for file in index.files} | {INDEX_NAME}:
        return f"it holds {sorted(there)}"
    for file in index.files:
        if sha256((directory / file.path).read_bytes()).hexdigest() != file.sha256:
            return f"{file.path} has other bytes"
    return ""
