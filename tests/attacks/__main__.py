"""This module runs every attack that docs/cases.md names, and prints what was tried and what was refused.

`python -m tests.attacks`: rows 30 and 32 to 36 with all the tests they name, wherever these are, then
the stolen keys. It exits with 1 when an attack was not refused, and when a row tried none.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pytest

HOUSE = Path(__file__).resolve().parents[2]
ROWS = {
    "30": "deltas that do not give the signed files",
    "32": "the directive of a stolen server",
    "33": "signatures that do not count",
    "34": "replays, frozen servers, clocks",
    "35": "answers of a hostile network",
    "36": "forged reports and tokens",
}
THEFTS = "stolen keys, each by itself"
TEST = re.compile(r"^ *def (test_\w+)", flags=re.MULTILINE)


def table() -> dict[str, list[str]]:
    """What to run, by heading: `tests/FILE.py::test_name`."""
    homes = {
        name: str(file.relative_to(HOUSE))
        for file in sorted((HOUSE / "tests").rglob("test_*.py"))
        for name in TEST.findall(file.read_text())
    }
    page = (HOUSE / "docs" / "cases.md").read_text()
    rows = dict(re.findall(r"^\| (\d+) \|.*\| (.*) \|$", page, flags=re.MULTILINE))
    made = {
        f"{number}  {heading}": [f"{homes[name]}::{name}" for name in re.findall(r"test_\w+", rows[number])]
        for number, heading in ROWS.items()
    }
    thefts = TEST.findall((HOUSE / "tests" / "attacks" / "test_thefts.py").read_text())
    return made | {f"    {THEFTS}": [f"{homes[name]}::{name}" for name in thefts]}


@dataclass(eq=False)  # pytest keeps plug-ins in a set
class Count:
    """A pytest plug-in that counts, by test, what was tried and what was refused."""

    tried: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        name = report.nodeid.partition("[")[0]
        if report.when == "call":
            self.tried[name] += 1
            self.refused[name] += report.passed
        elif report.failed:
            self.tried[name] += report.when == "setup"
            self.refused[name] -= report.when == "teardown"


def main(words: list[str]) -> int:
    rows, count = table(), Count()
    chosen = sorted({test for tests in rows.values() for test in tests})
    code = pytest.main(["-q", "--no-header", *words, *chosen], plugins=[count])
    whole = True
    for heading, tests in rows.items():
        tried, refused = (sum(each[test] for test in tests) for each in (count.tried, count.refused))
        whole = whole and tried == refused > 0
        print(f"{heading:44}{tried:5} tried {refused:5} refused", flush=True)
    return 0 if whole and code == pytest.ExitCode.OK else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
