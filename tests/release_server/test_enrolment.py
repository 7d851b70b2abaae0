"""Whom a token lets in and where: approval, cohorts and labels of a token; rejection and retirement."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent_core.errors import ConflictError, NotAllowedError, UsageError
from release_server import agents, auth, enrolment, explain, reports
from release_server.preview import preview
from tests.release_server.fleet_world import World


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort("all")
    return made


@pytest.fixture
def enroller(world):
    def make(**said):
        with world.write() as session:
            said = {"name": "t", "role": auth.Role.ENROLLER, "actor": "test"} | said
            return auth.add_token(session, world.clock(), **said)[1]

    return make


def why(world, agent_id):
    with world.read() as session:
        return explain.agent_why(session, world.clock(), agent_id)["chain"][-1]


def test_whom_an_approving_token_enrols_waits_without_a_cohort_and_is_told_so(world, enroller):
    host = world.enroll("web", token=enroller(approve=True))
    answer = world.report(host)
    assert (answer.pending, answer.cohort) == (True, None)
    assert world.agent("web").state == "pending"
    assert (why(world, "web")["code"], why(world, "web")["then"]) == (
        "pending",
        "release agents accept web",
    )


def test_nothing_gives_a_pending_agent_a_cohort_but_its_acceptance(world, enroller):
    host = world.enroll("web", token=enroller(approve=True))
    world.report(host, labels={"region": "eu"})
    world.cohort("eu", match="region=eu")
    world.call(agents.label, "web", labels={"region": "eu"})
    with pytest.raises(ConflictError) as refused:
        world.call(agents.move, "web", cohort="eu")
    assert refused.value.reason == "pending"
    assert world.agent("web").cohort is None
    world.call(enrolment.accept, "web")
    answer = world.report(host)
    assert (answer.pending, answer.cohort) == (False, "eu")
    assert world.agent("web").state == "ok"


def test_a_pending_agent_has_no_part_in_a_rollout(world, enroller):
    world.enroll("in")
    world.enroll("waits", token=enroller(approve=True))
    rollout = world.start()
    world.tick(seconds=1)
    assert [host.id for host in world.offered("1.1.0")] != []
    with world.read() as session:
        seen = preview(session, world.clock(), "demo", "all")
    assert seen.inside.names == ["in"]
    assert world.status(rollout).state == "running"


def test_the_same_key_again_is_told_that_it_still_waits(world, enroller):
    text, key = enroller(approve=True, uses=1), Ed25519PrivateKey.generate()
    for _ in range(2):
        with world.write() as session:
            answer = enrolment.enroll(session, world.clock(), text, world.request("web", key))
        assert answer.pending


def test_a_rejected_agent_is_refused_with_a_reason_and_cannot_be_accepted(world, enroller):
    host = world.enroll("web", token=enroller(approve=True))
    world.call(enrolment.reject, "web", reason="not ours")
    with pytest.raises(NotAllowedError) as refused:
        world.report(host)
    assert refused.value.reason == "retired"
    with pytest.raises(ConflictError):
        world.call(enrolment.accept, "web")


def test_an_agent_that_is_in_is_accepted_twice_and_not_rejected(world):
    world.enroll("web")
    world.call(enrolment.accept, "web")
    with pytest.raises(ConflictError):
        world.call(enrolment.reject, "web")
    assert world.agent("web").state == "ok"


@pytest.mark.parametrize("approve", [False, True])
def test_a_token_says_cohort_and_labels_of_whom_it_enrols(world, enroller, approve):
    world.cohort("lab", match="tier=none")
    text = enroller(product="demo", cohort="lab", labels={"site": "b"}, approve=approve)
    host = world.enroll("web", token=text, labels={"site": "a"})
    if approve:
        world.call(enrolment.accept, "web")
    assert world.report(host).cohort == "lab"
    agent = world.agent("web").agent
    assert (agent.operator_labels, agent.cohort_fixed) == ({"site": "b"}, True)


@pytest.mark.parametrize(
    "said",
    [
        {"role": auth.Role.OPERATOR, "approve": True},
        {"role": auth.Role.OPERATOR, "labels": {"a": "b"}},
        {"cohort": "all"},
    ],
    ids=["no enroller approves", "no enroller labels", "a cohort without product"],
)
def test_a_token_that_makes_no_sense_is_not_made(enroller, said):
    with pytest.raises(UsageError):
        enroller(**said)


def test_a_taken_name_with_another_key_is_another_agent(world):
    first, second = world.enroll("web"), world.enroll("web")
    assert first.id == "web" != second.id
    proof, _ = second.sign(first.report())
    with pytest.raises(NotAllowedError), world.write() as session:
        reports.take_report(session, world.clock(), proof, first.report())


@pytest.mark.parametrize("skew_s", [-56 * 366 * 86_400, 0, 14 * 366 * 86_400], ids=["1970", "now", "2040"])
def test_a_host_whose_clock_is_off_is_heard(world, skew_s):
    host = world.enroll("web")
    counter = max(host.counter + 1, int(world.clock().timestamp()) + skew_s)
    for number in range(counter, counter + 3):  # a device's counter only grows, whatever its clock does then
        proof, _ = host.sign(host.report(), counter=number)
        with world.write() as session:
            reports.take_report(session, world.clock(), proof, host.report())


# --- over HTTP -------------------------------------------------------------------------------------------


def test_accepting_is_an_operators_and_shows_the_agent(world, enroller, sign_in):
    for name in ("web-1", "web-2"):
        world.enroll(name, token=enroller(approve=True))
    listed = sign_in("reader")("GET", "/agents?product=demo&state=pending").json["items"]
    assert [agent["id"] for agent in listed] == ["web-1", "web-2"]
    assert sign_in("releaser")("POST", "/agents/web-1/accept", json={}).status_code == 403
    call = sign_in("operator")
    assert call("POST", "/agents/web-1/accept", json={"reason": "ours"}).json["state"] == "ok"
    assert call("POST", "/agents/web-2/reject", json={}).json["state"] == "retired"
    made = sign_in("admin")("POST", "/tokens", json={"name": "x", "role": "enroller", "approve": True})
    assert made.json["approve"] is True
