"""A POST that is sent again with its `Idempotency-Key` is done once, and answered as the first time."""

from __future__ import annotations

import os
import signal
import sys
import zlib
from threading import Barrier, Thread

import pytest
from sqlalchemy import event, func, select

from release_server import audit
from release_server.app import create_app
from release_server.models import AuditEntry, CohortSpec, KeptAnswer, Release, Rollout, Token
from release_server.retention.pruner import Pruner
from tests.release_server.fleet_world import World

STAGES = [{"share_bp": 10_000}]
ROLLOUT = {"product": "demo", "cohort": "all", "version": "1.1.0", "stages": STAGES}
KEY = {"Idempotency-Key": "0f8fad5b-d9cb-469f-a165-70867728950e"}


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    return made


@pytest.fixture
def call(sign_in):
    return sign_in("admin")


def count(sessions, model, *where):
    with sessions.read() as session:
        return session.scalar(select(func.count()).select_from(model).where(*where))


def deeds(sessions, action):
    return count(sessions, AuditEntry, AuditEntry.action == action)


def test_the_same_request_with_the_same_key_is_done_once_and_answered_alike(world, sessions, call):
    first = call("POST", "/rollouts", json=ROLLOUT, headers=KEY)
    world.enroll("later")  # what has changed since does not change the answer
    again = call("POST", "/rollouts", json=ROLLOUT, headers=KEY)
    assert (again.status_code, again.json) == (first.status_code, first.json) == (201, first.json)
    assert again.headers["ETag"] == first.headers["ETag"]
    assert again.content_type == first.content_type
    assert "Idempotency-Replayed" not in first.headers
    assert again.headers["Idempotency-Replayed"] == "true"
    assert count(sessions, Rollout) == deeds(sessions, "rollout.start") == 1


def test_what_can_only_be_done_once_is_no_conflict_the_second_time(world, sessions, call):
    call("POST", "/rollouts", json=ROLLOUT)
    answers = [call("POST", "/rollouts/1/pause", json={"reason": "lunch"}, headers=KEY) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert call("POST", "/rollouts/1/pause", json={}).status_code == 409
    assert deeds(sessions, "rollout.pause") == 1


@pytest.mark.parametrize(
    "other",
    [
        pytest.param({"path": "/rollouts", "json": ROLLOUT | {"reason": "b"}}, id="another body"),
        pytest.param({"path": "/cohorts/demo/all/freeze", "json": {}}, id="another path"),
        pytest.param({"path": "/rollouts?x=1", "json": ROLLOUT}, id="another query"),
        pytest.param({"path": "/rollouts", "json": ROLLOUT, "headers": {"If-Match": '"1"'}}, id="If-Match"),
    ],
)
def test_a_key_with_another_request_is_refused_and_nothing_is_done(world, sessions, call, other):
    call("POST", "/rollouts", json=ROLLOUT, headers=KEY)
    before = count(sessions, AuditEntry)
    said = {"json": other["json"], "headers": KEY | other.get("headers", {})}
    refused = call("POST", other["path"], **said)
    assert (refused.status_code, refused.json["reason"]) == (422, "key-reused")
    assert count(sessions, AuditEntry) == before


def test_a_refusal_is_not_kept_so_the_same_request_may_do_it_later(world, sessions, call):
    call("POST", "/cohorts/demo/all/pin", json={"version": "1.0.0"})
    assert call("POST", "/rollouts", json=ROLLOUT, headers=KEY).status_code == 409
    call("POST", "/cohorts/demo/all/unpin", json={})
    assert call("POST", "/rollouts", json=ROLLOUT, headers=KEY).status_code == 201
    assert count(sessions, KeptAnswer) == 1


def test_two_people_may_choose_the_same_key(world, sign_in):
    for name in ("ada", "bo"):
        call = sign_in("operator", name=name)
        made = call("POST", "/cohorts", json={"product": "demo", "name": name}, headers=KEY)
        assert (made.status_code, made.json["name"]) == (201, name)


def test_who_may_no_longer_ask_is_not_answered_again(world, sign_in, call, sessions):
    operator = sign_in("operator")
    operator("POST", "/rollouts", json=ROLLOUT, headers=KEY)
    with sessions.read() as session:
        number = session.scalar(select(Token.id).where(Token.role == "operator"))
    call("DELETE", f"/tokens/{number}")
    assert operator("POST", "/rollouts", json=ROLLOUT, headers=KEY).status_code == 401


@pytest.mark.parametrize("key", ["", "x" * 129, "with space", "ä"])
def test_a_key_that_is_none_is_refused(world, sessions, call, key):
    refused = call("POST", "/rollouts", json=ROLLOUT, headers={"Idempotency-Key": key})
    assert (refused.status_code, refused.json["reason"]) == (400, "malformed")
    assert count(sessions, Rollout) == 0


def test_a_key_is_known_for_a_day_and_then_pruned(world, sessions, call, clock, blobs, config):
    body = {"version": "1.0.0"}
    call("POST", "/cohorts/demo/all/pin", json=body, headers=KEY)
    clock.step(hours=23, minutes=59)
    assert "Idempotency-Replayed" in call("POST", "/cohorts/demo/all/pin", json=body, headers=KEY).headers
    clock.step(minutes=1)
    done = call("POST", "/cohorts/demo/all/pin", json=body, headers=KEY)
    assert "Idempotency-Replayed" not in done.headers
    assert count(sessions, KeptAnswer) == 1
    clock.step(hours=24)
    pruner = Pruner(sessions, blobs, config.repository, config.retention)
    while pruner.step(clock(), lambda _session: None):
        pass
    assert count(sessions, KeptAnswer) == 0


def test_the_text_of_a_token_is_kept_nowhere_and_a_replay_says_that_it_is_lost(sessions, call):
    made = call("POST", "/tokens", json={"name": "ada", "role": "reader"}, headers=KEY)
    again = call("POST", "/tokens", json={"name": "ada", "role": "reader"}, headers=KEY)
    assert made.json["token"].startswith("rft_")
    assert again.status_code == 201
    assert again.json == made.json | {"token": None}
    assert count(sessions, Token, Token.name == "ada") == 1
    with sessions.read() as session:
        (kept,) = session.scalars(select(KeptAnswer))
    assert b"rft_" not in zlib.decompress(kept.body)


def test_signed_targets_may_be_sent_again(trusted, sessions, blobs, sign_in):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    call = sign_in("releaser")
    said = {"data": trusted.sign(metadata), "content_type": "application/json", "headers": KEY}
    answers = [call("POST", "/metadata/targets", **said) for _ in range(2)]
    assert [(answer.status_code, answer.json) for answer in answers] == [(202, {"version": 1})] * 2
    assert count(sessions, Release) == 1


def test_a_mistake_in_the_middle_leaves_neither_deed_nor_answer(world, sessions, call, monkeypatch):
    def fail(*_args, **_said):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(audit, "record", fail)
    assert call("POST", "/cohorts/demo/all/pin", json={"version": "1.0.0"}, headers=KEY).status_code == 500
    assert count(sessions, KeptAnswer) == 0
    assert count(sessions, CohortSpec) == 1


# --- at once, and cut ------------------------------------------------------------------------------------


@pytest.fixture
def replicas(config, clock, token):
    """Callers at applications that share nothing but the data directory, as one person."""
    text, apps = token("admin"), [create_app(config, clock=clock) for _ in range(4)]

    def caller(app):
        headers = {"Authorization": f"Bearer {text}"} | KEY
        return lambda path, body: app.test_client().post(f"/api/v1{path}", json=body, headers=headers)

    yield [caller(app) for app in apps]
    for app in apps:
        app.extensions["relfleet"].sessions.close()


def test_of_many_that_come_at_once_to_several_replicas_one_does_it(world, sessions, replicas):
    world.enroll_many(2)
    start, answers = Barrier(len(replicas)), []

    def ask(caller):
        start.wait()
        answers.append(caller("/rollouts", ROLLOUT))

    threads = [Thread(target=ask, args=(caller,)) for caller in replicas]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answer.status_code for answer in answers] == [201] * len(replicas)
    assert len({answer.data for answer in answers}) == 1
    assert sum("Idempotency-Replayed" not in answer.headers for answer in answers) == 1
    assert count(sessions, Rollout) == 1


