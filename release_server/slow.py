"""Ends transfers that do not get on: the kernel says how much moved on a connection, whoever it belongs to.

A thread that waits for a client can be woken by nothing but its connection's end, and the web server tells
nobody which connection that is. So a thread of its own looks at the sockets of the process, as the kernel
counts them, and closes those of clients with a transfer on which less moved than `Pace` asks for.
"""

from __future__ import annotations

import logging
import os
import socket
import struct
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agent_core.clock import boot_s

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from release_server.transfers import Slots, Transfer

log = logging.getLogger(__name__)

SO_COOKIE = 57
ESTABLISHED = 1
INFO_BYTES = 256
STATE_AT, UNACKED_AT, MOVED_AT, NOT_SENT_AT = 0, 24, 120, 144
"""Where Linux's `struct tcp_info` has the state, the segments on their way, two counters of bytes (what the
other end acknowledged, what came from it), and the bytes that wait for room there."""
LOOKS = 6
"""How often a connection is looked at in the time it is given."""


@dataclass(frozen=True)
class Pace:
    """What a transfer must do: move `least_bps` on the average of each `within_s` seconds."""

    least_bps: int
    within_s: float


class Connection(NamedTuple):
    """A TCP connection of this process, as the kernel counts it.

    Attributes:
        cookie: names the connection as long as the host runs; a descriptor's number is given again.
        moved: bytes received and acknowledged since it began.
        waits: whether bytes of ours are not acknowledged yet.
    """

    cookie: int
    client: tuple[str, int]
    moved: int
    waits: bool


class Mark(NamedTuple):
    """When a connection had last done what `Pace` asks for, and what had moved by then."""

    at: float
    moved: int


def judge(
    marks: Mapping[int, Mark], found: Iterable[Connection], now: float, pace: Pace
) -> tuple[dict[int, Mark], set[int]]:
    """Which connections are too slow.

    Args:
        marks: of the look before; connections that are gone fall out.

    Returns:
        The marks for the next look, and the cookies of those that had their time and did too little with it.
    """
    kept: dict[int, Mark] = {}
    slow = set()
    for connection in found:
        mark = marks.get(connection.cookie, Mark(now, connection.moved))
        if connection.moved - mark.moved >= pace.least_bps * pace.within_s:
            mark = Mark(now, connection.moved)
        elif now - mark.at >= pace.within_s:
            slow.add(connection.cookie)
        kept[connection.cookie] = mark
    return kept, slow


def is_of(connection: Connection, transfers: Iterable[Transfer]) -> bool:
    """Whether one of them may be on this connection: a file is one that waits for the other end."""
    return any(
        connection.client == transfer.client and (transfer.kind == "body" or connection.waits)
        for transfer in transfers
    )


class Watch:
    """Looks while there are transfers, and sleeps while there are none."""

    def __init__(self, slots: Slots, pace: Pace) -> None:
        self.slots = slots
        self.pace = pace
        self._busy = threading.Event()
        self._start = threading.Lock()
        self._thread: threading.Thread | None = None

    def wake(self) -> None:
        """There is a transfer. The first one starts the thread, and so in the process that answers."""
        if self._thread is None:
            with self._start:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="slow-clients", daemon=True)
                    self._thread.start()
        self._busy.set()

    def _run(self) -> None:
        while True:
            self._busy.wait()
            self._look_on()
            self._busy.clear()
            if self.slots.held():  # it entered between the two
                self._busy.set()

    def _look_on(self) -> None:
        step_s = self.pace.within_s / LOOKS
        marks: dict[int, Mark] = {}
        while self.slots.held():
            time.sleep(step_s)
            now = boot_s()
            lasting = [transfer for transfer in self.slots.held() if now - transfer.begun >= step_s]
            try:
                marks = self._look(marks, lasting, now)
            except OSError:
                log.exception("the process's connections cannot be looked at")

    def _look(self, marks: dict[int, Mark], lasting: list[Transfer], now: float) -> dict[int, Mark]:
        """One look: short transfers, which is nearly all, have no connection looked at."""
        if not lasting:
            return {}
        with_sockets = list(connections({transfer.client for transfer in lasting}))
        try:
            kept, slow = judge(marks, [found for found, _ in with_sockets], now, self.pace)
            overdue = [transfer for transfer in lasting if now - transfer.begun >= self.pace.within_s]
            for found, connected in with_sockets:
                if found.cookie in slow and is_of(found, overdue):
                    log.warning("a transfer with %s is ended: it is too slow", found.client[0])
                    end(connected)
        finally:
            for _, connected in with_sockets:
                connected.close()
        return kept


def end(connected: socket.socket) -> None:
    """End a connection under whoever else has it open, with all that the kernel would still send on it."""
    try:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connected.shutdown(socket.SHUT_RDWR)
    except OSError:
        log.debug("it had ended by itself")


def connections(clients: set[tuple[str, int]]) -> Iterator[tuple[Connection, socket.socket]]:
    """The open connections of this process with some clients, each with a socket of our own to close."""
    seen: set[int] = set()  # a copy of ours may have been given a number that is on the list
    for entry in list(Path("/proc/self/fd").iterdir()):
        try:
            if not str(entry.readlink()).startswith("socket:"):
                continue
            # Looked at through a copy: the number may be another file's a moment later, the copy never is.
            mine = socket.socket(fileno=os.dup(int(entry.name)))
        except OSError:
            continue
        found = _look_at(mine)
        if found is not None and found.client in clients and found.cookie not in seen:
            seen.add(found.cookie)
            yield found, mine
        else:
            mine.close()


def _look_at(mine: socket.socket) -> Connection | None:
    """What the kernel says of it; None when it is no TCP connection that is up."""
    if mine.family not in (socket.AF_INET, socket.AF_INET6) or mine.type != socket.SOCK_STREAM:
        return None
    try:
        info = mine.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, INFO_BYTES)
        cookie = int.from_bytes(mine.getsockopt(socket.SOL_SOCKET, SO_COOKIE, 8), "little")
        client = (str(mine.getpeername()[0]), int(mine.getsockname()[1]))
    except OSError:
        return None
    if len(info) < NOT_SENT_AT + 4 or info[STATE_AT] != ESTABLISHED:
        return None
    acknowledged, received = struct.unpack_from("=QQ", info, MOVED_AT)
    (unacked,) = struct.unpack_from("=I", info, UNACKED_AT)
    (not_sent,) = struct.unpack_from("=I", info, NOT_SENT_AT)
    return Connection(cookie, client, acknowledged + received, bool(unacked or not_sent))
