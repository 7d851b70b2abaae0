"""A person's token at two replicas of one database: what one of them is told holds at the other at once."""

from __future__ import annotations

import pytest
from sqlalchemy import select

from release_server.app import create_app
from release_server.auth import Role
from release_server.models import Token


@pytest.fixture
def ask(config, clock, token):
    """`ask(replica, token, path)`, with two applications that share nothing but the data directory."""
    apps = [create_app(config, clock=clock) for _ in range(2)]
    clients = [app.test_client() for app in apps]

    def call(replica, text, path="/whoami", method="GET", **rest):
        headers = {"Authorization": f"Bearer {text}"}
        return clients[replica].open(f"/api/v1{path}", method=method, headers=headers, **rest)

    yield call
    for app in apps:
        app.extensions["relfleet"].sessions.close()


def test_a_token_that_one_replica_revokes_is_refused_by_the_other_at_once(ask, token):
    admin, text = token("admin", name="root"), token("reader", name="ada")
    assert [ask(replica, text).status_code for replica in (0, 1)] == [200, 200]
    number = next(row["id"] for row in ask(0, admin, "/tokens").json["items"] if row["name"] == "ada")
    assert ask(0, admin, f"/tokens/{number}", "DELETE").status_code == 204
    for replica in (0, 1):
        answer = ask(replica, text)
        assert (answer.status_code, answer.json["reason"]) == (401, "token-revoked")


def test_a_token_expires_at_every_replica_at_its_second(ask, token, clock):
    admin = token("admin", name="root")
    made = ask(0, admin, "/tokens", "POST", json={"name": "ada", "role": "reader", "expires_s": 60})
    text = made.json["token"]
    clock.step(seconds=59)
    assert [ask(replica, text).status_code for replica in (0, 1)] == [200, 200]
    clock.step(seconds=1)
    for replica in (0, 1):
        answer = ask(replica, text)
        assert (answer.status_code, answer.json["reason"]) == (401, "token-expired")


def test_the_last_use_is_noted_wherever_it_was_and_once_a_minute(ask, token, clock, sessions):
    text = token("reader", name="ada")

    def used_at():
        with sessions.read() as session:
            return session.scalar(select(Token.used_at).where(Token.name == "ada"))

    begun = clock()
    ask(0, text)
    assert used_at() == begun
    clock.step(seconds=59)
    ask(1, text)
    assert used_at() == begun
    clock.step(seconds=1)
    ask(1, text)
    assert used_at() == clock()


@pytest.mark.parametrize("role", list(Role))
def test_a_role_is_the_same_at_every_replica(ask, token, role):
    text = token(str(role), name="ada")
    answers = [
        [ask(replica, text, path).status_code for path in ("/tokens", "/agents")] for replica in (0, 1)
    ]
    assert answers[0] == answers[1]
    assert answers[0][0] == (200 if role is Role.ADMIN else 403)
    assert answers[0][1] == (403 if role is Role.ENROLLER else 200)


def test_tokens_are_limited_by_the_person_whichever_token_and_replica(ask, token):
    first, second = token("admin", name="ada"), token("admin", name="ada/laptop")
    codes = [ask(turn % 2, (first, second)[turn // 2 % 2], "/tokens").status_code for turn in range(62)]
    assert codes == [200] * 60 + [429] * 2
    assert ask(0, token("admin", name="bo"), "/tokens").status_code == 200
