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
from collections import deque
from typing import TYPE_CHECKING, Any

from agent_core.late import late_dataclass
from agent_core.processes import Copy, signal_group, spawn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agent_core.runtime import Runtime, Timer

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


@late_dataclass()
class _Request:
    """One line for a helper; `again` once it was sent to a child that had just gone idle."""

    text: str
    on_done: Callable[[JobResult], None]
    deadline_s: float
    again: bool = False
