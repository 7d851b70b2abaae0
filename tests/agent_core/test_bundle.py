"""What a bundle may hold, and every way to trick an archive reader that other updaters fell for."""

from __future__ import annotations

import errno
import io
import json
import os
import sys
import tarfile
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_core import bundle
from agent_core.bundle import File, Index, header, host_platforms, pack, unpack, verify
from agent_core.errors import DiskError, TrustError, UsageError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

END = bytes(1024)


def file(path, content=b"", mode=0o644):
    return File(path, mode, len(content), sha256(content).hexdigest())


def index_of(*files, **fields):
    return Index("shop", "1.0.0", "any", ("{python}", "app/main.py"), tuple(files), **fields)


def member(path, content=b"", *, mode=0o644):
    return header(file(path, content, mode)) + content + bytes(-len(content) % 512)


def with_checksum(block):
    blank = block[:148] + b" " * 8 + block[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def altered(block, at, raw):
    return with_checksum(block[:at] + raw + block[at + len(raw) :])


def named(block, name):
    return altered(block, 0, name.ljust(100, b"\0"))


def of_kind(block, kind, link=b""):
    return altered(altered(block, 156, kind), 157, link.ljust(100, b"\0"))


def press(raw, **options):
    parameters = {getattr(zstd.CompressionParameter, name): value for name, value in options.items()}
    return zstd.compress(raw, options={zstd.CompressionParameter.compression_level: 3, **parameters})


@pytest.fixture
def place(tmp_path):
    """A directory with one known file; whatever an archive writes outside `into` shows up in it."""
    (tmp_path / "precious").write_bytes(b"precious")
    return tmp_path


@contextmanager
def nothing_outside(place):
    yield
    assert sorted(entry.name for entry in place.iterdir()) in (
        ["archive", "into", "precious"],
        ["archive", "precious"],
    )
    assert (place / "precious").read_bytes() == b"precious"


def refused(place, raw, index, reason="bad-archive"):
    archive = place / "archive"
    archive.write_bytes(raw)
    with nothing_outside(place):
        with pytest.raises(TrustError) as unpacked:
            unpack(archive, index, place / "into")
        with pytest.raises(TrustError) as verified:
            verify(archive, index)
    assert unpacked.value.reason == reason
    assert str(verified.value) == str(unpacked.value)
    written = {path.name for path in (place / "into").rglob("*") if not path.is_dir()}
    assert written <= {Path(entry.path).name for entry in index.files}
    assert not any(path.is_symlink() for path in (place / "into").rglob("*"))
    return unpacked.value


# --- cases 31: archives -----------------------------------------------------------------------------------

A, B = b"content of a", b"content of b"
FIRST, SECOND = member("a", A), member("b", B)
TWO = index_of(file("a", A), file("b", B))

TRICKS = {
    "an absolute path": named(FIRST[:512], b"/a") + FIRST[512:] + SECOND,
    "a path that climbs": named(FIRST[:512], b"../a") + FIRST[512:] + SECOND,
    "a path with a dot": named(FIRST[:512], b"./a") + FIRST[512:] + SECOND,
    "a path that climbs by the prefix field": altered(FIRST[:512], 345, b"..") + FIRST[512:] + SECOND,
    "a link out of the tree": of_kind(member("a"), b"2", b"/etc/passwd") + SECOND,
    "a link, then a member through it": of_kind(member("a"), b"2", b"..")
    + named(member("b", B), b"a/b")
    + SECOND,
    "a hard link": of_kind(member("a"), b"1", b"precious") + SECOND,
    "a hard link to a link": of_kind(member("l"), b"2", b"../precious")
    + of_kind(member("a"), b"1", b"l")
    + SECOND,
    "a hard link whose header has a size": of_kind(FIRST[:512], b"1", b"b") + FIRST[512:] + SECOND,
    "a character device": of_kind(member("a"), b"3") + SECOND,
    "a block device": of_kind(member("a"), b"4") + SECOND,
    "a FIFO": of_kind(member("a"), b"6") + SECOND,
    "a directory": of_kind(member("a"), b"5") + SECOND,
    "a contiguous file": of_kind(FIRST[:512], b"7") + FIRST[512:] + SECOND,
    "a file of the oldest kind": of_kind(FIRST[:512], b"\0") + FIRST[512:] + SECOND,
    "an unknown kind": of_kind(FIRST[:512], b"Z") + FIRST[512:] + SECOND,
    "a duplicate member": FIRST + FIRST + SECOND,
    "a duplicate of the last member": FIRST + SECOND + SECOND,
    "a member equal but for case": FIRST + member("A", A) + SECOND,
    "a member inside a file": FIRST + member("a/b", B) + SECOND,
    "members in another order": SECOND + FIRST,
    "a member that is missing": SECOND,
    "a member more": FIRST + SECOND + member("c", b"more"),
    "a pax header that overrides the size": of_kind(member("a", b"13 size=99999\n"), b"x") + FIRST + SECOND,
    "a pax header that overrides the path": of_kind(member("a", b"20 path=/etc/passwd\n"), b"x")
    + FIRST
    + SECOND,
    "a global pax header": of_kind(member("a", b"19 path=../precious\n"), b"g") + FIRST + SECOND,
    "a GNU long name": of_kind(member("././@LongLink".replace("./", "x"), b"../precious\0"), b"L")
    + FIRST
    + SECOND,
    "a GNU long link": of_kind(member("xx@LongLink", b"../precious\0"), b"K") + FIRST + SECOND,
    "a GNU sparse file": of_kind(FIRST[:512], b"S") + FIRST[512:] + SECOND,
    "a sparse file by pax": of_kind(member("a", b"22 GNU.sparse.major=1\n"), b"x") + FIRST + SECOND,
    "a wrong checksum": FIRST[:148] + b"000000\0 " + FIRST[156:] + SECOND,
    "a checksum with other spelling": FIRST[:148] + b" " + FIRST[149:] + SECOND,
    "a size in base 256": altered(FIRST[:512], 124, b"\x80" + bytes(10) + b"\x0c") + FIRST[512:] + SECOND,
    "a negative size": altered(FIRST[:512], 124, b"\xff" * 12) + FIRST[512:] + SECOND,
    "a smaller size": member("a", A[:5]) + SECOND,
    "a larger size": member("a", A + b"and more") + SECOND,
    "a set-user-id mode": altered(FIRST[:512], 100, b"0004755\0") + FIRST[512:] + SECOND,
    "a world-writable mode": altered(FIRST[:512], 100, b"0000666\0") + FIRST[512:] + SECOND,
    "an executable that should be none": member("a", A, mode=0o755) + SECOND,
    "an owner": altered(FIRST[:512], 108, b"0001750\0") + FIRST[512:] + SECOND,
    "a time": altered(FIRST[:512], 136, b"00000000001\0") + FIRST[512:] + SECOND,
    "no magic": altered(FIRST[:512], 257, bytes(8)) + FIRST[512:] + SECOND,
    "GNU magic": altered(FIRST[:512], 257, b"ustar  \0") + FIRST[512:] + SECOND,
    "padding that is not zero": FIRST[:-1] + b"!" + SECOND,
}


@pytest.mark.parametrize("trick", TRICKS.values(), ids=TRICKS)
def test_an_archive_with_a_trick_is_refused(place, trick):
    refused(place, press(trick + END), TWO)


def test_the_untricked_archive_is_taken(place):
    (place / "archive").write_bytes(press(FIRST + SECOND + END))
    unpack(place / "archive", TWO, place / "into")
    assert (place / "into" / "a").read_bytes() == A


TAILS = {
    "no end blocks": b"",
    "one end block": END[:512],
    "a third zero block": END + bytes(512),
    "zeros up to a record of 10240": END + bytes(10240 - 1024),
    "one byte": END + b"x",
    "members after the end": END + FIRST,
    "text instead of the end": b"x" * 1024,
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=TAILS)
def test_an_archive_that_ends_otherwise_is_refused(place, tail):
    refused(place, press(FIRST + SECOND + tail), TWO)


WHOLE = press(FIRST + SECOND + END, checksum_flag=1)
FRAMES = {
    "garbage after the frame": WHOLE + b"garbage",
    "one zero byte after the frame": WHOLE + b"\0",
    "a second frame": WHOLE + press(FIRST),
    "an empty second frame": WHOLE + press(b""),
    "a skippable frame": WHOLE + b"\x50\x2a\x4d\x18\x04\0\0\0abcd",
    "a skippable frame before": b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + WHOLE,
    "the archive in two frames": press(FIRST) + press(SECOND + END),
    "a plain tar": FIRST + SECOND + END,
    "nothing": b"",
    "an empty frame": press(b""),
    "a wrong zstd checksum": WHOLE[:-1] + bytes([WHOLE[-1] ^ 1]),
}


@pytest.mark.parametrize("raw", FRAMES.values(), ids=FRAMES)
def test_anything_but_one_whole_frame_is_refused(place, raw):
    refused(place, raw, TWO)


def test_garbage_that_begins_with_the_next_read_is_refused(place, monkeypatch):
    monkeypatch.setattr(bundle, "CHUNK", len(WHOLE))
    refused(place, WHOLE + b"x", TWO)


def test_an_archive_cut_anywhere_is_refused(place):
    archive = place / "archive"
    for length in range(len(WHOLE)):
        archive.write_bytes(WHOLE[:length])
        with pytest.raises(TrustError) as error:
            verify(archive, TWO)
        assert error.value.reason == "bad-archive", length


def test_other_content_of_the_same_length_is_a_digest_mismatch(place):
    error = refused(place, press(member("a", b"CONTENT of a") + SECOND + END), TWO, "digest-mismatch")
    assert "'a'" in error.what


def test_a_bomb_by_ratio_is_refused_before_it_unfolds(place):
    bomb = press(FIRST + SECOND + END + bytes(256 * 2**20))
    assert len(bomb) < 100_000
    (place / "archive").write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(TrustError) as error:
            verify(place / "archive", TWO)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.value.reason == "bad-archive"
    assert peak < 4 * 2**20


def test_a_bomb_inside_a_member_writes_no_more_than_the_index_says(place):
    swollen = altered(FIRST[:512], 124, b"%011o\0" % 2**30) + bytes(64 * 2**20)
    refused(place, press(swollen + END), TWO)
    assert sum(path.stat().st_size for path in (place / "into").rglob("*") if path.is_file()) <= len(A + B)


def test_a_bomb_by_count_is_refused_at_the_first_member_too_many(place):
    refused(place, press(FIRST + SECOND + member("c") * 100_000 + END), TWO)
    assert sorted(entry.name for entry in (place / "into").iterdir()) == ["a", "b"]


def test_a_bomb_by_nesting_stays_the_file_it_is(place):
    """What is inside a file is never looked at, so archives in archives unfold nothing."""
    bomb = zstd.compress(bytes(64 * 2**20))
    for _ in range(5):
        bomb = press(member("a", bomb) + END)
    (place / "archive").write_bytes(press(member("a", bomb) + END))
    unpack(place / "archive", index_of(file("a", bomb)), place / "into")
    assert [path.name for path in (place / "into").iterdir()] == ["a"]
    assert (place / "into" / "a").read_bytes() == bomb


def test_a_frame_that_asks_for_a_huge_window_is_refused(place):
    content = os.urandom(1024) * 65_536
    raw = press(member("a", content) + END, window_log=27, content_size_flag=0)
    refused(place, raw, index_of(file("a", content)))


def test_a_refusal_says_what_stood_there_and_what_should(place):
    error = refused(place, press(of_kind(member("a"), b"2", b"/etc/passwd") + SECOND + END), TWO)
    assert "'a' is not the archive's next member" in str(error)
    assert "a symbolic link 'a'" in str(error)


# --- the index --------------------------------------------------------------------------------------------

PATHS = {
    "absolute": "/etc/passwd",
    "climbing": "../precious",
    "climbing inside": "app/../../precious",
    "a dot": "./app",
    "a dot inside": "app/./main.py",
    "an empty part": "app//main.py",
    "a slash at its end": "app/",
    "empty": "",
    "a backslash": "app\\main.py",
    "a zero byte": "app/ma\0in.py",
    "a new line": "app/ma\nin.py",
    "a direction override": "app/\u202emain.py",
    "half a surrogate pair": "app/\udc80",
    "a decomposed accent": "app/e\u0301.py",
    "too deep": "/".join("d" * 33),
    "too long": "/".join(["d" * 50] * 6),
    "a name too long for its field": "a" * 101,
    "a directory too long for its field": "d" * 156 + "/a",
    "the index's own place": ".bundle.json",
    "the index's own place in capitals": ".BUNDLE.json",
    "below the index's own place": ".bundle.json/a",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_an_index_with_a_bad_path_is_refused(path):
    with pytest.raises(TrustError) as error:
        Index.from_bytes(index_of(file(path)).to_bytes())
    assert error.value.reason == "bad-index"


COLLISIONS = {
    "twice": ["a", "a"],
    "out of order": ["b", "a"],
    "equal but for case": ["A", "a"],
    "directories equal but for case": ["App/a", "app/b"],
    "equal when folded": ["STRASSE", "straße"],
    "a file inside a file": ["a", "a/b"],
    "a file inside a file, with one between": ["a", "a-b", "a/b/c"],
    "a file inside a file but for case": ["A", "a/b"],
}


@pytest.mark.parametrize("paths", COLLISIONS.values(), ids=COLLISIONS)
def test_an_index_whose_files_collide_is_refused(paths):
    with pytest.raises(TrustError) as error:
        Index.from_bytes(index_of(*map(file, paths)).to_bytes())
    assert error.value.reason == "bad-index"


GOOD = index_of(
    file("app/main.py", b"print()", 0o755),
    health=({"kind": "exec", "argv": ["{python}", "app/check.py"]}, {"kind": "process"}),
    observe_s=3,
    boots=2,
    deadman_s=30,
)

WRONG = {
    "another schema": {"schema": 2},
    "no product": {"product": None},
    "a product with a slash": {"product": "a/b"},
    "a version with a slash": {"version": "1/../2"},
    "a platform with a slash": {"platform": "linux/x"},
    "no entry": {"entry": []},
    "an empty program": {"entry": [""]},
    "an entry that is text": {"entry": "app/main.py"},
    "an entry of numbers": {"entry": [1]},
    "a check nobody knows": {"health": [{"kind": "prayer"}]},
    "a check without a kind": {"health": [{}]},
    "a check that is text": {"health": ["exec"]},
    "too many checks": {"health": [{"kind": "process"}] * 33},
    "no boots": {"boots": 0},
    "boots that are true": {"boots": True},
    "a dead-man of 0": {"deadman_s": 0},
    "a negative observation": {"observe_s": -1},
    "a launcher that is text": {"min_launcher": "1"},
    "files that are an object": {"files": {}},
    "a mode with set-user-id": {"files": [{**GOOD.files[0].to_json(), "mode": "4755"}]},
    "a mode that is a number": {"files": [{**GOOD.files[0].to_json(), "mode": 493}]},
    "a negative size": {"files": [{**GOOD.files[0].to_json(), "size": -1}]},
    "a size without end": {"files": [{**GOOD.files[0].to_json(), "size": 2**40}]},
    "a size that is a fraction": {"files": [{**GOOD.files[0].to_json(), "size": 1.5}]},
    "a digest in capitals": {"files": [{**GOOD.files[0].to_json(), "sha256": "A" * 64}]},
    "a short digest": {"files": [{**GOOD.files[0].to_json(), "sha256": "a"}]},
    "a file without a path": {"files": [{"mode": "0644", "size": 1, "sha256": "a" * 64}]},
    "files too large together": {
        "files": [{**GOOD.files[0].to_json(), "path": str(n), "size": 8 * 2**30 - 1} for n in range(3)]
    },
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_an_index_of_the_wrong_shape_is_refused(change):
    raw = json.dumps({**GOOD.to_json(), **change}).encode()
    with pytest.raises(TrustError) as error:
        Index.from_bytes(raw)
    assert error.value.reason == "bad-index"


BYTES = {
    "not JSON": b"{",
    "not text": b"\xff\xfe",
    "a list": b"[]",
    "a key twice": GOOD.to_bytes().replace(b'"boots":2', b'"boots":2,"boots":9'),
    "not a number": GOOD.to_bytes().replace(b'"observe_s":3.0', b'"observe_s":NaN'),
    "infinite": GOOD.to_bytes().replace(b'"observe_s":3.0', b'"observe_s":Infinity'),
    "nested without end": b"[" * 100_000,
    "a number without end": b"1" * 10_000,
    "too long": b" " * (16 * 2**20 + 1),
}


@pytest.mark.parametrize("raw", BYTES.values(), ids=BYTES)
def test_bytes_that_are_no_index_are_refused(raw):
    with pytest.raises(TrustError) as error:
        Index.from_bytes(raw)
    assert error.value.reason == "bad-index"


def test_too_many_files_are_refused(monkeypatch):
    monkeypatch.setattr(bundle, "MAX_FILES", 3)
    Index.from_bytes(index_of(*map(file, "abc")).to_bytes())
    with pytest.raises(TrustError):
        Index.from_bytes(index_of(*map(file, "abcd")).to_bytes())


def test_an_index_survives_its_bytes_and_they_are_canonical():
    again = Index.from_bytes(GOOD.to_bytes())
    assert again == replace(GOOD, observe_s=3.0)
    assert again.to_bytes() == GOOD.to_bytes()
    assert (
        GOOD.to_bytes()
        == json.dumps(json.loads(GOOD.to_bytes()), sort_keys=True, separators=(",", ":")).encode() + b"\n"
    )


def test_an_index_of_a_newer_end_with_one_key_more_is_read():
    assert Index.from_bytes(json.dumps({**GOOD.to_json(), "new": 1}).encode()).product == "shop"


def test_room_counts_whole_blocks_and_directories():
    index = index_of(file("a", b"x"), file("d/e/b", b"x" * 4097), file("d/empty"))
    assert index.directories == ("d", "d/e")
    assert index.unpacked == 4098
    assert index.room(4096) == 3 * 4096 + 4 * 4096


def test_a_path_of_255_bytes_uses_the_prefix_field_and_comes_back(tmp_path):
    path = "/".join(["d" * 50] * 3 + ["n" * 100])
    (tmp_path / "tree" / path).parent.mkdir(parents=True)
    (tmp_path / "tree" / path).write_bytes(b"deep")
    files = pack(tmp_path / "tree", tmp_path / "archive")
    unpack(tmp_path / "archive", index_of(*files), tmp_path / "into")
    assert (tmp_path / "into" / path).read_bytes() == b"deep"


def test_host_platforms_go_from_this_python_to_any():
    best, machine, last = host_platforms()
    assert best == f"{machine}-cp{sys.version_info[0]}{sys.version_info[1]}{sys.abiflags}"
    assert os.uname().machine.lower() in machine
    assert last == "any"


# --- packing ----------------------------------------------------------------------------------------------


def make_tree(root, contents):
    for path, (content, mode) in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
        (root / path).chmod(mode)
    return root


SAMPLE = {
    "agent.py": (b"print()\n", 0o644),
    "bin/run": (b"#!/bin/sh\n", 0o755),
    "lib/a/empty": (b"", 0o644),
    "lib/a/large": (b"0123456789" * 100_000, 0o600),
    "lib/ä.txt": ("ä".encode(), 0o644),
}


def test_packing_twice_gives_the_same_bytes_whatever_the_time_owner_and_order(tmp_path):
    one = make_tree(tmp_path / "one", SAMPLE)
    two = make_tree(tmp_path / "elsewhere" / "two", dict(reversed(SAMPLE.items())))
    os.utime(two / "agent.py", (1, 1))
    (two / "bin" / "run").chmod(0o777)
    assert pack(one, tmp_path / "1") == pack(two, tmp_path / "2")
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_other_tools_read_what_was_packed(tmp_path):
    files = pack(make_tree(tmp_path / "tree", SAMPLE), tmp_path / "archive")
    plain = zstd.decompress((tmp_path / "archive").read_bytes())
    with tarfile.open(fileobj=io.BytesIO(plain)) as archive:
        members = archive.getmembers()
        assert [(found.name, found.mode, found.size) for found in members] == [
            (file.path, file.mode, file.size) for file in files
        ]
        assert {(found.uid, found.gid, found.mtime, found.uname) for found in members} == {(0, 0, 0, "")}
        assert archive.extractfile("lib/a/large").read() == SAMPLE["lib/a/large"][0]


@pytest.mark.parametrize("make", ["link", "dangling link", "fifo", "socket"])
def test_what_is_no_file_cannot_be_packed(tmp_path, make):
    tree = make_tree(tmp_path / "tree", {"a": (b"", 0o644)})
    if make == "fifo":
        os.mkfifo(tree / "x")
    elif make == "socket":
        os.mknod(tree / "x", 0o140644)
    else:
        (tree / "x").symlink_to("a" if make == "link" else "nowhere")
    with pytest.raises(UsageError, match="x cannot be packed"):
        pack(tree, tmp_path / "archive")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize("name", ["a\nb", "a\\b", "n" * 101, "e\u0301"])
def test_a_name_that_no_bundle_holds_cannot_be_packed(tmp_path, name):
    with pytest.raises(UsageError):
        pack(make_tree(tmp_path / "tree", {name: (b"", 0o644)}), tmp_path / "archive")


def test_names_equal_but_for_case_cannot_be_packed_and_leave_no_archive(tmp_path):
    tree = make_tree(tmp_path / "tree", {"a": (b"", 0o644), "A": (b"", 0o644)})
    with pytest.raises(UsageError, match="equal but for case"):
        pack(tree, tmp_path / "archive")
    assert [entry.name for entry in tmp_path.iterdir()] == ["tree"]


# --- unpacking --------------------------------------------------------------------------------------------


def path_of(handle):
    return str(Path(f"/proc/self/fd/{handle}").readlink())


def open_handles():
    return len(list(Path("/proc/self/fd").iterdir()))


def packed(place, contents=SAMPLE):
    return place / "archive", index_of(*pack(make_tree(place / "tree", contents), place / "archive"))


def test_unpacking_returns_the_archive_s_digest(tmp_path):
    archive, index = packed(tmp_path)
    digest = sha256(archive.read_bytes()).hexdigest()
    assert unpack(archive, index, tmp_path / "into") == digest
    assert verify(archive, index) == digest


@pytest.mark.parametrize("umask", [0o000, 0o027, 0o077], ids=oct)
def test_modes_do_not_depend_on_the_umask(tmp_path, umask):
    archive, index = packed(tmp_path)
    before = os.umask(umask)
    try:
        unpack(archive, index, tmp_path / "into")
    finally:
        os.umask(before)
    modes = {
        str(path.relative_to(tmp_path / "into")): oct(path.stat().st_mode & 0o7777)
        for path in (tmp_path / "into").rglob("*")
    }
    assert modes == {
        "agent.py": "0o444",
        "bin": "0o555",
        "bin/run": "0o555",
        "lib": "0o555",
        "lib/a": "0o555",
        "lib/a/empty": "0o444",
        "lib/a/large": "0o444",
        "lib/ä.txt": "0o444",
    }
    assert (tmp_path / "into").stat().st_mode & 0o7777 == 0o755


def test_every_file_and_directory_is_fsynced_files_first_and_after_its_last_change(tmp_path, monkeypatch):
    archive, index = packed(tmp_path)
    synced, real = [], os.fsync

    def fsync(handle):
        synced.append((path_of(handle), os.fstat(handle).st_mode & 0o777))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    unpack(archive, index, tmp_path / "into")
    root = str(tmp_path / "into")
    files = [(f"{root}/{file.path}", file.mode & 0o555) for file in index.files]
    folders = [(f"{root}/{path}", 0o555) for path in reversed(index.directories)]
    assert synced == [*files, *folders, (root, 0o755)]


def test_a_directory_that_is_there_already_is_not_written_into(tmp_path):
    archive, index = packed(tmp_path)
    (tmp_path / "into").mkdir()
    with pytest.raises(DiskError) as error:
        unpack(archive, index, tmp_path / "into")
    assert error.value.reason == "disk"
    assert list((tmp_path / "into").iterdir()) == []


def test_a_link_in_the_place_of_the_directory_is_not_followed(tmp_path):
    archive, index = packed(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "into").symlink_to("elsewhere")
    with pytest.raises(DiskError):
        unpack(archive, index, tmp_path / "into")
    assert list((tmp_path / "elsewhere").iterdir()) == []


@pytest.mark.parametrize(
    ("call", "code", "reason"),
    [("write", errno.ENOSPC, "no-room"), ("write", errno.EDQUOT, "no-room"), ("fsync", errno.EIO, "disk")],
)
def test_a_disk_that_fails_is_a_disk_error_and_no_handle_leaks(tmp_path, monkeypatch, call, code, reason):
    archive, index = packed(tmp_path)
    handles = open_handles()

    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DiskError) as error:
        unpack(archive, index, tmp_path / "into")
    assert error.value.reason == reason
    assert error.value.retry
    assert open_handles() == handles


def test_a_failure_at_close_is_noticed(tmp_path, monkeypatch):
    archive, index = packed(tmp_path)
    real = os.close

    def close(handle):
        target = path_of(handle)
        real(handle)
        if target.endswith("lib/a/large"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "close", close)
    with pytest.raises(DiskError) as error:
        unpack(archive, index, tmp_path / "into")
    assert error.value.reason == "no-room"


def test_a_bundle_without_files_is_an_empty_directory(tmp_path):
    (tmp_path / "tree").mkdir()
    assert pack(tmp_path / "tree", tmp_path / "archive") == ()
    unpack(tmp_path / "archive", index_of(), tmp_path / "into")
    assert list((tmp_path / "into").iterdir()) == []


# --- properties -------------------------------------------------------------------------------------------

NAMES = st.text("abcxyz-_.09é", min_size=1, max_size=8).filter(lambda name: name.strip(".") != "")
TREES = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=4).map("/".join),
    st.tuples(st.binary(max_size=3000), st.sampled_from([0o644, 0o755])),
    min_size=1,
    max_size=8,
)


