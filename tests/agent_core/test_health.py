"""Health: strict reading, settings that prove nothing, real checks, and judging over stepped time."""

from __future__ import annotations

import contextlib
import http.server
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_core.errors import MalformedError
from agent_core.health import Check, Kind, Monitor, Subject, parse_checks, run_check, weakness
from agent_core.processes import TRIES
from agent_core.workload import Place


@dataclass
class Running:
    pid: int | None
    restarts: int = 0


@pytest.fixture
def place(tmp_path: Path) -> Place:
    version = tmp_path / "versions" / "1.0.0-abc"
    version.mkdir(parents=True)
    return Place(tmp_path, version, "1.0.0")


@pytest.fixture
def subject(place: Place) -> Subject:
    return Subject(place, Running(os.getpid()))


# --- reading --------------------------------------------------------------------------------------------


def test_checks_are_read_with_their_defaults() -> None:
    checks = parse_checks(
        [{"kind": "process"}, {"kind": "http", "name": "ready", "url": "http://127.0.0.1:80/r"}]
    )
    assert [check.name for check in checks] == ["health[0] process", "ready"]
    assert checks[1] == Check(Kind.HTTP, "ready", url="http://127.0.0.1:80/r")


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "process"},
        {"kind": "exec", "argv": ["{python}", "-V"]},
        {"kind": "http", "url": "http://127.0.0.1:80/", "status": [204]},
        {"kind": "tcp", "port": 80},
        {"kind": "memory", "max_bytes": 1000},
        {"kind": "cpu", "max_percent": 50},
    ],
    ids=lambda entry: entry["kind"],
)
def test_every_kind_of_check_survives_writing_and_reading(entry: dict) -> None:
    (check,) = parse_checks([entry])
    assert parse_checks([check.to_json()]) == (check,)


@pytest.mark.parametrize(
    ("checks", "path"),
    [
        pytest.param({}, "index.health", id="no list"),
        pytest.param([{"kind": "process"}] * 33, "index.health", id="too many"),
        pytest.param([1], "index.health[0]", id="no object"),
        pytest.param([{}], "index.health[0].kind", id="no kind"),
        pytest.param([{"kind": "magic"}], "index.health[0].kind", id="unknown kind"),
        pytest.param(
            [{"kind": "process", "intervall_s": 1}], "index.health[0].intervall_s", id="misspelt key"
        ),
        pytest.param(
            [{"kind": "process", "url": "http://x"}], "index.health[0].url", id="another kind's key"
        ),
        pytest.param([{"kind": "process", "interval_s": 0}], "index.health[0].interval_s", id="no interval"),
        pytest.param([{"kind": "process", "interval_s": "1"}], "index.health[0].interval_s", id="a text"),
        pytest.param(
            [{"kind": "process", "failures_allowed": True}], "index.health[0].failures_allowed", id="bool"
        ),
        pytest.param([{"kind": "process", "timeout_s": float("nan")}], "index.health[0].timeout_s", id="nan"),
        pytest.param([{"kind": "exec"}], "index.health[0].argv", id="exec without a program"),
        pytest.param([{"kind": "exec", "argv": [""]}], "index.health[0].argv", id="exec of nothing"),
        pytest.param([{"kind": "exec", "argv": "ls"}], "index.health[0].argv", id="exec of a text"),
        pytest.param([{"kind": "http"}], "index.health[0].url", id="http without an address"),
        pytest.param([{"kind": "http", "url": "file:///x"}], "index.health[0].url", id="http of a file"),
        pytest.param(
            [{"kind": "http", "url": "http://h:99999/"}], "index.health[0].url", id="http of no port"
        ),
        pytest.param(
            [{"kind": "http", "url": "http://h", "status": [9]}], "index.health[0].status", id="status"
        ),
        pytest.param([{"kind": "tcp"}], "index.health[0].port", id="tcp without a port"),
        pytest.param([{"kind": "memory"}], "index.health[0].max_bytes", id="memory without a ceiling"),
        pytest.param([{"kind": "cpu"}], "index.health[0].max_percent", id="cpu without a ceiling"),
        pytest.param(
            [{"kind": "cpu", "max_percent": 5, "window_s": 5}],
            "index.health[0].window_s",
            id="cpu that times out",
        ),
        pytest.param(
            [{"kind": "process", "name": "a"}, {"kind": "tcp", "port": 1, "name": "a"}],
            "index.health[1].name",
            id="twice",
        ),
    ],
)
def test_a_malformed_check_is_refused_by_the_path_of_its_key(checks: object, path: str) -> None:
    with pytest.raises(MalformedError) as caught:
        parse_checks(checks)
    assert caught.value.what.split(" ")[0] == path
    assert caught.value.why


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(list(Kind)),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["kind", "name", "url", "argv", "port", "host", "interval_s", "max_bytes", "x"]),
            inner,
            max_size=4,
        )
    ),
)


