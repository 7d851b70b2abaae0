"""Samples this host once a second into a bounded spool of JSON lines, until it is told to stop."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from datetime import UTC, datetime
from typing import Any

import samplers
from settings import Settings, data_directory, load_settings
from spool import Spool


def sample(settings: Settings) -> dict[str, Any]:
    """One line of the spool; a sampler that fails says so in its own place and spoils no other."""
    line: dict[str, Any] = {
        "at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "boot_s": time.clock_gettime(time.CLOCK_BOOTTIME),
        "version": os.environ.get("RELFLEET_VERSION", ""),
    }
    for name, sampler in samplers.SAMPLERS.items():
        try:
            line[name] = sampler(settings)
        except Exception as error:  # noqa: BLE001 - a host without a sensor must still report the rest
            line[name] = {"error": f"{type(error).__name__}: {error}"}
    return line


def main() -> int:
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    directory = data_directory()
    settings = load_settings(directory)
    spool = Spool(directory, settings.spool_bytes)
    due = time.monotonic()
    while not stop.is_set():
        try:
            spool.append(sample(settings))
        except OSError as error:  # a full disk passes; an agent that gave up would not come back
            print(f"a sample was lost: {error}", file=sys.stderr, flush=True)
        # Samples stay a whole interval apart; those that a suspended host missed are not made up for.
        due = max(due + settings.interval_s, time.monotonic())
        stop.wait(due - time.monotonic())
    return 0


if __name__ == "__main__":
    sys.exit(main())
