"""`release promote`: a version goes on to the next cohort when one has completed it, and still runs it."""

from __future__ import annotations

import pytest

from agent_core.errors import Exit
from release_server import fleet
from release_server.stages import Stage
from tests.release_server.fleet_world import World
from tests.release_server.operator_desk import desk


@pytest.fixture
def world(sessions, clock):
    """A canary that has completed 1.1.0, and a cohort after it."""
    made = World(sessions, clock)
    made.cohort("canary", match="ring=canary", priority=1)
    made.cohort("main")
    host = made.enroll("web-1", labels={"ring": "canary"})
    made.enroll("web-2")
    made.start("1.1.0", Stage(count=1), cohort="canary")
    made.finish(host, 1, "healthy")
    made.tick(seconds=1)
    assert made.status(1).state == "completed"
    return made


@pytest.fixture
def at_desk(world, app, token, tmp_path, monkeypatch, capsys):
    with desk(app, token, tmp_path, monkeypatch, capsys) as sat:
        yield sat


@pytest.mark.parametrize(
    "words",
    [("1.1.0",), ("--from", "canary"), ("1.1.0", "--from", "canary")],
    ids=["a version", "what a cohort runs", "both"],
)
def test_what_a_cohort_completed_goes_to_the_next_and_the_log_says_from_where(at_desk, world, words):
    started = at_desk.json("promote", *words, "--to", "main", "--steps", "1,100%", "--soak", "5m")
    assert (started["cohort"], started["version"], started["state"]) == ("main", "1.1.0", "running")
    assert [stage["soak_s"] for stage in started["stages"]] == [300, 300]
    (entry,) = [entry for entry in at_desk.json("audit", "log") if entry["action"] == "rollout.start"][1:]
    assert entry["detail"]["reason"] == "promoted from canary (r-1)"


@pytest.mark.parametrize(
    "words",
    [("1.2.0",), ("1.2.0", "--from", "canary"), ("--from", "main")],
    ids=["nowhere completed", "not by that one", "settled on, but by no rollout"],
)
def test_what_no_cohort_completed_is_refused_and_nothing_begins(at_desk, words):
    code, _, said = at_desk.run("promote", *words, "--to", "main" if "main" not in words else "canary")
    assert (code, "no rollout of it has completed" in said) == (Exit.CONFLICT, True)
    assert "asks for no proof" in said
    assert len(at_desk.json("rollout", "list")) == 1


def test_what_was_taken_back_there_or_pinned_away_is_no_proof(at_desk, world):
    world.call(fleet.undo, 1)
    assert at_desk.run("promote", "1.1.0", "--to", "main")[0] == Exit.CONFLICT


def test_its_own_completion_is_no_proof_for_a_cohort(at_desk):
    assert at_desk.run("promote", "1.1.0", "--to", "canary")[0] == Exit.CONFLICT


def test_a_cohort_that_is_not_there_is_7_and_nothing_said_is_2(at_desk):
    assert at_desk.run("promote", "--from", "nowhere", "--to", "main")[0] == Exit.NOT_FOUND
    assert at_desk.run("promote", "1.1.0", "--to", "nowhere")[0] == Exit.NOT_FOUND
    assert at_desk.run("promote", "--to", "main")[0] == Exit.USAGE
