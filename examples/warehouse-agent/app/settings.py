"""What the operator of a host may set, in `app-data/settings.toml`; without the file the defaults hold."""

from __future__ import annotations

import os
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """See the table in the README."""

    interval_s: float = 1.0
    processes: tuple[str, ...] = ()
    disks: tuple[str, ...] = ("/",)
    spool_bytes: int = 4 * 1024 * 1024


def data_directory() -> Path:
    """Where settings and samples live: beside the versions, so that they outlast each of them."""
    return Path(os.environ["RELFLEET_ROOT"]) / "app-data"


def load_settings(directory: Path) -> Settings:
    """Read the settings; a file that cannot be used ends the program with a message that says why."""
    path = directory / "settings.toml"
    if not path.exists():
        return Settings()
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        unknown = set(found) - {field.name for field in fields(Settings)}
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        lists = {name: tuple(map(str, found[name])) for name in ("processes", "disks") if name in found}
        settings = Settings(**{**found, **lists})
        if not 0.1 <= float(settings.interval_s) <= 3600 or int(settings.spool_bytes) < 64 * 1024:
            raise ValueError("interval_s is within 0.1 and 3600, spool_bytes at least 65536")
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path}: {error}") from error
    return settings
