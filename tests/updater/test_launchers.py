"""The launcher's file is replaced by one that proved itself, and never by nothing or by an older one."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import zipfile

import pytest

from agent_core import disk, launcher, slots
from agent_core.archive import launcher_archive, launcher_number
from agent_core.errors import ConflictError, NotFoundError, RelfleetError
from tests.updater.commands.conftest import A, B, C, Host
from updater import launchers, poll


@pytest.fixture
def host(tmp_path, capsys):
    made = Host(tmp_path / "root", capsys)
    made.stage(A, B)
    made.on(B, A)
    return made


def variant(old: bytes, new: bytes) -> bytes:
    """This launcher with other source; what is compiled is left out, so that the source counts."""
    assert any(old in content for content in members(launcher_archive()).values())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members(launcher_archive()).items():
            if not name.endswith(".pyc"):
                archive.writestr(name, content.replace(old, new))
    return buffer.getvalue()


def members(content: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


NUMBER = b"LAUNCHER = %d\n" % launcher.LAUNCHER


def test_the_number_is_read_without_running_anything(host):
    assert launcher_number(host.layout.launcher_file) == launcher.LAUNCHER
    for content in (b"", b"PK", variant(NUMBER, b"")):
        host.layout.launcher_file.write_bytes(content)
        assert launcher_number(host.layout.launcher_file) is None
    host.layout.launcher_file.unlink()
    assert launcher_number(host.layout.launcher_file) is None


def test_an_older_launcher_is_replaced_kept_and_brought_back(host):
    old = variant(NUMBER, b"LAUNCHER = 1\n")
    host.layout.launcher_file.write_bytes(old)
    code, said = host.ask("upgrade-launcher")
    assert (code, said["before"], said["after"], said["changed"]) == (0, 1, launcher.LAUNCHER, True)
    assert host.layout.launcher_file.read_bytes() == launcher_archive()
    assert host.layout.launcher_previous.read_bytes() == old
    assert host.ask("upgrade-launcher")[1]["changed"] is False
    code, said = host.ask("upgrade-launcher", "--back")
    assert (code, said["after"]) == (0, 1)
    assert host.layout.launcher_file.read_bytes() == old
    assert host.ask("upgrade-launcher", "--back")[1]["after"] == launcher.LAUNCHER
    assert sorted(path.name for path in host.layout.launcher_file.parent.iterdir()) == [
        "launcher.prev.pyz",
        "launcher.pyz",
    ]


def test_a_launcher_that_can_do_more_is_not_lowered(host):
    newer = variant(NUMBER, b"LAUNCHER = 99\n")
    host.layout.launcher_file.write_bytes(newer)
    with pytest.raises(ConflictError) as caught:
        launchers.upgrade(host.layout)
    assert (caught.value.reason, "--back" in caught.value.then) == ("older-launcher", True)
    assert host.layout.launcher_file.read_bytes() == newer
    with pytest.raises(NotFoundError):
        launchers.go_back(host.layout)


BROKEN = {
    "does not start": (b"import argparse\n", b"import there_is_no_such_module\n"),
    "reads another record": (b'_MAGIC = b"RFSLOT1\\n"', b'_MAGIC = b"RFSLOT2\\n"'),
    "decides otherwise": (b"(record.good, record.previous)", b"(record.previous, record.good)"),
    "says nothing": (b"        return self_test.tell(asked.root)", b"        return 0"),
    "hangs": (b"    parser = argparse", b"    time.sleep(60)\n    parser = argparse"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_one_that_does_not_prove_itself_changes_nothing(host, fault, monkeypatch):
    if fault == "hangs":
        monkeypatch.setattr(launchers, "TEST_S", 0.5)
    broken = variant(*BROKEN[fault])
    monkeypatch.setattr(launchers, "launcher_archive", lambda: broken)
    old = host.layout.launcher_file.read_bytes()
    before = host.record
    with pytest.raises(RelfleetError) as caught:
        launchers.upgrade(host.layout)
    assert (caught.value.reason, host.layout.launcher_file.read_bytes()) == ("self-test", old)
    assert [path.name for path in host.layout.launcher_file.parent.iterdir()] == ["launcher.pyz"]
    assert host.record == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda host: None,
        lambda host: host.layout.slots.write_bytes(b"garbage" * 1000),
        lambda host: host.layout.slots.unlink(),
        lambda host: slots.begin_trial(host.root, C, 2, 60),
        lambda host: (host.layout.version_dir(B) / "agent.py").unlink(),
        lambda host: host.layout.current.unlink(),
    ],
    ids=["sound", "garbage slots", "no slots", "on trial", "damaged version", "no link"],
)
def test_both_come_to_the_same_decision_in_every_state_and_the_root_stays_as_it_is(host, damage):
    host.stage(C)
    damage(host)
    content = host.layout.slots.read_bytes() if host.layout.slots.exists() else None
    launchers.prove(host.layout, host.layout.launcher_file)
    assert (host.layout.slots.read_bytes() if host.layout.slots.exists() else None) == content


class Power:
    """Cut after so many operations on the launcher's directory."""

    class CutError(BaseException):
        pass

    def __init__(self, after) -> None:
        self.left = after

    def before(self, name, words, options) -> None:
        if self.left == 0:
            raise self.CutError
        self.left -= 1

    def after(self, *_) -> None:
        pass


