"""What `deploy/` offers to copy can be used: units, scripts, and the commands they call."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from tests.test_docs import HOUSE, call_in, problem
from updater import systemd

DEPLOY = HOUSE / "deploy"
UNITS = sorted(DEPLOY.glob("systemd/*.service"))
MOST_EXPOSED = 1.5
"""Of 10, as `systemd-analyze security` counts."""
CALLED_BY = re.compile(r"^[\s#;]*(exec |ExecStart=|command=)?")
FILES = sorted(file for file in DEPLOY.rglob("*") if file.is_file())

needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="this machine has no systemd-analyze"
)


@needs_analyze
@pytest.mark.parametrize("file", UNITS, ids=lambda file: file.stem)
@pytest.mark.parametrize(
    "words", [["verify"], ["security", "--offline=true", f"--threshold={int(MOST_EXPOSED * 10)}"]]
)
def test_systemd_takes_the_units_and_finds_little_exposed(tmp_path, file, words):
    unit = tmp_path / file.name
    unit.write_text(file.read_text().replace("/opt/relfleet/bin/release-server", sys.executable))
    found = subprocess.run(["systemd-analyze", *words, unit], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, ""), found.stdout


@needs_analyze
def test_the_drop_in_that_the_pages_show_fits_the_agents_unit(tmp_path):
    pages = (HOUSE / "docs" / "operations.md").read_text()
    drop_in = next(
        block for block in re.findall(r"```ini\n(.*?)```", pages, re.DOTALL) if "MemoryMax" in block
    )
    unit = tmp_path / "relfleet-agent.service"
    unit.write_text(systemd.unit("/var/lib/relfleet", sys.executable))
    (tmp_path / f"{unit.name}.d").mkdir()
    (tmp_path / f"{unit.name}.d" / "override.conf").write_text(drop_in)
    found = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout + found.stderr) == (0, "")


@pytest.mark.parametrize(
    "script",
    [file for file in FILES if file.read_bytes().startswith(b"#!/bin/sh")],
    ids=lambda file: file.name,
)
def test_scripts_are_executable_and_can_be_parsed(script):
    assert script.stat().st_mode & 0o111
    subprocess.run(["sh", "-n", script], check=True)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(DEPLOY)))
def test_the_commands_that_a_file_calls_exist(file):
    lines = file.read_text().replace("\\\n", " ").splitlines()
    calls = [CALLED_BY.sub("", line).replace("/opt/relfleet/bin/", "") for line in lines]
    found = [words for call in calls if (words := call_in(call)) and words[0] != "relfleet"]
    assert found or file.name == "Dockerfile"  # which calls the entry point
    assert [each for words in found if (each := problem(words))] == []


@pytest.mark.parametrize(
    ("left", "does"),
    [
        ((), ["enroll", "run"]),
        (("identity.json",), ["run"]),
        (("identity.json", "identity.copy.json"), ["run"]),
        (("identity.copy.json",), ["run"]),
    ],
    ids=["new", "older", "whole", "lost, with its copy"],
)
def test_a_container_enrols_only_a_host_that_has_no_identity_left(tmp_path, left, does):
    (state := tmp_path / "root/state").mkdir(parents=True)
    for name in left:
        (state / name).touch()
    agent = tmp_path / "agent"
    agent.write_text(f'#!/bin/sh\necho "$1" >>{tmp_path}/done\n')
    agent.chmod(0o755)
    environ = {"PATH": f"{tmp_path}:/usr/bin:/bin", "RELFLEET_ROOT": str(tmp_path / "root")}
    environ |= {"RELFLEET_ENROLL_SERVER": "http://127.0.0.1:9", "RELFLEET_ENROLL_PRODUCT": "probe"}
    subprocess.run(["sh", DEPLOY / "container/entrypoint"], env=environ, check=True)
    assert (tmp_path / "done").read_text().split() == does
