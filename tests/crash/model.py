"""This module is the model tier: every state of the disk that a power cut may leave, as POSIX allows it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.crash.tally import Tally


def unavailable() -> str:
    return "its disk is not modelled yet"


def run(tally: Tally, *, quick: bool) -> None:
    """Nothing is tried, and a tier that tries nothing fails."""
