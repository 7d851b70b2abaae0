"""From a downloaded bundle to a complete version directory, its preflight, and clearing up afterwards."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace

import pytest

from agent_core import bundle, disk, slots
from agent_core.bundle import INDEX_NAME, Index, pack
from agent_core.errors import DiskError, RelfleetError, TrustError
from agent_core.layout import Layout
from agent_core.processes import TRIES
from agent_core.slots import Record
from agent_core.wire import Reason, ReleaseFacts
from updater import stage

PREFLIGHT = 'import json\nprint(json.dumps({"version": "1.1.0", "product": "shop", "ok": True}))\n'


class Downloaded:
    """A bundle as it lies on a device after the download, with the facts that the release keys signed."""

    def __init__(self, place, contents=None, **fields):
        tree = place / "tree"
        for path, content in {"agent.py": PREFLIGHT, "app/main.py": "", **(contents or {})}.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(content)
        self.archive = place / "bundle"
        said = {"product": "shop", "version": "1.1.0", "platform": "any", **fields}
        index = Index(entry=("{python}", "app/main.py"), files=pack(tree, self.archive), **said)
        self.index_bytes = index.to_bytes()
        self.sha256 = sha256(self.archive.read_bytes()).hexdigest()
        self.facts = ReleaseFacts(
            product="shop",
            version="1.1.0",
            seq=7,
            platform="any",
            index_sha256=sha256(self.index_bytes).hexdigest(),
            index_length=len(self.index_bytes),
            unpacked=index.unpacked,
            files=len(index.files),
        )
        self.name = f"1.1.0-{self.facts.index_sha256[:12]}"

    def stage(self, layout, **options):
        return stage.stage(layout, self.archive, self.index_bytes, self.facts, self.sha256, **options)


@pytest.fixture
def layout(tmp_path):
    made = Layout(tmp_path / "root")
    made.make()
    return made


@pytest.fixture
def downloaded(tmp_path):
    (tmp_path / "download").mkdir()
    return Downloaded(tmp_path / "download")


def names(directory):
    return sorted(entry.name for entry in directory.iterdir())


def outcome(call, *args):
    try:
        call(*args)
    except RelfleetError as error:
        return error.reason
    return "done"


def plant(layout, name, where="versions"):
    """A version that was staged earlier."""
    directory = layout.root / where / name
    (directory / "app").mkdir(parents=True)
    for path in ("agent.py", INDEX_NAME, "app/main.py"):
        (directory / path).write_text("x")
        (directory / path).chmod(0o444)
    (directory / "app").chmod(0o555)
    directory.chmod(0o555)
    return directory


# --- staging ----------------------------------------------------------------------------------------------


def test_a_staged_version_is_complete_read_only_and_leaves_nothing_else(layout, downloaded):
    name = downloaded.stage(layout)
    directory = layout.versions / name
    assert name == downloaded.name
    assert slots.is_complete(layout.root, name)
    assert (directory / INDEX_NAME).read_bytes() == downloaded.index_bytes
    modes = {
        str(path.relative_to(directory)): oct(path.stat().st_mode & 0o777) for path in directory.rglob("*")
    }
    assert modes == {INDEX_NAME: "0o444", "agent.py": "0o444", "app": "0o555", "app/main.py": "0o444"}
    assert directory.stat().st_mode & 0o777 == 0o555
    assert names(layout.staging) == names(layout.trash) == []


def test_a_program_can_be_run_as_soon_as_it_is_staged(layout, tmp_path):
    """A handle that still writes it, here or in a child, would make the kernel say "text file busy"."""
    place, program = tmp_path / "download", Path(shutil.which("true")).read_bytes()
    (place / "tree" / "app").mkdir(parents=True)
    (place / "tree" / "app" / "run").write_bytes(program)
    (place / "tree" / "app" / "run").chmod(0o755)
    name = Downloaded(place).stage(layout)
    assert subprocess.run([layout.versions / name / "app" / "run"], check=False).returncode == 0


def test_staging_again_does_nothing(layout, downloaded):
    downloaded.stage(layout)
    before = (layout.versions / downloaded.name).stat().st_ino
    downloaded.archive.unlink()
    assert downloaded.stage(layout) == downloaded.name
    assert (layout.versions / downloaded.name).stat().st_ino == before


def test_staging_again_makes_durable_what_a_kill_after_the_rename_left_open(layout, downloaded, monkeypatch):
    downloaded.stage(layout)
    directory = layout.versions / downloaded.name
    directory.chmod(0o755)
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append(str(Path(f"/proc/self/fd/{handle}").readlink()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    downloaded.stage(layout)
    assert synced == [str(directory), str(layout.staging), str(layout.versions)]
    assert directory.stat().st_mode & 0o777 == 0o555


def test_everything_is_on_the_disk_before_the_name_appears(layout, downloaded, monkeypatch):
    synced, real = [], os.fsync

    def fsync(handle):
        path = Path(f"/proc/self/fd/{handle}").readlink()
        synced.append((path.name, (layout.versions / downloaded.name).exists()))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    downloaded.stage(layout)
    before = [name for name, is_there in synced if not is_there]
    assert before == ["agent.py", "main.py", "app", downloaded.name, INDEX_NAME, downloaded.name]
    assert [name for name, is_there in synced if is_there] == [downloaded.name, "staging", "versions"]


@pytest.mark.parametrize("call", ["fsync", "fchmod", "mkdir", "write"])
def test_a_stop_at_any_step_leaves_either_nothing_or_the_whole_version(layout, downloaded, monkeypatch, call):
    real = getattr(os, call)
    step = 0
    while True:
        step += 1
        left = [step]

        def stop(*args, left=left, **options):
            left[0] -= 1
            if left[0] == 0:
                raise OSError(errno.EIO, "power")
            return real(*args, **options)

        monkeypatch.setattr(os, call, stop)
        reason = outcome(downloaded.stage, layout)
        assert reason == ("disk" if left[0] <= 0 else "done")
        monkeypatch.undo()
        for name in names(layout.versions):
            directory = layout.versions / name
            found = [path for path in directory.rglob("*") if path.is_file()]
            assert len(found) == 3, f"{call} {step}"
            assert (directory / INDEX_NAME).read_bytes() == downloaded.index_bytes
        if left[0] > 0:
            break
        assert downloaded.stage(layout) == downloaded.name
        stage.discard(layout, layout.versions / downloaded.name)
    assert step > 1


def test_an_older_leftover_in_staging_is_replaced(layout, downloaded):
    (layout.staging / downloaded.name / "app").mkdir(parents=True)
    (layout.staging / downloaded.name / "app" / "stale.py").write_text("stale")
    downloaded.stage(layout)
    assert not (layout.versions / downloaded.name / "app" / "stale.py").exists()
    assert names(layout.staging) == names(layout.trash) == []


def test_a_half_written_version_is_not_taken_for_complete(layout, downloaded):
    directory = plant(layout, downloaded.name)
    directory.chmod(0o755)
    (directory / INDEX_NAME).unlink()
    downloaded.stage(layout)
    assert (directory / "agent.py").read_text() == PREFLIGHT


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
def test_a_version_that_was_damaged_after_staging_is_staged_anew(layout, downloaded, damage):
    """Case 3: its index stands there, so it was taken for staged at every poll, and never started."""
    downloaded.stage(layout)
    file = layout.versions / downloaded.name / "agent.py"
    file.parent.chmod(0o755)
    file.chmod(0o644)
    if damage == "missing":
        file.unlink()
    else:
        file.write_text("" if damage == "shorter" else PREFLIGHT.replace("0", "1"))
    downloaded.stage(layout)
    assert file.read_text() == PREFLIGHT
    assert file.stat().st_mode & 0o777 == 0o444


def test_a_damaged_version_that_runs_is_left_alone(layout, downloaded):
    directory = plant(layout, downloaded.name)
    handle = stage.hold(directory)
    try:
        with pytest.raises(DiskError, match="in use"):
            downloaded.stage(layout)
    finally:
        os.close(handle)
    assert (directory / "agent.py").read_text() == "x"


def test_an_index_with_another_digest_is_refused(layout, downloaded):
    for changed in (downloaded.index_bytes + b" ", downloaded.index_bytes[:-1] + b" "):
        with pytest.raises(TrustError) as error:
            stage.stage(layout, downloaded.archive, changed, downloaded.facts, downloaded.sha256)
        assert error.value.reason == "digest-mismatch"
    assert names(layout.versions) == []


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"product": "other"}, Reason.WRONG_PRODUCT),
        ({"platform": "linux-riscv"}, Reason.WRONG_PLATFORM),
        ({"version": "1.2.0"}, Reason.BAD_INDEX),
        ({"min_launcher": 2}, Reason.BAD_INDEX),
    ],
    ids=str,
)
def test_an_index_that_says_other_than_its_release_is_refused(layout, tmp_path, fields, reason):
    (tmp_path / "download").mkdir()
    with pytest.raises(TrustError) as error:
        Downloaded(tmp_path / "download", **fields).stage(layout)
    assert error.value.reason == reason


@pytest.mark.parametrize("fact", ["unpacked", "files"])
def test_an_index_of_another_size_than_signed_is_refused(layout, downloaded, fact):
    downloaded.facts = replace(downloaded.facts, **{fact: 1})
    with pytest.raises(TrustError) as error:
        downloaded.stage(layout)
    assert error.value.reason == "bad-index"


def test_an_archive_with_another_digest_is_refused_and_leaves_nothing(layout, downloaded):
    downloaded.sha256 = "f" * 64
    with pytest.raises(TrustError) as error:
        downloaded.stage(layout)
    assert error.value.reason == "digest-mismatch"
    assert names(layout.versions) == names(layout.staging) == names(layout.trash) == []


def test_a_broken_archive_is_refused_and_leaves_nothing(layout, downloaded):
    downloaded.archive.write_bytes(downloaded.archive.read_bytes()[:-8])
    with pytest.raises(TrustError) as error:
        downloaded.stage(layout)
    assert error.value.reason == "bad-archive"
    assert names(layout.versions) == names(layout.staging) == names(layout.trash) == []


def test_no_room_is_said_before_anything_is_written_with_what_is_missing(layout, downloaded):
    with pytest.raises(DiskError) as error:
        downloaded.stage(layout, reserve=2**60)
    assert error.value.reason == "no-room"
    assert "are missing" in error.value.why
    assert names(layout.staging) == []


@pytest.mark.parametrize(
    ("blocks", "nodes", "reason"),
    [(106, 106, "done"), (105, 106, "no-room"), (106, 105, "no-room"), (106, 0, "no-room")],
)
def test_room_is_counted_in_blocks_and_files_of_this_file_system(
    layout, tmp_path, monkeypatch, blocks, nodes, reason
):
    (tmp_path / "many").mkdir()
    contents = {f"app/{number}": "x" for number in range(100)}
    many = Downloaded(tmp_path / "many", {"agent.py": PREFLIGHT, "app/main.py": "x", **contents})
    free = SimpleNamespace(f_frsize=8192, f_bavail=blocks - 1, f_files=1000, f_favail=nodes - 1)
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    assert outcome(lambda: many.stage(layout, reserve=0)) == reason


def test_a_file_system_that_does_not_count_files_has_room_for_them(layout, downloaded, monkeypatch):
    free = SimpleNamespace(f_frsize=4096, f_bavail=10**6, f_files=0, f_favail=0)
    monkeypatch.setattr(os, "statvfs", lambda _: free)
    downloaded.stage(layout)


def test_a_rename_never_replaces_what_is_there(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError):
        disk.rename_new(tmp_path / "a", tmp_path / "b")
    disk.rename_new(tmp_path / "a", tmp_path / "c")
    assert names(tmp_path) == ["b", "c"]


def test_a_file_system_without_that_rename_is_asked_first(tmp_path, monkeypatch):
    class Libc:
        @staticmethod
        def renameat2(*_):
            disk.ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(disk.ctypes, "CDLL", lambda *_, **__: Libc)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with pytest.raises(FileExistsError):
        disk.rename_new(tmp_path / "a", tmp_path / "b")
    disk.rename_new(tmp_path / "a", tmp_path / "c")
    assert names(tmp_path) == ["b", "c"]


WITHOUT_PRIVILEGES = """
import ctypes, os, sys
from pathlib import Path
place = Path(sys.argv[1])
sys.path[:0] = sys.argv[2:]
from test_stage import Downloaded, names
from agent_core.layout import Layout
from agent_core.slots import Record
from updater import stage
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
layout = Layout(place / "root")
layout.make()
(place / "download").mkdir()
found = Downloaded(place / "download", {"a/b/c": "deep"})
name = found.stage(layout)
other = layout.versions / "0.9.0-000000000000"
stage.unpack(found.archive, stage.believe(found.index_bytes, found.facts), other)
stage._seal(other)
assert stage.collect(layout, Record(good=name, previous=name)) == ("0.9.0-000000000000",)
assert names(layout.versions) == [name]
stage.discard(layout, layout.versions / name)
assert names(layout.versions) == names(layout.trash) == []
print("done")
"""


def test_a_user_without_privileges_stages_and_collects_its_own_versions():
    """A read-only directory cannot be renamed or emptied, not even by its owner."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o777)
        paths = [place, str(Path(bundle.__file__).parents[1]), str(Path(__file__).parent)]
        argv = [sys.executable, "-B", "-c", WITHOUT_PRIVILEGES, *paths]
        done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/")
    assert (done.stdout, done.returncode) == ("done\n", 0), done.stderr


