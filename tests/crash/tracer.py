"""This module runs a program and all it starts, and kills it just before its N-th change of a directory.

strace can inject a signal too, but counts calls by thread, wherever they go, and its fast filter loses the
signal; here a filter in the kernel (seccomp) stops a process at calls that change files and at nothing else,
the calls are counted over the whole tree of processes, and only those that touch the directory count.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import signal
import struct
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

# Each call: its number on x86-64 and on arm64 (0: not there), and which arguments name files: `p` a path
# beside the working directory, `d` a directory handle followed by a path, `f` a handle, `.` nothing.
CALLS: dict[str, tuple[int, int, str]] = {
    "open": (2, 0, "p"),
    "openat": (257, 56, "d"),
    "creat": (85, 0, "p"),
    "write": (1, 64, "f"),
    "writev": (20, 66, "f"),
    "pwrite64": (18, 68, "f"),
    "pwritev": (296, 70, "f"),
    "fsync": (74, 82, "f"),
    "fdatasync": (75, 83, "f"),
    "syncfs": (306, 267, "f"),
    "ftruncate": (77, 46, "f"),
    "truncate": (76, 45, "p"),
    "fallocate": (285, 47, "f"),
    "rename": (82, 0, "pp"),
    "renameat": (264, 38, "dd"),
    "renameat2": (316, 276, "dd"),
    "link": (86, 0, "pp"),
    "linkat": (265, 37, "dd"),
    "symlink": (88, 0, ".p"),
    "symlinkat": (266, 36, ".d"),
    "unlink": (87, 0, "p"),
    "unlinkat": (263, 35, "d"),
    "mkdir": (83, 0, "p"),
    "mkdirat": (258, 34, "d"),
    "rmdir": (84, 0, "p"),
    "chmod": (90, 0, "p"),
    "fchmod": (91, 52, "f"),
    "fchmodat": (268, 53, "d"),
    "copy_file_range": (326, 285, "..f"),
    "sendfile": (40, 71, "f"),
}
OPENING = frozenset({"open", "openat", "creat"})
MAKING = OPENING | {"mkdir", "mkdirat", "symlink", "symlinkat"}
REMOVING = frozenset({"unlink", "unlinkat", "rmdir"})
VOLATILE = "-shm"
"""SQLite's index of its log: whoever opens the database after a crash makes it anew."""
ARCHES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
LOOK_S = 0.1
MAKES = os.O_CREAT | os.O_TRUNC

_PTRACE_CONT, _PTRACE_KILL_SAFE = 7, 8
_PTRACE_SEIZE, _PTRACE_LISTEN, _PTRACE_GET_SYSCALL_INFO = 0x4206, 0x4208, 0x420E
_FORKS = 0x2 | 0x4 | 0x8  # fork, vfork, clone
_TRACESECCOMP, _EXITKILL = 0x80, 0x100000
_EVENT_SECCOMP, _EVENT_STOP = 7, 128
_WALL = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ptrace.restype = ctypes.c_long


def unavailable() -> str:
    """Why this machine cannot trace; empty when it can."""
    return "" if platform.machine() in ARCHES else f"no table of system calls for {platform.machine()}"


def steady(name: str) -> str:
    """A file's name without the part that chance chose: what is being written, or thrown away."""
    return re.sub(r"\.[0-9a-f]{8}(?=\.new$)|(?<=^trash/)(.*)\.[0-9a-f]{8}(?=/|$)", r"\1.*", name)


@dataclass(frozen=True)
class Call:
    """One call that changes the directory: its name and the files, as paths inside it."""

    name: str
    files: tuple[str, ...]

    @property
    def site(self) -> str:
        """The same for the same call of another run: random parts of names are left out."""
        return " ".join([self.name, *(steady(file) for file in self.files)])


@dataclass
class Trace:
    """How a traced run went.

    Attributes:
        calls: those that touched the directory, in order; the last one did not happen when it was killed.
        code: exit code of the first process, negative for a signal.
        killed: whether the cut was reached.
        ended: `until` was true.
        late: the run did not end in time, and was ended.
    """

    calls: list[Call] = field(default_factory=list)
    code: int = 0
    killed: bool = False
    ended: bool = False
    late: bool = False


