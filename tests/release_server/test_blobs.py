from __future__ import annotations

import errno
from hashlib import sha256
from io import BytesIO

import pytest

from agent_core.errors import DiskError, MalformedError, TrustError, UsageError
from release_server.blobs import UploadConflictError, open_locked, write_file

CONTENT = bytes(range(256)) * 4000
DIGEST = sha256(CONTENT).hexdigest()


class BrokenPipe:
    """A sender that goes away after some bytes."""

    def __init__(self, content):
        self.content = BytesIO(content)

    def read(self, size):
        piece = self.content.read(size)
        if not piece:
            raise ConnectionResetError
        return piece


class FullDisk:
    def read(self, size):
        raise OSError(errno.ENOSPC, "no space left")


def test_a_blob_is_there_only_when_it_is_whole(blobs):
    assert blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT[:1000])) == 1000
    assert (blobs.length(DIGEST), blobs.upload_offset(DIGEST)) == (None, 1000)
    assert blobs.append(DIGEST, 1000, len(CONTENT), BytesIO(CONTENT[1000:])) == len(CONTENT)
    assert (blobs.length(DIGEST), blobs.upload_offset(DIGEST)) == (len(CONTENT), None)
    assert blobs.path(DIGEST).read_bytes() == CONTENT


def test_a_blob_cannot_be_written_to(blobs):
    blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT))
    assert blobs.path(DIGEST).stat().st_mode & 0o777 == 0o444


def test_an_empty_blob_is_a_blob(blobs):
    digest = sha256(b"").hexdigest()
    assert blobs.append(digest, 0, 0, BytesIO()) == 0
    assert blobs.length(digest) == 0


def test_what_arrived_before_the_sender_went_away_is_kept(blobs):
    with pytest.raises(ConnectionResetError):
        blobs.append(DIGEST, 0, len(CONTENT), BrokenPipe(CONTENT[:5000]))
    assert blobs.upload_offset(DIGEST) == 5000


@pytest.mark.parametrize("offset", [0, 999, 1001])
def test_a_piece_from_elsewhere_is_refused_and_says_where_to_go_on(blobs, offset):
    blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT[:1000]))
    with pytest.raises(UploadConflictError) as caught:
        blobs.append(DIGEST, offset, len(CONTENT), BytesIO(CONTENT[offset:]))
    assert caught.value.offset == 1000
    assert blobs.upload_offset(DIGEST) == 1000


def test_sending_a_whole_blob_again_is_refused_at_its_beginning_and_fine_at_its_end(blobs):
    blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT))
    with pytest.raises(UploadConflictError) as caught:
        blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT))
    assert caught.value.offset == len(CONTENT)
    assert blobs.append(DIGEST, len(CONTENT), len(CONTENT), BytesIO()) == len(CONTENT)


def test_bytes_that_are_not_what_their_name_says_are_dropped(blobs):
    with pytest.raises(TrustError) as caught:
        blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT[:-1] + b"!"))
    assert caught.value.reason == "digest-mismatch"
    assert (blobs.length(DIGEST), blobs.upload_offset(DIGEST)) == (None, None)


def test_a_piece_longer_than_the_rest_is_taken_back(blobs):
    blobs.append(DIGEST, 0, 100, BytesIO(CONTENT[:60]))
    with pytest.raises(UsageError):
        blobs.append(DIGEST, 60, 100, BytesIO(CONTENT[60:200]))
    assert blobs.upload_offset(DIGEST) == 60


def test_two_senders_of_one_blob_do_not_mix(blobs):
    blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT[:10]))
    with open_locked(blobs.uploads / DIGEST), pytest.raises(UploadConflictError) as caught:
        blobs.append(DIGEST, 10, len(CONTENT), BytesIO(CONTENT[10:]))
    assert caught.value.offset == 10


def test_a_full_disk_is_said_in_words(blobs):
    with pytest.raises(DiskError):
        blobs.append(DIGEST, 0, len(CONTENT), FullDisk())


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", DIGEST.upper(), DIGEST + "0", "a" * 63 + "/"])
def test_only_a_sha256_names_a_blob(blobs, name):
    with pytest.raises(MalformedError):
        blobs.path(name)


def test_a_link_appears_whole_and_shares_the_bytes(blobs, tmp_path):
    blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT))
    place = tmp_path / "targets" / "deep" / "name"
    blobs.link(DIGEST, place)
    blobs.link(DIGEST, place)
    assert place.stat().st_ino == blobs.path(DIGEST).stat().st_ino
    assert [entry.name for entry in place.parent.iterdir()] == ["name"]


def test_without_hard_links_the_bytes_are_copied(blobs, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr("os.link", refuse)
    blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT))
    blobs.link(DIGEST, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == CONTENT


def test_a_file_is_replaced_whole_with_the_mode_asked_for(tmp_path):
    place = tmp_path / "file"
    write_file(place, b"old")
    write_file(place, b"new", mode=0o600)
    assert place.read_bytes() == b"new"
    assert place.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
