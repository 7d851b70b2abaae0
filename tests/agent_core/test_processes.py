"""Children that die with their parent, and a dead man's timer: real agents, really killed."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from agent_core.processes import arm_deadman, disarm_deadman, spawn
from tests.agent_core.loop import (
    REPO,
    agent,
    is_gone,
    wait_until,
    workload_pid,
)


def test_a_workload_never_survives_its_agent(tmp_path: Path) -> None:
    process = agent(tmp_path)
    pid = workload_pid(tmp_path)
    process.kill()
    process.wait()
    wait_until(lambda: is_gone(pid))


def test_an_agent_that_is_asked_to_stop_leaves_with_0_and_without_workload(tmp_path: Path) -> None:
    process = agent(tmp_path)
    pid = workload_pid(tmp_path)
    process.terminate()
    assert process.wait(15) == 0
    assert is_gone(pid)


def test_an_agent_that_asks_to_be_restarted_leaves_with_75_and_without_workload(tmp_path: Path) -> None:
    extra = "from agent_core.errors import Exit\nruntime.on_poll = lambda: runtime.stop(Exit.RESTART)"
    process = agent(tmp_path, extra)
    pid = workload_pid(tmp_path)
    process.send_signal(signal.SIGHUP)
    assert process.wait(15) == 75
    assert is_gone(pid)


def test_a_hung_agent_is_killed_by_its_dead_man_with_its_workload(tmp_path: Path) -> None:
    process = agent(
        tmp_path, "import time\nruntime.call_later(0.3, lambda: (arm_deadman(0.3), time.sleep(60)))"
    )
    pid = workload_pid(tmp_path)
    assert process.wait(15) == -signal.SIGALRM
    wait_until(lambda: is_gone(pid))


def test_a_dead_man_that_is_re_armed_or_disarmed_spares_the_agent(tmp_path: Path) -> None:
    extra = (
        "import signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
        "signal.signal(signal.SIGALRM, signal.SIG_IGN)\n"
        "arm_deadman(0.4)\n"
        "assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL\n"
        "assert signal.SIGALRM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())\n"
        "rearms = []\n"
        "def rearm():\n"
        "    arm_deadman(0.4)\n"
        "    rearms.append(1)\n"
        "    if len(rearms) < 10:\n"
        "        return 0.1\n"
        "    disarm_deadman()\n"
        "    runtime.call_later(0.5, runtime.stop)\n"
        "    return 99\n"
        "runtime.repeat('rearm', rearm)\n"
    )
    assert agent(tmp_path, extra).wait(15) == 0


def test_the_dead_man_can_be_disarmed() -> None:
    arm_deadman(60)
    assert signal.getitimer(signal.ITIMER_REAL)[0] > 50
    disarm_deadman()
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_child_whose_parent_died_before_it_began_does_not_begin(tmp_path: Path) -> None:
    """The kernel's promise starts when it is asked for; the child looks whether it came too late."""
    program = (
        "import os, sys\n"
        "import agent_core.processes as processes\n"
        # what the child finds when its parent is another one by now
        "processes.os.getpid = lambda: 1 << 21\n"
        "child = processes.spawn(['/bin/sh', '-c', 'echo begun'])\n"
        "sys.exit(child.wait())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (126, b"")


def test_a_child_ties_itself_to_the_calling_process() -> None:
    child = spawn(["/bin/sh", "-c", "exit 7"])
    assert child.wait(15) == 7
