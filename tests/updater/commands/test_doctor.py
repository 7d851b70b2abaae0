"""The doctor's findings, each by the fault it is for; and the file that is sent, without a secret in it."""

from __future__ import annotations

import json
import zipfile
from datetime import UTC, datetime, timedelta

import pytest

from agent_core import clock, slots
from agent_core.bundle import Index, pack
from agent_core.layout import write_json
from agent_core.spool import Spool
from agent_core.wire import AttemptState
from tests.http_origin import Origin
from tests.repository_simulator import PRODUCT, RepositorySimulator
from tests.updater.commands.conftest import A, B
from updater import diagnostics, doctor
from updater.catalog import Catalog
from updater.doctor import CHECKS, State
from updater.freshness import Memory, remember

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)


@pytest.fixture
def repository(tmp_path):
    made = RepositorySimulator(tmp_path / "www", now=NOW)
    made.publish()
    return made


@pytest.fixture
def well(host, repository):
    """A host that lacks nothing but a running agent: its server answers, its trust is fresh."""
    host.stage(A, B)
    host.on(B, A)
    host.layout.trust_root.write_bytes(repository.trusted_root)
    with Origin(repository.directory) as origin:
        host.enroll(server=origin.url)
        with Catalog(host.layout.tuf, host.device().transport(), PRODUCT, repository.trusted_root) as catalog:
            catalog.refresh(NOW, None)
        yield host


def found(host, check, now=NOW):
    return [finding for finding in doctor.examine(host.root, now) if finding.check == check]


def test_a_host_that_is_well_is_told_so_but_for_the_agent_that_does_not_run(well):
    findings = doctor.examine(well.root, NOW)
    assert {finding.check for finding in findings} == {*CHECKS, "clock"}
    assert [finding.check for finding in findings if finding.state is State.BAD] == ["running"]
    assert [finding.check for finding in findings if finding.state is State.NOTE] == ["checks"]
    code, told = well.ask("doctor")
    assert (code, {one["check"] for one in told}) == (1, {*CHECKS, "clock"})


def _unlink_both(layout):
    for file in (layout.identity, layout.identity_copy):
        file.unlink()


def _ahead(layout):
    """A highest signed time of the year 9999, beside a timestamp that is verified and has a day to go."""
    signed = {"version": 1, "expires": clock.iso(clock.now() + timedelta(days=1))}
    (layout.tuf / "timestamp.json").write_text(json.dumps({"signed": signed}))
    ahead = datetime(9999, 12, 30, tzinfo=UTC)
    remember(layout.poll, Memory("e", "0" * 64, ahead + timedelta(days=1), ahead, high_water=ahead))


