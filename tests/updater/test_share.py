"""A device downloads by its share of its site's budget, waits where there is none, and stops when it ends."""

from __future__ import annotations

import json

import pytest

from agent_core import clock
from agent_core.settings import AGENT, AgentSettings
from agent_core.wire import HEADER_SIGNATURE, AttemptState, BudgetTerms, Mode, ShareAnswer
from tests.http_origin import Status
from tests.updater.stepped import Stepped
from tests.updater.test_delta import ONE, TWO, led_to_two
from updater import attempt, delta, poll
from updater.decide import Action, Hold
from updater.device import Device
from updater.share import Line, NoShareError

PATH = "/api/v1/share"
JSON = {"Content-Type": "application/json"}
TERMS = BudgetTerms("site", 100_000)


@pytest.fixture
def fleet(tmp_path):
    with led_to_two(tmp_path, budget=TERMS) as led:
        yield led


@pytest.fixture(scope="module")
def fleet_of_all(tmp_path_factory):
    with led_to_two(tmp_path_factory.mktemp("waiting"), budget=TERMS) as led:
        yield led


@pytest.fixture
def waiting(fleet_of_all):
    """For who downloads nothing: one fleet for all of them, since making one takes most of a test's time."""
    fleet_of_all.origin.requests.clear()
    return fleet_of_all


def answer(fleet, said, status=200):
    fleet.origin.answer("POST", PATH, Status(status, JSON, json.dumps(said).encode()))


def asked(fleet):
    return [json.loads(request.body) for request in fleet.origin.requests if request.path == PATH]


def ends_after(fleet, stepped, share, first_s=0):
    """One share, told after so long; for it to be renewed the server takes too long, and then says no."""
    left = iter([share])

    def told(_):
        if said := next(left, None):
            stepped.step(first_s)
            return Status(200, JSON, json.dumps(said.to_json()).encode())
        stepped.step(share.lasts_s)
        return Status(503, JSON, b"{}")

    fleet.origin.answer("POST", PATH, told)


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


@pytest.mark.parametrize(
    ("status", "after_s", "least_s"),
    [(404, 0, 54), (429, 0, 54), (429, 900, 900), (500, 0, 54), (503, 2, 54), (503, 900, 900)],
)
def test_a_server_that_cannot_be_asked_is_waited_for_and_is_no_failure(waiting, status, after_s, least_s):
    said = Status(status, JSON | {"Retry-After": str(after_s)}, b'{"title": "no"}')
    waiting.origin.answer("POST", PATH, said)
    began = clock.now()
    outcome = poll.check(waiting.device)
    assert (outcome.action, outcome.reason, outcome.failed) == (Action.STAY, "budget", False)
    assert (clock.parse_iso(outcome.again) - began).total_seconds() > least_s - 1
    assert waiting.fetched() == []


@pytest.mark.parametrize(("rate_bps", "lasts_s"), [(4_095, 300), (50_000, 19), (50_000, 0)])
def test_a_drip_and_a_moment_are_no_shares(waiting, rate_bps, lasts_s):
    answer(waiting, ShareAnswer(rate_bps, lasts_s).to_json())
    outcome = poll.check(waiting.device)
    assert (outcome.reason, outcome.detail) == (
        "budget",
        f"{rate_bps} bytes a second for {lasts_s} s are no share",
    )
    assert len(asked(waiting)) == 1
    assert waiting.fetched() == []


def test_what_has_come_when_a_share_ends_is_kept_and_gone_on_with(fleet, stepped):
    fleet.delta_file.write_bytes(b"no delta")  # which is shorter than one piece
    ends_after(fleet, stepped, ShareAnswer(4_096, 30))
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


def test_a_share_that_ends_under_a_delta_is_no_try_of_it_and_no_reason_for_the_full_bundle(fleet, stepped):
    for _ in range(4):
        ends_after(fleet, stepped, ShareAnswer(50_000, 20), first_s=20)  # it takes as long as the share
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


def test_a_transfer_that_its_share_makes_long_ends_itself_in_time_and_goes_on_with_the_next_check(
    fleet, stepped
):
    fleet.delta_file.write_bytes(b"no delta")
    values = AGENT.load(environ={}, flags={"disk.reserve": 0, "download.deadline_s": 32})
    device = Device(fleet.layout, AgentSettings.of(values), fleet.device.identity)
    answer(fleet, ShareAnswer(4_096, 300).to_json())
    came = []
    for _ in range(9):
        began = stepped.now_s
        outcome = poll.check(device)
        assert stepped.now_s - began < 32
        if outcome.action is Action.INSTALL:
            break
        assert (outcome.reason, outcome.failed) == ("budget", False)
        assert asked(fleet)[-1]["done"], "nobody waits for a share that nobody uses"
        came.append(sum(part.stat().st_size for part in fleet.layout.download.glob("*.part")))
    assert outcome.candidate[:5] == TWO
    assert came
    assert came == sorted(set(came)), "each goes on where the last one ended"


