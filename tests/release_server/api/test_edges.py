"""What holds of every route: a scope, bounded numbers, limits by who asks, no secret in logs or answers."""

from __future__ import annotations

import logging
import re

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from tests.release_server.fleet_world import World

OPEN = {
    "GET /api/v1/",  # where the description of the API is
    "GET /api/v1/openapi.json",
    "GET /api/v1/static/x",  # the library's own, and empty
    "GET /api/v1/health",
    "GET /api/v1/signin",  # whether there is a provider, which /signin says to anybody
    "POST /api/v1/enroll",  # an enrolment token is its scope, checked by the service
    "POST /api/v1/report",  # an agent's key or session
    "POST /api/v1/rotate-key",  # an agent's key
    "POST /api/v1/lease",  # an agent's key or session
    "POST /api/v1/share",  # the same
}
"""Routes without a person behind them. Who adds one here says what stands in the place of a scope."""
ANYBODY = {"GET /api/v1/whoami"}
PLANTED = "rft_planted-secret-0123456789abcdefghijklmnopqr"


def methods_of(rule):
    """Without what Flask adds by itself."""
    return rule.methods - {"OPTIONS"} - ({"HEAD"} if "GET" in rule.methods else set())


def routes(app):
    """Every route of the API as `METHOD /path`, with something in the place of each argument."""
    found = set()
    for rule in app.url_map.iter_rules():
        if rule.rule.startswith("/api/v1"):
            path = re.sub(r"<int:\w+>", "1", rule.rule)
            path = re.sub(r"<(?:\w+:)?\w+>", "x", path)
            found |= {f"{method} {path}" for method in methods_of(rule)}
    return found


def test_every_route_has_a_scope(app, client, clock):
    assert routes(app) >= OPEN
    for route in sorted(routes(app) - OPEN):
        method, path = route.split()
        clock.step(minutes=1)  # the strangers' limit is another test's
        assert client.open(path, method=method, json={}).status_code == 401, route


def test_no_reader_changes_anything_and_no_enroller_sees_anything(app, sign_in):
    reader, enroller = sign_in("reader"), sign_in("enroller")
    for route in sorted(routes(app) - OPEN - ANYBODY):
        method, path = route.split()
        path = path.removeprefix("/api/v1")
        if method != "GET":
            assert reader(method, path, json={}).status_code == 403, route
        assert enroller(method, path, json={}).status_code == 403, route


LARGE = (2**31, 2**63, 10**30)
"""The first that does not fit the column of an id, the widest column, and anything at all."""


def numbered(app):
    """(method, path with {}) of every route that takes the number of a row; agents are known by a text."""
    for rule in app.url_map.iter_rules():
        path = re.sub(r"<(?:int:)?id>", "{}", rule.rule).replace("<sha256>", "0" * 64)
        if path.startswith("/api/v1") and "{}" in path and not path.startswith("/api/v1/agents/"):
            yield from ((method, path.removeprefix("/api/v1")) for method in sorted(methods_of(rule)))


def test_no_number_in_a_path_is_too_large_to_be_refused(app, sign_in, clock):
    call, asked = sign_in("admin"), list(numbered(app))
    assert len(asked) > 20
    for method, path in asked:
        clock.step(minutes=5)  # how often tokens may be asked for is another test's
        for number in LARGE:
            answer = call(method, path.format(number), json={})
            assert answer.status_code in (400, 404, 422), f"{method} {path} {number}: {answer.text}"


def test_no_number_in_a_text_of_a_path_or_in_a_query_is_too_large_to_be_refused(app, client, sign_in, clock):
    """Where a text stands a number may, and queries have numbers of their own."""
    call, broken = sign_in("admin"), []
    document = client.get("/api/v1/openapi.json").json
    for path, operations in document["paths"].items():
        taken = operations.get("get", {"parameters": []}).get("parameters", [])
        queries = [f"?{entry['name']}=" for entry in taken if entry["in"] == "query"]
        for number in LARGE if "get" in operations else ():
            clock.step(minutes=1)
            place = re.sub(r"\{\w+\}", str(number), path.removeprefix("/api/v1"))
            for query in ("", *(f"{name}{number}" for name in queries)):
                if call("GET", place + query).status_code >= 500:
                    broken.append(place + query)
    assert broken == []


# --- limits ----------------------------------------------------------------------------------------------


def enroll_body(key):
    public = key.public_key().public_bytes_raw().hex()
    return {"schema": 1, "product": "demo", "name": "web", "public_key": public, "platform": "any"}


def test_a_host_that_enrols_in_a_loop_waits_and_its_neighbours_at_the_same_address_do_not(
    sessions, clock, client
):
    world = World(sessions, clock)
    headers = {"Authorization": f"Bearer {world.token}"}
    loud, quiet = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()

    def enroll(key):
        return client.post("/api/v1/enroll", json=enroll_body(key), headers=headers)

    answers = [enroll(loud) for _ in range(11)]
    assert [answer.status_code for answer in answers] == [200] * 10 + [429]
    assert (answers[-1].headers["Retry-After"], answers[-1].json["reason"]) == ("10", "rate-limited")
    assert enroll(quiet).status_code == 200
    clock.step(seconds=10)
    assert enroll(loud).status_code == 200


def test_guesses_are_limited_by_address_and_lock_nobody_out_who_is_known(client, sign_in, clock):
    known = sign_in("reader")

    def guess():
        return client.get("/api/v1/whoami", headers={"Authorization": "Bearer rft_guess"})

    assert {guess().status_code for _ in range(60)} == {401}
    refused = guess()
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert client.post("/api/v1/enroll", json={}).status_code == 429
    assert known("GET", "/whoami").status_code == 200
    clock.step(seconds=1)
    assert guess().status_code == 401


def test_tokens_are_made_only_so_often_by_one_person(sign_in):
    ada, bob = sign_in("admin", name="ada"), sign_in("admin", name="bob")
    assert {ada("GET", "/tokens").status_code for _ in range(60)} == {200}
    assert ada("POST", "/tokens", json={"name": "x", "role": "reader"}).status_code == 429
    assert bob("GET", "/tokens").status_code == 200


# --- secrets ---------------------------------------------------------------------------------------------


def test_no_planted_secret_is_in_a_log_or_an_answer(app, client, sign_in, caplog):
    caplog.set_level(logging.DEBUG)
    admin = sign_in("admin")
    bodies = ({"name": PLANTED * 9, "token": PLANTED}, {"labels": PLANTED}, [PLANTED], PLANTED)
    for route in sorted(routes(app)):
        method, path = route.split()
        for body in bodies:
            for answer in (
                client.open(path, method=method, json=body, headers={"Authorization": f"Bearer {PLANTED}"}),
                client.open(path, method=method, json=body, headers={"Relfleet-Signature": PLANTED}),
                admin(method, path.removeprefix("/api/v1"), json=body),
            ):
                assert answer.status_code != 500, route
                assert PLANTED not in answer.text, route
    assert PLANTED not in caplog.text


def test_a_statement_that_fails_does_not_say_with_which_values(sessions):
    statement = text("INSERT INTO tokens (id, name, hash) VALUES (1, NULL, :hash)")
    with pytest.raises(IntegrityError) as caught, sessions.write() as session:
        session.execute(statement, {"hash": PLANTED})
    assert PLANTED not in str(caught.value)
