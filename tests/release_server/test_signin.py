"""People sign in at the page, by a real provider over HTTP; and all that must be refused."""

from __future__ import annotations

import logging
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from urllib.parse import urlencode, urlsplit

import pytest
import requests
from sqlalchemy import select

from agent_core.clock import iso
from release_server.api import access
from release_server.app import create_app
from release_server.models import AuditEntry, PersonSession
from release_server.signin import provider as provider_module
from tests import openid_provider
from tests.certificates import Authority
from tests.http_origin import Proxy
from tests.openid_provider import (
    Provider,
    by_secret,
    changed,
    dripping,
    ec,
    endless,
    rsa,
    signed_with,
    unsigned,
)
from tests.release_server.api.test_edges import OPEN, routes
from tests.release_server.conftest import Clock
from tests.release_server.fleet_world import World
from tests.release_server.operator_desk import desk
from tests.release_server.signin_world import SITE, Browser, a_database, configured, query_of
from tests.release_server.test_serve import wait_for

ATTEMPT = "__Host-relfleet-attempt"
UNUSED = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def place(tmp_path_factory, template):
    """One server and provider for all tests of this file: two days pass between any two of them."""
    data = tmp_path_factory.mktemp("signin") / "server"
    clock = Clock()
    provider = Provider(redirect_uri=f"{SITE}/signin/callback", clock=clock)
    with a_database(data, template):
        app = create_app(configured(data, provider.issuer), clock=clock)
        yield data, clock, provider, app
        app.extensions["relfleet"].sessions.close()
    provider.close()


@pytest.fixture
def clock(place):
    place[1].step(days=2)  # sessions, limits, and what was fetched of the provider are past
    return place[1]


@pytest.fixture
def provider(place, clock):
    place[2].begin_anew()
    return place[2]


@pytest.fixture
def app(place, provider):
    return place[3]


@pytest.fixture
def sessions(app):
    return app.extensions["relfleet"].sessions


@pytest.fixture
def browser(app):
    return Browser(app)


@pytest.fixture
def make_app(place, clock):
    """Another application over the same database, with other settings."""
    made = []

    def make(issuer, **changed):
        made.append(create_app(configured(place[0], issuer, **changed), clock=clock))
        return made[-1]

    yield make
    for app in made:
        app.extensions["relfleet"].sessions.close()


@pytest.fixture
def deeds(sessions, clock):
    """What the audit log says of sessions since the test began."""
    begun = clock()

    def read(*fields):
        with sessions.read() as session:
            return [
                (entry.actor, entry.action, entry.subject, *(entry.detail.get(name) for name in fields))
                for entry in session.scalars(select(AuditEntry).order_by(AuditEntry.id))
                if entry.action.startswith("session.") and entry.at >= begun
            ]

    return read


def reason_of(answer):
    return re.search(r"<code>(.*)</code>", answer.text)[1]


def assert_nobody(browser):
    answer = browser.who()
    assert (answer.status_code, answer.json["reason"]) == (401, "not-signed-in")


# --- in and out ------------------------------------------------------------------------------------------


def test_a_person_signs_in_sees_the_fleet_and_signs_out(browser, deeds):
    answer = browser.sign_in()
    who = browser.who().json
    assert (who["name"], who["role"], who["product"]) == ("ada@example.org", "operator", None)
    assert browser.ask("GET", "/api/v1/agents").status_code == 200
    cookies = {line.split("=")[0]: line for line in answer.headers.getlist("Set-Cookie")}
    for wanted in ("Secure", "HttpOnly", "SameSite=Strict", "Path=/"):
        assert wanted in cookies[access.COOKIE]
    assert "Domain" not in cookies[access.COOKIE]
    assert "Max-Age=0" in cookies[ATTEMPT]
    assert browser.ask("POST", "/signout").status_code == 204
    assert_nobody(browser)
    assert deeds("role") == [
        ("ada@example.org", "session.begin", "ada@example.org", "operator"),
        ("ada@example.org", "session.end", "ada@example.org", None),
    ]


