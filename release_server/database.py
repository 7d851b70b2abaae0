"""The database: one engine for SQLite and PostgreSQL, short transactions, and the schema's upgrades."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, event, func, inspect, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from agent_core.errors import RelfleetError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from alembic.config import Config as AlembicConfig
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExceptionContext

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_S = 10
"""How long a writer waits for another before the call answers 503."""
WRITES = "relfleet_writes"
WRITER = 0x72666C74
"""The key of the advisory lock that a writer holds on PostgreSQL."""
POSTGRES = {
    # Whoever waits for longer answers 503. A replica that was stopped in the middle of a transaction, or
    # whose host is gone, holds the lock no longer than this.
    "options": f"-c lock_timeout={BUSY_S}s -c idle_in_transaction_session_timeout=30s -c timezone=UTC",
    "keepalives_idle": 5,
    "keepalives_interval": 5,
    "keepalives_count": 3,
}


def make_engine(url: str) -> Engine:
    """An engine for `sqlite:///FILE` or any PostgreSQL URL; nothing is opened yet.

    SQLite runs with WAL, so that readers never wait for the writer, and with `synchronous=FULL`, because an
    answered transition must survive a power cut (design section 3). Writers begin IMMEDIATE: a transaction
    that reads first and writes later would otherwise fail at once, whatever the busy timeout says.
    PostgreSQL's writers take an advisory lock first, so that there too one writes at a time, in all replicas,
    and sees all that those before it wrote (docs/decisions/0019); its readers see one snapshot.
    The values of a statement that fails are in no message: they may be secret, and messages are logged.
    """
    if not url.startswith("sqlite"):
        engine = create_engine(
            url,
            pool_pre_ping=True,
            pool_size=16,
            max_overflow=16,
            hide_parameters=True,
            connect_args=POSTGRES,
            isolation_level="REPEATABLE READ",
        )
        event.listen(engine, "begin", _begin_postgres)
        event.listen(engine, "handle_error", _leave_out_values)
        return engine
    engine = create_engine(url, pool_size=32, max_overflow=32, hide_parameters=True)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; `_begin_sqlite` does
    for pragma in (
        f"busy_timeout={BUSY_S * 1000}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}").close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get(WRITES)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _begin_postgres(connection: Connection) -> None:
    # Read committed, for a snapshot of the whole transaction would be taken before the lock is had.
    if connection.get_execution_options().get(WRITES):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER})")


def _leave_out_values(failed: ExceptionContext) -> None:
    """PostgreSQL's own messages tell the row that failed, below their first line."""
    for error in (failed.original_exception, failed.sqlalchemy_exception):
        if error is not None and error.args:
            error.args = (str(error.args[0]).partition("\n")[0], *error.args[1:])


def for_writing(engine: Engine) -> Engine:
    """The same engine, whose transactions write: one at a time."""
    if engine.dialect.name == "sqlite":
        return engine.execution_options(**{WRITES: True})
    return engine.execution_options(**{WRITES: True}, isolation_level="READ COMMITTED")


def shared_now(session: Session) -> datetime | None:
    """What time it is for all replicas of one database: PostgreSQL's; None on SQLite, which has one host."""
    if session.get_bind().dialect.name == "sqlite":
        return None
    now: datetime | None = session.scalar(select(func.clock_timestamp()))
    return now


STIRRED = "stirred"


def stir(session: Session) -> None:
    """Say that what this transaction changes is for the jobs process to act on, once it is committed."""
    session.info[STIRRED] = True


class Sessions:
    """Gives out transactions: `read()` sees one consistent state, `write()` commits all or nothing.

    Args:
        engine: of `make_engine`.
        stirred: called after the commit of a transaction that `stir` was said in.
    """

    def __init__(self, engine: Engine, stirred: Callable[[], None] = lambda: None) -> None:
        self.engine = engine
        self._stirred = stirred
        self._read = sessionmaker(engine, expire_on_commit=False)
        self._write = sessionmaker(for_writing(engine), expire_on_commit=False)
        self._around: ContextVar[Session | None] = ContextVar("around", default=None)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that is rolled back at its end; what it changed is lost."""
        with self._read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed at its end, and rolled back when the block raises.

        Inside of `together()` it is a part of that one: rolled back by itself, committed with it.
        """
        around = self._around.get()
        if around is not None:
            with around.begin_nested():
                yield around
            return
        with self._write.begin() as session:
            yield session
        self._committed(session)

    @contextmanager
    def together(self) -> Iterator[Session]:
        """One transaction for all that this thread writes in the block."""
        with self._write.begin() as session:
            before = self._around.set(session)
            try:
                yield session
            finally:
                self._around.reset(before)
        self._committed(session)

    def _committed(self, session: Session) -> None:
        if STIRRED in session.info:
            self._stirred()

    def close(self) -> None:
        self.engine.dispose()


# --- the schema ------------------------------------------------------------------------------------------


def _alembic(connection: Connection) -> AlembicConfig:
    from alembic.config import Config as AlembicConfig

    config = AlembicConfig()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    return config


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the schema to `revision`; does nothing when it is there already."""
    from alembic import command

    with _migrating(url) as config:
        command.upgrade(config, revision)


def downgrade(url: str, revision: str) -> None:
    """Take the schema back to an older `revision`; what only the newer one knows is lost."""
    from alembic import command

    with _migrating(url) as config:
        command.downgrade(config, revision)


@contextmanager
def _migrating(url: str) -> Iterator[AlembicConfig]:
    """One transaction for all steps: they are there together, or the schema is as it was."""
    engine = make_engine(url)
    if engine.dialect.name == "sqlite":
        # A table that others refer to is changed by a copy in its place; references are looked at in the end.
        event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA foreign_keys=OFF").close())
    try:
        with for_writing(engine).begin() as connection:
            yield _alembic(connection)
            _check_references(connection)
    finally:
        engine.dispose()


def _check_references(connection: Connection) -> None:
    if connection.dialect.name != "sqlite":
        return
    if dangling := connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall():
        raise RelfleetError(
            "the schema was left as it was",
            why=f"a row of {dangling[0][0]} would refer to one of {dangling[0][2]} that is not there",
            then="restore a backup, or look at that row",
            reason="schema",
        )


def current_revision(engine: Engine) -> str | None:
    """The revision the database is at, or None when it has no schema yet."""
    with engine.connect() as connection:
        if not inspect(connection).has_table("alembic_version"):
            return None
        found: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
        return found


def newest_revision() -> str:
    """The revision this program wants: the files are numbered, so that asking does not load alembic."""
    return max(file.name.partition("_")[0] for file in (MIGRATIONS / "versions").glob("[0-9]*_*.py"))


@contextmanager
def failures_named() -> Iterator[None]:
    """What a database refuses to a command, such as a connection or more room, is no mistake of ours.

    Raises:
        RelfleetError: `database`, with its own words.
    """
    try:
        yield
    except (sqlite3.Error, DBAPIError) as error:
        own = error.orig if isinstance(error, DBAPIError) else error
        raise RelfleetError(
            "the database cannot be used",
            why=str(own).partition("\n")[0],
            then="see that it is there, that database.url names it, and that its disk has room",
            reason="database",
        ) from error
