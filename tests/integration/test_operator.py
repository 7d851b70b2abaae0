"""What a person on the host can do: hold, roll back, retry, look once, and stop it in mid-trial."""

from __future__ import annotations

import json
import os
import signal
import zipfile

import psutil
import pytest

from agent_core import slots
from agent_core.hooks import POST_ACTIVATE, PRE_ACTIVATE
from tests.integration.world import until
from updater.device import Device

WAITING = "1.4.0-waits"


@pytest.fixture(scope="module")
def host(world):
    """Each story offers it a version that it has not had, so none depends on another."""
    world.publish("1.1.0", "1.2.0", "1.3.0", WAITING, "2.0.0-exits-at-once")
    return world.host(world.cohort())


def test_a_held_host_takes_nothing_until_the_hold_ends(world, host):
    before = host.record
    assert host.agent("hold", "--reason", "stocktaking")[0] == 0
    world.pin(host.cohort, "1.1.0")
    host.await_reason("held")
    host.await_seen(held=True, reason="held")
    assert host.record == before
    assert host.agent("unhold")[0] == 0
    host.await_good("1.1.0")
    host.await_seen(held=False, version="1.1.0")


def test_the_status_names_the_workload_that_runs_and_none_that_has_ended(host):
    host.await_agent()
    ended = until("a workload", lambda: host.news.get("workload_pid"))
    os.kill(ended, signal.SIGKILL)
    now = until("its successor", lambda: (pid := host.news.get("workload_pid")) != ended and pid)
    assert psutil.Process(now).ppid() == host.pid()


def test_the_doctor_finds_nothing_wrong_with_a_host_that_runs_and_what_is_sent_is_whole(world, host):
    until("a check", lambda: host.reason == "up-to-date")
    until("a report", (host.layout.state / "session.json").exists)
    host.await_agent()
    code, told, said = host.agent("doctor", "--json")
    findings = json.loads(told)
    assert (code, said) == (0, ""), [finding for finding in findings if finding["state"] == "bad"]
    assert {finding["check"] for finding in findings} >= {"server", "clock", "trust", "running", "spool"}
    file = world.home / f"{host.name}.zip"
    assert host.agent("diagnostics", "-o", str(file))[0] == 0
    with zipfile.ZipFile(file) as archive:
        text = b"".join(archive.read(name) for name in archive.namelist()).decode()
        versions = json.loads(archive.read("versions.json"))
    assert host.layout.key.read_text().strip() not in text
    assert json.loads((host.layout.state / "session.json").read_text())["session"] not in text
    assert all(version["wrong or missing"] == [] for version in versions.values())
    code, told, _ = host.agent("upgrade-launcher", "--json")
    assert (code, json.loads(told)["changed"]) == (0, False)


def test_a_rollback_by_hand_goes_back_and_skips_until_retry(world, host):
    before = host.good
    hooks = [f"{name} {before}" for name in (PRE_ACTIVATE, POST_ACTIVATE)]
    world.pin(host.cohort, "1.2.0")
    host.await_good("1.2.0")
    assert (host.root / "hooks").read_text().splitlines() == hooks
    agent = host.await_agent()
    assert host.agent("rollback", "--yes")[0] == 0
    host.await_good(before)
    assert host.skipped[world.digest("1.2.0")] == "operator"
    host.await_agent(other_than=agent)
    host.await_look("skipped")
    assert host.good == before
    host.await_seen(version=before, reason="skipped")
    assert (host.root / "hooks").read_text().splitlines() == hooks  # going back runs none
    assert host.agent("retry")[0] == 0
    host.await_good("1.2.0")
    assert (host.root / "hooks").read_text().splitlines() == hooks + hooks


def test_once_waits_for_the_trial_and_tells_its_end_by_the_exit_code(world, host):
    good = host.good
    polls_every(world, host, 600)  # so that `once` is the first to look
    for version, code, after in (("2.0.0-exits-at-once", 11, good), ("1.3.0", 10, "1.3.0")):
        world.pin(host.cohort, version)
        until("the pin to be published", lambda pinned=version: leads_to(world, host) == pinned)
        assert host.agent("once", "--detailed-exitcode")[0] == code
        assert host.good == after
        until("the host to have looked by itself", lambda: has_looked(host))
    polls_every(world, host, 1)


def leads_to(world, host):
    """The version in the published directive. Another timestamp may be another cohort's."""
    return world.directive(host.cohort)["release"]


def has_looked(host) -> bool:
    """Every start of a version after a trial is followed by one look."""
    return host.news["version"] == host.record.good and host.news.get("poll", "not yet") != "not yet"


def polls_every(world, host, poll_s):
    world.client.patch(f"/cohorts/probe/{host.cohort}", {"poll_s": poll_s})

    def has_heard() -> bool:
        host.look()
        return Device.load(host.root).seen().directive.poll_s == poll_s

    until("the host to hear of its new period", has_heard)


def test_a_stop_in_the_middle_of_a_trial_gives_the_boot_back_and_the_trial_goes_on(world, host):
    world.pin(host.cohort, WAITING)

    def is_tried() -> bool:
        record = host.record
        return record.phase == slots.TRIAL and record.is_up and host.news.get("version") == record.candidate

    until("the trial", is_tried, every_s=0.01)
    assert host.record.boots_left == host.record.boots_max - 1
    host.stop()
    assert (host.record.phase, host.record.boots_left) == (slots.TRIAL, host.record.boots_max)
    (host.root / "go").touch()
    host.start()
    host.await_good(WAITING)
    assert world.digest(WAITING) not in host.skipped
