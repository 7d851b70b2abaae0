"""The launcher's one file."""

from __future__ import annotations

import io
import subprocess
import sys
import zipfile
from importlib.util import MAGIC_NUMBER

import pytest

from agent_core.archive import launcher_archive

HASH = """
import hashlib, sys
{before}
from agent_core.archive import launcher_archive
print(hashlib.sha256(launcher_archive()).hexdigest())
"""


def test_the_launcher_is_one_stored_file_that_holds_each_part_as_source_and_compiled():
    with zipfile.ZipFile(io.BytesIO(launcher_archive())) as archive:
        members = archive.infolist()
    parts = [f"agent_core/{name}.py" for name in ("__init__", "disk", "launcher", "self_test", "slots")]
    assert [member.filename for member in members] == [
        "__main__.py",
        *(name for part in parts for name in (part, f"{part}c")),
    ]
    assert {(member.compress_type, member.date_time) for member in members} == {
        (zipfile.ZIP_STORED, (1980, 1, 1, 0, 0, 0))
    }


def test_every_process_makes_the_same_bytes():
    """Else each enrolment and each upgrade would find the launcher changed."""
    made = set()
    for seed, before in (
        ("0", ""),
        ("1", "import agent_core.launcher"),
        ("random", "import updater.service"),
    ):
        argv = [sys.executable, "-c", HASH.format(before=before)]
        environ = {"PYTHONHASHSEED": seed}
        made.add(subprocess.run(argv, capture_output=True, check=True, env=environ).stdout)
    assert len(made) == 1


def answer(tmp_path, archive: bytes, *flags: str) -> str:
    file = tmp_path / "launcher.pyz"
    file.write_bytes(archive)
    argv = [sys.executable, "-I", "-S", "-B", *flags, file, "--help"]
    return subprocess.run(argv, capture_output=True, text=True, check=True).stdout


def test_it_compiles_nothing_when_it_starts(tmp_path):
    """The sources are damaged here; whoever reads one fails."""
    archive = launcher_archive()
    damaged = archive.replace(b"from __future__ import annotations", b"from __future__ import annotation)")
    assert damaged != archive
    assert "--supervise" in answer(tmp_path, damaged)


@pytest.mark.parametrize("mark", [b"\x00\x00\r\n", b"\xff\xff\r\n"], ids=["older", "newer"])
def test_another_python_takes_the_sources(tmp_path, mark):
    archive = launcher_archive()
    assert archive.count(MAGIC_NUMBER) >= 4
    assert "--supervise" in answer(tmp_path, archive.replace(MAGIC_NUMBER, mark))
