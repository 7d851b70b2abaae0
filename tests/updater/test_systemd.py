"""The unit that `agent install-service` writes; what it does on a booted host, `make crash-all` tries."""

from __future__ import annotations

import getpass
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from agent_core.errors import UsageError
from agent_core.layout import Layout
from updater import systemd
from updater.cli import main
from updater.commands import service

ROOT = "/var/lib/relfleet"
MOST_EXPOSED = 2.5
"""Of 10, as `systemd-analyze security` counts for an agent that runs as root."""

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="this machine has no systemd-analyze"
)


@pytest.fixture
def systemd_host(tmp_path, monkeypatch):
    """A host that says it was started by systemd; the directory of its units."""
    units = tmp_path / "units"
    units.mkdir()
    monkeypatch.setattr(service, "UNITS", units)
    monkeypatch.setattr(service, "BOOTED", tmp_path)
    return units


@pytest.fixture
def root(tmp_path):
    """An agent's directory with nothing installed."""
    layout = Layout(tmp_path / "agent")
    layout.make()
    return layout.root


def verdict(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)


@needs_analyze
@pytest.mark.parametrize("user", ["", "daemon"])
def test_systemd_finds_nothing_odd_in_the_unit(tmp_path, user):
    file = tmp_path / "agent.service"
    file.write_text(systemd.unit(ROOT, service._python(), user=user))
    found = verdict("verify", str(file))
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@needs_analyze
def test_the_unit_leaves_little_exposed(tmp_path):
    file = tmp_path / "agent.service"
    file.write_text(systemd.unit(ROOT, service._python()))
    threshold = f"--threshold={int(MOST_EXPOSED * 10)}"
    found = verdict("security", "--offline=true", threshold, "--no-pager", str(file))
    assert found.returncode == 0, found.stdout


def test_only_a_newer_systemd_is_told_to_wait_longer_after_each_crash():
    older, newer = (systemd.unit(ROOT, "/usr/bin/python3", steps=steps) for steps in (False, True))
    assert ("RestartSteps=" in older, "RestartSteps=" in newer) == (False, True)
    assert older.count("RestartSec=") == newer.count("RestartSec=") == 1


@pytest.mark.parametrize("steps", [False, True])
def test_no_limit_of_systemds_ends_a_trial_before_its_boots_are_used_up(steps):
    """Its default is five starts in ten seconds; then a bad version would stand still for ever."""
    lines = systemd.unit(ROOT, "/usr/bin/python3", steps=steps).splitlines()
    unit = lines[lines.index("[Unit]") : lines.index("[Service]")]
    assert "StartLimitIntervalSec=0" in unit
    assert "Restart=always" in lines


@pytest.mark.parametrize(
    ("printed", "release"),
    [
        ("systemd 252 (252.39-1~deb12u1)\n+PAM +AUDIT", 252),
        ("systemd 257.4-1-arch\n", 257),
        ("", 0),
        ("sh: no", 0),
    ],
)
def test_the_release_is_read_off_what_systemctl_says(printed, release):
    assert systemd.release_of(printed) == release


@pytest.mark.parametrize(
    ("root", "more"),
    [
        ("/srv/two words", {}),
        ("/srv/100%", {}),
        ("/srv/$HOME", {}),
        ("/srv/a\nUser=root", {}),
        ("srv", {}),
        ("/tmp/agent", {}),
        ("/var/tmp", {}),
        (ROOT, {"name": "../evil"}),
        (ROOT, {"name": ""}),
        (ROOT, {"user": "a b"}),
    ],
)
def test_what_a_unit_cannot_carry_is_refused_with_what_it_can(root, more):
    with pytest.raises(UsageError) as refused:
        systemd.unit(root, "/usr/bin/python3", **more)
    assert refused.value.why


@pytest.mark.parametrize(
    ("text", "root"),
    [
        (systemd.unit(ROOT, "/usr/bin/python3"), ROOT),
        (systemd.unit("/srv/a.b.", "/usr/bin/python3"), "/srv/a.b."),
        ("[Unit]\nDescription=of somebody else\n", ""),
        ("", ""),
    ],
    ids=["ours", "ours, ending with a dot", "another's", "empty"],
)
def test_a_unit_says_whose_it_is(text, root):
    assert systemd.root_of(text) == root


