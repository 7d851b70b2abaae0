"""Drives one target by coverage, with atheris: `make fuzz` runs it for each.

usage: run.py TARGET CORPUS SECONDS
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["agent_core", "updater"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    name, corpus, seconds = sys.argv[1:]
    target = TARGETS[name]
    directory = Path(corpus)
    directory.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds):
        (directory / f"seed-{number}").write_bytes(seed)
    limits = [
        f"-max_total_time={seconds}",
        "-timeout=20",
        "-rss_limit_mb=1024",
        "-verbosity=0",
        "-print_final_stats=1",
    ]
    found = f"-artifact_prefix={directory.parent}/{name}-"
    atheris.Setup([sys.argv[0], *limits, found, corpus], target.call)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
