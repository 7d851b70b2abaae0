"""The demo's processes: commands that end, and the server and agents that go on until the demo does."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from agent_core.errors import RelfleetError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

MODULES = {
    "release": "release_server.publish.cli",
    "release-server": "release_server.cli",
    "agent": "updater",
}
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


@contextmanager
def _undisturbed() -> Iterator[Callable[[], None]]:
    """Ctrl-C waits until a child is started and known; what the child does before it becomes the program.

    It is an exception, and Python drops those of the hooks that it runs around a fork: the demo went on.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})

    def die_with_parent() -> None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

    try:
        yield die_with_parent
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Processes:
    """Starts the project's own commands as a person would, and leaves none behind.

    Args:
        home: where commands keep what they would keep in a home directory.
        log: file that collects what they say on standard error.
    """

    def __init__(self, home: Path, log: Path) -> None:
        self._log = log
        self._kept: dict[str, subprocess.Popen[bytes]] = {}
        self._again: dict[str, Callable[[], None]] = {}
        own = {name: value for name, value in os.environ.items() if not name.startswith("RELFLEET_")}
        self.environ = {
            **own,
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_STATE_HOME": str(home / "state"),
            "NO_COLOR": "1",
        }

    def _argv(self, command: str, words: tuple[str, ...]) -> list[str]:
        return [sys.executable, "-m", MODULES[command], *words]

    def begin(
        self, command: str, *words: str, cwd: Path | None = None, stdin: str | None = None
    ) -> subprocess.Popen[str]:
        """Start a command; `finish` waits for it."""
        with self._log.open("a") as log, _undisturbed() as die_with_parent:
            child = subprocess.Popen(
                self._argv(command, words),
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=cwd,
                env=self.environ,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
            )
        if stdin is not None and child.stdin is not None:
            child.stdin.write(stdin)
            child.stdin.close()
            child.stdin = None
        return child

    def finish(self, child: subprocess.Popen[str], *, codes: tuple[int, ...] = (0,)) -> str:
        """What the command printed.

        Raises:
            RelfleetError: it ended with a code that the demo does not expect.
        """
        printed, _ = child.communicate(timeout=180)
        if child.returncode not in codes:
            words = " ".join(child.args[2:]) if isinstance(child.args, list) else str(child.args)
            raise RelfleetError(
                f"the demo's command failed: {words}",
                why=f"exit {child.returncode}",
                then=f"read the end of {self._log}",
            )
        return printed

    def run(self, command: str, *words: str, cwd: Path | None = None) -> str:
        return self.finish(self.begin(command, *words, cwd=cwd))

    def ask(self, command: str, *words: str, cwd: Path | None = None) -> Any:
        """What the command prints under --json."""
        return json.loads(self.run(command, *words, "--json", cwd=cwd))

    def keep(self, name: str, argv: list[str], log: Path) -> None:
        """Start something that goes on until `stop`; `revive` starts it again when it is killed."""
        self._again[name] = lambda: self.keep(name, argv, log)
        with log.open("ab") as out, _undisturbed() as die_with_parent:
            self._kept[name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=self.environ,
                start_new_session=True,
                preexec_fn=die_with_parent,  # noqa: PLW1509 - this process has one thread
            )

    def keep_command(self, name: str, command: str, *words: str, log: Path) -> None:
        self.keep(name, self._argv(command, words), log)

    def pids(self) -> dict[str, int]:
        """What goes on, by name."""
        return {name: child.pid for name, child in self._kept.items()}

    def revive(self) -> None:
        """Start again what was killed, as an init system would."""
        for name, child in list(self._kept.items()):
            if child.poll() is not None:
                self._again[name]()

    def wait_for(self, what: str, found: Callable[[], Any], *, within_s: float, every_s: float = 0.25) -> Any:
        """As the function of that name, with everything kept alive meanwhile."""

        def look() -> Any:
            self.revive()
            return found()

        return wait_for(what, look, within_s=within_s, every_s=every_s)

    def stop(self) -> None:
        """End everything: TERM, then KILL for what does not listen."""
        for child in self._kept.values():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 15
        for child in self._kept.values():
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()
        self._kept.clear()


def wait_for(what: str, found: Callable[[], Any], *, within_s: float, every_s: float = 0.25) -> Any:
    """Ask again until the answer is true.

    Raises:
        UnreachableError: it did not become true in time.
    """
    deadline = time.monotonic() + within_s
    while True:
        answer = found()
        if answer:
            return answer
        if time.monotonic() > deadline:
            raise UnreachableError(f"the demo waited {within_s:g} s in vain for {what}", reason="timeout")
        time.sleep(every_s)