def test_the_provider_is_asked_for_this_attempt_alone(browser):
    sent = browser.ask("GET", "/signin")
    asked = query_of(sent.headers["Location"])
    assert asked["response_type"] == "code"
    assert asked["redirect_uri"] == f"{SITE}/signin/callback"
    assert asked["code_challenge_method"] == "S256"
    again = query_of(browser.ask("GET", "/signin").headers["Location"])
    for name in ("state", "nonce", "code_challenge"):
        assert len(asked[name]) == 43
        assert asked[name] != again[name]
    (cookie,) = sent.headers.getlist("Set-Cookie")
    for wanted in ("Secure", "HttpOnly", "SameSite=Lax", "Path=/", "Max-Age=600"):
        assert wanted in cookie


def test_each_sign_in_has_a_session_of_its_own(browser):
    secrets = set()
    for _ in range(2):
        browser.sign_in()
        secrets.add(browser.client.get_cookie(access.COOKIE, domain="fleet.example.org").value)
    assert len(secrets) == 2
    assert all(len(secret.removeprefix("rfs_")) == 43 for secret in secrets)


@pytest.mark.parametrize("key", [ec("ec-1"), rsa("pss-1", "PS256")], ids=["ES256", "PS256"])
def test_keys_of_each_kind_that_is_taken_are_believed(browser, provider, key):
    provider.key, provider.shown = key, [key, rsa("other")]
    browser.sign_in()


def test_a_key_that_the_provider_changed_is_fetched_once_and_not_at_will(browser, provider, clock):
    browser.sign_in()
    provider.key = rsa("rsa-2")
    provider.shown = [provider.key]
    clock.step(seconds=31)
    browser.sign_in()
    assert provider.asked.count("/keys") == 2
    provider.spoil = signed_with(rsa("made-up"), "RS256")
    for _ in range(3):
        assert reason_of(browser.come_back(browser.go())) == "signin-key"
    assert provider.asked.count("/keys") == 2
    assert provider.asked.count("/.well-known/openid-configuration") == 1


def test_the_secret_goes_in_the_body_where_the_provider_wants_it_there(browser, provider):
    provider.auth_method = "client_secret_post"
    browser.sign_in()


# --- refused by what came back ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (unsigned, "signin-token"),
        (by_secret, "signin-token"),
        (signed_with(rsa("rsa-1"), "RS256"), "signin-signature"),
        (signed_with(rsa("unknown"), "RS256"), "signin-key"),
        (changed(nonce="other"), "signin-nonce"),
        (changed(nonce=None), "signin-nonce"),
        (changed(aud="other"), "signin-audience"),
        (changed(aud=["relfleet", "other"]), "signin-audience"),
        (changed(aud=["relfleet", "other"], azp="relfleet"), "signin-audience"),
        (changed(aud="other", azp="relfleet"), "signin-audience"),
        (changed(azp="other"), "signin-audience"),
        (changed(iss="https://evil.example"), "signin-issuer"),
        (changed(exp=1), "signin-expired"),
        (changed(iat=1), "signin-expired"),
        (changed(sub=""), "signin-token"),
        (changed(sub="u\0"), "signin-token"),
        (changed(sub=["u-1"]), "signin-token"),
        (signed_with(ec("rsa-1"), "ES256"), "signin-token"),
        (lambda _: "no.token.at-all", "signin-token"),
    ],
    ids=[
        "alg none",
        "HS256 with the client's secret",
        "another key by the same name",
        "unknown key",
        "nonce of another attempt",
        "no nonce",
        "for another client",
        "for others too",
        "for others too, given to us",
        "for another, given to us",
        "given to another",
        "by another issuer",
        "expired",
        "of long ago",
        "of nobody",
        "of a name that no database holds",
        "of many",
        "another algorithm than the key's",
        "garbage",
    ],
)
def test_an_id_token_that_proves_less_lets_nobody_in(browser, provider, deeds, spoil, reason):
    provider.spoil = spoil
    answer = browser.come_back(browser.go())
    assert (answer.status_code, reason_of(answer)) == (403, reason)
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert_nobody(browser)
    assert deeds() == []


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda asked: asked | {"state": "x" * 43}, "signin-not-begun"),
        (lambda asked: {"code": asked["code"]}, "signin-not-begun"),
        (lambda asked: {"state": asked["state"]}, "signin-code"),
        (lambda asked: asked | {"code": "guessed"}, "signin-code"),
        (lambda asked: asked | {"iss": "https://evil.example"}, "signin-issuer"),
        (lambda asked: {"state": asked["state"], "error": "access_denied"}, "signin-denied"),
        (lambda asked: {"state": asked["state"], "error": "<script>"}, "signin-denied"),
    ],
    ids=["wrong state", "no state", "no code", "wrong code", "wrong iss", "denied", "markup"],
)
def test_an_answer_that_is_none_to_this_attempt_lets_nobody_in(browser, change, reason):
    back = browser.go()
    answer = browser.come_back(f"{SITE}/signin/callback?{urlencode(change(query_of(back)))}")
    assert (answer.status_code, reason_of(answer)) == (403, reason)
    assert "<script>" not in answer.text
    assert_nobody(browser)


