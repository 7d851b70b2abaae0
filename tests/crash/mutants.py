"""This module puts faults in on purpose, one at a time, and sees that the model tier catches each of them.

`python -m tests.crash.mutants [NAME…]` applies each to a copy of the tree as an exact replacement; one that fits
nowhere any more is an error. It exits with 1 when a fault escapes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

HOUSE = Path(__file__).resolve().parents[2]
COPIED = ("agent_core", "updater", "keys", "tests/crash")
BOUNDS = "model.Bounds(first=8, widths=(1,), depth=1, goes_on=False)"
TRY = f"""
import sys
from tests.crash import model
kind, name = sys.argv[1:]
told = getattr(model, kind)(model.stories()[name], {BOUNDS})
print(told.tried, *told.failures[:1])
"""


class Mutant(NamedTuple):
    """One fault: what it is, where, what stands there, what takes its place, and the story that shows it."""

    name: str
    file: str
    before: str
    after: str
    story: str
    kind: str = "explore"


SLOTS, STAGE, BUNDLE = "agent_core/slots.py", "updater/stage.py", "agent_core/bundle.py"
LINKED = """\
    disk.symlink(os.path.join("versions", version), fresh)
    disk.rename(fresh, os.path.join(root, name))


def _forget_fresh_links(root: Root) -> None:
"""
"""Making a link, and the head of what takes a stale one away: two guards, of which either is enough."""
MUTANTS = (
    Mutant("the record is not synced", SLOTS, "disk.fdatasync(handle)", "pass", "agent goes back"),
    Mutant(
        "the record is written over the newer slot", SLOTS,
        "place = 0 if seqs[0] <= seqs[1] else 1", "place = 1 if seqs[0] <= seqs[1] else 0", "agent goes back",
    ),
    Mutant(
        "a link is removed before the new one is made", SLOTS,
        "    disk.rename(fresh, os.path.join(root, name))",
        "    disk.remove(os.path.join(root, name))\n    disk.rename(fresh, os.path.join(root, name))",
        "upgrade without a previous",
    ),
    Mutant(
        "the links go before the record", SLOTS,
        "    record = Slots(root).write(record)\n    _follow(root, record)\n    return record",
        "    _follow(root, record)\n    return Slots(root).write(record)",
        "upgrade",
    ),
    Mutant(
        "a boot is not counted before exec", SLOTS,
        "        return Slots(root).write(counted)", "        return counted", "launcher goes back",
    ),
    Mutant(
        "boots are not used up", SLOTS,
        "boots_left=record.boots_left - 1", "boots_left=record.boots_left", "launcher goes back",
    ),
    Mutant(
        "refunds without end", SLOTS,
        "not record.is_up or record.refunds >= REFUNDS_MOST", "not record.is_up", "trial stopped for ever",
    ),
    Mutant(
        "an exchange without looking first", SLOTS,
        "    if link(root, CURRENT) != to:\n", "    if True:\n", "upgrade",
    ),
    Mutant(
        "the skip is not recorded", SLOTS,
        "_rested(replace(record, reason=reason, skip=skip))", "_rested(replace(record, reason=reason))",
        "agent goes back",
    ),
    Mutant(
        "the floor is forgotten by a trial", SLOTS,
        "floor=max(floor, fresh.floor)", "floor=0", "upgrade",
    ),
    Mutant(
        "the version before is not kept", SLOTS,
        'frozenset({record.good, record.previous, record.candidate} - {""})',
        'frozenset({record.good, record.candidate} - {""})',
        "upgrade",
    ),
    Mutant(
        "a failed read counts as a lost version", SLOTS,
        "    except OSError:\n        return True", "    except OSError:\n        return False",
        "clean-up", "break_disk",
    ),
    Mutant(
        "a person's choice is done unseen", SLOTS,
        "        _need_seen(root, fresh.good)\n", "        _need_complete(root, fresh.good)\n",
        "operator names a damaged version", "break_disk",
    ),
    Mutant("an unpacked tree is not synced", BUNDLE, "            _settle(root, index)\n", "", "upgrade"),
    Mutant(
        "unpacked files are not synced", BUNDLE,
        "dir_fd=root)\n        try:\n            disk.fsync(handle)\n", "dir_fd=root)\n        try:\n            pass\n",
        "upgrade",
    ),
    Mutant(
        "the index is not synced", STAGE,
        "        disk.fchmod(handle, 0o444)\n        disk.fsync(handle)", "        disk.fchmod(handle, 0o444)",
        "upgrade",
    ),
    Mutant(
        "the name of a staged version is not synced", STAGE,
        "        disk.fsync_dir(layout.staging)\n        disk.fsync_dir(layout.versions)\n", "", "upgrade",
    ),
    Mutant(
        "a link that was left beside stays for ever", SLOTS,
        "        _forget_fresh_links(root)\n    return record", "    return record", "clean-up",
    ),
    Mutant(
        "a stale temporary link is in the way", SLOTS,
        "    disk.remove(fresh)\n" + LINKED, LINKED + "    return\n", "upgrade without a previous",
    ),
    Mutant(
        "a rename over an existing version", STAGE,
        "            discard(layout, final)\n            discard(layout, fresh)\n",
        "            discard(layout, fresh)\n", "damaged version in the way", "break_disk",
    ),
    Mutant(
        "a preallocation is lost", "agent_core/layout.py",
        "disk.allocate(handle, length)", "disk.ftruncate(handle, length)", "first install",
    ),
    Mutant(
        "a version with an index is taken for whole", STAGE,
        "INDEX_NAME) == index_bytes and all(", "INDEX_NAME) == index_bytes or all(", "damaged version in the way",
    ),
    Mutant(
        "a note is not synced before it takes its name", "agent_core/layout.py",
        "            if durable:\n                disk.fsync(handle)\n", "",
        "upgrade",
    ),
    Mutant(
        "facts of versions that are gone stay", "updater/poll.py",
        "    device.forget_facts()\n", "", "agent goes back",
    ),
    Mutant(
        "a launcher takes the name before it proved itself", "updater/launchers.py",
        "MODE, earn)", "MODE)\n    earn(layout.launcher_file)", "launcher that proves nothing",
    ),
    Mutant(
        "the launcher before is not kept", "updater/launchers.py",
        "        if old is not None:\n            write", "        if False:\n            write",
        "upgrade of the launcher",
    ),
    Mutant(
        "the launcher before is written over first", "updater/launchers.py",
        "    write_durable(layout.launcher_file, kept,",
        '    write_durable(layout.launcher_previous, old or b"", MODE)\n'
        "    write_durable(layout.launcher_file, kept,",
        "launcher brought back",
    ),
    Mutant(
        "a delta is not counted before it is fetched", "updater/delta.py",
        "        tries.note(delta, before + 1)\n", "", "last try of a delta",
    ),
    Mutant(
        "a delta is not counted before it is applied", "updater/delta.py",
        "        tries.note(delta, MOST_TRIES)\n        base", "        base", "upgrade by a delta",
    ),
    Mutant(
        "a delta is not held to its index", "agent_core/delta.py",
        "            if digest.hexdigest() != file.sha256:\n", "            if False:\n", "delta of other bytes",
    ),
)  # fmt: skip


def main(names: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not names or mutant.name in names]
    escaped = [mutant.name for mutant in chosen if not _is_caught(mutant)]
    print(f"{len(chosen) - len(escaped)} of {len(chosen)} faults caught")
    return 1 if escaped or not chosen else 0


def _is_caught(mutant: Mutant) -> bool:
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as place:
        _copy(Path(place), mutant)
        words = [sys.executable, "-B", "-c", TRY, mutant.kind, mutant.story]
        done = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{mutant.name}: the tier itself broke\n{done.stderr}")
    tried, _, failure = done.stdout.strip().partition(" ")
    said = failure.partition(": ")[2] or f"NOT CAUGHT in {tried} states of {mutant.story!r}"
    print(f"{mutant.name:46} {time.monotonic() - began_s:4.0f} s  {said}", flush=True)
    return bool(failure)


def _copy(place: Path, mutant: Mutant) -> None:
    """The tree with the fault in it.

    Raises:
        SystemExit: the place for the fault is not there, or there more than once.
    """
    for name in COPIED:
        shutil.copytree(HOUSE / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    file = place / mutant.file
    text = file.read_text()
    if text.count(mutant.before) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} has its place {text.count(mutant.before)} times")
    file.write_text(text.replace(mutant.before, mutant.after))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
