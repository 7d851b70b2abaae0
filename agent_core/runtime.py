"""The resident agent process: one thread with timers, signals, short jobs and the product's workload.

Nothing here knows what an update is. The loop sleeps in one `select` until a timer is due, a child ended or
wrote something, or a signal or a wake-up came. No callback may block it; what would (a health check, the
checker) is a thread or a child process. Whatever a callback raises is logged and becomes a backoff: the loop
itself ends by `stop` only.

Exit-code contract with the launcher: 0 after TERM or INT, 75 when `stop(Exit.RESTART)` was asked for.
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import logging
import os
import random
import selectors
import signal
from collections import deque
from typing import TYPE_CHECKING, Self

from agent_core import clock
from agent_core.jobs import Job
from agent_core.loop import Timer
from agent_core.notify import Notifier

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from types import FrameType

    from agent_core.jobs import JobResult
    from agent_core.loop import Child

log = logging.getLogger(__name__)

LONGEST_SLEEP_S = 30.0
"""`select` does not count while the host sleeps, timers do; so no sleep of ours is long."""


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
        self._children: list[Child] = []
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
            child.kill()

    # --- children and their output ---------------------------------------------------------------------

    def adopt(self, child: Child) -> None:
        """Watch a child until `disown`; while the agent stops, a new one is stopped at once."""
        self._children.append(child)
        if self._code is not None:
            child.stop()

    def disown(self, child: Child) -> None:
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
