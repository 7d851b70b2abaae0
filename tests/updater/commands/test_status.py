"""What status and why say at three in the morning, in every state a host can be in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta

import pytest

from agent_core import clock
from agent_core.wire import AttemptState, Reason
from tests.updater.commands.conftest import A, B, C
from updater import attempt as attempts
from updater import control
from updater.attempt import Attempt
from updater.cli import main
from updater.commands.why import CHANGED_BY, DISTRUST, _changed_by
from updater.decide import Action, Hold
from updater.device import Outcome


def outcome(host, action, reason, detail="", *, ago_s=30, **more):
    at = clock.iso(clock.now() - timedelta(seconds=ago_s))
    host.device().remember_outcome(Outcome(action, str(reason), detail, at, **{"verified": True, **more}))


def fresh(host):
    """Enrolled, and nothing more."""


def resting(host):
    host.stage(A, B)
    host.on(B, A)
    outcome(host, Action.STAY, Reason.UP_TO_DATE, "eu-web is on 1.1.0", ago_s=200)


def trial(host):
    resting(host)
    host.stage(C)
    host.put(replace(host.record, phase="trial", candidate=C, boots_left=1, boots_max=3, deadman_s=9))


def rolled_back(host):
    resting(host)
    host.stage(C)
    digest, why = C.rpartition("-")[2], "workload-exited"
    host.put(replace(host.record, tried=C, reason=why, skip=((digest, why, 0),)))
    last = Attempt("1.2.0", digest, "salt", AttemptState.ROLLED_BACK, why, "it exited with 3")
    attempts.save(host.device().attempt_file, last)
    outcome(host, Action.STAY, Reason.SKIPPED, "this bundle failed here before", version="1.2.0")


def held(host):
    resting(host)
    host.device().set_hold(Hold(clock.now() + timedelta(hours=2), "stocktaking"))
    outcome(host, Action.STAY, Reason.HELD, "held on the host", version="1.2.0")


def offline(host):
    resting(host)
    why = "http://127.0.0.1:9 does not answer: connection refused\n  next: look at it"
    outcome(host, Action.REFUSE, Reason.OFFLINE, why, verified=False, failed=True)


def disk_full(host):
    resting(host)
    why = "the disk has no room: 5 bytes are missing"
    outcome(host, Action.REFUSE, Reason.NO_ROOM, why, failed=True, version="1.2.0")


def damaged_record(host):
    resting(host)
    host.layout.slots.write_bytes(b"garbage" * 2000)


def damaged_version(host):
    resting(host)
    (host.layout.version_dir(B) / "agent.py").unlink()


def bad_settings(host):
    resting(host)
    host.layout.settings.write_text("[poll]\nmin_sec = 1\n")


def no_launcher(host):
    resting(host)
    host.layout.launcher_file.unlink()


STATES = {
    fresh: (["nothing yet", "never: agent once"], ["no check was done yet", "agent once"]),
    resting: ([f"{B}  (no agent runs", "up-to-date", "3 min ago", A], ["no agent runs here"]),
    trial: ([f"{C}, 1 of 3 boots left; goes back to {B}"], ["1.2.0 is on trial"]),
    rolled_back: (
        [f"{C}: workload-exited (it exited with 3)", "agent retry forgets it"],
        ["1.2.0 is what it is asked to run", "agent retry here, or release rollout retry for all"],
    ),
    held: (["stocktaking", "until 2"], ["held until 2", "agent unhold"]),
    offline: (["failed (offline)", "connection refused"], ["could not be verified", "agent install FILE"]),
    disk_full: (["no-room", "5 bytes are missing"], ["room on the disk: agent doctor"]),
    damaged_record: (["by its link", "the record is damaged"], ["runs 1.1.0"]),
    damaged_version: (["it is damaged: agent doctor"], ["runs 1.1.0"]),
    bad_settings: (["poll.min_sec", "poll.min_s"], ["poll.min_sec", "agent config check"]),
    no_launcher: (["missing: agent upgrade-launcher"], ["runs 1.1.0"]),
}


@pytest.fixture
def running(host):
    """A process that passes for this host's agent."""
    words = [sys.executable, "-c", "import sys; sys.stdin.read()", "run", "--root", str(host.root)]
    with subprocess.Popen(words, stdin=subprocess.PIPE) as agent:
        news = {"pid": agent.pid, "poll": "offline: no answer: connection refused"}
        (host.layout.state / "status.json").write_text(json.dumps(news))
        yield host


