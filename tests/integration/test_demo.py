"""The demo says what is so: every line it prints is held against the database and the hosts' records."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys

import pytest

from agent_core import slots
from agent_core.errors import UsageError
from release_server.demo.story import Story

AGENTS = 6

LINES = [
    r" server     http://127\.0\.0\.1:(?P<port>\d+)   data in (?P<data>\S+)",
    r"            sign-in link: http://127\.0\.0\.1:\d+/#token=(?P<token>\S+)",
    r" keys       root \+ release key made, threshold 1: fine for a demo, see `release key gen`",
    r" agents     (?P<started>\d+) started as processes, (?P<enrolled>\d+) enrolled, (?P<on>\d+) on 1\.0\.0 +\d+ s",
    r" push       1\.1\.0  (?P<size>[\d.]+) MB, signed, uploaded",
    r" rollout    r-1  1\.0\.0 → 1\.1\.0   (?P<stages>\d+( → \d+)+) agents     (?P<healthy>\d+)/(?P<of>\d+) healthy +\d+ s",
    r" push       1\.2\.0  [\d.]+ MB, signed, uploaded  \(broken on purpose: it exits after two seconds\)",
    r" rollout    r-2  1\.1\.0 → 1\.2\.0   1 agent   halted: 1 of 1 failed \(limit 0\) +\d+ s",
    r"            (?P<bad>demo-\d\d) went back to 1\.1\.0 by itself in (?P<took>\d+) s; the other (?P<others>\d+) never saw 1\.2\.0",
    r" tamper     one byte of 1\.1\.0 changed on the server → (?P<new>demo-\d\d), a new host, refused it \(digest mismatch\)",
    r"            the byte put back → demo-\d\d installed 1\.1\.0",
    r" Done in (?P<seconds>\d+) s\.  Logs: \S+, \S+",
    r" Try:  cd \S+ && \. \.\./env",
    r"       release rollout status r-2 · release agents why demo-\d\d · open the link",
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What one run printed, as one match a line, and where it left everything."""
    home = tmp_path_factory.mktemp("demo") / "relfleet-demo"
    argv = [sys.executable, "-m", "release_server.demo.cli", "demo", "--exit", "--data", str(home)]
    done = subprocess.run(
        [*argv, "--agents", str(AGENTS)], capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    matches = [re.fullmatch(form, line) for form, line in zip(LINES, lines, strict=False)]
    wrong = [line for line, match in zip(lines, matches, strict=False) if match is None]
    assert (wrong, len(lines)) == ([], len(LINES)), done.stdout
    said = {key: text for match in matches for key, text in match.groupdict().items() if text}
    yield said, home
    subprocess.run(["chmod", "-R", "u+w", home], check=False)


def rows(home, query):
    with sqlite3.connect(f"file:{home}/server/relfleet.db?mode=ro", uri=True) as database:
        return database.execute(query).fetchall()


def test_as_many_agents_as_it_says_were_enrolled_and_updated(told):
    said, home = told
    assert (said["started"], said["enrolled"], said["on"]) == (str(AGENTS),) * 3
    assert rows(home, "SELECT count(*) FROM agents") == [(AGENTS + 1,)]
    for root in (home / "agents").iterdir():
        if root.is_dir():
            record = slots.read(root)
            assert (slots.version_of(record.good), record.phase) == ("1.1.0", "idle"), root


def test_the_good_rollout_went_through_the_stages_it_says(told):
    said, home = told
    assert said["stages"] == f"1 → 5 → {AGENTS}"
    assert (said["healthy"], said["of"]) == (str(AGENTS), str(AGENTS))
    healthy = "SELECT count(*) FROM attempts WHERE rollout_id = 1 AND state = 'healthy'"
    assert rows(home, healthy)[0][0] >= AGENTS
    assert rows(home, "SELECT state FROM rollout_status WHERE rollout_id = 1") == [("completed",)]


def test_the_bad_rollout_halted_at_the_agent_it_names_and_no_other_saw_it(told):
    said, home = told
    status = rows(home, "SELECT state, stage_state, reason FROM rollout_status WHERE rollout_id = 2")
    assert status == [("paused", "halted", "max-failed")]
    saw = rows(home, "SELECT DISTINCT agent_id FROM agent_events WHERE version = '1.2.0'")
    assert saw == [(said["bad"],)]
    assert said["others"] == str(AGENTS - 1)
    states = rows(home, "SELECT state FROM agent_events WHERE version = '1.2.0' ORDER BY number")
    assert [state for (state,) in states] == ["downloading", "staged", "trial", "rolled_back"]
    record = slots.read(home / "agents" / said["bad"])
    assert [entry[1] for entry in record.skip] == ["workload-exited"]


def test_the_tampered_bundle_was_refused_for_its_digest_and_installed_when_mended(told):
    said, home = told
    events = rows(
        home, f"SELECT state, reason FROM agent_events WHERE agent_id = '{said['new']}' ORDER BY number"
    )
    assert ("failed", "digest-mismatch") in events
    assert events[-1][0] == "healthy"


def test_the_bundle_is_as_large_as_it_says(told):
    said, home = told
    length = rows(
        home, "SELECT length FROM bundles JOIN releases ON release_id = releases.id WHERE version = '1.1.0'"
    )[0][0]
    assert said["size"] == f"{length / 1e6:.1f}"


def test_it_leaves_no_process(told):
    _, home = told
    assert subprocess.run(["pgrep", "-f", str(home)], capture_output=True, check=False).stdout == b""


def test_a_directory_that_no_demo_made_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    argv = [sys.executable, "-m", "release_server.demo.cli", "demo", "--exit", "--data", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no demo made it" in done.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_what_an_earlier_demo_left_is_set_aside_and_removed_after_the_story(tmp_path):
    home, before = tmp_path / "demo", tmp_path / ".demo.before"
    for left in ("of the first", "of the second", "of the third"):
        story = Story(home, home, 3)
        assert not any(home.glob("of *"))
        (home / left).touch()
        story._mark.close()
    assert [file.name for file in before.glob("of *")] == ["of the second"]
    story.forget_before()
    assert [entry.name for entry in tmp_path.iterdir()] == ["demo"]
    before.mkdir()
    (before / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError):
        Story(home, home, 3)
    assert (before / "thesis.txt").exists()


def test_ctrl_c_ends_it_and_all_it_started_also_where_a_shell_had_it_ignored(tmp_path):
    home = tmp_path / "relfleet-demo"
    argv = [sys.executable, "-m", "release_server.demo.cli", "demo", "--agents", "3", "--data", str(home)]
    in_background = ["/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh", *argv]
    demo = subprocess.Popen(in_background, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert demo.stdout.readline().startswith(" server ")
    demo.send_signal(signal.SIGINT)
    try:
        _, complained = demo.communicate(timeout=60)
    finally:
        demo.kill()
    assert (demo.returncode, "Traceback" in complained) == (130, False)
    assert subprocess.run(["pgrep", "-f", str(home)], capture_output=True, check=False).stdout == b""


IN_A_FORK = """
import os, signal, sys
from pathlib import Path
from release_server.demo.processes import Processes
home = Path(sys.argv[1])
signal.signal(signal.SIGINT, signal.default_int_handler)
processes = Processes(home, home / "log")
os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))
try:
    getattr(processes, sys.argv[2])(*eval(sys.argv[3]))
except KeyboardInterrupt:
    print("heard")
finally:
    processes.stop()
"""


@pytest.mark.parametrize(
    ("start", "words"),
    [("keep", "('one', ['/bin/sleep', '60'], home / 'one')"), ("begin", "('release', '--help')")],
    ids=["what goes on", "a command"],
)
def test_ctrl_c_while_a_process_is_started_is_not_lost(tmp_path, start, words):
    argv = [sys.executable, "-c", IN_A_FORK, str(tmp_path), start, words]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
