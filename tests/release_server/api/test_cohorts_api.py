"""Cohorts over HTTP."""

from __future__ import annotations

import pytest

from tests.release_server.fleet_world import World


@pytest.fixture
def world(sessions, clock):
    return World(sessions, clock)


@pytest.fixture
def call(sign_in):
    return sign_in("operator")


NEW = {"product": "demo", "name": "eu", "match": "region=eu", "release": "1.0.0"}


def test_a_cohort_is_made_changed_and_deleted(world, call):
    made = call("POST", "/cohorts", json=NEW)
    assert made.status_code == 201
    assert (made.json["base"], made.json["match"], made.json["revision"]) == ("1.0.0", "region=eu", 1)
    assert made.json["directive"]["release"] == "1.0.0"
    world.enroll("a", labels={"region": "eu"})
    changed = call("PATCH", "/cohorts/demo/eu", json={"poll_s": 5, "reason": "faster"}).json
    assert (changed["poll_s"], changed["match"], changed["reason"]) == (5, "region=eu", "faster")
    assert changed["agents"] == 1
    assert call("GET", "/cohorts/demo/eu").json == changed
    assert [row["name"] for row in call("GET", "/cohorts?product=demo").json["items"]] == ["eu"]
    assert call("DELETE", "/cohorts/demo/eu").status_code == 204
    assert call("GET", "/cohorts/demo/eu").status_code == 404
    assert call("GET", "/cohorts").json["items"] == []


def test_a_window_is_kept_until_it_is_taken_off(world, call):
    window = {"days": ["sat"], "from": "22:00", "to": "04:00", "zone": "UTC"}
    call("POST", "/cohorts", json=NEW | {"window": window})
    assert call("PATCH", "/cohorts/demo/eu", json={"priority": 3}).json["window"] == window
    assert call("PATCH", "/cohorts/demo/eu", json={"window": None}).json["window"] is None


def test_a_budget_is_kept_until_it_is_taken_off_and_one_that_is_too_small_is_refused(world, call):
    budget = {"scope": "site", "bytes_per_s": 500_000, "at_once": 4}
    made = call("POST", "/cohorts", json=NEW | {"budget": budget}).json
    assert (made["budget"], made["directive"]["budget"]) == (budget, budget)
    assert call("PATCH", "/cohorts/demo/eu", json={"priority": 3}).json["budget"] == budget
    refused = call("PATCH", "/cohorts/demo/eu", json={"budget": budget | {"bytes_per_s": 16_000}})
    assert (refused.status_code, refused.json["reason"]) == (400, "malformed")
    assert "4096 bytes a second" in refused.json["detail"]
    assert call("PATCH", "/cohorts/demo/eu", json={"budget": None}).json["budget"] is None


def test_pin_and_unpin(world, call):
    call("POST", "/cohorts", json=NEW)
    pinned = call("POST", "/cohorts/demo/eu/pin", json={"version": "0.9.0", "reason": "audit"}).json
    assert (pinned["pin"], pinned["reason"], pinned["directive"]["release"]) == ("0.9.0", "audit", "0.9.0")
    assert pinned["directive"]["rollback"] is True
    assert call("POST", "/cohorts/demo/eu/pin", json={"version": "9.9.9", "reason": ""}).status_code == 404
    assert call("POST", "/cohorts/demo/eu/unpin", json={}).json["pin"] is None


def test_freeze_and_unfreeze(world, call):
    call("POST", "/cohorts", json=NEW)
    until = "2026-05-01T18:00:00Z"
    frozen = call("POST", "/cohorts/demo/eu/freeze", json={"until": until, "reason": "fair"}).json
    assert (frozen["frozen"], frozen["frozen_until"]) == (True, until)
    assert frozen["directive"]["mode"] == "suspended"
    world.clock.step(hours=6)
    assert call("GET", "/cohorts/demo/eu").json["frozen"] is False
    assert call("POST", "/cohorts/demo/eu/freeze", json={"until": "soon"}).status_code == 400
    assert call("POST", "/cohorts/demo/eu/freeze", json={"until": until}).status_code == 422
    assert call("POST", "/cohorts/demo/eu/unfreeze", json={}).json["directive"]["mode"] == "enabled"


