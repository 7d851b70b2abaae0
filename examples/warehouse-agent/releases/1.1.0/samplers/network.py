"""Bytes through each network interface per second, since the last sample. New in 1.1.0."""

from __future__ import annotations

import time
from typing import Any

import psutil

_last: dict[str, Any] = {"at_s": time.monotonic(), "counters": psutil.net_io_counters(pernic=True)}


def sample(_settings: object) -> dict[str, Any]:
    now_s, counters = time.monotonic(), psutil.net_io_counters(pernic=True)
    before, seconds = _last["counters"], max(now_s - _last["at_s"], 0.001)
    _last.update(at_s=now_s, counters=counters)
    return {
        name: {
            "received_per_s": _rate(before[name].bytes_recv, found.bytes_recv, seconds),
            "sent_per_s": _rate(before[name].bytes_sent, found.bytes_sent, seconds),
        }
        for name, found in counters.items()
        if name in before
    }


def _rate(before: int, now: int, seconds: float) -> int:
    return round(max(now - before, 0) / seconds)
