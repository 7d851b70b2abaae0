"""The checker's process: one request a line, one answer a line."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tuf.api.serialization import DeserializationError

from agent_core import slots
from agent_core.errors import NotFoundError
from agent_core.layout import Layout
from agent_core.wire import ReportAnswer
from tests.http_origin import Origin, Status
from updater import identity as identities
from updater import internal, report
from updater.decide import Action
from updater.device import Device, Outcome
from updater.identity import Identity

if TYPE_CHECKING:
    from pathlib import Path

ASKED = """
import pathlib, sys
from updater import checker
code = checker.serve(pathlib.Path(sys.argv[1]))
print(sorted({"tuf", "securesystemslib"} & set(sys.modules)), code)
"""


@pytest.fixture
def enrolled(tmp_path: Path) -> Path:
    """A host whose server is not there."""
    layout = Layout(tmp_path / "root")
    layout.make()
    identities.make_key(layout)
    identities.save(layout, Identity("http://127.0.0.1:9", "shop", "web-1", "any", "main"))
    return layout.root


def asked(root: Path, requests: str) -> list[str]:
    argv = [sys.executable, "-c", ASKED, str(root)]
    done = subprocess.run(argv, input=requests, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def test_a_preflight_reads_no_metadata_that_are_nobodys(enrolled: Path) -> None:
    (enrolled / "state" / "tuf" / "stray.json").write_text("{}")
    (enrolled / "state" / "tuf" / "targets.json").write_bytes(b"cut")
    internal.read_what_is_here(enrolled)
    (enrolled / "state" / "tuf" / "targets.json").write_text('{"signed": {"_type": "moon"}}')
    with pytest.raises(DeserializationError):
        internal.read_what_is_here(enrolled)


def test_a_report_loads_no_tuf_and_a_check_does(enrolled: Path) -> None:
    """Each start of an agent begins with a report; a check comes with news only."""
    *answers, loaded = asked(enrolled, "report {}\n")
    assert ["problem" in json.loads(answer) for answer in answers] == [True]  # nobody listens at its server
    assert loaded == "[] 0"
    *answers, loaded = asked(enrolled, "report {}\ncheck\n")
    assert [set(json.loads(answer)) & {"problem", "action"} for answer in answers] == [
        {"problem"},
        {"action"},
    ]
    assert loaded == "['securesystemslib', 'tuf'] 0"


def test_a_host_that_is_not_enrolled_is_an_answer_too(tmp_path: Path) -> None:
    *answers, _ = asked(tmp_path, "check\n")
    assert "problem" in json.loads(answers[0])


def test_a_host_that_lost_who_it_is_checks_and_reports_nothing_and_says_why(enrolled: Path) -> None:
    layout, name = Layout(enrolled), "1.0.0-" + "1" * 12
    layout.identity.unlink()
    layout.identity_copy.unlink()
    with pytest.raises(NotFoundError):
        Device.load_running(enrolled)
    slots.Slots(enrolled).write(slots.Record(good=name, previous=name))
    assert Device.load_running(enrolled).identity == identities.NOBODY
    with pytest.raises(NotFoundError):
        Device.load_anyway(enrolled)
    check, reported, loaded = asked(enrolled, "check\nreport {}\n")
    outcome = Outcome.from_json(json.loads(check))
    assert (outcome.reason, outcome.failed, "not enrolled" in outcome.detail) == ("not-found", True, True)
    assert set(json.loads(reported)) == {"problem"}
    assert loaded == "[] 0"


def test_a_slip_in_the_settings_is_an_outcome_that_the_reports_name(enrolled: Path) -> None:
    before = Outcome(Action.STAY, "up-to-date", "", "2026-03-02T12:00:00Z", verified=True)
    Device.load(enrolled).remember_outcome(before)
    Layout(enrolled).settings.write_text("[moon]\nphase = 1\n")
    said, _ = asked(enrolled, "check\n")
    outcome = Outcome.from_json(json.loads(said))
    assert (outcome.reason, outcome.failed, "moon" in outcome.detail) == ("bad-settings", True, True)
    told = report.build(Device.load_anyway(enrolled))
    assert (told.reason, told.detail) == ("bad-settings", outcome.detail)


def test_a_slip_and_another_one_are_told_to_the_server_at_once_and_each_only_once(enrolled: Path) -> None:
    answer = json.dumps(ReportAnswer("main", 0, "session", 86_400).to_json()).encode()
    with Origin() as origin:
        origin.answer("POST", "/api/v1/report", Status(200, {"Content-Type": "application/json"}, answer))
        identities.save(Layout(enrolled), Identity(origin.url, "shop", "web-1", "any", "main"))
        for slip in ("moon", "mars"):
            Layout(enrolled).settings.write_text(f"[{slip}]\nphase = 1\n")
            asked(enrolled, "check\ncheck\n")
        told = [json.loads(request.body) for request in origin.requests]
    assert [report["reason"] for report in told] == ["bad-settings"] * 2
    assert ["moon" in told[0]["detail"], "mars" in told[1]["detail"]] == [True, True]


LOOKED_AT = """
import gc, pathlib
gc.disable()
import updater.service
from updater import internal
updater.service.serve = lambda root: any(one is updater.service.Service for one in gc.get_objects())
print(internal.run(pathlib.Path()), gc.isenabled())
"""


def test_the_collector_never_looks_at_what_agent_and_checker_share() -> None:
    done = subprocess.run([sys.executable, "-c", LOOKED_AT], capture_output=True, text=True, check=True)
    assert done.stdout == "False True\n"
