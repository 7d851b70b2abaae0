"""Processes that ask for leases at the same moment: never more are granted than the cohort allows."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from sqlalchemy import delete, select

from release_server import cohorts
from release_server.models import ActivationLease
from tests.release_server.fleet_world import World

HOSTS, PROCESSES, LIMIT, ROUNDS = 9, 3, 2, 10

ASKER = """\
import json, sys
from agent_core import clock
from agent_core.wire import LeaseRequest
from datetime import timedelta
from release_server import leases
from release_server.database import Sessions, make_engine
from release_server.models import Agent

sessions = Sessions(make_engine(sys.argv[1]))
with sessions.read() as session:
    session.get_one(Agent, sys.argv[2])
print("ready", flush=True)
for _ in sys.stdin:
    granted = []
    for name in sys.argv[2:]:
        with sessions.write() as session:
            agent = session.get_one(Agent, name)
            if leases.ask(session, clock.now(), agent, LeaseRequest("1.1.0"), timedelta(minutes=9)).granted:
                granted.append(name)
    print(json.dumps(granted), flush=True)
"""


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    for number in range(HOSTS):
        made.enroll(f"web-{number}", labels={"site": "berlin"})
    made.call(cohorts.edit, "demo", "all", lease={"scope": "site", "limit": LIMIT})
    return made


@pytest.fixture
def ask_at_once(world, config):
    """Each process asks for some of the hosts, all beginning together; who was granted a lease."""
    hosts, argv = list(world.hosts), [sys.executable, "-c", ASKER, config.database_url]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    askers = [subprocess.Popen([*argv, *hosts[n::PROCESSES]], **pipes) for n in range(PROCESSES)]
    assert [asker.stdout.readline() for asker in askers] == ["ready\n"] * PROCESSES

    def ask():
        for asker in askers:
            asker.stdin.write("\n")
            asker.stdin.flush()
        return sorted(name for asker in askers for name in json.loads(asker.stdout.readline()))

    yield ask
    for asker in askers:
        asker.communicate(timeout=60)


def test_processes_that_ask_at_once_are_never_granted_more_than_the_limit(world, ask_at_once):
    for _ in range(ROUNDS):
        with world.write() as session:
            session.execute(delete(ActivationLease))
        granted = ask_at_once()
        assert len(granted) == LIMIT
        with world.read() as session:
            assert sorted(session.scalars(select(ActivationLease.agent_id))) == granted
    assert ask_at_once() == granted, "who has one keeps it, and nobody else comes in"
