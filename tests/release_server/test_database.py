from __future__ import annotations

import threading
from contextlib import suppress
from datetime import UTC, datetime

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError

from release_server.database import (
    MIGRATIONS,
    Sessions,
    current_revision,
    make_engine,
    newest_revision,
    stir,
    upgrade,
)
from release_server.models import Base, Product, Release
from tests.postgres import only_sqlite

NOON = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


def test_the_migrations_make_exactly_the_models(sessions):
    with sessions.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_upgrading_twice_changes_nothing(empty_url):
    upgrade(empty_url)
    upgrade(empty_url)
    engine = make_engine(empty_url)
    assert current_revision(engine) == newest_revision() is not None
    engine.dispose()


def test_the_newest_revision_is_the_one_alembic_knows(sessions):
    script = ScriptDirectory(str(MIGRATIONS))
    assert [newest_revision()] == script.get_heads()
    assert current_revision(sessions.engine) == newest_revision()


def test_a_database_without_schema_has_no_revision(empty_url):
    engine = make_engine(empty_url)
    assert current_revision(engine) is None
    engine.dispose()


@only_sqlite
@pytest.mark.parametrize(
    ("pragma", "value"),
    [("journal_mode", "wal"), ("foreign_keys", 1), ("synchronous", 2), ("busy_timeout", 10_000)],
)
def test_sqlite_is_set_up_for_durability_and_waiting(sessions, pragma, value):
    with sessions.read() as session:
        assert session.scalar(text(f"PRAGMA {pragma}")) == value


def test_a_write_that_raises_leaves_nothing(sessions):
    def fail():
        with sessions.write() as session:
            session.add(Product(name="demo", created_at=NOON))
            session.flush()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    with sessions.read() as session:
        assert session.query(Product).count() == 0


@pytest.mark.parametrize("at_the_end", [True, False], ids=["is kept", "goes too"])
def test_of_what_is_written_together_a_part_that_fails_is_undone_alone_and_the_rest_as_a_whole(
    sessions, at_the_end
):
    def add(name):
        with sessions.write() as session:
            session.add(Product(name=name, created_at=NOON))
            session.flush()
            if name == "bad":
                raise ValueError(name)

    with suppress(KeyError), sessions.together():
        add("first")
        with pytest.raises(ValueError, match="bad"):
            add("bad")
        add("last")
        if not at_the_end:
            raise KeyError
    with sessions.read() as session:
        names = session.scalars(select(Product.name).order_by(Product.id)).all()
    assert names == (["first", "last"] if at_the_end else [])
    add("later")  # by itself again
    with sessions.read() as session:
        assert session.scalars(select(Product.name)).all()[-1] == "later"


def test_a_read_keeps_nothing(sessions):
    with sessions.read() as session:
        session.add(Product(name="demo", created_at=NOON))
        session.flush()
    with sessions.read() as session:
        assert session.query(Product).count() == 0


def test_foreign_keys_are_enforced(sessions):
    with pytest.raises(IntegrityError), sessions.write() as session:
        session.add(Release(product_id=77, version="1", seq=1, published_at=NOON, published_by="ada"))


def test_times_come_back_in_utc(sessions):
    with sessions.write() as session:
        session.add(Product(name="demo", created_at=NOON))
    with sessions.read() as session:
        assert session.query(Product).one().created_at == NOON


def test_writers_wait_for_each_other_although_both_read_first(sessions):
    """With a deferred BEGIN the second would fail at once: its snapshot is older than the first's write."""
    with sessions.write() as session:
        session.add(Product(name="demo0", created_at=NOON))
    both_started = threading.Barrier(2)
    failures = []

    def rename():
        try:
            both_started.wait(10)
            for _ in range(20):
                with sessions.write() as session:
                    product = session.query(Product).one()
                    product.name = f"demo{int(product.name[4:]) + 1}"
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=rename) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    with sessions.read() as session:
        assert session.query(Product).one().name == "demo40"


def test_readers_do_not_wait_for_the_writer(sessions):
    with sessions.write() as writing:
        writing.add(Product(name="demo", created_at=NOON))
        writing.flush()
        with sessions.read() as reading:
            assert reading.query(Product).count() == 0


def test_what_stirs_is_told_once_it_is_committed_and_only_then(config):
    told = []
    sessions = Sessions(make_engine(config.database_url), lambda: told.append(1))
    with sessions.write():
        pass
    with suppress(ZeroDivisionError), sessions.write() as session:
        stir(session)
        raise ZeroDivisionError
    assert told == []
    with sessions.write() as session:
        stir(session)
        assert told == []
    with sessions.together():
        with sessions.write() as session:
            stir(session)
        assert told == [1]
    assert told == [1, 1]
    sessions.close()