# --- preflight --------------------------------------------------------------------------------------------


def preflight(layout, tmp_path, program, **options):
    (tmp_path / "download").mkdir()
    found = Downloaded(tmp_path / "download", {"agent.py": program})
    return stage.preflight(layout, found.stage(layout), found.facts, **options)


def test_preflight_runs_the_version_where_it_will_stay_with_the_root(layout, tmp_path):
    words = "repr([__file__, *sys.argv[1:], sys.flags.isolated])"
    program = f"import sys\nopen({str(tmp_path / 'argv')!r}, 'w').write({words})\n"
    assert preflight(layout, tmp_path, program + PREFLIGHT) == stage.Preflight(ok=True)
    agent = next(layout.versions.iterdir()) / "agent.py"
    expected = [str(agent), "preflight", "--root", str(layout.root), 1]
    assert (tmp_path / "argv").read_text() == repr(expected)


ANSWERS = {
    "another version": ({"version": "1.0.0", "product": "shop", "ok": True}, Reason.PREFLIGHT_VERSION),
    "another product": ({"version": "1.1.0", "product": "other", "ok": True}, Reason.PREFLIGHT_VERSION),
    "not ok": ({"version": "1.1.0", "product": "shop", "ok": False, "detail": "no"}, Reason.PREFLIGHT),
    "ok that is no truth value": ({"version": "1.1.0", "product": "shop", "ok": 1}, Reason.PREFLIGHT),
    "no version": ({"product": "shop", "ok": True}, Reason.PREFLIGHT),
    "a list": ([], Reason.PREFLIGHT),
}


