"""This module holds the phases of the kill tier: stretches of what a host does, each from a prepared host."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from agent_core import slots
from agent_core.archive import stored_zip
from agent_core.layout import read_json
from tests.crash.host import Host, environment
from tests.crash.rig import BAD, BOOTS, BY_DELTA, FLOOR, GOOD, NEW, OLD, Rig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def no_faults(_host: Host) -> list[str]:
    return []


def all_done(_host: Host) -> str:
    return ""


@dataclass(frozen=True)
class Phase:
    """One stretch of a flow, which is run from a prepared host.

    Attributes:
        start: the directory that is copied for each case.
        argv: what runs, of a host.
        ends: where that run comes to its end by itself; empty when the program ends.
        rests: the version on which it comes to rest, killed or not.
        skipped: the version that is skipped then.
        unasked: where it rests when it was killed before what a person asked for was on the disk.
        only_one: one process is killed, not all.
        again: how it is started again; the launcher if not said.
        faults: what else is wrong with the host, after any kill and at rest.
        done: what the run that nobody kills has not done; empty when it did all.
        share: `make crash` has time for one of so many kills.
    """

    name: str
    start: Path
    argv: Callable[[Host], list[str]]
    rests: str
    stdin: bytes = b""
    skipped: str = ""
    unasked: str = ""
    only_one: bool = False
    ends: bool = True
    again: Callable[[Host], list[str]] | None = None
    faults: Callable[[Host], list[str]] = no_faults
    done: Callable[[Host], str] = all_done
    share: int = 1


def prepare(rig: Rig) -> list[Phase]:
    """Prepare a host for each phase by letting a phase before it come to its end."""
    home = rig.home / "starts"
    home.mkdir()
    first = rig.enrolled(home / "enrolled")
    rig.installed(home / "installed")

    def become(name: str, source: str, version: str, *steps: Callable[[Host], object]) -> Path:
        host = rig.copy(home / source, home / name)
        host.lead_to(version)
        for step in steps:
            step(host)
        return host.root

    def rest(host: Host) -> None:
        wrong = host.settle(NEW)
        assert not wrong, wrong

    return [
        Phase("check", become("check", "installed", NEW), _checker, NEW, b"check\n"),
        Phase("arm", become("arm", "installed", NEW, _check), Host.launcher, NEW),
        Phase("trial", become("trial", "arm", NEW, _arm), Host.launcher, NEW, ends=False),
        Phase("judged", become("judged", "installed", BAD, _check, _arm), Host.launcher, GOOD, skipped=BAD),
        Phase(
            "used up", become("used-up", "judged", BAD, _use_up), Host.launcher, GOOD, skipped=BAD, ends=False
        ),
        Phase(
            "operator", become("operator", "trial", NEW, rest), _roll_back, GOOD, skipped=NEW, unasked=NEW,
            done=partial(_is_good, version=GOOD),
        ),
        Phase(
            "by name", become("by-name", "operator", NEW, partial(_keep_old, home / "installed")),
            partial(_roll_back, to=OLD), OLD, skipped=NEW, unasked=NEW, done=partial(_is_good, version=OLD),
        ),
        Phase(
            "delta", become("delta", "installed", BY_DELTA), _checker, NEW, b"check\n",
            done=_came_by_delta, share=3,
        ),
        Phase(
            "launcher", become("launcher", "installed", GOOD, _age_launcher), _upgrade_launcher, GOOD,
            faults=_launchers_lost, done=_is_launcher_new,
        ),
        Phase("first", first.root, _run, GOOD, ends=False, again=_run),
        Phase(
            "upgrade", become("upgrade", "installed", NEW), Host.supervised, NEW, only_one=True, ends=False,
            share=4,
        ),
        Phase(
            "way back", become("way-back", "installed", BAD), Host.supervised, GOOD, skipped=BAD, only_one=True,
            ends=False, share=4,
        ),
    ]  # fmt: skip


# --- what runs --------------------------------------------------------------------------------------------


def _checker(host: Host) -> list[str]:
    return host.agent(GOOD, "checker")


def _roll_back(host: Host, to: str = "") -> list[str]:
    return host.agent(NEW, "rollback", *(["--to", to] if to else []), "--yes")


def _upgrade_launcher(host: Host) -> list[str]:
    return host.agent(GOOD, "upgrade-launcher")


def _run(host: Host) -> list[str]:
    """What a person types on a new host."""
    return [sys.executable, "-I", "-B", "-m", "updater", "run", "--root", str(host.root)]


# --- how a host is prepared -------------------------------------------------------------------------------


def _check(host: Host) -> None:
    done = subprocess.run(
        _checker(host), input=b"check\n", env=environment(), check=True, stdout=subprocess.PIPE
    )
    assert b'"candidate": "1' in done.stdout, done.stdout


def _arm(host: Host) -> None:
    outcome = host.device.outcome()
    assert outcome
    slots.begin_trial(host.root, outcome.candidate, BOOTS, 20, floor=FLOOR)


def _use_up(host: Host) -> None:
    for _ in range(BOOTS):
        slots.boot(host.root, "")


def _keep_old(installed: Path, host: Host) -> None:
    """As on a host that keeps three versions: the oldest is here again, with its signed facts."""
    source, name = Host(host.rig, installed), host.rig.names[OLD]
    for part in (source.layout.version_dir(name), source.device.facts_file(name)):
        subprocess.run(["cp", "-a", part, host.root / part.relative_to(installed)], check=True)


def _age_launcher(host: Host) -> None:
    """Another launcher that works: of one more, empty file."""
    file = host.layout.launcher_file
    shutil.copy(file, _own_launcher(host))
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    file.write_bytes(stored_zip({**members, "older": b""}))
    shutil.copy(file, _older_launcher(host))


def _own_launcher(host: Host) -> Path:
    return host.rig.home / "launcher.own"


def _older_launcher(host: Host) -> Path:
    return host.rig.home / "launcher.older"


# --- what must be so --------------------------------------------------------------------------------------


def _is_good(host: Host, version: str) -> str:
    record = host.record
    return "" if record and record.good == host.rig.names[version] else f"{version} is not good: {record}"


def _came_by_delta(host: Host) -> str:
    """A delta that served is forgotten; one that was never begun left no note at all."""
    tries = read_json(host.layout.state / "deltas.json")
    return "" if tries == {} else f"no delta served: {tries}"


def _launchers_lost(host: Host) -> list[str]:
    """There is always a launcher that proved itself, and the one before is not lost."""
    own, older = _own_launcher(host).read_bytes(), _older_launcher(host).read_bytes()
    kept = host.layout.launcher_previous
    found = host.layout.launcher_file.read_bytes()
    if found not in (own, older):
        return ["launcher.pyz is none that proved itself"]
    before = kept.read_bytes() if kept.exists() else b""
    return [] if older in (found, before) else ["the launcher before is lost"]


def _is_launcher_new(host: Host) -> str:
    found = host.layout.launcher_file.read_bytes()
    return "" if found == _own_launcher(host).read_bytes() else "launcher.pyz is the old one"