def test_a_preview_says_who_would_be_in_it(world, call):
    call("POST", "/cohorts", json=NEW)
    world.enroll("a", labels={"region": "eu"})
    world.enroll("b", labels={"region": "us"})
    assert call("GET", "/cohorts/demo/eu/preview").json["agents"] == ["a"]
    tried = call("GET", "/cohorts/demo/eu/preview?match=region%3Dus").json
    names = {"agents": ["b"], "joins": ["b"], "leaves": ["a"], "ready": ["b"]}
    assert names | {"cohort": "eu", "match": "region=us"} == {
        key: value for key, value in tried.items() if value and key not in ("counts", "version")
    }
    assert (tried["counts"]["ready"], tried["counts"]["held"]) == (1, 0)
    made = call("GET", "/cohorts/demo/new/preview?match=region%3Dus&priority=5").json
    assert made["joins"] == ["b"]
    assert call("GET", "/cohorts/demo/new/preview").status_code == 404
    refused = call("GET", "/cohorts/demo/eu/preview?match=%3D")
    assert (refused.status_code, refused.json["reason"]) == (422, "bad-match")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (NEW | {"name": "Not A Name"}, 422),
        (NEW | {"match": "="}, 422),
        (NEW | {"poll_s": 0}, 422),
        (NEW | {"prio": 1}, 422),
        (NEW | {"window": {"days": "mon"}}, 400),
        (NEW | {"release": "9.9.9"}, 404),
        (NEW | {"product": "none"}, 404),
        ({}, 422),
    ],
)
def test_a_cohort_that_cannot_be_made_is_refused_with_a_problem(world, call, body, status):
    answer = call("POST", "/cohorts", json=body)
    assert answer.status_code == status
    assert answer.content_type == "application/problem+json"
    assert call("GET", "/cohorts").json["items"] == []


def test_a_name_is_taken_once(world, call):
    call("POST", "/cohorts", json=NEW)
    assert call("POST", "/cohorts", json=NEW).status_code == 409


def test_readers_see_and_only_operators_change(world, call, sign_in):
    call("POST", "/cohorts", json=NEW)
    reader = sign_in("reader")
    assert reader("GET", "/cohorts/demo/eu").status_code == 200
    for method, path in (
        ("POST", "/cohorts"),
        ("PATCH", "/cohorts/demo/eu"),
        ("DELETE", "/cohorts/demo/eu"),
        ("POST", "/cohorts/demo/eu/pin"),
        ("POST", "/cohorts/demo/eu/unpin"),
        ("POST", "/cohorts/demo/eu/freeze"),
        ("POST", "/cohorts/demo/eu/unfreeze"),
    ):
        assert reader(method, path, json={}).status_code == 403
    assert sign_in("enroller")("GET", "/cohorts").status_code == 403


def test_nobody_overwrites_a_cohort_that_they_have_not_seen(world, call):
    made = call("POST", "/cohorts", json=NEW)
    seen = {"If-Match": made.headers["ETag"]}
    assert call("GET", "/cohorts/demo/eu").headers["ETag"] == seen["If-Match"]
    changed = call("PATCH", "/cohorts/demo/eu", json={"poll_s": 5}, headers=seen)
    assert (changed.status_code, changed.headers["ETag"] != seen["If-Match"]) == (200, True)
    for method, path, body in (
        ("PATCH", "", {"poll_s": 9}),
        ("POST", "/pin", {"version": "0.9.0", "reason": "audit"}),
        ("POST", "/freeze", {"reason": "fair"}),
        ("DELETE", "", None),
    ):
        refused = call(method, f"/cohorts/demo/eu{path}", json=body, headers=seen)
        assert (refused.status_code, refused.json["reason"]) == (412, "stale")
    kept = call("GET", "/cohorts/demo/eu").json
    assert (kept["poll_s"], kept["pin"], kept["frozen"]) == (5, None, False)
    anyone = {"If-Match": "*"}
    assert call("PATCH", "/cohorts/demo/eu", json={"poll_s": 9}, headers=anyone).json["poll_s"] == 9
