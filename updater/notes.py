"""This module writes the notes under `state/`, whatever lies in their place: each can be found out again.

A half-restored backup or a slip of the hand may leave a directory where a note should be. No file can take
its name, so every check would fail for ever. What decides is no note: keys and the root of trust are
refused as they lie, and left to a person; record and identity have a second place, and are mended from it.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from agent_core import disk
from agent_core import layout as durable
from agent_core.errors import DiskError, MalformedError
from agent_core.layout import PRIVATE_MODE, Layout

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SEAL = "sha256"


def write(file: Path, value: Any, mode: int = 0o644) -> None:
    """Write a note directly under `state/`, durably.

    Raises:
        DiskError: it was not replaced; the old one still stands.
    """
    replace(file, lambda: durable.write_json(file, value, mode))


def sealed(value: dict[str, Any]) -> dict[str, Any]:
    """The same with its own digest, for a note whose numbers a host would go by for ever."""
    return {**value, SEAL: _digest(value)}


def unsealed(body: Any, name: str) -> Any:
    """What was sealed; a note without a digest, by an older version or without need, is taken as it is.

    Raises:
        MalformedError: it is not what was written.
    """
    if not isinstance(body, dict) or SEAL not in body:
        return body
    value = {key: body[key] for key in body if key != SEAL}
    if body[SEAL] != _digest(value):
        raise MalformedError(f"{name} is damaged", why="it is not what was written")
    return value


def _digest(value: dict[str, Any]) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def forget(file: Path) -> None:
    """Take a note away; that there is none is fine.

    Raises:
        OSError: it is still there.
    """
    try:
        disk.remove(file)
    except OSError:
        if not set_aside(file, _trash(file)):
            raise


def replace(file: Path, write: Callable[[], None], trash: Path | None = None) -> None:
    """Call `write`, and once more if what kept it from replacing `file` could be set aside."""
    try:
        write()
    except DiskError:
        if not set_aside(file, trash or _trash(file)):
            raise
        write()


def set_aside(file: Path, trash: Path) -> bool:
    """Move what is no file out of the place of one, by one rename; False when it is one, or stays there."""
    with suppress(OSError):
        mode = disk.stat(file, follow=False).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            disk.make_dirs(trash, PRIVATE_MODE)
            disk.chmod(file, 0o700)  # one that its owner may not write cannot be moved elsewhere
            disk.rename(file, trash / f"{file.name}.{os.urandom(4).hex()}")
            disk.fsync_dir(file.parent)
            return True
    return False


def _trash(file: Path) -> Path:
    return Layout(file.parent.parent).trash