def test_an_answer_is_worth_nothing_in_another_browser_or_a_second_time(app, browser, provider):
    back = browser.go()
    thief = Browser(app)
    assert reason_of(thief.come_back(back)) == "signin-not-begun"
    attempt = browser.client.get_cookie(ATTEMPT, domain="fleet.example.org").value
    browser.come_back(back)
    assert reason_of(browser.come_back(back)) == "signin-not-begun"
    thief.client.set_cookie(ATTEMPT, attempt, domain="fleet.example.org")
    assert reason_of(thief.come_back(back)) == "signin-code"


def test_one_sign_in_makes_one_session_even_where_the_provider_takes_codes_twice(app, browser, provider):
    provider.codes_last = True
    back = browser.go()
    attempt = browser.client.get_cookie(ATTEMPT, domain="fleet.example.org").value
    browser.come_back(back)
    thief = Browser(app)
    thief.client.set_cookie(ATTEMPT, attempt, domain="fleet.example.org")
    assert reason_of(thief.come_back(back)) == "signin-replayed"
    assert_nobody(thief)


def test_a_code_is_worth_nothing_without_the_attempt_that_asked_for_it(app, browser):
    """PKCE: eve saw the code of ada's attempt, and puts it into an answer to one of her own."""
    stolen = query_of(browser.go())["code"]
    eve = Browser(app)
    own = query_of(eve.go())
    answer = eve.come_back(f"{SITE}/signin/callback?{urlencode({'code': stolen, 'state': own['state']})}")
    assert reason_of(answer) == "signin-code"


def test_nobody_is_sent_anywhere_but_to_the_page(browser):
    for path in ("/signin?next=https://evil.example", "/signin?redirect_uri=https://evil.example/x"):
        sent = browser.ask("GET", path, headers={"Host": "evil.example", "X-Forwarded-Host": "evil.example"})
        assert "evil" not in str(sent.headers)
    back = browser.go()
    answer = browser.come_back(f"{back}&next=https://evil.example")
    assert answer.headers["Location"] == f"{SITE}/"


# --- who may ---------------------------------------------------------------------------------------------


def test_whom_no_rule_names_is_known_and_turned_away(browser, provider, deeds):
    provider.person = openid_provider.EVE
    answer = browser.come_back(browser.go())
    assert (answer.status_code, reason_of(answer)) == (403, "signin-unmapped")
    assert_nobody(browser)
    assert deeds("reason") == [("server", "session.refuse", "u-9", "signin-unmapped")]


def test_who_is_turned_away_in_a_loop_waits_and_keeps_no_colleague_out(app, browser, provider, deeds):
    provider.person = openid_provider.EVE
    answers = [browser.come_back(browser.go()) for _ in range(11)]
    assert [answer.status_code for answer in answers] == [403] * 10 + [429]
    assert reason_of(answers[-1]) == "rate-limited"
    assert answers[-1].headers["Retry-After"] == "10"
    assert len(deeds()) == 10
    provider.person = openid_provider.ADA
    Browser(app).sign_in()


def test_guesses_are_limited_before_the_provider_is_asked(app, browser, provider, token):
    """Whoever begins properly and guesses codes would have the provider asked each time."""
    guess = f"{SITE}/signin/callback?{urlencode({'state': query_of(browser.go())['state'], 'code': 'guess'})}"
    assert {reason_of(browser.come_back(guess)) for _ in range(60)} == {"signin-code"}
    assert reason_of(browser.come_back(guess)) == "rate-limited"
    assert provider.asked.count("/token") == 60
    headers = {"Authorization": f"Bearer {token('reader')}"}
    assert browser.ask("GET", "/api/v1/whoami", headers=headers).status_code == 200


