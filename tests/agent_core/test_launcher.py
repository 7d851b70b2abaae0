"""The launcher as it is shipped: one file, real processes, and versions that behave as a test wants."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent_core import launcher, slots
from agent_core.launcher import REFUSE, ROLL_BACK, RUN, TRY, Plan, Restarts, decide
from agent_core.layout import Layout
from agent_core.slots import IDLE, ROLLBACK, TRIAL, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P, A, B = "0.9.0-000000000000", "1.0.0-aaaaaaaaaaaa", "1.1.0-bbbbbbbbbbbb"
ALL = frozenset({P, A, B})
RESTING = Record(good=A, previous=P)
ON_TRIAL = replace(RESTING, phase=TRIAL, candidate=B, boots_left=2, boots_max=3, deadman_s=60, tried=B)
GOING_BACK = replace(ON_TRIAL, phase=ROLLBACK, reason="unhealthy")
PATIENCE_S = 60.0


# What it decides


@pytest.mark.parametrize(
    ("record", "complete", "dead_man", "plan"),
    [
        pytest.param(None, frozenset(), False, Plan(REFUSE, (), "nothing is installed"), id="nothing"),
        pytest.param(RESTING, ALL, False, Plan(RUN, (A, P)), id="idle: good"),
        pytest.param(RESTING, ALL - {A}, False, Plan(RUN, (P,)), id="good is damaged: previous"),
        pytest.param(replace(RESTING, previous=A), ALL, False, Plan(RUN, (A,)), id="one version only"),
        pytest.param(
            RESTING,
            frozenset({B}),
            False,
            Plan(REFUSE, (), f"neither {A} nor {P} is whole"),
            id="both are damaged: never a third",
        ),
        pytest.param(ON_TRIAL, ALL, False, Plan(TRY, (A, P)), id="trial with boots left"),
        pytest.param(ON_TRIAL, ALL, True, Plan(TRY, (A, P)), id="dead-man with boots left: another boot"),
        pytest.param(ON_TRIAL, ALL - {A}, False, Plan(TRY, (P,)), id="trial, good is damaged"),
        pytest.param(
            ON_TRIAL, ALL - {B}, False, Plan(ROLL_BACK, (A, P), "disk"), id="the candidate is damaged"
        ),
        pytest.param(
            replace(ON_TRIAL, boots_left=0),
            ALL,
            False,
            Plan(ROLL_BACK, (A, P), "boots-used-up"),
            id="trial without boots",
        ),
        pytest.param(
            replace(ON_TRIAL, boots_left=0),
            ALL,
            True,
            Plan(ROLL_BACK, (A, P), "dead-man"),
            id="the dead-man took the last boot",
        ),
        pytest.param(GOING_BACK, ALL, False, Plan(ROLL_BACK, (A, P), "unhealthy"), id="rollback goes on"),
    ],
)
def test_the_plan_follows_the_record(record, complete, dead_man, plan):
    assert decide(record, complete, dead_man) == plan


def test_crashes_wait_twice_as_long_each_time_up_to_the_most():
    restarts = Restarts(1.0, 60.0)
    waits = [restarts.wait_s(100.0 * number, 2.0, at_once=False) for number in range(9)]
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    for number in range(2000):
        assert restarts.wait_s(number, 2.0, at_once=False) == 60.0


def test_a_minute_of_life_ends_the_backoff():
    restarts = Restarts(1.0, 60.0)
    assert [restarts.wait_s(0, lived, at_once=False) for lived in (1, 1, 1, 60, 1)] == [1, 2, 4, 1, 2]


def test_twenty_restarts_a_minute_are_at_once_and_more_are_a_loop():
    restarts = Restarts(1.0, 60.0)
    waits = [restarts.wait_s(number / 10, 0.1, at_once=True) for number in range(23)]
    assert waits == [0.0] * 20 + [1.0, 2.0, 4.0]
    assert restarts.wait_s(200.0, 0.1, at_once=True) == 0.0


# What it does


BODY = """
import json, os, signal, subprocess, sys, time
name = os.path.basename(os.path.dirname(os.path.abspath(__file__)))
root = sys.argv[sys.argv.index("--root") + 1]
print("start", name, flush=True)
def starts():
    with open(os.path.join(root, "starts-" + name), "a+") as stream:
        stream.write("x")
        return stream.tell()
