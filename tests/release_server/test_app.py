from __future__ import annotations

import logging

import pytest
from sqlalchemy.exc import OperationalError

from agent_core import errors
from release_server.app import create_app
from release_server.config import Config

PROBLEM = "application/problem+json"


@pytest.fixture
def failing(app):
    """A view that raises what it is told to; its answer."""
    told = []

    @app.get("/failing")
    def fail():
        raise told[0]

    def call(error):
        told[:] = [error]
        return app.test_client().get("/failing")

    return call


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (errors.MalformedError("x"), 400),
        (errors.UsageError("x"), 422),
        (errors.SettingsError("x"), 422),
        (errors.TrustError("x"), 422),
        (errors.NotAllowedError("x"), 403),
        (errors.NotAllowedError("x", reason="token-expired"), 401),
        (errors.NotFoundError("x"), 404),
        (errors.ConflictError("x"), 409),
        (errors.UnreachableError("x"), 503),
        (errors.DiskError("x"), 507),
        (errors.RelfleetError("x"), 500),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_has_its_status_and_is_a_problem(failing, error, status):
    answer = failing(error)
    assert (answer.status_code, answer.content_type) == (status, PROBLEM)
    assert answer.json["type"] == f"urn:relfleet:problem:{error.reason}"
    assert answer.json["title"] == "x"


def test_a_problem_says_what_why_and_what_next(failing):
    answer = failing(errors.ConflictError("the thing", why="it moved", then="look again", reason="moved"))
    assert answer.json == {
        "type": "urn:relfleet:problem:moved",
        "status": 409,
        "title": "the thing",
        "detail": "it moved",
        "reason": "moved",
        "then": "look again",
    }


def test_overload_says_when_to_come_back(failing):
    assert failing(errors.UnreachableError("x", retry_after_s=7)).headers["Retry-After"] == "7"
    assert int(failing(errors.UnreachableError("x")).headers["Retry-After"]) > 0


def test_a_mistake_of_ours_shows_nothing_of_its_inside(failing, caplog):
    with caplog.at_level(logging.ERROR):
        answer = failing(ZeroDivisionError("the secret"))
    assert (answer.status_code, answer.json["reason"]) == (500, "internal")
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text
    assert "the secret" in caplog.text


def test_a_busy_database_is_503_and_worth_another_try(failing):
    answer = failing(OperationalError("UPDATE x", {}, Exception("database is locked")))
    assert (answer.status_code, answer.json["reason"]) == (503, "overloaded")
    assert "Retry-After" in answer.headers
    assert "UPDATE" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/v1/none", 404),
        ("GET", "/none", 404),
        ("DELETE", "/api/v1/whoami", 405),
        ("GET", "/metadata/none.json", 404),
        ("POST", "/metadata/timestamp.json", 405),
    ],
)
def test_what_is_not_there_is_a_problem_too(client, method, path, status):
    answer = client.open(path, method=method)
    assert (answer.status_code, answer.content_type) == (status, PROBLEM)


def test_a_body_over_its_limit_is_413(sign_in, config):
    body = b"{" + b" " * config.body_limit
    answer = sign_in("admin")("POST", "/products", data=body, content_type="application/json")
    assert (answer.status_code, answer.json["reason"]) == (413, "too-large")


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, "name"),
        ({"name": "UPPER"}, "name"),
        ({"name": "demo", "colour": "red"}, "colour"),
        (None, "body"),
    ],
    ids=["missing", "form", "unknown", "not json"],
)
def test_a_body_of_the_wrong_shape_is_422_and_names_the_place(sign_in, body, place):
    answer = sign_in("admin")("POST", "/products", json=body)
    assert (answer.status_code, answer.content_type) == (422, PROBLEM)
    assert answer.json["reason"] == "malformed"
    assert place in answer.json["title"]


def test_answers_carry_headers_that_keep_browsers_careful(client):
    headers = client.get("/api/v1/health").headers
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Cache-Control"] == "no-store"
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
    assert "Server" not in headers


def test_the_openapi_description_lists_every_route(app, client):
    answer = client.get("/api/v1/openapi.json")
    described = {
        (path.replace("{", "<").replace("}", ">"), method.upper())
        for path, methods in answer.json["paths"].items()
        for method in methods
    }
    assert answer.json["openapi"].startswith("3.1")
    routes = {
        (str(rule).replace("<int:", "<"), method)
        for rule in app.url_map.iter_rules()
        for method in rule.methods - {"HEAD", "OPTIONS"}
        if str(rule).startswith("/api/v1/") and rule.endpoint.split(".")[0] != "openapi"
    }
    assert routes <= described


def test_forwarded_headers_are_believed_from_trusted_proxies_only(data, clock):
    seen = {}
    for trusted in (0, 1):
        config = Config.load(data, environ={"RELFLEET_SERVER_TRUSTED_PROXIES": str(trusted)})
        app = create_app(config, clock=clock)

        @app.get("/address")
        def show():
            from flask import request

            return str(request.remote_addr)

        answer = app.test_client().get("/address", headers={"X-Forwarded-For": "203.0.113.9"})
        seen[trusted] = answer.text
        app.extensions["relfleet"].sessions.close()
    assert seen == {0: "127.0.0.1", 1: "203.0.113.9"}


# --- people, tokens, audit -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["reader", "releaser", "operator", "enroller", "admin"])
def test_whoami_tells_everyone_who_they_are(sign_in, role):
    told = {"name": "grace", "role": role, "product": None, "expires_at": None}
    assert sign_in(role, name="grace")("GET", "/whoami").json == told


def test_a_token_is_shown_once_and_works_until_it_is_revoked(sign_in, client):
    admin = sign_in("admin")
    made = admin("POST", "/tokens", json={"name": "ci", "role": "releaser", "expires_s": 60})
    assert made.status_code == 201
    headers = {"Authorization": f"Bearer {made.json['token']}"}
    assert client.get("/api/v1/whoami", headers=headers).json == {
        "name": "ci",
        "role": "releaser",
        "product": None,
        "expires_at": "2026-05-01T12:01:00Z",
    }
    listed = admin("GET", "/tokens")
    assert [entry["name"] for entry in listed.json["items"]] == ["admin", "ci"]
    assert made.json["token"] not in listed.text
    assert admin("DELETE", f"/tokens/{made.json['id']}").status_code == 204
    assert client.get("/api/v1/whoami", headers=headers).status_code == 401


def test_only_admins_make_tokens(sign_in):
    for role in ("reader", "releaser", "operator", "enroller"):
        answer = sign_in(role)("POST", "/tokens", json={"name": "x", "role": "admin"})
        assert answer.status_code == 403


def test_the_audit_log_is_read_newest_first_and_filtered(sign_in, clock):
    call = sign_in("admin", name="ada")
    call("POST", "/products", json={"name": "one"})
    clock.step(hours=1)
    call("POST", "/products", json={"name": "two"})
    subjects = lambda query: [  # noqa: E731
        entry["subject"] for entry in call("GET", f"/audit{query}").json["items"]
    ]
    assert subjects("?actor=ada") == ["two", "one"]
    assert subjects("?limit=1") == ["two"]
    assert subjects("?since=2026-05-01T12:30:00Z") == ["two"]
    assert call("GET", "/audit?since=yesterday").status_code == 400
    assert call("GET", "/audit?limit=0").status_code == 422
