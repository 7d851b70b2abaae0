"""Every step of the schema, up and down, with a row in each table: nothing that both know is lost."""

from __future__ import annotations

from datetime import datetime, timedelta

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from agent_core import clock
from release_server import audit, cohorts
from release_server.attempts import SENT_BACK
from release_server.database import MIGRATIONS, Sessions, current_revision, downgrade, make_engine, upgrade
from release_server.models import AuditEntry, Base, CohortStatus
from tests.release_server.fleet_world import World

REVISIONS = [step.revision for step in reversed(list(ScriptDirectory(str(MIGRATIONS)).walk_revisions()))]
NOON = datetime(2026, 5, 1, 12, 0, 0, 123456)  # noqa: DTZ001 - as a migration sees it
OWN = {"alembic_version", "audit_head"}
COMPUTED = {"audit": {"hash", "previous"}, "cohort_status": {"due_at"}}


@pytest.fixture
def engine(empty_url):
    made = make_engine(empty_url)
    yield made
    made.dispose()


def tables_of(connection):
    found = sa.MetaData()
    found.reflect(connection)
    return found


def value_of(column, number):
    """Something that fits the column, and differs from row to row."""
    if column.foreign_keys:
        return None  # given by the parent's row
    match column.type:
        case sa.Boolean():
            return True
        case sa.Integer() | sa.Numeric() | sa.Float():
            return number
        case sa.DateTime():
            return NOON
        case sa.LargeBinary():
            return b"\x00\xff"
        case sa.JSON():
            return {"ä": [number, None]}
    return f"{column.name}-{number:02}"[: column.type.length]


def fill(engine, number):
    """One new row in every table there is at this revision, parents first."""
    with engine.begin() as connection:
        for table in tables_of(connection).sorted_tables:
            if table.name in OWN:
                continue
            row = {column.name: value_of(column, number) for column in table.columns}
            for column in table.columns:
                for key in column.foreign_keys:
                    newest = sa.select(sa.func.max(key.column))
                    row[column.name] = connection.scalar(newest)
            connection.execute(table.insert(), row)


def rows_of(engine):
    """Everything, but for what a revision computes itself."""
    with engine.connect() as connection:
        return {
            table.name: [
                dict(row)
                for row in connection.execute(
                    sa.select(table).order_by(*table.primary_key.columns)
                ).mappings()
            ]
            for table in tables_of(connection).sorted_tables
            if table.name not in OWN
        }


def assert_kept(before, after):
    """Every row is there after, with the same values wherever both schemas have the column."""
    for name in before.keys() & after.keys():
        assert len(before[name]) == len(after[name]), name
        for old, new in zip(before[name], after[name], strict=True):
            common = old.keys() & new.keys() - COMPUTED.get(name, set())
            assert {key: old[key] for key in common} == {key: new[key] for key in common}, name


