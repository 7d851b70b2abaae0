"""Child processes whose lives are tied to ours, and our own to a timer of the kernel's."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import selectors
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

LAST_WORDS = 200
"""Bytes of a child's output that are kept to say why it failed."""
TRIES = 3
"""How often a preflight, a hook or a check runs while others end it, as the kernel does without memory."""

# The child ties its own life to ours before it becomes the program: `preexec_fn` would run Python between
# fork and exec of a process with threads. getppid() is asked afterwards, for a parent that died in between.
# Ignored and blocked signals outlive an exec, and Python itself ignores two; a program begins with none.
# A host spawns a health check a second: `_signal` is the half of `signal` that works, without the names for
# people, which take longer to load than all the rest.
_TIED = """\
import os, sys
import _signal as signal
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


def finish(child: subprocess.Popen[bytes], limit_s: float, most: int) -> tuple[bool, list[bytes]]:
    """Wait for a child that leads a session of its own, then end whatever it started.

    Args:
        child: its standard output is a pipe; so may its errors be.
        limit_s: seconds, of which a host that sleeps uses up none.
        most: bytes that are kept of each pipe, the last ones.

    Returns:
        Whether it ended by itself in time, and what is kept: of its output, then of its errors.
    """
    pipes = [pipe for pipe in (child.stdout, child.stderr) if pipe is not None]
    tails = {pipe.fileno(): b"" for pipe in pipes}
    try:
        ended = _listen(child, tails, limit_s, most)
    finally:
        # The leader is reaped after its group was killed: until then its number can be nobody else's.
        signal_group(child, signal.SIGKILL)
        child.wait()
        for pipe in pipes:
            pipe.close()
    return ended, list(tails.values())


def was_killed(code: int | None) -> bool:
    """Whether somebody else ended it, or what it waited for, so that its end says nothing of the program.

    A shell whose last command was killed ends with 128 and the signal's number, as POSIX has it. A program
    that means something else by that is asked more often, and is heard in the end.
    """
    return code in (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGKILL, 128 + signal.SIGTERM)


def finish_one(start: Callable[[], subprocess.Popen[bytes]], limit_s: float) -> str:
    """Run what `start` starts to its end; once more while somebody else ends it, `TRIES` times in all.

    Args:
        start: its output is a pipe, and its errors go there too.
        limit_s: seconds for all tries together: whoever waits has one bound, and a late try may be too short.

    Returns:
        Why it failed, with its last words in one line; empty when it ended with 0.

    Raises:
        OSError: it could not be started.
    """
    killed, deadline_s = 0, time.monotonic() + limit_s
    while True:
        child = start()
        ended, tails = finish(child, max(0.0, deadline_s - time.monotonic()), LAST_WORDS)
        says_something = not (ended and was_killed(child.returncode))
        if says_something or killed == TRIES - 1 or time.monotonic() >= deadline_s:
            break
        killed += 1
    if not ended:
        return f"took longer than {limit_s:g} s" + (f", {killed} killed before included" if killed else "")
    words = " ".join(tails[0].decode(errors="replace").split())
    return f"exit {child.returncode}{': ' if words else ''}{words}" if child.returncode else ""


def _listen(child: subprocess.Popen[bytes], tails: dict[int, bytes], limit_s: float, most: int) -> bool:
    """Whether it ended in time; `tails` is what it said. What it left behind may hold a pipe for ever."""
    deadline_s = time.monotonic() + limit_s
    ended, reads_left = False, 16
    with selectors.DefaultSelector() as selector:
        for fd in tails:
            os.set_blocking(fd, False)
            selector.register(fd, selectors.EVENT_READ)
        while reads_left and time.monotonic() < deadline_s + (1.0 if ended else 0.0):
            ended = os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
            reads_left -= ended
            if not selector.get_map() and not ended:
                time.sleep(0.02)
                continue
            ready = selector.select(0 if ended else 0.05)
            if ended and not ready:
                break
            for key, _ in ready:
                chunk = os.read(key.fd, 65_536)
                tails[key.fd] = (tails[key.fd] + chunk)[-most:]
                if not chunk:
                    selector.unregister(key.fd)
    return ended


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


def arm_deadman(seconds: float) -> None:
    """Let the kernel kill this process in `seconds` unless it is armed anew: a hung trial ends all the same.

    The default action of SIGALRM needs no code of ours to run, and `exec` keeps an alarm of the launcher's.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))


def disarm_deadman() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
