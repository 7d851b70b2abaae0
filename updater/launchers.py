"""The launcher's file on this host: which it is, and how another takes its place without a moment of none.

The launcher starts everything else, so a new one must prove itself first: in a process of its own, on a copy
of the record, it has to read the same and come to the same decision as the code that runs now.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_core import disk, launcher, slots
from agent_core.archive import launcher_archive, launcher_number
from agent_core.errors import ConflictError, NotFoundError, RelfleetError
from agent_core.layout import write_durable

if TYPE_CHECKING:
    from agent_core.layout import Layout

OWN = launcher.LAUNCHER
"""What the launcher can do that this code brings."""
MODE = 0o755
TEST_S = 30.0


@dataclass(frozen=True)
class Change:
    """What an upgrade did: the numbers before and after, and whether anything was written."""

    before: int | None
    after: int
    changed: bool


def in_force(layout: Layout) -> int:
    """The number of the launcher that starts this host's agent next."""
    return launcher_number(layout.launcher_file) or launcher.LAUNCHER


def upgrade(layout: Layout) -> Change:
    """Put this code's launcher in the place of the one on this host; the old one is kept beside it.

    Raises:
        ConflictError: `older-launcher`, the one on this host can do more.
        RelfleetError: `self-test`, the new one did not prove itself; nothing was changed.
        DiskError: it cannot be written; `launcher.pyz` is the old one.
    """
    fresh, before = launcher_archive(), launcher_number(layout.launcher_file)
    old = _content(layout.launcher_file)
    if before is not None and before > launcher.LAUNCHER:
        raise ConflictError(
            f"this would put launcher {launcher.LAUNCHER} in the place of {before}",
            why="the agent that was called is older than the one that wrote the launcher",
            then="call the newest agent; agent upgrade-launcher --back returns to the launcher before",
            reason="older-launcher",
        )
    if old == fresh:
        return Change(before, launcher.LAUNCHER, changed=False)
    _put(layout, fresh, old)
    return Change(before, launcher.LAUNCHER, changed=True)


def go_back(layout: Layout) -> Change:
    """Exchange the launcher and the one before it; errors as of `upgrade`."""
    kept = _content(layout.launcher_previous)
    if kept is None:
        raise NotFoundError("there is no launcher before this one", why=f"no {layout.launcher_previous}")
    before, after = launcher_number(layout.launcher_file), launcher_number(layout.launcher_previous)
    if after is None:
        raise RelfleetError(f"{layout.launcher_previous} is no launcher", reason="self-test")
    old = _content(layout.launcher_file)
    # Wanted first, then the other: the agent can bring that one anew, and this one nobody can.
    write_durable(layout.launcher_file, kept, MODE, lambda beside: prove(layout, beside))
    if old is not None:
        write_durable(layout.launcher_previous, old, MODE)
    return Change(before, after, changed=kept != old)


def _put(layout: Layout, fresh: bytes, old: bytes | None) -> None:
    """Write beside, prove, keep the old one, rename: `launcher.pyz` is always one of the two, whole."""

    def earn(beside: Path) -> None:
        prove(layout, beside)
        if old is not None:
            write_durable(layout.launcher_previous, old, MODE)

    write_durable(layout.launcher_file, fresh, MODE, earn)


def _content(file: Path) -> bytes | None:
    try:
        return disk.read_file(file)
    except FileNotFoundError:
        return None


# --- the proof --------------------------------------------------------------------------------------------


def prove(layout: Layout, file: Path) -> None:
    """Have the launcher in `file` decide on a copy of the record, as the device's Python runs it.

    A launcher of before the self-test can only show that it starts; only `--back` meets such a one.

    Raises:
        RelfleetError: `self-test`, with what it said.
    """
    if (launcher_number(file) or 0) < 2:
        _run([str(file), "--help"])
        return
    with tempfile.TemporaryDirectory(prefix="relfleet-launcher-") as place:
        copy = _copied(layout, Path(place))
        expected = _expected(copy)
        said = _run([str(file), "--root", str(copy), "--self-test"])
    try:
        found = json.loads(said)
        same = found["plan"] == expected["plan"] and _agree(found["record"], expected["record"])
    except (ValueError, KeyError, TypeError, AttributeError):
        same = False
    if not same:
        raise _failed(f"it said {said[:300]!r}, and should have said {json.dumps(expected)[:300]!r}")


def _agree(found: Any, expected: Any) -> bool:
    """Whether both read the same record; an older launcher knows fewer fields of it."""
    if found is None or expected is None:
        return found is expected
    return bool(found) and all(expected[key] == value for key, value in found.items())


def _copied(layout: Layout, place: Path) -> Path:
    """A root with this one's record and links, and stand-ins for the versions that are whole."""
    copy = place / "root"
    (copy / "state").mkdir(parents=True)
    if (content := _content(layout.slots)) is not None:
        (copy / "state" / "slots").write_bytes(content)
    for name in disk.listdir(layout.versions) if disk.exists(layout.versions) else []:
        if slots.is_complete(layout.root, name):
            (copy / "versions" / name).mkdir(parents=True)
            for part in (".bundle.json", "agent.py"):
                (copy / "versions" / name / part).touch()
    for link in (slots.CURRENT, slots.PREVIOUS):
        if shown := slots.link(layout.root, link):
            (copy / link).symlink_to(Path("versions", shown))
    return copy


def _expected(copy: Path) -> dict[str, object]:
    """What this code reads and decides; read before the other may write its recovery."""
    record = slots.recover(copy)
    plan = launcher.decide(record, slots.complete(copy, record))
    told = {"record": asdict(record) if record else None, "plan": asdict(plan)}
    known: dict[str, object] = json.loads(json.dumps(told))
    return known


def _run(words: list[str]) -> str:
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-B", *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TEST_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed(str(error)) from error
    if done.returncode != 0:
        raise _failed(f"exit {done.returncode}: {done.stderr.strip()[-300:]}")
    return done.stdout


def _failed(why: str) -> RelfleetError:
    return RelfleetError(
        "the new launcher did not prove itself, and the old one stays",
        why=why,
        then="agent diagnostics -o FILE, and report it",
        reason="self-test",
    )
