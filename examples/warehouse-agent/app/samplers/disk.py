"""Room on the disks named in the settings, in bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from settings import Settings


def sample(settings: Settings) -> dict[str, Any]:
    return {disk: _room(disk) for disk in settings.disks}


def _room(disk: str) -> dict[str, Any]:
    usage = psutil.disk_usage(disk)
    return {"total": usage.total, "free": usage.free, "percent": usage.percent}
