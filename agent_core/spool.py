"""The spool keeps what the server has not heard yet: numbered, durable transitions and telemetry samples.

Numbers of transitions only grow, for the whole life of the agent: the server takes each number once, so one
that is given out twice would hide the second transition for ever. The highest number is therefore kept
twice, in the database and in a small file beside it that is overwritten
in place, which works on a full disk too.
No failure of the disk escapes: what cannot be written waits in memory, bounded, and is reported all the same.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import sqlite3
import zlib
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from agent_core.clock import iso
from agent_core.wire import MAX_TEXT, AttemptState, Transition

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

log = logging.getLogger(__name__)

MAX_TRANSITIONS_KEPT = 5000
MAX_WAITING = 500
KEPT_ASIDE = 2
DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
HIGH_LENGTH = 64
SCHEMA = """
CREATE TABLE IF NOT EXISTS transitions (
    number INTEGER PRIMARY KEY, at TEXT NOT NULL, version TEXT NOT NULL, digest TEXT NOT NULL,
    salt TEXT NOT NULL, state TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS samples (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at TEXT NOT NULL,
    figures TEXT NOT NULL, length INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
PRAGMA user_version = 1;
"""


class Spool:
    """One agent's spool; the resident process and its checker may use it at the same time.

    Args:
        path: the database, `state/spool.db`.
        max_samples, max_bytes: bounds of the telemetry that is kept; the oldest is dropped first.

    Attributes:
        lost: transitions and samples that could neither be written nor kept in memory, in this process.
        problem: why the last write failed; empty when it did not.
    """

    def __init__(self, path: Path, *, max_samples: int = 2000, max_bytes: int = 4 * 2**20) -> None:
        self.path = path
        self.max_samples = max_samples
        self.max_bytes = max_bytes
        self.lost = 0
        self.problem = ""
        self._high = _High(path.with_suffix(".high"))
        self._db: sqlite3.Connection | None = None
        self._inode = 0
        self._waiting: deque[Transition] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the database; what waits in memory is written first if the disk allows."""
        self._flush()
        self._disconnect()

    # --- transitions -----------------------------------------------------------------------------------

    def add_transition(
        self,
        at: datetime,
        *,
        version: str,
        digest: str,
        salt: str,
        state: AttemptState,
        reason: str = "",
        detail: str = "",
    ) -> int:
        """Number a transition and keep it until the server accepted it; durable on return if the disk can.

        Returns:
            The transition's number, higher than any this agent gave out before.
        """
        self._flush()
        with self._high.locked() as high:
            number = max(high.value, self._highest_kept(at)) + 1
            high.raise_to(number)
            cut = detail[: MAX_TEXT - 1]
            transition = Transition(number, iso(at), version, digest, salt, state, str(reason), cut)
            if not self._keep([transition]):
                self._wait(transition)
        return number

    def pending(self, limit: int = 100) -> list[Transition]:
        """The oldest transitions that the server has not accepted, in the order of their numbers."""
        self._flush()
        rows = self._attempt(
            "SELECT number, at, version, digest, salt, state, reason, detail FROM transitions"
            " ORDER BY number LIMIT ?",
            (limit,),
        )
        # A state that this version does not know was written by a newer one that was rolled back.
        kept = [_transition(row) for row in rows or () if row[5] in set(AttemptState)]
        return sorted([*kept, *self._waiting], key=lambda transition: transition.number)[:limit]

    def accepted(self, through: int) -> None:
        """The server has every transition up to and with `through`: forget them.

        A number above all we know means that our memory was lost: the next ones continue above it.
        """
        while self._waiting and self._waiting[0].number <= through:
            self._waiting.popleft()
        with self._high.locked() as high:
            if through > high.value:
                high.raise_to(through)
        self._attempt("DELETE FROM transitions WHERE number <= ?", (through,))
        self._attempt(_RAISE_FACT, ("accepted", through))

    @property
    def waiting(self) -> int:
        """How many transitions are in memory only, because the disk refuses them."""
        return len(self._waiting)

    # --- samples ---------------------------------------------------------------------------------------

    def add_sample(self, at: datetime, figures: dict[str, float]) -> None:
        """Keep figures until they are sent; beyond the bounds the oldest go, and are counted."""
        text = json.dumps(figures, sort_keys=True, separators=(",", ":"))
        insert = "INSERT INTO samples (at, figures, length) VALUES (?, ?, ?)"
        if self._attempt(insert, (iso(at), text, len(text))) is None:
            self.lost += 1
        self._drop_oldest()

    def samples(self, limit: int = 100) -> list[tuple[int, str, dict[str, float]]]:
        """The oldest samples: id, time, figures."""
        rows = self._attempt("SELECT id, at, figures FROM samples ORDER BY id LIMIT ?", (limit,))
        return [(number, at, json.loads(figures)) for number, at, figures in rows or ()]

    def forget_samples(self, through: int) -> None:
        """Forget the samples up to and with the id `through`."""
        self._attempt("DELETE FROM samples WHERE id <= ?", (through,))

    @property
    def dropped(self) -> int:
        """How many samples and transitions gave way to newer ones since the database was made."""
        rows = self._attempt("SELECT value FROM facts WHERE name = 'dropped'", ())
        return rows[0][0] if rows else 0

    def _drop_oldest(self) -> None:
        rows = self._attempt("SELECT count(*), coalesce(sum(length), 0) FROM samples", ())
        count, length = rows[0] if rows else (0, 0)
        while count > self.max_samples or length > self.max_bytes:
            oldest = self._attempt(
                "DELETE FROM samples WHERE id = (SELECT min(id) FROM samples) RETURNING length", ()
            )
            if not oldest:
                return
            count, length = count - 1, length - oldest[0][0]
            self._attempt(_ADD_FACT, ("dropped", 1))

    # --- the disk --------------------------------------------------------------------------------------

    def _wait(self, transition: Transition) -> None:
        self._waiting.append(transition)
        if len(self._waiting) > MAX_WAITING:
            self._waiting.popleft()
            self.lost += 1

    def _flush(self) -> None:
        if self._waiting and self._keep(list(self._waiting)):
            self._waiting.clear()

    def _keep(self, transitions: list[Transition]) -> bool:
        """Write transitions so that they survive a power cut; False when the disk refuses."""
        for transition in transitions:
            row = (
                transition.number,
                transition.at,
                transition.version,
                transition.digest,
                transition.salt,
                str(transition.state),
                transition.reason,
                transition.detail,
            )
            insert = "INSERT OR IGNORE INTO transitions VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
            if self._attempt(insert, row) is None:
                return False
        dropped = self._attempt(
            "DELETE FROM transitions WHERE number <="
            " (SELECT number FROM transitions ORDER BY number DESC LIMIT 1 OFFSET ?) RETURNING 1",
            (MAX_TRANSITIONS_KEPT,),
        )
        if dropped:
            self._attempt(_ADD_FACT, ("dropped", len(dropped)))
        return True

    def _highest_kept(self, at: datetime) -> int:
        """The highest number that database or memory know; from the clock when nothing is left to ask."""
        highest = self._waiting[-1].number if self._waiting else 0
        rows = self._attempt(
            "SELECT max(coalesce((SELECT max(number) FROM transitions), 0),"
            " coalesce((SELECT value FROM facts WHERE name = 'accepted'), 0))",
            (),
        )
        highest = max(highest, rows[0][0] if rows else 0)
        if highest == 0 and self._high.value == 0 and (rows is None or self._aside()):
            # Both memories are gone, but numbers were given out: seconds are far above any of them.
            return int(at.timestamp())
        return highest

    def _attempt(self, sql: str, values: tuple[Any, ...]) -> list[Any] | None:
        """Run one statement in a transaction of its own.

        Returns:
            Its rows, or None when the disk refuses; `problem` then says why. A damaged database is moved
            aside and begun anew.
        """
        for _ in range(2):
            try:
                db = self._connect()
                rows = db.execute(sql, values).fetchall()
            except sqlite3.Error as error:
                self._note(str(error))
                self._disconnect()
                is_damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED
                if not is_damaged and (self.path.is_file() or not self.path.exists()):
                    return None
                self._move_aside()
            except OSError as error:
                self._note(str(error))
                return None
            else:
                self.problem = ""
                return rows
        return None

    def _note(self, problem: str) -> None:
        if problem != self.problem:
            log.warning("the spool cannot be used", extra={"why": problem, "file": str(self.path)})
        self.problem = problem

    def _connect(self) -> sqlite3.Connection:
        if self._db is not None:
            with contextlib.suppress(FileNotFoundError):
                if self.path.stat().st_ino == self._inode:
                    return self._db
            self._disconnect()  # the other process moved a damaged database aside
        db = sqlite3.connect(self.path, timeout=5.0, isolation_level=None)
        try:
            # Not WAL: it maps a sparse file, and on a full disk a write there is answered with SIGBUS. This
            # journal keeps its room, so that a small change has it on a full disk too.
            db.execute("PRAGMA journal_mode = PERSIST")
            db.execute("PRAGMA journal_size_limit = 1048576")
            db.execute("PRAGMA synchronous = FULL")
            if db.execute("PRAGMA user_version").fetchone()[0] < 1:
                db.executescript(f"BEGIN IMMEDIATE;{SCHEMA}COMMIT;")
            self._inode = self.path.stat().st_ino
        except BaseException:
            db.close()
            raise
        self._db = db
        return db

    def _disconnect(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None

    def _aside(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.name}.damaged-*"))

    def _move_aside(self) -> None:
        """Keep a damaged database for whoever looks into it, and only the newest few of them."""
        aside = self._aside()
        numbers = [file.name.rpartition("-")[2] for file in aside]
        number = 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)
        log.error("the spool was damaged; it is kept aside and begun anew", extra={"file": str(self.path)})
        for ending in ("-journal", "-wal", "-shm"):  # first: a new database must never meet an old journal
            with contextlib.suppress(OSError):
                self.path.with_name(self.path.name + ending).unlink()
        with contextlib.suppress(OSError):
            self.path.replace(self.path.with_name(f"{self.path.name}.damaged-{number:06d}"))
        for file in self._aside()[:-KEPT_ASIDE]:
            with contextlib.suppress(OSError):
                file.unlink()  # a directory is somebody's, and stays


def _transition(row: tuple[Any, ...]) -> Transition:
    number, at, version, digest, salt, state, reason, detail = row
    return Transition(number, at, version, digest, salt, AttemptState(state), reason, detail)


_RAISE_FACT = "INSERT INTO facts VALUES (?, ?) ON CONFLICT DO UPDATE SET value = max(value, excluded.value)"
_ADD_FACT = "INSERT INTO facts VALUES (?, ?) ON CONFLICT DO UPDATE SET value = value + excluded.value"


class _High:
    """The highest number ever given out: one checksummed record, overwritten in place under a lock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self.value = 0

    @contextlib.contextmanager
    def locked(self) -> Iterator[Self]:
        """Hold the lock while a number is given out; without the file, this process counts alone."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            log.warning("the number of the last transition cannot be kept", extra={"why": str(error)})
            yield self
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            self.value = max(self.value, self._read(fd))
            self._fd = fd
            yield self
        finally:
            self._fd = -1
            os.close(fd)

    def raise_to(self, number: int) -> None:
        self.value = max(self.value, number)
        if self._fd < 0:
            return
        text = f"relfleet-high {self.value:020d}"
        record = f"{text} {zlib.crc32(text.encode()):08x}".ljust(HIGH_LENGTH - 1) + "\n"
        try:
            os.pwrite(self._fd, record.encode(), 0)
            os.fdatasync(self._fd)
        except OSError as error:
            log.warning("the number of the last transition cannot be kept", extra={"why": str(error)})

    @staticmethod
    def _read(fd: int) -> int:
        try:
            text, _, check = os.pread(fd, HIGH_LENGTH, 0).decode().strip().rpartition(" ")
            if int(check, 16) != zlib.crc32(text.encode()):
                return 0
            return int(text.removeprefix("relfleet-high "))
        except (OSError, ValueError):
            return 0