def test_a_cut_at_any_step_leaves_one_of_the_two_launchers_whole(host, monkeypatch):
    old = variant(NUMBER, b"LAUNCHER = 1\n")
    fresh = launcher_archive()
    monkeypatch.setattr(launchers, "prove", lambda *_: None)
    host.layout.launcher_file.write_bytes(old)
    for steps in range(200):
        try:
            with disk.watched_by(Power(steps)):
                launchers.upgrade(host.layout)
        except Power.CutError:
            assert host.layout.launcher_file.read_bytes() in (old, fresh)
        else:
            break
    assert steps > 10
    assert host.layout.launcher_file.read_bytes() == fresh


def test_a_cut_at_any_step_of_the_way_back_never_loses_the_launcher_that_is_wanted(host, monkeypatch):
    old, fresh = variant(NUMBER, b"LAUNCHER = 1\n"), launcher_archive()
    monkeypatch.setattr(launchers, "prove", lambda *_: None)
    files = (host.layout.launcher_file, host.layout.launcher_previous)
    for steps in range(200):
        for file, content in zip(files, (fresh, old), strict=True):
            file.write_bytes(content)
        try:
            with disk.watched_by(Power(steps)):
                launchers.go_back(host.layout)
        except Power.CutError:
            assert old in [file.read_bytes() for file in files]
            assert files[0].read_bytes() in (old, fresh)
        else:
            break
    assert steps > 10
    assert [file.read_bytes() for file in files] == [old, fresh]


def test_the_self_test_starts_nothing_and_takes_no_lock(host):
    argv = [sys.executable, "-I", "-S", "-B", str(host.layout.launcher_file), "--root", str(host.root)]
    lock = os.open(host.layout.lock, os.O_RDWR)
    try:
        disk.flock(lock, 2)
        done = subprocess.run([*argv, "--self-test"], capture_output=True, text=True, check=True)
    finally:
        os.close(lock)
    assert f'"launcher": {launcher.LAUNCHER}' in done.stdout
    assert f'"order": ["{B}", "{A}"]' in done.stdout


def test_what_started_this_process_counts_before_the_file(host, monkeypatch):
    monkeypatch.delenv("RELFLEET_LAUNCHER", raising=False)
    host.layout.launcher_file.write_bytes(variant(NUMBER, b"LAUNCHER = 1\n"))
    assert poll._launcher(host.layout) == launchers.in_force(host.layout) == 1
    monkeypatch.setenv("RELFLEET_LAUNCHER", "7")
    assert poll._launcher(host.layout) == 7
