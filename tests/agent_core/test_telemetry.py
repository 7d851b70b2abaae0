"""Telemetry: figures of real processes, and log lines that machines and people can read without secrets."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from agent_core.telemetry import (
    EcsFormatter,
    Figures,
    PlainFormatter,
    redact,
    set_level,
    setup_logging,
    tree,
    tree_cpu_s,
    tree_rss,
)

CHILD_WITH_A_CHILD = """\
import subprocess, sys, time
blob = bytearray(30 * 2**20)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print("up", flush=True)
try:
    time.sleep(60)
finally:
    child.kill(); child.wait()
"""


@pytest.fixture
def family():
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD_WITH_A_CHILD], stdout=subprocess.PIPE, start_new_session=True
    )
    child.stdout.readline()
    yield child
    os.killpg(child.pid, 9)
    child.wait()
    child.stdout.close()


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


def test_the_figures_are_those_of_the_workload_with_its_children_and_of_the_agent(family) -> None:
    figures = Figures()
    first = figures.take(100.0, workload_pid=family.pid, started_s=90.0, restarts=2)
    assert first["processes"] == 2
    assert first["rss"] > 30 * 2**20
    assert first["uptime_s"] == 10.0
    assert first["restarts"] == 2
    assert first["fds"] > 0
    assert first["agent_rss"] > 2**20
    assert first["agent_fds"] > 0
    assert "cpu" not in first  # nothing to compare with yet
    second = figures.take(101.0, workload_pid=family.pid, started_s=90.0)
    assert 0 <= second["cpu"] < 1000
    assert second["agent_cpu"] >= 0
    assert all(type(value) in (int, float) for value in second.values())


def test_a_workload_that_does_not_run_has_no_figures_but_its_restarts(family) -> None:
    os.killpg(family.pid, 9)
    while tree(family.pid):
        time.sleep(0.01)
    for pid in (None, family.pid):
        figures = Figures().take(1.0, workload_pid=pid, started_s=0.0, restarts=3)
        assert {"rss", "uptime_s", "processes"}.isdisjoint(figures)
        assert figures["restarts"] == 3
    assert tree_rss(family.pid) is None
    assert tree_cpu_s(family.pid) is None


def test_a_new_workload_is_not_compared_with_the_old_one(family) -> None:
    figures = Figures()
    figures.take(1.0, workload_pid=os.getpid())
    assert "cpu" not in figures.take(2.0, workload_pid=family.pid)


# --- the log --------------------------------------------------------------------------------------------


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_pipe_gets_ecs_json_with_a_constant_message_and_keyed_fields(root_logger) -> None:
    out = io.StringIO()
    setup_logging(stream=out)
    logging.getLogger("updater.poll").info("trial begun", extra={"version": "1.2.3", "boots": 3})
    (line,) = lines(out.getvalue())
    assert line["message"] == "trial begun"
    assert line["log.level"] == "info"
    assert line["log.logger"] == "updater.poll"
    assert line["service.name"] == "relfleet-agent"
    assert line["relfleet"] == {"version": "1.2.3", "boots": 3}
    assert line["@timestamp"].endswith("+00:00")
    assert line["process.pid"] == os.getpid()


def test_an_exception_is_one_line_with_its_type_and_trace(root_logger) -> None:
    out = io.StringIO()
    setup_logging(stream=out)
    try:
        raise ValueError("Bearer abc.def was refused")
    except ValueError:
        logging.getLogger("x").exception("tick failed")
    (line,) = lines(out.getvalue())
    assert line["error.type"] == "ValueError"
    assert line["error.message"] == "Bearer *** was refused"
    assert "Traceback" in line["error.stack_trace"]
    assert "abc.def" not in out.getvalue()


def test_a_terminal_gets_plain_text(root_logger) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    handler = setup_logging(stream=out)
    assert isinstance(handler.formatter, PlainFormatter)
    logging.getLogger("x").warning("workload ended", extra={"code": 3})
    assert out.getvalue().rstrip().endswith("warning workload ended code=3")


@pytest.mark.parametrize(
    "fields",
    [
        {"token": "hidden"},
        {"enroll_token": "hidden"},
        {"server.password": "hidden"},
        {"headers": {"Authorization": "hidden", "Cookie": "hidden"}},
        {"entries": [{"session": "hidden"}]},
        {"url": "https://me:hidden@server/x"},
        {"said": "Authorization: Bearer hidden"},
        {"query": "?a=1&token=hidden&b=2"},
        {"agent_private": "hidden"},
    ],
    ids=str,
)
def test_secrets_never_reach_the_log(root_logger, fields: dict) -> None:
    for formatter in (EcsFormatter("x"), PlainFormatter()):
        record = logging.makeLogRecord({"msg": "said", "levelname": "INFO", **fields})
        assert "hidden" not in formatter.format(record)


def test_what_only_sounds_like_a_secret_stays() -> None:
    fields = {"session_s": 60, "tokens_left": 3, "keyid": "abc", "path": Path("/a/b@c"), "none": None}
    assert redact(fields) == {
        "session_s": 60,
        "tokens_left": 3,
        "keyid": "abc",
        "path": "/a/b@c",
        "none": None,
    }


def test_a_log_file_is_private_rotates_and_is_bounded(tmp_path: Path, root_logger) -> None:
    file = tmp_path / "log" / "agent.log"
    setup_logging(file=file, max_bytes=4096, files=2)
    for _ in range(200):
        logging.getLogger("x").info("a line", extra={"filler": "z" * 50})
    assert sorted(found.name for found in file.parent.iterdir()) == [
        "agent.log",
        "agent.log.1",
        "agent.log.2",
    ]
    assert all(found.stat().st_size <= 4096 for found in file.parent.iterdir())
    assert file.stat().st_mode & 0o007 == 0
    assert lines(file.read_text())


def test_a_log_that_cannot_be_written_loses_lines_and_nothing_else(
    tmp_path: Path, root_logger, capsys
) -> None:
    (tmp_path / "occupied").write_text("")
    handler = setup_logging(file=tmp_path / "occupied" / "agent.log")
    logging.getLogger("x").info("lost")
    assert handler.lost == 1
    handler = setup_logging(file=Path("/dev/full"), max_bytes=0)
    logging.getLogger("x").info("lost")
    logging.getLogger("x").info("lost")
    assert handler.lost == 2
    assert capsys.readouterr().err == ""


def test_a_reader_that_went_away_does_not_stop_the_agent(root_logger, capsys) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    setup_logging(stream=Gone())
    logging.getLogger("x").info("lost")
    assert capsys.readouterr().err == ""


def test_setting_up_again_replaces_the_former_place_and_the_level_changes_live(root_logger) -> None:
    first, second = io.StringIO(), io.StringIO()
    setup_logging(stream=first)
    setup_logging(stream=second, level="warning")
    logging.getLogger("x").info("not written")
    set_level("debug")
    logging.getLogger("x").debug("written")
    assert first.getvalue() == ""
    assert [line["message"] for line in lines(second.getvalue())] == ["written"]
