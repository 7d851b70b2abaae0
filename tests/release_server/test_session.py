"""The session of docs/operations.md, typed as it is written there: a leak that shows late stops a rollout."""

from __future__ import annotations

import re
import shlex
from itertools import count
from pathlib import Path

import pytest

from release_server import launch
from release_server.figures import MIB
from tests.release_server.fleet_world import World
from tests.release_server.operator_desk import desk

PAGE = Path(__file__).parents[2] / "docs" / "operations.md"
HOSTS = 100
CALM, LEAKED = {"rss": 100 * MIB}, {"rss": 300 * MIB}


def session() -> list[tuple[str, list[str]]]:
    """What is typed (`$ …`), or happens meanwhile (`# …`), each with the lines that follow it on the page."""
    text = PAGE.read_text().split("## A leak that shows late\n", 1)[1]
    block = re.search(r"^```text\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert block is not None
    steps: list[tuple[str, list[str]]] = []
    for line in block[1].splitlines():
        if line.startswith(("$ ", "# ")):
            steps.append((line, []))
        elif line.strip():
            steps[-1][1].append(line.rstrip())
    return steps


class Story:
    """A hundred hosts; what happens to them in the times between two commands."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.since = {}
        world.cohort("main", report_s=3_600)
        world.enroll_many(HOSTS)
        world.clock.step(seconds=10)
        for host in world.hosts.values():
            world.report(host, figures=CALM)
        self.began = world.clock()

    def pass_time(self, minutes: int) -> None:
        """Every five minutes the jobs process looks, and whoever is offered the release takes it."""
        for _ in range(minutes // 5):
            self.world.tick(minutes=5)
            for host in self.world.offered("1.1.0", "main"):
                if host.version != "1.1.0":
                    self.world.finish(host, 1, "healthy")
                    self.since[host.id] = self.world.clock()
            self.report()
            self.world.tick()

    def report(self) -> None:
        """It takes a host on 1.1.0 a hundred minutes until the leak shows in what it reports."""
        now = self.world.clock()
        for name, host in self.world.hosts.items():
            begun = self.since.get(name, self.began)
            runs = int((now - begun).total_seconds() // 60)
            if runs and runs % (20 if name in self.since else 60) == 0:
                leaks = name in self.since and runs >= 100
                self.world.report(host, figures=LEAKED if leaks else CALM)

    def go_back(self) -> None:
        """Whoever is led back goes back, and says so."""
        for host in self.world.offered("1.0.0", "main"):
            if host.version == "1.1.0":
                host.version = "1.0.0"
                salt = self.world.rollout(1).salt
                self.world.report(host, host.step(self.world.clock(), "healthy", "1.0.0", salt))
        self.world.tick(minutes=5)


@pytest.fixture
def story(sessions, clock, monkeypatch):
    # Salts are random; the page shows one that was drawn.
    drawn = (f"{number:032x}" for number in count(7))
    monkeypatch.setattr(launch.secrets, "token_hex", lambda _length=16: next(drawn))
    made = Story(World(sessions, clock))
    monkeypatch.setattr("agent_core.clock.now", clock)
    return made


def test_the_session_of_the_page_goes_as_it_is_written(story, app, token, tmp_path, monkeypatch, capsys):
    with desk(app, token, tmp_path, monkeypatch, capsys) as at_desk:
        for said, expected in session():
            if said.startswith("# "):
                minutes = re.search(r"(\d+) minutes", said)
                if minutes:
                    story.pass_time(int(minutes[1]))
                else:
                    story.go_back()
                continue
            words = shlex.split(said.removeprefix("$ release "))
            code, out, err = at_desk.run(*words, "--yes")
            lines = [line.rstrip() for line in out.splitlines() if line.strip()]
            assert lines == expected, f"{said}: {code} {out} {err}"
    assert {host.version for host in story.world.hosts.values()} == {"1.0.0"}
    assert len(story.since) == HOSTS // 4, "three quarters never saw it"
