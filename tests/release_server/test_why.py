"""`why` says what the device decides, whatever the situation; and when it will change."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tuf.api.metadata import Metadata, TargetFile, Targets

from agent_core.directive import bucket
from agent_core.wire import PROGRESS_FULL, Directive, Mode, Policy, Reason, ReleaseFacts, Window
from release_server import policies, why
from release_server.directives import CohortFacts, Pace, RolloutFacts, directive_for
from release_server.freezes import Freeze
from release_server.models import MetadataFile
from release_server.rollout import State
from release_server.stages import Stage
from updater import decide as device

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)  # a Monday
NAME = "web-17"
SEQ = {"": 0, "0.9.0": 1, "1.0.0": 2, "1.1.0": 3}
VERSIONS = sorted(SEQ)[1:]
WINDOWS = (None, Window(("mon",), "08:00", "18:00", "UTC"), Window(("mon",), "22:00", "04:00", "UTC"))
INSTALLS = {device.Action.INSTALL}


@st.composite
def bundles(draw, version):
    if draw(st.sampled_from([False, False, False, False, True])):
        return None
    return why.Bundle(
        seq=SEQ[version],
        gates=draw(st.sampled_from([(), (), (), ("canary",)])),
        upgrade_from_seq=draw(st.sampled_from([0, 0, 0, 0, 3])),
        min_launcher=draw(st.sampled_from([1, 1, 1, 1, 2])),
    )


@st.composite
def situations(draw):
    """What server and device both see of one agent: its cohort, its rollout, its releases, its host."""
    pin = draw(st.sampled_from([*[None] * 6, *VERSIONS]))
    base = draw(st.sampled_from([None, *VERSIONS]))
    frozen = draw(st.sampled_from([False, False, False, False, True]))
    cohort = CohortFacts(
        product="demo",
        name="all",
        base=base,
        pin=pin,
        pin_is_older=draw(st.booleans()),
        base_is_older=draw(st.booleans()),
        frozen=frozen,
        pace=Pace(window=draw(st.sampled_from(WINDOWS)), splay_s=draw(st.sampled_from([0, 3_600]))),
    )
    state = draw(st.sampled_from([None, *State, *[State.RUNNING] * 8]))
    rollout = state and RolloutFacts(
        draw(st.sampled_from(VERSIONS)),
        "salt",
        state,
        draw(st.integers(0, PROGRESS_FULL)),
        draw(st.booleans()),
    )
    word = directive_for(cohort, rollout or None, 1)
    if draw(st.sampled_from([*[False] * 15, True])):
        word = replace(word, mode=Mode.DISABLED)
    running = draw(st.sampled_from(sorted(SEQ)))
    return why.Facts(
        agent_id=NAME,
        running=running,
        running_seq=SEQ[running],
        seen_at=NOW,
        quiet=timedelta(minutes=3),
        platform="linux-x86_64",
        gate=draw(st.sampled_from(["", "canary"])),
        phase=draw(st.sampled_from(["idle", "idle", "idle", "trial"])),
        held=draw(st.sampled_from([False, False, False, False, True])),
        cohort="all",
        wants=why.Held(pin, Freeze("", None) if frozen else None),
        course=why.Course("r-1", "salt", state, stages=(Stage(share_bp=10_000),), members=3)
        if state
        else None,
        directive=word,
        told_at=NOW - timedelta(minutes=draw(st.sampled_from([0, 90]))),
        policy=Policy(draw(st.sampled_from([0, 0, 0, 2])), draw(st.sampled_from([(), (), (), (3,)]))),
        bundles={version: draw(bundles(version)) for version in {word.release, word.base} - {None}},
        launcher=1,
        failed=draw(st.sampled_from([None, None, None, ("rolled_back", "unhealthy", "")])),
    )


def on_the_device(facts: why.Facts) -> device.Facts:
    """The same situation as the device's shell would collect it."""
    told = why.assignment(facts)
    bundle = facts.bundles.get(told.version) if told and told.version else None
    offer = bundle and device.Offer(
        ReleaseFacts(
            product="demo",
            version=told.version,
            seq=bundle.seq,
            platform="linux-x86_64",
            index_sha256="b" * 64,
            index_length=100,
            unpacked=1,
            files=1,
            gates=bundle.gates,
            upgrade_from_seq=bundle.upgrade_from_seq,
            min_launcher=bundle.min_launcher,
        )
    )
    return device.Facts(
        agent_id=facts.agent_id,
        product="demo",
        gate=facts.gate,
        platforms=("linux-x86_64",),
        running=device.Running(facts.running, "0" * 12, facts.running_seq) if facts.running else None,
        directive=facts.directive,
        directive_seen=facts.told_at,
        policy=facts.policy,
        offer=offer or None,
        hold=device.Hold(None, "") if facts.held else None,
        floor_seen=0,
        in_trial=facts.phase == "trial",
        launcher=facts.launcher,
        skip_reason=lambda digest, epoch: facts.failed and facts.failed[1],
    )


