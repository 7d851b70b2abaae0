"""This module starts the version that should run: it decides by the record, then becomes that version.

It lies outside every bundle, as one file with `slots` and `disk`, and outlives the versions it starts. So it
needs no other library, and runs on the host's own Python as `python -I -S -B launcher.pyz --root ROOT`.
Without `--supervise` it replaces itself by the agent; with it, it stays, and starts the agent again. To it,
exit 75 says start me again at once, exit 0 after TERM or INT says done, and all else is a crash.
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from typing import Optional, Tuple

from agent_core import disk, slots

LAUNCHER = 2
"""What this launcher can do; a release may ask for a newer one. The agent reads it in RELFLEET_LAUNCHER."""

RESTART = 75
RUN, TRY, ROLL_BACK, REFUSE = "run", "try", "roll-back", "refuse"
BOOTS_USED_UP, DEAD_MAN = "boots-used-up", "dead-man"
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPPING = (signal.SIGTERM, signal.SIGINT)
WATCHED = frozenset({*FORWARDED, signal.SIGCHLD})
STEADY_S = 60.0
"""An agent that lived this long has recovered: the next crash waits the shortest time again."""
RESTARTS_MOST = 20
"""More restarts at once than this within `STEADY_S` are a loop, whatever the agent says."""
SWEEP_S = 3.0
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass(frozen=True)
class Plan:
    """What to do, the good versions to start (the next if one cannot be), and why to refuse or go back."""

    act: str
    order: Tuple[str, ...] = ()
    reason: str = ""


def decide(record: Optional[slots.Record], complete: frozenset[str], dead_man: bool = False) -> Plan:
    """Say what to start: the candidate while it has boots, else good, else previous, never a third.

    Those of the record's versions that are whole are `complete`; `dead_man` ended the last start, or did not.
    """
    if record is None:
        return Plan(REFUSE, reason="nothing is installed")
    sound = tuple(name for name in dict.fromkeys((record.good, record.previous)) if name in complete)
    if record.phase == slots.ROLLBACK:
        return Plan(ROLL_BACK, sound, record.reason)
    if record.phase == slots.TRIAL and record.candidate not in complete:
        return Plan(ROLL_BACK, sound, slots.DISK)
    if record.phase == slots.TRIAL and record.boots_left < 1:
        return Plan(ROLL_BACK, sound, DEAD_MAN if dead_man else BOOTS_USED_UP)
    if record.phase == slots.TRIAL:
        return Plan(TRY, sound)
    if not sound:
        return Plan(REFUSE, reason=f"neither {record.good} nor {record.previous} is whole")
    return Plan(RUN, sound)


def start(root: str, mode: str, dead_man: bool = False) -> int:
    """Become the version that should run; returns, with an exit code, only when none can be started."""
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # one that comes before the agent listens must not end it
    try:
        record = slots.recover(root)
    except OSError as error:
        say(f"the record cannot be recovered: {error}")
        record = slots.believed(root)
    plan = decide(record, slots.complete(root, record), dead_man)
    if plan.act == TRY:
        _try_candidate(root, mode)
    elif plan.act == ROLL_BACK:
        _roll_back(root, plan.reason)
    for name in plan.order:
        say(f"{name} cannot be started: {_become(root, name, mode)}")
    say(f"{root}: {plan.reason or 'nothing can be started'}\n  next: agent run --root {root}")
    return 1


def _try_candidate(root: str, mode: str) -> None:
    """Count a boot, then become the candidate; returns when a good version has to run instead."""
    try:
        record = slots.boot(root, slots.host_boot_id())
    except (OSError, slots.IllegalTransitionError) as error:
        # What cannot be counted must not be tried: it would be tried for ever.
        say(f"the trial is put off, its boot cannot be recorded: {error}")
        return
    failure = _become(root, record.candidate, mode, alarm_s=record.deadman_s)
    say(f"{record.candidate} cannot be started ({record.boots_left} boots left): {failure}")
    if record.boots_left < 1:
        _roll_back(root, BOOTS_USED_UP)


def _roll_back(root: str, reason: str) -> None:
    try:
        record = slots.roll_back(root, reason)
        say(f"rolled back to {record.good}: {reason}")
    except (OSError, slots.IllegalTransitionError) as error:
        say(f"the rollback ({reason}) cannot be recorded, the good version runs all the same: {error}")


def _become(root: str, name: str, mode: str, alarm_s: int = 0) -> OSError:
    """Replace this process by a version, by its own path; the error is why that failed."""
    place = os.path.join(os.path.realpath(root), "versions", name)
    own = os.path.join(place, "python", "bin", "python3")
    words = ["-I", "-S", "-B", f"{place}/agent.py", "run", "--root", os.path.realpath(root)]
    environment = {**os.environ, "RELFLEET_BOOT": mode, "RELFLEET_LAUNCHER": str(LAUNCHER)}
    # The alarm outlives exec, and so does an ignored or blocked SIGALRM, which would disarm it.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.alarm(alarm_s)
    try:
        python = own if disk.exists(own) else sys.executable
        os.execve(python, [python, *words], environment)
    except OSError as error:
        return error


class Restarts:
    """How long to wait for a new start: `least_s` after a crash, then twice that, up to `most_s`."""

    def __init__(self, least_s: float, most_s: float) -> None:
        self.least_s, self.most_s, self.crashes = least_s, most_s, 0
        self.recent: list[float] = []

    def wait_s(self, now_s: float, lived_s: float, at_once: bool) -> float:
        """Seconds to wait after a run of `lived_s`; `at_once` when it should be none."""
        if lived_s >= STEADY_S:
            self.crashes = 0
        if at_once:
            self.recent = [moment for moment in self.recent if now_s - moment < STEADY_S] + [now_s]
            if len(self.recent) <= RESTARTS_MOST:
                return 0.0
        self.crashes += 1
        return min(self.most_s, self.least_s * 2.0 ** min(self.crashes - 1, 30))


def supervise(root: str, least_s: float = 1.0, most_s: float = 60.0) -> int:
    """Keep the agent running until TERM or INT; returns the exit code of this process."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, WATCHED)
    restarts, code = Restarts(least_s, most_s), 0
    while True:
        before, began_s = slots.seq_on_trial(root), time.monotonic()
        code, stop = _watch(_spawn(root, mask, dead_man=code == -signal.SIGALRM))
        _sweep()
        if stop:
            return _stopped(root, code, stop)
        after, now_s = slots.seq_on_trial(root), time.monotonic()
        # A start that could not be counted is no progress: only counted boots may follow each other at once.
        at_once = code == RESTART or (after is not None and after != before)
        wait_s = restarts.wait_s(now_s, now_s - began_s, at_once)
        if code != RESTART or wait_s:
            say(f"the agent ended with {code}; it starts again in {wait_s:g} s")
        if _stop_within(wait_s):
            return 0


