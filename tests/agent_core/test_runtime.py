"""The agent's loop: timers, signals, jobs and the workload, with real child processes."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from agent_core.runtime import (
    BoundedLog,
    Helper,
    JobResult,
    Notifier,
    Place,
    Runtime,
    Workload,
    arm_deadman,
    disarm_deadman,
    spawn,
)

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


@pytest.fixture
def runtime():
    with Runtime(notifier=Notifier({}), stop_s=5.0) as made:
        yield made


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


# --- timers ---------------------------------------------------------------------------------------------


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


# --- signals --------------------------------------------------------------------------------------------


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


# --- jobs -----------------------------------------------------------------------------------------------


def job(runtime: Runtime, program: str, *, deadline_s: float = 10.0, stdin: bytes = b"") -> JobResult:
    results: list[JobResult] = []

    def done(result: JobResult) -> None:
        results.append(result)
        runtime.call_later(0.05, lambda: runtime.stop(0))  # a second answer would be seen

    runtime.run_job([sys.executable, "-c", program], done, deadline_s=deadline_s, stdin=stdin)
    run(runtime)
    (result,) = results
    return result


def test_a_job_gets_its_input_and_answers_json_without_stopping_the_loop(runtime: Runtime) -> None:
    ticks: list[float] = []
    runtime.repeat("tick", lambda: ticks.append(runtime.now_s()) or 0.01)
    program = "import json, sys, time; time.sleep(0.3); print(json.dumps({'got': sys.stdin.read()}))"
    assert job(runtime, program, stdin=b"words") == JobResult(0, {"got": "words"})
    assert len(ticks) > 5


@pytest.mark.parametrize(
    ("program", "code", "problem", "errors"),
    [
        pytest.param("import sys; sys.exit('no room')", 1, "exit", "no room", id="fails"),
        pytest.param("import os; os.kill(os.getpid(), 9)", -9, "exit", "", id="is killed"),
        pytest.param("print('not json')", 0, "not-json", "", id="says no JSON"),
        pytest.param("print('[1]')", 0, "not-json", "", id="says no object"),
        pytest.param("pass", 0, "not-json", "", id="says nothing"),
        pytest.param("print('[' * 200_000)", 0, "not-json", "", id="nests without end"),
        pytest.param("print('x' * 3_000_000)", None, "too-long", None, id="says too much"),
    ],
)
def test_a_job_that_goes_wrong_says_how(
    runtime: Runtime, program: str, code: int | None, problem: str, errors: str | None
) -> None:
    result = job(runtime, program)
    assert result.problem == problem
    assert result.answer is None
    assert code is None or result.code == code
    assert errors is None or result.errors == errors


def test_a_failed_job_may_still_answer(runtime: Runtime) -> None:
    result = job(runtime, 'print(\'{"reason": "expired"}\'); raise SystemExit(3)')
    assert result == JobResult(3, {"reason": "expired"}, "exit")


def test_a_job_past_its_deadline_is_killed_with_all_it_started(runtime: Runtime, tmp_path: Path) -> None:
    program = (
        "import os, signal, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    result = job(runtime, program, deadline_s=1.0)
    assert (result.problem, result.answer) == ("deadline", None)
    assert result.code == -signal.SIGTERM
    wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_a_job_that_ignores_the_deadline_is_killed(runtime: Runtime) -> None:
    program = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    assert job(runtime, program, deadline_s=0.5).code == -signal.SIGKILL


def test_a_program_that_is_not_there_is_a_failed_job(runtime: Runtime) -> None:
    results: list[JobResult] = []
    runtime.run_job(
        ["/no/such/program"], lambda result: (results.append(result), runtime.stop(0)), deadline_s=5
    )
    run(runtime)
    assert (results[0].code, results[0].problem) == (127, "exit")
    assert "cannot be started" in results[0].errors


def test_a_job_that_cannot_even_be_forked_still_answers(runtime: Runtime, tmp_path: Path) -> None:
    results: list[JobResult] = []
    runtime.run_job(
        [sys.executable],
        lambda result: (results.append(result), runtime.stop(0)),
        deadline_s=5,
        cwd=tmp_path / "gone",
    )
    run(runtime)
    assert (results[0].code, results[0].problem) == (None, "cannot-start")


def test_input_beyond_a_pipe_is_refused_rather_than_waited_for(runtime: Runtime) -> None:
    assert job(runtime, "pass", stdin=b"x" * 2_000_000).problem == "cannot-start"


def test_stopping_the_agent_stops_its_jobs(runtime: Runtime) -> None:
    results: list[JobResult] = []
    runtime.run_job([sys.executable, "-c", "import time; time.sleep(60)"], results.append, deadline_s=60)
    runtime.call_later(0.1, lambda: runtime.stop(75))
    assert run(runtime) == 75
    assert [result.problem for result in results] == ["stopped"]


# --- the workload ---------------------------------------------------------------------------------------


# --- helpers --------------------------------------------------------------------------------------------

ECHO = """
import json, os, select, sys
while select.select([sys.stdin], [], [], {idle})[0]:
    line = sys.stdin.readline().strip()
    if not line:
        break
    {extra}
    print(json.dumps({{"said": line, "pid": os.getpid()}}), flush=True)