FAULTS = {
    "settings": ("settings", lambda host: host.layout.settings.write_text("[poll"), State.BAD),
    "not enrolled": ("identity", lambda host: _unlink_both(host.layout), State.BAD),
    "damaged identity": ("identity", lambda host: host.layout.identity.write_bytes(b"{"), State.BAD),
    "signed time": ("trust", lambda host: _ahead(host.layout), State.NOTE),
    "key": ("identity", lambda host: host.layout.key.chmod(0o644), State.BAD),
    "no cohort": ("identity", lambda host: host.enroll(cohort=None), State.NOTE),
    "offline host": ("identity", lambda host: host.enroll(enrolled=False), State.NOTE),
    "open state": ("permissions", lambda host: host.layout.state.chmod(0o755), State.BAD),
    "open root": ("permissions", lambda host: host.root.chmod(0o777), State.BAD),
    "no download": ("permissions", lambda host: host.layout.download.rmdir(), State.BAD),
    "room": ("disk", lambda host: host.layout.settings.write_text(f"[disk]\nreserve = {2**50}\n"), State.BAD),
    "ballast": ("disk", lambda host: host.layout.ballast.unlink(), State.NOTE),
    "server away": ("server", lambda host: host.enroll(server="http://127.0.0.1:9"), State.BAD),
    "server empty": ("server", lambda host: host.enroll(server=host.device().server + "/x"), State.BAD),
    "no root": ("trust", lambda host: host.layout.trust_root.unlink(), State.BAD),
    "damaged root": ("trust", lambda host: host.layout.trust_root.write_bytes(b"{}"), State.BAD),
    "record": ("record", lambda host: host.layout.slots.write_bytes(b"x" * 8192), State.BAD),
    "good damaged": ("record", lambda host: (host.layout.version_dir(B) / "agent.py").unlink(), State.BAD),
    "before damaged": ("record", lambda host: (host.layout.version_dir(A) / "agent.py").unlink(), State.NOTE),
    "links": ("record", lambda host: host.layout.current.unlink(), State.NOTE),
    "skips": ("record", lambda host: slots.refuse(host.root, "1.9.0-" + "d" * 12, "preflight"), State.NOTE),
    "launcher": ("launcher", lambda host: host.layout.launcher_file.unlink(), State.BAD),
    "spool": ("spool", lambda host: host.layout.spool.write_bytes(b"no database" * 500), State.NOTE),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_says_what_to_do(well, fault):
    check, spoil, state = FAULTS[fault]
    spoil(well)
    worst = [finding for finding in found(well, check) if finding.state is state]
    assert worst, found(well, check)
    assert all(finding.then for finding in worst) or fault == "before damaged"


def test_the_clock_is_held_against_the_servers_and_expiry_against_the_clock(well):
    assert found(well, "clock")[0].state is State.OK
    behind = found(well, "clock", NOW - timedelta(days=400))[0]
    assert (behind.state, "this clock is behind" in behind.detail) == (State.BAD, True)
    ahead = found(well, "clock", NOW + timedelta(days=400))[0]
    assert (ahead.state, "is this clock ahead?" in ahead.then) == (State.BAD, True)
    expired = {one.detail.split()[0] for one in found(well, "trust", NOW + timedelta(days=15)) if one.then}
    assert expired >= {"snapshot", "timestamp", "cohorts"}
    near = [one for one in found(well, "trust", NOW + timedelta(days=55)) if one.detail.startswith("targets")]
    assert [one.state for one in near] == [State.NOTE]


def test_a_broken_chain_of_roots_is_found(well, repository):
    repository.rotate("root")
    repository.publish_root(signers=repository.signers["root"])
    (well.layout.tuf / "root_history" / "2.root.json").write_bytes(repository.read("2.root.json"))
    assert "the chain of roots is broken" in found(well, "trust")[0].detail


def test_what_waits_is_counted_in_a_copy(well):
    with Spool(well.layout.spool) as spool:
        for _ in range(3):
            said = {"salt": "", "state": AttemptState.STAGED, "reason": "", "detail": ""}
            spool.add_transition(clock.now(), version="1", digest="d", **said)
        assert doctor.backlog(well.layout) == (3, "")


def test_nothing_at_all_is_examined_to_the_end(tmp_path):
    findings = doctor.examine(tmp_path / "nothing", NOW)
    assert {finding.check for finding in findings} >= set(CHECKS)
    assert [finding for finding in findings if "could not be looked at" in finding.detail] == []
    assert not (tmp_path / "nothing").exists()


# --- diagnostics -----------------------------------------------------------------------------------------

KEY = "PRIVATE" + " KEY"
"""In two pieces, so that nobody's search for committed keys takes what is planted here for one."""
PLANTED = {
    "proxy": "hunter2-of-the-proxy",
    "session": "sess10n-t0ken-that-nobody-may-see",
    "token": "rft_" + "Zz9_" * 10,
    "environment": "s3cret-of-the-environment",
    "environment proxy": "pass%21word-of-env",
    "label": "label-s3cret-value",
    "bearer": "bearer-abcdefgh12345678",
    "logged": "logged-passw0rd",
    "pem": "MIIEvQIBADANBgkqhkiG9w0BAQEFAASC",
    "quoted": 'with"quote-and-\\slash',
}


@pytest.fixture
def sown(well, monkeypatch):
    """The host, with secrets in settings, notes, logs and the environment."""
    key = well.layout.key.read_text().strip()
    proxy = f"http://svc:{PLANTED['proxy']}@127.0.0.1:3128"
    settings = f'[server]\nproxy = "{proxy}"\n[labels]\ndb_password = "{PLANTED["label"]}"\n'
    (well.layout.settings_dir / "secret.toml").write_text(settings)
    write_json(well.layout.state / "session.json", {"session": PLANTED["session"], "until_s": 2**40}, 0o600)
    monkeypatch.setenv("RELFLEET_TOKEN", PLANTED["environment"])
    monkeypatch.setenv("WAREHOUSE_PASSWORD", PLANTED["quoted"])
    monkeypatch.setenv("https_proxy", f"http://u:{PLANTED['environment proxy']}@proxy:1")
    lines = [
        f"connecting through {proxy}",
        f"Authorization: Bearer {PLANTED['bearer']}",
        f'{{"password": "{PLANTED["logged"]}", "session": "{PLANTED["session"]}"}}',
        f"key {key} and token={PLANTED['token']} and {PLANTED['environment']} and {PLANTED['quoted']}",
        f"-----BEGIN {KEY}-----\n{PLANTED['pem']}\n-----END {KEY}-----",
        json.dumps({"said": PLANTED["quoted"]}),
        "the last line",
    ]
    (well.layout.logs / "workload.log").write_text("\n".join(lines))
    outcome = {"action": "refuse", "reason": "offline", "detail": f"{proxy} refused {PLANTED['session']}"}
    write_json(
        well.device().outcome_file,
        {
            **outcome,
            "at": clock.iso(NOW),
            "verified": False,
            "failed": True,
            "version": "",
            "candidate": "",
            "boots": 0,
            "deadman_s": 0,
            "retry_epoch": 0,
            "floor": 0,
        },
    )
    return well


def unzipped(path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name).decode() for name in archive.namelist()}