@given(st.lists(json_values, max_size=3) | json_values)
def test_any_json_is_either_checks_or_refused_as_malformed(value: object) -> None:
    with contextlib.suppress(MalformedError):
        assert isinstance(parse_checks(value), tuple)


# --- settings that prove nothing ------------------------------------------------------------------------

QUICK = Check(Kind.PROCESS, "lives", interval_s=1, timeout_s=1, failures_allowed=1, grace_s=5)


@pytest.mark.parametrize(
    ("checks", "observe_s", "boots", "deadman_s", "word"),
    [
        pytest.param([], 60, 3, None, "no health check", id="no checks"),
        pytest.param([QUICK], 60, 0, None, "boots", id="no boots"),
        pytest.param([QUICK], 0, 3, None, "observe_s is 0", id="no observation"),
        pytest.param(
            [QUICK], 3.9, 3, None, "needs up to 4 s", id="observation shorter than the fault takes to show"
        ),
        pytest.param(
            [QUICK, replace(QUICK, name="slow", interval_s=300)],
            60,
            3,
            None,
            "'slow'",
            id="the slow one is named",
        ),
        pytest.param([QUICK], 60, 3, 8.9, "deadman_s", id="a dead-man that kills a slow start"),
    ],
)
def test_settings_that_could_never_detect_a_fault_are_named(
    checks: list[Check], observe_s: float, boots: int, deadman_s: float | None, word: str
) -> None:
    assert word in (weakness(checks, observe_s, boots, deadman_s) or "")


def test_settings_that_can_detect_a_fault_have_no_weakness() -> None:
    assert weakness([QUICK], 4, 1, 9) is None


@given(st.floats(0.05, 20), st.floats(0.05, 5), st.integers(0, 4), st.floats(0.1, 120), st.floats(0.1, 60))
def test_without_a_weakness_a_fault_at_the_start_of_the_observation_ends_it(
    interval_s: float, timeout_s: float, allowed: int, observe_s: float, run_s: float
) -> None:
    """Healthy once, broken from then on: the monitor says so before the observation is over."""
    check = Check(Kind.TCP, "c", interval_s, timeout_s, allowed, grace_s=0, port=SPARE_PORT)
    if weakness([check], observe_s, 1) is not None:
        return
    runs = Script([True])
    monitor = runs.monitor([check], gap_s=1e9)
    assert monitor.step(0).healthy_since_s == 0
    now_s = 0.0
    while now_s < observe_s and monitor.verdict().healthy:
        now_s = runs.finish_later(monitor, now_s, min(run_s, timeout_s))
    assert not monitor.verdict().healthy
    assert now_s <= observe_s + 1e-6


# --- real checks ----------------------------------------------------------------------------------------


def exec_check(*argv: str, timeout_s: float = 10.0) -> Check:
    return Check(Kind.EXEC, "x", timeout_s=timeout_s, argv=argv)


def test_a_program_passes_by_exit_0_and_fails_with_its_last_words(subject: Subject) -> None:
    assert run_check(exec_check("{python}", "-c", ""), subject).passed
    failed = run_check(
        exec_check("{python}", "-c", "print('no'); print('database'); raise SystemExit(3)"), subject
    )
    assert (failed.passed, failed.detail) == (False, "exit 3: no database")


