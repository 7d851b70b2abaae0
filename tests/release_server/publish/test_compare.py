"""`release compare`: two releases or two cohorts, with what agents really reported."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from agent_core.errors import Exit
from release_server import fleet
from release_server.comparison import Figure, compare, worse
from release_server.models import Attempt
from release_server.retention import sweeps
from release_server.retention.settings import Retention
from release_server.retention.sweeps import Turn
from release_server.stages import Stage
from tests.release_server.fleet_world import World
from tests.release_server.operator_desk import desk

MIB = 2.0**20


@pytest.fixture
def world(sessions, clock):
    """Of four agents two took 1.1.0, and leak; one went back from it; one was never asked."""
    made = World(sessions, clock)
    made.cohort("main")
    made.cohort("late", match="ring=late", priority=1)
    hosts = [made.enroll(f"web-{number}") for number in range(3)]
    made.enroll("web-9", labels={"ring": "late"})
    made.start("1.1.0", Stage(count=3, max_failed=3), cohort="main")
    for host, outcome in zip(hosts, ("healthy", "healthy", "rolled_back"), strict=True):
        made.finish(host, 1, outcome, "" if outcome == "healthy" else "workload-exited")
    made.clock.step(minutes=5)
    for host in made.hosts.values():
        leaks = host.version == "1.1.0"
        made.report(host, figures={"rss": (900 if leaks else 100) * MIB, "restarts": 1.0})
    made.tick(seconds=1)
    return made


@pytest.fixture
def at_desk(world, app, token, tmp_path, monkeypatch, capsys):
    with desk(app, token, tmp_path, monkeypatch, capsys, role="reader") as sat:
        yield sat


def test_two_releases_are_told_apart_by_failures_and_figures_and_read_as_a_table(at_desk):
    found = at_desk.json("compare", "1.0.0", "1.1.0")
    old, new = found["sides"]
    assert (found["by"], found["worse"]) == ("release", ["rss"])
    assert (old["agents"], old["attempts"], old["failed_share"], old["reasons"]) == (2, {}, None, {})
    assert (new["agents"], new["attempts"]) == (2, {"healthy": 2, "rolled_back": 1})
    assert (new["failed_share"], new["reasons"]) == (0.3333, {"workload-exited": 1})
    assert new["figures"]["rss"] == {"agents": 2, "median": 900 * MIB, "most": 900 * MIB}
    code, out, _ = at_desk.run("compare", "1.0.0", "1.1.0")
    assert code == Exit.DONE
    assert [line.rstrip() for line in out.splitlines()] == [
        "RELEASE           1.0.0          1.1.0",
        "agents            2              2",
        "versions          2 1.0.0        2 1.1.0",
        "attempts          -              2 healthy, 1 rolled back",
        "failed            -              33.3%",
        "because           -              1 workload-exited",
        "restarts, median  1 (2)          1 (2)",
        "rss, median       100.0 MiB (2)  900.0 MiB (2)             worse",
    ]


def test_two_cohorts_are_compared_and_names_of_both_kinds_or_none_are_told(at_desk, world):
    found = at_desk.json("compare", "late", "main")
    late, main = found["sides"]
    assert found["by"] == "cohort"
    assert (late["agents"], late["versions"], late["attempts"]) == (1, {"1.0.0": 1}, {})
    assert (main["agents"], main["versions"]) == (3, {"1.0.0": 1, "1.1.0": 2})
    assert main["attempts"] == {"healthy": 2, "rolled_back": 1}
    world.cohort("1.1.0", match="ring=none")
    assert at_desk.json("compare", "1.0.0", "1.1.0")["by"] == "release"
    code, _, said = at_desk.run("compare", "1.0.0", "1.1.0", "--by", "cohort")
    assert (code, "no cohort 1.0.0" in said) == (Exit.NOT_FOUND, True)
    assert at_desk.json("compare", "main", "1.1.0", "--by", "cohort")["sides"][1]["agents"] == 0
    assert at_desk.run("compare", "1.0.0", "9.9.9")[0] == Exit.NOT_FOUND
    assert at_desk.run("compare", "main", "nobody")[0] == Exit.NOT_FOUND
    assert at_desk.run("compare", "main", "main")[0] == Exit.USAGE


def test_who_was_sent_back_by_undo_did_not_fail(at_desk, world):
    host, salt = world.hosts["web-0"], world.rollout(1).salt
    world.call(fleet.undo, 1)
    world.tick(minutes=1)
    world.report(host, host.step(world.clock(), "healthy", "1.0.0", salt))
    new = at_desk.json("compare", "1.0.0", "1.1.0")["sides"][1]
    assert new["attempts"] == {"healthy": 1, "rolled_back": 2}
    assert (new["failed_share"], new["reasons"]) == (0.3333, {"workload-exited": 1})
    world.report(world.hosts["web-1"], world.hosts["web-1"].step(world.clock(), "healthy", "1.0.0", salt))
    for name in ("web-0", "web-1"):
        world.hosts[name].version = "1.0.0"
        world.report(world.hosts[name])
    world.tick(minutes=1)
    world.start("1.2.0", Stage(count=3), cohort="main")
    world.clock.step(days=400)
    with world.write() as session:
        keep = Retention({}, 50)
        turn = Turn(world.clock(), world.clock(), "", 1, keep, blobs=None, metadata=None)
        while sweeps.rollouts(session, turn).removed:  # one attempt after the other
            assert _first_share(session) == 0.3333
        assert _first_share(session) == 0.3333
        assert _no_attempt_is_left(session)


def _first_share(session):
    return compare(session, "demo", ("1.0.0", "1.1.0"))["sides"][1]["failed_share"]


def _no_attempt_is_left(session):
    return session.scalar(select(func.count()).where(Attempt.rollout_id == 1)) == 0


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [(100, 263, []), (100, 265, ["rss"]), (100, 50, [])],
    ids=["within the slack", "above it", "better"],
)
def test_a_figure_is_worse_by_the_limits_of_the_gates(before, after, found):
    one, two = (
        {"rss": Figure(3, size * MIB, size * MIB), "own": Figure(3, size, size)} for size in (before, after)
    )
    assert worse(one, two) == found
    assert worse({}, two) == []
