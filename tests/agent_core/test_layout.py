"""Where everything lies on a device, and that writing there survives a power cut."""

from __future__ import annotations

import errno
import os
import signal
import stat
import subprocess
import sys
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest

from agent_core import layout, slots
from agent_core.archive import launcher_archive
from agent_core.errors import DiskError, MalformedError
from agent_core.layout import Layout, read_json, write_durable, write_json, write_launcher
from agent_core.slots import Record, Slots

if TYPE_CHECKING:
    from pathlib import Path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def device(tmp_path: Path) -> Layout:
    device = Layout(tmp_path / "deep" / "device")
    device.make()
    return device


def test_a_layout_names_each_thing_once_below_its_root_and_touches_nothing(tmp_path):
    device = Layout(str(tmp_path / "device"))
    names = [name for name, kind in vars(Layout).items() if isinstance(kind, property)]
    assert len({getattr(device, name) for name in names}) == len(names)
    assert all(getattr(device, name).is_relative_to(device.root) for name in names)
    assert device.version_dir("1.0-aaaaaaaaaaaa") == device.versions / "1.0-aaaaaaaaaaaa"
    assert not device.root.exists()


def test_make_makes_every_directory_and_doing_it_again_changes_nothing(device):
    Slots(device.root).write(Record(good="1.0-aaaaaaaaaaaa"))
    device.lock.write_text("kept")
    before = {path: path.stat().st_mtime_ns for path in device.root.rglob("*")}
    device.make()
    assert {path: path.stat().st_mtime_ns for path in device.root.rglob("*")} == before
    assert slots.read(device.root) == Record(seq=1, good="1.0-aaaaaaaaaaaa")


def test_what_is_no_file_in_the_place_of_the_lock_is_put_aside(device):
    device.lock.unlink()
    (device.lock / "inside").mkdir(parents=True)
    device.make()
    assert (device.lock.is_file(), len(list(device.root.glob("lock.damaged-*/inside")))) == (True, 1)


@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777], ids=oct)
def test_modes_do_not_depend_on_the_umask(tmp_path, umask):
    device = Layout(tmp_path / "device")
    before = os.umask(umask)
    try:
        device.make()
        write_durable(device.key, b"seed", 0o600)
        write_durable(device.hold, b"", 0o644)
    finally:
        os.umask(before)
    for private in (device.state, device.tuf, device.staging, device.trash, device.download):
        assert mode(private) == 0o700
    for public in (
        device.root,
        device.versions,
        device.logs,
        device.launcher_file.parent,
        device.settings_dir,
    ):
        assert mode(public) == 0o755
    assert (mode(device.launcher_file), mode(device.key), mode(device.hold)) == (0o755, 0o600, 0o644)
    assert (mode(device.slots), mode(device.lock), mode(device.ballast)) == (0o600, 0o600, 0o600)


def test_room_for_the_record_and_the_ballast_is_taken_at_once(device):
    assert device.slots.stat().st_size == 8192
    assert device.ballast.stat().st_size == layout.BALLAST_LENGTH
    for path in (device.slots, device.ballast):
        assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_a_short_slots_file_is_made_whole_without_losing_its_record(device):
    Slots(device.root).write(Record(good="1.0-aaaaaaaaaaaa"))
    os.truncate(device.slots, 4096)
    device.make()
    assert device.slots.stat().st_size == 8192
    assert slots.read(device.root).good == "1.0-aaaaaaaaaaaa"


def refuse(code: int):
    def call(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


def test_a_disk_without_room_for_the_ballast_stops_nothing_and_the_ballast_comes_back(device):
    device.ballast.unlink()
    with patch.object(os, "posix_fallocate", refuse(errno.ENOSPC)):
        device.make()
    assert not device.ballast.exists()
    device.make()
    assert device.ballast.stat().st_size == layout.BALLAST_LENGTH


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.ENOSPC, "no-room"), (errno.EDQUOT, "no-room"), (errno.EIO, "disk")]
)
def test_a_disk_that_fails_is_named_with_its_reason(device, code, reason):
    with patch.object(os, "fsync", refuse(code)), pytest.raises(DiskError) as failure:
        write_durable(device.poll, b"new")
    assert (failure.value.reason, failure.value.retry) == (reason, True)
    assert "poll.json" in str(failure.value)


def test_a_root_that_cannot_be_made_is_a_disk_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DiskError):
        Layout(tmp_path / "file" / "device").make()


# Durable writes