def test_a_check_that_somebody_killed_is_run_again_and_one_that_is_always_killed_has_failed(
    subject: Subject,
) -> None:
    def killed(times: int) -> Check:
        tried = subject.place.root / f"tried-{times}"
        count = f'echo >> {tried}; test "$(wc -l < {tried})" -gt {times}'
        return exec_check("/bin/sh", "-c", f"{count} || kill -KILL $$")

    assert run_check(killed(TRIES - 1), subject).passed
    assert run_check(killed(99), subject).detail == "exit -9"


def test_a_program_of_the_version_runs_in_its_directory_with_its_environment(subject: Subject) -> None:
    script = subject.place.version_dir / "check.sh"
    script.write_text('#!/bin/sh\necho "$PWD|$RELFLEET_VERSION|$RELFLEET_ROOT|$PYTHONPATH|$1"\nexit 1\n')
    script.chmod(0o755)
    version = subject.place.version_dir
    detail = run_check(exec_check("check.sh", "{root}"), subject).detail
    said = detail.removeprefix("exit 1: ")
    path = f"{version}/app:{version}/lib.zip:{version}/lib"
    whole = f"{version}|1.0.0|{subject.place.root}|{path}|{subject.place.root}"
    assert len(said) > 100
    assert whole.endswith(said)


@pytest.mark.parametrize("argv", [["no-such-program"], ["/no/such/program"], ["/"]])
def test_a_check_that_cannot_run_is_a_failure(subject: Subject, argv: list[str]) -> None:
    assert not run_check(exec_check(*argv), subject).passed


def test_a_check_without_its_directory_is_a_failure(subject: Subject) -> None:
    subject.place.version_dir.rmdir()
    outcome = run_check(exec_check("{python}", "-V"), subject)
    assert not outcome.passed
    assert "cannot run" in outcome.detail


def test_a_program_that_hangs_is_killed_with_all_it_started(subject: Subject, tmp_path: Path) -> None:
    program = (
        "import os, subprocess, sys, time, signal\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(tmp_path / 'pids')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}')\n"
        "time.sleep(60)\n"
    )
    began = time.monotonic()
    outcome = run_check(exec_check("{python}", "-c", program, timeout_s=1.5), subject)
    assert outcome.detail == "took longer than 1.5 s"
    assert time.monotonic() - began < 10
    for pid in (tmp_path / "pids").read_text().split():
        wait_until(lambda pid=pid: is_gone(int(pid)))


def test_a_program_that_leaves_a_child_behind_does_not_hold_the_check(
    subject: Subject, tmp_path: Path
) -> None:
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'while True: print(\"x\" * 1000)'])\n"
        f"open({str(tmp_path / 'pid')!r}, 'w').write(str(child.pid))\n"
    )
    began = time.monotonic()
    assert run_check(exec_check("{python}", "-c", program), subject).passed
    assert time.monotonic() - began < 8
    wait_until(lambda: is_gone(int((tmp_path / "pid").read_text())))


def test_a_program_that_says_much_neither_blocks_nor_fills_memory(subject: Subject) -> None:
    program = "import sys; sys.stdout.write('x' * 5_000_000); raise SystemExit(1)"
    outcome = run_check(exec_check("{python}", "-c", program), subject)
    assert outcome.detail == "exit 1: " + "x" * 200


class Pages(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path.startswith("/status/"):
            self.send_response(int(self.path.rpartition("/")[2]))
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"ok")
        elif self.path == "/drip":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            with contextlib.suppress(OSError):
                for _ in range(1000):
                    self.wfile.write(b"x")
                    time.sleep(0.05)
        elif self.path == "/hang":
            self.rfile.read(1)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def pages() -> str:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("path", "status", "passed", "detail"),
    [
        ("/status/200", (), True, ""),
        ("/status/204", (), True, ""),
        ("/status/500", (), False, "status 500"),
        ("/status/302", (), False, "status 302"),
        ("/status/401", (401, 403), True, ""),
        ("/status/200", (401,), False, "status 200"),
    ],
)
def test_http_expects_2xx_or_what_was_signed(
    subject: Subject, pages: str, path: str, status: tuple[int, ...], passed: bool, detail: str
) -> None:
    outcome = run_check(Check(Kind.HTTP, "h", url=pages + path, status=status), subject)
    assert (outcome.passed, outcome.detail) == (passed, detail)


