"""What this host is: facts that cohorts can ask for and that nobody has to type. Standard library only."""

from __future__ import annotations

import os
import sys
from functools import lru_cache
from pathlib import Path

from agent_core import disk

OS_RELEASE = Path("/etc/os-release")
MOST = 256


@lru_cache(maxsize=1)
def inventory() -> dict[str, str]:
    """`os`, `arch`, `kernel` and `python`, and `distro` where the host says it; read once a process.

    A kernel changes with a boot, a Python with a version of the agent: both begin a new process.
    """
    host = os.uname()
    facts = {
        "os": sys.platform,
        "arch": host.machine,
        "kernel": host.release,
        "python": ".".join(map(str, sys.version_info[:3])),
        "distro": distro(OS_RELEASE),
    }
    return {name: value[:MOST] for name, value in facts.items() if value}


def distro(os_release: Path) -> str:
    """`debian-12` of an os-release file, empty where it cannot be told."""
    try:
        lines = disk.read_file(os_release).decode("utf-8", "replace").splitlines()
    except OSError:
        return ""
    said = {key: value.strip("\"'") for key, sign, value in (line.partition("=") for line in lines) if sign}
    return "-".join(filter(None, (said.get("ID"), said.get("VERSION_ID"))))
