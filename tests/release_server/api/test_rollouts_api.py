"""Rollouts over HTTP."""

from __future__ import annotations

import pytest

from tests.release_server.fleet_world import World


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    return made


@pytest.fixture
def call(sign_in):
    return sign_in("operator")


STAGES = [{"count": 1, "soak_s": 0, "max_failed": 0}, {"share_bp": 10_000}]
NEW = {"product": "demo", "cohort": "all", "version": "1.1.0", "stages": STAGES, "reason": "spring"}


def test_a_rollout_is_started_watched_and_ends(world, call):
    host = world.enroll("web")
    made = call("POST", "/rollouts", json=NEW)
    assert made.status_code == 201
    rollout = made.json
    assert (rollout["name"], rollout["state"], rollout["stage_state"]) == ("r-1", "running", "open")
    assert (rollout["version"], rollout["base"], rollout["created_by"]) == ("1.1.0", "1.0.0", "operator")
    assert (rollout["members"], sum(rollout["counters"].values())) == (1, 0)
    assert set(rollout["counters"]) == {
        "offered",
        "downloading",
        "staged",
        "trial",
        "healthy",
        "rolled_back",
        "failed",
        "silent",
        "skipped",
    }
    assert rollout["stages"][0]["deadline_s"] == 7200
    world.finish(host, 1, "healthy")
    world.tick()
    done = call("GET", "/rollouts/1").json
    assert (done["state"], done["counters"]["healthy"], done["finished_at"]) == (
        "completed",
        1,
        "2026-05-01T12:00:00Z",
    )
    assert done["events"][0]["event"] == "started"
    assert done["events"][0]["actor"] == "operator"
    assert done["events"][-1]["numbers"]["healthy"] == 1
    (listed,) = call("GET", "/rollouts?product=demo&cohort=all").json["items"]
    assert listed == {key: value for key, value in done.items() if key != "events"}


def test_pause_resume_advance_abort_and_retry(world, call):
    world.enroll_many(3)
    call("POST", "/rollouts", json=NEW)
    assert call("POST", "/rollouts/1/pause", json={"reason": "lunch"}).json["state"] == "paused"
    assert call("POST", "/rollouts/1/resume", json={}).json["state"] == "running"
    assert call("POST", "/rollouts/1/retry", json={}).json["state"] == "running"
    assert call("POST", "/rollouts/1/advance", json={}).json["stage"] == 1
    assert call("POST", "/rollouts/1/abort", json={"rollback": True}).json["state"] == "rolled_back"
    refused = call("POST", "/rollouts/1/resume", json={})
    assert (refused.status_code, refused.json["reason"]) == (409, "conflict")
    assert "rolled back" in refused.json["detail"]


def test_a_busy_a_pinned_and_a_frozen_cohort_refuse_a_rollout_with_clear_words(world, call):
    call("POST", "/rollouts", json=NEW)
    busy = call("POST", "/rollouts", json=NEW | {"version": "1.2.0"})
    assert (busy.status_code, busy.json["reason"]) == (409, "busy")
    assert "r-1" in busy.json["title"]
    taken = call("POST", "/rollouts", json=NEW | {"version": "1.2.0", "supersede": True})
    assert taken.status_code == 201
    assert call("GET", "/rollouts/1").json["state"] == "superseded"
    call("POST", "/rollouts/2/abort", json={})
    call("POST", "/cohorts/demo/all/freeze", json={"reason": "fair"})
    assert call("POST", "/rollouts", json=NEW).json["reason"] == "frozen"
    call("POST", "/cohorts/demo/all/pin", json={"version": "1.0.0", "reason": "audit"})
    pinned = call("POST", "/rollouts", json=NEW)
    assert (pinned.status_code, pinned.json["reason"], pinned.json["detail"]) == (409, "pinned", "audit")


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"version": "9.9.9"}, 404),
        ({"cohort": "none"}, 404),
        ({"version": "1.0.0"}, 409),
        ({"stages": []}, 422),
        ({"stages": [{}]}, 400),
        ({"stages": [{"count": 1, "share_bp": 1}]}, 400),
        ({"stages": [{"count": 5}, {"count": 1}]}, 422),
        ({"stages": [{"count": 1, "max_fail": 1}]}, 422),
        ({"stages": [{"share_bp": 10_001}]}, 422),
        ({"version": "../etc"}, 422),
    ],
)
def test_a_rollout_that_cannot_be_meant_is_refused_and_leaves_nothing(world, call, change, status):
    answer = call("POST", "/rollouts", json=NEW | change)
    assert answer.status_code == status
    assert answer.content_type == "application/problem+json"
    assert call("GET", "/rollouts").json["items"] == []


def test_a_rollout_that_does_not_exist_is_not_found(world, call):
    assert call("GET", "/rollouts/7").status_code == 404
    assert call("POST", "/rollouts/7/pause", json={}).status_code == 404


@pytest.mark.parametrize("role", ["reader", "releaser", "enroller"])
def test_only_operators_start_and_steer_rollouts(world, call, sign_in, role):
    call("POST", "/rollouts", json=NEW)
    other = sign_in(role)
    for path in ("", "/1/pause", "/1/resume", "/1/advance", "/1/abort", "/1/retry"):
        assert other("POST", f"/rollouts{path}", json={}).status_code == 403
    assert call("GET", "/rollouts/1").json["state"] == "running"


def test_nobody_sees_rollouts_without_a_token(world, client):
    assert client.get("/api/v1/rollouts").status_code == 401


def test_nobody_steers_a_rollout_that_they_have_not_seen(world, call):
    world.enroll_many(2)
    seen = {"If-Match": call("POST", "/rollouts", json=NEW).headers["ETag"]}
    assert call("GET", "/rollouts/1").headers["ETag"] == seen["If-Match"]
    world.finish(world.offered("1.1.0")[0], 1, "rolled_back", "unhealthy")
    world.tick()  # it halts by itself
    refused = call("POST", "/rollouts/1/abort", json={"reason": "slow"}, headers=seen)
    assert (refused.status_code, refused.json["reason"]) == (412, "stale")
    shown = call("GET", "/rollouts/1")
    assert (shown.json["state"], shown.headers["ETag"] != seen["If-Match"]) == ("paused", True)
    again = {"If-Match": shown.headers["ETag"]}
    assert call("POST", "/rollouts/1/abort", json={"reason": "bad"}, headers=again).json["state"] == "aborted"
