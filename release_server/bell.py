"""Wakes the jobs process of this host when a web process has committed something that it acts on.

Without it, a stage that ends, a rollout that begins and a release that is taken in wait for the next tick.
A ring says nothing and may be lost: what is to be done is in the database, and the tick comes in any case. A
jobs process on another host is not reached, nor one that does not hold the lease.
"""

from __future__ import annotations

import socket
from contextlib import suppress
from typing import TYPE_CHECKING

from agent_core.clock import boot_s
from release_server.signing.protocol import reachable

if TYPE_CHECKING:
    import threading
    from pathlib import Path

SLICE_S = 0.1
"""How soon a wait ends when the process is told to stop."""


def ring(place: Path) -> None:
    """Say that there is something to do; never waits, and nobody listening is no error."""
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as channel, reachable(place) as name:
        channel.sendto(b"\0", name)


class Bell:
    """What the holder of the lease listens to; of several on one host the last that began is heard."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self._socket: socket.socket | None = None

    def listen(self) -> None:
        """Be reachable from now on; a place where no socket can be made leaves the ticks alone."""
        self.mute()
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        try:
            self.place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.place.unlink(missing_ok=True)
            with reachable(self.place) as name:
                listening.bind(name)
            self.place.chmod(0o600)
        except OSError:
            listening.close()
            return
        self._socket = listening

    def mute(self) -> None:
        """Be heard of no more. The file stays, for it may be another's by now."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def wait(self, stop: threading.Event, least_s: float, most_s: float) -> None:
        """Wait for a ring, `most_s` at the longest; one that comes before `least_s` is heeded then."""
        until_s = boot_s() + most_s
        stop.wait(min(least_s, most_s))
        while not stop.is_set() and (left_s := until_s - boot_s()) > 0:
            if self._socket is None:
                stop.wait(left_s)
            elif self._is_rung(self._socket, min(SLICE_S, left_s)):
                return

    @staticmethod
    def _is_rung(listening: socket.socket, within_s: float) -> bool:
        """All that rang until now is one ring."""
        listening.settimeout(within_s)
        try:
            listening.recv(1)
            listening.setblocking(False)
            while listening.recv(1):
                pass
        except TimeoutError:
            return False
        except BlockingIOError:
            return True
        return True
