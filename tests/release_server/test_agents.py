"""Enrolment, reports that prove who sent them, counters that a recount proves, and `why`."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import event, select, text

from agent_core.directive import bucket
from agent_core.errors import ConflictError, NotAllowedError, NotFoundError
from agent_core.wire import AttemptState, Phase
from release_server import agents, attempts, auth, bearer, cohorts, enrolment, explain, fleet, reports
from release_server.database import make_engine
from release_server.models import Agent, AgentEvent, Attempt, Rollout, Token
from release_server.stages import Stage
from tests.release_server.fleet_world import World


@pytest.fixture
def world(sessions, clock):
    return World(sessions, clock)


def make_token(world, **limits):
    with world.write() as session:
        role = auth.Role(limits.pop("role", "enroller"))
        return auth.add_token(session, world.clock(), name="t", role=role, actor="test", **limits)


def enroll(world, token, request):
    with world.write() as session:
        return enrolment.enroll(session, world.clock(), token, request)


def take(world, proof, report):
    with world.write() as session:
        return reports.take_report(session, world.clock(), proof, report)


# --- enrolment -------------------------------------------------------------------------------------------


def test_an_agent_gets_the_name_it_asks_for_and_the_cohort_of_its_labels(world):
    world.cohort("all")
    world.cohort("eu", match="region=eu")
    request = world.request("web-1", Ed25519PrivateKey.generate(), labels={"region": "eu"}, gate="canary")
    answer = enroll(world, world.token, request)
    assert (answer.agent_id, answer.cohort) == ("web-1", "eu")
    assert world.agent("web-1").agent.gate == "canary"


def test_without_a_matching_cohort_an_agent_has_none(world):
    answer = enroll(world, world.token, world.request("web-1", Ed25519PrivateKey.generate()))
    assert answer.cohort is None


def test_a_taken_name_gets_a_piece_of_the_keys_digest(world):
    names = {
        enroll(world, world.token, world.request("web", Ed25519PrivateKey.generate())).agent_id
        for _ in range(3)
    }
    assert len(names) == 3
    assert "web" in names
    assert all(name == "web" or (name.startswith("web-") and len(name) == 8) for name in names)


def test_the_same_key_again_gets_the_same_answer_and_costs_no_use(world):
    token, text = make_token(world, uses=1)
    request = world.request("web", Ed25519PrivateKey.generate())
    first = enroll(world, text, request)
    assert enroll(world, text, request) == first
    with world.read() as session:
        assert session.get_one(Token, token.id).uses_left == 0
        assert len(session.scalars(select(Agent)).all()) == 1


@pytest.mark.parametrize(
    ("limits", "wait", "reason"),
    [
        ({"uses": 1}, {}, "token-used-up"),
        ({"expires": timedelta(hours=1)}, {"hours": 1}, "token-expired"),
        ({"product": "other"}, {}, "scope"),
        ({"role": "reader"}, {}, "scope"),
        ({"role": "operator"}, {}, "scope"),
    ],
    ids=["used up", "past its date", "another product", "reader", "operator"],
)
def test_a_token_outside_its_limits_enrols_nobody(world, limits, wait, reason):
    _, text = make_token(world, **limits)
    if limits.get("uses"):
        enroll(world, text, world.request("first", Ed25519PrivateKey.generate()))
    world.clock.step(**wait)
    with pytest.raises(NotAllowedError) as refused:
        enroll(world, text, world.request("second", Ed25519PrivateKey.generate()))
    assert refused.value.reason == reason
    with world.read() as session:
        assert session.get(Agent, "second") is None


def test_a_token_revoked_a_second_ago_enrols_nobody(world):
    token, text = make_token(world)
    with world.write() as session:
        auth.revoke_token(session, world.clock(), token.id, "olga")
    world.clock.step(seconds=1)
    with pytest.raises(NotAllowedError) as refused:
        enroll(world, text, world.request("web", Ed25519PrivateKey.generate()))
    assert refused.value.reason == "token-revoked"


def test_an_unknown_token_enrols_nobody(world):
    with pytest.raises(NotAllowedError) as refused:
        enroll(world, "rft_guess", world.request("web", Ed25519PrivateKey.generate()))
    assert refused.value.reason == "token-unknown"


def test_a_failed_enrolment_gives_its_use_back(world):
    token, text = make_token(world, uses=1)
    request = replace(world.request("web", Ed25519PrivateKey.generate()), product="none")
    with pytest.raises(NotFoundError):
        enroll(world, text, request)
    with world.read() as session:
        assert session.get_one(Token, token.id).uses_left == 1


def test_a_retired_agents_key_is_not_enrolled_again(world):
    host = world.enroll("web")
    world.call(agents.retire, host.id)
    with pytest.raises(NotAllowedError) as refused:
        enroll(world, world.token, world.request("web", host.key))
    assert refused.value.reason == "retired"


def test_a_key_belongs_to_one_product(world):
    host = world.enroll("web")
    with pytest.raises(ConflictError):
        enroll(world, world.token, replace(world.request("web", host.key), product="other"))


# --- who sent a report -----------------------------------------------------------------------------------


def refused(world, proof, report):
    with pytest.raises(NotAllowedError) as error:
        take(world, proof, report)
    return error.value.reason


def test_a_report_with_another_key_is_refused(world):
    host = world.enroll("web")
    proof, _ = host.sign(host.report(), key=Ed25519PrivateKey.generate())
    assert refused(world, proof, host.report()) == "bad-signature"


def test_a_report_signed_by_another_agent_is_refused(world):
    host, other = world.enroll("web"), world.enroll("other")
    proof, _ = other.sign(host.report())
    assert refused(world, proof, host.report()) == "not-yourself"
    assert refused(world, replace(proof, agent_id="web", counter=99), host.report()) == "bad-signature"


@pytest.mark.parametrize(
    "change",
    [
        {"method": "PUT"},
        {"path": "/api/v1/enroll"},
        {"body_sha256": "0" * 64},
        {"counter": 99},
        {"signature": "zz"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_signature_covers_the_whole_request(world, change):
    host = world.enroll("web")
    proof, _ = host.sign(host.report())
    assert refused(world, replace(proof, **change), host.report()) == "bad-signature"


def test_a_replayed_report_is_refused(world):
    host = world.enroll("web")
    proof, _ = host.sign(host.report())
    take(world, proof, host.report())
    assert refused(world, proof, host.report()) == "replayed"


def test_an_old_counter_is_refused_though_it_was_never_used(world):
    host = world.enroll("web")
    proof, _ = host.sign(host.report(), counter=50)
    take(world, proof, host.report())
    proof, _ = host.sign(host.report(), counter=49)
    assert refused(world, proof, host.report()) == "replayed"


def test_a_forged_report_does_not_raise_the_counter(world):
    host = world.enroll("web")
    proof, _ = host.sign(host.report(), counter=10**6, key=Ed25519PrivateKey.generate())
    assert refused(world, proof, host.report()) == "bad-signature"
    world.report(host)


def test_an_unknown_agent_is_refused(world):
    host = world.enroll("web")
    assert refused(world, reports.Bearer("nobody", host.session), host.report()) == "unknown-agent"


def test_a_report_of_another_product_is_refused(world):
    host = world.enroll("web")
    report = host.report(product="other")
    proof, _ = host.sign(report)
    assert refused(world, proof, report) == "not-yourself"


def test_a_retired_agent_is_not_listened_to(world):
    host = world.enroll("web")
    world.call(agents.retire, host.id)
    proof, _ = host.sign(host.report())
    assert refused(world, proof, host.report()) == "retired"
    assert refused(world, reports.Bearer("web", host.session), host.report()) == "session-over"


# --- sessions --------------------------------------------------------------------------------------------


def test_a_session_carries_heartbeats_for_an_hour(world):
    host = world.enroll("web")
    world.clock.step(minutes=59)
    world.heartbeat(host, phase=Phase.DOWNLOADING)
    assert world.agent("web").agent.phase == "downloading"
    world.clock.step(minutes=1)
    assert refused(world, reports.Bearer("web", host.session), host.report()) == "session-over"


@pytest.mark.parametrize("token", ["", "guess"])
def test_a_guessed_session_is_refused(world, token):
    host = world.enroll("web")
    assert refused(world, reports.Bearer("web", token), host.report()) == "session-over"


def test_a_session_is_its_agents_only_and_stored_as_a_hash(world):
    host, other = world.enroll("web"), world.enroll("other")
    assert refused(world, reports.Bearer("other", host.session), other.report()) == "session-over"
    with world.read() as session:
        assert session.get_one(Agent, "web").session_hash == bearer.hash_of(host.session)


def test_transitions_under_a_session_are_refused(world):
    host = world.enroll("web")
    step = host.step(world.clock(), "trial", "1.1.0")
    assert refused(world, reports.Bearer("web", host.session), host.report(step)) == "unsigned"


def test_a_new_session_comes_near_the_end_of_the_old_one_or_when_it_was_lost(world):
    host = world.enroll("web")
    old = host.session
    answer = world.report(host, host.step(world.clock(), "trial", "1.1.0"))
    assert answer.session is None
    world.clock.step(minutes=46)
    answer = world.report(host, host.step(world.clock(), "healthy", "1.1.0"))
    assert answer.session not in (None, old)
    assert answer.session_s == 3600
    assert world.report(host).session not in (None, answer.session)


# --- what a report does ----------------------------------------------------------------------------------


def test_a_report_is_what_people_see(world):
    world.cohort()
    host = world.enroll("web", labels={"tier": "web"})
    world.report(host, phase=Phase.TRIAL, reason="update", detail="to 1.1.0", held=True, figures={"rss": 5.0})
    shown = world.agent("web")
    agent = shown.agent
    assert (agent.version, agent.phase, agent.reason, agent.detail) == (
        "1.0.0",
        "trial",
        "update",
        "to 1.1.0",
    )
    assert (agent.held, agent.figures, agent.labels) == (True, {"rss": 5.0}, {"tier": "web"})
    assert (shown.product, shown.cohort, shown.state) == ("demo", "all", "held")


def test_each_transition_is_taken_once_in_the_order_of_its_number(world):
    host = world.enroll("web")
    steps = [host.step(world.clock(), state, "1.1.0") for state in ("downloading", "staged", "trial")]
    assert world.report(host, *reversed(steps)).accepted == 3
    later = host.step(world.clock(), "healthy", "1.1.0")
    assert world.report(host, *steps, later).accepted == 4
    with world.read() as session:
        rows = session.scalars(select(AgentEvent).order_by(AgentEvent.number)).all()
        newest = agents.events(session, "web")
    assert [row.state for row in rows] == ["downloading", "staged", "trial", "healthy"]
    assert [row.number for row in newest] == [4, 3, 2, 1]


def test_transitions_are_durable_before_they_are_answered(world, config):
    """A second connection sees them as soon as the answer is there."""
    host = world.enroll("web")
    world.report(host, host.step(world.clock(), "trial", "1.1.0"))
    other = make_engine(config.database_url)
    with other.connect() as connection:
        assert connection.execute(text("SELECT state FROM agent_events")).fetchall() == [("trial",)]
    other.dispose()


def test_an_attempt_is_made_when_it_is_first_heard_of(world):
    world.cohort()
    host = world.enroll("web")
    rollout = world.start()
    assert world.attempt(host, rollout) is None
    told = world.rollout(rollout)
    world.report(host, host.step(world.clock(), "downloading", "1.1.0", told.salt))
    assert world.attempt(host, rollout).state == "downloading"
    assert world.counters(rollout) == {"downloading": 1}


@pytest.mark.parametrize(
    ("version", "salt"), [("1.0.0", None), ("1.1.0", ""), ("1.1.0", "unknown")], ids=["base", "none", "other"]
)
def test_a_transition_that_is_not_of_a_rollout_moves_no_attempt(world, version, salt):
    world.cohort()
    host = world.enroll("web")
    rollout = world.start()
    told = world.rollout(rollout)
    world.report(host, host.step(world.clock(), "healthy", version, told.salt if salt is None else salt))
    assert world.attempt(host, rollout) is None
    assert world.counters(rollout) == {}


@pytest.mark.parametrize("state", list(AttemptState))
def test_an_agent_that_is_healthy_can_only_fall(state):
    falls = (AttemptState.ROLLED_BACK, AttemptState.FAILED, AttemptState.SILENT)
    assert attempts.may_follow(state, AttemptState.HEALTHY) is (state in falls)


@pytest.mark.parametrize("after", sorted(set(AttemptState) - {AttemptState.HEALTHY}))
def test_any_other_attempt_may_begin_anew(after):
    assert all(attempts.may_follow(state, after) for state in AttemptState)


def test_a_healthy_attempt_keeps_its_state_when_told_of_a_download(world):
    world.cohort()
    host = world.enroll("web")
    rollout = world.start()
    world.finish(host, rollout, "healthy")
    world.report(host, host.step(world.clock(), "downloading", "1.1.0", world.rollout(rollout).salt))
    assert world.counters(rollout) == {"healthy": 1}


STEPS = st.lists(
    st.tuples(st.integers(0, 2), st.sampled_from(list(AttemptState)), st.sampled_from(["1.1.0", "1.0.0"])),
    max_size=20,
)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STEPS)
def test_counters_equal_a_recount_whatever_agents_report(world, steps):
    if not world.hosts:
        world.cohort()
        world.enroll_many(3)
        world.start("1.1.0")
    hosts = list(world.hosts.values())
    with world.read() as session:  # rolled back at its end, so each example begins alike
        rollout = session.scalars(select(Rollout)).one()
        for number, (who, state, version) in enumerate(steps, 1):
            agent = session.get_one(Agent, hosts[who].id)
            step = replace(
                hosts[who].step(world.clock(), state, version, rollout.salt), number=10_000 + number
            )
            reports._take_transition(session, world.clock(), agent, step)
            if number % 7 == 0:
                fleet.tick(session, world.clock() + timedelta(hours=number))
        assert attempts.counters(session, rollout.id) == attempts.recount(session, rollout.id)
        there = len(session.scalars(select(Attempt)).all())
        assert sum(attempts.counters(session, rollout.id).values()) == there


# --- what it costs ---------------------------------------------------------------------------------------


def statements(world, act):
    """The statements that `act` sends, but for the one by which a writer waits for its turn."""
    sent = []

    def note(_connection, _cursor, statement, *_rest):
        if "advisory_xact_lock" not in statement:
            sent.append(statement)

    event.listen(world.sessions.engine, "before_cursor_execute", note)
    try:
        act()
    finally:
        event.remove(world.sessions.engine, "before_cursor_execute", note)
    return sent


def test_a_heartbeat_that_says_nothing_new_is_one_update(world):
    world.cohort()
    host = world.enroll("web")
    world.clock.step(seconds=60)
    sent = statements(world, lambda: world.heartbeat(host))
    assert [statement.split()[0] for statement in sent].count("UPDATE") == 1
    assert len(sent) <= 6


def test_heartbeats_in_one_breath_are_coalesced(world):
    world.cohort()
    host = world.enroll("web")
    sent = statements(world, lambda: world.heartbeat(host))
    assert not [statement for statement in sent if statement.startswith(("UPDATE", "INSERT"))]


def test_the_work_of_a_heartbeat_does_not_grow_with_the_fleet(world):
    world.cohort()
    host = world.enroll("web")
    world.clock.step(seconds=60)
    few = len(statements(world, lambda: world.heartbeat(host)))
    world.enroll_many(20)
    world.clock.step(seconds=60)
    assert len(statements(world, lambda: world.heartbeat(host))) == few


# --- looking at agents -----------------------------------------------------------------------------------


def listed(world, **wanted):
    with world.read() as session:
        found = agents.list_agents(session, world.clock(), agents.Filter(**wanted), limit=100)
        return [view.agent.id for view in found]


def test_agents_are_found_by_what_they_are(world):
    world.cohort("all")
    world.cohort("eu", match="region=eu")
    world.enroll("a", labels={"region": "eu", "dc.rack/row": "7"})
    world.enroll("b", version="1.1.0")
    world.call(agents.label, "b", labels={"region": "us"})
    assert listed(world) == ["a", "b"]
    assert listed(world, product="demo") == ["a", "b"]
    assert listed(world, cohort="eu") == ["a"]
    assert listed(world, version="1.1.0") == ["b"]
    assert listed(world, labels=(("region", "us"),)) == ["b"]
    assert listed(world, labels=(("region", "eu"), ("dc.rack/row", "7"))) == ["a"]
    assert listed(world, labels=(("region", "eu"), ("dc.rack/row", "8"))) == []
    with pytest.raises(NotFoundError):
        listed(world, product="none")


def test_an_agent_has_one_state_and_lists_agree_with_it(world):
    world.cohort()
    hosts = {name: world.enroll(name) for name in ("failed", "held", "ok", "retired", "silent")}
    rollout = world.start("1.1.0", Stage(share_bp=10_000, max_failed=5))
    world.clock.step(hours=1)
    world.finish(hosts["failed"], rollout, "rolled_back")
    world.report(hosts["held"], held=True)
    world.report(hosts["ok"])
    world.call(agents.retire, "retired")
    for state in hosts:
        assert world.agent(state).state == state
        assert listed(world, state=state) == [state]
    assert listed(world) == ["failed", "held", "ok", "silent"]


def test_agents_without_a_cohort_are_silent_after_the_usual_time(world):
    world.enroll("lone")
    world.clock.step(seconds=3 * 300 + 30)
    assert listed(world, state="late") == ["lone"]
    world.clock.step(seconds=1)
    assert listed(world, state="silent") == ["lone"]
    assert world.agent("lone").state == "silent"


def test_lists_come_in_pages(world):
    world.enroll_many(5)
    with world.read() as session:
        pages = [
            [
                view.agent.id
                for view in agents.list_agents(session, world.clock(), agents.Filter(), limit=2, after=after)
            ]
            for after in (None, "web-01", "web-03")
        ]
    assert pages == [["web-00", "web-01"], ["web-02", "web-03"], ["web-04"]]


def test_an_agent_that_does_not_exist_is_not_found(world):
    with pytest.raises(NotFoundError):
        world.agent("nobody")
    for act in (agents.retire,):
        with pytest.raises(NotFoundError):
            world.call(act, "nobody")


def test_a_retired_agent_is_not_moved_or_labelled(world):
    world.cohort()
    world.enroll("web")
    world.call(agents.retire, "web")
    with pytest.raises(ConflictError):
        world.call(agents.move, "web", cohort="all")
    with pytest.raises(ConflictError):
        world.call(agents.label, "web", labels={})
    world.enroll("other")
    with pytest.raises(NotFoundError):
        world.call(agents.move, "other", cohort="none")


# --- why -------------------------------------------------------------------------------------------------


def why(world, agent_id):
    with world.read() as session:
        return explain.agent_why(session, world.clock(), agent_id)


def blocks(told):
    return [link["code"] for link in told["chain"] if not link["ok"]]


def test_why_of_an_agent_that_is_up_to_date(world):
    world.cohort()
    world.enroll("web")
    told = why(world, "web")
    assert told["summary"] == "web runs 1.0.0; it is up to date."
    assert blocks(told) == []
    assert [link["text"] for link in told["chain"]] == ["reported 0 s ago", "cohort all"]


def test_why_names_the_progress_and_the_agents_place_in_the_line(world):
    world.cohort()
    world.enroll_many(6)
    rollout = world.start("1.1.0")
    waiting = next(host for host in world.hosts.values() if host not in world.offered("1.1.0"))
    world.clock.step(seconds=42)
    told = why(world, waiting.id)
    place = bucket(waiting.id, world.rollout(rollout).salt) / 100
    assert told["summary"] == (
        f"{waiting.id} runs 1.0.0; its cohort all is moving to 1.1.0. It is not updating because:"
    )
    texts = {link["code"]: link["text"] for link in told["chain"]}
    assert texts["reported"] == "reported 42 s ago"
    assert texts["platform"] == "platform linux-x86_64-cp311 has a bundle"
    progress = world.directive().progress / 100
    assert texts["not-yet"].startswith(
        f"rollout r-{rollout} is at {progress:g}%; this agent's place is {place:g}%. At this pace its turn"
    )
    assert blocks(told) == ["not-yet"]
    assert "release agents move" in next(link["then"] for link in told["chain"] if not link["ok"])


def test_why_of_an_agent_whose_turn_it_is(world):
    world.cohort()
    world.enroll("web")
    world.start()
    told = why(world, "web")
    assert told["summary"].endswith("is moving to 1.1.0. It is updating.")
    assert blocks(told) == []


def halt(world):
    rollout = world.start("1.1.0")
    world.finish(world.offered("1.1.0")[0], rollout, "rolled_back", "workload-exited", "exit code 1")
    world.tick()


def abort(world):
    rollout = world.start("1.1.0")
    world.finish(world.hosts["web"], rollout, "healthy")
    world.call(fleet.abort, rollout)


@pytest.mark.parametrize(
    ("arrange", "code"),
    [
        (lambda world: world.clock.step(hours=1), "silent"),
        (lambda world: world.call(cohorts.delete, "demo", "all"), "no-cohort"),
        (lambda world: world.call(agents.retire, "web"), "retired"),
        (lambda world: world.call(cohorts.freeze, "demo", "all", reason="fair"), "frozen"),
        (lambda world: world.call(fleet.pause, world.start("1.1.0")), "paused"),
        (halt, "paused"),
        (abort, "aborted"),
        (lambda world: (world.start("1.1.0"), world.report(world.hosts["web"], held=True)), "held"),
        (
            lambda world: (
                world.start("1.1.0"),
                world.report(world.hosts["web"], reason="outside-window", detail="it opens Sat 22:00 UTC"),
            ),
            "outside-window",
        ),
        (
            lambda world: (world.start("1.1.0"), world.report(world.hosts["web"], reason="skipped")),
            "skipped",
        ),
    ],
    ids=[
        "silent",
        "no-cohort",
        "retired",
        "frozen",
        "paused",
        "halted",
        "aborted",
        "held",
        "window",
        "skipped",
    ],
)
def test_why_names_what_holds_an_agent_back(world, arrange, code):
    world.cohort()
    world.enroll("web")
    arrange(world)
    told = why(world, "web")
    assert code in blocks(told)
    assert all(link["text"] for link in told["chain"])


def test_why_of_an_agent_that_went_back_says_what_happened_there(world):
    world.cohort()
    world.enroll("web")
    halt(world)
    (link,) = [link for link in why(world, "web")["chain"] if link["code"] == "rolled_back"]
    assert "workload-exited" in link["text"]
    assert "exit code 1" in link["text"]


def test_why_of_a_pinned_cohort(world):
    world.cohort()
    world.enroll("web")
    world.call(cohorts.pin, "demo", "all", version="1.0.0", reason="audit")
    texts = [link["text"] for link in why(world, "web")["chain"]]
    assert "cohort all is pinned to 1.0.0: audit" in texts


def test_why_of_a_cohort_without_a_release(world):
    world.cohort(release=None)
    world.enroll("web", version="")
    assert blocks(why(world, "web")) == ["no-directive"]


def test_why_of_a_platform_without_a_bundle_and_of_a_gate(world):
    world.add_release("2.0.0", 20, platform="linux-aarch64")
    world.add_release("3.0.0", 30, gates=["canary"])
    world.cohort()
    world.enroll("web")
    world.call(fleet.abort, world.start("2.0.0"))
    world.start("2.0.0")
    assert blocks(why(world, "web")) == ["no-bundle"]
    world.start("3.0.0", supersede=True)
    assert blocks(why(world, "web")) == ["gate"]


@pytest.mark.parametrize(
    ("bundle", "fits"),
    [
        ("any", True),
        ("linux-x86_64", True),
        ("linux-x86_64-cp311", True),
        ("linux-x86", False),
        ("linux-aarch64", False),
    ],
)
def test_a_host_runs_bundles_of_its_platform_with_or_without_the_abi(bundle, fits):
    assert agents.runs_on(bundle, "linux-x86_64-cp311") is fits