@pytest.mark.parametrize(("answer", "reason"), ANSWERS.values(), ids=ANSWERS)
def test_preflight_judges_what_the_version_says(layout, tmp_path, answer, reason):
    found = preflight(layout, tmp_path, f"print({json.dumps(json.dumps(answer))})\n")
    assert (found.ok, found.reason) == (False, reason)
    assert found.detail


PROGRAMS = {
    "an exit code": (PREFLIGHT + "raise SystemExit(3)", "exit 3"),
    "an import that fails": ("import nothing_like_this", "nothing_like_this"),
    "a signal": ("import os\nos.abort()", "exit -6"),
    "no answer": ("", "cannot be read"),
    "words": ("print('fine')", "cannot be read"),
    "bytes": ("import sys\nsys.stdout.buffer.write(bytes(range(256)))", "cannot be read"),
}


@pytest.mark.parametrize(("program", "detail"), PROGRAMS.values(), ids=PROGRAMS)
def test_a_preflight_that_fails_says_how(layout, tmp_path, program, detail):
    found = preflight(layout, tmp_path, program)
    assert (found.ok, found.reason) == (False, Reason.PREFLIGHT)
    assert detail in found.detail


def killed_until(times, file):
    """A program that is killed as if for want of memory, so many times."""
    return f"""
import os, pathlib, signal
file = pathlib.Path({str(file)!r})
tried = len(file.read_text()) if file.exists() else 0
file.write_text("x" * (tried + 1))
if tried < {times}:
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_preflight_that_somebody_killed_is_tried_again(layout, tmp_path):
    program = killed_until(TRIES - 1, tmp_path / "tried") + PREFLIGHT
    assert preflight(layout, tmp_path, program) == stage.Preflight(ok=True)


def test_a_preflight_that_is_always_killed_is_a_refusal(layout, tmp_path):
    found = preflight(layout, tmp_path, killed_until(99, tmp_path / "tried") + PREFLIGHT)
    assert (found.ok, found.reason) == (False, Reason.PREFLIGHT)
    assert "exit -9" in found.detail
    assert len((tmp_path / "tried").read_text()) == TRIES


def test_a_version_without_an_agent_is_a_refusal(layout, tmp_path, downloaded):
    found = stage.preflight(layout, "9.9.9-aaaaaaaaaaaa", downloaded.facts)
    assert (found.ok, found.reason) == (False, Reason.PREFLIGHT)


def test_an_interpreter_that_does_not_run_here_is_a_refusal(layout, tmp_path):
    (tmp_path / "download").mkdir()
    found = Downloaded(tmp_path / "download", {"python/bin/python3": "no program"})
    answer = stage.preflight(layout, found.stage(layout), found.facts)
    assert (answer.ok, answer.reason) == (False, Reason.PREFLIGHT)
    assert "could not be started" in answer.detail


def test_a_preflight_without_end_is_killed_with_all_it_started(layout, tmp_path):
    program = f"""
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pids")!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
while True:
    print("x" * 1000)
