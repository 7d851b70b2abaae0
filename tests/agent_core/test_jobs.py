"""Jobs and helpers: children that answer, in the real loop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent_core.jobs import Helper, JobResult
from agent_core.runtime import Runtime
from tests.agent_core.loop import (
    REPO,
    is_gone,
    run,
    wait_until,
    when,
)


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


def test_the_last_words_of_a_helper_are_taken_before_another_is_started(runtime: Runtime) -> None:
    once = "os.write(1, json.dumps({'said': line}).encode() + b'\\n'); os._exit(line == 'fails')"
    made, said = helper(runtime, once), list[str]()

    def done(result: JobResult) -> None:
        assert result.answer is not None
        said.append(result.answer["said"])
        if len(said) == 3:
            runtime.stop()

    for request in ("fails", "two", "three"):
        made.ask(request, done, deadline_s=10)
    assert made._child is not None
    wait_until(lambda: is_gone(made._child.pid))
    made.reap()  # by the loop, in a turn in which its end was seen before its words
    run(runtime)
    assert said == ["fails", "two", "three"]


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


def test_a_request_that_comes_while_a_helper_is_ended_for_its_lateness_has_an_answer_of_its_own(
    runtime: Runtime, tmp_path: Path
) -> None:
    """The late one answers to the signal after all, and lives on for as long as it would take to ask it."""
    ready = tmp_path / "ready"
    extra = (
        "import pathlib, signal\n"
        "    def late(*_):\n"
        '        os.write(1, b\'{"said": "late"}\\n\')\n'
        "        select.select([sys.stdin], [], [], 0.3)\n"
        "        os._exit(1)\n"
        "    if line == 'one':\n"
        "        signal.signal(signal.SIGTERM, late)\n"
        f"        pathlib.Path({str(ready)!r}).touch()\n"
        "        signal.pause()"
    )
    made, results = helper(runtime, extra), list[JobResult]()

    def done(result: JobResult) -> None:
        results.append(result)
        if len(results) == 1:
            made.ask("two", done, deadline_s=30)
        else:
            runtime.stop()

    made.ask("one", done, deadline_s=30)
    when(runtime, ready.exists, lambda: made._end("deadline"))
    run(runtime)
    assert [result.problem for result in results] == ["", ""]
    assert [result.answer["said"] for result in results] == ["late", "two"]


COPY = """
import json, os, sys
from agent_core.jobs import Helper
from agent_core.runtime import Runtime

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
from agent_core.processes import Copy
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
    for request in ("one", "two", "three"):
        made.ask(request, lambda result: problems.append(result.problem), deadline_s=30)
    when(runtime, lambda: made.is_alive, runtime.stop)
    run(runtime)
    assert problems == ["stopped"] * 3
