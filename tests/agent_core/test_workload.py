"""The product's program under the agent, with real child processes."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

from agent_core.notify import Notifier
from agent_core.runtime import Runtime
from agent_core.workload import BoundedLog, Place
from tests.agent_core.loop import (
    is_gone,
    run,
    said,
    wait_until,
    when,
)


def test_the_workload_runs_in_its_version_with_the_agreed_environment(
    runtime: Runtime, workload_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/notify")
    monkeypatch.setenv("RELFLEET_SERVER_PROXY", "http://me:hidden@proxy")
    monkeypatch.setenv("PRODUCT_MODE", "night")
    workload = workload_of(
        runtime,
        """
        import json, os, signal, sys, time
        print(json.dumps({
            "cwd": os.getcwd(), "argv": sys.argv[1:], "env": dict(os.environ),
            "own": os.getpid() == os.getpgid(0) == os.getsid(0),
        }), flush=True)
        time.sleep(60)
        """,
    )
    workload.start()
    when(runtime, lambda: "\n" in said(workload), lambda: runtime.stop(0))
    run(runtime)
    seen = json.loads(said(workload).splitlines()[0])
    version = tmp_path / "versions" / "1.0.0-abc"
    assert seen["cwd"] == str(version)
    assert seen["argv"] == [str(tmp_path)]
    assert seen["own"] is True
    assert seen["env"]["PYTHONPATH"] == f"{version}/app:{version}/lib.zip:{version}/lib"
    assert seen["env"]["RELFLEET_ROOT"] == str(tmp_path)
    assert seen["env"]["RELFLEET_VERSION"] == "1.0.0"
    assert seen["env"]["PRODUCT_MODE"] == "night"
    assert "NOTIFY_SOCKET" not in seen["env"]
    assert "hidden" not in str(seen)


def test_the_workload_inherits_neither_ignored_nor_blocked_signals(runtime: Runtime, workload_of) -> None:
    """Python ignores SIGPIPE for itself; a program that inherits that never ends when its reader is gone."""
    workload = workload_of(
        runtime,
        "",
        entry=["/bin/sh", "-c", "exec grep -E 'Sig(Ign|Blk)' /proc/self/status"],
        exits_allowed=0,
        on_end=lambda _: runtime.stop(0),
    )
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGWINCH})
    try:
        workload.start()
        run(runtime)
    finally:
        signal.signal(signal.SIGUSR2, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    libc_own = 0b11 << 31  # 32 and 33 are the C library's; no program may change them
    masks = [int(line.split()[1], 16) & ~libc_own for line in said(workload).splitlines()]
    assert masks == [0, 0]


def test_a_workload_that_ends_is_started_again_later_each_time_and_counted(
    runtime: Runtime, workload_of
) -> None:
    ends: list[tuple[int | None, int]] = []
    workload = workload_of(
        runtime,
        "print('up', flush=True); raise SystemExit(3)",
        max_backoff_s=0.15,
        on_end=lambda end: ends.append((end.code, workload.exits)),
    )
    workload.start()
    when(runtime, lambda: workload.exits == 4, lambda: runtime.stop(0))
    run(runtime)
    assert ends == [(3, 1), (3, 2), (3, 3), (3, 4)]
    assert workload.restarts == 3
    assert said(workload) == "up\n" * 4


def test_the_pauses_between_starts_double_up_to_the_ceiling_and_begin_anew_after_a_steady_run(
    workload_of,
) -> None:
    """Stepped by hand: only ends are told, nothing is started."""
    now = [0.0]
    with Runtime(notifier=Notifier({}), now_s=lambda: now[0]) as runtime:
        workload = workload_of(runtime, "", max_backoff_s=1.0)
        pauses = []
        for after_s in (0, 0, 0, 0, 0, 0, 3600, 0):
            workload._ended(1, now[0] - after_s, now[0])
            pauses.append(round(workload._again.when_s - now[0], 3))
        assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 0.05, 0.1]


def test_on_trial_a_workload_that_ends_is_left_to_the_gate(runtime: Runtime, workload_of) -> None:
    workload = workload_of(
        runtime, "", exits_allowed=0, on_end=lambda _: runtime.call_later(0.3, runtime.stop)
    )
    workload.start()
    assert run(runtime) == 0
    assert (workload.exits, workload.restarts, workload.is_alive) == (1, 0, False)
    assert workload.last_end.code == 0  # exit 0 is an end too


def test_on_trial_as_many_ends_as_are_allowed_are_tolerated(runtime: Runtime, workload_of) -> None:
    workload = workload_of(runtime, "", exits_allowed=1)
    workload.start()
    when(runtime, lambda: workload.exits == 2, lambda: runtime.call_later(0.3, runtime.stop))
    run(runtime)
    assert (workload.exits, workload.restarts) == (2, 1)


def test_a_program_that_cannot_be_started_counts_as_an_end(runtime: Runtime, workload_of) -> None:
    workload = workload_of(
        runtime, "", entry=["bin/missing"], exits_allowed=0, on_end=lambda _: runtime.stop(0)
    )
    workload.start()
    run(runtime)
    assert workload.last_end.code == 127
    assert "bin/missing cannot be started: No such file" in said(workload)


def test_a_workload_whose_directory_is_gone_counts_as_an_end(
    runtime: Runtime, workload_of, tmp_path: Path
) -> None:
    workload = workload_of(runtime, "", exits_allowed=0, on_end=lambda _: runtime.call_soon(runtime.stop))
    (tmp_path / "versions" / "1.0.0-abc").rename(tmp_path / "elsewhere")
    workload.start()
    run(runtime)
    assert workload.last_end.code is None


def test_a_workload_that_ignores_term_is_killed_with_its_children(
    runtime: Runtime, workload_of, tmp_path: Path
) -> None:
    workload = workload_of(
        runtime,
        f"""
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import signal, time\\n"
            "signal.signal(signal.SIGTERM, signal.SIG_IGN)\\ntime.sleep(60)"])
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        print("up", flush=True)
        time.sleep(60)
        """,
        stop_s=0.2,
    )
    stopped: list[float] = []
    workload.start()
    when(runtime, lambda: said(workload), lambda: workload.stop(lambda: (stopped.append(1), runtime.stop(0))))
    run(runtime)
    assert stopped == [1]
    assert not workload.is_alive
    wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_a_stopped_workload_is_not_started_again_and_stop_is_idempotent(
    runtime: Runtime, workload_of
) -> None:
    workload = workload_of(runtime, "raise SystemExit(1)")
    stopped: list[str] = []
    workload.start()

    def stop() -> None:
        workload.stop(lambda: stopped.append("first"))
        workload.stop(lambda: stopped.append("second"))
        runtime.call_later(0.3, runtime.stop)

    when(runtime, lambda: workload.exits == 1, stop)
    run(runtime)
    assert stopped == ["first", "second"]
    assert (workload.exits, workload.restarts) == (1, 0)


def test_a_workload_that_waits_for_its_next_start_is_not_started_while_the_agent_stops(
    runtime: Runtime, workload_of
) -> None:
    slow = "import signal, time; signal.signal(15, lambda *_: (time.sleep(0.5), exit())); time.sleep(60)"
    runtime.run_job([sys.executable, "-c", slow], lambda _: None, deadline_s=60)
    workload = workload_of(runtime, "raise SystemExit(1)", on_end=lambda _: runtime.stop(0))
    workload.start()
    run(runtime)
    assert (workload.exits, workload.restarts) == (1, 0)


def test_a_clean_exit_on_term_is_not_counted_as_an_end(runtime: Runtime, workload_of) -> None:
    """Exit 0 on TERM says nothing of a version, neither good nor bad."""
    workload = workload_of(runtime, "import time; print('up', flush=True); time.sleep(60)")
    workload.start()
    when(runtime, lambda: said(workload), lambda: workload.stop(runtime.stop))
    run(runtime)
    assert (workload.exits, workload.last_end) == (0, None)


def test_a_second_term_waits_no_longer(runtime: Runtime, workload_of) -> None:
    workload = workload_of(
        runtime,
        "import signal, time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(60)",
        stop_s=60,
    )
    workload.start()

    def terminate() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        runtime.call_later(0.1, lambda: os.kill(os.getpid(), signal.SIGTERM))

    when(runtime, lambda: said(workload), terminate)
    assert run(runtime) == 0


def test_much_output_neither_blocks_the_workload_nor_fills_the_disk(
    tmp_path: Path, runtime: Runtime, workload_of
) -> None:
    workload = workload_of(
        runtime,
        "import sys\nfor n in range(20_000): print(n, 'x' * 90)\nprint('end', flush=True)",
        exits_allowed=0,
        on_end=lambda _: runtime.stop(0),
    )
    workload._output.max_bytes = 100_000
    workload._output.files = 2
    workload.start()
    run(runtime)
    files = sorted((tmp_path / "log").iterdir())
    assert [file.name for file in files] == ["workload.log", "workload.log.1", "workload.log.2"]
    assert sum(file.stat().st_size for file in files) <= 300_000
    assert (tmp_path / "log" / "workload.log").read_text().endswith("end\n")


def test_output_that_cannot_be_written_is_lost_and_counted(tmp_path: Path) -> None:
    log = BoundedLog(Path("/dev/full"))
    log.write(b"12345")
    log.write(b"678")
    assert log.lost_bytes == 8
    log.close()
    (tmp_path / "occupied").write_text("")
    log = BoundedLog(tmp_path / "occupied" / "workload.log")
    log.write(b"12345")
    assert log.lost_bytes == 5


def test_placeholders_are_filled_and_other_braces_left_alone(tmp_path: Path) -> None:
    version = tmp_path / "v"
    place = Place(tmp_path, version, "1")
    assert place.argv(["{python}", "-c", "{root}:{version_dir}:{other}:{"]) == [
        sys.executable,
        "-c",
        f"{tmp_path}:{version}:{{other}}:{{",
    ]
    assert place.argv(["app/bin/run", "app/x"]) == [f"{version}/app/bin/run", "app/x"]
    assert place.argv(["/bin/sh"]) == ["/bin/sh"]


def test_a_version_that_brings_its_interpreter_runs_on_it(tmp_path: Path) -> None:
    own = tmp_path / "python" / "bin" / "python3"
    own.parent.mkdir(parents=True)
    own.touch()
    assert Place(tmp_path, tmp_path, "1").python == str(own)
