from __future__ import annotations

import errno
import json
import os

import pytest

from agent_core.errors import ConflictError, TrustError
from release_server.signing import log as log_of
from release_server.signing.log import open_log, verify


@pytest.fixture
def written(tmp_path):
    """A log of three entries, closed."""
    log = open_log(tmp_path)
    for version in (1, 2, 3):
        log.append({"op": "sign", "role": "timestamp", "version": version, "remember": True})
    log.close()
    return tmp_path


def lines(directory):
    return (directory / "000001.jsonl").read_bytes().splitlines(keepends=True)


def test_each_line_holds_the_hash_of_the_one_before(written):
    assert verify(written) == 3
    assert [json.loads(line)["seq"] for line in lines(written)] == [1, 2, 3]


@pytest.mark.parametrize("harm", ["change", "remove", "swap", "add"])
def test_a_log_that_was_changed_is_not_written_on(written, harm):
    held = lines(written)
    changed = {
        "change": [held[0].replace(b'"version":1', b'"version":7'), *held[1:]],
        "remove": [held[0], held[2]],
        "swap": [held[1], held[0], held[2]],
        "add": [*held, held[2]],
    }[harm]
    (written / "000001.jsonl").write_bytes(b"".join(changed))
    for look in (verify, open_log):
        with pytest.raises(TrustError) as caught:
            look(written)
        assert caught.value.reason == "log-broken"


def test_a_line_that_a_kill_cut_off_counts_for_nothing(written):
    whole = b"".join(lines(written))
    for cut in range(len(whole) - len(lines(written)[2]), len(whole)):
        (written / "000001.jsonl").write_bytes(whole[:cut])
        log = open_log(written)
        assert log.newest["timestamp"]["version"] == 2
        log.append({"op": "sign", "role": "timestamp", "version": 3, "remember": True})
        log.close()
        assert verify(written) == 3


def test_a_segment_that_is_full_is_followed_by_one_that_can_be_read_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(log_of, "SEGMENT", 300)
    log = open_log(tmp_path)
    log.append({"op": "sign", "role": "cohorts", "version": 1, "remember": True})
    for version in range(1, 9):
        log.append({"op": "sign", "role": "timestamp", "version": version, "remember": True})
    log.close()
    segments = sorted(tmp_path.glob("*.jsonl"))
    assert len(segments) > 2
    verify(tmp_path)
    segments[0].unlink()
    found = open_log(tmp_path).newest
    assert {role: entry["version"] for role, entry in found.items()} == {"cohorts": 1, "timestamp": 8}
    with pytest.raises(TrustError):
        verify(tmp_path)


def test_a_kill_between_a_new_segment_and_its_first_line_forgets_nothing(written):
    (written / "000002.jsonl").touch()
    assert open_log(written).newest["timestamp"]["version"] == 3


def test_what_could_not_be_written_leaves_the_log_as_it_was(written, monkeypatch):
    log = open_log(written)
    write = os.write

    def full(descriptor, body):
        write(descriptor, body[:10])
        raise OSError(errno.ENOSPC, "no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        with pytest.raises(OSError, match="no space"):
            log.append({"op": "sign"})
    log.append({"op": "sign"})
    log.close()
    assert verify(written) == 4


def test_two_signers_never_write_one_log(written):
    open_log(written)
    with pytest.raises(ConflictError):
        open_log(written)