"""
    begun = time.monotonic()
    found = preflight(layout, tmp_path, program, limit_s=1.5)
    assert (found.ok, found.reason) == (False, Reason.PREFLIGHT)
    assert "not done after 1.5 s" in found.detail
    assert time.monotonic() - begun < 10
    assert_gone((tmp_path / "pids").read_text().split())


def test_a_child_that_keeps_the_pipes_open_does_not_hold_a_preflight_up(layout, tmp_path):
    program = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(tmp_path / "pids")!r}, "w").write(str(child.pid))
"""
    begun = time.monotonic()
    assert preflight(layout, tmp_path, program + PREFLIGHT, limit_s=30).ok
    assert time.monotonic() - begun < 10
    assert_gone((tmp_path / "pids").read_text().split())


def assert_gone(pids):
    for pid in pids:
        deadline = time.monotonic() + 5
        while is_alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not is_alive(pid)


def is_alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# --- clearing up ------------------------------------------------------------------------------------------

A, B, C, D = (f"1.{number}.0-{str(number) * 12}" for number in range(4))


def test_only_what_nothing_needs_is_collected(layout):
    for name in (A, B, C, D):
        plant(layout, name)
    record = Record(good=A, previous=B, candidate=C)
    assert stage.collect(layout, record) == (D,)
    assert names(layout.versions) == [A, B, C]


