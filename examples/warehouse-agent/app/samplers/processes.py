"""The processes that the settings name: how many run, and what they use together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from settings import Settings


def sample(settings: Settings) -> dict[str, Any]:
    found: dict[str, Any] = {name: {"count": 0, "rss": 0, "cpu_s": 0.0} for name in settings.processes}
    if not found:
        return found
    for process in psutil.process_iter(["name", "memory_info", "cpu_times"]):
        entry = found.get(process.info["name"])
        if entry is None:
            continue
        entry["count"] += 1
        memory, cpu = process.info["memory_info"], process.info["cpu_times"]
        entry["rss"] += memory.rss if memory else 0
        entry["cpu_s"] = round(entry["cpu_s"] + (cpu.user + cpu.system if cpu else 0), 2)
    return found
