"""The resident agent process: one thread with timers, signals, short jobs and the product's workload.

Nothing here knows what an update is. The loop sleeps in one `select` until a timer is due, a child ended or
wrote something, or a signal or a wake-up came. No callback may block it; what would (a health check, the
checker) is a thread or a child process. Whatever a callback raises is logged and becomes a backoff: the loop
itself ends by `stop` only.

Exit-code contract with the launcher: 0 after TERM or INT, 75 when `stop(Exit.RESTART)` was asked for.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import heapq
import itertools
import json
import logging
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, Self

from agent_core import clock

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import FrameType

log = logging.getLogger(__name__)

LONGEST_SLEEP_S = 30.0
"""`select` does not count while the host sleeps, timers do; so no sleep of ours is long."""
JOB_OUTPUT = 2**20
JOB_ERRORS = 8192
FRONT_S = 5.0
STEADY_S = 60.0
"""A workload that ran so long has started well; its next crash begins the backoff anew."""

# The child ties its own life to ours before it becomes the program: `preexec_fn` would run Python between
# fork and exec of a process with threads. getppid() is asked afterwards, for a parent that died in between.
# Ignored and blocked signals outlive an exec, and Python itself ignores two; a program begins with none.
_TIED = """\
import os, signal, sys
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)
except (ImportError, OSError, AttributeError):
    pass
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    try:
        signal.signal(number, signal.SIG_DFL)
    except (OSError, ValueError):
        pass
signal.pthread_sigmask(signal.SIG_SETMASK, ())
if os.getppid() != int(sys.argv[1]):
    sys.exit(126)
try:
    os.execvp(sys.argv[2], sys.argv[2:])
except OSError as error:
    print(f"{sys.argv[2]} cannot be started: {error.strerror}", file=sys.stderr)
    sys.exit(127)
"""


@dataclass(frozen=True)
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
            "PYTHONPATH": f"{self.version_dir / 'app'}:{self.version_dir / 'lib'}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",
            "RELFLEET_ROOT": str(self.root),
            "RELFLEET_VERSION": self.version,
        }


def spawn(argv: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a child in a session of its own that the kernel kills when this process dies.

    The thread that calls this must outlive the child: the kernel ties a child to its parent thread.

    Raises:
        OSError: no process could be made. A program that is missing ends with 127 instead.
    """
    tied = [sys.executable, "-I", "-S", "-B", "-c", _TIED, str(os.getpid()), *argv]
    return subprocess.Popen(tied, start_new_session=True, **options)


def signal_group(child: subprocess.Popen[bytes] | Copy, signum: int) -> None:
    """Send a signal to a child of `spawn` and to everything in its group, dead leader or not."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signum)


def arm_deadman(seconds: float) -> None:
    """Let the kernel kill this process in `seconds` unless it is armed anew: a hung trial ends all the same.

    The default action of SIGALRM needs no code of ours to run, and `exec` keeps an alarm of the launcher's.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))


def disarm_deadman() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)


# --- the service manager --------------------------------------------------------------------------------


class Notifier:
    """Speaks to systemd, or to nobody when it is not there (sd_notify(3), without its library)."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        found = os.environ if environ is None else environ
        self._address = found.get("NOTIFY_SOCKET", "")
        watched = found.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = found.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(usec) / 1e6 if watched and usec.isdigit() and self._address else 0.0

    def tell(self, **facts: str | int) -> None:
        """Send `READY=1`, `STATUS=…`, `WATCHDOG=1`, …; a manager that is gone is no reason to stop."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        text = "\n".join(f"{name}={value}" for name, value in facts.items())
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(1.0)  # its queue is short; a READY that is dropped would be waited for
            channel.sendto(text.encode(), address)


