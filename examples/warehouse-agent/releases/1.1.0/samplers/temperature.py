"""Degrees Celsius of each sensor; empty on a host without any. New in 1.1.0."""

from __future__ import annotations

from typing import Any

import psutil


def sample(_settings: object) -> dict[str, Any]:
    return {
        chip: {sensor.label or str(place): sensor.current for place, sensor in enumerate(sensors)}
        for chip, sensors in psutil.sensors_temperatures().items()
    }
