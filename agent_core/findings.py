"""What `doctor` finds, on a host, a desk or the server: one sentence about one thing, and what to do."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class State(StrEnum):
    """How a thing is: as it should be, worth knowing, or in the way."""

    OK = "ok"
    NOTE = "note"
    BAD = "bad"


COLOURS = {State.OK: "green", State.NOTE: "yellow", State.BAD: "red"}


@dataclass(frozen=True)
class Finding:
    """One sentence about one thing, and what to do about it; nothing to do when it is ok."""

    check: str
    state: State
    detail: str
    then: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def line(self, width: int = 12) -> str:
        """For people, what to do on a line of its own; `width` is that of the longest check's name."""
        import click  # late: a check needs no terminal

        state = click.style(f"{self.state:<5}", fg=COLOURS[self.state])
        text = f"{state} {self.check:<{width}} {self.detail}"
        return text + (f"\n{'':<{width + 7}}next: {self.then}" if self.then else "")
