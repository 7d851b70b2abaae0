"""The example product really samples, its check tells fresh from stale, and 1.2.0 is as broken as it says."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from agent_core.health import parse_checks, weakness
from release_server.publish import build as building

PROJECT = Path(__file__).parents[2] / "examples" / "warehouse-agent"


class Host:
    """A device's root and the product's files of one version, run as the agent runs them."""

    def __init__(self, place):
        self.place = place
        self.root = place / "root"
        self.samples_file = self.root / "app-data" / "samples.jsonl"
        self.samples_file.parent.mkdir(parents=True)

    def settings(self, **settings):
        lines = [f"{name} = {json.dumps(value)}" for name, value in settings.items()]
        (self.root / "app-data" / "settings.toml").write_text("\n".join(lines))

    def _environment(self, version):
        return {"PATH": os.environ["PATH"], "RELFLEET_ROOT": str(self.root), "RELFLEET_VERSION": version}

    @contextmanager
    def running(self, version):
        tree = self.place / version
        if not tree.exists():
            building._copy_product(building.read_project(PROJECT), version, tree)
        argv = [sys.executable, "-B", "app/main.py"]
        process = subprocess.Popen(
            argv, cwd=tree, env=self._environment(version), stderr=subprocess.PIPE, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.communicate()

    def check(self, version):
        argv = [sys.executable, "-I", "-S", str(PROJECT / "app" / "check.py")]
        environment = self._environment(version)
        return subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)

    def samples(self, least=1):
        """At least so many samples, as soon as they are there."""
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if self.samples_file.exists():
                lines = self.samples_file.read_text().splitlines()
                if len(lines) >= least:
                    return [json.loads(line) for line in lines]
            time.sleep(0.02)
        raise AssertionError("no samples came")


@pytest.fixture
def host(tmp_path):
    return Host(tmp_path)


def test_it_samples_processors_memory_and_disks(host):
    host.settings(interval_s=0.1)
    with host.running("1.0.0"):
        line = host.samples(3)[-1]
    assert line["version"] == "1.0.0"
    assert set(line) == {"at", "boot_s", "version", "cpu", "disk", "memory", "processes"}
    assert line["cpu"]["cores"] == psutil.cpu_count()
    assert 0 <= line["cpu"]["percent"] <= 100
    assert line["memory"]["total"] == psutil.virtual_memory().total
    assert line["disk"]["/"]["total"] == psutil.disk_usage("/").total


def test_it_samples_once_a_second_without_settings(host):
    with host.running("1.0.0"):
        first, second = host.samples(2)[:2]
    assert 0.5 < second["boot_s"] - first["boot_s"] < 3


def test_it_reports_the_processes_that_the_settings_name(host):
    name = psutil.Process().name()
    host.settings(interval_s=0.1, processes=[name, "no-such-program"])
    with host.running("1.0.0"):
        line = host.samples()[-1]
    assert line["processes"][name]["count"] >= 1
    assert line["processes"][name]["rss"] > 1_000_000
    assert line["processes"]["no-such-program"] == {"count": 0, "rss": 0, "cpu_s": 0.0}


def test_a_sampler_that_fails_spoils_no_other(host):
    host.settings(interval_s=0.1, disks=["/no/such/disk"])
    with host.running("1.0.0"):
        line = host.samples()[-1]
    assert "FileNotFoundError" in line["disk"]["error"]
    assert line["memory"]["total"] > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_at_once_when_it_is_told_to(host, number):
    host.settings(interval_s=3600)
    with host.running("1.0.0") as process:
        host.samples()
        process.send_signal(number)
        assert process.wait(5) == 0


@pytest.mark.parametrize(
    "text", ["interval_s = 0", "spool_bytes = 1", "proceses = []", "interval_s = 'x'", "["]
)
def test_settings_that_cannot_be_used_end_it_with_the_file_s_name(host, text):
    (host.root / "app-data" / "settings.toml").write_text(text)
    with host.running("1.0.0") as process:
        _, complaint = process.communicate(timeout=10)
    assert process.returncode == 1
    assert "settings.toml" in complaint


def test_the_spool_is_bounded_and_holds_whole_lines(host):
    host.settings(interval_s=0.1, spool_bytes=65_536)
    older = host.samples_file.with_name("samples.jsonl.1")
    host.samples_file.write_text('{"filler":1}\n' * 2500)  # just below half of what is allowed
    with host.running("1.0.0"):
        deadline = time.monotonic() + 20
        while not older.exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        host.samples()
    assert older.stat().st_size <= 32_768
    assert host.samples_file.stat().st_size + older.stat().st_size <= 65_536
    for path in (older, host.samples_file):
        assert all(json.loads(line) for line in path.read_text().splitlines())


def test_1_1_0_adds_network_and_temperature(host):
    host.settings(interval_s=0.1)
    with host.running("1.1.0"):
        line = host.samples(2)[-1]
    assert {"cpu", "memory", "disk", "processes", "network", "temperature"} <= set(line)
    assert set(line["network"]) == set(psutil.net_io_counters(pernic=True))
    for rates in line["network"].values():
        assert rates["received_per_s"] >= 0
    assert isinstance(line["temperature"], dict)
    assert "error" not in line["temperature"]


def test_1_2_0_exits_after_two_seconds(host):
    begun = time.monotonic()
    with host.running("1.2.0") as process:
        line = host.samples()[0]
        _, complaint = process.communicate(timeout=15)
        lived_s = time.monotonic() - begun
    assert "network" in line
    assert process.returncode == 1
    assert "no scale has answered" in complaint
    assert 2.0 <= lived_s < 6


def test_the_check_tells_a_fresh_sample_of_this_version_from_anything_else(host):
    assert "no sample yet" in host.check("1.0.0").stdout
    host.settings(interval_s=0.1)
    with host.running("1.0.0"):
        host.samples(2)
        good, other = host.check("1.0.0"), host.check("1.1.0")
    assert (good.returncode, good.stdout) == (0, "the last sample is fresh\n")
    assert (other.returncode, other.stdout) == (1, "the last sample is of 1.0.0, not of 1.1.0\n")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"boot_s": -60.0, "version": "1.0.0"}, "s old"),
        ({"boot_s": 3600.0, "version": "1.0.0"}, "s old"),
        ({"boot_s": 0.0}, "no sample yet"),
        ({"boot_s": 0.0, "version": ""}, "of no version"),
        ({"version": "1.0.0", "boot_s": 0.0}, "no sample yet"),
        ([], "no sample yet"),
    ],
    ids=["old", "of another boot", "no version", "empty version", "another order", "no object"],
)
def test_the_check_refuses_a_sample_that_is_not_fresh(host, line, why):
    if isinstance(line, dict):
        line = {"at": "", **line, "cpu": {}, "disk": {}}
        line["boot_s"] += time.clock_gettime(time.CLOCK_BOOTTIME)
    host.samples_file.write_text(json.dumps(line, separators=(",", ":")) + "\n")
    done = host.check("1.0.0")
    assert done.returncode == 1
    assert why in done.stdout


def test_a_sample_written_while_the_check_starts_is_fresh(monkeypatch):
    spec = importlib.util.spec_from_file_location("check", PROJECT / "app" / "check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)

    def written_now(_path):
        return f'{{"at":"","boot_s":{time.clock_gettime(time.CLOCK_BOOTTIME)},"version":"1.0.0","cpu":{{}}}}'

    monkeypatch.setattr(check, "last_line", written_now)
    assert check.fault("samples.jsonl", "1.0.0") == ""


def test_the_check_reads_whole_lines_only(host):
    now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
    whole = f'{{"at":"","boot_s":{now_s},"version":"1.0.0","cpu":{{"cores":2}}}}'
    host.samples_file.write_text(whole)
    assert host.check("1.0.0").returncode == 1
    host.samples_file.write_text(whole + "\n" + whole[:30])
    assert host.check("1.0.0").returncode == 0


def test_the_project_s_rules_see_1_2_0_fail_within_the_observation():
    project = building.read_project(PROJECT)
    checks = parse_checks(list(project.checks))
    assert weakness(checks, project.observe_s, project.boots, project.deadman_s) is None
    assert [check.kind for check in checks] == ["process", "exec"]
    assert 2 + checks[0].interval_s < project.observe_s
    assert (project.observe_s, project.boots) == (3, 2)


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0", "1.2.0"])
def test_every_file_of_a_version_is_named_in_the_readme_s_tree(tmp_path, version):
    building._copy_product(building.read_project(PROJECT), version, tmp_path)
    readme = (PROJECT / "README.md").read_text()
    for path in (tmp_path / "app").iterdir():
        assert path.name in readme
