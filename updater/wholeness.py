"""Hashes every file of a version against its index, for who chooses one by hand and can wait a second.

What starts or goes back by itself never waits for this: `slots.is_complete` looks at two names.
"""

from __future__ import annotations

import os
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING

from agent_core import disk, slots
from agent_core.bundle import INDEX_NAME, Index
from agent_core.errors import RelfleetError

if TYPE_CHECKING:
    from pathlib import Path


def fault(directory: Path) -> str:
    """What of a version is not as it was signed, in words; empty when all of it is.

    The index is believed by the digest in the directory's name, every file by the index.

    Raises:
        OSError: the disk does not say.
    """
    try:
        raw = disk.read_file(directory / INDEX_NAME)
    except (FileNotFoundError, NotADirectoryError):
        return "it has no index"
    if not sha256(raw).hexdigest().startswith(slots.digest_of(directory.name)):
        return "its index is not the one that was signed"
    try:
        index = Index.from_bytes(raw)
    except RelfleetError as error:
        return f"its index cannot be read: {error.what}"
    wrong = [file.path for file in index.files if not is_signed(directory / file.path, file.sha256)]
    more = f", and {len(wrong) - 1} more" if wrong[1:] else ""
    return f"{wrong[0]} is missing, or not as it was signed{more}" if wrong else ""


def is_signed(file: Path, digest: str) -> bool:
    """Whether a plain file of these bytes stands there; a link is never followed.

    Raises:
        OSError: the disk does not say.
    """
    if disk.is_link(file) or not disk.is_file(file):
        return False
    found = sha256()
    with suppress(FileNotFoundError):
        handle = disk.open(file, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            while piece := disk.read(handle, disk.READ):  # it may be longer than the memory is
                found.update(piece)
        finally:
            disk.close(handle)
        return found.hexdigest() == digest
    return False
