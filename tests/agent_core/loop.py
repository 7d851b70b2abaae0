"""A loop that ends in time, and small agents made of the real one: for the tests of what lives in it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from agent_core.runtime import Runtime
from agent_core.workload import Workload

REPO = Path(__file__).parents[2]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_until(claim, timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def run(runtime: Runtime, within_s: float = 15.0) -> int:
    """Run the loop; a test that hangs fails instead."""
    late: list[bool] = []
    runtime.call_later(within_s, lambda: (late.append(True), runtime.stop(99)))
    code = runtime.run()
    assert not late, "the loop did not end in time"
    return code


def when(runtime: Runtime, claim, then) -> None:
    """Do `then` in the loop once `claim` is true."""

    def look() -> None:
        if claim():
            then()
        else:
            runtime.call_later(0.01, look)

    look()


AGENT = """
import sys
from pathlib import Path
from agent_core.processes import arm_deadman, disarm_deadman
from agent_core.runtime import Runtime
from agent_core.workload import BoundedLog, Place, Workload
root = Path(sys.argv[1])
runtime = Runtime()
workload = Workload(runtime, Place(root, root, "1"), ["/bin/sh", "-c", "echo $$ > pid; exec sleep 60"],
                    BoundedLog(root / "log"))
workload.start()
{extra}
sys.exit(runtime.run())
"""


def agent(tmp_path: Path, extra: str = "", **options: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", AGENT.format(extra=extra), str(tmp_path)], cwd=REPO, **options
    )


def workload_pid(tmp_path: Path) -> int:
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().endswith("\n"))
    return int((tmp_path / "pid").read_text())


def said(workload: Workload) -> str:
    file = workload._output.path
    return file.read_text() if file.exists() else ""
