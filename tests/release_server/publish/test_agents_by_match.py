"""Agents chosen as cohorts choose them: listed, exported and moved; and where their facts come from."""

from __future__ import annotations

import csv
import io

import pytest

from agent_core.errors import Exit
from release_server.publish.commands import agents as agents_commands
from tests.release_server.fleet_world import World
from tests.release_server.operator_desk import desk


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort("main")
    made.cohort("late", priority=-1)
    for name, version, labels in (
        ("web-1", "1.0.0", {"site": "a"}),
        ("web-2", "1.1.0", {"site": "b"}),
        ("web-3", "1.2.0", {"site": "b"}),
    ):
        made.enroll(name, version=version, labels=labels)
    return made


@pytest.fixture
def at_desk(world, app, token, tmp_path, monkeypatch, capsys):
    with desk(app, token, tmp_path, monkeypatch, capsys) as sat:
        yield sat


@pytest.mark.parametrize(
    ("query", "found"),
    [
        pytest.param("", ["web-1", "web-2", "web-3"], id="nothing said"),
        pytest.param("site=b", ["web-2", "web-3"], id="a label"),
        pytest.param("site=b,version<1.2", ["web-2"], id="by version"),
        pytest.param("id in (web-1, web-3)", ["web-1", "web-3"], id="a list"),
        pytest.param("!rack,site!=b", ["web-1"], id="what is not there"),
        pytest.param("kernel=1", [], id="nobody"),
    ],
)
def test_agents_are_listed_by_what_a_match_can_ask(at_desk, query, found):
    assert [agent["id"] for agent in at_desk.json("agents", "list", "-l", query)] == found


def test_a_list_goes_through_every_page_also_where_a_match_leaves_pages_empty(at_desk, monkeypatch):
    pages = agents_commands.pages
    monkeypatch.setattr(agents_commands, "pages", lambda labels, **said: pages(labels, limit="1", **said))
    assert [agent["id"] for agent in at_desk.json("agents", "list", "-l", "id=web-3")] == ["web-3"]
    assert len(at_desk.run("agents", "export")[1].splitlines()) == 4


def test_every_agent_is_in_the_csv_whatever_a_page_holds(at_desk, world, tmp_path):
    code, out, _ = at_desk.run("agents", "export", "-l", "site=b")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert (code, [row["id"] for row in rows]) == (0, ["web-2", "web-3"])
    file = tmp_path / "agents.csv"
    assert "3 agents written" in at_desk.run("agents", "export", "-o", str(file))[2]
    assert len(file.read_text().splitlines()) == 4


def test_all_that_match_are_moved_once_somebody_has_agreed(at_desk, world):
    code, _, err = at_desk.run("agents", "move", "-l", "site=b", "--cohort", "late", "--no-input")
    assert (code, "moves 2 agents to late" in err) == (Exit.USAGE, True)
    assert world.agent("web-2").cohort == "main"
    moved = at_desk.json("agents", "move", "-l", "site=b", "--cohort", "late", "--reason", "slow site")
    assert [agent["cohort"] for agent in moved] == ["late", "late"]
    assert [world.agent(name).cohort for name in ("web-1", "web-2", "web-3")] == ["main", "late", "late"]
    at_desk.json("agents", "move", "web-2", "web-3", "--by-labels")
    assert world.agent("web-3").cohort == "main"


@pytest.mark.parametrize("words", [(), ("web-1", "-l", "site=b")], ids=["nobody", "both"])
def test_whom_to_move_is_said_one_way(at_desk, words):
    assert at_desk.run("agents", "move", *words, "--cohort", "late")[0] == Exit.USAGE


def test_show_says_where_each_fact_comes_from(at_desk, world):
    at_desk.json("agents", "label", "web-1", "tier=db")
    out = at_desk.run("agents", "show", "web-1")[1]
    facts = {tuple(line.split()) for line in out.splitlines()}
    assert {("site", "a", "host"), ("tier", "db", "operator"), ("version", "1.0.0", "agent")} <= facts
