"""This module ends a process without taking its interpreter apart first.

Python frees every module, class and function one by one before it ends, and looks for cycles among them
twice: a sixth of the life of a process that imports much and does little, as most of ours do. The kernel
frees all of it at once.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End this process with `code`, once all that others can see of it is done.

    Threads that are not daemons are waited for, exit handlers run, both streams are written out; if one
    cannot be, the code is not 0. Nothing else is cleared away: what must be closed is closed by whoever
    opened it.
    """
    # The two that the interpreter itself begins its end with; it calls them by these names.
    threading._shutdown()  # type: ignore[attr-defined]  # noqa: SLF001
    atexit._run_exitfuncs()  # noqa: SLF001
    for stream in (sys.stdout, sys.stderr):
        if stream is None or stream.closed:  # None: its descriptor was closed when we were started
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 1
    os._exit(code)
