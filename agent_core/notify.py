"""Speaks to the service manager."""

from __future__ import annotations

import contextlib
import os
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


class Notifier:
    """Speaks to systemd, or to nobody when it is not there (sd_notify(3), without its library)."""

    def __init__(self, environ: Mapping[str, str] | None = None) -> None:
        found = os.environ if environ is None else environ
        self._address = found.get("NOTIFY_SOCKET", "")
        watched = found.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usec = found.get("WATCHDOG_USEC", "")
        self.watchdog_s = int(usec) / 1e6 if watched and usec.isdigit() and self._address else 0.0

    def tell(self, **facts: str | int) -> None:
        """Send `READY=1`, `STATUS=…`, `WATCHDOG=1`, …; a manager that is gone is no reason to stop."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        text = "\n".join(f"{name}={value}" for name, value in facts.items())
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(1.0)  # its queue is short; a READY that is dropped would be waited for
            channel.sendto(text.encode(), address)
