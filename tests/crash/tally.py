"""This module counts the states a tier of the crash proof tried, and keeps what it found wrong."""

from __future__ import annotations

import sys
import time
from concurrent.futures import as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from concurrent.futures import Executor

PROGRESS_S = 0.5
FAILURES_SHOWN = 20


class Named(Protocol):
    """A case; its name is a sentence that says how to see it again."""

    @property
    def name(self) -> str: ...


Case, Found = TypeVar("Case", bound=Named), TypeVar("Found")


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

    def fail_each(self, name: str, sentences: Iterable[str]) -> None:
        for sentence in sentences:
            self.fail(f"{name}: {sentence}")

    def answers(
        self, pool: Executor, work: Callable[..., Found], cases: Iterable[Case], *more: Iterable[object]
    ) -> Iterator[tuple[Case, Found]]:
        """What `work` finds of each case in a process of the pool, as it comes; each is a state that was tried.

        Whatever ends this early takes back what has not begun, and waits for what has.
        """
        jobs = {pool.submit(work, *given): given[0] for given in zip(cases, *more, strict=True)}
        try:
            for job in as_completed(jobs):
                self.count(doing=jobs[job].name)
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise

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
