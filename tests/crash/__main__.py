"""This module runs tiers of the crash proof: `python -m tests.crash model kill [--quick] [--strict]`.

A tier is a module beside this one with two functions:

    def unavailable() -> str                         empty, or why this machine cannot run it
    def run(tally: Tally, *, quick: bool) -> None    tries states, counts them, and keeps what failed

`all` names every tier. It exits with 1 when anything failed, with 2 for a tier that does not exist.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from typing import Protocol

from tests.crash.tally import Tally

TIERS = ("model", "kill", "seam", "power", "full", "systemd", "chaos")
"""Cheapest first. One that is not there yet is left out of `all`, and cannot be named."""


class Tier(Protocol):
    def unavailable(self) -> str: ...
    def run(self, tally: Tally, *, quick: bool) -> None: ...


def main(words: list[str] | None = None) -> int:
    there = [name for name in TIERS if importlib.util.find_spec(f"tests.crash.{name}")]
    parser = argparse.ArgumentParser(
        prog="python -m tests.crash", description="Runs tiers of the crash proof."
    )
    names = [*there, "all"]
    parser.add_argument("tiers", nargs="+", metavar="TIER", choices=names, help=", ".join(names))
    parser.add_argument("--quick", action="store_true", help="a few hundred states instead of all")
    parser.add_argument("--strict", action="store_true", help="a tier that cannot run here is a failure")
    asked = parser.parse_args(words)
    named = there if "all" in asked.tiers else list(dict.fromkeys(asked.tiers))
    passed = [_passed(name, asked.quick, asked.strict) for name in named]
    return 0 if all(passed) else 1


def _passed(name: str, quick: bool, strict: bool) -> bool:
    tier: Tier = importlib.import_module(f"tests.crash.{name}")  # type: ignore[assignment]
    if why := tier.unavailable():
        print(f"{name:10} not run here: {why}", flush=True)
        return not strict
    tally = Tally(name)
    tier.run(tally, quick=quick)
    if not tally.tried:
        tally.fail(f"the {name} tier tried no state at all")
    tally.report()
    return not tally.failures


if __name__ == "__main__":
    sys.exit(main())
