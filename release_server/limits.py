"""How often one caller may ask, by who it is: a site behind one address is not one agent.

Each web process counts for itself, in memory, and forgets who has not asked for a while.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent_core.errors import NotAllowedError, UnreachableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

RATE_LIMITED = "rate-limited"
"""The reason that the API answers with 429."""
STRANGERS = frozenset({"not-signed-in", "token-unknown"})
"""Refusals of callers who are nobody yet: these alone are counted by address."""
MOST = 10_000
"""Callers remembered by each limit; the ones that asked longest ago are forgotten first."""


class Limit:
    """A bucket a caller: `burst` requests at once, and `rate_s` a second after that."""

    def __init__(self, rate_s: float, burst: int) -> None:
        self.rate_s, self.burst = rate_s, burst
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, caller: str, now: datetime) -> None:
        """Count one request.

        Raises:
            UnreachableError: `rate-limited`, with the seconds after which one more is taken.
        """
        at = now.timestamp()
        with self._lock:
            left, before = self._left.pop(caller, (float(self.burst), at))
            left = min(self.burst, left + max(0.0, at - before) * self.rate_s)
            self._left[caller] = (left - 1 if left >= 1 else left, at)
            while len(self._left) > MOST:
                self._left.popitem(last=False)
        if left < 1:
            raise UnreachableError(
                "too many requests",
                why="each caller may ask only so often",
                then="try again after the seconds in Retry-After",
                reason=RATE_LIMITED,
                retry_after_s=math.ceil((1 - left) / self.rate_s),
            )


@dataclass(frozen=True)
class Limits:
    """The limits of one web process.

    Attributes:
        enrolments: by enrolment token; five hundred hosts that are imaged at once are let in within a minute.
        hosts: by the public key that is enrolled; a host that tries in a loop waits, its neighbours do not.
        tokens: by the person who makes, lists or revokes tokens.
        strangers: by address; counts only requests without a token that is known here.
    """

    enrolments: Limit = field(default_factory=lambda: Limit(5.0, 300))
    hosts: Limit = field(default_factory=lambda: Limit(0.1, 10))
    tokens: Limit = field(default_factory=lambda: Limit(0.5, 60))
    strangers: Limit = field(default_factory=lambda: Limit(1.0, 60))

    @contextmanager
    def counting_strangers(self, address: str | None, now: datetime) -> Iterator[None]:
        """Count what is refused inside because nobody known has sent it; who is known is never counted.

        Raises:
            UnreachableError: `rate-limited` instead of the refusal, when there were too many.
        """
        try:
            yield
        except NotAllowedError as error:
            if error.reason in STRANGERS:
                self.strangers.take(address or "", now)
            raise
