from __future__ import annotations

import ast
import errno
import os
from pathlib import Path

import pytest

from agent_core import disk, slots
from agent_core.layout import Layout, write_durable, write_news
from agent_core.slots import Record, Slots

HOUSE = Path(disk.__file__).parents[1]
AROUND_THE_SEAM = {
    "agent_core/telemetry.py": "logs",
    "agent_core/workload.py": "its logs",
    "agent_core/spool.py": "a database of its own",
    "agent_core/bundle.py": "`pack` runs where releases are made",
    "agent_core/release_file.py": "it is packed where releases are made",
    "updater/launchers.py": "a copy to test a launcher on, thrown away at once",
}
CHANGES_THE_DISK = {
    "unlink", "rename", "rmdir", "mkdir", "touch", "symlink_to", "hardlink_to", "write_text", "write_bytes",
    "chmod", "lchmod",
}  # fmt: skip


class Watch:
    """Notes what happened, and lets the operation `refuse` fail."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.seen: list[tuple[str, object]] = []

    def before(self, name: str, words: tuple[object, ...], options: dict[str, object]) -> None:
        if name == self.refuse:
            raise OSError(errno.EIO, "refused")

    def after(self, name: str, words: tuple[object, ...], options: dict[str, object], result: object) -> None:
        self.seen.append((name, result))

    @property
    def names(self) -> list[str]:
        return [name for name, _ in self.seen]


def test_a_watcher_sees_every_operation_in_its_order(tmp_path):
    watch = Watch()
    with disk.watched_by(watch):
        write_durable(tmp_path / "note", b"words")
    assert watch.names == [*NEW_FILE, "write", "fchmod", "fsync", "rename", "close", *SYNC_OF_A_DIRECTORY]
    assert (tmp_path / "note").read_bytes() == b"words"


def test_a_watcher_sees_what_went_wrong(tmp_path):
    watch = Watch()
    with disk.watched_by(watch):
        disk.remove(tmp_path / "nothing")
    assert watch.names == ["unlink"]
    assert isinstance(watch.seen[0][1], FileNotFoundError)


NEW_FILE = ["open", "flock", "fstat"]
SYNC_OF_A_DIRECTORY = ["open", "fsync", "close"]


def test_news_is_replaced_in_one_step_without_waiting_for_the_disk(tmp_path):
    watch = Watch()
    with disk.watched_by(watch):
        write_news(tmp_path / "note", b"words")
    assert watch.names == [*NEW_FILE, "write", "fchmod", "rename", "close"]


def test_an_operation_that_a_watcher_refuses_does_not_happen(tmp_path):
    with disk.watched_by(Watch("mkdir")), pytest.raises(OSError, match="refused"):
        disk.mkdir(tmp_path / "directory")
    assert not (tmp_path / "directory").exists()


def test_nobody_watches_any_more_when_the_watch_is_over(tmp_path):
    watch = Watch()
    with pytest.raises(ZeroDivisionError), disk.watched_by(watch):
        raise ZeroDivisionError
    disk.mkdir(tmp_path / "directory")
    assert watch.seen == []


def test_the_record_its_links_and_its_lock_are_seen(tmp_path):
    layout = Layout(tmp_path / "root")
    layout.make()
    Slots(layout.root).write(Record(good="1.0-aaaaaaaaaaaa", previous="1.0-aaaaaaaaaaaa"))
    (layout.versions / "1.0-aaaaaaaaaaaa").mkdir()
    for part in ("agent.py", ".bundle.json"):
        (layout.versions / "1.0-aaaaaaaaaaaa" / part).touch()
    watch = Watch()
    with disk.watched_by(watch):
        slots.refuse(layout.root, "2.0-bbbbbbbbbbbb", "preflight")
        slots.recover(layout.root)
    assert {"flock", "pread", "pwrite", "fdatasync", "symlink", "rename", "readlink", "stat"} <= set(
        watch.names
    )


def test_two_names_are_exchanged_in_one_step(tmp_path):
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    disk.rename_exchange(tmp_path / "a", tmp_path / "b")
    assert [(tmp_path / name).read_text() for name in "ab"] == ["b", "a"]
    with pytest.raises(FileNotFoundError):
        disk.rename_exchange(tmp_path / "a", tmp_path / "c")


def test_what_is_missing_above_a_directory_is_made_too(tmp_path):
    disk.make_dirs(tmp_path / "a" / "b" / "c")
    disk.make_dirs(tmp_path / "a" / "b" / "c")
    assert (tmp_path / "a" / "b" / "c").is_dir()


def test_a_whole_file_is_read_however_long_it_is(tmp_path):
    content = os.urandom(disk.READ + 7)
    (tmp_path / "long").write_bytes(content)
    assert disk.read_file(tmp_path / "long") == content


@pytest.mark.parametrize("package", ["agent_core", "updater"])
def test_nothing_on_a_device_changes_the_disk_by_a_path_of_its_own(package):
    """What ruff's ban on `os` calls cannot see: the same calls as methods of a path, and `open`."""
    found = []
    for file in sorted((HOUSE / package).rglob("*.py")):
        name = str(file.relative_to(HOUSE))
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or name in AROUND_THE_SEAM:
                continue
            if isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES_THE_DISK:
                home = node.func.value
                if not (isinstance(home, ast.Name) and home.id == "disk") and name != "agent_core/disk.py":
                    found.append(f"{name}:{node.lineno} {node.func.attr}")
            if isinstance(node.func, ast.Name) and node.func.id == "open" and _writes(node):
                found.append(f"{name}:{node.lineno} open")
    assert found == []


def _writes(call: ast.Call) -> bool:
    mode = call.args[1] if len(call.args) > 1 else None
    return isinstance(mode, ast.Constant) and bool(set(str(mode.value)) & set("wax+"))
