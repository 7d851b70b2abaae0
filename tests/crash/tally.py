"""This module counts the states a tier of the crash proof tried, and keeps what it found wrong."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field

PROGRESS_S = 0.5
FAILURES_SHOWN = 20


@dataclass
class Tally:
    """One tier's count. A failure is a sentence that says what broke and what reproduces it.

    Args:
        tier: its name, as the command line spells it.
    """

    tier: str
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    _began_s: float = field(default_factory=time.monotonic)
    _shown_s: float = 0.0

    def count(self, states: int = 1, doing: str = "") -> None:
        """Count states that were tried; on a terminal the line that shows it moves on."""
        self.tried += states
        now_s = time.monotonic()
        if sys.stderr.isatty() and now_s - self._shown_s >= PROGRESS_S:
            self._shown_s = now_s
            print(f"\r{self.line()}   {doing[:50]:50}", end="", file=sys.stderr, flush=True)

    def fail(self, sentence: str) -> None:
        """Keep a failure: which state of what, which promise it broke, and how to see it again."""
        self.failures.append(sentence)

    def line(self) -> str:
        """`model        12,345 states tried, 0 failed       41 s`."""
        passed_s = time.monotonic() - self._began_s
        counted = f"{self.tried:>9,} states tried, {len(self.failures):,} failed"
        return f"{self.tier:10}{counted}   {passed_s:5.0f} s"

    def report(self) -> None:
        """Print the line, then the first failures, each on its own."""
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        print(self.line(), flush=True)
        for sentence in self.failures[:FAILURES_SHOWN]:
            print(f"  failed: {sentence}", flush=True)
        if more := self.failures[FAILURES_SHOWN:]:
            print(f"  and {len(more):,} more", flush=True)
