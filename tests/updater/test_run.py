"""`agent run` while there is nothing to run yet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from agent_core.layout import Layout
from updater import identity as identities
from updater.identity import Identity

AS_FIRST = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc", "--")
CONTAINERS = subprocess.run([*AS_FIRST, "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not CONTAINERS, reason="this machine lets nobody make a process namespace")
def test_a_stop_ends_the_wait_for_a_first_version_also_as_the_first_process_of_a_container(tmp_path):
    # The kernel hands process 1 no signal that it did not ask for: without a handler only KILL would end it.
    layout = Layout(tmp_path / "agent")
    layout.make()
    identities.save(layout, Identity("http://127.0.0.1:9", "probe", "host-1", "any"))
    words = [*AS_FIRST, sys.executable, "-m", "updater", "run", "-v", "--root", str(layout.root)]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert any("nothing installed yet" in line for line in process.stderr)
        first = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
        os.kill(first, signal.SIGTERM)
        try:
            assert process.wait(30) == 0
        finally:
            process.kill()
