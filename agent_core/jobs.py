"""Children that are asked for answers in JSON: a job gives one and ends, a helper one for each request.

They live in the loop of `runtime`; nothing here waits.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any

from agent_core.late import late_dataclass
from agent_core.processes import Copy, signal_group, spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agent_core.loop import Loop, Timer

JOB_OUTPUT = 2**20
JOB_ERRORS = 8192


@late_dataclass(frozen=True)
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


class _Child(ABC):
    """What a job and a helper share: the pipes of one process, and how it ends."""

    def __init__(self, loop: Loop, name: str) -> None:
        self._loop = loop
        self.name = name
        self._child: subprocess.Popen[bytes] | Copy | None = None
        self._output = bytearray()
        self._errors = bytearray()
        self._cause = ""
        self._timers: list[Timer] = []

    @property
    def is_alive(self) -> bool:
        return self._child is not None

    def stop(self) -> None:
        """End it early; whoever waits for an answer is told `stopped`."""
        self._end("stopped")

    def kill(self) -> None:
        if self._child is not None:
            signal_group(self._child, signal.SIGKILL)

    def reap(self) -> None:
        """Finish when the child has ended; called by the loop."""
        if self._child is None or self._child.poll() is None:
            return
        child, self._child = self._child, None
        for timer in self._timers:
            timer.cancel()  # its number may soon be somebody else's
        self._timers.clear()
        signal_group(child, signal.SIGKILL)  # what it left behind would hold the pipes open
        for pipe, take in ((child.stdout, self._take_output), (child.stderr, self._take_errors)):
            assert pipe is not None
            self._loop.drain(pipe.fileno(), take)
            pipe.close()
        if child.stdin is not None:
            with contextlib.suppress(OSError):
                child.stdin.close()
        self._loop.disown(self)
        assert child.returncode is not None
        self._ended(child.returncode)

    def _watch(self, child: subprocess.Popen[bytes] | Copy) -> None:
        assert child.stdout is not None
        assert child.stderr is not None
        self._child = child
        self._output.clear()
        self._errors.clear()
        self._loop.read_from(child.stdout.fileno(), self._take_output)
        self._loop.read_from(child.stderr.fileno(), self._take_errors)
        self._loop.adopt(self)

    @abstractmethod
    def _take_output(self, chunk: bytes) -> None:
        """Called in the loop with whatever it says."""

    @abstractmethod
    def _ended(self, code: int) -> None:
        """Called once a child has ended, and all it said was taken."""

    def _take_errors(self, chunk: bytes) -> None:
        self._errors += chunk
        del self._errors[:-JOB_ERRORS]

    def _said(self) -> str:
        return self._errors.decode(errors="replace").strip()

    def _end(self, cause: str) -> None:
        if self._child is None:
            return
        self._cause = self._cause or cause
        signal_group(self._child, signal.SIGTERM)
        self._timers.append(self._loop.call_later(2.0, self.kill))


def _object_in(words: bytes | bytearray) -> dict[str, Any] | None:
    """The JSON object that this is; None when it is none."""
    answer: Any = None
    with contextlib.suppress(ValueError, RecursionError):
        answer = json.loads(words)
    return answer if isinstance(answer, dict) else None


class Job(_Child):
    """A short-lived child that prints one JSON object; see `Runtime.run_job`."""

    def __init__(self, loop: Loop, on_done: Callable[[JobResult], None], name: str) -> None:
        super().__init__(loop, name)
        self._on_done = on_done

    def start(self, argv: Sequence[str], stdin: bytes, deadline_s: float, options: dict[str, Any]) -> None:
        try:
            given = _said_already(stdin)
            try:
                child = spawn(argv, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
            finally:
                os.close(given)
        except OSError as error:
            result = JobResult(None, None, "cannot-start", str(error))
            self._loop.call_soon(lambda: self._on_done(result))
            return
        self._watch(child)
        self._timers.append(self._loop.call_later(deadline_s, lambda: self._end("deadline")))

    def _ended(self, code: int) -> None:
        answer = _object_in(self._output)
        problem = self._cause or ("exit" if code != 0 else "" if answer is not None else "not-json")
        self._on_done(JobResult(code, answer, problem, self._said()))

    def _take_output(self, chunk: bytes) -> None:
        self._output += chunk
        if len(self._output) > JOB_OUTPUT:
            self._output.clear()
            self._end("too-long")


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


class Helper(_Child):
    """A child that answers requests, one line of JSON each, for as long as they come, then ends by itself.

    What is heavy to load is loaded once for requests that come close together, and is gone when nothing
    happens. One request is under way at a time; the others wait.

    Args:
        argv: reads a line from standard input, writes a line to standard output, and so on; it ends when its
            input does, or when it has been idle for long enough.
    """

    def __init__(self, loop: Loop, argv: Sequence[str], name: str) -> None:
        super().__init__(loop, name)
        self._argv = tuple(argv)
        self._waiting: deque[_Request] = deque()
        self._asked: _Request | None = None
        self._deadline: Timer | None = None

    @property
    def is_busy(self) -> bool:
        return self._asked is not None or bool(self._waiting)

    def start_as_copy(self, serve: Callable[[], int]) -> None:
        """Make the first child a copy of this process, which has most of what it needs loaded already.

        Only for a process that has one thread; later children are started by `argv`, as new as any.

        Args:
            serve: what the copy does with its standard input and output; its exit code.
        """
        self._watch(Copy(serve))

    def ask(self, request: str, on_done: Callable[[JobResult], None], *, deadline_s: float) -> None:
        """Send one line; `on_done` is called in the loop, exactly once, however it ends."""
        self._waiting.append(_Request(request, on_done, deadline_s))
        self._next()

    def _ended(self, code: int) -> None:
        asked = self._asked
        if asked is not None and code == 0 and not asked.again and not self._cause:
            # It had gone idle just when we asked: ask its successor.
            asked.again = True
            self._asked = None
            self._waiting.appendleft(asked)
        elif asked is not None:
            self._answer(JobResult(code, None, self._cause or "exit", self._said()))
        self._cause = ""
        self._next()

    def _next(self) -> None:
        if self._asked is not None or not self._waiting or self._cause:
            return  # one that is being ended answers nobody any more: `_ended` goes on with its successor
        if self._loop.is_stopping:
            while self._waiting:
                told = self._waiting.popleft().on_done
                self._loop.call_soon(partial(told, JobResult(None, None, "stopped")))
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
            self._loop.call_soon(lambda: self._answer(result))
            return
        self._deadline = self._loop.call_later(asked.deadline_s, lambda: self._end("deadline"))

    def _start(self) -> subprocess.Popen[bytes] | Copy:
        pipe = subprocess.PIPE
        child = spawn(self._argv, stdin=pipe, stdout=pipe, stderr=pipe)
        self._watch(child)
        return child

    def _take_output(self, chunk: bytes) -> None:
        self._output += chunk
        line, newline, rest = self._output.partition(b"\n")
        if newline:
            self._output = bytearray(rest)
            answer = _object_in(line)
            self._answer(JobResult(0, answer, "" if answer is not None else "not-json", self._said()))
            # Soon, not now: these may be the last words of a child that is being reaped.
            self._loop.call_soon(self._next)
        elif len(self._output) > JOB_OUTPUT:
            self._output.clear()
            self._end("too-long")

    def _answer(self, result: JobResult) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.on_done(result)


@late_dataclass()
class _Request:
    """One line for a helper; `again` once it was sent to a child that had just gone idle."""

    text: str
    on_done: Callable[[JobResult], None]
    deadline_s: float
    again: bool = False
