"""A device downloads by its share of its site's budget, waits where there is none, and stops when it ends."""

from __future__ import annotations

import json

import pytest

from agent_core import clock
from agent_core.settings import AGENT, AgentSettings
from agent_core.wire import HEADER_SIGNATURE, AttemptState, BudgetTerms, ShareAnswer
from tests.http_origin import Origin, Status
from tests.updater.stepped import Stepped
from tests.updater.test_delta import ONE, TWO, Fleet
from updater import attempt, delta, poll
from updater.decide import Action
from updater.device import Device
from updater.share import Line, NoShareError

PATH = "/api/v1/share"
JSON = {"Content-Type": "application/json"}
TERMS = BudgetTerms("site", 100_000)


@pytest.fixture
def fleet(tmp_path):
    (tmp_path / "www").mkdir()
    with Origin(tmp_path / "www") as origin:
        made = Fleet(tmp_path, origin)
        made.repository.set_directive(release=TWO, base=TWO, revision=3, budget=TERMS)
        made.repository.publish()
        yield made


def answer(fleet, said, status=200):
    fleet.origin.answer("POST", PATH, Status(status, JSON, json.dumps(said).encode()))


def asked(fleet):
    return [json.loads(request.body) for request in fleet.origin.requests if request.path == PATH]


def one_of(left):
    """The next of some answers; after them the server is away."""
    said = next(left, None)
    return Status(503, JSON, b"{}") if said is None else Status(200, JSON, json.dumps(said).encode())


@pytest.fixture
def stepped(monkeypatch):
    return Stepped(monkeypatch)


# --- a check ---------------------------------------------------------------------------------------------


def test_a_share_is_asked_for_under_the_hosts_key_and_given_back_after_the_download(fleet):
    answer(fleet, ShareAnswer(50_000, 300).to_json())
    fleet.check()
    first, last = asked(fleet)
    assert (first["version"], first["done"], last["done"]) == (TWO, False, True)
    for request in fleet.origin.requests:
        assert request.path != PATH or HEADER_SIGNATURE.lower() in request.headers
    order = [path for path in fleet.origin.paths() if path == PATH or path.endswith(".delta")]
    assert [path == PATH for path in order] == [True, False, True], "before and after, not between"


def test_without_a_share_nothing_is_fetched_and_it_says_why_and_asks_again(fleet):
    answer(fleet, ShareAnswer(0, detail="site berlin downloads with 100 kB/s", again_s=60).to_json())
    for _ in range(4):  # more often than a delta is tried
        outcome = poll.check(fleet.device)
        assert (outcome.action, outcome.reason, outcome.failed) == (Action.STAY, "budget", False)
    assert outcome.detail == "site berlin downloads with 100 kB/s"
    assert poll.is_due(outcome, ONE, clock.parse_iso(outcome.again))
    assert attempt.load(fleet.device.attempt_file).state is AttemptState.DOWNLOADING
    assert not any(said["done"] for said in asked(fleet)), "there is nothing to give back"
    assert not (fleet.layout.state / "deltas.json").exists(), "nothing was begun"
    assert fleet.fetched() == []
    answer(fleet, ShareAnswer(50_000, 300).to_json())
    fleet.check()
    assert fleet.fetched() == ["delta"], "having waited was no try of it"


@pytest.mark.parametrize("status", [404, 429, 500, 503], ids=str)
def test_a_server_that_cannot_be_asked_is_waited_for_and_is_no_failure(fleet, status):
    answer(fleet, {"status": status, "title": "no"}, status)
    outcome = poll.check(fleet.device)
    assert (outcome.action, outcome.reason, outcome.failed) == (Action.STAY, "budget", False)
    assert fleet.fetched() == []


def test_a_drip_is_no_share(fleet):
    answer(fleet, ShareAnswer(4_095, 300).to_json())
    assert poll.check(fleet.device).reason == "budget"
    assert fleet.fetched() == []


def test_what_has_come_when_a_share_ends_is_kept_and_gone_on_with(fleet, stepped):
    fleet.delta_file.write_bytes(b"no delta")  # which is shorter than one piece
    answers = iter([ShareAnswer(10_000, 5).to_json()])
    fleet.origin.answer("POST", PATH, lambda _: one_of(answers))
    outcome = poll.check(fleet.device)
    assert (outcome.action, outcome.reason, outcome.failed) == (Action.STAY, "budget", False)
    (part,) = fleet.layout.download.glob("*.part")
    length = part.stat().st_size
    assert length > 0
    answer(fleet, ShareAnswer(10**6, 300).to_json())
    fleet.origin.requests.clear()
    fleet.check()
    (rest,) = [request for request in fleet.origin.requests if request.path.endswith(".zst")]
    assert rest.headers["range"] == f"bytes={length}-"


