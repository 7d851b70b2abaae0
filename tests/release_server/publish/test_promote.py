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


def test_what_a_cohort_completed_goes_to_the_next_and_the_log_says_from_where(at_desk):
    ways = (("1.1.0",), ("--from", "canary"), ("1.1.0", "--from", "canary"))
    for words in ways:
        gate = ("--steps", "1,100%", "--soak", "5m", "--supersede")
        started = at_desk.json("promote", *words, "--to", "main", *gate)
        assert (started["cohort"], started["version"], started["state"]) == ("main", "1.1.0", "running")
        assert [stage["soak_s"] for stage in started["stages"]] == [300, 300]
    log = [entry for entry in at_desk.json("audit", "log") if entry["action"] == "rollout.start"]
    assert [entry["detail"]["reason"] for entry in log] == ["", *["promoted from canary (r-1)"] * len(ways)]


REFUSED = {
    "nowhere completed": (("1.2.0", "--to", "main"), Exit.CONFLICT),
    "not by that one": (("1.2.0", "--from", "canary", "--to", "main"), Exit.CONFLICT),
    "settled on, but by no rollout": (("--from", "main", "--to", "canary"), Exit.CONFLICT),
    "completed by itself alone": (("1.1.0", "--to", "canary"), Exit.CONFLICT),
    "a cohort that is not there": (("--from", "nowhere", "--to", "main"), Exit.NOT_FOUND),
    "to none that is there": (("1.1.0", "--to", "nowhere"), Exit.NOT_FOUND),
    "nothing said": (("--to", "main"), Exit.USAGE),
}


def test_without_proof_it_is_refused_and_nothing_begins(at_desk, world):
    answers = {name: at_desk.run("promote", *words) for name, (words, _) in REFUSED.items()}
    assert {name: code for name, (code, _, _) in answers.items()} == {
        name: code for name, (_, code) in REFUSED.items()
    }
    said = answers["nowhere completed"][2]
    assert "no rollout of it has completed" in said
    assert "asks for no proof" in said
    assert len(at_desk.json("rollout", "list")) == 1
    world.call(fleet.undo, 1)  # what was taken back there proves nothing any more
    assert at_desk.run("promote", "1.1.0", "--to", "main")[0] == Exit.CONFLICT