def test_what_has_come_outlives_whatever_it_waits_for_until_nothing_is_to_come(fleet, stepped):
    part = cut(fleet, stepped)
    stop = fleet.origin.directory / "metadata" / "stop.json"
    stop.write_text("{}")
    kept_while(fleet, part, "stop-file")
    stop.unlink()
    fleet.device.set_hold(Hold(None, "audit"))
    kept_while(fleet, part, "held")
    lead_to(fleet, TWO, mode=Mode.SUSPENDED)
    kept_while(fleet, part, "suspended")
    lead_to(fleet, ONE)
    assert poll.check(fleet.device).reason == "up-to-date"
    assert list(fleet.layout.download.iterdir()) == []


def kept_while(fleet, part, reason):
    before = part.read_bytes()
    outcome = poll.check(fleet.device)
    assert (outcome.action, outcome.reason) == (Action.STAY, reason)
    assert part.read_bytes() == before


def test_what_has_come_of_another_release_gives_way_to_the_next(fleet, stepped):
    old = cut(fleet, stepped)
    fleet.add("1.2.0", 3)
    lead_to(fleet, "1.2.0")
    new = cut(fleet, stepped)
    assert old != new
    assert not old.exists()


def cut(fleet, stepped):
    """The part of a download whose share ended."""
    fleet.delta_file.write_bytes(b"no delta")
    ends_after(fleet, stepped, ShareAnswer(4_096, 30))
    assert poll.check(fleet.device).reason == "budget"
    (part,) = fleet.layout.download.glob("*.part")
    assert part.stat().st_size > 0
    return part


def lead_to(fleet, version, **fields):
    revision = fleet.revision = getattr(fleet, "revision", 3) + 1
    fleet.repository.set_directive(release=version, base=version, revision=revision, budget=TERMS, **fields)
    fleet.repository.publish()


def test_a_cohort_without_a_budget_asks_nobody(fleet):
    fleet.repository.set_directive(release=TWO, base=TWO, revision=4)
    fleet.repository.publish()
    fleet.check()
    assert asked(fleet) == []


# --- the line --------------------------------------------------------------------------------------------


def line(waiting, own_bps=0, budget=TERMS):
    values = AGENT.load(environ={}, flags={"download.rate_bps": own_bps})
    device = waiting.device
    return Line(
        Device(device.layout, AgentSettings.of(values), device.identity), budget, TWO, clock.boot_s() + 21_600
    )


@pytest.mark.parametrize(
    ("own_bps", "given_bps", "rate_bps"),
    [(0, 50_000, 50_000), (20_000, 50_000, 20_000), (20_000, 10_000, 10_000), (1_000, 1_000, 1_000)],
    ids=["no-ceiling", "own-is-lower", "share-is-lower", "own-is-very-low"],
)
def test_the_lower_of_its_own_ceiling_and_its_share_counts(waiting, own_bps, given_bps, rate_bps):
    answer(waiting, ShareAnswer(given_bps, 300).to_json())
    assert line(waiting, own_bps).ceiling() == rate_bps
    assert asked(waiting)[-1]["wants_bps"] == own_bps


def test_a_share_is_asked_for_anew_half_way_and_is_then_what_the_server_says(waiting, stepped):
    answer(waiting, ShareAnswer(50_000, 300).to_json())
    here = line(waiting)
    assert here.ceiling() == 50_000
    stepped.step(149)
    assert here.ceiling() == 50_000
    assert len(asked(waiting)) == 1
    answer(waiting, ShareAnswer(25_000, 300).to_json())
    stepped.step(1)
    assert here.ceiling() == 25_000
    assert len(asked(waiting)) == 2


def test_a_share_that_cannot_be_asked_for_anew_ends_before_the_server_gives_it_away(waiting, stepped):
    answer(waiting, ShareAnswer(50_000, 300).to_json())
    here = line(waiting)
    here.ceiling()
    answer(waiting, {}, 503)
    stepped.step(299.9)
    assert here.ceiling() == 50_000
    stepped.step(0.1)
    with pytest.raises(NoShareError):
        here.ceiling()


def test_a_share_that_is_taken_back_ends_at_once(waiting, stepped):
    answer(waiting, ShareAnswer(50_000, 300).to_json())
    here = line(waiting)
    here.ceiling()
    answer(waiting, ShareAnswer(0, detail="lowered").to_json())
    stepped.step(150)
    with pytest.raises(NoShareError) as ended:
        here.ceiling()
    assert ended.value.wait.detail == "lowered"


def test_while_a_share_stands_an_overloaded_server_is_asked_again_when_it_says(waiting, stepped):
    answer(waiting, ShareAnswer(50_000, 600).to_json())
    here = line(waiting)
    here.ceiling()
    waiting.origin.answer("POST", PATH, Status(503, JSON | {"Retry-After": "200"}, b"{}"))
    for _ in range(2):
        stepped.step(300 if len(asked(waiting)) == 1 else 199)
        assert here.ceiling() == 50_000
    assert len(asked(waiting)) == 2


def test_the_time_of_a_check_ends_a_transfer_under_a_budget_only(waiting, stepped):
    answer(waiting, ShareAnswer(50_000, 80_000).to_json())
    here, other = line(waiting), line(waiting, own_bps=1_000, budget=None)
    stepped.step(21_479)
    assert (here.ceiling(), other.ceiling()) == (50_000, 1_000)
    stepped.step(1)
    with pytest.raises(NoShareError):
        here.ceiling()
    assert other.ceiling() == 1_000