def _spawn(root: str, mask: set[int], dead_man: bool) -> int:
    """Start a child that becomes the agent; it ends when this process does, however that ends."""
    parent = os.getpid()
    if child := os.fork():
        return child
    code = 1
    try:
        os.setsid()  # what kills the agent's process group must not kill its watcher
        _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # TERM would leave one that hangs, and the lock with it
        if os.getppid() == parent:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            code = start(root, "supervised", dead_man)
    except BaseException:  # noqa: BLE001 - a forked child must never return into its parent's loop
        traceback.print_exc()
    finally:
        os._exit(code)


def _watch(child: int) -> Tuple[int, int]:
    """Wait for the agent and hand it the signals that come; its exit code, and the signal to stop, or 0."""
    stop = 0
    while (code := _reap(child)) is None:
        number = signal.sigwaitinfo(WATCHED).si_signo
        if number in FORWARDED:
            stop = number if number in STOPPING else stop
            with suppress(ProcessLookupError):
                os.kill(child, number)
    return code, stop


def _reap(child: int) -> Optional[int]:
    """Collect every process that ended, orphans of the agent among them; the agent's exit code if it did."""
    code, ended = None, -1
    with suppress(ChildProcessError):
        while ended:
            ended, status = os.waitpid(-1, os.WNOHANG)
            if ended and ended == child:
                code = os.waitstatus_to_exitcode(status)
    return code


def _children() -> set[int]:
    with suppress(OSError), open("/proc/thread-self/children", encoding="ascii") as stream:
        return {int(word) for word in stream.read().split()}
    return set()


def _sweep() -> None:
    """End what a dead agent left behind, as systemd would: two workloads at once would fight over ports."""
    until_s = time.monotonic() + SWEEP_S
    told: set[int] = set()
    while True:
        if _reap(0) or not (left := _children()):
            return
        late = time.monotonic() > until_s
        for child in left if late else left - told:
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL if late else signal.SIGTERM)
        told |= left
        signal.sigtimedwait({signal.SIGCHLD}, 0.2)


def _stopped(root: str, code: int, stop: int) -> int:
    """The exit code after TERM or INT; a clean stop does not count against a trial."""
    if code not in (0, RESTART, -stop):
        return code if code > 0 else 128 - code
    with suppress(OSError, slots.IllegalTransitionError):
        slots.refund(root)
    return 0


def _stop_within(wait_s: float) -> bool:
    """Wait; true as soon as a signal asks to stop."""
    until_s = time.monotonic() + wait_s
    while True:
        received = signal.sigtimedwait(WATCHED, max(0.0, until_s - time.monotonic()))
        if received is None or received.si_signo in STOPPING:
            return received is not None


def _prctl(option: int, value: int) -> None:
    """Best effort: without it orphans go to init, and a killed launcher leaves its agent running."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def say(message: str) -> None:
    """One line for the journal; a closed stderr stops nothing."""
    with suppress(OSError, ValueError):
        print(f"launcher: {message}", file=sys.stderr, flush=True)


def lock(root: str) -> bool:
    """Take ROOT for this process and the agent it becomes (also after exec); false when another has it."""
    handle = slots.open_lock(root)
    os.set_inheritable(handle, True)
    with suppress(BlockingIOError):
        disk.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


def main(words: Optional[list[str]] = None) -> int:
    """The command `launcher.pyz`; its exit code, unless this process becomes the agent."""
    parser = argparse.ArgumentParser(prog="launcher", description="Starts the version that should run.")
    parser.add_argument("--root", required=True, help="the device's directory")
    parser.add_argument("--supervise", action="store_true", help="stay, and start it again when it ends")
    parser.add_argument("--refund", action="store_true", help="give back the boot of a stopped trial")
    parser.add_argument("--self-test", action="store_true", help="say what would start, and start nothing")
    parser.add_argument("--backoff-s", type=float, default=1.0, help="wait after a crash (%(default)s)")
    parser.add_argument("--backoff-most-s", type=float, default=60.0, help="longest wait (%(default)s)")
    asked = parser.parse_args(words)
    try:
        if asked.self_test:
            from agent_core import self_test

            return self_test.tell(asked.root)
        if lock(asked.root):
            if asked.refund:
                return _stopped(asked.root, code=0, stop=0)
            steady = (asked.root, asked.backoff_s, asked.backoff_most_s)
            return supervise(*steady) if asked.supervise else start(asked.root, "exec")
        say(f"another launcher runs in {asked.root}")
    except OSError as error:
        say(f"{asked.root} cannot be used: {error}")
    return 1
