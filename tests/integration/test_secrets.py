"""No secret is in a log or an error: a story with its failures is told, and all that was said is searched."""

from __future__ import annotations

import json
import re
import sqlite3
import zipfile
from base64 import b64encode, urlsafe_b64encode
from contextlib import closing
from dataclasses import dataclass, field
from urllib.parse import quote

import pytest
import requests
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from agent_core.errors import Exit
from keys import signers
from tests.integration.world import Commands, Host, World, running, until

PASSPHRASE, WRONG_PASSPHRASE = "correct horse", "wrong-horse-battery"
PROXY_PASSWORD, DATABASE_PASSWORD = "proxy-pass-0815", "database-pass-4711"
WRONG_TOKEN = "rft_" + "Wr0ng" * 8 + "xyz"
AWAY = f"postgresql+psycopg://relfleet:{DATABASE_PASSWORD}@127.0.0.1:9/fleet"


class Overheard(Commands):
    """Keeps all that commands print; what they say on standard error is in `commands.log` or here."""

    def __init__(self, *where):
        super().__init__(*where)
        self.printed = []

    def finish(self, child, **how):
        printed = super().finish(child, **how)
        self.printed.append(printed)
        return printed

    def outcome(self, *words, **how):
        ended = super().outcome(*words, **how)
        self.printed += ended[1:]
        return ended


class Loud(World):
    """One whose server logs everything it can."""

    def make(self):
        self.processes = Overheard(self.home, self.home / "commands.log")
        self.processes.environ["RELFLEET_SERVER_LOG_LEVEL"] = "debug"
        super().make()


# --- what may not be said --------------------------------------------------------------------------------


