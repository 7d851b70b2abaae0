"""A thief has the whole database, and tries every value of it as a token, a session, a signature or a key."""

from __future__ import annotations

import json
import string

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import MetaData, select

from release_server import auth
from release_server.auth import Role
from tests.release_server.fleet_world import World

HEADERS = ("Relfleet-Agent", "Relfleet-Counter", "Relfleet-Signature")


@pytest.fixture
def loot(sessions, clock, token):
    """A fleet with tokens of every role, agents and sessions; what the thief reads of it."""
    world = World(sessions, clock)
    world.cohort("all")
    for role in Role:
        token(str(role))
    hosts = [world.enroll(name) for name in ("web-1", "web-2")]
    return hosts, sorted(everything(sessions))


def everything(sessions):
    """Every text in every column of every table, and what is in JSON."""
    tables = MetaData()
    tables.reflect(sessions.engine)
    with sessions.engine.connect() as connection:
        for table in tables.sorted_tables:
            for row in connection.execute(select(table)):
                for value in row:
                    yield from texts(value)


def texts(value):
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from (key, *texts(inner))
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner)
    elif value is not None:
        text = value.hex() if isinstance(value, bytes) else str(value)
        if text and text.isascii() and text.isprintable():
            yield text


def test_no_secret_of_the_living_lies_in_it(loot):
    hosts, found = loot
    for host in hosts:
        assert host.session not in found
        assert host.key.private_bytes_raw().hex() not in "\n".join(found)
    assert not any(text.startswith(auth.PREFIX) for text in found)


def guesses(found):
    """Each text as a token, from an address of its own: the limit on guesses must not be what refuses it."""
    for number, text in enumerate(sorted(set(found))):
        address = f"10.0.{number // 250}.{number % 250 + 1}"
        yield text, {"headers": {"Authorization": f"Bearer {text}"}, "environ_base": {"REMOTE_ADDR": address}}


def test_nothing_in_it_speaks_for_a_person(loot, client):
    for text, guess in guesses(loot[1]):
        answer = client.get("/api/v1/whoami", **guess)
        assert answer.status_code == 401, text


def test_nothing_in_it_enrols_an_agent(loot, client):
    eve = {"schema": 1, "product": "demo", "name": "eve", "platform": "any"}
    for number, (text, guess) in enumerate(guesses(loot[1])):
        body = {**eve, "public_key": f"{number:064x}"}  # one key may only try so often
        answer = client.post("/api/v1/enroll", json=body, **guess)
        assert answer.status_code == 401, text


def test_nothing_in_it_is_an_agents_session(loot, client):
    (host, _), found = loot
    for text in set(found):
        headers = {"Authorization": f"Bearer {text}", "Relfleet-Agent": host.id}
        answer = client.post("/api/v1/report", json=host.report().to_json(), headers=headers)
        assert answer.status_code == 401, text


def test_nothing_in_it_signs_for_an_agent(loot, client):
    (host, _), found = loot
    report = host.report()
    body = json.dumps(report.to_json()).encode()
    tried = 0
    for text in set(found):
        if len(text) != 64 or set(text) - set(string.hexdigits):
            continue
        tried += 1
        proof, _ = host.sign(
            report, counter=10**9 + tried, key=Ed25519PrivateKey.from_private_bytes(bytes.fromhex(text))
        )
        for signature in (proof.signature, text * 2):
            headers = dict(zip(HEADERS, (host.id, str(proof.counter), signature), strict=True))
            answer = client.post("/api/v1/report", data=body, headers=headers)
            assert (answer.status_code, answer.json["reason"]) == (401, "bad-signature")
    assert tried >= 10, "hashes and public keys were tried"


def test_what_the_thief_tries_does_not_shut_the_agents_out(loot, client):
    hosts, _ = loot
    for host in hosts:
        report = host.report()
        proof, body = host.sign(report, counter=100)
        headers = dict(zip(HEADERS, (host.id, "100", proof.signature), strict=True))
        assert client.post("/api/v1/report", data=body, headers=headers).status_code == 200