def planted_in_turn(layout, *versions):
    """Versions whose age is their order, the first the oldest."""
    for age, name in enumerate(versions):
        os.utime(plant(layout, name), (age, age))


E, F = "1.4.0-444444444444", "1.5.0-555555555555"


def test_the_newest_of_the_others_are_kept_up_to_a_count(layout):
    planted_in_turn(layout, F, A, B, D, C, E)
    record = Record(good=A, previous=B)
    assert stage.collect(layout, record, stage.Retention(count=4)) == (D, F)
    assert names(layout.versions) == [A, B, C, E]
    assert stage.collect(layout, record, stage.Retention(count=2)) == (C, E)


def test_the_newest_of_the_others_are_kept_up_to_a_number_of_bytes_on_the_disk(layout):
    planted_in_turn(layout, A, B, C, D, E)
    (layout.versions / D / "app").chmod(0o755)
    (layout.versions / D / "app" / "large").write_bytes(b"x" * 1_000_000)
    one = du(layout.versions / A)
    record = Record(good=A, previous=B)
    room = stage.Retention(count=9, total=3 * one)
    assert stage.collect(layout, record, room) == (C, D)
    assert stage.collect(layout, record, stage.Retention(count=9, total=1)) == (E,)
    assert names(layout.versions) == [A, B]


