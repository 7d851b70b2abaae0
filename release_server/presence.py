"""Whether the server could be heard: web processes note that they listen, and the census asks when none did.

Agents that cannot report are no silent agents. The jobs process may well go on while no web process is there,
so its own lease does not tell; and how many agents are heard does not either, for a bad release silences all.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from release_server.hearing import NEVER, Hearing, joined
from release_server.models import Lease
from release_server.standing import GONE, GRACE, back_after

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from sqlalchemy.orm import Session

    from release_server.database import Sessions
    from release_server.hearing import Gap

log = logging.getLogger(__name__)

LENGTH = timedelta(seconds=20)
"""How long a note holds. It is less than any agent may be quiet for (`standing.GRACE`)."""
EVERY_S = 5.0
KEPT = 3 * GONE
AHEAD = LENGTH + GRACE
"""What lies further ahead is of a clock that was wrong; what lies less far ahead is of a replica's."""


def note(session: Session, now: datetime, last: datetime | None = None) -> None:
    """A web process listens now. Of many that note it one writes; a gap before it is kept.

    A process that listened itself a moment ago knows of no gap, however far the note of a replica whose clock
    is behind lies in the past: else two such clocks would find one every 5 s, and silence never count.

    Args:
        session: of `Sessions.write()`.
        last: when this process was last there to note it, by its own clock; None: not yet.
    """
    row = session.scalar(select(Lease).where(Lease.name == Lease.WEB).with_for_update())
    if row is None:
        session.add(Lease(name=Lease.WEB, holder="", fence=0, until=now + LENGTH))
        return
    was_there = last is not None and last <= now <= last + LENGTH
    was_wrong = row.since is not None and row.since > now + AHEAD
    if was_wrong or (now > row.until and not was_there):
        row.since, row.gaps = now, with_gap(row.gaps, row.until - LENGTH, now)
    if not now + LENGTH < row.until <= now + LENGTH + AHEAD:
        row.until = now + LENGTH


def is_noted(session: Session, now: datetime) -> bool:
    """Whether the last note is new enough for another one to be saved."""
    until = _noted_until(session)
    return until is not None and now + LENGTH / 2 < until <= now + LENGTH + AHEAD


def heard_since(session: Session, now: datetime) -> datetime | None:
    """Since when agents are heard again after they could not be; None: always; `NEVER`: they are not now."""
    rows = {row.name: row for row in session.scalars(select(Lease))}
    web = rows.get(Lease.WEB)
    if web is not None and now > web.until:
        return NEVER
    return max((row.since for row in rows.values() if row.since is not None), default=None)


def with_gap(kept: Iterable[tuple[str, str]], start: datetime, now: datetime) -> list[tuple[str, str]]:
    """What is kept of gaps, with one more, from when a process last said that it is there until now.

    None ends later: one that did is of a clock that was ahead. What is so old that nothing waits for it goes.
    """
    known = [(begun, min(end, now)) for begun, end in _read(kept) if end > now - KEPT and begun < now]
    known += [(start, now)] if start < now else []
    return [(begun.isoformat(), end.isoformat()) for begun, end in joined(known)]


def _read(kept: Iterable[tuple[str, str]]) -> list[Gap]:
    return [(datetime.fromisoformat(start), datetime.fromisoformat(end)) for start, end in kept]


def hearing(session: Session, now: datetime, settle: timedelta) -> Hearing:
    """When agents could be heard: while a web process was there to hear them, and jobs to tell them anything.

    Args:
        settle: as of `Hearing`.
    """
    rows = session.scalars(select(Lease)).all()
    gaps = [gap for row in rows for gap in _read(row.gaps)]
    gaps += [(row.until - LENGTH, NEVER) for row in rows if row.name == Lease.WEB and row.until < now]
    return Hearing(joined(gaps), settle)


class Ear:
    """When agents of each pace could be heard, read once."""

    def __init__(self, session: Session, now: datetime) -> None:
        self._any = hearing(session, now, timedelta())
        self._of: dict[timedelta, Hearing] = {}

    def of(self, period: timedelta) -> Hearing:
        if period not in self._of:
            self._of[period] = replace(self._any, settle=back_after(period))
        return self._of[period]


def ahead_of(session: Session, now: datetime) -> timedelta:
    """How far the clock of a web process is ahead of `now` at least; nothing where that cannot be seen."""
    until = _noted_until(session)
    return timedelta() if until is None else max(timedelta(), until - now - LENGTH)


def _noted_until(session: Session) -> datetime | None:
    return session.scalar(select(Lease.until).where(Lease.name == Lease.WEB))


class Pulse:
    """Notes from a thread of its own that this process listens, for as long as it lives.

    Args:
        sessions: of this process.
        clock: what time it is.
    """

    def __init__(self, sessions: Sessions, clock: Callable[[], datetime]) -> None:
        self.sessions = sessions
        self.clock = clock
        self.last: datetime | None = None

    def start(self) -> None:
        """Begin; in a process that was forked from this one too, which takes no thread along."""
        os.register_at_fork(after_in_child=self._begin)
        self._begin()

    def _begin(self) -> None:
        threading.Thread(target=self._run, name="presence", daemon=True).start()

    def _run(self) -> None:
        pause = threading.Event()
        while True:
            self.beat()
            pause.wait(EVERY_S)

    def beat(self) -> None:
        """Note it once; what keeps it from being noted keeps agents from being heard as well."""
        now = self.clock()
        try:
            with self.sessions.read() as session:
                noted = is_noted(session, now)
            if not noted:
                with self.sessions.write() as session:
                    note(session, now, self.last)
            self.last = now
        except IntegrityError:
            log.debug("another process was first to note that it listens")
        except Exception:
            log.exception("that this process listens was not noted")
