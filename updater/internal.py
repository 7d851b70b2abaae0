"""The agent's own processes: the resident one, and those it asks for answers, one line of JSON each."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from agent_core.errors import Exit, RelfleetError, UsageError
from updater import checker
from updater.device import Device

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


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
    """Be the resident agent.

    What was imported by now stays, here and in the checker, a copy of this process: a collector that looked
    at it would find nothing, and write into every page that the two could have shared.
    """
    from updater.service import serve

    gc.freeze()
    gc.enable()
    return serve(root)


def preflight(root: Path) -> int:
    """Show, before anything is switched, that this version imports itself and reads what it will find."""
    import updater.catalog
    import updater.download
    import updater.service  # noqa: F401 - that they import is what is tried

    # isort: split
    from agent_core.bundle import INDEX_NAME, Index

    version_dir = Path(__file__).resolve().parents[2]
    index = Index.from_bytes((version_dir / INDEX_NAME).read_bytes())
    read_what_is_here(root)
    checker.answer({"ok": True, "version": index.version, "product": index.product})
    return Exit.DONE


def read_what_is_here(root: Path) -> None:
    """Read settings, identity, record and metadata; raises what their readers do when this version cannot."""
    from tuf.api.metadata import Metadata

    from agent_core import slots
    from updater import known

    device = Device.load(root)
    slots.read(root)
    for content in known.contents(device.layout):
        Metadata.from_bytes(content)


VERBS: dict[str, Callable[[Path], int]] = {
    "run": run,
    "checker": checker.serve,
    "report": checker.report_once,
    "preflight": preflight,
}
