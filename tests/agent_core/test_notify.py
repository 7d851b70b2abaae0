"""What a service manager is told."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agent_core.notify import Notifier
from agent_core.runtime import Runtime
from tests.agent_core.loop import (
    run,
)


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