def stay():
    print("ready", name, flush=True)
    while True:
        time.sleep(60)
"""
STAY = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\nstay()"
DIE = "sys.exit(3)"
NO_FILE_MAY_GROW = ("/bin/sh", "-c", 'ulimit -f 0; exec "$0" "$@"')


@dataclass
class Device:
    """A root with A good and P before it, and a launcher that a test starts."""

    layout: Layout
    running: list[subprocess.Popen[bytes]]

    @property
    def root(self) -> Path:
        return self.layout.root

    def version(self, name: str, body: str) -> None:
        place = self.layout.versions / name
        place.mkdir(exist_ok=True)
        (place / "agent.py").write_text(BODY + body)
        (place / ".bundle.json").write_text("{}")

    def interpreter(self, name: str, program: str, mode: int = 0o755) -> None:
        own = self.layout.versions / name / "python" / "bin" / "python3"
        own.parent.mkdir(parents=True)
        own.write_text(program)
        own.chmod(mode)

    def put(self, record: Record) -> None:
        slots.Slots(self.root).write(record)

    @property
    def record(self) -> Record:
        record = slots.read(self.root)
        assert record is not None
        return record

    def command(self, *words: str, inside: tuple[str, ...] = ()) -> list[str]:
        shipped = (sys.executable, "-I", "-S", "-B", str(self.layout.launcher_file))
        return [*inside, *shipped, "--root", str(self.root), *words]

    def start(self, *words: str, inside: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        with (self.root / "out").open("ab") as out, (self.root / "said").open("ab") as said:
            process = subprocess.Popen(
                self.command(*words, inside=inside),
                stdout=out,
                stderr=said,
                start_new_session=True,  # a test kills a process group; it must not be that of the tests
            )
        self.running.append(process)
        return process

    def run(self, *words: str, inside: tuple[str, ...] = ()) -> int:
        return self.start(*words, inside=inside).wait(PATIENCE_S)

    @property
    def out(self) -> list[str]:
        """What versions said, a line each."""
        return (self.root / "out").read_text().splitlines()

    @property
    def started(self) -> list[str]:
        return [line.partition(" ")[2] for line in self.out if line.startswith("start ")]

    @property
    def said(self) -> str:
        return (self.root / "said").read_text()

    def wait(self, line: str, times: int = 1) -> None:
        wait_until(lambda: self.out.count(line) >= times, f"{line!r} {times} times, not {self.out}")


def wait_until(claim: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not claim():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    layout = Layout(tmp_path / "device")
    layout.make()
    device = Device(layout, [])
    for name in (P, A, B):
        device.version(name, STAY)
    device.put(RESTING)
    slots.recover(device.root)
    yield device
    for process in device.running:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def test_the_launcher_becomes_the_good_version_by_its_own_path(device):
    device.version(
        A,
        """
flags = sys.flags
print(json.dumps([os.path.abspath(__file__), sys.argv[1:], flags.isolated, flags.dont_write_bytecode,
                  os.environ["RELFLEET_BOOT"], os.environ["RELFLEET_LAUNCHER"], os.getpid()]))
