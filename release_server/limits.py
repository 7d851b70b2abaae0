"""How often one caller may ask, by who it is: a site behind one address is not one agent.

Callers that are known (by a token, a key, a person) are counted in the database, so that it is the same limit
however many web processes and replicas there are. In front of that each process counts in memory, so that a
loop costs the database nothing. Strangers are counted in memory alone: whoever is nobody makes no row,
and may ask N times as often where there are N web processes.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from sqlalchemy import case, delete, select
from sqlalchemy.dialects import postgresql, sqlite

from agent_core.errors import NotAllowedError, UnreachableError
from release_server.models import RateLimit

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.database import Sessions

RATE_LIMITED = "rate-limited"
"""The reason that the API answers with 429."""
STRANGERS = frozenset({"not-signed-in", "token-unknown", "session-unknown"})
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
            left = self._now(caller, at)
            self._left.pop(caller, None)
            self._left[caller] = (left - 1 if left >= 1 else left, at)
            while len(self._left) > MOST:
                self._left.popitem(last=False)
        if left < 1:
            raise _too_many((1 - left) / self.rate_s)

    def look(self, caller: str, now: datetime) -> None:
        """Refuse as `take` would, and count nothing.

        Raises:
            UnreachableError: `rate-limited`.
        """
        with self._lock:
            left = self._now(caller, now.timestamp())
        if left < 1:
            raise _too_many((1 - left) / self.rate_s)

    def _now(self, caller: str, at: float) -> float:
        left, before = self._left.get(caller, (float(self.burst), at))
        return min(self.burst, left + max(0.0, at - before) * self.rate_s)


class SharedLimit:
    """The same for all web processes of one database, with a limit of this process in front.

    A row holds one number: when the caller's bucket is full again. Rows of callers that may ask as if they
    had never asked are deleted, so there are never more than callers of the last `burst / rate_s` seconds.
    """

    def __init__(self, name: str, rate_s: float, burst: int) -> None:
        self.name, self.rate_s, self.burst = name, rate_s, burst
        self.here = Limit(rate_s, burst)

    def take(self, session: Session, caller: str, now: datetime) -> None:
        """Count one request, in one statement: two processes at once cannot both take the last one.

        Args:
            session: of `Sessions.write()`.

        Raises:
            UnreachableError: `rate-limited`, with the seconds after which one more is taken.
        """
        at, each, key = now.timestamp(), 1 / self.rate_s, self._key(caller)
        begin = case((RateLimit.full_at > at, RateLimit.full_at), else_=at)
        insert: Any = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
        statement = (
            insert(RateLimit)
            .values(key=key, full_at=at + each)
            .on_conflict_do_update(
                index_elements=[RateLimit.key],
                set_={"full_at": begin + each},
                where=begin + each - at <= self.burst * each + 1e-6,
            )
            .returning(RateLimit.full_at)
        )
        if session.scalar(statement) is None:
            full_at = session.scalar(select(RateLimit.full_at).where(RateLimit.key == key)) or at
            raise _too_many(full_at - at - (self.burst - 1) * each)
        session.execute(delete(RateLimit).where(RateLimit.full_at < at))

    def _key(self, caller: str) -> str:
        return f"{self.name}:{sha256(caller.encode()).hexdigest()}"


def _too_many(wait_s: float) -> UnreachableError:
    return UnreachableError(
        "too many requests",
        why="each caller may ask only so often",
        then="try again after the seconds in Retry-After",
        reason=RATE_LIMITED,
        retry_after_s=max(1, math.ceil(wait_s - 1e-6)),
    )


@dataclass(frozen=True)
class Limits:
    """The limits that hold for the web processes of one database.

    Attributes:
        enrolments: by enrolment token; five hundred hosts that are imaged at once are let in within a minute.
        hosts: by the public key that is enrolled; a host that tries in a loop waits, its neighbours do not.
        signins: by whom the provider names; a person who is turned away in a loop keeps no colleague out.
        tokens: by the person who makes, lists or revokes tokens.
        strangers: by address; counts only requests without a token that is known here.
    """

    enrolments: SharedLimit = field(default_factory=lambda: SharedLimit("enrolment", 5.0, 300))
    hosts: SharedLimit = field(default_factory=lambda: SharedLimit("host", 0.1, 10))
    signins: SharedLimit = field(default_factory=lambda: SharedLimit("signin", 0.1, 10))
    tokens: SharedLimit = field(default_factory=lambda: SharedLimit("token", 0.5, 60))
    strangers: Limit = field(default_factory=lambda: Limit(1.0, 60))

    def take(self, sessions: Sessions, now: datetime, *asked: tuple[SharedLimit, str]) -> None:
        """Count one request against several limits: against all of them, or when one refuses against none.

        Args:
            asked: limits with their callers, the narrowest first: who is loud uses up nothing of others.

        Raises:
            UnreachableError: `rate-limited`, by the first that refuses.
        """
        for limit, caller in asked:
            limit.here.take(caller, now)
        with sessions.write() as session:
            for limit, caller in asked:
                limit.take(session, caller, now)

    @contextmanager
    def counting_guesses(self, address: str | None, now: datetime) -> Iterator[None]:
        """Count each refusal inside by address, and let nobody inside who has had too many.

        Raises:
            UnreachableError: `rate-limited`.
        """
        self.strangers.look(address or "", now)
        try:
            yield
        except NotAllowedError:
            self.strangers.take(address or "", now)
            raise

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
