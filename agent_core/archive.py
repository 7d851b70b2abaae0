"""This module makes the launcher's one file, which any Python from 3.9 on runs, and reads its number."""

from __future__ import annotations

import io
import marshal
import re
import zipfile
from importlib.util import MAGIC_NUMBER, source_hash
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.abc import ResourceLoader

_PARTS = ("__init__.py", "disk.py", "slots.py", "launcher.py", "self_test.py")
_MAIN = b"from agent_core.launcher import main\n\nraise SystemExit(main())\n"
_UNCHECKED_HASH = (1).to_bytes(4, "little")
_MOST_SOURCE = 2**20
_NUMBER = re.compile(rb"^LAUNCHER = ([0-9]{1,6})$", re.MULTILINE)


def launcher_number(file: Path) -> int | None:
    """What the launcher in `file` can do, None when there is none that can be read. Nothing of it is run."""
    try:
        with zipfile.ZipFile(file) as archive, archive.open("agent_core/launcher.py") as source:
            found = _NUMBER.search(source.read(_MOST_SOURCE))
    except (OSError, KeyError, ValueError, zipfile.BadZipFile, RuntimeError):
        return None
    return int(found[1]) if found else None


def launcher_archive() -> bytes:
    """The launcher as one stored zip; the same sources and the same Python give the same bytes everywhere.

    Beside each source lies what this Python compiles from it, because the launcher starts before everything
    else and compiling takes most of its time. Another Python finds a stranger's mark and takes the source.
    """
    members = {"__main__.py": _MAIN}
    for part in _PARTS:
        source = _source(part)
        members[f"agent_core/{part}"] = source
        members[f"agent_core/{part}c"] = _compiled(source, f"agent_core/{part}")
    return stored_zip(members)


def stored_zip(members: Mapping[str, bytes]) -> bytes:
    """A zip of these files, uncompressed: the same files give the same bytes, and Python imports from it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, content in sorted(members.items()):
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            member.create_system = 3
            member.external_attr = (0o40755 if name.endswith("/") else 0o100644) << 16
            archive.writestr(member, content)
    return buffer.getvalue()


def _source(part: str) -> bytes:
    """A module of this package as it was written, out of a directory or an archive."""
    loader = cast("ResourceLoader", __spec__.loader)
    return loader.get_data(str(Path(__file__).with_name(part)))


def _compiled(source: bytes, name: str) -> bytes:
    """A `.pyc` that is never compared with its source: the two lie in one file and are replaced together."""
    code = compile(source, name, "exec", dont_inherit=True, optimize=0)
    # Version 2 of the format marks no shared objects: what those are depends on the process that writes.
    return MAGIC_NUMBER + _UNCHECKED_HASH + source_hash(source) + marshal.dumps(code, 2)