""",
    )
    process = device.start()
    assert process.wait(PATIENCE_S) == 0
    assert json.loads(device.out[1]) == [
        str(device.root / "versions" / A / "agent.py"),
        ["run", "--root", str(device.root)],
        1,
        1,
        "exec",
        str(launcher.LAUNCHER),
        process.pid,
    ]


def test_a_version_with_an_interpreter_of_its_own_is_run_by_it(device):
    device.interpreter(A, '#!/bin/sh\necho "own $1 $2 $3 $5"\n')
    assert device.run() == 0
    assert device.out == ["own -I -S -B run"]


def test_a_boot_is_recorded_before_the_candidate_runs(device):
    device.put(ON_TRIAL)
    device.version(B, "print(open(root + '/state/slots', 'rb').read().count(b'\"boots_left\":1'))")
    assert device.run() == 0
    assert device.out == [f"start {B}", "1"]
    assert (device.record.boots_left, device.record.is_up) == (1, True)
    assert device.record.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert slots.link(device.root, "current") == B, "the switch is finished first"


def test_a_candidate_without_boots_is_rolled_back_and_the_good_version_runs(device):
    device.version(A, "")
    device.put(replace(ON_TRIAL, boots_left=0))
    assert device.run() == 0
    assert device.started == [A]
    assert (device.record.phase, device.record.reason) == (IDLE, "boots-used-up")
    assert slots.link(device.root, "current") == A


def test_a_host_that_went_down_in_a_trial_does_not_use_up_its_boots(device):
    device.version(B, "")
    device.put(replace(ON_TRIAL, boots_left=0, is_up=True, boot_id="of-yesterday"))
    assert device.run() == 0
    assert device.started == [B]
    assert (device.record.boots_left, device.record.reboots) == (0, 1)


def test_a_rollback_that_was_cut_short_is_finished(device):
    device.version(A, "")
    device.put(GOING_BACK)
    slots.switch(device.root, B, A)
    assert device.run() == 0
    assert device.started == [A]
    assert device.record.skip == (("bbbbbbbbbbbb", "unhealthy", 0),)
    assert slots.link(device.root, "current") == A


def test_a_candidate_that_is_gone_is_rolled_back_at_once(device):
    device.version(A, "")
    device.put(ON_TRIAL)
    (device.layout.versions / B / "agent.py").unlink()
    assert device.run() == 0
    assert device.started == [A]
    assert device.record.skip == (("bbbbbbbbbbbb", "disk", 0),)


def test_a_candidate_that_cannot_be_executed_uses_up_its_boots_while_the_good_version_runs(device):
    device.version(A, "print(signal.alarm(0))")
    device.put(ON_TRIAL)
    device.interpreter(B, "no program", mode=0o644)
    assert device.run() == 0
    assert (device.record.phase, device.record.boots_left) == (TRIAL, 1)
    assert device.run() == 0
    assert (device.record.phase, device.record.reason) == (IDLE, "boots-used-up")
    assert device.out == [f"start {A}", "0"] * 2, "and no alarm is left over for the good version"


def test_a_trial_that_cannot_be_recorded_is_not_run(device):
    """A record that cannot be written would let an uncounted trial run for ever."""
    device.version(A, "")
    device.put(ON_TRIAL)
    done = subprocess.run(device.command(inside=NO_FILE_MAY_GROW), capture_output=True, text=True, check=True)
    assert done.stdout == f"start {A}\n"
    assert "the trial is put off" in done.stderr
    assert (device.record.phase, device.record.boots_left) == (TRIAL, 2)


def test_a_damaged_good_version_gives_way_to_the_previous_one(device):
    device.version(P, "")
    (device.layout.versions / A / ".bundle.json").unlink()
    assert device.run() == 0
    assert device.started == [P]


def test_a_good_version_whose_program_is_broken_gives_way_to_the_previous_one(device):
    device.version(P, "")
    device.interpreter(A, "no program", mode=0o644)
    assert device.run() == 0
    assert device.started == [P]


def test_with_nothing_whole_the_launcher_says_so_and_runs_no_third_version(device):
    for name in (P, A):
        (device.layout.versions / name / "agent.py").unlink()
    assert device.run() == 1
    assert device.started == []
    assert f"neither {A} nor {P} is whole" in device.said
    assert "next: agent run" in device.said


def test_with_both_slots_garbage_the_device_still_starts(device):
    device.version(A, "")
    device.layout.slots.write_bytes(b"garbage!" * 1024)
    assert device.run() == 0
    assert device.started == [A]
    assert device.record.good == A


@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_with_no_file_in_the_place_of_the_slots_or_the_lock_the_device_still_starts(device, put):
    device.version(A, "")
    for file in (device.layout.slots, device.layout.lock):
        file.unlink()
        put(file)
    assert device.run() == 0
    assert device.started == [A]
    assert device.record.good == A


def test_a_root_that_is_not_there_is_not_made(device, tmp_path):
    assert device.run("--root", str(tmp_path / "typo")) == 1
    assert not (tmp_path / "typo").exists()
    assert "cannot be used" in device.said


@pytest.mark.parametrize("words", [(), ("--supervise",)], ids=["exec", "supervise"])
def test_a_second_launcher_of_one_root_says_so_and_ends(device, words):
    device.start(*words)
    device.wait(f"ready {A}")
    for other in ((), ("--supervise",)):
        assert device.run(*other) == 1
    assert device.said.count("another launcher runs") == 2
    assert device.started == [A]


BLOCK_THE_ALARM = """
import os, signal, sys
signal.signal(signal.SIGALRM, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
os.execv(sys.argv[1], sys.argv[1:])
"""
WITHOUT_ALARM = (sys.executable, "-c", BLOCK_THE_ALARM)


def test_a_candidate_that_hangs_is_killed_by_the_dead_man_even_if_the_alarm_was_blocked(device):
    device.put(replace(ON_TRIAL, boots_left=1, deadman_s=1))
    device.version(B, "stay()")
    device.start("--supervise", inside=WITHOUT_ALARM)
    device.wait(f"ready {A}")
    assert device.started == [B, A]
    assert device.record.skip == (("bbbbbbbbbbbb", "dead-man", 0),)


def test_without_a_supervisor_the_alarm_ends_the_process(device):
    device.put(replace(ON_TRIAL, deadman_s=1))
    device.version(B, "stay()")
    assert device.run(inside=WITHOUT_ALARM) == -signal.SIGALRM


# Supervising


def test_a_candidate_that_crashes_runs_as_often_as_it_has_boots_without_waiting(device):
    device.put(replace(ON_TRIAL, boots_left=3))
    device.version(B, DIE)
    device.start("--supervise", "--backoff-s", "600")
    wait_until(lambda: device.started.count(B) == 3 and "starts again" in device.said, "three boots")
    wait_until(lambda: device.record.phase == IDLE, "the rollback")
    assert device.record.skip == (("bbbbbbbbbbbb", "boots-used-up", 0),)
    device.wait(f"ready {A}")
    assert device.started == [B, B, B, A]


def test_exit_75_starts_the_agent_again_at_once(device):
    device.version(A, f"if starts() < 4: sys.exit(75)\n{STAY}")
    device.start("--supervise", "--backoff-s", "600")
    device.wait(f"ready {A}")
    assert device.started == [A] * 4


def test_an_agent_that_asks_for_a_restart_all_the_time_is_slowed_down(device):
    device.interpreter(A, f'#!/bin/sh\necho "start {A}"\nexit 75\n')
    process = device.start("--supervise", "--backoff-s", "600")
    wait_until(lambda: "starts again in 60 s" in device.said, device.said)
    assert len(device.started) == launcher.RESTARTS_MOST + 1
    process.terminate()
    assert process.wait(PATIENCE_S) == 0


def test_a_good_version_that_crashes_is_started_again_and_never_flips(device):
    device.version(A, DIE)
    device.start("--supervise", "--backoff-s", "0.01", "--backoff-most-s", "0.02")
    wait_until(lambda: len(device.started) >= 4, "four starts")
    assert set(device.started) == {A}
    assert "ended with 3; it starts again in 0.01 s" in device.said
    assert "ended with 3; it starts again in 0.02 s" in device.said


def test_exit_0_without_a_signal_is_a_crash(device):
    device.version(A, f"if starts() < 2: sys.exit(0)\n{STAY}")
    device.start("--supervise", "--backoff-s", "0.01")
    device.wait(f"ready {A}")
    assert "ended with 0; it starts again in 0.01 s" in device.said


def test_an_uncounted_trial_is_no_reason_to_start_at_once(device):
    """The good version crashes while the trial cannot be recorded: it waits like any other crash."""
    device.put(ON_TRIAL)
    device.version(A, DIE)
    command = device.command("--supervise", "--backoff-s", "50", inside=NO_FILE_MAY_GROW)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        device.running.append(process)
        heard = next(line for line in process.stderr if "starts again" in line)
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
    assert "ended with 3; it starts again in 50 s" in heard


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_stop_is_handed_on_and_ends_the_launcher_with_0(device, number):
    device.version(
        A, f"signal.signal({int(number)}, lambda *_: (print('bye', flush=True), sys.exit(0)))\nstay()"
    )
    process = device.start("--supervise")
    device.wait(f"ready {A}")
    process.send_signal(number)
    assert process.wait(PATIENCE_S) == 0
    assert device.out[-1] == "bye"


@pytest.mark.parametrize("body", [STAY, "stay()"], ids=["handled", "by default"])
def test_a_clean_stop_in_a_trial_gives_the_boot_back(device, body):
    device.put(ON_TRIAL)
    device.version(B, body)
    process = device.start("--supervise")
    device.wait(f"ready {B}")
    assert device.record.boots_left == 1
    process.terminate()
    assert process.wait(PATIENCE_S) == 0
    assert (device.record.phase, device.record.boots_left) == (TRIAL, 2)


@pytest.mark.parametrize(
    ("record", "boots_left"),
    [
        pytest.param(replace(ON_TRIAL, boots_left=1, is_up=True), 2, id="its boot was counted"),
        pytest.param(replace(ON_TRIAL, boots_left=1, is_up=False), 1, id="given back before"),
        pytest.param(RESTING, 0, id="not on trial"),
    ],
)
def test_a_service_manager_can_give_the_boot_of_a_stopped_trial_back(device, record, boots_left):
    device.put(record)
    assert device.run("--refund") == 0
    assert (device.record.phase, device.record.boots_left, device.started) == (record.phase, boots_left, [])


def test_no_boot_is_given_back_while_an_agent_runs(device):
    device.put(ON_TRIAL)
    device.start()
    device.wait(f"ready {B}")
    assert device.run("--refund") == 1
    assert device.record.boots_left == 1


def test_an_agent_that_crashes_on_the_way_down_gets_no_boot_back(device):
    device.put(ON_TRIAL)
    device.version(B, "signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))\nstay()")
    process = device.start("--supervise")
    device.wait(f"ready {B}")
    process.terminate()
    assert process.wait(PATIENCE_S) == 9
    assert (device.record.phase, device.record.boots_left) == (TRIAL, 1)


def test_a_stop_while_waiting_to_start_again_ends_the_launcher(device):
    device.version(A, DIE)
    process = device.start("--supervise", "--backoff-s", "600", "--backoff-most-s", "600")
    wait_until(lambda: "starts again in 600 s" in device.said, "the backoff")
    process.send_signal(signal.SIGHUP)
    process.terminate()
    assert process.wait(PATIENCE_S) == 0
    assert device.started == [A]


@pytest.mark.parametrize(
    "number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2], ids=lambda number: number.name
)
def test_other_signals_are_handed_on_and_stop_nothing(device, number):
    device.version(A, f"signal.signal({int(number)}, lambda *_: print('heard', flush=True))\n{STAY}")
    process = device.start("--supervise")
    device.wait(f"ready {A}")
    process.send_signal(number)
    device.wait("heard")
    assert process.poll() is None


@pytest.mark.parametrize(
    "number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2], ids=lambda number: number.name
)
def test_a_signal_that_comes_before_the_agent_listens_does_not_end_it(device, number):
    device.version(A, f"os.kill(os.getpid(), {int(number)})\n{STAY}")
    device.start("--supervise")
    device.wait(f"ready {A}")
    assert device.started == [A]


def test_the_agent_goes_when_its_launcher_is_killed(device):
    device.version(A, f"print(os.getpid(), flush=True)\n{STAY}")
    process = device.start("--supervise")
    device.wait(f"ready {A}")
    agent = int(device.out[1])
    process.kill()
    process.wait(PATIENCE_S)
    wait_until(lambda: not is_alive(agent), "the agent outlived its launcher")


def test_an_agent_that_hears_no_signal_goes_with_its_launcher_too(device):
    device.version(A, "signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid(), flush=True)\nstay()")
    process = device.start("--supervise")
    device.wait(f"ready {A}")
    process.kill()
    process.wait(PATIENCE_S)
    wait_until(lambda: not is_alive(int(device.out[1])), "the agent outlived its launcher")
    device.version(A, STAY)
    device.start("--supervise")
    device.wait(f"ready {A}", times=2)


def test_what_kills_the_process_group_of_the_agent_does_not_kill_its_watcher(device):
    device.version(A, f"if starts() < 2: os.killpg(0, signal.SIGKILL)\n{STAY}")
    device.start("--supervise", "--backoff-s", "0.01")
    device.wait(f"ready {A}")
    assert "ended with -9" in device.said


ORPHAN = """
if starts() < 2:
    words = [sys.executable, "-c", '''{orphan}''']
    child = subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE)
    child.stdout.readline()
    print(child.pid, flush=True)
    os._exit(3)
