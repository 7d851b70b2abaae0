"""A person signs in to the real server: its processes, a real provider, TLS at both, a browser's cookies."""

from __future__ import annotations

import re
import signal

import pytest
import requests

from release_server.cli import main
from tests import openid_provider
from tests.certificates import Authority
from tests.openid_provider import Provider
from tests.release_server.signin_world import settings_of, write_secret
from tests.release_server.test_serve import Running


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def provider(authority):
    made = Provider(tls=tuple(map(str, authority.issue("provider"))))
    yield made
    made.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory, provider, authority):
    directory = tmp_path_factory.mktemp("signin")
    data = directory / "server"
    certificate, key = authority.issue("server")
    assert main(["init", "--data", str(data), "--port", "0", "-q"]) == 0
    write_secret(data)
    with (data / "server.toml").open("a") as settings:
        settings.write(f'tls_cert = "{certificate}"\ntls_key = "{key}"\n')
        settings.write(settings_of(provider.issuer, ca_file=str(authority.file)))
    running = Running(data, directory / "log")
    provider.redirect_uri = f"{running.url}/signin/callback"
    yield running
    running.end(signal.SIGTERM)


@pytest.fixture
def browser(authority):
    with requests.Session() as session:
        session.trust_env = False
        session.verify = str(authority.file)
        yield session


def test_a_person_signs_in_follows_every_redirect_and_signs_out(server, provider, browser):
    page = browser.get(f"{server.url}/signin", timeout=60)
    assert [step.status_code for step in page.history] == [303, 302, 303]
    assert (page.status_code, page.url) == (200, f"{server.url}/")
    assert '<a href="/signin">' in page.text
    who = browser.get(f"{server.url}/api/v1/whoami", timeout=60)
    assert (who.json()["name"], who.json()["role"]) == ("ada@example.org", "operator")
    headers = {"Origin": server.url}
    assert browser.post(f"{server.url}/signout", timeout=60).status_code == 403
    assert browser.post(f"{server.url}/signout", headers=headers, timeout=60).status_code == 204
    assert browser.get(f"{server.url}/api/v1/whoami", timeout=60).status_code == 401
    said = server.log.read_text()
    cookies = [cookie.value for step in page.history for cookie in step.cookies if cookie.value]
    codes = re.findall(r"code=([^&]+)", page.history[1].headers["Location"])
    assert (len(cookies), len(codes)) == (2, 1)
    for secret in (openid_provider.SECRET, *cookies, *codes):
        assert secret not in said


def test_a_provider_that_goes_away_takes_nobody_along(server, provider, browser):
    browser.get(f"{server.url}/signin", timeout=60)
    provider.answers["/token"] = lambda: ("", 503)
    refused = browser.get(f"{server.url}/signin", timeout=60)
    assert (refused.status_code, "signin-unavailable" in refused.text) == (503, True)
    token = (server.data / "admin.token").read_text().strip()
    known = {"Authorization": f"Bearer {token}"}
    for headers in ({}, known):
        assert browser.get(f"{server.url}/api/v1/whoami", headers=headers, timeout=60).status_code == 200
    (listed,) = [
        entry
        for entry in browser.get(f"{server.url}/api/v1/sessions", headers=known, timeout=60).json()["items"]
        if entry["ended_at"] is None
    ]
    gone = browser.delete(f"{server.url}/api/v1/sessions/{listed['id']}", headers=known, timeout=60)
    assert gone.status_code == 204
    assert browser.get(f"{server.url}/api/v1/whoami", timeout=60).json()["reason"] == "session-ended"