def assert_nothing_leaked(path, host):
    secrets = {
        **PLANTED,
        "key": host.layout.key.read_text().strip() if host.layout.key.exists() else "-" * 80,
    }
    for name, text in unzipped(path).items():
        for what, secret in secrets.items():
            for spelt in (secret, json.dumps(secret)[1:-1], secret.replace("%21", "!")):
                assert spelt not in text, (what, name)


def test_no_planted_secret_is_in_the_file_and_what_helps_is(sown, tmp_path):
    out = tmp_path / "d.zip"
    code, said = sown.ask("diagnostics", "-o", str(out))
    assert (code, out.stat().st_mode & 0o777) == (0, 0o600)
    assert_nothing_leaked(out, sown)
    parts = unzipped(out)
    assert all(json.loads(text) is not ... for name, text in parts.items() if name.endswith(".json"))
    assert set(said["parts"]) == set(parts)
    assert json.loads(parts["record.json"])["record"]["good"] == B
    assert json.loads(parts["status.json"])["agent_id"] == "web-17"
    assert "the last line" in parts["logs/workload.log"]
    assert "127.0.0.1:3128" in parts["logs/workload.log"]
    assert [row["from"] for row in json.loads(parts["settings.json"]) if row["setting"] == "server.proxy"]
    assert [name for name, text in parts.items() if "could not be collected" in text] == []


def test_it_is_made_where_half_of_the_host_is_broken_and_leaks_nothing_there_either(sown, tmp_path):
    sown.layout.slots.write_bytes(b"x" * 9)
    sown.layout.settings.write_text("[server")
    broken = f'[server\nproxy = "http://svc:{PLANTED["proxy"]}@h:1"\ndb_password = "{PLANTED["label"]}"\n'
    (sown.layout.settings_dir / "secret.toml").write_text(broken)
    for note in ("attempt", "directive", "status"):
        (sown.layout.state / f"{note}.json").write_bytes(b"\xff\xfe{")
    sown.layout.spool.write_bytes(b"no database" * 999)
    sown.layout.identity.unlink()
    out = tmp_path / "d.zip"
    assert sown.agent("diagnostics", "-o", str(out))[0] == 0
    assert_nothing_leaked(out, sown)
    parts = unzipped(out)
    assert "could not be collected" in parts["settings.json"]
    assert B in parts["record.json"]


def test_nothing_at_all_still_gives_a_file(tmp_path):
    parts = diagnostics.write(tmp_path / "nothing", tmp_path / "d.zip")
    assert "doctor.json" in parts
    assert not (tmp_path / "nothing").exists()


def test_its_size_is_bounded_and_a_line_cut_in_front_is_left_out(well, tmp_path):
    line = f"token={'q' * 40} " + "x" * 1000 + "\n"
    (well.layout.logs / "workload.log").write_text(line * 3000)
    diagnostics.write(well.root, tmp_path / "d.zip")
    text = unzipped(tmp_path / "d.zip")["logs/workload.log"]
    assert diagnostics.MOST_TAIL * 9 // 10 < len(text) <= diagnostics.MOST_TAIL
    assert text.startswith("token=***")
    assert "q" * 40 not in text


def test_a_changed_file_of_a_version_is_named(host, tmp_path):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "agent.py").write_text("print(1)\n")
    files = pack(tree, tmp_path / "a.tar.zst")
    index = Index(PRODUCT, "1.0.0", "any", ("agent.py",), files)
    host.stage(A)
    place = host.layout.version_dir(A)
    (place / ".bundle.json").write_bytes(index.to_bytes())
    (place / "agent.py").write_text("print(2)\n")
    host.on(A)
    told = json.loads(diagnostics.collect(host.root)["versions.json"])
    assert told[A]["wrong or missing"] == ["agent.py"]
    (place / "agent.py").write_text("print(1)\n")
    assert json.loads(diagnostics.collect(host.root)["versions.json"])[A]["wrong or missing"] == []


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        ("password=hunter22", "hunter22"),
        ("API_KEY: abcdef", "abcdef"),
        ("{'secret': 'of \"mine\"'}", "mine"),
        ("http://me:pw@host/x", "me:pw"),
        ("Basic dXNlcjpwdw==", "dXNlcjpwdw"),
        ("rlf_0123456789abcdefgh", "0123456789"),
        (f"-----BEGIN RSA {KEY}-----\nMIIE", "MIIE"),
    ],
)
def test_what_looks_like_a_secret_is_hidden(text, hidden):
    redact = diagnostics.Redactor(set())
    assert hidden not in redact(f"before {text} after")
    assert redact(f"before {text}").startswith("before ")


def test_what_only_sounds_like_one_stays():
    redact = diagnostics.Redactor({"", "ab"})
    text = f"the token was refused; seq 3, sha256 {'ab' * 32}, http://host/token, tokens: 3 kept"
    assert redact(text).startswith(
        "the token was refused; seq 3, sha256 " + "ab" * 32 + ", http://host/token"
    )