def test_polls_that_fail_are_told_though_the_last_check_was_fine(running):
    resting(running)
    control.remember_backoff(running.layout, 7, 60.0)
    assert "the last 7 failed; offline: no answer: connection refused" in running.agent("status")[1]
    assert running.ask("status")[1]["failed_polls"] == 7
    last = running.ask("why")[1]["chain"][-1]
    assert (last["ok"], last["code"], last["then"]) == (False, "offline", CHANGED_BY[Reason.OFFLINE])
    control.remember_backoff(running.layout, 0, 0.0)
    assert "refused" not in running.agent("status")[1] + running.agent("why")[1]


def test_polls_that_find_nothing_new_are_told_as_what_came_after_the_last_check(running):
    resting(running)
    assert "nothing new" not in running.agent("status")[1]
    news = control.read_status(running.layout) | {"poll": control.NOTHING_NEW}
    (running.layout.state / "status.json").write_text(json.dumps(news))
    assert "fine, nothing new since then" in running.agent("status")[1]


def test_an_agent_that_has_just_begun_has_failed_at_nothing_yet(running):
    resting(running)
    control.remember_backoff(running.layout, 1, 60.0)
    news = control.read_status(running.layout) | {"poll": "not yet"}
    (running.layout.state / "status.json").write_text(json.dumps(news))
    assert running.ask("status")[1]["failed_polls"] == 0
    assert all(link["ok"] for link in running.ask("why")[1]["chain"])


def test_what_was_staged_and_is_good_by_now_is_not_told_as_only_staged(host):
    resting(host)
    outcome(host, Action.INSTALL, Reason.UPDATE, version="1.1.0", candidate=B)
    assert "1.1.0 was staged, and is good (update)" in host.agent("status")[1]
    assert host.ask("why")[1]["chain"][-1]["ok"]


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_both_say_how_it_is_and_what_would_change_it(host, state):
    state(host)
    in_status, in_why = STATES[state]
    code, out, said = host.agent("status")
    assert (code, said) == (0, "")
    assert [text for text in in_status if text not in out] == []
    assert all(len(line) < 200 for line in out.splitlines())
    code, out, said = host.agent("why")
    assert (code, said) == (0, "")
    assert [text for text in in_why if text not in out] == []
    code, found = host.ask("why")
    assert code == 0
    assert all(link["then"] for link in found["chain"] if not link["ok"])
    assert host.ask("status")[0] == 0
    assert host.ask("versions")[0] == 0


def test_every_reason_not_to_update_says_what_would_change_it():
    for reason in Reason:
        assert _changed_by(str(reason))
    assert _changed_by("something newer") == "agent doctor"
    refusals = {Reason.BAD_SIGNATURE, Reason.REPLAYED, Reason.DIGEST_MISMATCH, Reason.BAD_ARCHIVE}
    assert {_changed_by(str(reason)) for reason in refusals} == {DISTRUST}
    assert not refusals & set(CHANGED_BY)


@pytest.mark.parametrize("command", ["status", "why", "rollback", "hold", "install"])
def test_a_host_that_is_not_enrolled_says_so(host, command):
    for file in (host.layout.identity, host.layout.identity_copy):
        file.unlink()
    words = ["FILE"] if command == "install" else []
    code, _, said = host.agent(command, *words)
    assert (code, "not enrolled" in said, "agent enroll" in said) == (7, True, True)


