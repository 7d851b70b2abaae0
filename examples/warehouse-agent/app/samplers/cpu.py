"""How busy the processors were since the last sample."""

from __future__ import annotations

import os
from typing import Any

import psutil

psutil.cpu_percent()  # the first call only begins the first measurement


def sample(_settings: object) -> dict[str, Any]:
    one, five, fifteen = os.getloadavg()
    return {"percent": psutil.cpu_percent(), "load": [one, five, fifteen], "cores": psutil.cpu_count()}