@pytest.mark.parametrize("path", ["/hang", "/drip"])
def test_http_that_hangs_or_drips_ends_at_the_timeout(subject: Subject, pages: str, path: str) -> None:
    began = time.monotonic()
    outcome = run_check(Check(Kind.HTTP, "h", url=pages + path, timeout_s=0.4), subject)
    assert outcome.detail == "took longer than 0.4 s"
    assert time.monotonic() - began < 5


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_http_and_tcp_to_nobody_fail(subject: Subject) -> None:
    port = free_port()
    outcome = run_check(Check(Kind.HTTP, "h", url=f"http://127.0.0.1:{port}/"), subject)
    assert not outcome.passed
    assert "refused" in outcome.detail
    assert not run_check(Check(Kind.TCP, "t", port=port), subject).passed


def test_tcp_passes_when_somebody_listens(subject: Subject) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert run_check(Check(Kind.TCP, "t", port=listener.getsockname()[1]), subject).passed


def test_the_process_check_asks_whether_the_workload_lives(place: Place) -> None:
    assert run_check(Check(Kind.PROCESS, "p"), Subject(place, Running(os.getpid()))).passed
    outcome = run_check(Check(Kind.PROCESS, "p"), Subject(place, Running(None, restarts=4)))
    assert outcome.detail == "the workload does not run (restarted 4 times)"


def test_memory_and_cpu_have_ceilings_over_the_whole_tree(place: Place) -> None:
    program = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', "
        "'x = bytearray(40 * 2**20); print(1, flush=True)\\nwhile True: pass'])\n"
        "child.wait()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    try:
        child.stdout.readline()
        busy = Subject(place, Running(child.pid))
        assert run_check(Check(Kind.MEMORY, "m", max_bytes=2**34), busy).passed
        assert "bytes of memory" in run_check(Check(Kind.MEMORY, "m", max_bytes=30 * 2**20), busy).detail
        assert run_check(Check(Kind.CPU, "c", max_percent=10_000, window_s=0.1), busy).passed
        assert "% of a core" in run_check(Check(Kind.CPU, "c", max_percent=0.5, window_s=0.5), busy).detail
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


def test_a_child_whose_parent_has_ended_counts_for_the_ceilings_still(place: Place) -> None:
    holds = "x = bytearray(40 * 2**20); print(1, flush=True); import time; time.sleep(60)"
    program = (
        "import os, subprocess, sys, time\n"
        "if os.fork() == 0:\n"
        f"    subprocess.Popen([sys.executable, '-c', {holds!r}])\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "time.sleep(60)\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, start_new_session=True)
    try:
        child.stdout.readline()
        outcome = run_check(Check(Kind.MEMORY, "m", max_bytes=35 * 2**20), Subject(place, Running(child.pid)))
        assert "bytes of memory" in outcome.detail
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()


