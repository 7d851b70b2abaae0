"""A tier: a seeded loop kills random processes of a fleet and of its server while releases come and go.

Good and bad releases are rolled out in turn to real agents under `launcher --supervise`, and every moment
some process gets SIGKILL: agents, checkers, preflights, workloads, launchers, the server and its parts. The
launchers and the server's parent are started again by the harness, as an init would; everything else has to
come back by itself. In the end every host runs the last good release, none ever kept a bad one, every record
rests, and stopping leaves no process.

One kill is spared, because it would be answered rightly with a rollback: a workload on trial that ends has
failed. Boots are plenty, so that kills alone do not use them up.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from agent_core import slots
from agent_core.errors import ConflictError, UnreachableError
from release_server.demo.processes import wait_for
from tests.integration import world as worlds
from tests.integration.world import PRODUCT, VARIANTS, Host, Variant, World

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.crash.tally import Tally

AGENTS = 6
SECONDS = 300.0
QUICK_SECONDS = 20.0
SETTLE_S = 240.0
"""After the last kill: how long restarts, backoffs and the rollout that is on its way may take."""
KILL_EVERY_S = 0.3
SEED = "RELFLEET_CHAOS_SEED"

SPARING = {"boots": 90, "deadman_s": 60}
Releases = dict[str, dict[str, str] | None]
RELEASES: Releases = {
    "3.0.0": None,
    "3.1.0-exits": {"app/main.py": "raise SystemExit(3)\n"},
    "3.2.0": None,
    "3.3.0-never-healthy": {"app/check": "exit 1\n"},
    "3.4.0": None,
    "3.5.0-agent-exits": {"lib.zip/updater/service.py": "def serve(root):\n    return 3\n"},
}
"""In turn: a good one, then one that every host must leave."""

ROLES: tuple[tuple[str, tuple[str, ...], float], ...] = (
    ("preflight", ("agent.py", "preflight"), 1),
    ("checker", ("agent.py", "checker"), 2),
    ("agent", ("agent.py", "run"), 3),
    ("launcher", ("launcher.pyz",), 2),
    ("workload", ("app/main.py",), 2),
    ("web", ("release_server.cli", "web"), 0.5),
    ("jobs", ("release_server.cli", "worker"), 0.5),
    ("signer", ("release_server.cli", "signer"), 0.5),
    ("server", ("release_server.cli", "run"), 0.5),
)
"""Name, words of its command line, and how often it is chosen beside the others."""


def unavailable() -> str:
    return "" if Path("/proc/self/cwd").exists() else "it needs /proc"


def run(tally: Tally, *, quick: bool) -> None:
    seed = int(os.environ.get(SEED, random.randrange(10**6)))
    for version, files in RELEASES.items():
        VARIANTS[version] = Variant(files or {}, SPARING | ({"boots": 2} if files else {}))
    with tempfile.TemporaryDirectory(prefix="relfleet-chaos-") as place:
        world = World(Path(place))
        worlds.PATIENCE_S = SETTLE_S
        try:
            releases = dict(list(RELEASES.items())[:2]) if quick else RELEASES
            chaos = Chaos(world, tally, seed, releases, 3 if quick else AGENTS)
            chaos.reign(QUICK_SECONDS if quick else SECONDS)
        finally:
            world.processes.stop()
            _expect_nothing_left(world.home, tally, seed)
            subprocess.run(["chmod", "-R", "u+w", place], check=False)


class Chaos:
    """One run: a world, its hosts, and the dice."""

    def __init__(self, world: World, tally: Tally, seed: int, releases: Releases, agents: int) -> None:
        self.world, self.tally, self.seed, self.releases = world, tally, seed, releases
        self.dice = random.Random(seed)
        world.make()
        world.stop_server()
        world.start_server()  # from now on at a port that does not change when it is started again
        self.cohort = world.cohort()
        self.hosts = world.hosts(*[self.cohort] * agents)
        world.publish(*releases)
        self.good = "1.0.0"

    def reign(self, seconds: float) -> None:
        until_s = time.monotonic() + seconds
        try:
            for number, version in enumerate(self.releases, 1):
                if time.monotonic() < until_s or number <= 2:  # a good one and a bad one at least
                    self._roll_out(version, until_s)
            for version in itertools.cycle([one for one in self.releases if self._is_good(one)]):
                if time.monotonic() > until_s:
                    break
                self._pin(version, until_s)
            for host in self.hosts:
                self._expect_at_rest(host)
        except UnreachableError as error:
            self._fail(str(error))

    def _is_good(self, version: str) -> bool:
        return not self.releases[version]

    def _pin(self, version: str, until_s: float) -> None:
        """There and back between releases that are there: a pin may go to an older one."""
        self.good = version
        self._await(
            "the server to answer", lambda: self.world.steer(self.cohort, "pin", version=version), 0.0
        )
        for host in self.hosts:
            self._await(f"{host.name} to follow the pin to {version}", partial(self._rests, host), until_s)

    def _roll_out(self, version: str, until_s: float) -> None:
        is_good = self._is_good(version)
        number = self._await("the server to answer", lambda: self._begin(version), 0.0)
        ended = self._await(f"the rollout of {version} to end", lambda: self._ended(number), until_s)
        wanted = ("completed", "") if is_good else ("paused", "max-failed")
        if (ended["state"], ended["reason"] if not is_good else "") != wanted:
            self._fail(f"the rollout of {version} is {ended['state']}: {ended['reason']} {ended['detail']}")
        if is_good:
            self.good = version
        else:
            self._await("the rollout to be aborted", lambda: self._abort(number), 0.0)

    def _ended(self, number: int) -> dict[str, str] | None:
        found = self.world.rollout(number)
        return found if found["state"] in ("completed", "paused") else None

    def _begin(self, version: str) -> int:
        """Start the rollout, or find it: the answer to the first request may have been lost."""
        with suppress(ConflictError):
            return self.world.roll_out(version, self.cohort, 1, "all")
        rollouts = self.world.client.items("/rollouts", product=PRODUCT, cohort=self.cohort)
        return next(int(one["id"]) for one in rollouts if one["version"] == version)

    def _abort(self, number: int) -> bool:
        with suppress(ConflictError):
            self.world.client.post(f"/rollouts/{number}/abort", {"reason": "it is bad"})
        return bool(self.world.rollout(number)["state"] == "aborted")

    def _await(self, what: str, found: Callable[[], object], until_s: float) -> Any:
        """Kill until `until_s`, start again what an init would, and ask until there is an answer."""

        def look() -> object:
            self.world.processes.revive()
            if time.monotonic() < until_s:
                self._kill_one()
            with suppress(UnreachableError):
                return found()
            return None

        limit_s = max(until_s - time.monotonic(), 0.0) + SETTLE_S
        return wait_for(what, look, within_s=limit_s, every_s=KILL_EVERY_S)

    # --- killing ---------------------------------------------------------------------------------------

    def _kill_one(self) -> None:
        there = _processes(self.world.home)
        roles = [(name, weight) for name, _, weight in ROLES if there.get(name)]
        if not roles:
            return
        (role,) = self.dice.choices([name for name, _ in roles], [weight for _, weight in roles])
        victim = self.dice.choice(there[role])
        if role == "workload" and not self._is_at_rest(victim):
            return
        with suppress(psutil.NoSuchProcess):
            victim.kill()
            self.tally.count(doing=f"killed {role}, seed {self.seed}")

    def _is_at_rest(self, workload: psutil.Process) -> bool:
        """Asked after the process was chosen, so it cannot be one that a trial begins meanwhile."""
        with suppress(psutil.Error, OSError):
            record = slots.read(Path(workload.cwd()).parents[1])
            return record is not None and record.phase == slots.IDLE
        return False

    # --- the end ---------------------------------------------------------------------------------------

    def _rests(self, host: Host) -> bool:
        return (
            host.record.phase == slots.IDLE
            and host.good == self.good
            and host.pid() is not None
            and host.news["version"] == host.record.good
            and slots.links_follow(host.root, host.record)
        )

    def _expect_at_rest(self, host: Host) -> None:
        self._await(
            f"{host.name} to rest on {self.good}; it is {host.record}", lambda: self._rests(host), 0.0
        )
        good = {self.world.digest(version) for version, files in self.releases.items() if not files}
        for digest, reason in host.skipped.items():
            if digest in good:
                self._fail(f"{host.name} skips a good release: {reason}")
        for version, files in self.releases.items():
            if files and "healthy" in host.states(version):
                self._fail(f"{host.name} kept {version}")

    def _fail(self, what: str) -> None:
        kept = self.world.home.with_name(f"{self.world.home.name}-kept")
        self.tally.fail(f"{what}\n    again: {SEED}={self.seed} python -m tests.crash chaos; logs: {kept}")
        kept.mkdir(exist_ok=True)
        for log in self.world.home.glob("*.log"):
            (kept / log.name).write_bytes(log.read_bytes())


def _processes(home: Path) -> dict[str, list[psutil.Process]]:
    """What runs of this world, by role; a copy of an agent is its checker."""
    found: dict[str, list[psutil.Process]] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            if not _is_ours(process, words, home):
                continue
            role = next((name for name, of_it, _ in ROLES if all(_has(words, word) for word in of_it)), "")
            if role == "agent" and _has(process.parent().cmdline(), "run"):  # type: ignore[union-attr]
                role = "checker"
            if role:
                found.setdefault(role, []).append(process)
    return found


def _has(words: list[str], word: str) -> bool:
    return any(part == word or part.endswith(f"/{word}") for part in words)


def _is_ours(process: psutil.Process, words: list[str], home: Path) -> bool:
    return any(str(home) in word for word in words) or process.cwd().startswith(str(home))


def _expect_nothing_left(home: Path, tally: Tally, seed: int) -> None:
    deadline_s = time.monotonic() + 20
    while (left := _left(home)) and time.monotonic() < deadline_s:
        time.sleep(0.2)
    for process in left:
        with suppress(psutil.Error):
            tally.fail(f"a process is left (seed {seed}): {' '.join(process.cmdline())}")
            process.send_signal(signal.SIGKILL)


def _left(home: Path) -> list[psutil.Process]:
    left = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.pid != os.getpid() and _is_ours(process, process.cmdline(), home):
                left.append(process)
    return left
