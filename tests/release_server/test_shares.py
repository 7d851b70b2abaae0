"""Shares of a budget: never more bytes a second into one site than it allows, whoever asks and when."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, select

from agent_core.clock import iso
from agent_core.errors import MalformedError, NotAllowedError
from agent_core.wire import LEAST_SHARE_BPS, MOST_BPS, BudgetTerms, ShareRequest, signed_text
from release_server import agents, cohorts, enrolment, explain, reports, shares
from release_server.models import DownloadShare, Product
from release_server.shares import Beside, portion
from release_server.stages import Stage
from tests.release_server.fleet_world import Host, World

PATH = "/api/v1/share"
BUDGET = {"scope": "site", "bytes_per_s": 100_000, "at_once": 2}


# --- the division ----------------------------------------------------------------------------------------

AGENTS = st.integers(0, 2)
TERMS = st.builds(
    BudgetTerms, st.just("site"), st.integers(5 * LEAST_SHARE_BPS, 20 * LEAST_SHARE_BPS), st.integers(1, 5)
)
STEPS = st.one_of(
    st.tuples(
        st.just("ask"),
        AGENTS,
        TERMS,
        st.sampled_from([0, 10**9, 9_000, 1_000]),
        st.booleans(),  # whether the answer is heard
    ),
    st.tuples(st.just("done"), AGENTS),
    st.tuples(st.just("wait"), st.integers(1, 400)),
)


def beside(shares):
    """What there is, of pairs of a rate (0: it waits) and the budget that it was asked for under."""
    rates, budgets = [rate for rate, _ in shares], [budget for _, budget in shares]
    waits = min((budget for rate, budget in shares if not rate), default=None)
    least = min(budgets, default=None)
    return Beside(sum(rates), least, sum(map(bool, rates)), rates.count(0), waits_bps=waits)


@given(st.lists(STEPS, min_size=5, max_size=60))
def test_what_is_used_at_one_time_keeps_within_every_budget_whoever_hears_what(steps):
    now, held, used = 0, {}, {}  # agent -> (rate, budget, until); agent -> (rate, until)
    for kind, who, *said in steps:
        if kind == "wait":
            now += who
            held = {agent: row for agent, row in held.items() if row[2] > now}
            used = {agent: row for agent, row in used.items() if row[1] > now}
        elif kind == "done":
            held.pop(who, None)
            used.pop(who, None)
        else:
            terms, wants, heard = said
            used[who] = (min(used.get(who, (0, 0))[0], wants or MOST_BPS), used.get(who, (0, 0))[1])
            has = held.get(who, (0, 0, 0))[0]
            others = beside([row[:2] for agent, row in held.items() if agent != who])
            rate = portion(terms, wants, others, has)
            assert rate <= min(terms.part_bps, wants or MOST_BPS)
            if rate or not has:
                held[who] = (rate, terms.bytes_per_s, now + 300)
            if heard:
                used[who] = (rate, now + 300)
        downloads = sum(rate for rate, _ in used.values())
        assert all(downloads <= budget for rate, budget, _ in held.values() if rate)


@given(TERMS, st.integers(0, 4))
def test_as_many_as_may_at_once_get_the_same_and_no_more(terms, others):
    taken = [(terms.part_bps, terms.bytes_per_s)] * min(others, terms.at_once)
    rate = portion(terms, 0, beside(taken))
    if len(taken) < terms.at_once:
        assert rate == terms.part_bps
    else:
        assert rate < terms.part_bps, "what a division leaves over at the most"


def test_what_a_slow_host_cannot_use_another_gets():
    terms = BudgetTerms("site", 100_000)
    assert portion(terms, 30_000, Beside()) == 30_000
    assert portion(terms, 0, beside([(30_000, 100_000)])) == 70_000


NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("waiting", "ends_s", "least_s", "most_s"),
    [(0, 0, 40, 80), (1, 240, 160, 320), (29, 150, 400, 800), (20_000, 150, 1_200, 2_400)],
    ids=["nobody", "a-share-that-may-end", "a-site", "a-fleet"],
)
def test_the_more_wait_the_later_each_asks_again(waiting, ends_s, least_s, most_s):
    others = Beside(waiting=waiting, ends=NOON + timedelta(seconds=ends_s) if ends_s else None)
    said = [shares.again_s(others, NOON, chance) for chance in (0.0, 1.0)]
    assert said == [least_s, most_s]


# --- by the database -------------------------------------------------------------------------------------


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    for number in range(5):
        made.enroll(f"web-{number}", labels={"site": "berlin"} if number < 4 else {"site": "oslo"})
    made.call(cohorts.edit, "demo", "all", budget=BUDGET)
    return made


def ask(world, name, wants_bps=0, *, done=False):
    host, wanted = world.hosts[name], ShareRequest("1.1.0", wants_bps, done)
    host.counter += 1
    digest = sha256(json.dumps(wanted.to_json()).encode()).hexdigest()
    signature = host.key.sign(signed_text("POST", PATH, digest, host.counter)).hex()
    proof = reports.Signed(host.id, "POST", PATH, digest, host.counter, signature)
    with world.write() as session:
        return reports.take_share_request(session, world.clock(), proof, wanted)


def given_to(world, *names):
    return [ask(world, name)["rate_bps"] for name in names]


def test_a_sites_budget_is_divided_and_whoever_comes_too_late_waits_and_is_told_why(world):
    assert given_to(world, "web-0", "web-1", "web-2") == [50_000, 50_000, 0]
    assert given_to(world, "web-4") == [50_000], "another site has its own"
    refused = ask(world, "web-3")
    assert refused["detail"] == "site berlin downloads with 100 kB/s of 100 kB/s (2 at it)"
    assert refused["again_s"] > 0


def test_what_is_given_back_is_there_at_once(world):
    assert given_to(world, "web-0", "web-1") == [50_000, 50_000]
    assert ask(world, "web-0", done=True)["rate_bps"] == 0
    assert given_to(world, "web-2", "web-3") == [50_000, 0]


def test_an_agent_that_dies_gives_its_share_back_by_time_and_one_that_asks_anew_keeps_it(world):
    assert given_to(world, "web-0", "web-1") == [50_000, 50_000]
    world.clock.step(seconds=150)
    assert given_to(world, "web-0") == [50_000]
    world.clock.step(seconds=149)
    assert given_to(world, "web-2") == [0]
    world.clock.step(seconds=1)
    assert given_to(world, "web-2", "web-3") == [50_000, 0], "only web-1 has died"


def test_a_share_grows_when_there_is_room_and_shrinks_with_the_budget(world):
    world.call(cohorts.edit, "demo", "all", budget=BUDGET | {"at_once": 1})
    assert ask(world, "web-0", 30_000)["rate_bps"] == 30_000
    assert given_to(world, "web-1") == [70_000]
    ask(world, "web-0", done=True)
    assert given_to(world, "web-1") == [100_000]
    world.call(cohorts.edit, "demo", "all", budget=BUDGET | {"bytes_per_s": 20_000, "at_once": 1})
    assert given_to(world, "web-0", "web-1") == [0, 0], "it may not hear of less, and go on with what it had"
    assert given_to(world, "web-0") == [0]
    ask(world, "web-1", done=True)
    assert given_to(world, "web-0") == [20_000]


def test_a_share_that_is_to_be_smaller_counts_until_it_is_given_back_or_ends(world):
    world.call(cohorts.edit, "demo", "all", budget=BUDGET | {"at_once": 1})
    assert given_to(world, "web-0") == [100_000]
    world.call(cohorts.edit, "demo", "all", budget=BUDGET)
    lost = ask(world, "web-0")
    assert (lost["rate_bps"], given_to(world, "web-1")) == (0, [0])
    assert "its own 100 kB/s are not renewed" in lost["detail"]
    world.clock.step(seconds=300)
    assert given_to(world, "web-1", "web-0") == [50_000, 50_000]


def test_a_host_that_is_set_to_less_keeps_its_share_and_the_rest_is_anothers(world):
    assert given_to(world, "web-0", "web-1") == [50_000, 50_000]
    assert ask(world, "web-0", 10_000)["rate_bps"] == 10_000
    assert given_to(world, "web-2") == [40_000]


def test_agents_without_the_label_have_one_line_together(world):
    for name in ("bare-0", "bare-1", "bare-2"):
        world.enroll(name)
    assert given_to(world, "bare-0", "bare-1", "bare-2") == [50_000, 50_000, 0]
    assert ask(world, "bare-2")["detail"].startswith("site without a name downloads")


@pytest.fixture
def kiosk(world):
    """An agent of another product in the same site, whose cohort has a smaller budget."""
    with world.write() as session:
        session.add(Product(name="other", created_at=world.clock()))
    strict = {"scope": "site", "bytes_per_s": 60_000}
    world.call(cohorts.create, product="other", name="kiosks", budget=strict)
    key = Ed25519PrivateKey.generate()
    with world.write() as session:
        wanted = world.request("kiosk", key, product="other", labels={"site": "berlin"})
        enrolment.enroll(session, world.clock(), world.token, wanted)
    world.hosts["kiosk"] = Host("kiosk", key, "", {"site": "berlin"})
    return "kiosk"


def test_products_and_cohorts_that_share_a_site_share_its_line_by_the_smallest_budget(world, kiosk):
    assert given_to(world, "web-0", kiosk) == [50_000, 10_000]
    refused = ask(world, "web-1")
    assert refused["rate_bps"] == 0, "the stricter budget stands while it is used"
    said = "site berlin downloads with 60 kB/s of 60 kB/s, another cohort's budget (2 at it)"
    assert refused["detail"] == said
    ask(world, kiosk, done=True)
    assert given_to(world, "web-1", kiosk) == [50_000, 0]


def test_who_waits_with_a_smaller_budget_is_not_passed_over_for_ever(world, kiosk):
    assert given_to(world, "web-0", "web-1", kiosk) == [50_000, 50_000, 0]
    world.clock.step(seconds=150)
    assert given_to(world, "web-0") == [0], "the renewal is held to the budget of the one that waits"
    ask(world, "web-0", done=True)
    assert given_to(world, "web-2", kiosk) == [10_000, 0]
    assert given_to(world, "web-2") == [0], "nor is what is within that budget renewed while it waits"
    ask(world, "web-1", done=True)
    assert given_to(world, kiosk) == [50_000]
    assert given_to(world, "web-2") == [10_000], "and as soon as nobody waits it is"
    ask(world, kiosk, done=True)
    ask(world, "web-2", done=True)
    assert given_to(world, "web-3") == [50_000]


def test_who_waited_and_never_came_back_holds_nobody_up_for_long(world, kiosk):
    assert given_to(world, "web-0", "web-1") == [50_000, 50_000]
    gone_s = 1.5 * ask(world, kiosk)["again_s"] + shares.LASTS.total_seconds()
    ask(world, "web-0", done=True)
    ask(world, "web-1", done=True)
    world.clock.step(seconds=gone_s - 1)
    assert given_to(world, "web-0", "web-1") == [50_000, 10_000]
    ask(world, "web-1", done=True)
    world.clock.step(seconds=1)
    assert given_to(world, "web-1") == [50_000]


def test_without_a_budget_nobody_waits_and_nothing_is_kept(world):
    world.call(cohorts.edit, "demo", "all", budget=None)
    assert given_to(world, "web-0", "web-1", "web-2") == [MOST_BPS] * 3
    with world.read() as session:
        assert session.scalars(select(DownloadShare)).all() == []


def test_a_retired_agent_has_no_share_and_gets_none(world):
    assert given_to(world, "web-0", "web-1") == [50_000, 50_000]
    world.call(agents.retire, "web-0")
    assert given_to(world, "web-2") == [50_000]
    with pytest.raises(NotAllowedError):
        ask(world, "web-0")


@pytest.fixture
def work(world):
    """The statements that are run, and the rows that are loaded, one entry each."""
    done = []
    event.listen(world.sessions.engine, "before_cursor_execute", lambda *said: done.append(said[2]))

    def loaded(*_):
        done.append("a row")

    for happening in ("load", "refresh"):
        event.listen(DownloadShare, happening, loaded)
    yield done
    for happening in ("load", "refresh"):
        event.remove(DownloadShare, happening, loaded)


def test_the_work_of_asking_does_not_grow_with_who_downloads_and_waits(world, work):
    world.call(cohorts.edit, "demo", "all", budget=BUDGET | {"at_once": 20})
    assert given_to(world, "web-0") == [5_000]
    work.clear()
    ask(world, "web-0")
    few = len(work)
    names = [f"more-{number}" for number in range(25)]
    for name in names:
        world.enroll(name, labels={"site": "berlin"})
    assert given_to(world, *names) == [5_000] * 19 + [0] * 6
    work.clear()
    ask(world, "web-0")
    assert len(work) == few


def test_agents_hear_of_it_in_their_directive(world):
    assert world.directive().budget == BudgetTerms("site", 100_000, 2)


def test_it_is_said_why_an_agent_does_not_download(world):
    assert given_to(world, "web-0", "web-1") == [50_000, 50_000]
    soon = world.clock() + shares.LASTS
    world.start("1.1.0", Stage(share_bp=10_000))
    with world.read() as session:
        links = {
            name: link
            for name in ("web-0", "web-2")
            for link in explain.agent_why(session, world.clock(), name)["chain"]
            if link["code"] == "budget"
        }
    assert (links["web-0"]["ok"], links["web-0"]["text"]) == (True, "it may download with 50 kB/s")
    assert links["web-2"] == {
        "ok": False,
        "code": "budget",
        "text": "site berlin downloads with 100 kB/s of 100 kB/s (2 at it)",
        "until": iso(soon),
        "says": "budget",
        "seen": {"domain": "site berlin", "budget_bps": 100_000, "taken_bps": 100_000},
    }


@pytest.mark.parametrize(
    "said",
    [
        {"scope": "site"},
        {"scope": "Site", "bytes_per_s": 10**6},
        {"scope": "site", "bytes_per_s": 4_095},
        {"scope": "site", "bytes_per_s": 100_000, "at_once": 25},
    ],
    ids=["no-rate", "no-label", "slower-than-a-drip", "too-many-parts"],
)
def test_a_budget_that_no_download_could_keep_to_is_refused(world, said):
    with pytest.raises(MalformedError) as refused:
        world.call(cohorts.edit, "demo", "all", budget=said)
    assert refused.value.what.startswith("budget.")