def run(
    argv: Sequence[str],
    root: Path,
    *,
    cut: int = 0,
    only_one: bool = False,
    output: Path | None = None,
    stdin: bytes = b"",
    environ: dict[str, str] | None = None,
    until: Callable[[], bool] = lambda: False,
    at_cut: Callable[[], None] = lambda: None,
    kills: bool = True,
    limit_s: float = 60.0,
) -> Trace:
    """Run a program to its end, or up to its `cut`-th call on `root`, counted from 1.

    Args:
        argv: the program; its descendants are traced too.
        root: a resolved directory.
        cut: 0 for none.
        only_one: kill the process that makes the call; else every process of the tree.
        output: gets what it prints.
        stdin: all that it can read.
        environ: its environment.
        at_cut: called while the call waits, before anything is killed.
        kills: kill at the cut; else that is all that happens there.
        until: asked ten times a second; everything is killed when it is true.
        limit_s: after which everything is killed.
    """
    tracer = _Tracer(os.fspath(root), cut, only_one, at_cut, kills)
    with tracer.looking(until, limit_s):
        tracer.follow(tracer.start(argv, output, stdin, environ))
    return tracer.trace


class _Tracer:
    def __init__(self, root: str, cut: int, only_one: bool, at_cut: Callable[[], None], kills: bool) -> None:
        self.root, self.cut, self.only_one, self.at_cut = root, cut, only_one, at_cut
        self.kills = kills
        self.column, self.arch = ARCHES[platform.machine()]
        self.by_number = {
            numbers[self.column]: (name, numbers[2])
            for name, numbers in CALLS.items()
            if numbers[self.column]
        }
        self.trace = Trace()
        self.alive: set[int] = set()

    @contextmanager
    def looking(self, until: Callable[[], bool], limit_s: float) -> Iterator[None]:
        """Ask now and then whether this is the end; nothing of the tree outlives this."""
        latest_s = time.monotonic() + limit_s

        def look(*_: object) -> None:
            trace = self.trace
            trace.ended = trace.ended or until()
            trace.late = trace.late or (not trace.ended and time.monotonic() > latest_s)
            if trace.ended or trace.late:
                self._kill_all()

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, LOOK_S, LOOK_S)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            self._kill_all()

    def start(
        self, argv: Sequence[str], output: Path | None, stdin: bytes, environ: dict[str, str] | None
    ) -> int:
        program = _program(
            self.arch, sorted(self.by_number), CALLS["open"][self.column], CALLS["openat"][self.column]
        )
        go, ready = os.pipe()
        given, giving = os.pipe()
        os.write(giving, stdin)
        os.close(giving)
        child = os.fork()
        if child == 0:
            try:
                os.close(ready)
                os.read(go, 1)
                os.setsid()
                os.dup2(given, 0)
                where = os.open(output or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
                os.dup2(where, 1)
                os.dup2(where, 2)
                os.closerange(3, 256)
                _install(program)
                os.execve(argv[0], list(argv), environ if environ is not None else dict(os.environ))
            finally:
                os._exit(126)
        os.close(go)
        os.close(given)
        options = _FORKS | _TRACESECCOMP | _EXITKILL
        if _libc.ptrace(_PTRACE_SEIZE, child, None, options) != 0:
            code = ctypes.get_errno()
            os.kill(child, signal.SIGKILL)
            raise OSError(code, os.strerror(code), "PTRACE_SEIZE")
        self.alive.add(child)
        os.close(ready)
        return child

    def follow(self, first: int) -> None:
        while self.alive:
            try:
                pid, status = os.waitpid(-1, _WALL)
            except ChildProcessError:
                return
            if not os.WIFSTOPPED(status):
                self.alive.discard(pid)
                if pid == first:
                    self.trace.code = os.waitstatus_to_exitcode(status)
                continue
            self.alive.add(pid)
            if self.trace.killed and not self.only_one:
                # Born while the others died.
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                continue
            number, event = os.WSTOPSIG(status), status >> 16
            if event == _EVENT_SECCOMP and self._is_cut(pid):
                continue
            if event == _EVENT_STOP and number != signal.SIGTRAP:
                _libc.ptrace(_PTRACE_LISTEN, pid, None, None)
            else:
                _libc.ptrace(_PTRACE_CONT, pid, None, 0 if event else number)

    def _is_cut(self, pid: int) -> bool:
        """Note the call; kill when it is the one."""
        call = self._call(pid)
        if call is None:
            return False
        self.trace.calls.append(call)
        if self.trace.killed or len(self.trace.calls) != self.cut:
            return False
        self.at_cut()
        if not self.kills:
            return False
        self.trace.killed = True
        if self.only_one:
            with suppress(ProcessLookupError):
                os.kill(_group(pid), signal.SIGKILL)
        else:
            self._kill_all()
        return True

    def _kill_all(self) -> None:
        for pid in self.alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _call(self, pid: int) -> Call | None:
        asked = (ctypes.c_uint8 * 128)()
        if _libc.ptrace(_PTRACE_GET_SYSCALL_INFO, pid, 128, ctypes.addressof(asked)) <= 0:
            return None
        number, *arguments = struct.unpack_from("=7Q", asked, 24)
        name, shape = self.by_number[number]
        files, at = [], 0
        for letter in shape:
            if letter == "f":
                files.append(_handle(pid, arguments[at]))
            elif letter == "p":
                files.append(os.path.join(_link(pid, "cwd"), _text(pid, arguments[at])))
            elif letter == "d":
                above = (
                    _link(pid, "cwd")
                    if arguments[at] & 0xFFFFFFFF == 0xFFFFFF9C
                    else _handle(pid, arguments[at])
                )
                files.append(os.path.join(above, _text(pid, arguments[at + 1])))
                at += 1
            at += 1
        inside = [
            os.path.relpath(file, self.root) for file in files if (file + "/").startswith(self.root + "/")
        ]
        if not inside or inside[0].endswith(VOLATILE) or _changes_nothing(name, files[-1]):
            return None
        return Call(name, tuple(inside))


def _changes_nothing(name: str, file: str) -> bool:
    """A name made that is there, or taken away that is not: before it is as after it."""
    is_there = os.path.lexists(file)
    if name in MAKING:
        return is_there and (name not in OPENING or os.path.getsize(file) == 0)
    return name in REMOVING and not is_there


def _group(pid: int) -> int:
    """The process of a thread."""
    with open(f"/proc/{pid}/status", encoding="ascii") as stream:
        return next(int(line.split()[1]) for line in stream if line.startswith("Tgid:"))


def _link(pid: int, name: str) -> str:
    try:
        return os.readlink(f"/proc/{pid}/{name}")
    except OSError:
        return ""


def _handle(pid: int, number: int) -> str:
    return _link(pid, f"fd/{number & 0xFFFFFFFF}")


def _text(pid: int, address: int) -> str:
    try:
        with open(f"/proc/{pid}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            page = memory.read(4096 - address % 4096)
            if b"\0" not in page:
                page += memory.read(4096)
    except (OSError, ValueError, OverflowError):
        return ""
    return os.fsdecode(page.partition(b"\0")[0])


# --- the filter in the kernel -------------------------------------------------------------------------------


def _program(arch: int, numbers: Sequence[int], open_: int, openat: int) -> bytes:
    """A classic BPF program: stop at these calls, at opens only when they may make or empty a file."""

    def step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, k)

    load, equal, any_bit, end = 0x20, 0x15, 0x45, 0x06
    allow, stop = 0x7FFF0000, 0x7FF00000
    steps = [step(load, 4), step(equal, arch, 1, 0), step(end, allow), step(load, 0)]
    for number in numbers:
        if number in (open_, openat) and number:
            flags = 16 + 8 * (2 if number == openat else 1)
            steps += [step(equal, number, 0, 4), step(load, flags), step(any_bit, MAKES, 0, 1)]
            steps += [step(end, stop), step(end, allow)]
        else:
            steps += [step(equal, number, 0, 1), step(end, stop)]
    steps.append(step(end, allow))
    return b"".join(steps)


def _install(program: bytes) -> None:
    """Only ever in the child, before its exec; the filter is inherited by all it starts."""
    buffer = ctypes.create_string_buffer(program, len(program))
    described = struct.pack("=H6xQ", len(program) // 8, ctypes.addressof(buffer))
    if _libc.prctl(38, 1, 0, 0, 0) != 0 or _libc.prctl(22, 2, ctypes.c_char_p(described), 0, 0) != 0:
        os._exit(125)