def test_a_sign_in_that_begins_at_one_replica_ends_at_another_and_counts_at_both(
    app, make_app, browser, provider
):
    """No process keeps anything of an attempt: all there is of it is the browser's cookie."""
    other = Browser(make_app(provider.issuer))
    back = browser.go()
    attempt = browser.client.get_cookie(ATTEMPT, domain="fleet.example.org").value
    other.client.set_cookie(ATTEMPT, attempt, domain="fleet.example.org")
    assert other.come_back(back).status_code == 303
    secret = other.client.get_cookie(access.COOKIE, domain="fleet.example.org").value
    for there in (app, make_app(provider.issuer)):
        here = Browser(there)
        here.client.set_cookie(access.COOKIE, secret, domain="fleet.example.org")
        assert here.who().json["name"] == "ada@example.org"
    assert reason_of(browser.come_back(back)) in ("signin-replayed", "signin-code")
    assert other.ask("POST", "/signout").status_code == 204
    assert here.who().status_code == 401


def test_what_the_rules_say_now_counts_for_sessions_that_began_before(make_app, browser, provider, clock):
    browser.sign_in()
    secret = browser.client.get_cookie(access.COOKIE, domain="fleet.example.org").value

    def later(**changed):
        there = Browser(make_app(changed.pop("issuer", provider.issuer), **changed))
        there.client.set_cookie(access.COOKIE, secret, domain="fleet.example.org")
        answer = there.who()
        return answer.json.get("role") or answer.json["reason"]

    assert later() == "operator"
    assert later(roles=["reader: groups=engineers"]) == "session-unmapped"
    assert later(issuer=UNUSED) == "session-unmapped"
    clock.step(seconds=400)
    assert later(session_s=400.0) == "session-expired"
    assert later(idle_s=400.0) == "session-idle"
    assert later() == "operator"


# --- sessions --------------------------------------------------------------------------------------------


def test_a_session_ends_by_age_however_much_it_is_used(browser, clock):
    browser.sign_in()
    for _ in range(15):
        clock.step(minutes=47)
        assert browser.who().status_code == 200
    clock.step(minutes=15)
    answer = browser.who()
    assert (answer.status_code, answer.json["reason"]) == (401, "session-expired")


def test_a_session_that_is_not_used_ends(browser, clock):
    browser.sign_in()
    clock.step(minutes=59)
    assert browser.who().status_code == 200
    clock.step(minutes=60)
    answer = browser.who()
    assert (answer.status_code, answer.json["reason"]) == (401, "session-idle")


def test_an_admin_lists_sessions_and_ends_one_at_once(browser, sign_in, deeds, clock, provider):
    browser.sign_in()
    admin = sign_in("admin", name="root")
    (listed,) = admin("GET", "/sessions").json["items"]
    number = listed.pop("id")
    assert listed == {
        "name": "ada@example.org",
        "provider": provider.issuer,
        "subject": "u-1",
        "rule": "operator: groups=fleet-operators",
        "created_at": iso(clock()),
        "used_at": iso(clock()),
        "expires_at": iso(clock() + timedelta(hours=12)),
        "ended_at": None,
        "ended_by": "",
    }
    assert admin("DELETE", f"/sessions/{number}").status_code == 204
    answer = browser.who()
    assert (answer.status_code, answer.json["reason"]) == (401, "session-ended")
    assert deeds("id")[-1] == ("root", "session.end", "ada@example.org", number)
    clock.step(days=1)
    browser.sign_in()  # which removes what is past its date
    assert [entry["id"] for entry in admin("GET", "/sessions").json["items"]] == [number + 1]
    assert admin("DELETE", f"/sessions/{number}").status_code == 404


def test_the_commands_show_who_is_in_and_end_it(browser, app, token, tmp_path, monkeypatch, capsys):
    browser.sign_in()
    with desk(app, token, tmp_path, monkeypatch, capsys, role="admin") as admin:
        code, shown, _ = admin.run("session", "list")
        assert (code, "ada@example.org" in shown, "operator: groups=fleet-operators" in shown) == (
            0,
            True,
            True,
        )
        number = str(admin.json("session", "list")[-1]["id"])
        assert admin.run("session", "end", number)[0] == 2, "it asks, and nobody is there"
        assert browser.who().status_code == 200
        assert admin.run("session", "end", number, "--yes", "--json")[:2] == (
            0,
            f'{{\n  "id": {number},\n  "ended": true\n}}\n',
        )
        assert browser.who().json["reason"] == "session-ended"
        assert "ended by admin" in admin.run("session", "list")[1]
        assert admin.run("session", "end", "999999", "--yes")[0] == 7


