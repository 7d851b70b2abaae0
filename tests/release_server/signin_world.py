"""A server whose page people sign in to, a real provider, and the browser between them."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, urlsplit

import requests

from release_server.config import Config
from tests import openid_provider, postgres

SITE = "https://fleet.example.org"
ROLES = ["operator: groups=fleet-operators", "admin: email=grace@example.org", "reader: groups=engineers"]


def write_secret(data):
    file = data / "client.secret"
    file.write_text(openid_provider.SECRET + "\n")
    file.chmod(0o600)
    return file


def settings_of(issuer, **changed):
    """The lines of `[oidc]` in `server.toml`."""
    said = {
        "issuer": issuer,
        "client_id": openid_provider.CLIENT,
        "client_secret_file": "client.secret",
        "scopes": ["openid", "email", "groups"],
        "roles": ROLES,
    } | changed
    return "[oidc]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in said.items())


def configured(data, issuer, **changed):
    """The configuration of a data directory with these settings; the site is where a proxy with TLS is."""
    write_secret(data)
    text = (data / "server.toml").read_text().partition("[oidc]")[0]
    (data / "server.toml").write_text(text + settings_of(issuer, **changed))
    return Config.load(data, environ={"RELFLEET_SERVER_URL": SITE})


@contextmanager
def a_database(data, template):
    """A data directory with a database at the newest schema, SQLite's or PostgreSQL's as conftest has it."""
    for below in ("blobs", "uploads", "repository/metadata", "repository/targets"):
        (data / below).mkdir(parents=True, mode=0o700)
    settings = "[server]\nport = 0\n"
    if not postgres.WANTED:
        (data / "relfleet.db").write_bytes((template / "relfleet.db").read_bytes())
        (data / "server.toml").write_text(settings)
        yield
        return
    with postgres.cluster().database() as url:
        (data / "server.toml").write_text(f'{settings}[database]\nurl = "{url}"\n')
        yield


@dataclass
class Browser:
    """Goes between the server (in this process) and the provider (over HTTP), with its cookies."""

    app: object
    origin: str = SITE
    client: object = field(default=None)

    def __post_init__(self):
        self.client = self.app.test_client()

    def ask(self, method, path, **rest):
        headers = {} if method == "GET" else {"Origin": self.origin}
        return self.client.open(
            path, method=method, base_url=SITE, headers=headers | rest.pop("headers", {}), **rest
        )

    def go(self):
        """To the provider; where it sends the browser back to."""
        sent = self.ask("GET", "/signin")
        assert sent.status_code == 303, sent.text
        answer = requests.get(sent.headers["Location"], allow_redirects=False, timeout=30)
        assert answer.status_code == 302, answer.text
        return answer.headers["Location"]

    def come_back(self, url):
        assert url.startswith(f"{SITE}/signin/callback?")
        return self.ask("GET", url.removeprefix(SITE))

    def sign_in(self):
        answer = self.come_back(self.go())
        assert answer.status_code == 303, answer.text
        assert answer.headers["Location"] == f"{SITE}/"
        return answer

    def who(self):
        return self.ask("GET", "/api/v1/whoami")


def query_of(url):
    return {name: values[0] for name, values in parse_qs(urlsplit(url).query).items()}
