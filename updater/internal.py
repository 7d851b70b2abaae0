"""The agent's own processes: the resident one, and those it asks for answers, one line of JSON each."""

from __future__ import annotations

import gc
import json
import logging
import select
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_core.errors import Exit, RelfleetError, UsageError
from updater.device import Device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MOST_LINE = 65_536
CHECKER_IDLE_S = 30.0
"""Long enough for the stages of a rollout to find it loaded, short enough to be gone on a quiet day."""


def main(verb: str, words: Sequence[str]) -> int:
    """Run `VERB --root ROOT`; whatever goes wrong is one message on stderr and an exit code."""
    try:
        if len(words) != 2 or words[0] != "--root":
            raise UsageError(f"agent {verb} is run by the agent itself", then="agent --help")
        return VERBS[verb](Path(words[1]))
    except RelfleetError as error:
        sys.stderr.write(f"{error}\n")
        return int(error.exit_code)


def run(root: Path) -> int:
    """Be the resident agent."""
    from updater.service import serve

    gc.enable()
    return serve(root)


def checker(root: Path) -> int:
    """Answer `check` and `report FIGURES`, one line each, until nobody asks any more."""
    from updater import catalog, download, poll, stage  # noqa: F401 - loaded once, for all that is asked
    from updater.report import send_signed

    gc.enable()
    _log_to_stderr()
    while line := _next_line(CHECKER_IDLE_S):
        verb, _, rest = line.partition(" ")
        try:
            device = Device.load(root)
            if verb == "check":
                _answer(poll.check(device).to_json())
            else:
                _, answer = send_signed(device, figures=json.loads(rest or "{}"))
                _answer({"cohort": answer.cohort, "accepted": answer.accepted})
        except (RelfleetError, OSError, ValueError) as error:
            _answer({"problem": str(error)})
    return Exit.DONE


def report(root: Path) -> int:
    """Report under the host's key, while the checker is busy; the figures come on stdin."""
    from updater.report import send_signed

    _log_to_stderr()
    figures = json.loads(sys.stdin.buffer.read(MOST_LINE) or b"{}")
    _, answer = send_signed(Device.load(root), figures=figures)
    _answer({"cohort": answer.cohort, "accepted": answer.accepted})
    return Exit.DONE


def preflight(root: Path) -> int:
    """Show, before anything is switched, that this version imports itself and reads what it will find."""
    from tuf.api.metadata import Metadata

    import updater.catalog
    import updater.download
    import updater.service  # noqa: F401 - that they import is what is tried
    from agent_core import slots
    from agent_core.bundle import INDEX_NAME, Index

    version_dir = Path(__file__).resolve().parents[2]
    index = Index.from_bytes((version_dir / INDEX_NAME).read_bytes())
    device = Device.load(root)
    slots.read(root)
    for file in device.layout.tuf.glob("*.json"):
        Metadata.from_bytes(file.read_bytes())
    _answer({"ok": True, "version": index.version, "product": index.product})
    return Exit.DONE


VERBS: dict[str, Callable[[Path], int]] = {
    "run": run,
    "checker": checker,
    "report": report,
    "preflight": preflight,
}


def _answer(value: dict[str, Any]) -> None:
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
