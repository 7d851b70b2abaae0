"""The decision table: every rule, in the order the design gives them."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_core.directive import splay
from agent_core.wire import Directive, Mode, Policy, Reason, ReleaseFacts, Window
from updater.decide import Action, Facts, Hold, Offer, Running, decide

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)  # a Monday


def release(**changes):
    facts = ReleaseFacts(
        product="warehouse-agent",
        version="1.1.0",
        seq=2,
        platform="linux-x86_64",
        index_sha256="b" * 64,
        index_length=100,
        unpacked=1000,
        files=3,
    )
    return Offer(replace(facts, **changes))


def directive(**changes):
    word = Directive(
        product="warehouse-agent",
        cohort="main",
        release="1.1.0",
        base="1.0.0",
        progress=10_000,
        salt="s",
        revision=1,
    )
    return replace(word, **changes)


def facts(**changes):
    plain = Facts(
        agent_id="web-17",
        product="warehouse-agent",
        gate="",
        platforms=("linux-x86_64-cp311", "linux-x86_64", "any"),
        running=Running("1.0.0", "0" * 12, 1),
        directive=directive(),
        directive_seen=NOW - timedelta(days=1),
        policy=Policy(),
        offer=release(),
        hold=None,
        floor_seen=0,
        in_trial=False,
        launcher=1,
        skip_reason=lambda digest, epoch: None,
    )
    return replace(plain, **changes)


MONDAY_NIGHT = Window(("mon",), "22:00", "04:00", "UTC")

TABLE = {
    "a newer release in progress is installed": (facts(), Action.INSTALL, Reason.UPDATE),
    "a host with nothing takes its first version": (
        facts(running=None),
        Action.INSTALL,
        Reason.FIRST_INSTALL,
    ),
    "an older one is installed when going back was asked": (
        facts(running=Running("1.2.0", "", 3), directive=directive(rollback=True)),
        Action.INSTALL,
        Reason.GO_BACK,
    ),
    "the version it has": (
        facts(running=Running("1.1.0", "", 2)),
        Action.STAY,
        Reason.UP_TO_DATE,
    ),
    "outside the progress it keeps the base": (
        facts(directive=directive(progress=0)),
        Action.STAY,
        Reason.NOT_YET,
    ),
    "before any release": (facts(directive=directive(release=None, base=None)), Action.STAY, Reason.NOT_YET),
    "a suspended cohort takes nothing new": (
        facts(directive=directive(mode=Mode.SUSPENDED)),
        Action.STAY,
        Reason.SUSPENDED,
    ),
    "a suspended cohort still gives a new host the base": (
        facts(directive=directive(mode=Mode.SUSPENDED), running=None, offer=release(version="1.0.0", seq=1)),
        Action.INSTALL,
        Reason.FIRST_INSTALL,
    ),
    "a disabled cohort": (facts(directive=directive(mode=Mode.DISABLED)), Action.STAY, Reason.DISABLED),
    "a directive of another product": (
        facts(directive=directive(product="other")),
        Action.REFUSE,
        Reason.WRONG_PRODUCT,
    ),
    "a release of another product": (
        facts(offer=release(product="other")),
        Action.REFUSE,
        Reason.WRONG_PRODUCT,
    ),
    "no bundle for this platform": (facts(offer=None), Action.REFUSE, Reason.NO_BUNDLE),
    "a bundle of another platform": (
        facts(offer=release(platform="win")),
        Action.REFUSE,
        Reason.WRONG_PLATFORM,
    ),
    "a release without this host's gate": (
        facts(offer=release(gates=("canary",))),
        Action.REFUSE,
        Reason.GATE,
    ),
    "a release with this host's gate": (
        facts(offer=release(gates=("canary",)), gate="canary"),
        Action.INSTALL,
        Reason.UPDATE,
    ),
    "below the floor": (facts(policy=Policy(floor_seq=3)), Action.REFUSE, Reason.BELOW_FLOOR),
    "below the highest floor ever seen": (facts(floor_seen=3), Action.REFUSE, Reason.BELOW_FLOOR),
    "revoked": (facts(policy=Policy(revoked_seq=(2,))), Action.REFUSE, Reason.REVOKED),
    "it needs a newer launcher": (facts(offer=release(min_launcher=99)), Action.REFUSE, Reason.OLD_LAUNCHER),
    "silently older": (facts(running=Running("1.2.0", "", 3)), Action.REFUSE, Reason.OLDER),
    "a stepping stone is missing": (
        facts(offer=release(upgrade_from_seq=2)),
        Action.REFUSE,
        Reason.STEPPING_STONE,
    ),
    "a trial is running": (facts(in_trial=True), Action.STAY, Reason.IN_TRIAL),
    "held by the operator": (facts(hold=Hold(None, "audit")), Action.STAY, Reason.HELD),
    "a hold that is over": (facts(hold=Hold(NOW - timedelta(1), "audit")), Action.INSTALL, Reason.UPDATE),
    "a digest that failed here": (
        facts(skip_reason=lambda digest, epoch: "unhealthy"),
        Action.STAY,
        Reason.SKIPPED,
    ),
    "outside the window": (
        facts(directive=directive(window=MONDAY_NIGHT)),
        Action.STAY,
        Reason.OUTSIDE_WINDOW,
    ),
    "inside its splay": (
        facts(directive=directive(splay_s=86_400), directive_seen=NOW),
        Action.STAY,
        Reason.SPLAY,
    ),
}


@pytest.mark.parametrize(("given_facts", "action", "reason"), TABLE.values(), ids=TABLE.keys())
def test_table(given_facts, action, reason):
    decision = decide(given_facts, NOW)
    assert (decision.action, decision.reason) == (action, reason)


def test_refusals_come_before_postponements_so_why_names_what_waiting_cannot_mend():
    both = facts(policy=Policy(revoked_seq=(2,)), hold=Hold(None, "audit"), in_trial=True)
    assert decide(both, NOW).reason is Reason.REVOKED


def test_the_skip_is_asked_for_this_digest_under_this_retry_epoch():
    asked = []
    decide(
        facts(directive=directive(retry_epoch=7), skip_reason=lambda *call: asked.append(call)),
        NOW,
    )
    assert asked == [("b" * 12, 7)]


def test_a_held_agent_is_looked_at_again_when_the_hold_ends():
    end = NOW + timedelta(hours=1)
    assert decide(facts(hold=Hold(end, "audit")), NOW).again == end


def test_outside_its_window_an_agent_is_looked_at_again_when_it_opens():
    decision = decide(facts(directive=directive(window=MONDAY_NIGHT)), NOW)
    assert decision.again == datetime(2026, 3, 2, 22, 0, tzinfo=UTC)


def test_a_host_that_does_not_know_the_zone_of_its_window_stays_says_so_and_looks_again():
    nowhere = replace(MONDAY_NIGHT, zone="Europe/Nowhere")
    decision = decide(facts(directive=directive(window=nowhere)), NOW)
    assert (decision.action, decision.reason) == (Action.STAY, Reason.OUTSIDE_WINDOW)
    assert "Europe/Nowhere" in decision.detail
    assert decision.again == NOW + timedelta(hours=1)


@given(st.text(min_size=1), st.integers(1, 86_400))
def test_the_splay_stays_within_its_bound_and_does_not_change(agent_id, bound):
    word = directive(splay_s=bound)
    assert timedelta(0) <= splay(agent_id, word) < timedelta(seconds=bound)
    assert splay(agent_id, word) == splay(agent_id, word)


@given(st.integers(0, 10_000), st.booleans(), st.sampled_from(Mode), st.text(min_size=1, max_size=8))
def test_nothing_is_installed_that_the_release_keys_forbid(progress, rollback, mode, salt):
    """Whatever a thief makes the directive say, a revoked release stays out."""
    word = directive(progress=progress, rollback=rollback, mode=mode, salt=salt, base="1.1.0")
    assert not decide(facts(directive=word, policy=Policy(revoked_seq=(2,))), NOW).installs