@settings(max_examples=400, deadline=None)
@given(situations())
def test_the_first_link_that_blocks_is_what_the_device_decides(facts):
    decision = device.decide(on_the_device(facts), NOW)
    blocked = [link for link in why.chain(facts, NOW) if not link.ok]
    if decision.action in INSTALLS or decision.reason is Reason.UP_TO_DATE:
        assert blocked == []
    else:
        assert (blocked[0].says, blocked[0].until) == (decision.reason, soonest(decision, blocked[0]))


def soonest(decision, link):
    """The device's own `again` where it has one; the server may know of more, such as a turn that comes."""
    return decision.again or link.until


@settings(max_examples=100, deadline=None)
@given(situations())
def test_every_explanation_can_be_sent_and_has_words(facts):
    told = why.explain(facts, NOW)
    assert all(link["text"] and link["code"] for link in told["chain"])
    assert told["summary"].endswith(":") is (
        any(not link["ok"] and link.get("says") != "in-trial" for link in told["chain"])
        or (told["wanted"] in (None, facts.running) and any(not link["ok"] for link in told["chain"]))
    )


# --- when it will change ---------------------------------------------------------------------------------

SALT = "salt"
PLACE = bucket(NAME, SALT)
HALF_HOUR = 1_800


def course(**said):
    stages = (
        Stage(share_bp=1, soak_s=HALF_HOUR),
        Stage(share_bp=10, soak_s=HALF_HOUR),
        Stage(share_bp=10_000),
    )
    plain = why.Course("r-31", SALT, State.RUNNING, stages=stages, members=1000, takes=timedelta(minutes=10))
    return replace(plain, **said)


@pytest.mark.parametrize(
    ("said", "minutes"),
    [
        ({}, 80),
        ({"soaking_since": NOW - timedelta(minutes=20)}, 50),
        ({"stage": 1}, 40),
        ({"stage": 1, "soaking_since": NOW - timedelta(minutes=20)}, 10),
        ({"stage": 1, "soaking_since": NOW - timedelta(days=1)}, 0),
    ],
    ids=["both stages", "it soaks", "the last but one", "that soaks", "any moment"],
)
def test_a_turn_comes_after_the_stages_before_it_at_their_pace(said, minutes):
    assert why.turn_at(course(**said), PLACE, NOW) == NOW + timedelta(minutes=minutes)


@pytest.mark.parametrize("said", [{"stage": 2}, {"members": 0}], ids=["no stage is left", "an empty cohort"])
def test_a_turn_that_cannot_be_known_is_not_guessed(said):
    assert why.turn_at(course(**said), PLACE, NOW) is None


def waiting(**said):
    word = Directive("demo", "eu-web", "1.1.0", "1.0.0", 10, SALT, 1)
    plain = why.Facts(
        NAME,
        "1.0.0",
        seen_at=NOW - timedelta(seconds=42),
        quiet=timedelta(minutes=3),
        running_seq=2,
        platform="linux-x86_64",
        cohort="eu-web",
        course=course(stage=1),
        directive=word,
        told_at=NOW,
        bundles={"1.1.0": why.Bundle(3)},
    )
    return replace(plain, **said)


def test_an_agent_whose_turn_comes_later_reads_as_documented():
    told = why.explain(waiting(), NOW)
    assert told["summary"] == (
        "web-17 runs 1.0.0; its cohort eu-web is moving to 1.1.0. It is not updating because:"
    )
    (blocked,) = [link for link in told["chain"] if not link["ok"]]
    assert blocked == {
        "ok": False,
        "code": "not-yet",
        "text": f"rollout r-31 is at 0.1%; this agent's place is {PLACE / 100:g}%."
        " At this pace its turn comes about 12:40 UTC.",
        "then": "release agents move web-17 --cohort NAME",
        "until": "2026-03-02T12:40:00Z",
        "says": "not-yet",
        "seen": {"rollout": "r-31", "progress": 10, "place": PLACE, "stage": 1},
    }
    assert [link["text"] for link in told["chain"] if link["ok"]] == [
        "reported 42 s ago",
        "cohort eu-web",
        "platform linux-x86_64 has a bundle",
    ]