def test_what_killed_writers_left_is_cleared_away_and_what_is_being_written_is_not(device):
    """The number of a process that lives is in the name of the first: numbers are given again."""
    left = [device.state / f".poll.json.{os.getpid()}.new", device.root / ".hold.0123abcd.new"]
    kept = [device.state / "poll.json", device.slots]
    for file in (*left, *kept):
        file.touch()
    with layout._fresh_beside(device.hold) as (being_written, _):
        layout.clear_left_overs(device)
        assert being_written.exists()
    assert [file.exists() for file in left] == [False, False]
    assert all(file.exists() for file in kept)


def test_a_writer_that_is_killed_leaves_what_the_next_clean_up_takes_away(device):
    script = (
        "import os, signal, sys; from pathlib import Path; from agent_core import disk, layout;"
        "disk.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL);"
        "layout.write_durable(Path(sys.argv[1]), b'half')"
    )
    done = subprocess.run([sys.executable, "-c", script, device.hold], check=False)
    left = list(device.root.glob(".hold.*.new"))
    assert (done.returncode, len(left)) == (-signal.SIGKILL, 1)
    layout.clear_left_overs(device)
    assert not left[0].exists()


def test_a_clean_up_between_a_new_file_and_its_lock_costs_the_writer_nothing(device):
    """The file is taken for a left-over; its writer notices, and writes another."""
    flock, cleared = layout.disk.flock, []

    def late(handle: int, how: int) -> None:
        if not cleared:
            cleared.append(handle)
            layout.clear_left_overs(device)
        flock(handle, how)

    with patch.object(layout.disk, "flock", late):
        write_durable(device.hold, b"held")
    assert cleared
    assert device.hold.read_bytes() == b"held"
    assert list(device.root.glob(".hold.*")) == []


@pytest.mark.parametrize("call", ["fsync", "fchmod"])
def test_a_write_that_fails_leaves_the_old_file_and_no_litter(device, call):
    write_durable(device.poll, b"old")
    with patch.object(os, call, refuse(errno.ENOSPC)), pytest.raises(DiskError):
        write_durable(device.poll, b"new")
    assert device.poll.read_bytes() == b"old"
    assert sorted(path.name for path in device.state.iterdir()) == ["poll.json", "slots", "tuf"]


def test_a_file_is_on_the_disk_before_its_name_and_the_name_before_the_end(device):
    """Files empty after an update that reported success: the rename overtook the bytes."""
    order: list[str] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor: int) -> None:
        place = os.fstat(descriptor)
        order.append("directory" if stat.S_ISDIR(place.st_mode) else f"{place.st_size} bytes")
        fsync(descriptor)

    def watched_rename(source: str, target: str) -> None:
        order.append("rename")
        rename(source, target)

    with patch.multiple(os, fsync=watched_fsync, rename=watched_rename):
        write_durable(device.poll, b"12345")
    assert order == ["5 bytes", "rename", "directory"]


def test_json_is_read_as_it_was_written(device):
    write_json(device.poll, {"b": [1, None], "a": "é"})
    assert read_json(device.poll) == {"a": "é", "b": [1, None]}
    assert device.poll.read_text().index('"a"') < device.poll.read_text().index('"b"')
    write_json(device.identity, {}, 0o600)
    assert mode(device.identity) == 0o600


def test_json_that_is_missing_is_the_default_and_garbage_is_malformed(device):
    assert read_json(device.poll) is None
    assert read_json(device.poll, {}) == {}
    for garbage in (b"", b"{", b"\xff\xfe", b"garbage", b"[" * 100_000, b"9" * 6000):
        write_durable(device.poll, garbage)
        with pytest.raises(MalformedError, match=r"poll\.json"):
            read_json(device.poll)
    with pytest.raises(DiskError):
        read_json(device.state)


# The launcher's file


def test_the_launcher_runs_isolated_and_without_site(device):
    words = [sys.executable, "-I", "-S", "-B", device.launcher_file, "--help"]
    answer = subprocess.run(words, capture_output=True, text=True, check=True)
    assert "--supervise" in answer.stdout


def test_make_leaves_an_installed_launcher_alone_and_write_launcher_replaces_it(device):
    """A version on trial must not replace the program that would roll it back."""
    device.launcher_file.write_bytes(b"an older launcher")
    device.make()
    assert device.launcher_file.read_bytes() == b"an older launcher"
    assert write_launcher(device) == device.launcher_file
    assert device.launcher_file.read_bytes() == launcher_archive()
    before = device.launcher_file.stat().st_ino
    write_launcher(device)
    assert device.launcher_file.stat().st_ino == before
