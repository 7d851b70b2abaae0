"""Exactly one cohort an agent: by hand, then by priority, by terms, by name; and at what cost."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import delete, event, select

from agent_core.errors import NotFoundError
from release_server import agents, cohorts, membership, plans
from release_server.membership import Candidate, choose
from release_server.models import Agent, Cohort
from release_server.preview import preview
from release_server.queries import parse
from tests.release_server.fleet_world import World

EU_WEB = {"region": "eu", "tier": "web"}
INVENTORY = {"os": "linux", "arch": "x86_64", "python": "3.11.4", "kernel": "6.1.0-13-amd64"}


@pytest.fixture
def world(sessions, clock):
    return World(sessions, clock)


def candidate(number, name, priority=0, match=""):
    return Candidate(number, name, priority, parse(match))


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ([], None),
        ([candidate(1, "us", match="region=us")], None),
        ([candidate(1, "all"), candidate(2, "eu", match="region=eu")], 2),
        ([candidate(1, "all", priority=1), candidate(2, "eu", match="region=eu")], 1),
        ([candidate(1, "eu", match="region=eu"), candidate(2, "eu-web", match="region=eu,tier=web")], 2),
        ([candidate(1, "b", match="region=eu"), candidate(2, "a", match="tier=web")], 2),
    ],
    ids=["none", "no match", "most specific", "priority first", "more terms", "by name"],
)
def test_an_agent_is_in_the_cohort_of_highest_priority_then_most_terms_then_name(offered, chosen):
    assert choose(offered, EU_WEB) == chosen
    assert choose(reversed(offered), EU_WEB) == chosen


COHORTS = st.lists(
    st.tuples(
        st.integers(-1, 1),
        st.lists(st.sampled_from(["region=eu", "tier!=db", "rack", "!rack"]), max_size=3, unique=True),
    ),
    max_size=6,
).map(lambda made: [candidate(n, f"c{n}", each[0], ",".join(each[1])) for n, each in enumerate(made, 1)])
FACTS = st.dictionaries(st.sampled_from(["region", "tier", "rack"]), st.sampled_from(["eu", "db"]))


@given(COHORTS, FACTS, st.randoms())
def test_the_choice_is_one_that_matches_beats_all_others_and_knows_no_order(offered, facts, random):
    chosen = choose(offered, facts)
    shuffled = list(offered)
    random.shuffle(shuffled)
    assert choose(shuffled, facts) == chosen
    fitting = [each for each in offered if each.match.matches(facts)]
    assert (chosen is None) is (not fitting)
    for best in (each for each in fitting if each.cohort_id == chosen):
        for other in fitting:
            assert best.priority >= other.priority
            if best.priority == other.priority:
                assert len(best.match.terms) >= len(other.match.terms)


def test_operators_override_the_host_and_the_host_its_inventory_and_nobody_what_an_agent_is(world):
    world.cohort("all")
    host = world.enroll("a", labels={"region": "us", "arch": "arm", "version": "9"})
    world.report(host, inventory=INVENTORY)
    world.call(agents.label, "a", labels={"region": "eu", "id": "z"})
    with world.read() as session:
        facts = membership.origins_of(session.get_one(Agent, "a"))
    assert facts["region"] == {"value": "eu", "origin": "operator"}
    assert facts["arch"] == {"value": "arm", "origin": "host"}
    assert facts["kernel"] == {"value": "6.1.0-13-amd64", "origin": "inventory"}
    assert facts["version"] == {"value": "1.0.0", "origin": "agent"}
    assert facts["id"] == {"value": "a", "origin": "agent"}


@pytest.mark.parametrize(
    "match", ["kernel>=6", "python<3.12", "os=linux,arch=x86_64", "version>1.0", "id in (a, b)"]
)
def test_an_agent_moves_when_what_its_host_is_changes(world, match):
    world.cohort("all", match="!never")
    host = world.enroll("a", version="1.0.0")
    world.cohort("picked", match=match, priority=1)
    host.version = "1.1.0"
    assert world.report(host, inventory=INVENTORY).cohort == "picked"


# --- cost ------------------------------------------------------------------------------------------------


@contextmanager
def statements(world):
    """The statements that the block runs."""
    seen = []

    def note(_connection, _cursor, statement, *_):
        seen.append(statement)

    event.listen(world.sessions.engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(world.sessions.engine, "before_cursor_execute", note)


def fill(world, count, cohort_id):
    """So many agents more, which never enrolled: their rows are all that matters here."""
    with world.write() as session:
        first = session.scalars(select(Agent)).first()
        kept = {column.name: getattr(first, column.name) for column in Agent.__table__.columns}
        session.execute(
            Agent.__table__.insert(),
            [
                kept
                | {"id": f"x-{n:05}", "public_key": f"{n:064}", "labels": {"region": "eu"}}
                | {"cohort_id": cohort_id}
                for n in range(count)
            ],
        )


def placed(world):
    with world.read() as session:
        rows = session.execute(select(Agent.id, Cohort.name).join(Cohort, Cohort.id == Agent.cohort_id))
        return {agent_id: name for agent_id, name in rows}  # noqa: C416 - rows are no pairs


def test_a_larger_fleet_is_placed_in_batches_and_a_new_change_begins_anew(world, monkeypatch):
    monkeypatch.setattr(membership, "BATCH", 3)
    world.cohort("all")
    world.enroll("x", labels={"region": "us"})
    fill(world, 7, world.view().cohort.id)
    world.cohort("eu", match="region=eu", priority=1)
    assert sum(name == "eu" for name in placed(world).values()) == 2  # of `x` and two others
    world.call(cohorts.edit, "demo", "eu", match="region in (eu, us)")
    rounds = 0
    while True:
        with world.write() as session:
            if not membership.resettle_some(session):
                break
        rounds += 1
        assert rounds < 5
    assert set(placed(world).values()) == {"eu"}
    with world.read() as session:
        assert not membership.is_resettling(session)


def test_a_change_of_a_query_and_a_report_cost_the_same_in_a_fleet_of_20000(world):
    world.cohort("all")
    host = world.enroll("a")
    costs = []
    for count in (2000, 20_000):
        grow(world, count)
        with statements(world) as ran:
            host.labels = {"now": str(count)}
            world.report(host)
        with statements(world) as edited:
            world.call(cohorts.edit, "demo", "all", match=f"!never-{count}")
        costs.append((len(ran), len(edited)))
    assert costs[0] == costs[1]
    with world.read() as session:
        assert membership.is_resettling(session)


def grow(world, count):
    with world.write() as session:
        session.execute(delete(Agent).where(Agent.id.like("x-%")))
    fill(world, count, world.view().cohort.id)


# --- preview ---------------------------------------------------------------------------------------------


def test_a_preview_counts_who_is_ready_held_silent_and_without_a_bundle(world):
    world.add_release("2.0.0", 9, platform="linux-x86_64")
    world.cohort("all")
    world.enroll("quiet")
    world.clock.step(hours=1)
    world.enroll("ready")
    world.report(world.enroll("held"), held=True)
    world.report(world.enroll("other"), platform="darwin-arm64", held=True)
    with world.read() as session:
        found = preview(session, world.clock(), "demo", "new", "", version="2.0.0", priority=1)
        with pytest.raises(NotFoundError):
            preview(session, world.clock(), "demo", "new")
        with pytest.raises(NotFoundError):
            preview(session, world.clock(), "demo", "all", version="3.0.0")
    assert found.joins.names == ["held", "other", "quiet", "ready"]
    assert (found.ready.names, found.held.names) == (["ready"], ["held", "other"])
    assert (found.silent.names, found.no_bundle.names) == (["quiet"], ["other"])


def test_a_preview_names_the_first_and_counts_all(world, monkeypatch):
    monkeypatch.setattr("release_server.preview.NAMED", 2)
    world.cohort("all")
    world.enroll_many(3)
    with world.read() as session:
        found = preview(session, world.clock(), "demo", "all")
    assert (found.inside.count, found.inside.names) == (3, ["web-00", "web-01"])


def test_a_plan_places_agents_once_however_many_cohorts_it_changes(world, sessions):
    """Each change placed the first thousand anew, under the lock that all who write wait for."""
    world.cohort("rest")
    hosts = [world.enroll(f"web-{number}", labels={"site": str(number)}) for number in range(3)]
    read = []

    def note(*call):
        if "FROM agents" in call[2] and "ORDER BY agents.id" in call[2]:
            read.append(call[2])

    event.listen(sessions.engine, "before_cursor_execute", note)
    steps = [plans.Step("create", f"site-{number}", {"match": f"site={number}"}) for number in range(3)]
    world.call(plans.carry_out, "demo", steps)
    assert len(read) == 1
    assert [world.agent(host.id).cohort for host in hosts] == ["site-0", "site-1", "site-2"]


def test_a_plan_that_fails_leaves_the_placing_of_others_as_it_was(world):
    with world.write() as session:
        with pytest.raises(NotFoundError):
            plans.carry_out(session, world.clock(), "olga", "demo", [plans.Step("delete", "x", {})])
        assert membership.TOGETHER not in session.info
