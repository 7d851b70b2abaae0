"""Starts the agent: its own processes go straight to their work, people's commands through the command line.

A fleet starts the first kind thousands of times an hour, so they load no command-line library.
"""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING

from agent_core.leaving import leave

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERNAL = frozenset({"checker", "report", "preflight"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run `agent WORDS…`; the exit code (see `docs/cli.md`)."""
    words = list(sys.argv[1:] if argv is None else argv)
    verb = words[0] if words else ""
    if verb in INTERNAL or (verb == "run" and os.environ.get("RELFLEET_BOOT")):
        # These import a lot and end soon; what the collector would look for is not there yet.
        gc.disable()
        from updater import internal

        return internal.main(verb, words[1:])
    gc.set_threshold(20_000)  # most commands end before there is anything to collect
    from updater.cli import main as people

    return people(words)


if __name__ == "__main__":
    leave(main())
