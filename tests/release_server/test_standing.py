"""How an agent stands: a table, and that a list by state is the same table in SQL."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import product

import pytest
from sqlalchemy import select

from release_server import agents
from release_server.hearing import Hearing
from release_server.models import Agent, Lease
from release_server.standing import GONE, Facts, Standing, standing
from tests.release_server.fleet_world import World

NOW = datetime(2026, 3, 2, 12, tzinfo=UTC)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)


def facts(quiet, **said):
    return Facts(NOW - quiet, MINUTE, **said)


@pytest.mark.parametrize(
    ("known", "stands"),
    [
        pytest.param(facts(SECOND), "ok", id="heard a moment ago"),
        pytest.param(facts(-MINUTE), "ok", id="heard ahead of time"),
        pytest.param(facts(150 * SECOND), "ok", id="one report missed, within the grace"),
        pytest.param(facts(151 * SECOND), "late", id="one report missed"),
        pytest.param(facts(210 * SECOND), "late", id="three reports missed, within the grace"),
        pytest.param(facts(211 * SECOND), "silent", id="three reports missed"),
        pytest.param(facts(GONE), "silent", id="quiet for nearly too long"),
        pytest.param(facts(GONE + SECOND), "gone", id="offline for good"),
        pytest.param(facts(SECOND, held=True), "held", id="held"),
        pytest.param(facts(151 * SECOND, held=True), "held", id="held and late"),
        pytest.param(facts(SECOND, failed=True, held=True), "failed", id="failed and held"),
        pytest.param(facts(211 * SECOND, failed=True), "silent", id="failed and silent"),
        pytest.param(facts(GONE * 2, pending=True), "pending", id="pending and gone"),
        pytest.param(facts(SECOND, pending=True, retired=True), "retired", id="rejected"),
    ],
)
def test_an_agent_is_what_weighs_most(known, stands):
    assert standing(known, NOW) == stands


def test_a_long_period_does_not_let_an_agent_be_gone_before_it_is_silent():
    known = Facts(NOW - GONE - SECOND, timedelta(days=20))
    assert standing(known, NOW) is Standing.GONE


def test_an_agent_that_could_not_report_is_neither_late_nor_silent():
    away = Hearing(((NOW - HOUR, NOW - MINUTE),), settle=90 * SECOND)
    assert standing(facts(HOUR + SECOND, hearing=away), NOW) is Standing.OK
    assert standing(facts(HOUR + 211 * SECOND, hearing=away), NOW) is Standing.SILENT


@pytest.mark.parametrize("away", [(), (1000, 200), (650, 20), (300, -1)], ids=str)
def test_a_list_by_state_holds_exactly_the_agents_that_are_in_it(sessions, clock, away):
    world = World(sessions, clock)
    world.cohort("all", match="in", poll_s=60, report_s=60)
    world.enroll("first")
    quiet = (0, 151, 211, 700, 1000, 40 * 86_400)
    with world.write() as session:
        if away:
            gap = [(clock() - ago * SECOND).isoformat() for ago in away]
            session.add(Lease(name="jobs", holder="", until=clock(), gaps=[gap]))
        first = session.scalars(select(Agent)).one()
        kept = {column.name: getattr(first, column.name) for column in Agent.__table__.columns}
        for number, (seconds, inside, held, pending, retired) in enumerate(
            product(quiet, *[(False, True)] * 4)
        ):
            session.add(
                Agent(
                    **kept
                    | {"id": f"x-{number}", "public_key": f"{number:064}", "held": held, "pending": pending}
                    | {"seen_at": clock() - timedelta(seconds=seconds)}
                    | {"retired_at": clock() if retired else None}
                    | {"cohort_id": world.view().cohort.id if inside else None}
                )
            )
    with world.read() as session:
        by_state = {
            state: {
                view.agent.id: view.state
                for view in agents.list_agents(session, clock(), agents.Filter(state=state), limit=1000)
            }
            for state in Standing
        }
    assert sum(map(len, by_state.values())) == 1 + len(quiet) * 16
    assert all(set(found.values()) <= {state} for state, found in by_state.items())
    seldom = {Standing.FAILED} | ({Standing.LATE, Standing.SILENT} if away else set())
    assert {state for state, found in by_state.items() if found} >= set(Standing) - seldom
