"""What agents say over HTTP, and what people see and ask of them."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent_core import wire
from agent_core.errors import Exit
from release_server import agents
from tests.release_server.fleet_world import PATH, Host, World
from tests.release_server.operator_desk import desk


@pytest.fixture
def world(sessions, clock):
    return World(sessions, clock)


def send(client, host, report, **change):
    """A signed report as the device sends it."""
    proof, body = host.sign(report)
    headers = {
        wire.HEADER_AGENT: host.id,
        wire.HEADER_COUNTER: str(proof.counter),
        wire.HEADER_SIGNATURE: proof.signature,
    }
    return client.post(PATH, data=change.pop("body", body), headers=headers | change)


def test_a_host_enrols_reports_signed_and_goes_on_under_its_session(client, world):
    world.cohort()
    key = Ed25519PrivateKey.generate()
    request = world.request("web-1", key, labels={"region": "eu"})
    headers = {"Authorization": f"Bearer {world.token}"}
    answer = client.post("/api/v1/enroll", json=request.to_json(), headers=headers)
    assert answer.status_code == 200
    assert wire.EnrollAnswer.from_json(answer.json) == wire.EnrollAnswer("web-1", "all")
    again = client.post("/api/v1/enroll", json=request.to_json(), headers=headers)
    assert again.json == answer.json

    host = Host("web-1", key)
    step = host.step(world.clock(), "trial", "1.1.0")
    answer = send(client, host, host.report(step))
    told = wire.ReportAnswer.from_json(answer.json)
    assert (told.cohort, told.accepted, told.session_s) == ("all", 1, 3600)
    heartbeat = client.post(
        PATH,
        json=host.report().to_json(),
        headers={"Authorization": f"Bearer {told.session}", wire.HEADER_AGENT: "web-1"},
    )
    assert wire.ReportAnswer.from_json(heartbeat.json) == wire.ReportAnswer("all", 1)


@pytest.mark.parametrize(
    ("bearer", "status", "reason"),
    [(None, 401, "not-signed-in"), ("rft_guess", 401, "token-unknown"), ("reader", 403, "scope")],
)
def test_enrolment_needs_an_enrolment_token(client, world, bearer, status, reason, sign_in):
    request = world.request("web", Ed25519PrivateKey.generate()).to_json()
    if bearer == "reader":
        answer = sign_in("reader")("POST", "/enroll", json=request)
    else:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        answer = client.post("/api/v1/enroll", json=request, headers=headers)
    assert (answer.status_code, answer.json["reason"]) == (status, reason)
    assert answer.content_type == "application/problem+json"


@pytest.mark.parametrize(
    "body", [b"", b"[", b"[]", b"{}", b"[" * 100_000, b'{"schema":1,"product":"../etc"}'], ids=str
)
def test_a_body_that_is_no_message_is_refused(client, world, body):
    host = world.enroll("web")
    headers = {"Authorization": f"Bearer {world.token}"}
    assert client.post("/api/v1/enroll", data=body, headers=headers).status_code == 400
    assert send(client, host, host.report(), body=body).status_code in (400, 401)


def test_a_forged_a_changed_and_a_replayed_report_are_refused_with_401(client, world):
    host, other = world.enroll("web"), world.enroll("other")
    changed = send(client, host, host.report(), body=b"{}" + b" " * 10)
    assert changed.status_code in (400, 401)
    forged = send(client, other, host.report(), **{wire.HEADER_AGENT: "web", wire.HEADER_COUNTER: "99"})
    assert (forged.status_code, forged.json["reason"]) == (401, "bad-signature")
    proof, body = host.sign(host.report())
    headers = {
        wire.HEADER_AGENT: "web",
        wire.HEADER_COUNTER: str(proof.counter),
        wire.HEADER_SIGNATURE: proof.signature,
    }
    assert client.post(PATH, data=body, headers=headers).status_code == 200
    replayed = client.post(PATH, data=body, headers=headers)
    assert (replayed.status_code, replayed.json["reason"]) == (401, "replayed")


@pytest.mark.parametrize("counter", ["", "-1", "1.5", "٣", "9" * 30])
def test_a_counter_that_is_none_is_refused(client, world, counter):
    host = world.enroll("web")
    assert send(client, host, host.report(), **{wire.HEADER_COUNTER: counter}).status_code == 400


def test_a_heartbeat_may_not_carry_transitions_nor_speak_for_another(client, world):
    host, other = world.enroll("web"), world.enroll("other")
    headers = {"Authorization": f"Bearer {host.session}", wire.HEADER_AGENT: "web"}
    step = host.step(world.clock(), "trial", "1.1.0")
    answer = client.post(PATH, json=host.report(step).to_json(), headers=headers)
    assert (answer.status_code, answer.json["reason"]) == (403, "unsigned")
    answer = client.post(PATH, json=other.report().to_json(), headers=headers)
    assert (answer.status_code, answer.json["reason"]) == (403, "not-yourself")
    answer = client.post(PATH, json=host.report().to_json(), headers={wire.HEADER_AGENT: "web"})
    assert (answer.status_code, answer.json["reason"]) == (401, "not-signed-in")
    world.clock.step(hours=1)
    answer = client.post(PATH, json=host.report().to_json(), headers=headers)
    assert (answer.status_code, answer.json["reason"]) == (401, "session-over")


def test_people_list_show_and_steer_agents(world, sign_in):
    world.cohort("all")
    world.cohort("canary", match="never=true")
    host = world.enroll("web", labels={"region": "eu"})
    world.report(host, host.step(world.clock(), "trial", "1.1.0", reason="r"))
    call = sign_in("operator")
    (row,) = call("GET", "/agents?product=demo&cohort=all&state=ok&label=region=eu").json["items"]
    assert (row["id"], row["cohort"], row["state"], row["seen_at"]) == (
        "web",
        "all",
        "ok",
        "2026-05-01T12:00:00Z",
    )
    shown = call("GET", "/agents/web").json
    assert [step["state"] for step in shown["events"]] == ["trial"]
    assert call("POST", "/agents/web/move", json={"cohort": "canary"}).json["cohort"] == "canary"
    assert call("POST", "/agents/web/move", json={"cohort": None}).json["cohort"] == "all"
    labelled = call("POST", "/agents/web/label", json={"labels": {"tier": "web"}}).json
    assert labelled["operator_labels"] == {"tier": "web"}
    assert call("POST", "/agents/web/label", json={"labels": {"Not A Key": "x"}}).status_code == 400
    assert call("GET", "/agents/web/why").json["chain"]
    assert call("POST", "/agents/web/retire", json={"reason": "sold"}).json["state"] == "retired"
    assert call("GET", "/agents").json["items"] == []
    assert call("GET", "/agents/nobody").status_code == 404
    assert call("GET", "/agents?label=nonsense").status_code == 400
    assert call("GET", "/agents?state=nonsense").status_code == 422
    assert "agent.retire" in [entry["action"] for entry in sign_in("reader")("GET", "/audit").json["items"]]


def test_a_long_list_comes_in_pages(world, sign_in):
    world.enroll_many(3)
    call = sign_in("reader")
    first = call("GET", "/agents?limit=2").json
    assert ([row["id"] for row in first["items"]], first["next"]) == (["web-00", "web-01"], "web-01")
    second = call("GET", f"/agents?limit=2&after={first['next']}").json
    assert ([row["id"] for row in second["items"]], second["next"]) == (["web-02"], None)


@pytest.mark.parametrize("verb", ["move", "label", "retire"])
@pytest.mark.parametrize("role", ["reader", "releaser", "enroller"])
def test_only_operators_steer_agents(world, sign_in, verb, role):
    world.enroll("web")
    bodies = {"move": {"cohort": None}, "label": {"labels": {}}, "retire": {}}
    assert sign_in(role)("POST", f"/agents/web/{verb}", json=bodies[verb]).status_code == 403


# --- editions --------------------------------------------------------------------------------------------


def test_nobody_overwrites_the_labels_of_an_agent_that_they_have_not_seen(world, sign_in):
    """`label` replaces all of them: of two who each add one, the second would take away the first's."""
    world.cohort()
    world.enroll("web-1")
    call = sign_in("operator")
    seen = {"If-Match": call("GET", "/agents/web-1").headers["ETag"]}
    world.report(world.hosts["web-1"], reason="not-yet")
    assert call("GET", "/agents/web-1").headers["ETag"] == seen["If-Match"], "a report is no edit"
    first = call("POST", "/agents/web-1/label", json={"labels": {"tier": "db"}}, headers=seen)
    assert (first.status_code, first.headers["ETag"] != seen["If-Match"]) == (200, True)
    for verb, body in (("label", {"labels": {"rack": "7"}}), ("move", {"cohort": "all"}), ("retire", {})):
        refused = call("POST", f"/agents/web-1/{verb}", json=body, headers=seen)
        assert (refused.status_code, refused.json["reason"]) == (412, "stale")
        assert refused.json["then"] == "release agents show web-1, then the same again"
    shown = call("GET", "/agents/web-1")
    assert (shown.json["operator_labels"], shown.json["cohort_fixed"]) == ({"tier": "db"}, False)
    again = {"If-Match": shown.headers["ETag"]}
    moved = call("POST", "/agents/web-1/move", json={"cohort": "all"}, headers=again)
    assert (moved.status_code, moved.json["cohort_fixed"]) == (200, True)


