"""Release files: what is written comes out again, and nothing that was written otherwise is taken."""

from __future__ import annotations

import io
import os
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_core import release_file
from agent_core.errors import NotFoundError, TrustError
from agent_core.release_file import TARGETS, TITLE, Member, Title

DIGEST = "ab" * 32
ARCHIVE = f"targets/bundles/probe/1.0.0/{DIGEST}.any.tar.zst"
INDEX = f"targets/bundles/probe/1.0.0/{DIGEST}.any.index.json"
MEMBERS = {
    "metadata/1.root.json": b"{}",
    TARGETS: b'{"targets": 1}',
    INDEX: b"i" * 512,
    ARCHIVE: b"archive" * 1000,
}
TITLED = Title("probe", "1.0.0", ("any",))


def made(path, members=MEMBERS):
    release_file.write(path, TITLED, [Member.of(name, content) for name, content in members.items()])
    return path


def refusal(content, tmp_path) -> str:
    file = tmp_path / "tricky"
    file.write_bytes(content)
    with pytest.raises(TrustError) as caught, release_file.opened(file):
        pass
    assert caught.value.reason == "bad-archive"
    return caught.value.why


def test_what_was_written_is_read_again(tmp_path):
    with release_file.opened(made(tmp_path / "r")) as opened:
        assert opened.title == TITLED
        assert {name: b"".join(opened.pieces(name)) for name in MEMBERS} == MEMBERS
        assert opened.names == (TITLE, *MEMBERS)
        assert (opened.read("metadata/2.root.json", 10), opened.length("nothing")) == (None, None)


def test_the_same_release_gives_the_same_bytes_and_any_tar_lists_them(tmp_path):
    one, other = made(tmp_path / "one"), made(tmp_path / "other")
    assert one.read_bytes() == other.read_bytes()
    with tarfile.open(one) as tar:
        assert tar.getnames() == [TITLE, *MEMBERS]


def test_a_file_that_is_not_what_was_signed_is_not_written(tmp_path):
    (tmp_path / "archive").write_bytes(b"other")
    member = Member(ARCHIVE, tmp_path / "archive", 5, DIGEST)
    with pytest.raises(TrustError) as caught:
        release_file.write(tmp_path / "r", TITLED, [member])
    assert caught.value.reason == "digest-mismatch"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["archive"]


def test_a_member_longer_than_asked_for_is_refused(tmp_path):
    with release_file.opened(made(tmp_path / "r")) as opened, pytest.raises(TrustError) as caught:
        opened.read(ARCHIVE, 100)
    assert caught.value.reason == "length-mismatch"


def test_there_is_no_such_file(tmp_path):
    with pytest.raises(NotFoundError), release_file.opened(tmp_path / "nothing"):
        pass


@pytest.mark.parametrize("kind", ["directory", "fifo", "device"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "odd"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(TrustError) as caught, release_file.opened(path):
        pass
    assert "no regular file" in caught.value.why


# --- the tricks of archives (case 31) --------------------------------------------------------------------


def tar(*extra, form=tarfile.USTAR_FORMAT):
    """A tar by Python's own writer, with the good members first."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as out:
        for name, content in ((TITLE, TITLED.to_bytes()), *MEMBERS.items(), *extra):
            entry = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.size = len(content)
            out.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def entry(kind, name="metadata/2.root.json", **more):
    made = tarfile.TarInfo(name)
    made.type = kind
    for key, value in more.items():
        setattr(made, key, value)
    return made


TRICKS = {
    "absolute": ("/etc/passwd", b"x"),
    "dots": ("metadata/../../etc/passwd", b"x"),
    "empty part": ("metadata//2.root.json", b"x"),
    "unknown name": ("metadata/timestamp.json", b"x"),
    "another case": ("Metadata/2.root.json", b"x"),
    "root 0": ("metadata/0.root.json", b"x"),
    "twice": (TARGETS, b"x"),
    "inside a file": (TARGETS + "/x", b"x"),
    "hard link": (entry(tarfile.LNKTYPE, linkname=TARGETS), b""),
    "symbolic link": (entry(tarfile.SYMTYPE, linkname="/etc/passwd"), b""),
    "character device": (entry(tarfile.CHRTYPE), b""),
    "block device": (entry(tarfile.BLKTYPE), b""),
    "fifo": (entry(tarfile.FIFOTYPE), b""),
    "directory": (entry(tarfile.DIRTYPE), b""),
    "sparse": (entry(tarfile.GNUTYPE_SPARSE), b""),
    "size override": (entry(tarfile.XHDTYPE, "pax"), b"20 size=9999999999\n"),
    "long name": (entry(tarfile.GNUTYPE_LONGNAME, "././@LongLink"), b"a" * 300),
    "other mode": (entry(tarfile.REGTYPE, mode=0o4755), b"x"),
    "other owner": (entry(tarfile.REGTYPE, uid=1000), b"x"),
    "too long": ("metadata/2.root.json", b"x" * (256 * 1024 + 1)),
}


@pytest.mark.parametrize("trick", TRICKS)
def test_every_trick_of_archives_is_refused(tmp_path, trick):
    assert refusal(tar(TRICKS[trick]), tmp_path)


def writer_bytes(tmp_path):
    return made(tmp_path / "good").read_bytes()


def test_too_many_members_are_refused(tmp_path):
    many = [(f"metadata/{number}.root.json", b"") for number in range(2, 300)]
    file = made(tmp_path / "many", MEMBERS | dict(many))
    assert "more than" in refusal(file.read_bytes(), tmp_path)


def test_bytes_after_the_end_a_missing_end_and_another_first_member_are_refused(tmp_path):
    good = writer_bytes(tmp_path)
    assert "after its end" in refusal(good + b"\0" * 512, tmp_path)
    assert "after its end" in refusal(good + b"x", tmp_path)
    assert refusal(good[:-1024], tmp_path)
    assert refusal(good[:-512], tmp_path)
    assert "first member" in refusal(made(tmp_path / "r").read_bytes()[1024:], tmp_path)
    assert refusal(b"", tmp_path)


def test_a_length_beyond_the_end_of_the_file_is_refused(tmp_path):
    good = bytearray(writer_bytes(tmp_path))
    assert "in the middle" in refusal(bytes(good[:-2048]) + bytes(1024), tmp_path)


def test_bytes_hidden_in_the_padding_are_refused(tmp_path):
    good = bytearray(writer_bytes(tmp_path))
    good[1023] = 1  # the last byte of the title's block
    assert "not zero" in refusal(bytes(good), tmp_path)


@given(st.binary(max_size=3000))
def test_garbage_is_refused_and_nothing_else_is_raised(tmp_path_factory, content):
    assert refusal(content, tmp_path_factory.getbasetemp())


@given(st.data())
def test_one_changed_byte_of_structure_never_reads_as_other_content(tmp_path_factory, data):
    """A flipped bit is refused, or is in the content of a member, whose digest the signed metadata hold."""
    base = tmp_path_factory.getbasetemp()
    good = bytearray(writer_bytes(base))
    place = data.draw(st.integers(0, len(good) - 1))
    good[place] ^= 1 << data.draw(st.integers(0, 7))
    (base / "flipped").write_bytes(good)
    try:
        with release_file.opened(base / "flipped") as opened:
            read = {name: b"".join(opened.pieces(name)) for name in opened.names}
    except TrustError:
        return
    assert list(read) == [TITLE, *MEMBERS]
    different = [
        name for name, content in read.items() if content != ({TITLE: TITLED.to_bytes()} | MEMBERS)[name]
    ]
    assert len(different) == 1
