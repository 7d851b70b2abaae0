"""A stop of every update that needs no server and no key: a file on the host, or one beside the metadata.

Neither is signed, so neither can do more than a cut cable: while it is there nothing new is installed, and
nothing of it is remembered. Who controls the network for a moment stops updates for that moment, as before.
"""

from __future__ import annotations

import os
import stat
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from agent_core import disk
from agent_core.errors import RelfleetError
from agent_core.late import late_dataclass
from agent_core.wire import STOP_LENGTH, stop_for

if TYPE_CHECKING:
    from updater.transport import Origin

SERVED = "/metadata/stop.json"
MOST = STOP_LENGTH
"""Bytes of either file that are read."""
AGAIN = timedelta(minutes=1)
"""How soon an agent that wants to install looks again, at the earliest."""


@late_dataclass(frozen=True)
class Stop:
    """Somebody wants no updates now: who could say so, and why."""

    where: str
    why: str

    def __str__(self) -> str:
        return f"updates are stopped by {self.where}" + (f": {self.why}" if self.why else "")


def on_host(file: str) -> Stop | None:
    """The stop of this host; whatever stands there and cannot be read stops as well."""
    if not file:
        return None
    try:
        if not (disk.exists(Path(file)) or disk.is_link(Path(file))):
            return None
        if not stat.S_ISREG(disk.stat(Path(file)).st_mode):
            return Stop(file, "it is no plain file")
        said = _beginning(Path(file))
    except OSError as error:
        return Stop(file, f"it cannot be read ({error.strerror})")
    return Stop(file, said.decode("utf-8", "replace").strip().partition("\n")[0][:200])


def _beginning(file: Path) -> bytes:
    """The first `MOST` bytes of a plain file, however long it is."""
    # Without waiting: a pipe that takes the file's place just now would keep the check for ever.
    handle, said = disk.open(file, os.O_RDONLY | os.O_NONBLOCK), b""
    try:
        while len(said) < MOST and (piece := disk.read(handle, MOST - len(said))):
            said += piece
    finally:
        disk.close(handle)
    return said


def served(origin: Origin, product: str) -> Stop | None:
    """The stop that is served as a plain file; one that names products is for those only.

    No answer is no stop: whoever can suppress this file can suppress the bundle as well, and who wants to be
    obeyed by everyone says it in a signed directive.
    """
    try:
        answer = origin.get(SERVED, max_length=MOST, deadline_s=10.0)
    except RelfleetError:
        return None
    if answer.status != 200:
        return None
    why = stop_for(product, answer.body)
    return None if why is None else Stop(SERVED, why)