def test_nothing_in_the_database_is_a_session(browser, sessions):
    browser.sign_in()
    secret = browser.client.get_cookie(access.COOKIE, domain="fleet.example.org").value
    with sessions.read() as session:
        row = session.scalars(select(PersonSession)).one()
        found = [str(value) for name, value in vars(row).items() if not name.startswith("_")]
    assert not [text for text in found if secret in text]
    for text in found:
        browser.client.set_cookie(access.COOKIE, text, domain="fleet.example.org")
        assert browser.who().status_code == 401
        browser.client.set_cookie(ATTEMPT, text, domain="fleet.example.org")
        assert browser.ask("GET", "/signin/callback?code=x&state=y").status_code == 403


def test_self_approval_is_refused_across_a_session_and_a_token(browser, token, sessions, clock):
    browser.sign_in()
    world = World(sessions, clock)
    world.cohort(approval=True)
    asked = {"product": "demo", "cohort": "all", "version": "1.1.0", "stages": [{"share_bp": 10_000}]}
    headers = {"Authorization": f"Bearer {token('operator', name='Ada@Example.org/ci')}"}
    made = browser.ask("POST", "/api/v1/rollouts", json=asked, headers=headers)
    assert made.status_code == 201, made.text
    assert made.json["state"] == "awaiting_approval"
    answer = browser.ask(
        "POST", f"/api/v1/rollouts/{made.json['id']}/approve", json={"digest": made.json["digest"]}
    )
    assert (answer.status_code, answer.json["reason"]) == (403, "self-approval")


# --- other pages -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "https://sibling.example.org"},
        {"Origin": "http://fleet.example.org"},
        {"Origin": "https://fleet.example.org:8443"},
        {"Origin": "null"},
        {"Origin": ""},
    ],
    ids=["elsewhere", "sibling", "without TLS", "other port", "sandboxed", "unsaid"],
)
def test_another_page_changes_nothing_with_the_cookie(browser, headers, sessions):
    browser.sign_in()
    for method, path in (
        ("POST", "/api/v1/products"),
        ("DELETE", "/api/v1/sessions/1"),
        ("PATCH", f"/api/v1/uploads/{'0' * 64}"),
        ("POST", "/signout"),
    ):
        answer = browser.ask(method, path, json={"name": "x"}, headers=headers)
        assert answer.status_code == 403, path
        assert "cross-site" in answer.text
    assert browser.who().status_code == 200


def test_every_route_that_changes_something_asks_where_it_comes_from(app, browser):
    browser.sign_in()
    changing = [
        route.split() for route in sorted(routes(app) - OPEN) if not route.startswith(("GET", "HEAD"))
    ]
    assert len(changing) > 20
    for method, path in changing:
        answer = browser.ask(method, path, json={}, headers={"Origin": "https://evil.example"})
        assert (answer.status_code, answer.json["reason"]) == (403, "cross-site"), path


def test_the_page_itself_changes_what_the_role_allows(browser):
    browser.sign_in()
    body = {"name": "x", "role": "admin"}
    assert browser.ask("POST", "/api/v1/tokens", json=body).json["reason"] == "scope"
    assert browser.ask("POST", "/api/v1/products", json={"name": "by-page"}).status_code == 201


def test_a_token_is_asked_for_no_origin_and_counts_before_a_cookie(browser, token):
    browser.sign_in()
    headers = {"Authorization": f"Bearer {token('admin', name='root')}", "Origin": "https://evil.example"}
    assert (
        browser.ask("POST", "/api/v1/products", json={"name": "by-token"}, headers=headers).status_code == 201
    )
    headers["Authorization"] = "Bearer rft_guess"
    assert browser.ask("GET", "/api/v1/whoami", headers=headers).json["reason"] == "token-unknown"
    headers["Authorization"] = f"Bearer {token('reader')}"
    assert browser.ask("POST", "/signout", headers=headers).status_code == 422


# --- the provider is away --------------------------------------------------------------------------------


def assert_tokens_work(browser, token):
    headers = {"Authorization": f"Bearer {token('reader')}"}
    assert browser.ask("GET", "/").status_code == 200
    assert browser.ask("GET", "/api/v1/agents", headers=headers).status_code == 200


def assert_unavailable(answer, why):
    assert (answer.status_code, reason_of(answer)) == (503, "signin-unavailable")
    assert "Retry-After" in answer.headers
    assert why in answer.text


