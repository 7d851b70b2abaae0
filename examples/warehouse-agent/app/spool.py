"""A bounded file of JSON lines: when it is half as long as allowed, it becomes the older half."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

NAME = "samples.jsonl"


class Spool:
    """Appends lines to `samples.jsonl`; together with `samples.jsonl.1` it never exceeds `most_bytes`."""

    def __init__(self, directory: Path, most_bytes: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / NAME
        self.older = directory / f"{NAME}.1"
        self.half = most_bytes // 2

    def append(self, line: dict[str, Any]) -> None:
        """Write one whole line with one call, so that a reader never meets half of one between two."""
        raw = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        if len(raw) > self.half:
            raise OSError(f"a line of {len(raw)} bytes does not fit into the spool")
        if self.path.exists() and self.path.stat().st_size + len(raw) > self.half:
            self.path.replace(self.older)
        with self.path.open("ab", buffering=0) as file:
            file.write(raw)
