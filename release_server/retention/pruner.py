"""Removes what nobody needs any more, a short batch at a time, so that nobody waits for the database.

The jobs process takes one step a tick, under the fence of its lease. How far a sweep is lies in the database,
written by the transaction that removes: who takes over goes on there, and a kill leaves nothing half done.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import select

from release_server.models import AuditEntry, Lease, Pruning
from release_server.retention.sweeps import SWEEPS, Step, Turn

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy.orm import Session

    from release_server.blobs import Blobs
    from release_server.database import Sessions
    from release_server.retention.settings import Retention

log = logging.getLogger(__name__)

EVERY = timedelta(hours=1)
"""How long after the end of a sweep its next one begins."""
REST = timedelta(minutes=1)
"""How soon it is looked again whether a sweep is due, after none was or one failed."""
BEHIND = timedelta(days=1)
BATCH = 500
"""How many rows go at once: some milliseconds, in which other writers wait."""


@dataclass
class Pruner:
    """Takes one step after the other; made once for each jobs process."""

    sessions: Sessions
    blobs: Blobs
    repository: Path
    keep: Retention
    _looked: datetime | None = None
    _failed: dict[str, datetime] = field(default_factory=dict)

    def step(self, now: datetime, check: Callable[[Session], None]) -> bool:
        """Take one batch of the first sweep that is due.

        Args:
            check: raises, inside a transaction, when this process may not write any more.

        Returns:
            Whether one was due. After none was, nothing is asked of the database for `REST`.

        Raises:
            Exception: it failed. It is left out for `REST`, so that the next step takes the one behind it.
        """
        if _is_within(REST, self._looked, now):
            return False
        self._looked = now  # a database that cannot be asked is asked again later
        with self.sessions.read() as session:
            known = {row.kind: row for row in session.scalars(select(Pruning))}
        for kind in SWEEPS:
            row = known.get(kind)
            before = self.keep.before(kind, now) if SWEEPS[kind].timed else now
            if before is None or not _is_due(row, now) or _is_within(REST, self._failed.get(kind), now):
                continue
            self._looked = None
            self._failed[kind] = now
            try:
                self._take(kind, self._turn(now, before, row.cursor if row else ""), check)
            except Exception as error:
                error.add_note(f"It was the sweep of {kind}.")
                raise
            del self._failed[kind]
            return True
        return False

    def _turn(self, now: datetime, before: datetime, cursor: str) -> Turn:
        return Turn(now, before, cursor, BATCH, self.keep, self.blobs, self.repository / "metadata")

    def _take(self, kind: str, turn: Turn, check: Callable[[Session], None]) -> None:
        sweep = SWEEPS[kind]
        step = sweep.files(turn) if sweep.files else Step(0)
        with self.sessions.write() as session:
            check(session)
            step = sweep.rows(session, turn) if sweep.rows else step
            _note(session, kind, step, turn.now)
        if step.removed:
            log.info("old records removed", extra={"kind": kind, "count": step.removed})


def _is_due(row: Pruning | None, now: datetime) -> bool:
    if row is None or row.under_way or row.finished_at is None:
        return True
    return not _is_within(EVERY, row.finished_at, now)


def _is_within(length: timedelta, since: datetime | None, now: datetime) -> bool:
    return since is not None and timedelta(0) <= now - since < length  # below zero the clock was set back


@dataclass(frozen=True)
class Standing:
    """How retention is, for people; `behind` are the kinds whose last sweep ended longer ago than a day."""

    removed: int
    behind: tuple[str, ...]
    under_way: tuple[str, ...]

    def __str__(self) -> str:
        text = f"{self.removed} old records have gone"
        if self.under_way:
            text += f"; more of {', '.join(self.under_way)} go now"
        return text + (f"; no whole sweep of {', '.join(self.behind)} in a day" if self.behind else "")


def standing(session: Session, keep: Retention, now: datetime) -> Standing:
    """How far old records have gone; what was never gone through, since the server is there."""
    rows = list(session.scalars(select(Pruning).order_by(Pruning.kind)))
    since = session.scalar(select(Lease.since).where(Lease.name == Lease.JOBS)) or _made_at(session)
    ended = dict.fromkeys(sorted(SWEEPS), since)
    ended |= {row.kind: row.finished_at for row in rows if row.finished_at and row.kind in SWEEPS}
    return Standing(
        sum(row.removed for row in rows),
        tuple(kind for kind, at in ended.items() if at and now - at > BEHIND and _is_wanted(kind, keep, now)),
        tuple(row.kind for row in rows if row.under_way),
    )


def _made_at(session: Session) -> datetime | None:
    """When the server was made, by its first entry in the audit log, which stays."""
    return session.scalar(select(AuditEntry.at).order_by(AuditEntry.id).limit(1))


def _is_wanted(kind: str, keep: Retention, now: datetime) -> bool:
    return not SWEEPS[kind].timed or keep.before(kind, now) is not None


def _note(session: Session, kind: str, step: Step, now: datetime) -> None:
    row = session.get(Pruning, kind)
    if row is None:
        row = Pruning(kind=kind, removed=0)
        session.add(row)
    row.removed += step.removed
    row.cursor = step.cursor or ""
    row.under_way = step.cursor is not None
    if not row.under_way:
        row.finished_at = now