def test_a_provider_that_is_down_stops_nobody_with_a_token(make_app, token):
    browser = Browser(make_app(UNUSED))
    assert_unavailable(browser.ask("GET", "/signin"), "does not answer")
    assert_tokens_work(browser, token)


def test_a_provider_whose_certificate_nobody_vouches_for_is_not_asked(make_app, tmp_path):
    ours, others = Authority(tmp_path, "ours"), Authority(tmp_path, "others")
    provider = Provider(tls=tuple(map(str, ours.issue("provider"))))
    for settings in ({}, {"ca_file": str(others.file)}):
        browser = Browser(make_app(provider.issuer, **settings))
        assert_unavailable(browser.ask("GET", "/signin"), "SSLError")
    assert provider.asked == []
    assert Browser(make_app(provider.issuer, ca_file=str(ours.file))).ask("GET", "/signin").status_code == 303
    provider.close()


def test_a_proxy_that_is_set_is_the_way_to_the_provider_and_that_of_the_environment_is_not(
    make_app, tmp_path, clock, monkeypatch
):
    monkeypatch.setenv("HTTPS_PROXY", UNUSED)
    ours = Authority(tmp_path, "ours")
    provider = Provider(
        redirect_uri=f"{SITE}/signin/callback", clock=clock, tls=tuple(map(str, ours.issue("provider")))
    )
    trusted = {"ca_file": str(ours.file)}
    assert Browser(make_app(provider.issuer, **trusted)).ask("GET", "/signin").status_code == 303
    with Proxy() as proxy:
        browser = Browser(make_app(provider.issuer, proxy=proxy.url, **trusted))
        sent = browser.ask("GET", "/signin").headers["Location"]
        answer = requests.get(
            sent, allow_redirects=False, timeout=30, verify=str(ours.file), proxies={"https": ""}
        )
        assert browser.come_back(answer.headers["Location"]).status_code == 303
        assert browser.who().json["name"] == "ada@example.org"
    assert len(proxy.heads) >= 3  # what it says of itself, the code, its keys
    assert {head.partition(" ")[0] for head in proxy.heads} == {"CONNECT"}
    provider.close()


# urllib3 leaves the socket of a handshake that failed behind a proxy to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_proxy_that_drips_or_is_away_is_named_and_its_password_is_not(make_app, token, monkeypatch, caplog):
    monkeypatch.setattr(provider_module, "LONGEST_S", 0.3)
    with dripping() as url:
        for proxy, why in ((url, "took too long"), ("http://ada:hunter2@127.0.0.1:9", "ProxyError")):
            browser = Browser(make_app("https://id.example.org", proxy=proxy))
            answer = browser.ask("GET", "/signin")
            assert_unavailable(answer, why)
            assert "hunter2" not in answer.text + caplog.text
            assert_tokens_work(browser, token)


@pytest.mark.parametrize(
    ("path", "answer", "why"),
    [
        ("/.well-known/openid-configuration", endless, "no end"),
        ("/.well-known/openid-configuration", lambda: ("<html>", 200), "something else than JSON"),
        ("/.well-known/openid-configuration", lambda: ("[" * 100_000, 200), "something else than JSON"),
        ("/.well-known/openid-configuration", lambda: ([1], 200), "something else than JSON"),
        ("/.well-known/openid-configuration", lambda: ("", 302, {"Location": "/keys"}), "answers 302"),
        (
            "/.well-known/openid-configuration",
            lambda: ({"issuer": "https://evil.example"}, 200),
            "names itself",
        ),
        ("/token", endless, "no end"),
        ("/token", lambda: ("busy", 502), "does not answer"),
        ("/token", lambda: ("<html>", 200), "something else than JSON"),
        ("/keys", endless, "no end"),
        ("/keys", lambda: ({"keys": [{"kty": "RSA", "n": "!", "e": 1}]}, 200), "keys cannot be read"),
        ("/keys", lambda: ({"keys": []}, 200), "keys cannot be read"),
        ("/keys", lambda: ({"keys": "x"}, 200), "keys cannot be read"),
    ],
)
def test_an_answer_that_cannot_be_used_is_named_and_stops_nobody_with_a_token(
    browser, provider, token, path, answer, why
):
    provider.answers[path] = answer
    first = browser.ask("GET", "/signin")
    assert_unavailable(first if first.status_code != 303 else browser.come_back(browser.go()), why)
    assert_tokens_work(browser, token)
    provider.answers.clear()
    browser.sign_in()


