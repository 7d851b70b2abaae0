"""This module boots a real Debian with a systemd of its own, and runs commands in it.

It is a container of `systemd-nspawn --boot`: the kernel is this one, all else is the machine's. Its files are
a fresh overlay over a rootfs that mmdebstrap made once, kept outside of the house, and mounted in a mount
namespace of its own, so that nothing stays mounted. The network is the host's: what listens on loopback here
is reached from there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from release_server.demo.processes import wait_for

if TYPE_CHECKING:
    from collections.abc import Mapping

SUITES = {(3, 11): "bookworm", (3, 13): "trixie"}
"""The Debian whose Python is the one at hand, for which the bundles are built."""
PACKAGES = "systemd,systemd-sysv,dbus,python3-minimal,libpython3-stdlib"
TOOLS = ("systemd-nspawn", "mmdebstrap", "nsenter", "unshare")
PATIENCE_S = 120.0
REBOOTED = 133
"""What systemd-nspawn exits with when its machine asked for a reboot."""

_BOOT = 'mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3" "$4" && shift 4 && exec "$@"'
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def unavailable() -> str:
    """Empty, or why no machine can be booted here."""
    if os.geteuid() != 0:
        return "booting a machine needs root"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"{', '.join(missing)} not found: scripts/crash-setup installs them"
    if sys.version_info[:2] not in SUITES:
        return "no Debian has this Python, for which the bundles are built"
    return ""


def rootfs() -> Path:
    """A Debian with systemd and Python and little else; made the first time, in about a minute."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relfleet"
    made = cache / f"rootfs-{SUITES[sys.version_info[:2]]}"
    if not made.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fresh = made.with_suffix(f".{os.getpid()}")
        words = ["mmdebstrap", "--mode=root", "--variant=minbase", f"--include={PACKAGES}"]
        words += [SUITES[sys.version_info[:2]], str(fresh)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            shutil.rmtree(fresh, ignore_errors=True)
            raise RuntimeError(f"no rootfs could be made: {done.stderr[-500:]}")
        fresh.rename(made)
    return made


class Machine:
    """One machine: off, or on with a systemd of its own.

    Args:
        home: where its files are.
        binds: directories of this host that it sees, by their path in the machine.
        shown: the same, but it may not write there.
    """

    def __init__(self, home: Path, binds: Mapping[str, Path], shown: Mapping[str, Path]) -> None:
        self._home, self._binds, self._shown = home, binds, shown
        self._child: subprocess.Popen[bytes] | None = None
        self._first: psutil.Process | None = None
        self._base = rootfs()
        for part in ("upper", "work", "tree"):
            (home / part).mkdir(parents=True)

    @property
    def console(self) -> Path:
        return self._home / "console.log"

    @property
    def is_on(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def boot(self) -> None:
        """Switch it on, and wait until its systemd has started what it is to start."""
        tree = self._home / "tree"
        nspawn = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--boot", "--console=pipe"]
        nspawn += [
            f"--directory={tree}",
            f"--machine=relfleet-crash-{os.getpid()}",
            "--resolv-conf=off",
            "--timezone=off",
        ]
        nspawn += [f"--bind={here}:{there}" for there, here in self._binds.items()]
        nspawn += [f"--bind-ro={here}:{there}" for there, here in self._shown.items()]
        words = ["unshare", "--mount", "sh", "-c", _BOOT, "sh", str(self._base)]
        words += [str(self._home / "upper"), str(self._home / "work"), str(tree), *nspawn]
        with self.console.open("ab") as log:
            self._child = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                start_new_session=True,
            )
        self._first = wait_for("the machine's process 1", self._find_first, within_s=PATIENCE_S, every_s=0.05)
        wait_for("the machine to be up", self._is_up, within_s=PATIENCE_S, every_s=0.1)

    def _find_first(self) -> psutil.Process | None:
        assert self._child is not None
        if self._child.poll() is not None:
            raise RuntimeError(f"systemd-nspawn ended: {self.console.read_text()[-500:]}")
        with suppress(psutil.NoSuchProcess):
            for process in psutil.Process(self._child.pid).children(recursive=True):
                with suppress(OSError):
                    status = Path(f"/proc/{process.pid}/status").read_text()
                    if status.split("NSpid:")[1].splitlines()[0].split()[1:] == ["1"]:
                        return process
        return None

    def _is_up(self) -> bool:
        return self.ask("systemctl", "is-system-running") in ("running", "degraded")

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the machine, as root."""
        assert self._first is not None
        enter = ["nsenter", f"--target={self._first.pid}", "--mount", "--uts", "--ipc", "--pid", "--"]
        return subprocess.run(
            [*enter, "/usr/bin/env", "-i", f"PATH={_PATH}", "LC_ALL=C.UTF-8", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def ask(self, *words: str) -> str:
        """What a command prints, whatever it exits with."""
        return self.run(*words).stdout.strip()

    def do(self, *words: str) -> str:
        """What a command prints that has to succeed."""
        done = self.run(*words)
        if done.returncode:
            raise AssertionError(
                f"{' '.join(words)} exited with {done.returncode}: {done.stderr or done.stdout}"
            )
        return done.stdout.strip()

    def put(self, path: str, text: str, mode: str = "0644") -> None:
        """Write a file in it, and the directories above."""
        script = 'mkdir -p "${1%/*}" && printf %s "$2" > "$1" && chmod "$3" "$1"'
        self.do("sh", "-c", script, "sh", path, text, mode)

    def reboot(self) -> None:
        """As a person would: everything is stopped in order, then it boots anew."""
        assert self._child is not None
        self.run("systemctl", "reboot")
        code = self._child.wait(PATIENCE_S)
        assert code == REBOOTED, f"the machine ended with {code}"
        self.boot()

    def cut(self) -> None:
        """End everything in it at once; its disk keeps what was written."""
        if self._child is None:
            return
        if self._first is not None:
            with suppress(psutil.NoSuchProcess):
                self._first.kill()
        with suppress(subprocess.TimeoutExpired):
            self._child.wait(20)
        if self._child.poll() is None:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()
        self._child = self._first = None
