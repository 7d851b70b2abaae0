"""A clock for transfers that only what waits, or a test, moves on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

from agent_core import clock
from updater import download

if TYPE_CHECKING:
    import pytest


class Stepped:
    """Seconds since the host started, as `download` and `share` read them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1_000.0
        monkeypatch.setattr(clock, "boot_s", lambda: self.now_s)
        # Its name for the module alone: the origin's threads, and whatever else is here, sleep as ever.
        monkeypatch.setattr(download, "time", SimpleNamespace(sleep=self.step))

    def step(self, seconds: float) -> None:
        self.now_s += seconds
