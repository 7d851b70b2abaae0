"""Fixtures of the tests around the agent's loop."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from agent_core.notify import Notifier
from agent_core.runtime import Runtime
from agent_core.workload import BoundedLog, Place, Workload


@pytest.fixture
def runtime():
    with Runtime(notifier=Notifier({}), stop_s=5.0) as made:
        yield made


@pytest.fixture
def workload_of(tmp_path: Path):
    version = tmp_path / "versions" / "1.0.0-abc"
    (version / "app").mkdir(parents=True)
    logs: list[BoundedLog] = []

    def make(runtime: Runtime, program: str, **options: object) -> Workload:
        (version / "app" / "main.py").write_text(textwrap.dedent(program))
        logs.append(BoundedLog(tmp_path / "log" / "workload.log"))
        entry = options.pop("entry", ["{python}", "{version_dir}/app/main.py", "{root}"])
        place = Place(tmp_path, version, "1.0.0")
        return Workload(runtime, place, entry, logs[-1], first_backoff_s=0.05, **options)

    yield make
    for log in logs:
        log.close()
