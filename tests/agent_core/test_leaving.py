"""A process that leaves has done all that others can see, and nothing more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BEFORE = """
import atexit, os, sys, threading, time
from agent_core.leaving import leave

class Loud:
    def __del__(self):
        print("taken apart", flush=True)

kept = Loud()
"""


def ended(program: str, stdout=subprocess.PIPE):
    argv = [sys.executable, "-E", "-c", BEFORE + program]  # -E: with buffered streams, wherever this runs
    return subprocess.run(argv, stdout=stdout, stderr=subprocess.PIPE, check=False)


def test_what_was_said_is_written_out_and_nothing_is_taken_apart():
    done = ended("print('out'); sys.stderr.write('err'); leave(7)")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err")


def test_exit_handlers_run_and_threads_are_waited_for():
    program = """
atexit.register(print, "handler")
gate = threading.Event()
threading.Thread(target=lambda: (gate.wait(), print("thread"))).start()
threading.Thread(target=threading.Event().wait, daemon=True).start()
threading.Timer(0.05, gate.set).start()
leave(0)
"""
    assert ended(program).stdout == b"thread\nhandler\n"


@pytest.mark.parametrize("code", [0, 3])
def test_output_that_nobody_can_read_is_a_failure(code):
    with Path("/dev/full").open("wb") as full:
        done = ended(f"print('lost'); leave({code})", stdout=full)
    assert done.returncode == (code or 1)


def test_a_stream_that_was_never_there_changes_no_code():
    """75 asks the launcher for a restart, also where an agent is started with closed streams."""
    argv = ["sh", "-c", 'exec "$0" -E -c "$1" >&- 2>&-', sys.executable, BEFORE + "leave(75)"]
    assert subprocess.run(argv, check=False).returncode == 75
