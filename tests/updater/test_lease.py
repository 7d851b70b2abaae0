"""A device asks for a lease before it leaves its version, and waits where it is not given one."""

from __future__ import annotations

import json

import pytest

from agent_core import clock
from agent_core.wire import HEADER_SIGNATURE, AttemptState, LeaseAnswer, LeaseTerms, Mode
from tests.http_origin import Status
from tests.updater.test_delta import ONE, TWO, led_to_two
from updater import attempt, poll
from updater.decide import Action

PATH = "/api/v1/lease"
JSON = {"Content-Type": "application/json"}
TERMS = LeaseTerms("site", 1)


@pytest.fixture
def fleet(tmp_path):
    with led_to_two(tmp_path, lease=TERMS) as led:
        yield led


def answer(fleet, said, status=200):
    fleet.origin.answer("POST", PATH, Status(status, JSON, json.dumps(said).encode()))


def asked(fleet):
    return [request for request in fleet.origin.requests if request.path == PATH]


def test_a_lease_is_asked_for_under_the_hosts_key_and_then_the_version_is_activated(fleet):
    answer(fleet, LeaseAnswer(granted=True).to_json())
    fleet.check()
    (request,) = asked(fleet)
    assert json.loads(request.body)["version"] == TWO
    assert HEADER_SIGNATURE.lower() in request.headers


def test_without_a_lease_it_waits_and_says_why_and_asks_again(fleet):
    answer(fleet, LeaseAnswer(granted=False, detail="1 of site berlin are at it", again_s=30).to_json())
    outcome = poll.check(fleet.device)
    assert (outcome.action, outcome.reason, outcome.candidate) == (Action.STAY, "lease", "")
    assert outcome.detail == "1 of site berlin are at it"
    assert not outcome.failed
    again = clock.parse_iso(outcome.again)
    assert poll.is_due(outcome, ONE, again)
    assert attempt.load(fleet.device.attempt_file).state is AttemptState.DOWNLOADING
    answer(fleet, LeaseAnswer(granted=True).to_json())
    fleet.origin.requests.clear()
    fleet.check()
    assert fleet.fetched() == [], "what was staged is not fetched again"


@pytest.mark.parametrize("status", [404, 429, 500, 503], ids=str)
def test_a_server_that_cannot_be_asked_is_waited_for_and_is_no_failure(fleet, status):
    said = Status(status, JSON | {"Retry-After": "900"}, b'{"title": "no"}')
    fleet.origin.answer("POST", PATH, said)
    began = clock.now()
    outcome = poll.check(fleet.device)
    assert (outcome.action, outcome.reason, outcome.failed) == (Action.STAY, "lease", False)
    wait_s = (clock.parse_iso(outcome.again) - began).total_seconds()
    assert wait_s > (899 if status in (429, 503) else 53)
    assert attempt.load(fleet.device.attempt_file).state is AttemptState.DOWNLOADING


def test_a_halt_while_it_waits_ends_the_waiting(fleet):
    answer(fleet, LeaseAnswer(granted=False, detail="full", again_s=30).to_json())
    assert poll.check(fleet.device).reason == "lease"
    fleet.repository.set_directive(release=TWO, base=ONE, revision=4, lease=TERMS, mode=Mode.SUSPENDED)
    fleet.repository.publish()
    answer(fleet, LeaseAnswer(granted=True).to_json())
    assert poll.check(fleet.device).reason == "suspended"
    assert len(asked(fleet)) == 1


def test_a_cohort_without_lease_terms_asks_nobody(fleet):
    fleet.repository.set_directive(release=TWO, base=TWO, revision=4)
    fleet.repository.publish()
    fleet.check()
    assert asked(fleet) == []
