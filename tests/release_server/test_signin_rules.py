"""Who gets in as what, by rules and claims alone; and settings that would let in the wrong one."""

from __future__ import annotations

import pytest

from agent_core.errors import NotAllowedError, SettingsError
from release_server.signin.flow import Attempt
from release_server.signin.rules import Rule, admit
from release_server.signin.settings import origin_of
from tests.release_server.signin_world import configured, write_secret

ADA = {"sub": "u-1", "email": "ada@example.org", "email_verified": True, "groups": ["ops", "all"]}
RULES = [
    Rule.read(text) for text in ("operator: groups=ops", "admin: email=Ada@Example.org", "reader: org=x y")
]


def role_of(claims, rules=RULES):
    return admit(ADA | claims, rules, "email").rule.role


def test_the_first_rule_that_fits_counts():
    assert role_of({}) == "operator"
    assert role_of({"groups": ["all"]}) == "admin"
    assert role_of({}, RULES[1:]) == "admin"
    assert role_of({"groups": "ops"}) == "operator"
    assert role_of({"org": "x y"}, RULES[2:]) == "reader"


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"groups": ["opsx"], "email": "x@example.org"}, "signin-unmapped"),
        ({"groups": "ops,all", "email": "x@example.org"}, "signin-unmapped"),
        ({"groups": {"ops": True}, "email": "x@example.org"}, "signin-unmapped"),
        ({"groups": None, "email": "x@example.org"}, "signin-unmapped"),
        ({"groups": [["ops"]], "email": "x@example.org"}, "signin-unmapped"),
        ({"email_verified": False}, "signin-name"),
        ({"email_verified": "true"}, "signin-name"),
        ({"email_verified": None}, "signin-name"),
        ({"email": None}, "signin-name"),
        ({"email": ["ada@example.org"]}, "signin-name"),
        ({"email": ""}, "signin-name"),
        ({"email": " ada@example.org"}, "signin-name"),
        ({"email": "ada@example.org/ci"}, "signin-name"),
        ({"email": "ada@example.org\n"}, "signin-name"),
        ({"email": "ada\u202e@example.org"}, "signin-name"),
        ({"email": "a" * 129}, "signin-name"),
    ],
    ids=repr,
)
def test_claims_that_are_nearly_right_let_nobody_in(claims, reason):
    with pytest.raises(NotAllowedError) as caught:
        role_of(claims)
    assert caught.value.reason == reason


def test_an_address_that_is_not_verified_fits_no_rule():
    rules = [Rule.read("admin: email=ada@example.org")]
    with pytest.raises(NotAllowedError) as caught:
        admit(ADA | {"email_verified": False}, rules, "sub")
    assert caught.value.reason == "signin-unmapped"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "admin",
        "admin: email",
        "admin: =x",
        "admin: email=",
        "king: email=x",
        "enroller: groups=x",
        "admin email=x",
    ],
)
def test_a_rule_of_another_form_is_refused(text):
    with pytest.raises(SettingsError):
        Rule.read(text)


def test_all_of_an_attempt_follows_from_its_secret_and_nothing_gives_that_back():
    one, other = Attempt.begin(), Attempt.begin()
    made = [one.state, one.nonce, one.verifier, one.hash]
    assert made == [Attempt(one.secret).state, Attempt(one.secret).nonce, one.verifier, one.hash]
    assert len({*made, one.secret, other.state, other.nonce, other.verifier}) == 8
    assert one.is_answered_by(one.state)
    assert not one.is_answered_by(other.state)
    assert not one.is_answered_by("ä")


@pytest.mark.parametrize(
    ("url", "origin"),
    [
        ("https://Fleet.example.org/below", "https://fleet.example.org"),
        ("https://fleet.example.org:443", "https://fleet.example.org"),
        ("http://127.0.0.1:8470", "http://127.0.0.1:8470"),
        ("http://[::1]:80/x", "http://[::1]"),
    ],
)
def test_an_origin_is_written_as_browsers_do(url, origin):
    assert origin_of(url) == origin


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"issuer": "http://id.example.org"}, "oidc.issuer"),
        ({"issuer": "ftp://id.example.org"}, "oidc.issuer"),
        ({"client_id": ""}, "oidc.client_id"),
        ({"roles": []}, "oidc.roles"),
        ({"roles": ["enroller: groups=x"]}, "oidc.roles"),
        ({"scopes": ["email"]}, "oidc.scopes"),
        ({"name_claim": ""}, "oidc.name_claim"),
    ],
    ids=str,
)
def test_settings_that_let_in_the_wrong_one_or_nobody_are_refused(data, changed, named):
    with pytest.raises(SettingsError, match=named):
        configured(data, **{"issuer": "https://id.example.org"} | changed)


def test_a_server_that_is_reached_without_tls_from_elsewhere_signs_nobody_in(data):
    from release_server.config import Config

    configured(data, "https://id.example.org")
    with pytest.raises(SettingsError, match=r"server\.url"):
        Config.load(data, environ={"RELFLEET_SERVER_URL": "http://fleet.example.org"})
    assert Config.load(data, environ={"RELFLEET_SERVER_URL": "http://localhost:8470"}).oidc


def test_a_secret_that_others_can_open_is_refused(data):
    oidc = configured(data, "https://id.example.org").oidc
    file = write_secret(data)
    oidc.check_files()
    for spoil in (lambda: file.chmod(0o640), lambda: file.write_text("two\nlines"), file.unlink):
        write_secret(data)
        spoil()
        with pytest.raises(SettingsError):
            oidc.check_files()


def test_authorities_that_cannot_be_read_are_refused(data):
    (data / "ca.pem").write_text("nothing")
    oidc = configured(data, "https://id.example.org", ca_file="ca.pem").oidc
    with pytest.raises(SettingsError, match=r"oidc\.ca_file"):
        oidc.check_files()
