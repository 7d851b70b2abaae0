"""What goes over the signer's socket: one request and one answer a connection.

A message is four bytes that say how long its head is, the head (a JSON object), and a body whose length the
head says. Whatever is longer than allowed, late or of another form ends the connection.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from agent_core.clock import boot_s
from agent_core.errors import MalformedError
from agent_core.wire import SCHEMA, Getter

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MAX_HEAD = 16 * 1024
MAX_BODY = 32 * 2**20
"""Top-level targets with every release of years fit in; what the server takes in is less by default."""
CREDENTIALS = struct.Struct("3i")
LENGTH = struct.Struct(">I")


def send(connection: socket.socket, head: dict[str, Any], body: bytes, deadline: float) -> None:
    """Send one message.

    Args:
        deadline: boot time after which it is given up.

    Raises:
        OSError: the other end is gone, or too slow.
    """
    text = json.dumps({"schema": SCHEMA, "length": len(body)} | head).encode()
    connection.settimeout(_left(deadline))
    connection.sendall(LENGTH.pack(len(text)) + text + body)


def receive(connection: socket.socket, deadline: float) -> tuple[Getter, bytes]:
    """Read one message.

    Raises:
        MalformedError: it is longer than allowed, or has another form.
        OSError: the other end is gone, or too slow.
    """
    (length,) = LENGTH.unpack(_read(connection, LENGTH.size, deadline))
    if length > MAX_HEAD:
        raise MalformedError("the message is refused", why=f"its head is longer than {MAX_HEAD} bytes")
    try:
        decoded = json.loads(_read(connection, length, deadline))
    except (ValueError, RecursionError):
        raise MalformedError("the message is refused", why="its head is no JSON") from None
    get = Getter(decoded, "message")
    get.integer("schema", low=1, high=SCHEMA)
    return get, _read(connection, get.integer("length", high=MAX_BODY), deadline)


def _read(connection: socket.socket, length: int, deadline: float) -> bytes:
    pieces = []
    while length:
        connection.settimeout(_left(deadline))
        piece = connection.recv(min(length, 1 << 18))
        if not piece:
            raise ConnectionError("the other end closed the connection within a message")
        pieces.append(piece)
        length -= len(piece)
    return b"".join(pieces)


def _left(deadline: float) -> float:
    left = deadline - boot_s()
    if left <= 0:
        raise TimeoutError("the other end is too slow")
    return left


def peer(connection: socket.socket) -> tuple[int, int]:
    """User id and process id of the other end, as the kernel says."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    pid, uid, _gid = CREDENTIALS.unpack(raw)
    return uid, pid


@contextmanager
def reachable(place: Path) -> Iterator[str]:
    """A name for a socket that is short enough for the kernel, wherever its directory is."""
    directory = os.open(place.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{place.name}"
    finally:
        os.close(directory)