# --- jobs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class JobResult:
    """How a job ended.

    Attributes:
        code: exit code, negative for a signal; None when it could not be started.
        answer: the JSON object that it printed; None when it printed none.
        problem: empty · `cannot-start` · `deadline` · `stopped` · `exit` (not 0) · `too-long` · `not-json`.
        errors: the end of what it said on standard error, for the log.
    """

    code: int | None
    answer: dict[str, Any] | None
    problem: str = ""
    errors: str = ""


class Job:
    """A short-lived child that prints one JSON object; see `Runtime.run_job`."""

    def __init__(self, runtime: Runtime, on_done: Callable[[JobResult], None], name: str) -> None:
        self._runtime = runtime
        self._on_done = on_done
        self.name = name
        self._child: subprocess.Popen[bytes] | None = None
        self._output = bytearray()
        self._errors = bytearray()
        self._cause = ""
        self._timers: list[Timer] = []

    def start(self, argv: Sequence[str], stdin: bytes, deadline_s: float, options: dict[str, Any]) -> None:
        try:
            given = _said_already(stdin)
            try:
                self._child = spawn(
                    argv, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options
                )
            finally:
                os.close(given)
        except OSError as error:
            result = JobResult(None, None, "cannot-start", str(error))
            self._runtime.call_soon(lambda: self._on_done(result))
            return
        assert self._child.stdout is not None
        assert self._child.stderr is not None
        self._runtime.read_from(self._child.stdout.fileno(), self._take_output)
        self._runtime.read_from(self._child.stderr.fileno(), self._take_errors)
        self._runtime.adopt(self)
        self._timers.append(self._runtime.call_later(deadline_s, lambda: self._end("deadline")))

    def stop(self) -> None:
        """End it early; `on_done` still comes."""
        self._end("stopped")

    def reap(self) -> None:
        """Finish when the child has ended; called by the loop."""
        if self._child is None or self._child.poll() is None:
            return
        child, self._child = self._child, None
        signal_group(child, signal.SIGKILL)  # what it left behind would hold the pipes open
        for pipe, take in ((child.stdout, self._take_output), (child.stderr, self._take_errors)):
            assert pipe is not None
            self._runtime.drain(pipe.fileno(), take)
            pipe.close()
        for timer in self._timers:
            timer.cancel()
        self._runtime.disown(self)
        self._on_done(self._result(child.returncode))

    @property
    def is_alive(self) -> bool:
        return self._child is not None

    def _result(self, code: int) -> JobResult:
        errors = self._errors.decode(errors="replace").strip()
        answer: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            answer = json.loads(self._output) if self._output else None
        if not isinstance(answer, dict):
            answer = None
        problem = self._cause or ("exit" if code != 0 else "" if answer is not None else "not-json")
        return JobResult(code, answer, problem, errors)

    def _take_output(self, chunk: bytes) -> None:
        self._output += chunk
        if len(self._output) > JOB_OUTPUT:
            self._output.clear()
            self._end("too-long")

    def _take_errors(self, chunk: bytes) -> None:
        self._errors += chunk
        del self._errors[:-JOB_ERRORS]

    def _end(self, cause: str) -> None:
        child = self._child
        if child is None:
            return
        self._cause = self._cause or cause
        signal_group(child, signal.SIGTERM)
        self._timers.append(self._runtime.call_later(2.0, lambda: signal_group(child, signal.SIGKILL)))


def _said_already(words: bytes) -> int:
    """The reading end of a pipe that holds all of `words`: a child that never reads cannot make us wait."""
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        os.set_blocking(writing, False)
        if words and os.write(writing, words) != len(words):
            raise OSError(errno.E2BIG, "more than a pipe holds")
    except BaseException:
        os.close(reading)
        raise
    finally:
        os.close(writing)
    return reading


