"""Memory and swap, in bytes."""

from __future__ import annotations

from typing import Any

import psutil


def sample(_settings: object) -> dict[str, Any]:
    memory = psutil.virtual_memory()
    used = {"total": memory.total, "available": memory.available, "percent": memory.percent}
    return {**used, "swap": psutil.swap_memory().used}