def test_an_agent_that_its_own_labels_lead_elsewhere_was_edited_by_nobody(world, sign_in):
    """Only where people put it is theirs."""
    world.cohort()
    world.cohort("db", match="tier=db", priority=5)
    host = world.enroll("web-1", labels={"tier": "web"})
    call = sign_in("operator")
    before = call("GET", "/agents/web-1")
    host.labels = {"tier": "db"}
    world.report(host)
    after = call("GET", "/agents/web-1")
    assert (before.json["cohort"], after.json["cohort"]) == ("all", "db")
    assert before.headers["ETag"] == after.headers["ETag"]
    editions = set()
    for cohort in ("all", "db", None):
        moved = call("POST", "/agents/web-1/move", json={"cohort": cohort})
        editions.add(moved.headers["ETag"])
    assert len(editions) == 3
    assert before.headers["ETag"] in editions


def test_the_command_names_the_edition_whose_labels_it_changes(
    world, app, token, tmp_path, monkeypatch, capsys
):
    world.cohort()
    world.enroll("web-1")
    meanwhile = [{"tier": "db"}]  # what another person sets, between the command's look and its change

    @app.after_request
    def label_first(answer):
        if meanwhile:
            world.call(agents.label, "web-1", labels=meanwhile.pop())
        return answer

    with desk(app, token, tmp_path, monkeypatch, capsys) as sat:
        code, _, said = sat.run("agents", "label", "web-1", "rack=7")
        assert (code, "changed meanwhile" in said) == (Exit.CONFLICT, True)
        labelled = sat.json("agents", "label", "web-1", "rack=7")
        assert labelled["operator_labels"] == {"tier": "db", "rack": "7"}
