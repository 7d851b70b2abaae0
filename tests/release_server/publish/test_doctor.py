"""`release doctor` and `release open`: what may be wrong here has its sentence and its exit code."""

from __future__ import annotations

import json
import shutil
import socket
import sys
import threading
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from agent_core import clock
from agent_core.errors import Exit
from keys import signers
from release_server import auth, releases
from release_server.publish import doctor
from release_server.publish.profile import Said, resolve
from tests.release_server.publish.house import Desk, ceremony_at, serve


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("house") / "server") as running:
        yield running


@pytest.fixture(scope="module")
def root(house, tmp_path_factory):
    """The desk at which the fleet's keys were made."""
    desk = Desk(house, tmp_path_factory.mktemp("desks") / "root", role="admin")
    ceremony_at(desk, house)
    assert desk("key", "gen")[0] == Exit.DONE
    assert desk.json("whoami")["role"] == "admin"
    with house.hub.sessions.write() as session:
        releases.make_product(session, "demo", house.hub.clock(), "test")
    return desk


@pytest.fixture
def ada(house, root, tmp_path):
    """A release manager whose machine has all it needs."""
    desk = Desk(house, tmp_path / "ada")
    desk.take(*root.keys.glob("release*"), root.keys / "root.json")
    return desk


def findings(desk, code=Exit.DONE, **environ):
    """What is not as it should be, by check; and that the exit code is the expected one."""
    exit_code, out, said = desk("doctor", "--json", **environ)
    assert exit_code == code, (out, said)
    return {each["check"]: each for each in json.loads(out) if each["state"] != "ok"}


def test_where_all_is_well_each_check_says_so(ada):
    assert findings(ada) == {}
    code, out, _ = ada("doctor")
    lines = out.splitlines()
    assert code == Exit.DONE
    assert [line.split()[1] for line in lines] == [
        "server",
        "clock",
        "token",
        "product",
        "trust",
        "trust",
        "keys",
    ]
    assert all(line.startswith("ok") for line in lines)
    assert lines[2].endswith("ada, releaser; holds until it is revoked")
    assert "signs targets" in lines[-1]


def test_a_server_that_is_away_is_8_and_the_rest_is_told(ada):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        found = findings(ada, Exit.UNREACHABLE, RELFLEET_SERVER=url)
    assert found["server"]["state"] == "bad"
    assert "cannot be reached" in found["server"]["detail"]
    assert "keys" not in found


def test_no_token_and_one_that_is_not_known_are_4(ada, house):
    assert findings(ada, Exit.NOT_ALLOWED, RELFLEET_TOKEN="")["token"]["then"] == f"release login {house.url}"
    found = findings(ada, Exit.NOT_ALLOWED, RELFLEET_TOKEN="rft_" + "x" * 43)
    assert "not known here" in found["token"]["detail"]


class _Another(BaseHTTPRequestHandler):
    """Whatever answers everything with the JSON of something else."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'["hello"]')

    def log_message(self, *_):
        """Quiet."""


def test_answers_of_another_shape_are_findings(ada):
    with ThreadingHTTPServer(("127.0.0.1", 0), _Another) as another:
        thread = threading.Thread(target=another.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            found = findings(ada, Exit.TRUST, RELFLEET_SERVER=f"http://127.0.0.1:{another.server_port}")
        finally:
            another.shutdown()
            thread.join()
    assert (found["token"]["state"], "TypeError" in found["token"]["detail"]) == ("bad", True)
    assert "is no list" in found["product"]["detail"]


def test_a_token_that_ends_soon_is_worth_a_note(ada, house):
    with house.hub.sessions.write() as session:
        how = {"name": "ci", "role": auth.Role.READER, "actor": "test", "expires": timedelta(days=3)}
        token = auth.add_token(session, house.hub.clock(), **how)[1]
    found = findings(ada, RELFLEET_TOKEN=token)["token"]
    assert (found["state"], found["detail"].startswith("ci, reader; holds until 2")) == ("note", True)


def test_a_product_that_the_server_does_not_know_is_1(ada):
    assert "nothing" in findings(ada, Exit.FAILED, RELFLEET_PRODUCT="nothing")["product"]["detail"]


def test_a_root_of_another_fleet_is_3(ada, house, tmp_path):
    stranger = Desk(house, tmp_path / "stranger", role="admin")
    ceremony_at(stranger, house)
    shutil.copy(stranger.keys / "root.json", ada.keys / "root.json")
    assert findings(ada, Exit.TRUST)["trust"]["state"] == "bad"


def test_a_machine_without_root_and_keys_can_operate_and_is_told_what_it_cannot(ada):
    for file in ada.keys.iterdir():
        file.unlink()
    found = findings(ada)
    assert list(found) == ["trust"]
    assert found["trust"]["state"] == "note"


def test_a_key_that_others_can_read_is_3_and_one_of_no_root_a_note(ada):
    ada.make_key("release", "spare")
    found = findings(ada)["keys"]
    assert (found["state"], found["detail"].startswith("spare, ")) == ("note", True)
    (ada.keys / f"spare{signers.SUFFIX}").chmod(0o644)
    found = findings(ada, Exit.TRUST)["keys"]
    assert "others than its owner can open it" in found["detail"]


@pytest.mark.parametrize(
    ("off_s", "state", "word"),
    [(0, "ok", "agree"), (-119, "ok", "agree"), (300, "bad", "300 s ahead"), (-300, "bad", "300 s behind")],
)
def test_a_clock_that_is_off_is_told_with_which_way(off_s, state, word):
    now = clock.parse_iso("2026-05-01T12:00:00Z")
    (found,) = doctor._clock("Fri, 01 May 2026 12:00:00 GMT", now + timedelta(seconds=off_s))
    assert (found.state, word in found.detail) == (state, True)


def test_metadata_that_soon_expires_names_what_to_type(ada, make_client):
    profile = resolve(Said(), ada.environ, ada.home)
    client = make_client(profile.need_server(), profile.token)
    desk = doctor.Desk(profile, client, clock.now() + timedelta(days=330))
    said = [(found.state, found.then) for found in doctor._trust(desk)]
    assert said == [("note", "release key rotate"), ("note", "release renew")]


# --- the page ---------------------------------------------------------------------------------------------


def test_open_prints_the_address_where_there_is_no_terminal(ada, house):
    assert ada("open")[:2] == (Exit.DONE, f"{house.url}/\n")
    assert ada.json("open") == {"url": f"{house.url}/", "opened": False}


def test_open_starts_the_browser_on_a_terminal_and_never_hands_it_the_token(
    ada, house, tmp_path, monkeypatch
):
    seen = tmp_path / "seen"
    browser = tmp_path / "browser"
    browser.write_text(
        f"#!{sys.executable}\nimport sys\nopen({str(seen)!r}, 'w').write(' '.join(sys.argv[1:]))\n"
    )
    browser.chmod(0o755)
    monkeypatch.setattr("release_server.publish.commands.here.is_watched", lambda: True)
    code, out, _ = ada("open", BROWSER=f"{browser} %s")
    assert (code, out) == (Exit.DONE, f"{house.url}/\n")
    assert seen.read_text() == f"{house.url}/"
    seen.unlink()
    assert ada("open", "--print", BROWSER=f"{browser} %s")[0] == Exit.DONE
    assert not seen.exists()
