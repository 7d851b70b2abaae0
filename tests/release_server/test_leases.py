"""Leases: so many of one failure domain at once, given back by the end of an attempt or by time."""

from __future__ import annotations

import json
from hashlib import sha256

import pytest

from agent_core.errors import MalformedError
from agent_core.wire import LeaseRequest, LeaseTerms, Phase, signed_text
from release_server import agents, cohorts, leases, reports
from release_server.models import ActivationLease
from release_server.stages import Stage
from tests.release_server.fleet_world import World

PATH = "/api/v1/lease"


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    for number in range(6):
        made.enroll(f"web-{number}", labels={"site": "berlin" if number < 4 else "oslo"})
    made.call(cohorts.edit, "demo", "all", lease={"scope": "site", "limit": 2})
    return made


def ask(world, name, version="1.1.0"):
    host = world.hosts[name]
    host.counter += 1
    body = json.dumps(LeaseRequest(version).to_json()).encode()
    digest = sha256(body).hexdigest()
    signature = host.key.sign(signed_text("POST", PATH, digest, host.counter)).hex()
    proof = reports.Signed(host.id, "POST", PATH, digest, host.counter, signature)
    with world.write() as session:
        return reports.take_lease_request(session, world.clock(), proof, LeaseRequest(version))


def granted(world, *names):
    return [ask(world, name)["granted"] for name in names]


def test_never_more_of_one_site_at_once_than_the_cohort_allows(world):
    assert granted(world, "web-0", "web-1", "web-2") == [True, True, False]
    assert granted(world, "web-4", "web-5") == [True, True], "another site has its own"
    refused = ask(world, "web-3")
    assert refused["detail"] == "2 of site berlin are at it, 2 may be"
    assert refused["again_s"] > 0


def test_who_has_a_lease_keeps_it_by_asking_again(world):
    assert granted(world, "web-0", "web-0", "web-1", "web-2") == [True, True, True, False]


@pytest.mark.parametrize("end", ["healthy", "rolled_back", "failed"])
def test_the_end_of_an_attempt_gives_the_lease_back(world, end):
    rollout = world.start("1.1.0", Stage(share_bp=10_000, max_failed=5))
    assert granted(world, "web-0", "web-1", "web-2") == [True, True, False]
    world.finish(world.hosts["web-0"], rollout, end)
    assert granted(world, "web-2", "web-3") == [True, False]


def test_an_agent_that_dies_gives_its_lease_back_by_time(world):
    assert granted(world, "web-0", "web-1", "web-2") == [True, True, False]
    world.clock.step(seconds=3 * 60 + 30 + 300 - 1)
    assert granted(world, "web-2") == [False]
    world.clock.step(seconds=1)
    assert granted(world, "web-2") == [True]


def test_reports_at_work_renew_a_lease_and_an_idle_one_ends_it(world):
    assert granted(world, "web-0", "web-1") == [True, True]
    for _ in range(4):
        world.clock.step(minutes=5)
        world.report(world.hosts["web-0"], phase=Phase.TRIAL)
    assert granted(world, "web-2", "web-3") == [True, False], "only web-1 has died"
    world.report(world.hosts["web-0"])
    assert granted(world, "web-3") == [True]


def test_an_idle_report_that_crossed_the_lease_does_not_end_it(world):
    assert granted(world, "web-0", "web-1") == [True, True]
    world.clock.step(seconds=10)
    world.report(world.hosts["web-0"])
    assert granted(world, "web-2") == [False]


def test_a_retired_agent_holds_no_lease(world):
    assert granted(world, "web-0", "web-1") == [True, True]
    world.call(agents.retire, "web-0")
    assert granted(world, "web-2") == [True]


def test_without_lease_terms_everybody_may(world):
    world.call(cohorts.edit, "demo", "all", lease=None)
    assert granted(world, "web-0", "web-1", "web-2") == [True, True, True]
    with world.read() as session:
        assert session.query(ActivationLease).count() == 0


def test_a_share_of_a_site_is_counted_over_its_agents(world):
    world.call(cohorts.edit, "demo", "all", lease={"scope": "site", "share_bp": 5_000})
    assert granted(world, "web-0", "web-1", "web-2") == [True, True, False]
    assert granted(world, "web-4", "web-5") == [True, False]


@pytest.mark.parametrize(
    ("terms", "members", "allowed"),
    [
        (LeaseTerms("site", 3), 0, 3),
        (LeaseTerms("site", None, 1_000), 50, 5),
        (LeaseTerms("site", None, 100), 5, 1),
        (LeaseTerms("site", 2, 5_000), 10, 2),
        (LeaseTerms("site", 9, 5_000), 10, 5),
    ],
    ids=["count", "share", "one-at-least", "count-is-less", "share-is-less"],
)
def test_of_a_count_and_a_share_the_smaller_counts(terms, members, allowed):
    assert leases.most(terms, members) == allowed


def test_agents_hear_of_it_in_their_directive(world):
    assert world.directive().lease == LeaseTerms("site", 2)


@pytest.mark.parametrize(
    "said", [{"scope": "site"}, {"scope": "Site", "limit": 1}, {"scope": "a", "limit": 0}]
)
def test_terms_that_cannot_be_meant_are_refused(world, said):
    with pytest.raises(MalformedError):
        world.call(cohorts.edit, "demo", "all", lease=said)
