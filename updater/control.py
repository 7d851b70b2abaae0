"""How people on the host and the resident agent talk: one request file, one status file, one lock.

The resident agent is the one writer of the record while it runs. A command therefore leaves a request and a
signal; only where no agent runs does it take the lock and do the deed itself.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import signal
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from agent_core import clock, disk, slots
from agent_core import layout as durable
from agent_core.errors import RelfleetError
from agent_core.late import late_dataclass
from agent_core.wire import VERSION, Getter
from updater import notes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent_core.layout import Layout
    from updater.device import Device

ROLLBACK, RETRY, ACTIVATE = "rollback", "retry", "activate"
VERBS = (ROLLBACK, RETRY, ACTIVATE)
_NAME = re.compile(rf"({VERSION.pattern}-[0-9a-f]{{12}})?")
"""Of a version's directory, or none; whatever else a request names would lead out of `versions/`."""


@late_dataclass(frozen=True)
class Request:
    """What a person asked for.

    Attributes:
        verb: `rollback`, `retry` (forget what failed) or `activate` (put a staged version on trial).
        name: of the version's directory: what to go back to, empty for the version before; what to activate.
    """

    verb: str
    name: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"verb": self.verb, "name": self.name}


def carry_out(device: Device, request: Request) -> slots.Record:
    """Do what was asked; the record as it is afterwards.

    Raises:
        slots.IllegalTransitionError: the record does not allow it; nothing was changed.
        OSError, RelfleetError: the record cannot be written, or the version to be activated not be read.
    """
    root, seen = device.layout.root, device.seen()
    retry_epoch = seen.directive.retry_epoch if seen else 0
    match request.verb:
        case "rollback":
            return slots.go_back(root, retry_epoch, request.name)
        case "activate":
            from updater.activation import activate_by_hand  # seldom needed, and it brings zstd

            return activate_by_hand(device, request.name, retry_epoch)
        case _:
            return slots.unskip(root)


# --- the request file -----------------------------------------------------------------------------------


def _request_file(layout: Layout) -> Path:
    return layout.state / "request.json"


def leave_request(layout: Layout, request: Request) -> None:
    notes.write(_request_file(layout), request.to_json())


def read_request(layout: Layout) -> Request | None:
    """The request that waits; one that makes no sense is taken away."""
    with suppress(RelfleetError):
        body = durable.read_json(_request_file(layout))
        if body is None:
            return None
        get = Getter(body, "request")
        verb, name = get.text("verb"), get.text("name", "", form=_NAME)
        if verb in VERBS and (name or verb != ACTIVATE):
            return Request(verb, name)
    forget_request(layout)
    return None


def forget_request(layout: Layout) -> None:
    notes.forget(_request_file(layout))
    disk.fsync_dir(layout.state)


# --- who runs -------------------------------------------------------------------------------------------


@contextmanager
def alone(layout: Layout) -> Iterator[bool]:
    """Hold the launcher's lock for a moment; False when a launcher, and so an agent, has it."""
    handle = slots.open_lock(layout.root)
    try:
        try:
            disk.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        disk.close(handle)


def wake(layout: Layout) -> bool:
    """Tell the resident agent to look at once; False when none is known."""
    if not is_running(layout):
        return False
    with suppress(ProcessLookupError, PermissionError):
        os.kill(read_status(layout)["pid"], signal.SIGUSR1)
        return True
    return False


def is_running(layout: Layout) -> bool:
    """Whether the resident agent of this root runs now."""
    pid = read_status(layout).get("pid")
    return isinstance(pid, int) and _is_agent(pid, layout)


def _is_agent(pid: int, layout: Layout) -> bool:
    """Whether this process is the agent of this root: a number may be another program's by now."""
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as stream:  # noqa: PTH123 - not a file on a disk
            words = stream.read().split(b"\0")
    except OSError:
        return False
    return b"run" in words and os.fsencode(str(layout.root)) in words


# --- the status file ------------------------------------------------------------------------------------


NOTHING_NEW = "fine, nothing new"  # how a poll ended that was answered, and needed no check


def show(layout: Layout, name: str, workload_pid: int | None, **what: str) -> None:
    """Keep what `agent status` prints beside the record; not fsynced, it is only news."""
    status = read_status(layout)
    if status.get("pid") != os.getpid():
        status = {}
    status |= {"pid": os.getpid(), "version": name, "workload_pid": workload_pid, **what}
    status["at"] = clock.iso(clock.now())
    file = layout.state / "status.json"
    with suppress(RelfleetError):
        notes.replace(file, lambda: durable.write_news(file, json.dumps(status).encode()))


def read_status(layout: Layout) -> dict[str, Any]:
    """The resident agent's last news; empty when there is none."""
    with suppress(RelfleetError):
        status = durable.read_json(layout.state / "status.json", {})
        return status if isinstance(status, dict) else {}
    return {}


# --- backoff across restarts ----------------------------------------------------------------------------


def remember_backoff(layout: Layout, failures: int, wait_s: float) -> None:
    """Keep the backoff, so that a restart does not end it; nothing is written while all is well."""
    file = layout.state / "backoff.json"
    if failures == 0:
        notes.forget(file)
        return
    with suppress(RelfleetError):
        until_s = int(clock.now().timestamp() + wait_s)
        notes.write(file, {"failures": failures, "until_s": until_s, "wait_s": wait_s})


def recall_backoff(layout: Layout, most_s: float) -> tuple[int, float]:
    """Failures in a row so far, and the seconds still to wait; a clock that jumped never makes it longer.

    Nor does the note itself: whatever it says, nobody waits longer than `most_s`.
    """
    with suppress(RelfleetError):
        body = durable.read_json(layout.state / "backoff.json")
        if body is not None:
            get = Getter(body, "backoff")
            left_s = get.integer("until_s") - clock.now().timestamp()
            return get.integer("failures"), min(max(0.0, left_s), get.number("wait_s"), most_s)
    return 0, 0.0
