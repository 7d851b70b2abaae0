"""Hooks of a version: how they are read, run, bounded and ended."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

import psutil
import pytest

from agent_core.errors import MalformedError
from agent_core.hooks import NO_HOOKS, POST_ACTIVATE, PRE_ACTIVATE, Hook, Hooks, parse_hooks, run_hook
from agent_core.processes import TRIES
from agent_core.workload import Place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    version_dir = tmp_path / "versions" / "1.1.0-0123456789ab"
    (version_dir / "app").mkdir(parents=True)
    return Place(tmp_path, version_dir, "1.1.0")


def shell(script: str, timeout_s: float = 20.0) -> Hook:
    return Hook(("/bin/sh", "-c", script), timeout_s)


@pytest.mark.parametrize(
    "hooks",
    [
        NO_HOOKS,
        Hooks(pre_activate=Hook(("app/check",))),
        Hooks(Hook(("{python}", "app/a.py"), 5.0), Hook(("/bin/true",), 600.0)),
    ],
)
def test_hooks_survive_writing_and_reading(hooks: Hooks) -> None:
    assert parse_hooks(hooks.to_json()) == hooks


@pytest.mark.parametrize(
    ("hooks", "path"),
    [
        pytest.param([], "index.hooks", id="no object"),
        pytest.param({"post_acitvate": {"argv": ["x"]}}, "index.hooks.post_acitvate", id="misspelt"),
        pytest.param({"pre_activate": ["x"]}, "index.hooks.pre_activate", id="a list"),
        pytest.param({"pre_activate": {}}, "index.hooks.pre_activate.argv", id="no program"),
        pytest.param({"pre_activate": {"argv": [""]}}, "index.hooks.pre_activate.argv", id="empty program"),
        pytest.param({"pre_activate": {"argv": ["x"], "timeout": 5}}, "pre_activate.timeout", id="other key"),
        pytest.param({"post_activate": {"argv": ["x"], "timeout_s": 0}}, "timeout_s", id="no time"),
        pytest.param({"post_activate": {"argv": ["x"], "timeout_s": 601}}, "timeout_s", id="too much time"),
    ],
)
def test_a_malformed_hook_is_refused_by_the_path_of_its_key(hooks: object, path: str) -> None:
    with pytest.raises(MalformedError) as caught:
        parse_hooks(hooks)
    assert path in str(caught.value)


def test_a_hook_runs_in_its_version_and_knows_what_it_follows(place: Place) -> None:
    (place.version_dir / "app" / "hook").write_text(
        '#!/bin/sh\necho "$PWD $RELFLEET_HOOK $RELFLEET_VERSION $RELFLEET_VERSION_BEFORE $1" > "$1/ran"\n'
    )
    (place.version_dir / "app" / "hook").chmod(0o755)
    assert run_hook(PRE_ACTIVATE, Hook(("app/hook", "{root}")), place, "1.0.0") == ""
    said = (place.root / "ran").read_text().split()
    assert said == [str(place.version_dir), "pre_activate", "1.1.0", "1.0.0", str(place.root)]


def test_a_hook_that_fails_says_how_with_its_last_words(place: Place) -> None:
    why = run_hook(POST_ACTIVATE, shell("echo the table; echo is locked >&2; exit 3"), place, "")
    assert why == "post_activate: exit 3: the table is locked"


def killed_until(times: int, place: Place) -> Hook:
    """A hook that is killed as if for want of memory, so many times."""
    count = f'echo >> {place.root}/tried; test "$(wc -l < {place.root}/tried)" -gt {times}'
    return shell(f"{count} || kill -KILL $$")


def test_a_hook_that_somebody_killed_is_tried_again(place: Place) -> None:
    assert run_hook(PRE_ACTIVATE, killed_until(TRIES - 1, place), place, "") == ""


def test_a_hook_that_is_always_killed_has_failed(place: Place) -> None:
    assert run_hook(POST_ACTIVATE, killed_until(99, place), place, "") == "post_activate: exit -9"
    assert len((place.root / "tried").read_text()) == TRIES


@pytest.mark.parametrize("signum", [9, 15])
def test_a_shell_whose_command_was_killed_says_so_and_is_tried_again(place: Place, signum: int) -> None:
    count = f'echo >> {place.root}/tried; test "$(wc -l < {place.root}/tried)" -gt {TRIES - 1}'
    script = f"{count} || sh -c 'kill -{signum} $$'"
    assert run_hook(PRE_ACTIVATE, shell(script), place, "") == ""
    assert len((place.root / "tried").read_text()) == TRIES


def test_a_program_that_means_something_else_by_137_is_heard_in_the_end(place: Place) -> None:
    why = run_hook(PRE_ACTIVATE, shell(f"echo >> {place.root}/tried; echo full; exit 137"), place, "")
    assert why == "pre_activate: exit 137: full"
    assert len((place.root / "tried").read_text()) == TRIES


def test_all_tries_of_a_hook_share_its_time_and_it_is_said_that_there_were_more(place: Place) -> None:
    tried = place.root / "tried"
    slow = f"test -e {tried} && sleep 60; : > {tried}; kill -KILL $$"
    began = time.monotonic()
    for limit_s in (1, 6, 20):  # on a busy machine a shell may not even start within the first
        tried.unlink(missing_ok=True)
        why = run_hook(PRE_ACTIVATE, shell(slow, limit_s), place, "")
        if why != f"pre_activate: took longer than {limit_s} s":
            break
    assert why == f"pre_activate: took longer than {limit_s} s, 1 killed before included"
    assert time.monotonic() - began < 60


def test_a_hook_that_says_no_is_asked_once(place: Place) -> None:
    run_hook(PRE_ACTIVATE, shell(f"echo >> {place.root}/tried; exit 3"), place, "")
    assert len((place.root / "tried").read_text()) == 1


@pytest.mark.parametrize("argv", [("app/none",), ("/nowhere/at/all",)])
def test_a_hook_that_cannot_be_started_has_failed(place: Place, argv: tuple[str, ...]) -> None:
    assert run_hook(PRE_ACTIVATE, Hook(argv), place, "")


def test_a_hook_without_its_directory_has_failed(tmp_path: Path) -> None:
    gone = Place(tmp_path, tmp_path / "versions" / "gone", "1.1.0")
    assert "could not be started" in run_hook(PRE_ACTIVATE, shell("exit 0"), gone, "")


@pytest.mark.parametrize("ending", ["wait", "exit 0"], ids=["at its limit", "at its end"])
def test_whatever_a_hook_started_is_ended_with_it(place: Place, ending: str) -> None:
    script = f"trap '' TERM; sleep 300 & echo $! > {place.root}/child; {ending}"
    began = time.monotonic()
    why = run_hook(PRE_ACTIVATE, shell(script, 1.0), place, "")
    assert why == ("pre_activate: took longer than 1 s" if ending == "wait" else "")
    assert time.monotonic() - began < 60
    assert is_gone(int((place.root / "child").read_text()))


def is_gone(pid: int) -> bool:
    """Killed children of a dead parent are reaped by init, a moment later."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(20)
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    return True


def test_a_hook_that_says_much_is_not_held_up(place: Place) -> None:
    why = run_hook(PRE_ACTIVATE, shell("head -c 3000000 /dev/zero | tr '\\0' x; exit 1"), place, "")
    assert why.startswith("pre_activate: exit 1: xxx")
    assert len(why) < 300


def test_the_agent_s_own_settings_stay_with_the_agent(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RELFLEET_SERVER_PROXY", "http://us:secret@proxy")
    assert "RELFLEET_SERVER_PROXY" in os.environ
    assert run_hook(PRE_ACTIVATE, shell('test -z "$RELFLEET_SERVER_PROXY"'), place, "") == ""
