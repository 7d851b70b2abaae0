"""This module is the seam tier: what the disk's seam says it did, beside what strace saw the kernel do.

A first install, an upgrade, a way back and an operator's way back are done once each, with all that a check
does, in a process that notes every operation of `agent_core.disk` and that strace watches from outside. Both
must tell of the same changes under the device's directory, but for what goes around the seam on purpose.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agent_core import disk, slots
from agent_core.layout import Layout
from tests.crash import tracer
from tests.crash.host import environment
from tests.crash.rig import BAD, BOOTS, GOOD, HERE, NEW, Rig
from tests.crash.tally import Tally
from updater import control, install, poll
from updater.device import Device

AROUND = {
    r"\w+ state/spool\.(db.*|high)": "the spool: SQLite keeps its files whole, and they decide nothing",
    r"f(data)?sync state": "SQLite makes its file names durable",
    r"(unlink|symlink) state/tuf/root\.json": "python-tuf's link, made anew before it is read",
    r"mkdir state/tuf/root_history": "python-tuf makes it when it is not there",
    r"\w+ log/.*": "what is logged may be lost",
}
"""What changes without the seam, as a word and a file, and why that is no matter."""

# Both sides in one word for each change.
WORDS = {
    "openat": "open",
    "pwrite64": "pwrite",
    "allocate": "fallocate",
    "reserve": "fallocate",
    "rename_exchange": "renameat2",
    "rename_new": "renameat2",
    "unlinkat": "unlink",
    "rmdir": "unlink",
    "mkdirat": "mkdir",
    "fchmodat": "chmod",
    "symlinkat": "symlink",
}
HANDLES = frozenset("write pwrite ftruncate allocate reserve fsync fdatasync syncfs fchmod".split())  # noqa: SIM905
NAMES = frozenset("rename rename_exchange rename_new symlink unlink mkdir rmdir chmod open".split())  # noqa: SIM905
_CALL = re.compile(r"^\d+\s+(\w+)\((.*)")
_WHERE = re.compile(r'(?:(?:\d+|AT_FDCWD)<(?P<handle>[^>]*)>(?:\(deleted\))?)?(?:, )?(?:"(?P<path>[^"]*)")?')

Change = tuple[str, str]
"""A word for the change, and the file inside ROOT; of two names, the one that is made."""


def unavailable() -> str:
    return "" if shutil.which("strace") else "strace is missing: scripts/crash-setup"


def run(tally: Tally, *, quick: bool) -> None:
    """Each flow once; `quick` is as long, it takes seconds."""
    with Rig() as rig:
        rig.enrolled(rig.home / "host")
        for flow, version in (("first", GOOD), ("upgrade", NEW), ("way back", BAD), ("operator", BAD)):
            seen, noted = _both(rig, flow, version)
            tally.count(sum(seen.values()), flow)
            for (what, file), times in (_without_known(seen) - noted).items():
                tally.fail(f"{flow}: {what} of {file} goes around the seam, {times} times")
            for (what, file), times in (noted - seen).items():
                tally.fail(f"{flow}: the seam tells of {what} of {file}, and strace does not, {times} times")
            if not noted:
                tally.fail(f"{flow}: the seam told of nothing")


def _both(rig: Rig, flow: str, version: str) -> tuple[Counter[Change], Counter[Change]]:
    """What strace saw and what the seam noted of one flow on the rig's one host."""
    root = rig.home / "host"
    rig.host(root).lead_to(version)
    trace, notes = rig.home / "trace", rig.home / "notes"
    calls = ",".join(name for name in tracer.CALLS if name not in ("creat", "open"))
    argv = ["strace", "-f", "-y", "-s", "0", "--seccomp-bpf", "-e", f"trace={calls}", "-o", str(trace)]
    argv += [sys.executable, "-B", "-m", "tests.crash.seam", flow, str(root), str(notes)]
    subprocess.run(argv, check=True, cwd=HERE, env=environment(), stdin=subprocess.DEVNULL)
    seen = Counter(filter(None, (_seen(line, str(root)) for line in trace.read_text().splitlines())))
    return seen, Counter((word, file) for word, file in json.loads(notes.read_text()))


def _without_known(seen: Counter[Change]) -> Counter[Change]:
    known = re.compile("|".join(AROUND))
    return Counter({change: times for change, times in seen.items() if not known.fullmatch(" ".join(change))})


def _seen(line: str, root: str) -> Change | None:
    """The change in one line of strace; None for what changes nothing under ROOT."""
    found = _CALL.match(line)
    if not found:
        return None
    name, words = found[1], found[2]
    if name == "openat" and not re.search(r"O_CREAT|O_TRUNC", words):
        return None
    places = [match for match in _WHERE.finditer(words) if match["handle"] or match["path"]]
    if name == "symlink":
        places = places[1:]
    files = [_under(root, os.path.join(one["handle"] or "", one["path"] or "")) for one in places]
    inside = [file for file in files if file is not None]
    return (WORDS.get(name, name), tracer.steady(inside[-1])) if inside else None


def _under(root: str, path: str) -> str | None:
    return os.path.relpath(path, root) if (path + "/").startswith(root + "/") else None


# --- the process that is watched ---------------------------------------------------------------------------


class _Notes:
    """Notes each change as it begins, by what its handles are at that moment."""

    def __init__(self, root: str) -> None:
        self.root, self.changes = root, list[Change]()

    def before(self, name: str, words: tuple[Any, ...], options: dict[str, Any]) -> None:
        if name == "open" and not words[1] & (os.O_CREAT | os.O_TRUNC):
            return
        if name in HANDLES:
            self._note(name, Path(f"/proc/self/fd/{words[0]}").readlink())
        elif name in NAMES:
            two = name.startswith("rename") or name == "symlink"
            above = options.get("dir_fd")
            beside = Path(f"/proc/self/fd/{above}").readlink() if above is not None else Path.cwd()
            self._note(name, beside / words[1 if two else 0])

    def after(self, name: str, words: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Whether it succeeded is the kernel's to say."""

    def _note(self, name: str, path: Path) -> None:
        if (file := _under(self.root, str(path))) is not None:
            self.changes.append((WORDS.get(name, name), tracer.steady(file)))


def _first(root: Path) -> None:
    Layout(root).make()
    assert install.first_version(Device.load(root)).candidate


def _upgrade(root: Path) -> None:
    _try_it(root)
    slots.refund(root)
    slots.boot(root, "a boot")
    slots.commit(root)
    poll.check(Device.load(root))
    control.show(Layout(root), "a version", None)


def _way_back(root: Path) -> None:
    _try_it(root)
    slots.roll_back(root, "unhealthy")
    poll.check(Device.load(root))


def _operator(root: Path) -> None:
    slots.go_back(root)
    slots.recover(root)
    poll.check(Device.load(root))


def _try_it(root: Path) -> None:
    outcome = poll.check(Device.load(root))
    slots.begin_trial(root, outcome.candidate, BOOTS, 20)
    slots.boot(root, "a boot")


FLOWS: dict[str, Callable[[Path], None]] = {
    "first": _first,
    "upgrade": _upgrade,
    "way back": _way_back,
    "operator": _operator,
}


def _main(flow: str, root: str, notes: str) -> None:
    watcher = _Notes(root)
    with disk.watched_by(watcher):
        FLOWS[flow](Path(root))
    Path(notes).write_text(json.dumps(watcher.changes))


if __name__ == "__main__":
    _main(*sys.argv[1:])
