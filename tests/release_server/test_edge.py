"""The server's edge: no path from a request to other files, and headers that hold on every answer."""

from __future__ import annotations

import pytest

from release_server.app import create_app

SECRET = b"nobody outside may read this"
TRICKS = [
    "../relfleet.db",
    "..%2frelfleet.db",
    "%2e%2e/relfleet.db",
    "%252e%252e/relfleet.db",
    "..\\relfleet.db",
    "....//relfleet.db",
    "//etc/passwd",
    "%2fetc%2fpasswd",
    "timestamp.json%00",
    "%00",
    ".",
    "..",
    ".hidden.json",
    "sub/../timestamp.json",
    "x/%2e%2e/%2e%2e/server.toml",
    "..;/server.toml",
    "%c0%ae%c0%ae/server.toml",
    "timestamp.json/",
    "a" * 5000 + ".json",
    f"{'0' * 64}.x/../../../server.toml",
    f"../{'0' * 64}.secret",
    f"%2e%2e/{'0' * 64}.secret",
]
BELOW = ["/metadata/", "/targets/", "/dashboard/", "/api/v1/static/", "/api/v1/uploads/", "/"]


@pytest.fixture
def planted(config):
    """Files outside of what is published, of names that would be served if a path could leave."""
    (config.repository / f"{'0' * 64}.secret").write_bytes(SECRET)
    (config.data / "secret.json").write_bytes(SECRET)
    (config.data / "server.toml").write_bytes(SECRET)
    (config.repository / "metadata" / ".hidden.json").write_bytes(SECRET)
    return config


@pytest.mark.parametrize("below", BELOW)
def test_no_path_of_a_request_leaves_what_is_published(planted, client, sign_in, below):
    call = sign_in("admin")
    for trick in TRICKS:
        for method in ("GET", "HEAD", "PATCH"):
            if below.startswith("/api/v1"):
                answer = call(method, below.removeprefix("/api/v1") + trick)
            else:
                answer = client.open(below + trick, method=method)
            assert answer.status_code in (308, 400, 401, 404, 405, 422) or (below, trick) == ("/", "."), trick
            assert SECRET not in answer.data
            assert b"root:" not in answer.data


def test_what_is_behind_a_link_that_leaves_the_repository_is_not_served(planted, client):
    metadata, targets = planted.repository / "metadata", planted.repository / "targets"
    (metadata / "9.root.json").symlink_to(planted.data / "secret.json")
    (targets / f"{'1' * 64}.txt").symlink_to(planted.data / "secret.json")
    (targets / "out").symlink_to(planted.data)
    (planted.data / f"{'2' * 64}.txt").write_bytes(SECRET)
    for path in (
        "/metadata/9.root.json",
        f"/targets/{'1' * 64}.txt",
        f"/targets/out/{'2' * 64}.txt",
    ):
        answer = client.get(path)
        assert (answer.status_code, SECRET in answer.data) == (404, False), path


# --- headers ---------------------------------------------------------------------------------------------


def answers(client, sign_in, config):
    """One of each kind: pages, the API, files, and every way to be refused."""
    (config.repository / "metadata" / "timestamp.json").write_bytes(b"{}")
    call = sign_in("reader")
    yield call("GET", "/whoami")
    yield call("POST", "/products", json={})
    yield call("GET", "/rollouts?limit=x")
    for method, path in (
        ("GET", "/"),
        ("GET", "/dashboard/page.js"),
        ("GET", "/dashboard/nothing"),
        ("GET", "/api/v1/health"),
        ("GET", "/api/v1/openapi.json"),
        ("GET", "/api/v1/whoami"),
        ("PUT", "/api/v1/health"),
        ("POST", "/api/v1/enroll"),
        ("GET", "/metadata/timestamp.json"),
        ("GET", "/metadata/none.json"),
        ("POST", "/metadata/timestamp.json"),
        ("GET", "/targets/none"),
    ):
        yield client.open(path, method=method)


def test_every_answer_says_that_a_browser_may_load_run_and_frame_nothing(client, sign_in, config):
    for answer in answers(client, sign_in, config):
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy, answer.request.path
        assert "frame-ancestors 'none'" in policy, answer.request.path
        assert "unsafe" not in policy, answer.request.path
        assert "*" not in policy, answer.request.path
        assert answer.headers["X-Content-Type-Options"] == "nosniff", answer.request.path
        assert answer.headers["Referrer-Policy"] == "no-referrer", answer.request.path


@pytest.mark.parametrize(("proxies", "believed"), [(0, False), (1, True)])
def test_what_a_proxy_says_is_believed_only_where_one_is_set(data, clock, proxies, believed):
    from release_server.config import Config

    config = Config.load(data, environ={"RELFLEET_SERVER_TRUSTED_PROXIES": str(proxies)})
    app = create_app(config, clock=clock)
    asked = {"X-Forwarded-Proto": "https", "X-Forwarded-For": "192.0.2.9", "X-Forwarded-Host": "evil.example"}
    seen = {}

    @app.after_request
    def look(response):
        from flask import request

        seen.update(address=request.remote_addr, host=request.host)
        return response

    for path in ("/api/v1/health", "/metadata/none.json"):
        answer = app.test_client().get(path, headers=asked)
        assert ("Strict-Transport-Security" in answer.headers) == believed, path
    assert seen == (
        {"address": "192.0.2.9", "host": "evil.example"}
        if believed
        else {"address": "127.0.0.1", "host": "localhost"}
    )
    app.extensions["relfleet"].sessions.close()