def test_rows_of_every_revision_go_up_to_the_newest_and_down_again(engine, empty_url):
    for number, revision in enumerate(REVISIONS, 1):
        before = rows_of(engine)
        upgrade(empty_url, revision)
        assert_kept(before, rows_of(engine))
        fill(engine, number)
    for older in reversed(REVISIONS[:-1]):
        before = rows_of(engine)
        downgrade(empty_url, older)
        assert current_revision(engine) == older
        assert_kept(before, rows_of(engine))
    assert all(len(rows) == len(REVISIONS) for rows in rows_of(engine).values())
    upgrade(empty_url)
    assert {name for name, rows in rows_of(engine).items() if rows} >= {"agents", "attempts", "releases"}
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_a_pin_and_a_freeze_that_stand_are_given_the_reasons_they_were_made_for(engine, empty_url):
    upgrade(empty_url, "0015")
    said = (
        (None, False, "made"),
        ("1.0", False, "the fair"),
        ("1.0", True, "year end"),
        ("1.0", True, "slower"),
    )
    with engine.begin() as connection:
        tables = tables_of(connection).tables
        connection.execute(tables["products"].insert(), {"id": 1, "name": "p", "created_at": NOON})
        connection.execute(
            tables["cohorts"].insert(), {"id": 1, "product_id": 1, "name": "c", "created_at": NOON}
        )
        for number, (pin, frozen, reason) in enumerate((*said, (None, True, "back")), 1):
            table = tables["cohort_specs"]
            row = {column.name: value_of(column, number) for column in table.columns}
            row |= {"cohort_id": 1, "revision": number, "pin": pin, "frozen": frozen, "frozen_until": None}
            connection.execute(table.insert(), row | {"actor": "olga", "reason": reason})
    upgrade(empty_url, "0016")
    with engine.connect() as connection:
        table = tables_of(connection).tables["cohort_specs"]
        found = connection.scalars(sa.select(table.c.because).order_by(table.c.revision)).all()
    at = "2026-05-01T12:00:00Z"
    pin, freeze = ({"actor": "olga", "reason": text, "at": at} for text in ("the fair", "year end"))
    assert found == [
        {},
        {"pin": pin},
        {"pin": pin, "freeze": freeze},
        {"pin": pin, "freeze": freeze},
        {"freeze": freeze},
    ]


def test_what_only_newer_code_counts_goes_down_with_no_rollout(engine, empty_url):
    """Older code reads each counter as the state of an attempt."""
    upgrade(empty_url, "0018")
    fill(engine, 1)
    before = rows_of(engine)
    (known,) = before["rollout_counters"]
    with engine.begin() as connection:
        table = tables_of(connection).tables["rollout_counters"]
        connection.execute(table.insert(), known | {"state": SENT_BACK, "count": 3})
    downgrade(empty_url, "0017")
    assert_kept(before, rows_of(engine))


def test_what_a_calendar_freezes_at_an_upgrade_is_told_by_the_next_tick_once(engine, empty_url):
    """And a freeze by hand, told before, is not: its end is taken over."""
    upgrade(empty_url)
    world = World(Sessions(engine), clock.now)
    world.cohort("by-calendar", match="a=b", calendar={"always": "mon-sun UTC"})
    world.cohort("by-hand")
    until = clock.now() + timedelta(hours=1)
    world.call(cohorts.freeze, "demo", "by-hand", until=until)
    downgrade(empty_url, "0017")
    upgrade(empty_url)
    with world.read() as session:
        ends = sa.select(CohortStatus.frozen_by_hand_until).order_by(CohortStatus.cohort_id)
        assert session.scalars(ends).all() == [None, until]
    for _ in range(2):
        with world.sessions.write() as session:
            cohorts.refresh_due(session, clock.now())
    with world.read() as session:
        told = session.execute(
            sa.select(AuditEntry.subject, AuditEntry.detail).where(
                AuditEntry.action == "cohort.freeze", AuditEntry.actor == audit.SERVER
            )
        ).all()
        due = session.scalars(sa.select(CohortStatus.due_at).order_by(CohortStatus.cohort_id)).all()
    assert told == [("demo/by-calendar", {"by": "always"})] * 2, "before the upgrade, and after it"
    assert all(at > clock.now() for at in due)


def test_down_to_nothing_leaves_nothing(engine, empty_url):
    upgrade(empty_url)
    downgrade(empty_url, "base")
    assert current_revision(engine) is None
    assert rows_of(engine) == {}


def test_a_step_that_fails_leaves_the_schema_as_it_was(engine, empty_url, monkeypatch):
    """Each runs in one transaction, on both databases."""
    from alembic import op

    upgrade(empty_url, "0001")
    fill(engine, 1)
    before = rows_of(engine)

    def fail(*_, **__):
        raise OSError("the power is gone")

    monkeypatch.setattr(op, "bulk_insert", fail)  # in the middle of 0003
    with pytest.raises(OSError, match="power"):
        upgrade(empty_url)
    assert current_revision(engine) == "0001"
    assert rows_of(engine) == before
