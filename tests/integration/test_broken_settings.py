"""A host whose settings or identity are broken: real programs, started anew as after a reboot."""

from __future__ import annotations

import json
import shutil
import time

import pytest

from agent_core.settings import load_agent
from tests.crash.rig import GOOD, NEW, Rig
from updater import control, last_good


@pytest.fixture(scope="module")
def rig():
    with Rig() as made:
        made.installed(made.home / "installed")
        yield made


def comes(claim):
    until_s = time.monotonic() + 40
    while not (found := claim()) and time.monotonic() < until_s:
        time.sleep(0.05)
    return found


def last_told(rig):
    """The reason in the last report of whom is led to the new version."""
    reports = [request for request in rig.origin(NEW).requests if request.method == "POST"]
    return json.loads(reports[-1].body)["reason"] if reports else ""


def test_a_slip_in_the_settings_keeps_the_product_running_and_new_versions_away_until_it_is_mended(rig):
    host = rig.copy(rig.home / "installed", rig.home / "host")
    assert host.settle(GOOD) == ""
    host.lead_to(NEW)
    good = host.layout.settings.read_text().replace("max_backoff_s = 1.0", "max_backoff_s = 3600.0")
    host.layout.settings.write_text(good)
    last_good.keep(host.layout, load_agent(host.layout))
    host.layout.settings.write_text(f"{good}\n[moon]\nphase = 1\n")
    control.remember_backoff(host.layout, 20, 3600)  # a night with the slip; the mend ends that too
    with host.running():
        assert comes(lambda: host.rests_on(GOOD))
        assert comes(lambda: control.wake(host.layout))
        assert comes(lambda: "moon" in control.read_status(host.layout)["poll"])
        status = control.read_status(host.layout)
        assert ("moon" in status["settings"], status["workload_pid"] is not None) == (True, True)
        host.layout.settings.write_text(good)
        assert comes(lambda: host.rests_on(NEW))
        # An hour lies between two heartbeats: it is the slip itself that is told, and its end.
        assert comes(lambda: last_told(rig) == "up-to-date")
        host.layout.settings.write_text(f"{good}\n[mars]\nphase = 1\n")
        assert comes(lambda: last_told(rig) == "bad-settings")
        host.layout.settings.write_text(good)
        assert comes(lambda: last_told(rig) == "up-to-date")


def test_an_identity_in_whose_place_a_directory_lies_keeps_no_host_from_its_product_or_the_next(rig):
    host = rig.copy(rig.home / "installed", rig.home / "mended")
    assert host.settle(GOOD) == ""
    host.lead_to(NEW)
    whole = host.layout.identity.read_bytes()
    host.layout.identity.unlink()
    (host.layout.identity / "inside").mkdir(parents=True)
    with host.running():
        assert comes(lambda: host.rests_on(NEW))
        assert host.layout.identity.read_bytes() == whole


def test_a_host_that_cannot_tell_who_it_is_runs_its_product_takes_nothing_new_and_is_mended_by_hand(rig):
    host = rig.copy(rig.home / "installed", rig.home / "nobody")
    assert host.settle(GOOD) == ""
    host.lead_to(NEW)
    whole, files = host.layout.identity.read_bytes(), (host.layout.identity, host.layout.identity_copy)
    for file in files:
        file.write_bytes(b"{")
    with host.running():
        assert comes(lambda: "cannot tell who it is" in control.read_status(host.layout).get("poll", ""))
        assert control.read_status(host.layout)["workload_pid"] is not None
        assert host.rests_on(GOOD)
        assert [file.read_bytes() for file in files] == [b"{", b"{"]
        host.layout.identity.write_bytes(whole)
        assert comes(lambda: host.rests_on(NEW))
        assert host.layout.identity_copy.read_bytes() == whole


@pytest.mark.parametrize("lost", ["state/identity*", "state"])
def test_a_host_that_lost_its_identity_or_its_state_runs_its_product_and_takes_nothing_new(rig, lost):
    host = rig.copy(rig.home / "installed", rig.home / lost.replace("/", "-").strip("*"))
    assert host.settle(GOOD) == ""
    host.lead_to(NEW)
    for place in host.root.glob(lost):
        place.unlink() if place.is_file() else shutil.rmtree(place)
    with host.running():
        assert comes(lambda: "not enrolled" in control.read_status(host.layout).get("poll", ""))
        assert control.read_status(host.layout)["workload_pid"] is not None
        assert host.rests_on(GOOD)