def test_print_writes_the_unit_to_stdout_and_needs_no_systemd(capsys, root, monkeypatch, tmp_path):
    monkeypatch.setattr(systemd, "_EMPTIED", ())  # where tests live
    monkeypatch.setattr(service, "BOOTED", tmp_path / "not there")
    assert main(["install-service", "--print", "--root", str(root), "--name", "probe"]) == 0
    text = capsys.readouterr().out
    assert systemd.root_of(text) == str(root)
    assert f"ReadWritePaths={root}\n" in text
    assert main(["install-service", "--print", "--root", str(root), "--name", "probe", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"unit": "probe.service", "text": text}


def test_without_systemd_the_error_names_what_to_do_instead(capsys, root, monkeypatch, tmp_path):
    monkeypatch.setattr(service, "BOOTED", tmp_path / "not there")
    assert main(["install-service", "--root", str(root), "--json"]) == 7
    problem = json.loads(capsys.readouterr().err)["error"]
    assert (problem["reason"], "--supervise" in problem["then"]) == ("no-systemd", True)


def test_a_host_without_a_version_gets_no_unit_yet(capsys, root, systemd_host):
    assert main(["install-service", "--root", str(root)]) == 7
    assert "agent once" in capsys.readouterr().err
    assert main(["install-service", "--root", str(root.parent / "nobody")]) == 7
    assert "agent enroll" in capsys.readouterr().err
    assert list(systemd_host.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[Service]\nExecStart=/bin/true\n", "not written by"),
        (systemd.unit("/srv/other", "/usr/bin/python3"), "/srv/other"),
    ],
    ids=["by hand", "of another root"],
)
def test_a_unit_of_another_is_neither_replaced_nor_removed(
    capsys, root, systemd_host, monkeypatch, text, why
):
    monkeypatch.setattr(systemd, "_EMPTIED", ())
    version = "1.0.0-" + "a" * 12
    (root / "versions" / version).mkdir()
    for part in (".bundle.json", "agent.py"):
        (root / "versions" / version / part).touch()
    (root / "current").symlink_to(f"versions/{version}")
    file = systemd_host / "relfleet-agent.service"
    file.write_text(text)
    assert main(["install-service", "--root", str(root)]) == 6
    assert why in capsys.readouterr().err
    assert file.read_text() == text
    if not systemd.root_of(text):
        assert main(["uninstall-service", "--yes"]) == 6
        assert file.read_text() == text


def test_a_unit_that_is_not_there_is_uninstalled_already(capsys, systemd_host):
    assert main(["uninstall-service", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] is False


def test_uninstalling_asks_first(capsys, systemd_host):
    file = systemd_host / "relfleet-agent.service"
    file.write_text(systemd.unit(ROOT, "/usr/bin/python3"))
    assert main(["uninstall-service", "--no-input"]) == 2
    assert ROOT in capsys.readouterr().err
    assert file.exists()


def test_the_agent_runs_as_the_owner_of_its_root(root, monkeypatch, capsys):
    monkeypatch.setattr(systemd, "_EMPTIED", ())
    other = next(name for name in ("nobody", "daemon") if name != getpass.getuser())
    assert main(["install-service", "--print", "--root", str(root), "--user", other]) == 2
    assert f"chown -R {other}: {root}" in capsys.readouterr().err
    owner = getpass.getuser()
    assert main(["install-service", "--print", "--root", str(root), "--user", owner]) == 0
    assert (f"User={owner}\n" in capsys.readouterr().out) == (os.getuid() != 0)


def test_the_interpreter_is_the_hosts_own_and_not_of_a_virtual_environment():
    python = Path(service._python())
    assert os.access(python, os.X_OK)
    assert not (python.parent.parent / "pyvenv.cfg").exists()
    said = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout

    assert said.split()[1] == platform.python_version()
