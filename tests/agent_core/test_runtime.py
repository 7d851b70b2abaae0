"""The agent's loop: timers, signals, and what the resident process loads."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading

import pytest

from agent_core.notify import Notifier
from agent_core.runtime import Runtime
from tests.agent_core.loop import (
    REPO,
    run,
    said,
    when,
)


def test_timers_come_in_the_order_of_their_times_and_cancelled_ones_never(runtime: Runtime) -> None:
    seen: list[str] = []
    now_s = runtime.now_s()
    runtime.call_at(now_s + 0.03, lambda: runtime.stop(7))
    runtime.call_at(now_s + 0.02, lambda: seen.append("second"))
    runtime.call_at(now_s + 0.01, lambda: seen.append("first"))
    runtime.call_at(now_s + 0.01, lambda: seen.append("also first"))
    runtime.call_later(0, lambda: seen.append("never")).cancel()
    assert run(runtime) == 7
    assert seen == ["first", "also first", "second"]


def test_another_thread_can_wake_the_loop(runtime: Runtime) -> None:
    thread = threading.Timer(0.05, lambda: runtime.call_soon(lambda: runtime.stop(3)))
    thread.start()
    assert run(runtime) == 3
    thread.join()


def test_nothing_that_a_callback_raises_ends_the_loop(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with caplog.at_level(logging.ERROR):
        runtime.call_soon(fail)
        runtime.call_later(0, fail)
        runtime.call_later(0.02, lambda: runtime.stop(0))
        assert run(runtime) == 0
    assert caplog.messages == ["callback failed", "callback failed"]


def test_a_tick_that_fails_is_logged_and_comes_again_later_each_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Stepped by hand: the boot clock is an argument."""
    now = [1000.0]
    runs: list[float] = []

    def tick() -> float:
        runs.append(now[0])
        if len(runs) in (2, 3, 4):
            raise OSError("no route")
        return 60.0

    with Runtime(notifier=Notifier({}), now_s=lambda: now[0]) as runtime, caplog.at_level(logging.ERROR):
        repeat = runtime.repeat("poll", tick, max_backoff_s=3)
        runtime.call_soon(lambda: None)
        runtime._turn()
        assert runs == [1000.0]
        pauses = []
        for _ in range(5):
            before = now[0]
            now[0] = runtime._timers[0][0]
            pauses.append(now[0] - before)
            runtime._turn()
        assert pauses[0] == 60.0
        assert 1 <= pauses[1] <= 2
        assert 1.5 <= pauses[2] <= 3  # the ceiling is 3
        assert 1.5 <= pauses[3] <= 3
        assert pauses[4] == 60.0
        assert repeat.failures == 0
    assert caplog.messages == ["tick failed"] * 3


def test_a_tick_can_be_brought_forward_and_does_not_come_twice() -> None:
    now = [0.0]
    runs: list[float] = []
    with Runtime(notifier=Notifier({}), now_s=lambda: now[0]) as runtime:
        repeat = runtime.repeat("poll", lambda: runs.append(now[0]) or 60.0, first_s=30)
        repeat.wake()
        runtime._turn()
        assert runs == [0.0]
        now[0] = 59.9
        runtime.call_soon(lambda: None)
        runtime._turn()
        assert runs == [0.0]
        now[0] = 60.0
        runtime._turn()
        assert runs == [0.0, 60.0]
        repeat.cancel()
        now[0] = 500.0
        runtime.call_soon(lambda: None)
        runtime._turn()
        assert runs == [0.0, 60.0]


def test_the_loop_never_sleeps_long_so_that_a_sleeping_host_wakes_to_due_timers() -> None:
    with Runtime(notifier=Notifier({})) as runtime:
        runtime.call_later(86_400, lambda: None)
        assert runtime._sleep_s() == 30.0


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_term_tells_the_updater_stops_the_workload_and_exits_0(
    runtime: Runtime, workload_of, signum: signal.Signals
) -> None:
    told: list[bool] = []
    workload = workload_of(runtime, "import time; print('up', flush=True); time.sleep(60)")
    runtime.on_stop = lambda: told.append(workload.is_alive)
    workload.start()
    when(runtime, lambda: said(workload), lambda: os.kill(os.getpid(), signum))
    assert run(runtime) == 0
    assert told == [True]  # told once, while the workload still lived
    assert not workload.is_alive
    assert workload.exits == 0


def test_what_the_updater_raises_when_told_does_not_keep_the_agent_alive(
    runtime: Runtime, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise OSError("the record cannot be written")

    runtime.on_stop = fail
    runtime.call_soon(lambda: os.kill(os.getpid(), signal.SIGTERM))
    with caplog.at_level(logging.ERROR):
        assert run(runtime) == 0
    assert "callback failed" in caplog.messages


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGUSR1])
def test_hup_and_usr1_ask_for_a_poll(runtime: Runtime, signum: signal.Signals) -> None:
    runtime.on_poll = lambda: runtime.stop(75)
    runtime.call_soon(lambda: os.kill(os.getpid(), signum))
    assert run(runtime) == 75


def test_signals_are_given_back_after_the_run(runtime: Runtime) -> None:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP)]
    runtime.call_soon(lambda: runtime.stop(0))
    run(runtime)
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP)] == before
    runtime.call_soon(lambda: None)  # too late is no error


def test_the_resident_process_loads_neither_tuf_nor_cryptography() -> None:
    program = (
        "import sys\n"
        "import agent_core.runtime, agent_core.health, agent_core.settings\n"
        "import agent_core.spool, agent_core.telemetry\n"
        "import updater.gate\n"
        "heavy = {'tuf', 'securesystemslib', 'cryptography', 'requests', 'urllib3', 'watchdog', 'click'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "[]"