"""


def helper(runtime: Runtime, extra: str = "pass", idle: float = 30.0) -> Helper:
    return Helper(runtime, [sys.executable, "-c", ECHO.format(extra=extra, idle=idle)], "echo")


def asked(runtime: Runtime, made: Helper, *requests: str, deadline_s: float = 10.0) -> list[JobResult]:
    """Ask one after the other, and stop the loop with the last answer."""
    results: list[JobResult] = []

    def done(result: JobResult) -> None:
        results.append(result)
        if len(results) == len(requests):
            runtime.stop()

    for request in requests:
        made.ask(request, done, deadline_s=deadline_s)
    run(runtime)
    return results


def test_a_helper_answers_many_requests_in_order_and_is_loaded_once(runtime: Runtime) -> None:
    results = asked(runtime, helper(runtime), "one", "two", "three")
    assert [result.answer["said"] for result in results] == ["one", "two", "three"]
    assert len({result.answer["pid"] for result in results}) == 1


def test_a_helper_that_went_idle_is_started_again_for_the_next_request(runtime: Runtime) -> None:
    made = helper(runtime, idle=0.05)
    pids: list[int] = []

    def again() -> None:
        made.ask("two", lambda result: (pids.append(result.answer["pid"]), runtime.stop()), deadline_s=10)

    def first(result: JobResult) -> None:
        pids.append(result.answer["pid"])
        when(runtime, lambda: not made.is_alive, again)

    made.ask("one", first, deadline_s=10)
    run(runtime)
    assert len(set(pids)) == 2


def test_a_request_that_meets_a_helper_just_ending_is_asked_again(runtime: Runtime, tmp_path: Path) -> None:
    once = tmp_path / "once"
    extra = f"import pathlib; p = pathlib.Path({str(once)!r}); p.exists() or (p.touch(), sys.exit(0))"
    [result] = asked(runtime, helper(runtime, extra), "one")
    assert result.answer["said"] == "one"


@pytest.mark.parametrize(
    ("extra", "problem"),
    [
        ("sys.exit(3)", "exit"),
        ("os.kill(os.getpid(), 9)", "exit"),
        ("print('no json', flush=True); continue", "not-json"),
        ("import time; time.sleep(60)", "deadline"),
        ("sys.stdout.write('x' * 3_000_000); sys.stdout.flush(); continue", "too-long"),
    ],
    ids=["it fails", "it is killed", "no JSON", "too late", "no end"],
)
def test_a_helper_that_goes_wrong_says_how(runtime: Runtime, extra: str, problem: str) -> None:
    [result] = asked(runtime, helper(runtime, extra), "one", deadline_s=1.0)
    assert result.problem == problem
    assert result.answer is None


def test_a_helper_that_cannot_be_started_still_answers(runtime: Runtime) -> None:
    [result] = asked(runtime, Helper(runtime, ["/no/such/program"], "none"), "one")
    assert result.problem == "exit"
    assert "cannot be started" in result.errors


COPY = """
import json, os, sys
from agent_core.runtime import Helper, Runtime

loaded = "by the parent"

def serve():
    for line in sys.stdin:
        print(json.dumps({"said": line.strip(), "loaded": loaded, "pid": os.getpid()}), flush=True)
        if line.strip() == "end":
            return 0

