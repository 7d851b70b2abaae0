"""The product's own program: where it runs, what it says, and how it is started again."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

from agent_core.late import late_dataclass
from agent_core.processes import signal_group, spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from agent_core.loop import Loop, Timer

log = logging.getLogger(__name__)

STEADY_S = 60.0
"""A workload that ran so long has started well; its next crash begins the backoff anew."""


@late_dataclass(frozen=True)
class Place:
    """Where a version lives and runs: what the placeholders of a signed argv stand for.

    Attributes:
        root: the device's ROOT.
        version_dir: the resolved directory of the version, never a path through `current`.
        version: as the manifest says it.
    """

    root: Path
    version_dir: Path
    version: str

    @property
    def python(self) -> str:
        """The version's own interpreter when it brings one, else the one that runs the agent."""
        own = self.version_dir / "python" / "bin" / "python3"
        return str(own) if own.exists() else sys.executable

    def argv(self, template: Sequence[str]) -> list[str]:
        """Fill in the placeholders; a program named by a relative path is one of the version's own files."""
        values = {"{python}": self.python, "{version_dir}": str(self.version_dir), "{root}": str(self.root)}
        argv = []
        for word in template:
            filled = word
            for placeholder, value in values.items():
                filled = filled.replace(placeholder, value)
            argv.append(filled)
        if argv and not argv[0].startswith("/"):
            argv[0] = str(self.version_dir / argv[0])
        return argv

    def environment(self) -> dict[str, str]:
        """The environment of the workload and of its checks.

        What the service manager said to the agent, and the agent's own settings (a proxy's password may be
        among them), stay with the agent.
        """
        own = {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID"}
        kept = {
            name: value
            for name, value in os.environ.items()
            if name not in own and not name.startswith("RELFLEET_")
        }
        return {
            **kept,
            "PYTHONPATH": ":".join(str(self.version_dir / place) for place in ("app", "lib.zip", "lib")),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "RELFLEET_ROOT": str(self.root),
            "RELFLEET_VERSION": self.version,
        }


class BoundedLog:
    """The workload's output in one file and a few older ones; a full disk costs lines, never the workload."""

    def __init__(self, path: Path, *, max_bytes: int = 4 * 2**20, files: int = 3) -> None:
        self.path = path
        self.max_bytes = max_bytes
        self.files = files
        self.lost_bytes = 0
        self._fd = -1
        self._length = 0

    def write(self, chunk: bytes) -> None:
        try:
            if self._fd < 0:
                self._open()
            if self._length and self._length + len(chunk) > self.max_bytes:
                self._rotate()
            written = os.write(self._fd, chunk)
            self._length += written
            self.lost_bytes += len(chunk) - written
        except OSError as error:
            if not self.lost_bytes:
                log.warning(
                    "output of the workload is lost", extra={"why": str(error), "file": str(self.path)}
                )
            self.lost_bytes += len(chunk)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _open(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._length = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        self.close()
        for number in range(self.files, 0, -1):
            older = self._numbered(number - 1)
            with contextlib.suppress(FileNotFoundError):
                older.replace(self._numbered(number))
        if self.files == 0:
            self.path.unlink(missing_ok=True)
        self._open()

    def _numbered(self, number: int) -> Path:
        return self.path.with_name(f"{self.path.name}.{number}") if number else self.path


@late_dataclass(frozen=True)
class Ended:
    """One end of the workload that nobody asked for.

    Attributes:
        code: exit code, negative for a signal; None when it could not be started at all.
        after_s: how long it had run.
    """

    code: int | None
    after_s: float


class Workload:
    """The product's own program, a child in a session of its own.

    Outside a trial a workload that ends is started again, later each time, for ever (a crash-looping good
    version never flips back). On trial it is started again `exits_allowed` times at most, then left for the
    gate to judge. The kernel kills it when the agent dies, so two never run side by side.

    Args:
        runtime: the loop it lives in.
        place: the version it belongs to.
        entry: argv with placeholders, from the signed index.
        output: where its stdout and stderr go.
        stop_s: time between TERM and KILL.
        max_backoff_s: longest pause before it is started again.
        exits_allowed: starts again so often at most; None: for ever.
        on_end: told of every end that was not asked for.
    """

    def __init__(
        self,
        runtime: Loop,
        place: Place,
        entry: Sequence[str],
        output: BoundedLog,
        *,
        stop_s: float = 10.0,
        first_backoff_s: float = 1.0,
        max_backoff_s: float = 300.0,
        exits_allowed: int | None = None,
        on_end: Callable[[Ended], None] | None = None,
    ) -> None:
        self._runtime = runtime
        self._place = place
        self._entry = tuple(entry)
        self._output = output
        self._stop_s = stop_s
        self._first_backoff_s = first_backoff_s
        self._on_end = on_end
        self.max_backoff_s = max_backoff_s
        self.exits_allowed = exits_allowed
        self.exits = 0
        self.restarts = 0
        self.started_s: float | None = None
        self.last_end: Ended | None = None
        self._failed_starts = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._wanted = False
        self._again: Timer | None = None
        self._kill: Timer | None = None
        self._then: list[Callable[[], None]] = []

    @property
    def pid(self) -> int | None:
        """Its process, or None while it does not run."""
        return self._child.pid if self._child is not None else None

    @property
    def is_alive(self) -> bool:
        return self._child is not None

    def start(self) -> None:
        """Start it; does nothing when it runs. A failure to start counts as an end and is retried alike."""
        self._wanted = True
        if self._child is not None:
            return
        if self._again is not None:
            self._again.cancel()
            self._again = None
        now_s = self._runtime.now_s()
        try:
            child = spawn(
                self._place.argv(self._entry),
                cwd=self._place.version_dir,
                env=self._place.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except OSError as error:
            log.warning("workload cannot be started", extra={"why": str(error)})
            self._ended(None, now_s, now_s)
            return
        assert child.stdout is not None
        self._child = child
        self.started_s = now_s
        self._runtime.read_from(child.stdout.fileno(), self._output.write)
        self._runtime.adopt(self)
        log.info("workload started", extra={"pid": child.pid, "version": self._place.version})

    def stop(self, then: Callable[[], None] | None = None) -> None:
        """Ask it to stop, kill it `stop_s` later; `then` is called when it is gone. Idempotent."""
        self._wanted = False
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if then is not None:
            self._then.append(then)
        child = self._child
        if child is None:
            self._stopped()
        elif self._kill is None:
            signal_group(child, signal.SIGTERM)
            self._kill = self._runtime.call_later(self._stop_s, lambda: signal_group(child, signal.SIGKILL))

    def kill(self) -> None:
        """Stop it without asking."""
        self._wanted = False
        if self._child is not None:
            signal_group(self._child, signal.SIGKILL)

    def reap(self) -> None:
        """Notice that it ended; called by the loop."""
        if self._child is None or self._child.poll() is None:
            return
        child, self._child = self._child, None
        signal_group(child, signal.SIGKILL)  # its own children must not live beside its successor
        assert child.stdout is not None
        self._runtime.drain(child.stdout.fileno(), self._output.write)
        child.stdout.close()
        self._runtime.disown(self)
        if self._kill is not None:
            self._kill.cancel()
            self._kill = None
        if self._wanted:
            now_s = self._runtime.now_s()
            self._ended(child.returncode, self.started_s or now_s, now_s)
        else:
            log.info("workload stopped", extra={"code": child.returncode})
            self._stopped()

    def _stopped(self) -> None:
        self._output.close()
        waiting, self._then = self._then, []
        for then in waiting:
            then()

    def _ended(self, code: int | None, started_s: float, now_s: float) -> None:
        self.exits += 1
        self.last_end = Ended(code, now_s - started_s)
        self._failed_starts = 1 if self.last_end.after_s >= STEADY_S else self._failed_starts + 1
        if self.exits_allowed is None or self.exits <= self.exits_allowed:
            pause_s = min(self.max_backoff_s, self._first_backoff_s * 2.0 ** min(self._failed_starts - 1, 30))
            self._again = self._runtime.call_later(pause_s, self._start_again)
            log.warning("workload ended, it will be started again", extra={"code": code, "in_s": pause_s})
        else:
            log.warning("workload ended on trial", extra={"code": code, "after_s": self.last_end.after_s})
        if self._on_end is not None:
            self._on_end(self.last_end)

    def _start_again(self) -> None:
        self._again = None
        if self._wanted and not self._runtime.is_stopping:
            self.restarts += 1
            self.start()
