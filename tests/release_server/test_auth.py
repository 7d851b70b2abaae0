from __future__ import annotations

from datetime import timedelta
from hashlib import sha256

import pytest
from flask import g
from sqlalchemy import select

from agent_core.errors import NotAllowedError, NotFoundError, UsageError
from release_server import auth, bearer
from release_server.api import access
from release_server.auth import Person, Role
from release_server.models import AuditEntry, Token


def check(sessions, text, now):
    with sessions.read() as session:
        return auth.check_token(session, text, now)


def stored(sessions):
    with sessions.read() as session:
        return session.scalars(select(Token)).one()


def test_a_token_speaks_for_its_name_and_role(sessions, token, clock):
    person = check(sessions, token("operator", name="grace"), clock())
    assert (person.name, person.role) == ("grace", Role.OPERATOR)


def test_only_the_hash_of_a_token_is_kept(sessions, token):
    text = token()
    row = stored(sessions)
    assert row.hash == sha256(text.encode()).hexdigest()
    assert text not in str(vars(row))


def test_tokens_have_256_random_bits():
    texts = {bearer.make(auth.PREFIX) for _ in range(100)}
    assert len(texts) == 100
    assert all(len(text.removeprefix("rft_")) == 43 for text in texts)


def test_an_unknown_token_is_refused(sessions, token, clock):
    token()
    with pytest.raises(NotAllowedError) as caught:
        check(sessions, "rft_guess", clock())
    assert caught.value.reason == "token-unknown"


def test_a_token_past_its_date_is_refused_from_that_second_on(sessions, token, clock):
    text = token(expires=timedelta(hours=1))
    clock.step(minutes=59, seconds=59)
    check(sessions, text, clock())
    clock.step(seconds=1)
    with pytest.raises(NotAllowedError) as caught:
        check(sessions, text, clock())
    assert caught.value.reason == "token-expired"


def test_a_token_revoked_a_second_ago_is_refused(sessions, token, clock):
    text = token()
    with sessions.write() as session:
        auth.revoke_token(session, clock(), stored(sessions).id, "ada")
    with pytest.raises(NotAllowedError) as caught:
        check(sessions, text, clock())
    assert caught.value.reason == "token-revoked"


def test_revoking_what_is_not_there_says_so(sessions, clock):
    with pytest.raises(NotFoundError), sessions.write() as session:
        auth.revoke_token(session, clock(), 99, "ada")


def test_a_limited_token_is_used_up_and_then_refused(sessions, token, clock):
    text = token("enroller", uses=2)
    for _ in range(2):
        person = check(sessions, text, clock())
        with sessions.write() as session:
            auth.use_up(session, person, clock())
    with pytest.raises(NotAllowedError) as caught:
        check(sessions, text, clock())
    assert caught.value.reason == "token-used-up"
    with pytest.raises(NotAllowedError), sessions.write() as session:
        auth.use_up(session, person, clock())


def test_a_token_without_limit_is_never_used_up(sessions, token, clock):
    person = check(sessions, token("enroller"), clock())
    for _ in range(3):
        with sessions.write() as session:
            auth.use_up(session, person, clock())
    assert stored(sessions).uses_left is None


@pytest.mark.parametrize("limits", [{"uses": 1}, {"product": "demo"}])
def test_only_enroller_tokens_are_limited_by_uses_and_product(token, limits):
    with pytest.raises(UsageError):
        token("operator", **limits)


def test_making_and_revoking_a_token_is_audited_without_the_secret(sessions, token, clock):
    text = token()
    with sessions.write() as session:
        auth.revoke_token(session, clock(), stored(sessions).id, "ada")
    with sessions.read() as session:
        entries = list(session.scalars(select(AuditEntry)))
    assert [entry.action for entry in entries] == ["token.create", "token.revoke"]
    assert text not in str([entry.detail for entry in entries])


READ, RELEASE, OPERATE, ENROL, ADMIN = "reader", "releaser", "operator", "enroller", "admin"


@pytest.mark.parametrize(
    ("role", "may"),
    [
        (READ, {READ}),
        (RELEASE, {READ, RELEASE}),
        (OPERATE, {READ, OPERATE}),
        (ENROL, {ENROL}),
        (ADMIN, {READ, RELEASE, OPERATE, ENROL, ADMIN}),
    ],
)
def test_what_each_role_may(role, may):
    person = Person("x", Role(role))
    assert {needed for needed in (READ, RELEASE, OPERATE, ENROL, ADMIN) if person.may(needed)} == may


# --- over HTTP -------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(app):
    """A view for operators only."""

    @app.get("/guarded")
    @access.requires("operator")
    def show():
        return {"name": g.person.name}

    client = app.test_client()
    return lambda **headers: client.get("/guarded", headers=headers)


def test_the_person_is_at_hand_in_the_view(guarded, token):
    assert guarded(Authorization=f"Bearer {token('operator', name='grace')}").json == {"name": "grace"}


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic cm9vdDpyb290", "Bearer rft_guess", "rft_guess"]
)
def test_without_a_good_token_the_answer_is_401_and_asks_for_one(guarded, header):
    answer = guarded(**({"Authorization": header} if header is not None else {}))
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"].startswith("Bearer")
    assert answer.content_type == "application/problem+json"


def test_a_token_of_the_wrong_role_is_403(guarded, token):
    answer = guarded(Authorization=f"Bearer {token('reader')}")
    assert (answer.status_code, answer.json["reason"]) == (403, "scope")


def test_the_last_use_is_noted_at_most_once_a_minute(guarded, token, clock, sessions):
    text = token("operator")
    begun = clock()
    for seconds, noted in ((0, 0), (59, 0), (1, 60), (30, 60)):
        clock.step(seconds=seconds)
        assert guarded(Authorization=f"Bearer {text}").status_code == 200
        assert stored(sessions).used_at == begun + timedelta(seconds=noted)


def test_strangers_learn_nothing_of_the_shape_of_a_request(client):
    answer = client.post("/api/v1/tokens", json={"nonsense": True})
    assert (answer.status_code, answer.json["reason"]) == (401, "not-signed-in")