"""


@pytest.mark.parametrize(
    "orphan",
    [
        "import time; print(flush=True); time.sleep(60)",
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(flush=True); time.sleep(60)",
    ],
    ids=["an ordinary workload", "one that ignores TERM"],
)
def test_a_workload_that_a_dead_agent_left_behind_is_ended_before_the_next_start(device, orphan):
    device.version(A, ORPHAN.format(orphan=orphan) + STAY)
    device.start("--supervise", "--backoff-s", "0.01")
    wait_until(lambda: device.started.count(A) == 2, "the second start")
    assert not is_alive(int(device.out[1]))


def test_orphans_are_reaped_while_the_agent_runs(device):
    device.version(
        A,
        "subprocess.run([sys.executable, '-c', 'import os; print(os.fork() or os.getpid(), flush=True)'])\n"
        + STAY,
    )
    process = device.start("--supervise")
    device.wait(f"ready {A}")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: len(children.read_text().split()) == 1, "only the agent is left")


AS_FIRST = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc", "--")
CONTAINERS = subprocess.run([*AS_FIRST, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not CONTAINERS, reason="this machine lets nobody make a process namespace")
def test_as_the_first_process_of_a_container_it_reaps_every_orphan_and_ends_by_term(device):
    # The first process gets no signal it did not ask for, and every orphan, also those of other sessions.
    orphan = "import os; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); os._exit(0)"
    device.version(
        A,
        f"for _ in range(20): subprocess.run([sys.executable, '-c', {orphan!r}])\n"
        "while len(open('/proc/1/task/1/children').read().split()) > 1: time.sleep(0.01)\n"
        "print('parent', os.getppid(), flush=True)\n" + STAY,
    )
    process = device.start("--supervise", inside=AS_FIRST)
    device.wait(f"ready {A}")
    assert "parent 1" in device.out
    first = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    os.kill(first, signal.SIGTERM)
    assert process.wait(PATIENCE_S) == 0


# What it is


def test_the_launcher_stays_small_enough_to_be_read_whole():
    assert len(Path(launcher.__file__).read_text().splitlines()) <= 300


def test_the_shipped_file_loads_nothing_but_the_standard_library(device):
    probe = f"""
import runpy, sys
sys.argv = [{str(device.layout.launcher_file)!r}, "--help"]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    pass
own = {{name for name in sys.modules if name.partition(".")[0] not in sys.stdlib_module_names}}
print(sorted(own - {{"__main__", "__mp_main__"}}), file=sys.stderr)
"""
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", probe], capture_output=True, text=True, check=True
    )
    assert (
        done.stderr.strip() == "['agent_core', 'agent_core.disk', 'agent_core.launcher', 'agent_core.slots']"
    )