def test_a_provider_that_is_slow_holds_four_threads_and_no_more(app, browser, provider, token):
    path, go_on = "/.well-known/openid-configuration", threading.Event()
    provider.answers[path] = lambda: None if go_on.wait(60) else ("", 500)
    with ThreadPoolExecutor(provider_module.AT_ONCE) as pool:
        waiting = [pool.submit(Browser(app).ask, "GET", "/signin") for _ in range(provider_module.AT_ONCE)]
        wait_for("everybody asks", lambda: provider.asked.count(path) == provider_module.AT_ONCE)
        assert_unavailable(browser.ask("GET", "/signin"), "others wait")
        assert_tokens_work(browser, token)
        go_on.set()
        assert [answer.result().status_code for answer in waiting] == [303] * provider_module.AT_ONCE


@pytest.mark.parametrize(
    "head",
    [b"", b"HTTP/1.1 200 OK\r\n\r\n{", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n{"],
    ids=["in the head", "in the body", "in a body of a known length"],
)
def test_a_provider_that_drips_is_cut_at_the_deadline(make_app, token, monkeypatch, head):
    monkeypatch.setattr(provider_module, "LONGEST_S", 0.3)
    with dripping(head) as url:
        browser = Browser(make_app(url))
        assert_unavailable(browser.ask("GET", "/signin"), "took too long")
        assert_tokens_work(browser, token)


@pytest.mark.parametrize(
    "said",
    [
        {"token_endpoint": "http://192.0.2.1/token"},
        {"token_endpoint": None},
        {"jwks_uri": "file:///etc/passwd"},
        {"authorization_endpoint": "javascript:alert(1)"},
        {"code_challenge_methods_supported": ["plain"]},
    ],
    ids=str,
)
def test_a_provider_that_names_unsafe_places_is_not_used(browser, provider, said):
    provider.said_of_itself = said
    assert_unavailable(browser.ask("GET", "/signin"), "")


# --- where no provider is set, and what is logged ---------------------------------------------------------


def test_without_a_provider_there_is_nothing_to_sign_in_with(make_app, token):
    browser = Browser(make_app(""))
    assert browser.ask("GET", "/signin").status_code == 404
    assert browser.ask("GET", "/signin/callback?code=x&state=y").status_code == 404
    assert browser.ask("GET", "/api/v1/signin").json == {"provider": None}
    browser.client.set_cookie(access.COOKIE, "rfs_guess", domain="fleet.example.org")
    assert browser.who().json["reason"] == "session-unknown"
    assert_tokens_work(browser, token)


def test_the_page_is_told_with_whom_people_sign_in(browser, provider):
    assert browser.ask("GET", "/api/v1/signin").json == {"provider": provider.issuer}


def test_no_secret_of_a_sign_in_is_logged(browser, provider, caplog):
    caplog.set_level(logging.DEBUG)
    back = browser.go()
    attempt = browser.client.get_cookie(ATTEMPT, domain="fleet.example.org").value
    browser.come_back(back)
    secret = browser.client.get_cookie(access.COOKIE, domain="fleet.example.org").value
    provider.spoil = by_secret
    assert browser.come_back(browser.go()).status_code == 403
    assert "cannot be used (UnsupportedAlgorithmError) (signin-token)" in caplog.text
    ours = "\n".join(
        record.getMessage() for record in caplog.records if record.name != "urllib3.connectionpool"
    )
    for text in (openid_provider.SECRET, attempt, secret, query_of(back)["code"]):
        assert text not in ours
        assert text not in urlsplit(back).path


def test_routes_outside_the_api_are_these(app):
    """A route that nobody needs a scope for is listed here, or in `OPEN` of test_edges."""
    found = {
        f"{method} {rule.rule}"
        for rule in app.url_map.iter_rules()
        if not rule.rule.startswith("/api/v1")
        for method in rule.methods - {"HEAD", "OPTIONS"}
    }
    assert found == {
        "GET /",
        "GET /dashboard/page.css",
        "GET /dashboard/page.js",
        "GET /metrics",  # `metrics.networks`, or a reader
        "GET /signin",  # anybody: it sends to the provider and keeps nothing
        "GET /signin/callback",  # the attempt's cookie with its state, and the provider's word
        "POST /signout",  # a session, from the page itself
    }
