"""The operator commands against a real server on loopback that answers in the API's shapes."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import pty
import re
import shlex
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import click
import pytest

from agent_core import clock
from agent_core.errors import Exit
from release_server import audit_chain
from release_server.audit_chain import Head
from release_server.publish import words
from release_server.publish.cli import main
from release_server.publish.commands import agents as agents_commands
from release_server.publish.commands import rollout as rollout_commands
from release_server.publish.commands import token as token_commands
from release_server.publish.words import Amount

if TYPE_CHECKING:
    import pydantic

REPOSITORY = Path(__file__).parents[3]
PRODUCT = "warehouse-agent"
SECRET = "rlf_operator-token-of-the-test"


# --- a server in the API's shapes ------------------------------------------------------------------------


def cohort_of(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "product": PRODUCT,
        "name": name,
        "match": "region=eu,tier!=db",
        "priority": 10,
        "pin": None,
        "frozen": False,
        "frozen_until": None,
        "window": None,
        "splay_s": 0,
        "poll_s": 60,
        "report_s": 300,
        "revision": 3,
        "base": "1.4.2",
        "agents": 20,
        "actor": "ada",
        "reason": "",
        "created_at": "2026-01-01T12:00:00Z",
    } | changes


def rollout_of(**changes: Any) -> dict[str, Any]:
    gate = {"soak_s": 0, "max_failed": 0, "max_failed_bp": None, "min_sample": 1, "deadline_s": 7_200}
    return {
        "id": 31,
        "name": "r-31",
        "product": PRODUCT,
        "cohort": "eu-web",
        "version": "1.5.0",
        "base": "1.4.2",
        "salt": "9c1f",
        "state": "running",
        "stage": 0,
        "stage_state": "open",
        "progress": 500,
        "reason": "",
        "detail": "",
        "stages": [{"share_bp": None, "count": count, **gate} for count in (1, 5, 20)],
        "members": 20,
        "counters": {"offered": 1, "trial": 1, "healthy": 2},
        "created_at": "2026-01-31T11:00:00Z",
        "created_by": "ada",
        "opened_at": "2026-01-31T11:00:00Z",
        "soaking_since": None,
        "finished_at": None,
        "events": [
            {
                "at": "2026-01-31T11:00:00Z",
                "event": "opened",
                "stage": 0,
                "reason": "",
                "detail": "",
                "numbers": {},
                "actor": "",
            }
        ],
    } | changes


REHEARSED = {
    "version": "1.5.0",
    "base": "1.4.2",
    "approval": False,
    "agents": 40,
    "stages": [{"opens_at": "2026-11-27T02:00:00Z", "progress": 100, "agents": 1, "names": ["web-17"]}],
    "done_at": "2026-11-27T04:00:00Z",
}
COMPLETED = rollout_of(
    state="completed", stage=2, stage_state="passed", progress=10_000, counters={"healthy": 20}
)
HALTED = rollout_of(
    state="paused", stage_state="halted", reason="max-failed", detail="1 of 1 failed (limit 0)"
)
BY_HAND = rollout_of(state="paused", reason="manual")


def agent_of(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "id": name,
        "product": PRODUCT,
        "platform": "linux-x86_64",
        "gate": "",
        "labels": {"region": "eu"},
        "operator_labels": {"tier": "web"},
        "inventory": {"os": "linux", "kernel": "6.1.0"},
        "cohort": "eu-web",
        "cohort_fixed": False,
        "version": "1.4.2",
        "digest": "a1b2c3d4e5f6",
        "phase": "idle",
        "reason": "up-to-date",
        "detail": "",
        "held": False,
        "figures": {},
        "enrolled_at": "2026-01-01T12:00:00Z",
        "seen_at": "2026-01-31T11:59:00Z",
        "retired_at": None,
        "state": "ok",
        "events": [],
    } | changes


WHY = {
    "agent": "web-17",
    "summary": "web-17 runs 1.4.2; its cohort eu-web is moving to 1.5.0. It is not updating because:",
    "chain": [
        {"ok": True, "code": "reported", "text": "reported 42 s ago"},
        {"ok": True, "code": "cohort", "text": "cohort eu-web"},
        {
            "ok": False,
            "code": "not-yet",
            "text": "rollout r-31 is at 10%; this agent's place is 63%.",
            "then": "to move it now:  release agents move web-17 --cohort canary",
        },
    ],
}

TOKENS = [
    {
        "id": 3,
        "name": "ci",
        "role": "releaser",
        "product": PRODUCT,
        "uses_left": None,
        "created_at": "2026-01-01T12:00:00Z",
        "created_by": "ada",
        "expires_at": "2020-01-01T12:00:00Z",
        "used_at": None,
        "revoked_at": None,
    },
    {
        "id": 4,
        "name": "racks",
        "role": "enroller",
        "product": None,
        "uses_left": 12,
        "created_at": "2026-01-01T12:00:00Z",
        "created_by": "ada",
        "expires_at": None,
        "used_at": "2026-01-01T12:00:00Z",
        "revoked_at": None,
    },
    {
        "id": 5,
        "name": "old",
        "role": "reader",
        "product": None,
        "uses_left": None,
        "created_at": "2026-01-01T12:00:00Z",
        "created_by": "ada",
        "expires_at": None,
        "used_at": None,
        "revoked_at": "2026-01-02T12:00:00Z",
    },
]


@dataclass
class Seen:
    """One request as it arrived."""

    method: str
    path: str
    query: dict[str, list[str]]
    body: Any
    token: str


@dataclass
class Fleet:
    """Answers by method and path; each path may have several answers, the last of which stays."""

    url: str = ""
    seen: list[Seen] = field(default_factory=list)
    answers: dict[tuple[str, str], list[tuple[int, Any]]] = field(default_factory=dict)

    def on(self, method: str, path: str, *bodies: Any, status: int = 200) -> None:
        self.answers[method, f"/api/v1{path}"] = [(status, body) for body in bodies]

    def refuse(
        self, method: str, path: str, status: int, reason: str, title: str = "no", then: str = ""
    ) -> None:
        problem = {"type": f"urn:relfleet:problem:{reason}", "status": status, "title": title}
        self.on(method, path, {**problem, "detail": "", "reason": reason, "then": then}, status=status)

    def take(self, seen: Seen) -> tuple[int, Any]:
        self.seen.append(seen)
        found = self.answers.get((seen.method, seen.path))
        if found is None:
            problem = {"status": 404, "title": f"there is no {seen.path}", "reason": "not-found"}
            return 404, problem
        return found.pop(0) if len(found) > 1 else found[0]

    def sent(self, method: str, path: str) -> Any:
        """The body of the only such request."""
        (body,) = [seen.body for seen in self.seen if (seen.method, seen.path) == (method, f"/api/v1{path}")]
        return body

    def changed(self) -> list[str]:
        """Every request that was not a look."""
        return [f"{seen.method} {seen.path}" for seen in self.seen if seen.method != "GET"]


def handler_of(fleet: Fleet) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            url = urlsplit(self.path)
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            body = json.loads(raw) if raw else None
            status, answer = fleet.take(Seen(self.command, url.path, parse_qs(url.query), body, token))
            payload = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            kind = "application/problem+json" if status >= 400 else "application/json"
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(payload)))
            self.end_headers()
            self.wfile.write(payload)

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def log_message(self, *args: object) -> None:
            pass

    return Handler


@pytest.fixture
def fleet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fleet]:
    """A server, and a working directory whose `relfleet.toml` names it and the product."""
    served = Fleet()
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(served))
    server.daemon_threads = True
    served.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    (tmp_path / "relfleet.toml").write_text(
        f'[product]\nname = "{PRODUCT}"\n[server]\nurl = "{served.url}"\n'
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RELFLEET_TOKEN", SECRET)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    for name in ("RELFLEET_SERVER", "RELFLEET_PRODUCT", "RELFLEET_PROFILE", "RELFLEET_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    stock(served)
    yield served
    server.shutdown()
    thread.join()
    server.server_close()


def stock(fleet: Fleet) -> None:
    """What most tests look at."""
    here = f"/cohorts/{PRODUCT}"
    eu_web = cohort_of("eu-web")
    fleet.on("GET", "/cohorts", {"items": [eu_web, cohort_of("db", pin="1.4.0", agents=1)]})
    fleet.on("GET", f"{here}/eu-web", eu_web)
    fleet.on("GET", f"{here}/eu-web/preview", PREVIEW)
    fleet.on("POST", "/cohorts", cohort_of("eu-web"), status=201)
    fleet.on("PATCH", f"{here}/eu-web", cohort_of("eu-web"))
    fleet.on("DELETE", f"{here}/eu-web", None, status=204)
    for verb in ("pin", "unpin", "freeze", "unfreeze"):
        fleet.on("POST", f"{here}/eu-web/{verb}", eu_web)
    fleet.on("GET", "/rollouts", {"items": [rollout_of(), COMPLETED | {"id": 32, "name": "r-32"}]})
    fleet.on("GET", "/rollouts/31", rollout_of())
    fleet.on("POST", "/rollouts", rollout_of(), status=201)
    fleet.on("POST", "/rollouts/rehearse", REHEARSED)
    for verb in ("pause", "resume", "advance", "abort", "retry", "undo", "approve"):
        fleet.on("POST", f"/rollouts/31/{verb}", rollout_of())
    fleet.on("GET", "/agents", {"items": [agent_of("web-17"), agent_of("web-18", state="silent")]})
    fleet.on("GET", "/agents/web-17", agent_of("web-17"))
    fleet.on("GET", "/agents/web-17/why", WHY)
    for verb in ("move", "label", "retire", "accept", "reject"):
        fleet.on("POST", f"/agents/web-17/{verb}", agent_of("web-17"))
    fleet.on("GET", "/tokens", {"items": TOKENS})
    fleet.on("POST", "/tokens", TOKENS[0] | {"id": 7, "token": "rlf_new-secret"}, status=201)
    fleet.on("DELETE", "/tokens/7", None, status=204)
    fleet.on("GET", "/audit", {"items": AUDIT})


PREVIEW = {
    "cohort": "eu-web",
    "match": "region=eu",
    "agents": ["web-17", "web-18"],
    "joins": ["web-18"],
    "leaves": ["db-01"],
}
AUDIT = [
    {
        "id": 2,
        "at": "2026-01-31T11:05:00Z",
        "actor": "bob",
        "action": "rollout.pause",
        "subject": "r-31",
        "detail": {"reason": "odd graphs"},
    },
    {
        "id": 1,
        "at": "2026-01-31T11:00:00Z",
        "actor": "ada",
        "action": "rollout.start",
        "subject": "r-31",
        "detail": {},
    },
]


@dataclass
class Ran:
    code: int
    out: str
    err: str


Release = Callable[..., Ran]


@pytest.fixture
def release(fleet: Fleet, capsys: pytest.CaptureFixture[str]) -> Release:
    def run(*words: str) -> Ran:
        capsys.readouterr()
        code = main(list(words))
        said = capsys.readouterr()
        return Ran(code, said.out, said.err)

    return run


# --- every command: exit code, what is on stdout, JSON ---------------------------------------------------

LOOKS = [
    "cohort list",
    "cohort show eu-web",
    "cohort preview eu-web",
    "rollout list",
    "rollout list --cohort eu-web",
    "rollout status",
    "rollout status r-31",
    "rollout status 31",
    "rollout history r-31",
    "rollout history",
    "agents list",
    "agents show web-17",
    "agents why web-17",
    "agents export",
    "token list",
    "audit log",
]
DEEDS = [
    ("cohort create eu-web --match region=eu", "POST /cohorts"),
    ("cohort edit eu-web --priority 5", f"PATCH /cohorts/{PRODUCT}/eu-web"),
    ("cohort pin eu-web 1.4.2 -m calm --yes", f"POST /cohorts/{PRODUCT}/eu-web/pin"),
    ("cohort unpin eu-web", f"POST /cohorts/{PRODUCT}/eu-web/unpin"),
    ("cohort freeze eu-web --reason holidays", f"POST /cohorts/{PRODUCT}/eu-web/freeze"),
    ("cohort unfreeze eu-web", f"POST /cohorts/{PRODUCT}/eu-web/unfreeze"),
    ("rollout start 1.5.0 --cohort eu-web", "POST /rollouts"),
    ("rollout pause r-31", "POST /rollouts/31/pause"),
    ("rollout resume r-31", "POST /rollouts/31/resume"),
    ("rollout advance r-31", "POST /rollouts/31/advance"),
    ("rollout undo r-31 --yes", "POST /rollouts/31/undo"),
    (f"rollout approve r-31 --digest {'a' * 64}", "POST /rollouts/31/approve"),
    ("rollout abort r-31", "POST /rollouts/31/abort"),
    ("rollout abort r-31 --rollback --yes", "POST /rollouts/31/abort"),
    ("rollout retry r-31", "POST /rollouts/31/retry"),
    ("rollout retry r-31 --failed", "POST /rollouts/31/retry"),
    ("agents move web-17 --cohort canary", "POST /agents/web-17/move"),
    ("agents label web-17 tier=db", "POST /agents/web-17/label"),
    ("agents retire web-17 --yes", "POST /agents/web-17/retire"),
    ("agents accept web-17 --yes", "POST /agents/web-17/accept"),
    ("agents reject web-17 --yes", "POST /agents/web-17/reject"),
    ("token create --role reader", "POST /tokens"),
]
SILENT_DEEDS = [
    ("cohort delete eu-web --yes", f"DELETE /cohorts/{PRODUCT}/eu-web"),
    ("token revoke 7 --yes", "DELETE /tokens/7"),
]


def test_a_revoked_token_leaves_those_that_were_made_with_it() -> None:
    def entry(number: int, name: str, by: str, **changes: Any) -> dict[str, Any]:
        ends = {"revoked_at": None, "expires_at": None}
        return {"id": number, "name": name, "created_by": by} | ends | changes

    found = [
        entry(1, "eve", "admin", revoked_at="2026-01-31T12:00:00Z"),
        entry(2, "helper", "eve"),
        entry(3, "gone", "eve", expires_at="2026-01-31T12:00:00Z"),
        entry(4, "taken back", "eve", revoked_at="2026-01-31T12:00:00Z"),
        entry(5, "another's", "admin"),
    ]
    assert [token["id"] for token in token_commands.made_with(found, 1)] == [2]
    assert token_commands.made_with(found, 9) == []


@pytest.mark.parametrize("words", LOOKS)
def test_a_look_exits_0_says_nothing_on_stderr_and_changes_nothing(
    release: Release, fleet: Fleet, words: str
) -> None:
    ran = release(*words.split())
    assert (ran.code, ran.err) == (0, "")
    assert ran.out.strip()
    assert "\x1b" not in ran.out
    assert fleet.changed() == []


@pytest.mark.parametrize(("words", "request_line"), DEEDS, ids=[row[0] for row in DEEDS])
def test_a_deed_is_one_request_and_exits_0(
    release: Release, fleet: Fleet, words: str, request_line: str
) -> None:
    ran = release(*words.split())
    assert ran.code == 0, ran.err
    assert fleet.changed() == [request_line.replace(" /", " /api/v1/")]
    assert ran.out.strip()


EVERYTHING_SAID = [
    "cohort create c --match a=b --release 1.0 --priority 1 --window always --poll 1m --report 5m --splay 1m",
    "cohort create c --window 'mon 10:00-11:00 UTC'",
    "cohort edit eu-web --match a=b --priority 1 --poll 1m --report 5m --splay 1m --window always -m x --yes",
    "cohort freeze eu-web --until 2h -m x",
    "cohort unpin eu-web -m x",
    "cohort unfreeze eu-web -m x",
    "rollout start 1.5.0 --cohort c --steps 1,50% --max-failed 0 --supersede -m x",
    (
        "rollout start 1.5.0 --cohort c --steps 1:soak=2h:max-failed=5%,50%:min-sample=3 "
        "--max-silent 2 --at 2h --draft --approval --stratified --downgrade"
    ),
    "rollout rehearse 1.5.0 --cohort c --steps 1,50%",
    "cohort edit eu-web --approval --lease site=2",
    "cohort create c --lease rack=10%",
    "cohort edit eu-web --lease none",
    "cohort edit eu-web --budget site=500kB",
    "cohort create c --budget site=2MB,4",
    "cohort edit eu-web --budget none",
    "rollout abort r-31 --rollback -m x --yes",
    "rollout pause r-31 -m x",
    "agents move web-17 --by-labels -m x",
    "agents label web-17 a=b -m x",
    "agents retire web-17 -m x --yes",
    "agents accept web-17 -m x --yes",
    "token create --role enroller --uses 2 --product p --name n --expires 1d",
    "token create --role enroller --approve --product p --cohort c -l a=b,c=d",
]


def body_shape(seen: Seen) -> type[pydantic.BaseModel]:
    """The shape that the real server wants of a body."""
    from release_server.api import fleet_schemas as shapes
    from release_server.api.tokens import NewToken

    path = seen.path.removeprefix("/api/v1/")
    special = {
        "POST cohorts": shapes.NewCohort,
        "PATCH cohorts": shapes.CohortChange,
        "POST cohorts pin": shapes.Pin,
        "POST cohorts freeze": shapes.Freeze,
        "POST rollouts": shapes.NewRollout,
        "POST rollouts abort": shapes.Abort,
        "POST rollouts approve": shapes.Approve,
        "POST rollouts rehearse": shapes.Rehearsal,
        "POST agents move": shapes.Move,
        "POST agents label": shapes.Labels,
        "POST tokens": NewToken,
    }
    noun, *rest = path.split("/")
    verb = f" {rest[-1]}" if seen.method == "POST" and rest else ""
    return special.get(f"{seen.method} {noun}{verb}", shapes.Because)


@pytest.mark.parametrize("words", [*(row[0] for row in DEEDS), *EVERYTHING_SAID])
def test_the_real_server_takes_every_body_that_is_sent(release: Release, fleet: Fleet, words: str) -> None:
    assert release(*shlex.split(words)).code == 0
    (seen,) = [seen for seen in fleet.seen if seen.method != "GET"]
    body_shape(seen).model_validate(seen.body)


@pytest.mark.parametrize(("words", "request_line"), SILENT_DEEDS, ids=[row[0] for row in SILENT_DEEDS])
def test_what_is_gone_leaves_nothing_on_stdout(
    release: Release, fleet: Fleet, words: str, request_line: str
) -> None:
    ran = release(*words.split())
    assert (ran.code, ran.out) == (0, "")
    assert fleet.changed() == [request_line.replace(" /", " /api/v1/")]


@pytest.mark.parametrize("words", [*LOOKS, *(row[0] for row in DEEDS)])
def test_with_json_stdout_is_json_and_nothing_else(release: Release, words: str) -> None:
    ran = release(*words.split(), "--json")
    assert ran.code == 0
    assert isinstance(json.loads(ran.out), (dict, list))


@pytest.mark.parametrize("words", [*LOOKS, *(row[0] for row in DEEDS), *(row[0] for row in SILENT_DEEDS)])
def test_quiet_keeps_stderr_empty(release: Release, words: str) -> None:
    assert release(*words.split(), "-q").err == ""


def test_requests_carry_the_token_and_nothing_prints_it(release: Release, fleet: Fleet) -> None:
    ran = release("cohort", "list", "-v")
    assert {seen.token for seen in fleet.seen} == {SECRET}
    assert SECRET not in ran.out + ran.err


REFUSALS = [
    (401, "not-signed-in", Exit.NOT_ALLOWED),
    (403, "not-allowed", Exit.NOT_ALLOWED),
    (404, "not-found", Exit.NOT_FOUND),
    (409, "conflict", Exit.CONFLICT),
    (422, "malformed", Exit.USAGE),
]
BY_GROUP = {
    "cohort show eu-web": ("GET", f"/cohorts/{PRODUCT}/eu-web"),
    "cohort freeze eu-web -m x": ("POST", f"/cohorts/{PRODUCT}/eu-web/freeze"),
    "rollout start 1.5.0 --cohort eu-web": ("POST", "/rollouts"),
    "rollout status r-31 --watch": ("GET", "/rollouts/31"),
    "agents why web-17": ("GET", "/agents/web-17/why"),
    "token create --role reader": ("POST", "/tokens"),
    "audit log": ("GET", "/audit"),
}


@pytest.mark.parametrize(("status", "reason", "code"), REFUSALS, ids=[row[1] for row in REFUSALS])
@pytest.mark.parametrize("words", BY_GROUP)
def test_what_the_server_refuses_becomes_the_exit_code(
    release: Release, fleet: Fleet, words: str, status: int, reason: str, code: Exit
) -> None:
    fleet.refuse(*BY_GROUP[words], status, reason, "eu-web is frozen", "release cohort unfreeze eu-web")
    ran = release(*words.split())
    assert (ran.code, ran.out) == (code, "")
    assert "eu-web is frozen" in ran.err
    assert "release cohort unfreeze eu-web" in ran.err
    said = release(*words.split(), "--json")
    assert json.loads(said.err.splitlines()[-1])["error"]["reason"] == reason


@pytest.mark.parametrize("words", BY_GROUP)
def test_a_server_that_is_away_is_8(release: Release, words: str) -> None:
    ran = release(*words.split(), "--server", "http://127.0.0.1:9", "--timeout", "0.2s")
    assert (ran.code, ran.out) == (Exit.UNREACHABLE, "")


def test_without_a_product_the_call_is_refused_with_what_to_do(
    release: Release, tmp_path: Path, fleet: Fleet
) -> None:
    (tmp_path / "relfleet.toml").write_text(f'[server]\nurl = "{fleet.url}"\n')
    ran = release("cohort", "list")
    assert ran.code == Exit.USAGE
    assert "--product" in ran.err
    assert fleet.seen == []


def test_the_product_of_the_call_wins_over_the_file(release: Release, fleet: Fleet) -> None:
    assert release("cohort", "list", "--product", "other").code == 0
    assert fleet.seen[-1].query == {"product": ["other"]}


# --- destructive verbs -----------------------------------------------------------------------------------

DESTRUCTIVE = [
    ("cohort delete eu-web", "20 agents"),
    ("cohort pin eu-web 1.4.2 --reason calm", "20 agents"),
    ("cohort edit eu-web --match region=us", "2 agents: 1 join, 1 leave"),
    ("rollout abort r-31 --rollback", "3 agents back from 1.5.0 to 1.4.2"),
    ("agents retire web-17", "1 agent;"),
    ("agents accept web-17", "1 agent"),
    ("agents accept --all", "2 agents"),
    ("agents reject --all", "2 agents"),
    ("token revoke 7", "token 7"),
]


@pytest.mark.parametrize(("words", "reach"), DESTRUCTIVE, ids=[row[0] for row in DESTRUCTIVE])
def test_without_a_terminal_a_destructive_verb_needs_yes_and_says_how_far_it_reaches(
    release: Release, fleet: Fleet, words: str, reach: str
) -> None:
    ran = release(*words.split())
    assert ran.code == Exit.USAGE
    assert reach in ran.err
    assert "--yes" in ran.err
    assert fleet.changed() == []


PROGRAM = "import sys; from release_server.publish.cli import main; sys.exit(main(sys.argv[1:]))"


def on_terminal(words: list[str], typed: bytes) -> tuple[int, str]:
    """Run the program with a terminal, type something, and give its exit code and everything it showed."""
    terminal, end = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *words],
        stdin=end,
        stdout=end,
        stderr=end,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm"},
        start_new_session=True,
    ) as program:
        os.close(end)
        os.write(terminal, typed)
        shown = b"".join(iter(lambda: read_terminal(terminal), b""))
        os.close(terminal)
    return program.returncode, shown.decode(errors="replace")


def read_terminal(terminal: int) -> bytes:
    """What the terminal shows next; nothing when nobody writes to it any more (Linux: an error)."""
    try:
        return os.read(terminal, 65_536)
    except OSError:
        return b""


def test_on_a_terminal_a_destructive_verb_asks_and_no_means_no(fleet: Fleet) -> None:
    code, shown = on_terminal(["cohort", "delete", "eu-web"], b"n\n")
    assert code == Exit.USAGE
    assert "reaches 20 agents" in shown
    assert fleet.changed() == []


def test_on_a_terminal_yes_goes_on(fleet: Fleet) -> None:
    code, shown = on_terminal(["cohort", "delete", "eu-web"], b"y\n")
    assert code == 0, shown
    assert fleet.changed() == [f"DELETE /api/v1/cohorts/{PRODUCT}/eu-web"]


@pytest.mark.parametrize("verb", ["accept", "reject"])
def test_only_agents_that_wait_are_answered(release: Release, fleet: Fleet, verb: str) -> None:
    ran = release("agents", verb, "web-17", "web-99", "--yes")
    assert ran.code == Exit.NOT_FOUND
    assert "web-99 does not wait" in ran.err
    assert release("agents", verb, "--yes").code == Exit.USAGE
    assert fleet.changed() == []
    assert fleet.seen[-1].query["state"] == ["pending"]
    fleet.on("GET", "/agents", {"items": []})
    ran = release("agents", verb, "--all", "--yes")
    assert (ran.code, "no agent waits" in ran.err) == (0, True)


def test_agents_that_do_not_exist_are_found_out_before_any_is_retired(release: Release, fleet: Fleet) -> None:
    ran = release("agents", "retire", "web-17", "web-99", "--yes")
    assert ran.code == Exit.NOT_FOUND
    assert fleet.changed() == []


# --- what is sent ----------------------------------------------------------------------------------------


def test_create_sends_what_was_said_and_leaves_the_rest_to_the_server(release: Release, fleet: Fleet) -> None:
    words = ["--match", "region=eu,tier!=db", "--release", "1.4.2", "--priority", "5", "--poll", "30s"]
    release("cohort", "create", "eu-web", *words, "--window", "fri-mon 22:00-04:00 Europe/Berlin")
    assert fleet.sent("POST", "/cohorts") == {
        "product": PRODUCT,
        "name": "eu-web",
        "match": "region=eu,tier!=db",
        "release": "1.4.2",
        "priority": 5,
        "poll_s": 30,
        "window": {
            "days": ["fri", "sat", "sun", "mon"],
            "from": "22:00",
            "to": "04:00",
            "zone": "Europe/Berlin",
        },
    }


def test_edit_sends_only_what_changes(release: Release, fleet: Fleet) -> None:
    release("cohort", "edit", "eu-web", "--report", "5m", "--window", "always", "-m", "quieter")
    assert fleet.sent("PATCH", f"/cohorts/{PRODUCT}/eu-web") == {
        "report_s": 300,
        "window": None,
        "reason": "quieter",
    }


def test_edit_without_a_change_is_a_usage_error(release: Release, fleet: Fleet) -> None:
    ran = release("cohort", "edit", "eu-web", "--reason", "none")
    assert ran.code == Exit.USAGE
    assert "nothing to change" in ran.err
    assert fleet.seen == []


@pytest.mark.parametrize("verb", ["pin eu-web 1.4.2", "freeze eu-web"])
def test_what_holds_a_cohort_needs_a_reason(release: Release, fleet: Fleet, verb: str) -> None:
    ran = release("cohort", *verb.split(), "--yes")
    assert ran.code == Exit.USAGE
    assert "--reason" in ran.err
    assert fleet.seen == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("cohort delete eu-web", {"name": "eu-web", "deleted": True}),
        ("token revoke 7", {"id": 7, "revoked": True, "made_with_it": []}),
    ],
)
def test_what_is_gone_is_said_to_scripts_too(release: Release, words: str, said: dict[str, Any]) -> None:
    ran = release(*words.split(), "--yes", "--json")
    assert (ran.code, json.loads(ran.out)) == (0, said)
    assert release(*words.split(), "--yes").out == ""


def test_freeze_until_takes_a_time_or_how_long_from_now(release: Release, fleet: Fleet) -> None:
    release("cohort", "freeze", "eu-web", "--until", "2026-12-27T08:00:00Z", "-m", "x")
    assert fleet.seen[-1].body == {"until": "2026-12-27T08:00:00Z", "reason": "x"}
    release("cohort", "freeze", "eu-web", "--until", "36h", "-m", "x")
    ahead = clock.parse_iso(fleet.seen[-1].body["until"]) - clock.now()
    assert 35.9 < ahead.total_seconds() / 3_600 <= 36


def test_freeze_all_freezes_what_is_not_frozen_yet_and_asks_first(release: Release, fleet: Fleet) -> None:
    frozen = cohort_of("db", frozen=True)
    fleet.on("GET", "/cohorts", {"items": [cohort_of("eu-web"), frozen]})
    assert release("cohort", "freeze", "--all", "-m", "fire").code == Exit.USAGE
    ran = release("cohort", "freeze", "--all", "-m", "fire", "--yes")
    assert (ran.code, ran.err.count("frozen")) == (0, 1)
    assert [each.body for each in fleet.seen if each.body] == [{"reason": "fire"}]
    assert release("cohort", "freeze", "eu-web", "--all", "-m", "x").code == Exit.USAGE


def test_start_sends_each_step_with_its_gate(release: Release, fleet: Fleet) -> None:
    words = "--steps 1,50%,100% --soak 10m --max-failed 2 --min-sample 3 --deadline 1d -m spring"
    ran = release("rollout", "start", "1.5.0", "--cohort", "eu-web", *words.split())
    gate = {"soak_s": 600, "max_failed": 2, "min_sample": 3, "deadline_s": 86_400}
    assert fleet.sent("POST", "/rollouts") == {
        "product": PRODUCT,
        "cohort": "eu-web",
        "version": "1.5.0",
        "stages": [{"count": 1, **gate}, {"share_bp": 5_000, **gate}, {"share_bp": 10_000, **gate}],
        "reason": "spring",
    }
    assert "release rollout status r-31 --watch" in ran.err
    assert ran.out.startswith("r-31  ")


def test_one_that_is_appointed_is_not_said_to_have_started(release: Release, fleet: Fleet) -> None:
    terms = {"not_before": "2030-01-01T02:00:00Z"}
    fleet.on("POST", "/rollouts", rollout_of(state="scheduled", stage_state="pending", terms=terms))
    words = ("--at", "2030-01-01T02:00:00Z")
    ran = release("rollout", "start", "1.5.0", "--cohort", "eu-web", *words)
    assert fleet.sent("POST", "/rollouts")["terms"] == terms
    assert "r-31 is scheduled, not before 2030-01-01T02:00:00Z" in ran.err
    assert "started" not in ran.err


def test_one_that_waits_for_something_else_than_its_time_is_told_without_a_time(
    release: Release, fleet: Fleet
) -> None:
    """As while a stop file stands."""
    waits = rollout_of(state="scheduled", stage_state="pending", terms={"not_before": None})
    fleet.on("POST", "/rollouts", waits)
    ran = release("rollout", "start", "1.5.0", "--cohort", "eu-web")
    assert "r-31 is scheduled; what it waits for: release rollout why r-31" in ran.err


def test_a_step_may_have_a_gate_of_its_own(release: Release, fleet: Fleet) -> None:
    words = "--steps 1%:soak=2h:max-failed=0,100% --max-failed 5%"
    release("rollout", "start", "1.5.0", "--cohort", "eu-web", *words.split())
    first, last = fleet.sent("POST", "/rollouts")["stages"]
    assert (first["soak_s"], first["max_failed"], last["soak_s"], last["max_failed_bp"]) == (
        7200,
        0,
        1800,
        500,
    )
    assert "max_failed_bp" not in first


def test_a_rehearsal_prints_whom_each_step_reaches(release: Release) -> None:
    ran = release("rollout", "rehearse", "1.5.0", "--cohort", "eu-web")
    assert "1.4.2 → 1.5.0, 40 agents" in ran.out
    assert "web-17" in ran.out


def test_start_supersedes_only_when_told(release: Release, fleet: Fleet) -> None:
    release("rollout", "start", "1.5.0", "--cohort", "eu-web")
    assert "supersede" not in fleet.seen[-1].body
    release("rollout", "start", "1.5.0", "--cohort", "eu-web", "--supersede")
    assert fleet.seen[-1].body["supersede"] is True


def test_a_match_that_moves_nobody_is_changed_without_asking(release: Release, fleet: Fleet) -> None:
    fleet.on("GET", f"/cohorts/{PRODUCT}/eu-web/preview", PREVIEW | {"joins": [], "leaves": []})
    assert release("cohort", "edit", "eu-web", "--match", "region=eu").code == 0
    assert fleet.sent("PATCH", f"/cohorts/{PRODUCT}/eu-web") == {"match": "region=eu"}


def test_an_agent_is_moved_by_hand_or_left_to_its_labels(release: Release, fleet: Fleet) -> None:
    release("agents", "move", "web-17", "--cohort", "canary", "-m", "first to try")
    assert fleet.seen[-1].body == {"cohort": "canary", "reason": "first to try"}
    release("agents", "move", "web-17", "--by-labels")
    assert fleet.seen[-1].body == {"cohort": None}


def test_every_page_of_agents_is_read(release: Release, fleet: Fleet) -> None:
    pages = [{"items": [agent_of(f"web-{number}")], "next": f"web-{number}"} for number in (1, 2)]
    fleet.on("GET", "/agents", *pages, {"items": [agent_of("web-3")], "next": None})
    listed = json.loads(release("agents", "list", "--state", "ok", "--json").out)
    assert [agent["id"] for agent in listed] == ["web-1", "web-2", "web-3"]
    assert [seen.query.get("after") for seen in fleet.seen] == [None, ["web-1"], ["web-2"]]
    assert {tuple(seen.query["state"]) for seen in fleet.seen} == {("ok",)}


def test_an_answer_that_is_no_list_is_a_failure_and_no_traceback(release: Release, fleet: Fleet) -> None:
    fleet.on("GET", "/agents", ["surprise"])
    ran = release("agents", "list")
    assert (ran.code, ran.out) == (Exit.FAILED, "")
    assert "no list" in ran.err


def test_start_has_the_defaults_of_its_help(release: Release, fleet: Fleet) -> None:
    release("rollout", "start", "1.5.0", "--cohort", "eu-web")
    stages = fleet.sent("POST", "/rollouts")["stages"]
    assert [stage["share_bp"] for stage in stages] == [100, 1_000, 5_000, 10_000]
    assert stages[0] == {
        "share_bp": 100,
        "soak_s": 1_800,
        "max_failed_bp": 100,
        "min_sample": 1,
        "deadline_s": 7_200,
    }


def test_abort_says_whether_agents_go_back(release: Release, fleet: Fleet) -> None:
    release("rollout", "abort", "r-31", "-m", "bad")
    assert fleet.seen[-1].body == {"rollback": False, "reason": "bad"}
    release("rollout", "abort", "r-31", "--rollback", "--yes")
    assert fleet.seen[-1].body == {"rollback": True}


def test_list_sends_every_filter(release: Release, fleet: Fleet) -> None:
    words = "-l region=eu,tier=web -l rack=7 --version 1.4.2 --state silent --cohort eu-web"
    release("agents", "list", *words.split())
    assert fleet.seen[-1].query == {
        "product": [PRODUCT],
        "match": ["region=eu,tier=web,rack=7"],
        "version": ["1.4.2"],
        "state": ["silent"],
        "cohort": ["eu-web"],
    }


def test_labels_are_added_and_removed_and_the_others_kept(release: Release, fleet: Fleet) -> None:
    release("agents", "label", "web-17", "rack=7,row=2", "tier-", "note=a-")
    assert fleet.sent("POST", "/agents/web-17/label") == {"labels": {"rack": "7", "row": "2", "note": "a-"}}


def test_names_are_quoted_in_the_url(release: Release, fleet: Fleet) -> None:
    release("agents", "show", "../tokens?x=1")
    assert fleet.seen[-1].path == "/api/v1/agents/..%2Ftokens%3Fx%3D1"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("rollout start 1.5.0 --cohort c --steps 1%,101%", "'101%' is more than all"),
        ("rollout start 1.5.0 --cohort c --steps 10%,5%", "each step must reach further than the one before"),
        ("rollout start 1.5.0 --cohort c --steps 5,5", "each step must reach further than the one before"),
        ("rollout start 1.5.0 --cohort c --steps 0%,5%", "a step of 0 reaches nobody"),
        ("rollout start 1.5.0 --cohort c --steps ,", "there is no step"),
        ("rollout start 1.5.0 --cohort c --steps 5:slow=1", "'slow=1' is not one of soak, deadline"),
        ("rollout start 1.5.0 --cohort c --steps 1.5", "neither a share such as 10% nor a number"),
        ("rollout start 1.5.0 --cohort c --steps many", "neither a share such as 10% nor a number"),
        ("rollout start 1.5.0 --cohort c --steps 0.001%", "finer than a hundredth of a percent"),
        ("rollout start 1.5.0 --cohort c --soak soon", "'soon' is not a duration such as 30s, 15m, 2h"),
        ("rollout start 1.5.0 --cohort c --soak 1.5s", "not a whole number of seconds"),
        ("rollout start 1.5.0 --cohort c --max-failed -1", "neither a share"),
        ("rollout start 1.5.0", "--cohort"),
        ("rollout status r-0", "'r-0' is not a rollout such as r-31"),
        ("rollout pause eu-web", "'eu-web' is not a rollout such as r-31"),
        ("cohort freeze c -m x --until tomorrow", "'tomorrow' is neither a time such as"),
        ("cohort freeze c -m x --until 99999999999d", "is neither a time such as"),
        ("cohort create c --window nights", "is not a window such as"),
        ("agents list -l region<x", "the match cannot be read at 'x'"),
        ("agents list -l Region=eu", "the match cannot be read at 'Region'"),
        ("agents list --state lost", "lost"),
        ("agents label web-17 tier", "'tier' is not a label such as region=eu"),
        ("agents export --csv --json", "exclude each other"),
        ("agents move web-17", "either --cohort NAME or --by-labels"),
        ("agents move web-17 --cohort c --by-labels", "either --cohort NAME or --by-labels"),
        ("token create --role root", "root"),
        ("token create", "--role"),
        ("audit log --limit 0", "0"),
        ("cohort lost", "No such command 'lost'"),
        ("agents wy web-17", "'why'"),
    ],
)
def test_words_that_are_off_are_told_and_nothing_is_asked_of_the_server(
    release: Release, fleet: Fleet, words: str, complaint: str
) -> None:
    ran = release(*words.split())
    assert (ran.code, ran.out) == (Exit.USAGE, "")
    assert complaint in ran.err
    assert fleet.changed() == []


# --- words -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("10%", Amount(share_bp=1_000)),
        ("0.5%", Amount(share_bp=50)),
        ("12.50 %", Amount(share_bp=1_250)),
        ("0.01%", Amount(share_bp=1)),
        ("100%", Amount(share_bp=10_000)),
        ("29%", Amount(share_bp=2_900)),
        (" 20 ", Amount(count=20)),
        ("0", Amount(count=0)),
    ],
)
def test_amounts(text: str, amount: Amount) -> None:
    assert words.amount(text) == amount


@pytest.mark.parametrize(
    ("text", "days"),
    [
        ("mon", ["mon"]),
        ("mon-wed", ["mon", "tue", "wed"]),
        ("sat-mon", ["sat", "sun", "mon"]),
        ("Mon,Wed", ["mon", "wed"]),
        ("mon-tue,tue-wed", ["mon", "tue", "wed"]),
    ],
)
def test_days(text: str, days: list[str]) -> None:
    assert words.days(text) == days


@pytest.mark.parametrize(
    "text",
    [
        "mon-fri 22:00-04:00",
        "mon-fri 22:00 Europe/Berlin",
        "mon-fry 22:00-04:00 Europe/Berlin",
        "mon-fri 25:00-04:00 Europe/Berlin",
        "mon-fri 22:00-04:00 Mars/Olympus",
        "mon-fri 22:00-04:00 ../../etc/passwd",
        "mon-fri 22:00-04:00 Europe",
    ],
)
def test_a_window_that_cannot_be_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not|not acceptable"):
        words.window(text)


def test_since_counts_back_from_now() -> None:
    assert 7_199 <= (clock.now() - clock.parse_iso(words.past_moment("2h"))).total_seconds() <= 7_202


# --- what is printed -------------------------------------------------------------------------------------


def test_why_prints_the_explanation_on_stdout(release: Release) -> None:
    assert release("agents", "why", "web-17").out == (
        "web-17 runs 1.4.2; its cohort eu-web is moving to 1.5.0. It is not updating because:\n"
        "  ok  reported 42 s ago        ok  cohort eu-web\n"
        "  no  rollout r-31 is at 10%; this agent's place is 63%.\n"
        "      to move it now:  release agents move web-17 --cohort canary\n"
    )


def test_preview_names_the_agents_a_match_would_reach(release: Release, fleet: Fleet) -> None:
    ran = release("cohort", "preview", "eu-web", "--match", "region=eu")
    assert ran.code == 0
    assert ran.out == ("2 agents would match 'region=eu': 1 join, 1 leave\n  web-17\n+ web-18\n- db-01\n")
    assert fleet.seen[-1].query == {"match": ["region=eu"]}


def test_status_without_an_id_takes_the_newest_that_is_not_over(release: Release, fleet: Fleet) -> None:
    assert "r-31" in release("rollout", "status").out
    fleet.on("GET", "/rollouts", {"items": [COMPLETED, COMPLETED | {"id": 30}]})
    release("rollout", "status", "--cohort", "eu-web")
    assert fleet.seen[-2].query == {"product": [PRODUCT], "cohort": ["eu-web"], "limit": ["100"]}
    assert fleet.seen[-1].path == "/api/v1/rollouts/31"


def test_status_without_any_rollout_is_7_and_says_how_to_start_one(release: Release, fleet: Fleet) -> None:
    fleet.on("GET", "/rollouts", {"items": []})
    ran = release("rollout", "status")
    assert ran.code == Exit.NOT_FOUND
    assert "release rollout start" in ran.err


def test_the_newest_rollout_is_listed_first(release: Release) -> None:
    listed = json.loads(release("rollout", "list", "--json").out)
    assert [entry["id"] for entry in listed] == [32, 31]


def test_export_is_csv_with_a_fixed_order_and_no_formulas(release: Release, fleet: Fleet) -> None:
    evil = agent_of("web-19", detail='=HYPERLINK("http://x")', labels={"note": "a,b\nc"})
    fleet.on("GET", "/agents", {"items": [agent_of("web-17"), evil]})
    rows = list(csv.DictReader(io.StringIO(release("agents", "export", "--csv").out)))
    assert tuple(rows[0]) == agents_commands.COLUMNS
    assert rows[0]["labels"] == "region=eu,tier=web"
    assert (rows[0]["os"], rows[0]["kernel"], rows[0]["python"]) == ("linux", "6.1.0", "")
    assert rows[1]["detail"] == '\'=HYPERLINK("http://x")'
    assert rows[1]["labels"] == "note=a,b\nc,tier=web"


def test_export_writes_a_file_and_leaves_stdout_empty(release: Release, tmp_path: Path) -> None:
    ran = release("agents", "export", "-o", "fleet.csv", "--state", "ok")
    assert (ran.code, ran.out) == (0, "")
    assert len((tmp_path / "fleet.csv").read_text().splitlines()) == 3
    assert release("agents", "export", "-o", "fleet.json", "--json").code == Exit.USAGE


def test_an_export_that_is_refused_writes_no_head_and_keeps_the_file_of_before(
    release: Release, fleet: Fleet, tmp_path: Path
) -> None:
    kept = tmp_path / "fleet.csv"
    kept.write_text("of yesterday")
    fleet.refuse("GET", "/agents", 403, "not-allowed")
    for way in (("--csv",), ("-o", "fleet.csv")):
        ran = release("agents", "export", *way)
        assert (ran.code, ran.out) == (Exit.NOT_ALLOWED, "")
    assert kept.read_text() == "of yesterday"


# --- tokens ----------------------------------------------------------------------------------------------


def test_a_new_token_is_the_only_thing_on_stdout(release: Release, fleet: Fleet) -> None:
    ran = release(
        "token", "create", "--role", "enroller", "--expires", "7d", "--uses", "20", "--name", "racks"
    )
    assert ran.out == "rlf_new-secret\n"
    assert "rlf_new-secret" not in ran.err
    body = {"name": "racks", "role": "enroller", "expires_s": 604_800, "uses": 20}
    assert fleet.sent("POST", "/tokens") == body


def test_a_token_whose_text_was_lost_on_the_way_is_named_and_leaves_no_file(
    release: Release, fleet: Fleet, tmp_path: Path
) -> None:
    fleet.on("POST", "/tokens", TOKENS[0] | {"id": 9, "token": None}, status=201)
    out = tmp_path / "anna.token"
    done = release("token", "create", "--role", "reader", "--out", str(out))
    assert done.code == 1
    assert "release token revoke 9" in done.err
    assert not out.exists()


def test_a_token_is_for_one_product_only_when_that_was_said(release: Release, fleet: Fleet) -> None:
    release("token", "create", "--role", "reader")
    assert "product" not in fleet.seen[-1].body
    release("token", "create", "--role", "reader", "--product", PRODUCT)
    assert fleet.seen[-1].body["product"] == PRODUCT
    assert re.fullmatch(r"reader \d{4}-\d\d-\d\d", fleet.seen[-1].body["name"])


def test_a_token_for_a_file_is_there_alone_and_only_its_owner_reads_it(
    release: Release, tmp_path: Path
) -> None:
    old_mask = os.umask(0)
    try:
        ran = release("token", "create", "--role", "reader", "--out", "ci.token", "--json")
    finally:
        os.umask(old_mask)
    file = tmp_path / "ci.token"
    assert file.read_text() == "rlf_new-secret\n"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert "rlf_new-secret" not in ran.out + ran.err
    assert json.loads(ran.out)["id"] == 7


def test_no_token_is_made_that_could_not_be_kept(release: Release, fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "ci.token").write_text("older\n")
    ran = release("token", "create", "--role", "reader", "--out", "ci.token")
    assert ran.code == Exit.CONFLICT
    assert fleet.changed() == []
    assert (tmp_path / "ci.token").read_text() == "older\n"


def test_a_refused_token_leaves_no_file(release: Release, fleet: Fleet, tmp_path: Path) -> None:
    fleet.refuse("POST", "/tokens", 403, "not-allowed")
    assert release("token", "create", "--role", "admin", "--out", "ci.token").code == Exit.NOT_ALLOWED
    assert not (tmp_path / "ci.token").exists()


def test_the_list_of_tokens_says_which_still_work(release: Release) -> None:
    lines = release("token", "list").out.splitlines()
    assert [
        next(word for word in ("expired", "for ever", "revoked") if word in line) for line in lines[1:]
    ] == [
        "expired",
        "for ever",
        "revoked",
    ]


# --- watching --------------------------------------------------------------------------------------------

ENDINGS = [
    ("completed", COMPLETED, 0),
    ("halted by itself", HALTED, 5),
    ("halted, whatever the reason", rollout_of(state="paused", stage_state="halted", reason="manual"), 5),
    ("aborted", rollout_of(state="aborted"), 5),
    ("rolled back", rollout_of(state="rolled_back"), 5),
    ("superseded", rollout_of(state="superseded"), 5),
]


@pytest.mark.parametrize(("last", "code"), [row[1:] for row in ENDINGS], ids=[row[0] for row in ENDINGS])
def test_a_watch_exits_by_how_the_rollout_ended(
    release: Release, fleet: Fleet, last: dict[str, Any], code: int
) -> None:
    fleet.on("GET", "/rollouts/31", rollout_of(), rollout_of(counters={"healthy": 3}), last)
    ran = release("rollout", "status", "r-31", "--watch", "--every", "0s")
    assert ran.code == code
    lines = ran.out.splitlines()
    assert len(lines) == 3
    assert "2/20 healthy" in lines[0]
    assert "3/20 healthy" in lines[1]
    assert str(last["state"]).replace("_", " ") in lines[2]
    assert ("release rollout history r-31" in ran.err) == (code == 5)


def test_a_watch_prints_a_change_once(release: Release, fleet: Fleet) -> None:
    fleet.on("GET", "/rollouts/31", *[rollout_of()] * 5, COMPLETED)
    assert len(release("rollout", "status", "31", "-w", "--every", "0s").out.splitlines()) == 2


@pytest.mark.parametrize(
    "waiting", [BY_HAND, rollout_of(state="rolling_back"), rollout_of(state="scheduled")]
)
def test_a_watch_waits_for_what_people_or_agents_will_still_do(
    release: Release, fleet: Fleet, waiting: dict[str, Any]
) -> None:
    assert rollout_commands.ending(waiting) is None
    fleet.on("GET", "/rollouts/31", waiting, COMPLETED)
    assert release("rollout", "status", "r-31", "--watch", "--every", "0s").code == 0


def test_every_state_of_a_rollout_either_ends_a_watch_or_is_waited_for() -> None:
    from release_server.rollout import FINISHED, State

    ends = {
        state
        for state in State
        if rollout_commands.ending({"state": str(state), "reason": "manual"}) is not None
    }
    assert ends == set(FINISHED)


def test_a_watch_that_takes_too_long_is_8_and_says_that_the_rollout_goes_on(release: Release) -> None:
    ran = release("rollout", "status", "r-31", "--watch", "--every", "1s", "--timeout", "0.5s")
    assert ran.code == Exit.UNREACHABLE
    assert "the rollout goes on" in ran.err
    assert len(ran.out.splitlines()) == 1


def test_a_watch_outlives_a_server_that_is_away_for_a_moment(release: Release, fleet: Fleet) -> None:
    away = (503, {"status": 503, "title": "starting", "reason": "overloaded"})
    fleet.answers["GET", "/api/v1/rollouts/31"] = [(200, rollout_of()), away, away, (200, COMPLETED)]
    ran = release("rollout", "status", "r-31", "--watch", "--every", "0s")
    assert ran.code == 0
    assert [("does not answer" in line) for line in ran.out.splitlines()] == [False, True, False]


def test_a_watch_under_json_prints_the_end_as_one_document(release: Release, fleet: Fleet) -> None:
    fleet.on("GET", "/rollouts/31", rollout_of(), HALTED)
    ran = release("rollout", "status", "r-31", "--watch", "--every", "0s", "--json")
    assert ran.code == 5
    assert json.loads(ran.out)["reason"] == "max-failed"
    assert "2/20 healthy" in ran.err


def test_ctrl_c_ends_the_watch_and_says_that_the_rollout_goes_on(fleet: Fleet) -> None:
    words = ["rollout", "status", "r-31", "--watch"]
    watch = subprocess.Popen(
        [sys.executable, "-u", "-c", PROGRAM, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    with watch:
        assert watch.stdout is not None
        assert watch.stderr is not None
        assert "r-31" in watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        err = watch.stderr.read()
    assert watch.returncode == Exit.INTERRUPTED
    assert "r-31 goes on" in err
    assert "release rollout pause r-31" in err
    assert "Traceback" not in err
    assert fleet.changed() == []


def test_on_a_terminal_a_watch_draws_and_exits_by_health(fleet: Fleet) -> None:
    fleet.on("GET", "/rollouts/31", rollout_of(), HALTED)
    code, shown = on_terminal(["rollout", "status", "r-31", "--watch", "--every", "0s"], b"")
    assert code == Exit.HALTED
    for said in ("━", "1 agent", "2/20 healthy", "max-failed"):
        assert said in shown


# --- the audit log ---------------------------------------------------------------------------------------


def test_the_audit_log_is_oldest_first_a_line_an_entry(release: Release, fleet: Fleet) -> None:
    ran = release("audit", "log", "--since", "2026-01-31T10:00:00Z", "--actor", "ada", "--limit", "5")
    lines = ran.out.splitlines()
    assert "rollout.start" in lines[0]
    assert lines[1].split() == [
        "2026-01-31T11:05:00Z",
        "bob",
        "rollout.pause",
        "r-31",
        "reason=odd",
        "graphs",
    ]
    assert fleet.seen[-1].query == {"since": ["2026-01-31T10:00:00Z"], "actor": ["ada"], "limit": ["5"]}


def test_an_entry_cannot_break_its_line() -> None:
    from release_server.publish.commands.audit import line

    assert "\n" not in line(AUDIT[0] | {"detail": {"reason": "two\nlines"}})


def test_follow_prints_what_comes_once_and_ends_with_the_timeout(release: Release, fleet: Fleet) -> None:
    later = AUDIT[0] | {"id": 3, "at": "2026-01-31T11:06:00Z", "action": "rollout.resume"}
    fleet.on("GET", "/audit", {"items": AUDIT}, {"items": [later, AUDIT[0]]})
    ran = release("audit", "log", "--follow", "--every", "0s", "--timeout", "0.3s", "--json")
    assert ran.code == 0
    assert [json.loads(line)["id"] for line in ran.out.splitlines()] == [1, 2, 3]
    assert fleet.seen[-1].query["since"] == ["2026-01-31T11:06:00Z"]


def chained(*entries: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """Entries as the server gives them, each with its hash, and the head."""
    head, found = Head(), []
    for entry in sorted(entries, key=lambda entry: int(entry["id"])):
        made = audit_chain.link(head.hash, entry)
        found.append(entry | {"previous": head.hash, "hash": made})
        head = Head(entry["id"], made)
    return found, str(head)


def test_the_chain_is_checked_here_over_every_page(release: Release, fleet: Fleet) -> None:
    entries, head = chained(*AUDIT)
    first = {"items": entries[:1], "next": 1, "head": head}
    fleet.on("GET", "/audit/chain", first, {"items": entries[1:], "next": None, "head": head})
    ran = release("audit", "verify")
    assert (ran.code, ran.out.strip()) == (0, head)
    assert fleet.seen[-1].query == {"after": ["1"]}


@pytest.mark.parametrize("words", ["audit verify", "audit export"])
def test_a_broken_chain_is_3_and_names_the_first_broken_entry(
    release: Release, fleet: Fleet, words: str
) -> None:
    entries, head = chained(*AUDIT)
    entries[0]["actor"] = "eve"
    fleet.on("GET", "/audit/chain", {"items": entries, "next": None, "head": head})
    ran = release(*words.split())
    assert ran.code == Exit.TRUST
    assert "entry 1 was changed" in ran.err


def test_an_end_that_the_server_keeps_back_is_3(release: Release, fleet: Fleet) -> None:
    entries, head = chained(*AUDIT)
    fleet.on("GET", "/audit/chain", {"items": entries[:1], "next": None, "head": head})
    ran = release("audit", "verify")
    assert ran.code == Exit.TRUST
    assert "ends with entry 1, and 2" in ran.err


def test_an_export_is_checked_without_a_server_and_against_a_head_noted_before(
    release: Release, fleet: Fleet, tmp_path: Path
) -> None:
    entries, head = chained(*AUDIT)
    fleet.on("GET", "/audit/chain", {"items": entries, "next": None, "head": head})
    assert release("audit", "export", "-o", "log.jsonl").code == 0
    fleet.seen.clear()
    assert release("audit", "verify", "log.jsonl", "--head", head).out.strip() == head
    other = f"2:{'a' * 64}"
    assert release("audit", "verify", "log.jsonl", "--head", other).code == Exit.TRUST
    assert release("audit", "verify", "log.jsonl", "--head", "2").code == Exit.USAGE
    kept = tmp_path / "log.jsonl"
    kept.write_text(kept.read_text().replace("odd graphs", "odd grasps"))
    ran = release("audit", "verify", "log.jsonl")
    assert ran.code == Exit.TRUST
    assert "entry 2 was changed" in ran.err
    kept.write_text("[]")
    assert release("audit", "verify", "log.jsonl").code == Exit.TRUST
    assert fleet.seen == []


# --- help ------------------------------------------------------------------------------------------------

GROUPS = ("cohort", "rollout", "agents", "token", "audit")


@pytest.mark.parametrize("group", GROUPS)
def test_every_command_explains_itself(release: Release, fleet: Fleet, group: str) -> None:
    assert release(group, "--help").code == 0
    module = importlib.import_module(f"release_server.publish.commands.{group}")
    found = getattr(module, group)
    assert isinstance(found, click.Group)
    for name, command in found.commands.items():
        ran = release(group, name, "--help")
        assert ran.code == 0
        assert command.help
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, f"{group} {name} {option.opts}"
    assert fleet.seen == []


def commands_of(command: click.Command, path: str) -> Iterator[str]:
    """Every command of a program that does something, as it is typed."""
    if not isinstance(command, click.Group):
        yield path
        return
    context = click.Context(command, info_name=path)
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        if below is not None and not below.hidden:
            yield from commands_of(below, f"{path} {name}")


@pytest.mark.parametrize("group", GROUPS)
def test_the_page_of_commands_lists_every_operator_command(group: str) -> None:
    page = (REPOSITORY / "docs" / "cli.md").read_text()
    module = importlib.import_module(f"release_server.publish.commands.{group}")
    missing = [
        words
        for words in commands_of(getattr(module, group), f"release {group}")
        if f"| `{words}`" not in page and f"| `{words} " not in page
    ]
    assert missing == []


@pytest.mark.parametrize("code", Exit, ids=lambda code: code.name)
def test_the_page_of_commands_lists_every_exit_code(code: Exit) -> None:
    assert f"\n| {int(code)} |" in (REPOSITORY / "docs" / "cli.md").read_text()


def test_loading_the_commands_loads_no_server_and_nothing_heavy() -> None:
    modules = ", ".join(f"release_server.publish.commands.{group}" for group in GROUPS)
    heavy = ("flask", "sqlalchemy", "rich", "requests", "tuf", "cryptography")
    program = f"import sys, {modules}; print([name for name in {heavy!r} if name in sys.modules])"
    ran = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert ran.stdout.strip() == "[]"
