"""The checker: a short-lived process for what is heavy to load; one request a line, one answer a line."""

from __future__ import annotations

import gc
import json
import logging
import select
import sys
from typing import TYPE_CHECKING, Any

from agent_core.errors import DiskError, Exit, MalformedError, NotFoundError, RelfleetError, SettingsError
from updater.device import Device, Outcome

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)

MOST_LINE = 65_536
IDLE_S = 60.0
"""Long enough for the stages of a rollout to find it loaded, short enough to be gone on a quiet day."""


def serve(root: Path) -> int:
    """Answer `check` and `report FIGURES`, one line each, until nobody asks any more."""
    gc.enable()
    _log_to_stderr()
    while line := _next_line(IDLE_S):
        verb, _, rest = line.partition(" ")
        try:
            if verb == "check":
                answer(_check(root))
            else:
                answer(_report(Device.load_running(root), rest))
        except (RelfleetError, OSError, ValueError) as error:
            answer({"problem": str(error)})
    return Exit.DONE


def report_once(root: Path) -> int:
    """Report under the host's key, while the checker is busy; the figures come on stdin."""
    _log_to_stderr()
    answer(_report(Device.load_running(root), sys.stdin.buffer.read(MOST_LINE).decode()))
    return Exit.DONE


def _check(root: Path) -> dict[str, Any]:
    """TUF is loaded by the first check, and stays; a quiet day's reports need none of it."""
    try:
        device = Device.load(root)
    except (SettingsError, NotFoundError, MalformedError, DiskError) as error:
        return _refused(Device.load_running(root), error).to_json()
    from updater import catalog, download, poll, stage  # noqa: F401 - all of it, before anything is begun

    return poll.check(device).to_json()


def _refused(device: Device, error: RelfleetError) -> Outcome:
    """What cannot be read of this host is an outcome as well; the server hears of it at once."""
    from updater import poll

    before, outcome = device.outcome(), Outcome.of_failure(error)
    try:
        device.remember_outcome(outcome)
    except (RelfleetError, OSError) as problem:
        log.warning("the outcome could not be kept", extra={"why": str(problem)})
    if before is None or (before.reason, before.detail) != (outcome.reason, outcome.detail):
        poll.tell(device)
    return outcome


def _report(device: Device, figures: str) -> dict[str, Any]:
    from updater.report import send_signed

    _, said = send_signed(device, figures=json.loads(figures or "{}"))
    return {"cohort": said.cohort, "accepted": said.accepted}


def answer(value: dict[str, Any]) -> None:
    """One line of JSON on standard output, at once."""
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _next_line(idle_s: float) -> str:
    """The next request; empty when there is none for `idle_s` seconds, or never will be."""
    ready, _, _ = select.select([sys.stdin.buffer], [], [], idle_s)
    return sys.stdin.buffer.readline(MOST_LINE).decode().strip() if ready else ""


def _log_to_stderr() -> None:
    """What is logged goes to the resident agent, which keeps the end of it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s: %(why)s", defaults={"why": ""}))
    logging.getLogger().addHandler(handler)