@pytest.mark.parametrize("kind", [Kind.MEMORY, Kind.CPU])
def test_a_ceiling_of_a_workload_that_is_gone_is_a_failure(place: Place, kind: Kind) -> None:
    check = Check(kind, "c", max_bytes=2**40, max_percent=100, window_s=0.05)
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    for pid in (None, child.pid):
        assert run_check(check, Subject(place, Running(pid))).detail == "the workload does not run"


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def wait_until(claim, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not claim():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


# --- judging over time ----------------------------------------------------------------------------------


class Script:
    """Runs checks at once against real ports: one that listens when the next outcome is a pass, else closed.

    Args:
        outcomes: of the runs, in order; the last one is repeated with `then`.
    """

    def __init__(self, outcomes: list[bool], *, then: bool = False) -> None:
        self.outcomes = outcomes
        self.then = then
        self.held: list = []
        self.hold = False

    def monitor(self, checks: list[Check], **options: object) -> Monitor:
        monitor = Monitor(
            checks,
            Subject(Place(Path("/"), Path("/"), "1"), Running(None)),
            0.0,
            launch=self.launch,
            **options,
        )
        self.workload = monitor.subject.workload
        return monitor

    def launch(self, run) -> None:
        if self.hold:
            self.held.append(run)
        else:
            self.carry_out(run)

    def carry_out(self, run) -> None:
        passes = self.outcomes.pop(0) if self.outcomes else self.then
        if passes:
            with socket.create_server(("127.0.0.1", SPARE_PORT)):
                run()
        else:
            run()

    def finish_later(self, monitor: Monitor, now_s: float, run_s: float) -> float:
        """Let one more run begin when it is due and end `run_s` later; the time when it ended."""
        (watch,) = monitor._watches
        self.hold = True
        begun_s = max(now_s, watch.due_s)
        monitor.step(begun_s)
        ended_s = begun_s + run_s
        self.carry_out(self.held.pop())
        monitor.step(ended_s)
        return ended_s


SPARE_PORT = free_port()


def port_check(**settings: object) -> Check:
    return Check(
        **{
            "kind": Kind.TCP,
            "name": "port",
            "interval_s": 1,
            "timeout_s": 1,
            "grace_s": 0,
            "port": SPARE_PORT,
            **settings,
        }
    )


def test_a_version_is_ready_when_every_check_has_passed() -> None:
    script = Script([True, False, True, True], then=True)
    monitor = script.monitor([port_check(name="a"), port_check(name="b", failures_allowed=2)])
    first = monitor.step(0.0)
    assert (first.healthy, first.ready, first.healthy_since_s) == (True, False, None)
    assert [failure.check for failure in first.failures] == ["b"]
    second = monitor.step(1.0)
    assert (second.healthy, second.ready, second.healthy_since_s) == (True, True, 1.0)


def test_failures_in_a_row_beyond_the_allowed_ones_make_it_unhealthy_for_good() -> None:
    monitor = Script([True, False, False, True, False, False, False], then=True).monitor(
        [port_check(failures_allowed=2)]
    )
    verdicts = [monitor.step(float(second)) for second in range(9)]
    assert [verdict.healthy for verdict in verdicts] == [True] * 6 + [False] * 3
    assert verdicts[6].failures[0].in_a_row == 3
    assert "port" in str(verdicts[6].failures[0])
    assert verdicts[8].healthy_since_s is None
    assert not verdicts[8].ready


def test_tolerated_failures_do_not_begin_the_observation_anew() -> None:
    monitor = Script([True, False, True]).monitor([port_check(failures_allowed=1)])
    assert monitor.step(0.0).healthy_since_s == 0.0
    tolerated = monitor.step(1.0)
    assert (tolerated.healthy, tolerated.ready, tolerated.healthy_since_s) == (True, False, 0.0)
    assert monitor.step(2.0) == replace(tolerated, ready=True, failures=())


def test_a_slow_start_is_not_judged_as_broken_but_grace_ends_with_the_first_pass() -> None:
    monitor = Script([False, False, False, True, False]).monitor([port_check(grace_s=100)])
    assert [monitor.step(float(second)).healthy for second in range(4)] == [True] * 4
    assert not monitor.step(4.0).healthy


def test_a_version_that_comes_up_is_not_asked_a_whole_interval_later() -> None:
    monitor = Script([False, True]).monitor([port_check(interval_s=30, grace_s=60)])
    assert not monitor.step(0.0).ready
    assert monitor.step(0.25).ready


def test_without_grace_a_failure_is_followed_by_a_whole_interval() -> None:
    script = Script([False])
    monitor = script.monitor([port_check(interval_s=10, grace_s=0, failures_allowed=1)])
    monitor.step(0.0)
    script.hold = True
    assert monitor.step(9.9).healthy
    assert not script.held


def test_after_the_grace_a_version_that_never_passed_is_unhealthy() -> None:
    monitor = Script([]).monitor([port_check(grace_s=2.5)])
    assert [monitor.step(float(second)).healthy for second in range(5)] == [True, True, True, False, False]


def test_a_check_runs_again_an_interval_after_it_ended_and_never_twice_at_once() -> None:
    script = Script([], then=True)
    script.hold = True
    monitor = script.monitor([port_check(interval_s=5)])
    monitor.step(0.0)
    monitor.step(6.0)
    assert len(script.held) == 1
    assert monitor.is_running
    script.held.pop()()
    monitor.step(7.0)
    monitor.step(11.9)
    assert not script.held
    monitor.step(12.0)
    assert len(script.held) == 1


def test_the_sleep_of_the_host_does_not_count() -> None:
    """A check that was under way then has run into a time-out: that says nothing of the version."""
    script = Script([True])
    monitor = script.monitor([port_check()])
    assert monitor.step(0.0).ready
    script.hold = True
    monitor.step(1.0)
    slept_until = 1.0 + 8 * 3600
    script.carry_out(script.held.pop())  # it failed: its time-out passed while the host slept
    verdict = monitor.step(slept_until)
    assert verdict.healthy
    assert not verdict.ready
    assert (monitor.gaps, monitor.slept_s) == (1, 8 * 3600)
    # The observation is as old as before the sleep, and the check is asked again at once.
    assert verdict.healthy_since_s == pytest.approx(8 * 3600)
    script.outcomes = [True]
    script.carry_out(script.held.pop())
    assert monitor.step(slept_until + 0.1).ready


def test_a_check_that_hangs_where_no_timeout_reaches_counts_as_a_failure_and_is_not_started_twice() -> None:
    script = Script([], then=True)
    script.hold = True
    monitor = script.monitor([port_check(failures_allowed=1)])
    verdicts = [monitor.step(float(second)).healthy for second in range(25)]
    assert verdicts == [True] * 22 + [False] * 3  # twice timeout_s + 10 s
    assert len(script.held) == 1


def test_a_failure_right_after_the_sleep_counts_again() -> None:
    monitor = Script([True]).monitor([port_check()])
    monitor.step(0.0)
    assert not monitor.step(1000.0).healthy


def test_the_grace_of_a_slow_start_is_as_long_after_a_sleep() -> None:
    monitor = Script([]).monitor([port_check(grace_s=10)])
    monitor.step(0.0)
    assert monitor.step(1000.0).healthy
    assert monitor.step(1009.0).healthy
    assert not monitor.step(1011.0).healthy


def test_no_checks_are_ready_at_once() -> None:
    verdict = Script([]).monitor([]).step(5.0)
    assert (verdict.healthy, verdict.ready, verdict.healthy_since_s) == (True, True, 5.0)


def test_a_step_never_waits_for_a_check(subject: Subject) -> None:
    slow = Check(Kind.EXEC, "slow", timeout_s=20, argv=("{python}", "-c", "import time; time.sleep(1)"))
    quick = Check(Kind.PROCESS, "quick")
    monitor = Monitor([slow, quick], subject, started_s=0.0)
    began = time.monotonic()
    monitor.step(0.0)
    assert time.monotonic() - began < 0.9
    wait_until(lambda: not monitor.step(1.0).failures)
    assert monitor.verdict().ready


@given(st.lists(st.booleans(), max_size=30), st.integers(0, 3))
def test_the_verdict_is_that_of_the_longest_row_of_failures(outcomes: list[bool], allowed: int) -> None:
    script = Script([True, *outcomes])
    monitor = script.monitor([port_check(failures_allowed=allowed)])
    row = longest = 0
    monitor.step(0.0)
    for second, passed in enumerate(outcomes, start=1):
        row = 0 if passed else row + 1
        longest = max(longest, row)
        verdict = monitor.step(float(second))
        assert verdict.healthy == (longest <= allowed)
        assert verdict.ready == (verdict.healthy and passed)