runtime = Runtime()
echo = "import json; print(json.dumps({'said': input(), 'loaded': 'anew'}), flush=True)"
helper = Helper(runtime, [sys.executable, "-c", echo], "copy")
helper.start_as_copy(serve)
answers = []
def done(result):
    answers.append(result.answer)
    if len(answers) == 2:
        runtime.call_later(0.2, lambda: helper.ask("third", done, deadline_s=10))
    if len(answers) == 3:
        runtime.stop()
helper.ask("first", done, deadline_s=10)
helper.ask("end", done, deadline_s=10)
runtime.run()
print(json.dumps({"answers": answers, "parent": os.getpid()}))
"""


def test_a_helper_begins_as_a_copy_with_all_loaded_and_goes_on_as_a_new_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", COPY], cwd=REPO, capture_output=True, text=True, timeout=30, check=True
    )
    said = json.loads(done.stdout)
    assert [(answer["said"], answer["loaded"]) for answer in said["answers"]] == [
        ("first", "by the parent"),
        ("end", "by the parent"),
        ("third", "anew"),
    ]
    assert said["answers"][0]["pid"] != said["parent"]


def test_a_copy_dies_with_its_parent(tmp_path: Path) -> None:
    program = f"""
import os, pathlib, time
from agent_core.runtime import Copy
def serve():
    pathlib.Path({str(tmp_path / "pid")!r}).write_text(str(os.getpid()))
    time.sleep(60)
    return 0
Copy(serve)
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=REPO)
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: is_gone(pid))


def test_stopping_the_agent_answers_what_a_helper_was_asked(runtime: Runtime) -> None:
    made = helper(runtime, "import time; time.sleep(60)")
    problems: list[str] = []
    for request in ("one", "two"):
        made.ask(request, lambda result: problems.append(result.problem), deadline_s=30)
    when(runtime, lambda: made.is_alive, runtime.stop)
    run(runtime)
    assert "stopped" in problems


# --- the workload ---------------------------------------------------------------------------------------


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


def said(workload: Workload) -> str:
    file = workload._output.path
    return file.read_text() if file.exists() else ""


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
    assert seen["env"]["PYTHONPATH"] == f"{version}/app:{version}/lib"
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


# --- real agents ----------------------------------------------------------------------------------------

AGENT = """
import sys
from pathlib import Path
from agent_core.runtime import *
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
        "import agent_core.runtime as runtime\n"
        "runtime.os.getpid = lambda: 1 << 21\n"  # what the child finds when its parent is another one by now
        "child = runtime.spawn(['/bin/sh', '-c', 'echo begun'])\n"
        "sys.exit(child.wait())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (126, b"")


def test_a_child_ties_itself_to_the_calling_process() -> None:
    child = spawn(["/bin/sh", "-c", "exit 7"])
    assert child.wait(15) == 7


# --- places ---------------------------------------------------------------------------------------------


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


# --- the service manager --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["path", "abstract"])
def test_systemd_is_told_that_we_are_ready_and_alive(tmp_path: Path, kind: str) -> None:
    name = str(tmp_path / "notify") if kind == "path" else f"@relfleet-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(name.replace("@", "\0", 1) if kind == "abstract" else name)
        manager.settimeout(10)
        environ = {"NOTIFY_SOCKET": name, "WATCHDOG_USEC": "120000", "WATCHDOG_PID": str(os.getpid())}
        with Runtime(notifier=Notifier(environ)) as runtime:
            runtime.call_later(0.15, lambda: (runtime.status("trial of 1.2.3"), runtime.stop(0)))
            run(runtime)
        told = []
        while not told or told[-1] != "STOPPING=1":
            told.append(manager.recv(4096).decode())
    assert told[0] == "READY=1"
    assert told.count("WATCHDOG=1") >= 3
    assert "STATUS=trial of 1.2.3" in told


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"NOTIFY_SOCKET": "/no/such/socket"},
        {"NOTIFY_SOCKET": "/no/such/socket", "WATCHDOG_USEC": "1000", "WATCHDOG_PID": "1"},
        {"WATCHDOG_USEC": "1000"},
        {"NOTIFY_SOCKET": "/no/such/socket", "WATCHDOG_USEC": "soon"},
    ],
    ids=str,
)
def test_without_a_manager_nothing_is_told_and_nothing_fails(environ: dict[str, str]) -> None:
    notifier = Notifier(environ)
    notifier.tell(READY=1)
    assert notifier.watchdog_s == 0.0