def test_a_share_that_ends_under_a_delta_is_no_try_of_it_and_no_reason_for_the_full_bundle(fleet):
    for _ in range(4):
        answers = iter([ShareAnswer(50_000, 0).to_json()])
        fleet.origin.answer("POST", PATH, lambda _, left=answers: one_of(left))
        assert poll.check(fleet.device).reason == "budget"
    assert fleet.fetched() == []
    answer(fleet, ShareAnswer(50_000, 300).to_json())
    fleet.check()
    assert fleet.fetched() == ["delta"]


def test_a_share_is_given_back_before_the_bundle_is_unpacked(fleet, monkeypatch):
    def stage(*said, **named):
        given_back.extend(asking["done"] for asking in asked(fleet))
        return unpack(*said, **named)

    given_back, unpack = [], delta.stage
    monkeypatch.setattr(delta, "stage", stage)
    answer(fleet, ShareAnswer(50_000, 300).to_json())
    fleet.check()
    assert given_back == [False, True]


def test_a_transfer_that_its_share_makes_long_is_not_taken_for_one_that_hangs(fleet, stepped):
    fleet.delta_file.write_bytes(b"no delta")
    values = AGENT.load(environ={}, flags={"disk.reserve": 0, "download.deadline_s": 3})
    device = Device(fleet.layout, AgentSettings.of(values), fleet.device.identity)
    answer(fleet, ShareAnswer(10_000, 300).to_json())
    began = stepped.now_s
    outcome = poll.check(device)
    assert (outcome.action, outcome.candidate[:5]) == (Action.INSTALL, TWO), outcome
    assert stepped.now_s - began > 3


def test_a_cohort_without_a_budget_asks_nobody(fleet):
    fleet.repository.set_directive(release=TWO, base=TWO, revision=4)
    fleet.repository.publish()
    fleet.check()
    assert asked(fleet) == []


# --- the line --------------------------------------------------------------------------------------------


def line(fleet, own_bps=0, budget=TERMS):
    values = AGENT.load(environ={}, flags={"download.rate_bps": own_bps})
    device = fleet.device
    return Line(Device(device.layout, AgentSettings.of(values), device.identity), budget, TWO)


@pytest.mark.parametrize(
    ("own_bps", "given_bps", "rate_bps"),
    [(0, 50_000, 50_000), (20_000, 50_000, 20_000), (20_000, 10_000, 10_000), (1_000, 1_000, 1_000)],
    ids=["no-ceiling", "own-is-lower", "share-is-lower", "own-is-very-low"],
)
def test_the_lower_of_its_own_ceiling_and_its_share_counts(fleet, own_bps, given_bps, rate_bps):
    answer(fleet, ShareAnswer(given_bps, 300).to_json())
    assert line(fleet, own_bps).ceiling() == rate_bps
    assert asked(fleet)[-1]["wants_bps"] == own_bps


def test_a_share_is_asked_for_anew_half_way_and_is_then_what_the_server_says(fleet, stepped):
    answer(fleet, ShareAnswer(50_000, 300).to_json())
    here = line(fleet)
    assert here.ceiling() == 50_000
    stepped.step(149)
    assert here.ceiling() == 50_000
    assert len(asked(fleet)) == 1
    answer(fleet, ShareAnswer(25_000, 300).to_json())
    stepped.step(1)
    assert here.ceiling() == 25_000
    assert len(asked(fleet)) == 2


def test_a_share_that_cannot_be_asked_for_anew_ends_before_the_server_gives_it_away(fleet, stepped):
    answer(fleet, ShareAnswer(50_000, 300).to_json())
    here = line(fleet)
    here.ceiling()
    answer(fleet, {}, 503)
    stepped.step(299.9)
    assert here.ceiling() == 50_000
    stepped.step(0.1)
    with pytest.raises(NoShareError):
        here.ceiling()


def test_a_share_that_is_taken_back_ends_at_once(fleet, stepped):
    answer(fleet, ShareAnswer(50_000, 300).to_json())
    here = line(fleet)
    here.ceiling()
    answer(fleet, ShareAnswer(0, detail="lowered").to_json())
    stepped.step(150)
    with pytest.raises(NoShareError) as ended:
        here.ceiling()
    assert ended.value.wait.detail == "lowered"


def test_a_transfer_is_given_the_time_that_its_share_makes_it_need(fleet):
    answer(fleet, ShareAnswer(5_000, 300).to_json())
    assert line(fleet).needs_s(200 * 10**6) == 80_000, "more than the six hours of download.deadline_s"
    assert line(fleet, own_bps=1_000, budget=None).needs_s(10**9) == 0.0