@pytest.mark.parametrize(
    ("taken", "mine", "ok"),
    [(1, False, True), (2, False, False), (2, True, True)],
    ids=["room", "full", "mine"],
)
def test_a_full_failure_domain_is_named_with_the_time_at_which_one_is_free(taken, mine, ok):
    soon = NOW + timedelta(minutes=5)
    facts = waiting(room=why.Room("site ber", taken, 2, mine, soon))
    (link,) = [link for link in why.chain(facts, NOW) if link.code == "lease"]
    assert (link.ok, link.until) == (ok, None if ok else soon)


@pytest.mark.parametrize("reason", ["stop-file", "no-room", "digest-mismatch"])
def test_what_only_the_agent_knows_is_told_in_its_words(reason):
    links = why.chain(waiting(reason=reason, detail="it is so"), NOW)
    assert [(link.says, link.text) for link in links if link.code == reason] == [
        (Reason(reason), f"it says {reason}: it is so")
    ]


def test_what_a_link_says_already_is_not_said_twice():
    held = waiting(held=True, reason="held", detail="held on the host: fair")
    blocked = [link for link in why.chain(held, NOW) if not link.ok]
    assert [link.code for link in blocked] == ["not-yet", "held"]
    assert blocked[-1].text == "held on the host: fair"


def test_a_hold_is_told_with_its_reason_alone_and_where_there_is_nothing_to_update_to_as_well():
    elsewhere = why.chain(waiting(held=True, reason="not-yet", detail="at 10%"), NOW)
    assert [link.text for link in elsewhere if link.code == "held"] == ["held on the host"]
    word = Directive("demo", "eu-web", "1.1.0", "1.1.0", 10_000, SALT, 1)
    settled = why.chain(waiting(held=True, running="1.1.0", directive=word), NOW)
    assert [(link.ok, link.text) for link in settled if link.code == "held"] == [(True, "held on the host")]


def test_a_download_that_failed_blocks_without_being_called_skipped():
    (link,) = [
        link
        for link in why.chain(waiting(failed=("failed", "digest-mismatch", "")), NOW)
        if link.code == "failed"
    ]
    assert (link.ok, link.says) == (False, None)


@pytest.mark.parametrize(
    ("changes", "then"),
    [
        ({}, "release rollout retry r-31"),
        ({"wants": why.Held(pin="1.1.0")}, "agent retry (there)"),
        ({"course": None}, "agent retry (there)"),
        ({"course": course(state=State.ROLLED_BACK)}, "agent retry (there)"),
    ],
    ids=["rollout", "pin", "no rollout", "over"],
)
def test_what_failed_there_is_tried_again_by_a_command_that_is_not_refused(changes, then):
    for said in ({"failed": ("rolled_back", "unhealthy", "")}, {"reason": "skipped", "detail": "it failed"}):
        blocked = [link for link in why.chain(waiting(**said, **changes), NOW) if link.says == Reason.SKIPPED]
        assert [link.then for link in blocked] == [then]


def test_a_host_that_is_behind_a_stepping_stone_is_led_there_apart_from_its_cohort():
    bundles = {"1.1.0": why.Bundle(5, upgrade_from_seq=3)}
    word = Directive("demo", "eu-web", "1.1.0", "1.1.0", 10_000, SALT, 1)
    (link,) = [link for link in why.chain(waiting(bundles=bundles, directive=word), NOW) if not link.ok]
    assert (link.says, link.text) == (Reason.STEPPING_STONE, "1.1.0 installs only over seq 3; 1.0.0 is 2")
    assert link.then == "release cohort create NAME --match 'version<BETWEEN' --release BETWEEN --priority N"


def signed(floor):
    """Targets that hold a policy, as they lie in the table; nobody looks at signatures any more there."""
    targets = Targets(expires=NOW + timedelta(days=9))
    held = TargetFile.from_data("policy/demo.json", b"{}", ["sha256"])
    held.unrecognized_fields["custom"] = Policy(floor).to_json()
    targets.targets["policy/demo.json"] = held
    return Metadata(targets).to_bytes()


def test_the_policy_is_that_of_the_newest_targets_also_when_others_were_just_read(sessions):
    for version, floor in ((1, 2), (2, 7)):
        row = {"role": "targets", "version": version, "expires_at": NOW, "created_at": NOW}
        with sessions.write() as session:
            session.add(MetadataFile(**row, body=signed(floor)))
        with sessions.read() as session:
            assert policies.policy_of(session, "demo").floor_seq == floor
            assert policies.policy_of(session, "another") == Policy()