def ask_and_die(app, text, statement, path="/rollouts", body=ROLLOUT):
    """In a child: ask for it, and be killed at the given statement; whether it was."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    try:
        left = [statement]

        def count_down(*_):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        event.listen(app.extensions["relfleet"].sessions.engine, "before_cursor_execute", count_down)
        headers = {"Authorization": f"Bearer {text}"} | KEY
        app.test_client().post(f"/api/v1{path}", json=body, headers=headers)
    finally:
        sys.stderr.flush()
        os._exit(0)


def test_killed_at_any_statement_and_sent_again_it_is_done_once(world, sessions, config, clock, token, call):
    app = create_app(config, clock=clock)  # it opens nothing here: each child has its own connections
    text, statement = token("admin", name="pipeline"), 3
    sessions.close()  # no connection is shared with a child
    while ask_and_die(app, text, statement):
        assert count(sessions, Rollout) == count(sessions, KeptAnswer) == 0
        statement += 13
        sessions.close()
    assert statement > 20
    assert count(sessions, Rollout) == count(sessions, KeptAnswer) == 1
    (made,) = call("GET", "/rollouts").json["items"]
    assert made["state"] == "running"


PLAN = {
    "product": "demo",
    "seen": {"all": 1, "eu": 0},
    "steps": [
        {"verb": "pin", "cohort": "all", "version": "1.0.0"},
        {"verb": "create", "cohort": "eu", "match": "region=eu", "release": "1.1.0"},
        {"verb": "freeze", "cohort": "eu"},
    ],
}


def test_a_plan_killed_at_any_statement_is_not_begun_and_sent_again_it_is_done_whole(
    world, sessions, config, clock, token, call
):
    world.enroll("web-1", labels={"region": "eu"})
    before = count(sessions, AuditEntry) + 1  # the token
    app = create_app(config, clock=clock)
    text, statement = token("admin", name="pipeline"), 3
    sessions.close()  # no connection is shared with a child
    while ask_and_die(app, text, statement, "/plan", PLAN):
        done = [count(sessions, model) for model in (CohortSpec, KeptAnswer, AuditEntry)]
        assert done == [1, 0, before]
        statement += 17
        sessions.close()
    assert statement > 40
    found = {cohort["name"]: cohort for cohort in call("GET", "/cohorts").json["items"]}
    assert (found["all"]["pin"], found["eu"]["frozen"]) == ("1.0.0", True)
    assert call("GET", "/agents/web-1").json["cohort"] == "eu"
    assert count(sessions, KeptAnswer) == 1