def outcome(call, *args):
    try:
        call(*args)
    except TrustError as error:
        return error.reason
    return "done"


def can_be_made(contents):
    """No path is a directory of another, and none collide."""
    return all(not other.startswith(f"{path}/") for path in contents for other in contents)


def read_back(root):
    return {
        str(path.relative_to(root)): (path.read_bytes(), 0o755 if path.stat().st_mode & 0o100 else 0o644)
        for path in root.rglob("*")
        if path.is_file()
    }


@settings(max_examples=60, deadline=None)
@given(contents=TREES.filter(can_be_made))
def test_what_is_packed_is_unpacked(tmp_path_factory, contents):
    place = tmp_path_factory.mktemp("round")
    archive, index = packed(place, contents)
    assert Index.from_bytes(index.to_bytes()) == index
    unpack(archive, index, place / "into")
    assert read_back(place / "into") == contents


@settings(max_examples=150, deadline=None)
@given(choice=st.data())
def test_a_changed_archive_never_gives_other_content_and_never_writes_outside(tmp_path_factory, choice):
    place = tmp_path_factory.mktemp("corrupt")
    content = {"a": (b"alpha" * 50, 0o644), "d/b": (bytes(range(256)), 0o755), "d/e/c": (b"", 0o644)}
    archive, index = packed(place, content)
    plain = choice.draw(st.booleans(), "inside the compression")
    raw = zstd.decompress(archive.read_bytes()) if plain else archive.read_bytes()
    at = choice.draw(st.integers(0, len(raw) - 1), "at")
    gone = choice.draw(st.integers(0, 40), "gone")
    new = choice.draw(st.binary(max_size=40), "new")
    changed = raw[:at] + new + raw[at + gone :]
    archive.write_bytes(zstd.compress(changed) if plain else changed)
    reason = outcome(unpack, archive, index, place / "into")
    assert reason in ("done", "bad-archive", "digest-mismatch")
    assert reason != "done" or read_back(place / "into") == content
    assert {entry.name for entry in place.iterdir()} <= {"archive", "tree", "into"}
    for path, (whole, _) in content.items():
        written = place / "into" / path
        assert not written.exists() or len(written.read_bytes()) <= len(whole)


@settings(max_examples=200, deadline=None)
@given(
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(GOOD.to_json())), inner)
        ),
        max_leaves=12,
    )
)
def test_no_json_whatever_escapes_the_index_s_own_error(document):
    assert outcome(Index.from_bytes, json.dumps(document).encode()) == "bad-index"


def test_an_index_that_is_read_again_is_not_parsed_again():
    raw = Index("p", "1.0", "any", ("bin/x",), ()).to_bytes()
    assert Index.from_bytes(raw) is Index.from_bytes(bytes(bytearray(raw)))
    assert Index.from_bytes(raw.replace(b'"1.0"', b'"1.1"')).version == "1.1"