def test_an_identity_that_is_read_from_its_copy_is_told_and_keeps_nothing_from_going_on(host):
    host.layout.identity.write_bytes(b"{")
    told = host.ask("status")[1]
    assert (told["agent_id"], "its copy" in told["problem"]) == ("web-17", True)
    assert "its copy" in host.agent("status")[1]
    link = next(link for link in host.ask("why")[1]["chain"] if link["code"] == "identity")
    assert (link["ok"], "its copy" in link["text"]) == (True, True)


@pytest.mark.parametrize("command", ["status", "why"])
def test_a_host_that_cannot_tell_who_it_is_says_so_and_what_mends_it(host, command):
    for file in (host.layout.identity, host.layout.identity_copy):
        file.write_bytes(b"{")
    code, _, said = host.agent(command)
    assert (code, "cannot tell who it is" in said, "agent enroll" in said) == (2, True, True)


@pytest.mark.parametrize("command", ["status", "why", "versions", "upgrade-launcher", "hold", "doctor"])
def test_a_slip_in_the_root_is_told_and_makes_nothing(tmp_path, capsys, command):
    code = main([command, "--root", str(tmp_path / "slip")])
    told = capsys.readouterr()
    assert (code, "agent enroll" in told.out + told.err) == (1 if command == "doctor" else 7, True)
    assert not (tmp_path / "slip").exists()


@contextmanager
def as_somebody_else(host):
    """Be a user who may not look into this host's state; the test's own directories let nobody else pass."""
    if os.geteuid():
        host.layout.state.chmod(0)
        yield
        host.layout.state.chmod(0o700)
        return
    above = [place for place in host.root.parents if place.stat().st_mode & 0o055 != 0o055]
    modes = [(place, place.stat().st_mode) for place in above]
    for place, mode in modes:
        place.chmod(mode | 0o055)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        for place, mode in modes:
            place.chmod(mode)


@pytest.mark.parametrize("command", ["status", "why", "versions", "hold", "once", "doctor"])
def test_a_forgotten_sudo_is_told_and_is_no_lost_host(host, command):
    resting(host)
    host.agent(command)  # loads what it needs, which somebody else may not
    host.agent("unhold")
    with as_somebody_else(host):
        code, out, said = host.agent(command)
    assert code == (1 if command == "doctor" else 4), out + said
    assert ("may not look into" in out + said, "the same with sudo" in out + said) == (True, True)
    assert "enroll" not in out + said
    assert host.device().hold() is None


def test_what_only_looks_writes_nothing(host):
    damaged_record(host)
    before = tree(host.root)
    for command in ("status", "why", "versions", "doctor"):
        host.agent(command)
    assert tree(host.root) == before


def tree(root):
    return {path: (path.lstat().st_mode, path.lstat().st_mtime_ns) for path in root.rglob("*")}


@pytest.mark.parametrize(
    ("standing", "words"), [("pending", "waits for an operator"), ("retired", "keeps running")]
)
def test_an_agent_that_is_not_in_the_fleet_says_so_and_what_would_change_it(host, standing, words):
    resting(host)
    host.enroll(cohort=None, standing=standing)
    _, said, _ = host.agent("why")
    assert words in said
    assert CHANGED_BY[Reason(standing)] in said
    assert f"({standing}: agent why)" in host.agent("status")[1]
    assert f"{standing}, so it is told nothing to run" in host.agent("doctor")[1]
    assert host.agent("status", "--json")[1].count(f'"standing": "{standing}"') == 1


LOADED = """
import sys
from updater.cli import main
main(["status", "--root", sys.argv[1]])
heavy = {"argparse", "difflib", "secrets", "subprocess", "tempfile", "tuf", "updater.transport"}
print(sorted(heavy & set(sys.modules)))
"""


def test_who_only_looks_loads_nothing_that_acts(host):
    resting(host)
    argv = [sys.executable, "-c", LOADED, str(host.root)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
