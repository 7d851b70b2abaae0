"""The database: one engine for SQLite and PostgreSQL, short transactions, and the schema's upgrades."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import create_engine, event, inspect, text
from sqlalchemy.orm import Session, sessionmaker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from alembic.config import Config as AlembicConfig
    from sqlalchemy import Connection, Engine

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_S = 10
"""How long a writer waits for another before the call answers 503."""
WRITES = "relfleet_writes"


def make_engine(url: str) -> Engine:
    """An engine for `sqlite:///FILE` or any PostgreSQL URL; nothing is opened yet.

    SQLite runs with WAL, so that readers never wait for the writer, and with `synchronous=FULL`, because an
    answered transition must survive a power cut (design section 3). Writers begin IMMEDIATE: a transaction
    that reads first and writes later would otherwise fail at once, whatever the busy timeout says.
    The values of a statement that fails are in no message: they may be secret, and messages are logged.
    """
    if not url.startswith("sqlite"):
        return create_engine(url, pool_pre_ping=True, pool_size=16, max_overflow=16, hide_parameters=True)
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


class Sessions:
    """Gives out transactions: `read()` sees one consistent state, `write()` commits all or nothing."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._read = sessionmaker(engine, expire_on_commit=False)
        self._write = sessionmaker(engine.execution_options(**{WRITES: True}), expire_on_commit=False)

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A transaction that is rolled back at its end; what it changed is lost."""
        with self._read() as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A transaction that is committed at its end, and rolled back when the block raises."""
        with self._write.begin() as session:
            yield session

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

    engine = make_engine(url)
    try:
        with engine.execution_options(**{WRITES: True}).begin() as connection:
            command.upgrade(_alembic(connection), revision)
    finally:
        engine.dispose()


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
