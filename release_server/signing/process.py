"""The signer as a process: a socket that only the jobs process's user may use, and the desk behind it."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import socket
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent_core.clock import boot_s
from agent_core.errors import MalformedError, RelfleetError, UsageError
from keys.roles import ONLINE_ROLES, ROOT, TARGETS
from release_server.signing import protocol

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from release_server.signing.desk import Desk

log = logging.getLogger(__name__)

PR_SET_DUMPABLE = 4
REQUEST_S = 10.0
MOST_CONNECTIONS = 8
REFUSALS_AT_ONCE = 100
REFUSAL_S = 1.0
"""After so many refusals each further one is answered no sooner than this: a thief must not fill the disk."""


@dataclass
class Brake:
    """Lets the first refusals pass at once, and later ones at a pace."""

    due: float = 0.0

    def wait_s(self, now: float) -> float:
        """Count one refusal; seconds to wait before it is answered."""
        self.due = max(self.due, now) + REFUSAL_S
        return max(0.0, self.due - now - REFUSALS_AT_ONCE * REFUSAL_S)


@dataclass
class Service:
    """Listens until it is told to stop.

    Args:
        desk: answers; one request at a time.
        users: user ids that may ask.
    """

    desk: Desk
    users: frozenset[int]
    stop: threading.Event = field(default_factory=threading.Event)
    _alone: threading.Lock = field(default_factory=threading.Lock)
    _room: threading.BoundedSemaphore = field(
        default_factory=lambda: threading.BoundedSemaphore(MOST_CONNECTIONS)
    )
    _brake: Brake = field(default_factory=Brake)

    def run(self, listening: socket.socket) -> None:
        """Answer whoever connects, until `stop`."""
        listening.settimeout(0.2)
        while not self.stop.is_set():
            try:
                connection, _ = listening.accept()
            except TimeoutError:
                continue
            if self._room.acquire(timeout=REQUEST_S):
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            else:
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                self._answer(connection, boot_s() + REQUEST_S)
        except OSError as error:
            log.info("a caller went away", extra={"why": str(error)})
        except Exception:
            log.exception("a request was not answered")
        finally:
            self._room.release()

    def _answer(self, connection: socket.socket, deadline: float) -> None:
        uid, pid = protocol.peer(connection)
        if uid not in self.users:
            log.warning("user %d may not ask the signer", uid, extra={"pid": pid})
            return  # not a word, and nothing was read
        try:
            request, body = protocol.receive(connection, deadline)
            with self._alone:
                head, answer = self._ask(request.text("op"), request.text("role", ""), body, uid, pid)
        except RelfleetError as error:
            self._slow_down()
            head = {"refused": {"reason": error.reason, "what": error.what, "why": error.why[:1000]}}
            answer = b""
        except OSError as error:
            head = {"refused": {"reason": "disk", "what": "the signer cannot write", "why": str(error)}}
            answer = b""
        protocol.send(connection, head, answer, boot_s() + REQUEST_S)

    def _ask(self, op: str, role: str, body: bytes, uid: int, pid: int) -> tuple[dict[str, Any], bytes]:
        asker = {"uid": uid, "pid": pid}
        if op == "status":
            return {"status": self.desk.status()}, b""
        if op == "trust" and role in {ROOT, TARGETS, *ONLINE_ROLES}:
            self.desk.trust(role, body, asker)
            return {}, b""
        if op == "last" and role in ONLINE_ROLES:
            return {}, self.desk.last(role)
        if op == "sign" and role in ONLINE_ROLES:
            return {}, self.desk.sign(role, body, asker)
        raise MalformedError(f"the signer does not know {op!r} of {role!r}")

    def _slow_down(self) -> None:
        self.stop.wait(self._brake.wait_s(boot_s()))


def harden() -> None:
    """No core file with keys in it, and no other process of the same user may look into this one's memory."""
    os.umask(0o077)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)


@contextlib.contextmanager
def listen(place: Path, *, shared: bool) -> Iterator[socket.socket]:
    """Open the socket.

    Args:
        shared: the caller is another user, who has this process's group.

    Raises:
        UsageError: the socket's directory can be written by others, who could put their own in its place.
    """
    place.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if place.parent.stat().st_mode & 0o022:
        raise UsageError(
            f"the signer's socket cannot be in {place.parent}",
            why="others can write there and put a socket of their own in its place",
            then=f"chmod go-w {place.parent}",
            reason="exposed",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        place.unlink(missing_ok=True)
        with protocol.reachable(place) as name:
            listening.bind(name)
        place.chmod(0o660 if shared else 0o600)
        listening.listen(MOST_CONNECTIONS)
        try:
            yield listening
        finally:
            place.unlink(missing_ok=True)
