"""Agents of one site that ask two replicas for shares at the same moment: never more than the budget."""

from __future__ import annotations

import json
import random
from hashlib import sha256

import pytest
from sqlalchemy import delete, select

from agent_core import wire
from release_server.models import DownloadShare
from tests.release_server.fleet_world import World
from tests.release_server.racers import racing

PATH = "/api/v1/share"
HOSTS, REPLICAS, ROUNDS = 8, 2, 10
BUDGET, LESS = 100_000, 60_000
CEILINGS = (0, 0, 7_000, 20_000, 10**9)


@pytest.fixture
def world(sessions, clock):
    """Most of the site's agents are of one cohort, and some of one with a smaller budget."""
    made = World(sessions, clock)
    made.cohort(budget={"scope": "site", "bytes_per_s": BUDGET, "at_once": 2})
    less = {"scope": "site", "bytes_per_s": LESS, "at_once": 2}
    made.cohort("kiosks", match="kind=kiosk", priority=1, budget=less)
    for number in range(HOSTS):
        made.enroll(f"web-{number}", labels={"site": "berlin"})
    for number in range(2):
        made.enroll(f"kiosk-{number}", labels={"site": "berlin", "kind": "kiosk"})
    return made


def wanting(host, wants_bps=0, *, done=False):
    """A request for a share as the device sends it."""
    body = json.dumps(wire.ShareRequest("1.1.0", wants_bps, done).to_json()).encode()
    host.counter += 1
    signed = wire.signed_text("POST", PATH, sha256(body).hexdigest(), host.counter)
    headers = {
        wire.HEADER_AGENT: host.id,
        wire.HEADER_COUNTER: str(host.counter),
        wire.HEADER_SIGNATURE: host.key.sign(signed).hex(),
    }
    return ("POST", "/share", {"data": body, "headers": headers})


@pytest.fixture
def ask_at_once(world, config, sessions, clock):
    """The hosts named ask, half of them at each replica, both beginning together; their rates by name."""
    sessions.close()
    with racing(config, clock(), REPLICAS) as ask:

        def ask_all(said):
            """`said` has the ceiling of each host, or None for one that gives back."""
            names = list(said)
            shared = [names[number::REPLICAS] for number in range(REPLICAS)]
            requests = [
                [wanting(world.hosts[name], said[name] or 0, done=said[name] is None) for name in own]
                for own in shared
            ]
            rates = {}
            for own, answers in zip(shared, ask(*requests), strict=True):
                assert [status for status, _ in answers] == [200] * len(own)
                rates |= {name: answer["rate_bps"] for name, (_, answer) in zip(own, answers, strict=True)}
            return rates

        yield ask_all


def account(world):
    """What the server has: rate and budget of each agent that downloads."""
    with world.read() as session:
        rows = session.scalars(select(DownloadShare).where(DownloadShare.rate_bps > 0)).all()
        return {row.agent_id: (row.rate_bps, row.budget_bps) for row in rows}


def test_agents_that_ask_at_once_are_never_given_more_than_the_budget(world, ask_at_once):
    dice = random.Random(26)
    for _ in range(ROUNDS):
        with world.write() as session:
            session.execute(delete(DownloadShare))
        rates = ask_at_once({f"web-{number}": dice.choice(CEILINGS) for number in range(HOSTS)})
        given = {name: rate for name, rate in rates.items() if rate}
        assert {name: rate for name, (rate, _) in account(world).items()} == given
        assert BUDGET - wire.LEAST_SHARE_BPS < sum(given.values()) <= BUDGET, "all of it, and no more"


def test_shares_that_are_given_back_and_asked_for_at_once_keep_within_the_smallest_budget(world, ask_at_once):
    dice = random.Random(62)
    downloads = {}
    for _ in range(2 * ROUNDS):
        wanted = {name: dice.choice(CEILINGS) for name in world.hosts} | dict.fromkeys(downloads)
        rates = ask_at_once(wanted)
        downloads = account(world)
        assert {name: rate for name, (rate, _) in downloads.items()} == {n: r for n, r in rates.items() if r}
        allowed = min((budget for _, budget in downloads.values()), default=0)
        assert sum(rate for rate, _ in downloads.values()) <= allowed