def spellings(secret: bytes) -> set[str]:
    """A secret as it may stand in text: as it is, quoted, in hex, in base64 wherever it begins there."""
    found = {secret.hex(), secret.hex().upper()}
    for before in range(3):
        for encode in (b64encode, urlsafe_b64encode):
            whole = encode(bytes(before) + secret).decode().rstrip("=")
            found.add(whole[4 if before else 0 : len(whole) // 4 * 4 - 4])
    if secret.isascii():
        text = secret.decode()
        found |= {text, quote(text, safe=""), json.dumps(text)[1:-1]}
    return {text for text in found if len(text) >= 8}


def private(signer):
    """The private half of a key, bare and as a PEM file has it."""
    key = signer._private_key
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return key.private_bytes_raw(), pem.splitlines()[1]


@dataclass
class Story:
    """What was said, by where, and what should not have been."""

    secrets: dict[str, bytes] = field(default_factory=dict)
    said: dict[str, str] = field(default_factory=dict)

    def hide(self, name, secret):
        self.secrets[name] = secret if isinstance(secret, bytes) else secret.encode()


def tell(world: Loud) -> Story:
    """From `init` to a rollout that halts, with everything that goes wrong on the way."""
    story, run = Story(), world.exit_of
    for name, secret in (("passphrase", PASSPHRASE), ("wrong passphrase", WRONG_PASSPHRASE)):
        story.hide(name, secret)
    tokens = {
        role: world.make_token(role) for role in ("reader", "releaser", "operator", "enroller", "admin")
    }
    hosts = world.hosts(world.cohort(), world.cohort())
    webhook = world.home / "webhook.secret"
    world.release("webhook", "add", "http://127.0.0.1:9/hook", "--events", "*", "--out", str(webhook))
    good = world.roll_out("1.1.0", hosts[0].cohort)
    bad = world.roll_out("2.0.0-exits-at-once", hosts[1].cohort)
    world.await_rollout(good, "completed")
    world.await_rollout(bad, "paused")
    go_wrong_with_tokens(world, tokens)
    go_wrong_with_keys(world)
    hosts.append(lose_the_way(world))
    lose_the_server(world, hosts)
    lose_the_database(world)
    assert hosts[0].agent("rotate-key")[0] == Exit.DONE
    hosts[0].await_look("up-to-date")
    for number, host in enumerate(hosts):
        zipped = world.home / f"{number}.zip"
        assert host.agent("diagnostics", "-o", str(zipped))[0] == Exit.DONE
        for words in (
            ["status", "--json"],
            ["why", "-v"],
            ["doctor", "-v"],
            ["config", "show"],
            ["versions"],
        ):
            host.agent(*words)
        with zipfile.ZipFile(zipped) as opened:
            story.said |= {f"{zipped.name}/{name}": opened.read(name).decode() for name in opened.namelist()}
        story.said |= {str(file): file.read_text() for file in (host.log, *(host.root / "log").glob("*"))}
        keep_secrets_of(story, host)
    for words in (
        ("token", "list"),
        ("audit", "log"),
        ("key", "list"),
        ("agents", "list"),
        ("cohort", "list"),
    ):
        run("release", *words, "--json", "-v")
    for name in ("server.log", "commands.log"):
        story.said[name] = (world.home / name).read_text()
    story.said["the signer's log"] = "".join(
        file.read_text() for file in (world.server_data / "signer" / "log").iterdir()
    )
    story.said["what commands printed"] = "\n".join(world.processes.printed)
    for role, file in {**tokens, "first admin": world.server_data / "admin.token"}.items():
        story.hide(f"the {role}'s token", file.read_text().strip())
    key = world.server_data / "trust" / "webhooks.key"
    story.hide("a webhook's secret", webhook.read_text().strip())
    story.hide("what secrets of webhooks are made of", bytes.fromhex(key.read_text()))
    story.hide("a wrong token", WRONG_TOKEN)
    story.hide("a proxy's password", PROXY_PASSWORD)
    story.hide("the database's password", DATABASE_PASSWORD)
    places = [*world.keys.glob(f"*{signers.SUFFIX}"), *(world.server_data / "keys").iterdir()]
    for place in places:
        for form, half in zip(
            ("seed", "PEM"), private(signers.load(place, lambda _: PASSPHRASE)), strict=True
        ):
            story.hide(f"{place.name}, {form}", half)
    return story


def keep_secrets_of(story, host):
    key = host.layout.key.read_text().strip()
    story.hide(f"{host.name}'s key", key)
    story.hide(f"{host.name}'s key, raw", bytes.fromhex(key))
    if (session := host.layout.state / "session.json").exists():
        story.hide(f"{host.name}'s session", json.loads(session.read_text())["session"])


def go_wrong_with_tokens(world, tokens):
    """Wrong, in the place of its file, of another role, in an address, in a body that is none."""
    wrong = world.home / "wrong.token"
    wrong.write_text(WRONG_TOKEN)
    wrong.chmod(0o600)
    right = tokens["admin"].read_text().strip()
    for words in (("cohort", "list"), ("token", "create", "--role", "admin")):
        for environ in (
            {"RELFLEET_TOKEN_FILE": str(wrong)},
            {"RELFLEET_TOKEN_FILE": str(tokens["enroller"])},
        ):
            assert world.exit_of("release", *words, "-v", "-v", environ=environ)[0] == Exit.NOT_ALLOWED
    for named in (right, f"./{right}"):
        assert world.exit_of("release", "whoami", "--token-file", named)[0] != Exit.DONE
        assert world.exit_of("release", "login", world.url, "--token-file", named)[0] != Exit.DONE
        assert world.exit_of("release", "whoami", environ={"RELFLEET_TOKEN_FILE": named})[0] != Exit.DONE
    stranger = Host(world, "stranger", "nowhere")
    for file in (wrong, tokens["reader"], right):
        world.processes.finish(stranger.begin_enrolment(token=file), codes=(Exit.NOT_ALLOWED, Exit.NOT_FOUND))
    api, bearer = f"{world.url}/api/v1", {"Authorization": f"Bearer {right}"}
    for answer in (
        requests.get(f"{api}/whoami", params={"token": right}, timeout=60),
        requests.get(f"{api}/nothing/{right}", headers=bearer, timeout=60),
        requests.post(f"{api}/enroll", data=b"{" + right.encode(), headers=bearer, timeout=60),
        requests.post(f"{api}/tokens", json={"name": right, "role": right}, headers=bearer, timeout=60),
        requests.get(f"{api}/whoami", headers={"Authorization": f"Bearer  {right} {right}"}, timeout=60),
    ):
        assert answer.status_code >= 400


def go_wrong_with_keys(world):
    """A wrong passphrase from each place one may come from, and a key that others can read."""
    file = world.home / "wrong.passphrase"
    file.write_text(WRONG_PASSPHRASE)
    for environ in (
        {"RELFLEET_PASSPHRASE_FILE": str(file)},
        {"RELFLEET_PASSPHRASE_FILE": "", "RELFLEET_PASSPHRASE": WRONG_PASSPHRASE},
        {"RELFLEET_PASSPHRASE_FILE": PASSPHRASE},
    ):
        assert world.exit_of("release", "renew", "-v", "-v", environ=environ)[0] != Exit.DONE
    key = world.keys / f"release{signers.SUFFIX}"
    key.chmod(0o644)
    assert world.exit_of("release", "renew", "-v")[0] != Exit.DONE
    key.chmod(0o600)


def lose_the_way(world):
    """A host whose proxy wants a password and is not there, or cannot be spoken to; people with the same."""
    host = world.host(world.cohort(), start=False)
    settings = host.layout.settings.read_text()
    host.start()
    for scheme in ("http", "socks5"):
        proxy = f"{scheme}://fleet:{PROXY_PASSWORD}@127.0.0.1:9"
        host.layout.settings.write_text(f'{settings}\n[server]\nproxy = "{proxy}"\n')
        until("a poll to fail", lambda: host.news.get("poll"))
        for words in (["once", "-v", "-v"], ["doctor", "-v"], ["config", "check"]):
            host.agent(*words)
        for environ in (
            {"RELFLEET_SERVER": f"http://ada:{PROXY_PASSWORD}@127.0.0.1:9"},
            {"http_proxy": proxy, "https_proxy": proxy, "all_proxy": proxy, "no_proxy": ""},
        ):
            code, *_ = world.exit_of("release", "list", "--timeout", "1s", "-v", "-v", environ=environ)
            assert code != Exit.DONE
    return host


def lose_the_server(world, hosts):
    """Killed in the middle, while agents and people ask."""
    world.kill_server()
    assert world.exit_of("release", "list", "--timeout", "1s", "-v", "-v")[0] == Exit.UNREACHABLE
    world.exit_of("release-server", "doctor", "--data", str(world.server_data))
    until("a poll to fail", lambda: hosts[0].news.get("poll", "").startswith("offline"))
    world.start_server()
    hosts[0].await_look("up-to-date")


def lose_the_database(world):
    """Locked for longer than anybody waits; spoilt; and one that is elsewhere, behind a password."""
    data = ("--data", str(world.server_data))
    admin = {"Authorization": f"Bearer {(world.server_data / 'admin.token').read_text().strip()}"}
    file = world.server_data / "relfleet.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as opened:
        opened.execute("BEGIN EXCLUSIVE")
        body = {"name": "late", "role": "reader"}
        answer = requests.post(f"{world.url}/api/v1/tokens", json=body, headers=admin, timeout=120)
        assert answer.status_code >= 500
        opened.execute("ROLLBACK")
    world.stop_server()
    right = {path: path.read_bytes() for path in world.server_data.glob("relfleet.db*")}
    for path in right:
        path.unlink()
    file.write_bytes(b"no database at all" * 999)
    for words in (("run",), ("doctor",), ("db", "current"), ("worker",)):
        code, _, _ = world.exit_of("release-server", *words, *data) if words != ("worker",) else (1, "", "")
        assert code != Exit.DONE
    for path, content in right.items():
        path.write_bytes(content)
    environ = {"RELFLEET_DATABASE_URL": AWAY}
    for words in (("run",), ("doctor",), ("db", "current"), ("db", "upgrade")):
        assert world.exit_of("release-server", *words, *data, environ=environ)[0] != Exit.DONE
    for words in (("config", "show"), ("config", "check")):
        assert world.exit_of("release-server", *words, *data, environ=environ)[0] == Exit.DONE
    world.start_server()


# --- the search ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with running(tmp_path_factory.mktemp("world"), Loud) as world:
        yield world


@pytest.fixture(scope="module")
def story(world):
    return tell(world)


def test_no_secret_is_in_anything_that_was_said(story):
    found = [
        f"{name} is in {where}: …{text[max(0, text.index(spelt) - 60) : text.index(spelt)]}"
        for name, secret in story.secrets.items()
        for spelt in spellings(secret)
        for where, text in story.said.items()
        if spelt in text
    ]
    assert found == []


def test_everybody_was_heard_and_every_kind_of_secret_was_there(story):
    assert all(story.said[name].strip() for name in ("server.log", "commands.log", "the signer's log"))
    assert sum(name.endswith("doctor.json") or ".log" in name for name in story.said) > 6
    assert len(story.said["what commands printed"]) > 10_000
    kinds = {re.sub(r"^.*('s |\.key|, )", "", name) for name in story.secrets}
    assert {"token", "session", "seed", "PEM", "passphrase"} <= kinds | set(story.secrets)


def test_the_search_finds_a_secret_however_it_is_written():
    secret = bytes(range(7, 39))
    for before in (b"", b"a", b"ab", b"abc", b"0123456789abcdef"):
        for after in (b"", b"z", b"yz"):
            for encode in (b64encode, urlsafe_b64encode, bytes.hex):
                text = encode(before + secret + after)
                text = text if isinstance(text, str) else text.decode()
                assert any(spelt in text for spelt in spellings(secret)), (before, after, encode)