class Copy:
    """A child forked from this very process, with the face of a `Popen` whose three streams are pipes.

    It gets a session of its own and dies with its parent, as a child of `spawn` does.
    """

    def __init__(self, serve: Callable[[], int]) -> None:
        pipes = [os.pipe() for _ in range(3)]
        theirs = (pipes[0][0], pipes[1][1], pipes[2][1])
        parent = os.getpid()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _serve_as_copy(serve, theirs, parent)
        for fd in theirs:
            os.close(fd)
        self.stdin = os.fdopen(pipes[0][1], "wb", buffering=0)
        self.stdout = os.fdopen(pipes[1][0], "rb", buffering=0)
        self.stderr = os.fdopen(pipes[2][0], "rb", buffering=0)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _serve_as_copy(serve: Callable[[], int], streams: Sequence[int], parent: int) -> NoReturn:
    """What the copy does; nothing of the parent's but its memory and the three streams comes along."""
    code = 1
    try:
        os.setsid()
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
        for wanted, fd in enumerate(streams):
            os.dup2(fd, wanted)
        os.closerange(3, 65_536)
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM):
            signal.signal(signum, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        logging.getLogger().handlers.clear()
        if os.getppid() == parent:
            code = serve()
    except BaseException as error:  # noqa: BLE001 - nothing may return into the parent's code
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
    finally:
        os._exit(code)


class Helper:
    """A child that answers requests, one line of JSON each, for as long as they come, then ends by itself.

    What is heavy to load is loaded once for requests that come close together, and is gone when nothing
    happens. One request is under way at a time; the others wait.

    Args:
        argv: reads a line from standard input, writes a line to standard output, and so on; it ends when its
            input does, or when it has been idle for long enough.
    """

    def __init__(self, runtime: Runtime, argv: Sequence[str], name: str) -> None:
        self._runtime = runtime
        self._argv = tuple(argv)
        self.name = name
        self._child: subprocess.Popen[bytes] | Copy | None = None
        self._waiting: deque[_Request] = deque()
        self._asked: _Request | None = None
        self._timer: Timer | None = None
        self._output = bytearray()
        self._errors = bytearray()
        self._cause = ""

    @property
    def is_busy(self) -> bool:
        return self._asked is not None or bool(self._waiting)

    @property
    def is_alive(self) -> bool:
        return self._child is not None

    def start_as_copy(self, serve: Callable[[], int]) -> None:
        """Make the first child a copy of this process, which has most of what it needs loaded already.

        Only for a process that has one thread; later children are started by `argv`, as new as any.

        Args:
            serve: what the copy does with its standard input and output; its exit code.
        """
        self._child = self._watch(Copy(serve))

    def ask(self, request: str, on_done: Callable[[JobResult], None], *, deadline_s: float) -> None:
        """Send one line; `on_done` is called in the loop, exactly once, however it ends."""
        self._waiting.append(_Request(request, on_done, deadline_s))
        self._next()

    def stop(self) -> None:
        """End the child; a request that is under way is answered with the problem `stopped`."""
        self._end("stopped")

    def reap(self) -> None:
        """Notice that the child ended; called by the loop."""
        if self._child is None or self._child.poll() is None:
            return
        child, self._child = self._child, None
        signal_group(child, signal.SIGKILL)
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        self._runtime.drain(child.stdout.fileno(), self._take_output)
        self._runtime.drain(child.stderr.fileno(), self._take_errors)
        for pipe in (child.stdin, child.stdout, child.stderr):
            with contextlib.suppress(OSError):
                pipe.close()
        self._runtime.disown(self)
        asked = self._asked
        if asked is not None and child.returncode == 0 and not asked.again and not self._cause:
            # It had gone idle just when we asked: ask its successor.
            asked.again = True
            self._asked = None
            self._waiting.appendleft(asked)
        elif asked is not None:
            self._answer(JobResult(child.returncode, None, self._cause or "exit", self._said()))
        self._cause = ""
        self._next()

    def _next(self) -> None:
        if self._asked is not None or not self._waiting:
            return
        if self._runtime.is_stopping:
            stopped = self._waiting.popleft()
            self._runtime.call_soon(lambda: stopped.on_done(JobResult(None, None, "stopped")))
            return
        self._asked = asked = self._waiting.popleft()
        try:
            child = self._child or self._start()
            assert child.stdin is not None
            child.stdin.write(asked.text.encode() + b"\n")
            child.stdin.flush()
        except BrokenPipeError:
            return  # it has just ended; `reap` goes on
        except OSError as error:
            result = JobResult(None, None, "cannot-start", str(error))
            self._runtime.call_soon(lambda: self._answer(result))
            return
        self._timer = self._runtime.call_later(asked.deadline_s, lambda: self._end("deadline"))

    def _start(self) -> subprocess.Popen[bytes] | Copy:
        pipe = subprocess.PIPE
        self._child = self._watch(spawn(self._argv, stdin=pipe, stdout=pipe, stderr=pipe))
        return self._child

    def _watch(self, child: subprocess.Popen[bytes] | Copy) -> subprocess.Popen[bytes] | Copy:
        assert child.stdout is not None
        assert child.stderr is not None
        self._output.clear()
        self._errors.clear()
        self._runtime.read_from(child.stdout.fileno(), self._take_output)
        self._runtime.read_from(child.stderr.fileno(), self._take_errors)
        self._runtime.adopt(self)
        return child

    def _take_output(self, chunk: bytes) -> None:
        self._output += chunk
        line, newline, rest = self._output.partition(b"\n")
        if newline:
            self._output = bytearray(rest)
            answer: Any = None
            with contextlib.suppress(ValueError, RecursionError):
                answer = json.loads(line)
            known = isinstance(answer, dict)
            self._answer(JobResult(0, answer if known else None, "" if known else "not-json", self._said()))
            self._next()
        elif len(self._output) > JOB_OUTPUT:
            self._output.clear()
            self._end("too-long")

    def _take_errors(self, chunk: bytes) -> None:
        self._errors += chunk
        del self._errors[:-JOB_ERRORS]

    def _said(self) -> str:
        return self._errors.decode(errors="replace").strip()

    def _answer(self, result: JobResult) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.on_done(result)

    def _end(self, cause: str) -> None:
        child = self._child
        if child is None:
            return
        self._cause = self._cause or cause
        signal_group(child, signal.SIGTERM)
        self._runtime.call_later(2.0, lambda: signal_group(child, signal.SIGKILL))


@dataclass
class _Request:
    """One line for a helper; `again` once it was sent to a child that had just gone idle."""

    text: str
    on_done: Callable[[JobResult], None]
    deadline_s: float
    again: bool = False


# --- the workload ---------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
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
        runtime: Runtime,
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


# --- the loop -------------------------------------------------------------------------------------------


class Timer:
    """One call in the future; `cancel` may come at any time."""

    def __init__(self, when_s: float, action: Callable[[], None]) -> None:
        self.when_s = when_s
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self.action = None


class Repeat:
    """An action that says itself when it wants to run next; see `Runtime.repeat`."""

    def __init__(
        self, runtime: Runtime, name: str, action: Callable[[], float], max_backoff_s: float
    ) -> None:
        self._runtime = runtime
        self._action = action
        self._max_backoff_s = max_backoff_s
        self._timer: Timer | None = None
        self.name = name
        self.failures = 0

    def wake(self, delay_s: float = 0.0) -> None:
        """Run so soon, instead of when it was due."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._runtime.call_later(delay_s, self._run)

    def cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _run(self) -> None:
        self._timer = None
        try:
            delay_s = self._action()
            self.failures = 0
        except Exception:
            self.failures += 1
            ceiling_s = min(self._max_backoff_s, 2.0 ** min(self.failures, 30))
            delay_s = ceiling_s / 2 + random.random() * ceiling_s / 2  # noqa: S311 - jitter is no secret
            log.exception(
                "tick failed", extra={"tick": self.name, "failures": self.failures, "next_s": delay_s}
            )
        if self._timer is None:  # the action may have called wake
            self.wake(delay_s)


class Runtime:
    """The agent's main loop. Made and run in the main thread; `call_soon` alone may come from others.

    Args:
        on_stop: called once when TERM or INT came, before the children are stopped.
        on_poll: called for HUP and USR1: look for an update now.
        notifier: the service manager; found in the environment when None.
        now_s: boot clock.
        stop_s: when stopping takes longer, what is left is killed.
    """

    def __init__(
        self,
        *,
        on_stop: Callable[[], None] | None = None,
        on_poll: Callable[[], None] | None = None,
        notifier: Notifier | None = None,
        now_s: Callable[[], float] = clock.boot_s,
        stop_s: float = 60.0,
    ) -> None:
        self.on_stop = on_stop
        self.on_poll = on_poll
        self.now_s = now_s
        self.notifier = notifier or Notifier()
        self._stop_s = stop_s
        self._timers: list[tuple[float, int, Timer]] = []
        self._order = itertools.count()
        self._soon: deque[Callable[[], None]] = deque()
        self._signals: deque[int] = deque()
        self._children: list[Job | Helper | Workload] = []
        self._selector = selectors.DefaultSelector()
        self._code: int | None = None
        self._told = False
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._selector.register(self._wake_read, selectors.EVENT_READ, None)
        self._restore: list[Callable[[], object]] = []

    # --- what the agent asks for -----------------------------------------------------------------------

    def call_at(self, when_s: float, action: Callable[[], None]) -> Timer:
        """Call `action` at a moment of the boot clock."""
        timer = Timer(when_s, action)
        heapq.heappush(self._timers, (when_s, next(self._order), timer))
        return timer

    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer:
        return self.call_at(self.now_s() + delay_s, action)

    def call_soon(self, action: Callable[[], None]) -> None:
        """Call `action` in the loop; safe from any thread."""
        self._soon.append(action)
        with contextlib.suppress(BlockingIOError, OSError):  # full: it will wake anyway; closed: it is over
            os.write(self._wake_write, b"\0")

    def repeat(
        self, name: str, action: Callable[[], float], *, first_s: float = 0.0, max_backoff_s: float = 300.0
    ) -> Repeat:
        """Run `action` again and again; it returns the seconds until the next time.

        When it raises, that is logged and it runs again after a growing, jittered pause: no error path
        leaves the agent without its next tick.
        """
        repeat = Repeat(self, name, action, max_backoff_s)
        repeat.wake(first_s)
        return repeat

    def run_job(
        self,
        argv: Sequence[str],
        on_done: Callable[[JobResult], None],
        *,
        deadline_s: float,
        name: str = "job",
        stdin: bytes = b"",
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> Job:
        """Run a short-lived child that prints one JSON object.

        Args:
            argv: an absolute program and its words.
            on_done: called in the loop, exactly once, however it ends.
            deadline_s: after so long it is asked to stop, and killed 2 s later.
            stdin: given to it whole; at most what a pipe holds, 64 KiB.
        """
        job = Job(self, on_done, name)
        job.start(argv, stdin, deadline_s, {"env": None if env is None else dict(env), "cwd": cwd})
        return job

    def stop(self, code: int = 0) -> None:
        """End the loop with `code` once every child is gone; safe to call again, the first code counts."""
        if self._code is None:
            self._code = int(code)
            log.info("agent stops", extra={"code": self._code})
            self.notifier.tell(STOPPING=1)
            for child in list(self._children):
                child.stop()
            self.call_later(self._stop_s, self._kill_children)

    @property
    def is_stopping(self) -> bool:
        return self._code is not None

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self.notifier.tell(STATUS=text)

    # --- the loop --------------------------------------------------------------------------------------

    def run(self) -> int:
        """Run until `stop`; the exit code."""
        self._catch_signals()
        try:
            self.call_soon(lambda: None)  # a child that ended before we caught SIGCHLD is noticed at once
            self.notifier.tell(READY=1)
            if self.notifier.watchdog_s:
                self.repeat("watchdog", self._pet_watchdog)
            while self._code is None or self._children:
                self._turn()
            return self._code
        finally:
            self.close()

    def close(self) -> None:
        """Give back signals and descriptors; idempotent."""
        while self._restore:
            self._restore.pop()()
        if self._wake_read >= 0:
            self._selector.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            self._wake_read = self._wake_write = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._sleep_s()):
            self._read(key.fd, key.data)
        while self._signals:
            self._heed(self._signals.popleft())
        for child in list(self._children):
            self._guard(child.reap)
        for _ in range(
            len(self._soon)
        ):  # what these add waits for the next turn, so none can starve the rest
            self._guard(self._soon.popleft())
        now_s = self.now_s()
        while self._timers and self._timers[0][0] <= now_s:
            timer = heapq.heappop(self._timers)[2]
            if timer.action is not None:
                self._guard(timer.action)

    def _sleep_s(self) -> float:
        if self._soon or self._signals:
            return 0.0
        while self._timers and self._timers[0][2].action is None:
            heapq.heappop(self._timers)
        due_s = self._timers[0][0] - self.now_s() if self._timers else LONGEST_SLEEP_S
        return min(max(due_s, 0.0), LONGEST_SLEEP_S)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception:
            log.exception(
                "callback failed", extra={"callback": getattr(action, "__qualname__", repr(action))}
            )

    def _pet_watchdog(self) -> float:
        self.notifier.tell(WATCHDOG=1)
        return self.notifier.watchdog_s / 3

    def _kill_children(self) -> None:
        for child in self._children:
            if isinstance(child, Workload):
                child.kill()

    # --- children and their output ---------------------------------------------------------------------

    def adopt(self, child: Job | Helper | Workload) -> None:
        """Watch a child until `disown`; while the agent stops, a new one is stopped at once."""
        self._children.append(child)
        if self._code is not None:
            child.stop()

    def disown(self, child: Job | Helper | Workload) -> None:
        self._children.remove(child)

    def read_from(self, fd: int, take: Callable[[bytes], None]) -> None:
        """Give `take` whatever comes out of `fd`."""
        os.set_blocking(fd, False)
        self._selector.register(fd, selectors.EVENT_READ, take)

    def drain(self, fd: int, take: Callable[[bytes], None]) -> None:
        """Read the rest without waiting, and look at `fd` no more; the caller closes it."""
        with contextlib.suppress(KeyError):
            self._selector.unregister(fd)
        with contextlib.suppress(OSError):
            for _ in range(64):
                chunk = os.read(fd, 65_536)
                if not chunk:
                    return
                self._guard(lambda chunk=chunk: take(chunk))  # type: ignore[misc]

    def _read(self, fd: int, take: Callable[[bytes], None] | None) -> None:
        try:
            chunk = os.read(fd, 65_536)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if take is None:
            return  # only woken up
        if chunk:
            self._guard(lambda: take(chunk))
        else:
            self._selector.unregister(fd)  # closed at the other end; `reap` does the rest

    # --- signals ---------------------------------------------------------------------------------------

    def _catch_signals(self) -> None:
        before = signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        self._restore.append(lambda: signal.set_wakeup_fd(before))
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD):
            handler = signal.signal(signum, self._note_signal)
            self._restore.append(lambda signum=signum, handler=handler: signal.signal(signum, handler))  # type: ignore[misc]

    def _note_signal(self, signum: int, _frame: FrameType | None) -> None:
        self._signals.append(signum)

    def _heed(self, signum: int) -> None:
        if signum in (signal.SIGTERM, signal.SIGINT):
            if self._told:
                self._kill_children()  # asked twice: no more waiting
                return
            self._told = True
            log.info("agent is asked to stop", extra={"signal": signal.Signals(signum).name})
            if self.on_stop is not None:
                self._guard(self.on_stop)
            self.stop(0)
        elif signum in (signal.SIGHUP, signal.SIGUSR1) and self.on_poll is not None:
            self._guard(self.on_poll)