def du(directory):
    done = subprocess.run(["du", "-s", "-B1", directory], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[0])


def test_what_is_needed_is_kept_whatever_the_retention_says(layout):
    planted_in_turn(layout, A, B, C, D)
    tight = stage.Retention(count=1, total=1)
    assert stage.collect(layout, Record(good=A, previous=B, candidate=C), tight) == (D,)


def test_a_version_that_failed_here_or_is_not_whole_is_not_kept_without_need(layout):
    planted_in_turn(layout, A, B, C, D)
    (layout.versions / D).chmod(0o755)
    (layout.versions / D / "agent.py").unlink()
    record = Record(good=A, previous=A, skip=((slots.digest_of(C), "unhealthy", 0),))
    assert stage.collect(layout, record, stage.Retention(count=9)) == (C, D)


def test_what_the_links_show_is_kept_whatever_the_record_says(layout):
    for name in (A, B, C):
        plant(layout, name)
    layout.current.symlink_to(f"versions/{B}")
    layout.previous.symlink_to(f"versions/{C}")
    assert stage.collect(layout, Record(good=A, previous=A)) == ()


def test_a_version_that_a_process_holds_is_kept_until_it_ends(layout):
    for name in (A, B):
        plant(layout, name)
    script = (
        "import sys; from pathlib import Path; from updater.stage import hold;"
        "hold(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    )
    argv = [sys.executable, "-c", script, str(layout.versions / B)]
    repository = Path(bundle.__file__).parents[1]
    with subprocess.Popen(argv, cwd=repository, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        assert stage.collect(layout, Record(good=A, previous=A)) == ()
        holder.stdin.close()
        holder.wait()
        assert stage.collect(layout, Record(good=A, previous=A)) == (B,)


@pytest.mark.parametrize(
    "record", [None, Record(), Record(good=D, previous=B)], ids=["none", "empty", "good is gone"]
)
def test_without_a_good_version_no_version_is_touched(layout, record):
    for name in (A, B):
        plant(layout, name)
    plant(layout, C, "staging")
    assert stage.collect(layout, record) == ()
    assert names(layout.versions) == [A, B]
    assert names(layout.staging) == []


def test_staging_and_trash_are_emptied(layout):
    plant(layout, A)
    plant(layout, B, "staging")
    plant(layout, C, "trash")
    (layout.staging / "file").write_text("x")
    (layout.trash / "file").write_text("x")
    stage.collect(layout, Record(good=A, previous=A))
    assert names(layout.staging) == names(layout.trash) == []


def test_links_are_removed_and_never_followed(layout, tmp_path):
    precious = tmp_path / "precious"
    (precious / "inside").mkdir(parents=True)
    (precious / "inside" / "file").write_text("precious")
    plant(layout, A)
    inner = plant(layout, B)
    inner.chmod(0o755)
    (inner / "out").symlink_to(precious)
    (inner / "file").symlink_to(precious / "inside" / "file")
    (layout.versions / "link").symlink_to(precious)
    (layout.versions / "dangling").symlink_to("nowhere")
    (layout.staging / "link").symlink_to(precious)
    (layout.trash / "link").symlink_to(precious)
    (layout.trash / "dangling").symlink_to("nowhere")
    stage.collect(layout, Record(good=A, previous=A))
    assert names(layout.versions) == [A]
    assert names(layout.staging) == names(layout.trash) == []
    assert (precious / "inside" / "file").read_text() == "precious"


def test_what_cannot_be_deleted_does_not_keep_the_rest(layout, monkeypatch, caplog):
    for name in (A, B, C):
        plant(layout, name)
    real = os.rmdir

    def rmdir(path, **options):
        if str(path).startswith(B):
            raise OSError(errno.EBUSY, "busy")
        real(path, **options)

    monkeypatch.setattr(os, "rmdir", rmdir)
    assert stage.collect(layout, Record(good=A, previous=A)) == (C,)
    assert names(layout.versions) == [A]
    assert "could not be deleted" in caplog.text
    monkeypatch.undo()
    stage.collect(layout, Record(good=A, previous=A))
    assert names(layout.trash) == []
