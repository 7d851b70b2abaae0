"""The record, the two links, and every way to be cut short between them."""

from __future__ import annotations

import ast
import errno
import fcntl
import hashlib
import json
import os
import stat
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_core import disk, slots
from agent_core.slots import IDLE, ROLLBACK, TRIAL, IllegalTransitionError, Record, Slots

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

P, A, B = "0.9.0-000000000000", "1.0.0-aaaaaaaaaaaa", "1.1.0-bbbbbbbbbbbb"
RESTING = Record(good=A, previous=P, floor=4)
ON_TRIAL = replace(RESTING, phase=TRIAL, candidate=B, boots_left=2, boots_max=3, deadman_s=60, tried=B)
GOING_BACK = replace(ON_TRIAL, phase=ROLLBACK, reason="unhealthy")


def stage(root: Path, *names: str) -> None:
    for name in names:
        (root / "versions" / name).mkdir(parents=True)
        (root / "versions" / name / "agent.py").write_text(f"# {name}\n")
        (root / "versions" / name / ".bundle.json").write_text("{}")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A device that runs A, ran P before, and has B staged."""
    stage(tmp_path, P, A, B)
    (tmp_path / "state").mkdir()
    slots.install_first(tmp_path, P)
    slots.begin_trial(tmp_path, A, boots=3, deadman_s=60)
    slots.commit(tmp_path, A)
    return tmp_path


def put(root: Path, record: Record) -> Record:
    """Bring the device to a record with links that follow it."""
    Slots(root).write(record)
    if record.phase == ROLLBACK:
        slots.switch(root, record.candidate, record.good)
        return slots.read(root)
    return slots.recover(root)


def links(root: Path) -> tuple[str, str]:
    return slots.link(root, "current"), slots.link(root, "previous")


def plain(record: Record | None) -> Record | None:
    """A record without its number, to compare what it says."""
    return record and replace(record, seq=0)


# The pure table


@pytest.mark.parametrize(
    ("record", "step", "after"),
    [
        pytest.param(
            RESTING,
            lambda record: slots.armed(record, B, 3, 60, 7),
            {
                "phase": TRIAL,
                "candidate": B,
                "boots_left": 3,
                "boots_max": 3,
                "deadman_s": 60,
                "retry_epoch": 7,
            },
            id="staged, no veto: trial with all its boots",
        ),
        pytest.param(
            ON_TRIAL,
            lambda record: slots.booted(record, "boot"),
            {"phase": TRIAL, "boots_left": 1, "boot_id": "boot", "is_up": True},
            id="the launcher starts the candidate: one boot less",
        ),
        pytest.param(
            replace(ON_TRIAL, is_up=True),
            slots.refunded,
            {"phase": TRIAL, "boots_left": 3, "is_up": False, "refunds": 1},
            id="clean TERM: the boot is given back",
        ),
        pytest.param(
            replace(ON_TRIAL, is_up=True, boot_id="yesterday"),
            lambda record: slots.rebooted(record, "today"),
            {"phase": TRIAL, "boots_left": 3, "is_up": False, "reboots": 1, "refunds": 0},
            id="the host went down with the candidate: the boot is given back",
        ),
        pytest.param(
            ON_TRIAL,
            slots.committed,
            {"phase": IDLE, "good": B, "previous": A, "candidate": "", "reason": "observed", "boots_left": 0},
            id="observed healthy: the candidate is good, the old good is previous",
        ),
        pytest.param(
            ON_TRIAL,
            lambda record: slots.rolling_back(record, "unhealthy"),
            {"phase": ROLLBACK, "good": A, "candidate": B, "reason": "unhealthy"},
            id="unhealthy: the reason is recorded before anything moves",
        ),
        pytest.param(
            GOING_BACK,
            slots.rolled_back,
            {"phase": IDLE, "good": A, "previous": P, "candidate": "", "tried": B, "reason": "unhealthy"},
            id="rolled back: the good version never changed",
        ),
        pytest.param(
            RESTING,
            lambda record: slots.gone_back(record, 2),
            {"phase": IDLE, "good": P, "previous": A, "skip": (("aaaaaaaaaaaa", "operator", 2),), "tried": A},
            id="operator: the previous version is good, the one left is skipped",
        ),
    ],
)
def test_each_row_of_the_table_changes_what_it_says_and_keeps_the_floor(record, step, after):
    changed = step(record)
    assert {key: getattr(changed, key) for key in after} == after
    assert changed.floor == record.floor


STEPS = {
    "armed": lambda record: slots.armed(record, B, 3, 60),
    "booted": lambda record: slots.booted(record, "boot"),
    "refunded": slots.refunded,
    "committed": slots.committed,
    "rolling_back": lambda record: slots.rolling_back(record, "unhealthy"),
    "rolled_back": slots.rolled_back,
    "gone_back": slots.gone_back,
    "refused": lambda record: slots.refused(record, B, "preflight"),
}
LEGAL = {
    IDLE: {"armed", "gone_back", "refused"},
    TRIAL: {"booted", "refunded", "committed", "rolling_back"},
    ROLLBACK: {"rolled_back"},
}


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("record", [RESTING, ON_TRIAL, GOING_BACK], ids=lambda record: record.phase)
def test_a_step_is_legal_in_its_own_phase_only_and_is_refused_with_a_reason_elsewhere(record, step):
    if step in LEGAL[record.phase]:
        STEPS[step](record)
        return
    with pytest.raises(IllegalTransitionError) as refusal:
        STEPS[step](record)
    assert refusal.value.reason in {"in-trial", "not-on-trial", "not-rolling-back"}


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda: slots.armed(RESTING, A, 3, 60), "up-to-date"),
        (lambda: slots.armed(RESTING, B, 0, 60), "bad-settings"),
        (lambda: slots.armed(RESTING, B, 3, 0), "bad-settings"),
        (lambda: slots.armed(RESTING, "../etc", 3, 60), "malformed"),
        (lambda: slots.armed(RESTING, "a/b-bbbbbbbbbbbb", 3, 60), "malformed"),
        (lambda: slots.armed(RESTING, "1" * 200, 3, 60), "malformed"),
        (lambda: slots.armed(Record(), B, 3, 60), "no-record"),
        (
            lambda: slots.armed(replace(RESTING, skip=(("bbbbbbbbbbbb", "unhealthy", 0),)), B, 3, 60),
            "skipped",
        ),
        (lambda: slots.booted(replace(ON_TRIAL, boots_left=0), "boot"), "boots-used-up"),
        (lambda: slots.gone_back(replace(RESTING, previous=A)), "not-found"),
        (lambda: slots.gone_back(replace(RESTING, skip=(("000000000000", "operator", 0),))), "skipped"),
        (lambda: slots.first(RESTING, B), "conflict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_refused_step_names_its_reason(step, reason):
    with pytest.raises(IllegalTransitionError) as refusal:
        step()
    assert refusal.value.reason == reason


def test_a_boot_is_given_back_once_however_often_the_agent_says_it_stopped():
    up = slots.booted(ON_TRIAL, "boot")
    once = slots.refunded(up)
    assert (once.boots_left, slots.refunded(once)) == (2, once)


MANY = 100
"""What has no end is to fail a test, not to keep it."""


def test_boots_given_back_come_to_an_end_so_that_a_stopped_candidate_is_not_tried_for_ever():
    record, boots = slots.armed(RESTING, B, 3, 60), 0
    while record.boots_left and boots < MANY:
        record = slots.refunded(slots.booted(record, "boot"))
        boots += 1
    assert boots == 3 + slots.REFUNDS_MOST


@pytest.mark.parametrize(
    ("record", "boot_id"),
    [
        pytest.param(replace(ON_TRIAL, is_up=True, boot_id="today"), "today", id="the same boot of the host"),
        pytest.param(replace(ON_TRIAL, boot_id="yesterday"), "today", id="not up: given back already"),
        pytest.param(replace(ON_TRIAL, is_up=True), "today", id="never started"),
        pytest.param(replace(ON_TRIAL, is_up=True, boot_id="yesterday"), "", id="a host that does not say"),
        pytest.param(replace(RESTING, is_up=True, boot_id="yesterday"), "today", id="idle"),
        pytest.param(replace(GOING_BACK, is_up=True, boot_id="yesterday"), "today", id="going back"),
    ],
)
def test_only_a_host_that_went_down_under_a_trial_gives_its_boot_back(record, boot_id):
    assert slots.rebooted(record, boot_id) == record


def test_a_version_that_takes_its_host_down_is_not_tried_for_ever():
    record, boots = slots.armed(RESTING, B, 3, 60), 0
    while (record := slots.rebooted(record, f"boot {boots}")).boots_left and boots < MANY:
        record = slots.booted(record, f"boot {boots}")
        boots += 1
    assert boots == 3 + slots.REBOOTS_MOST
    assert slots.REBOOTS_MOST > 3


def test_a_host_that_goes_down_before_its_boot_is_given_back_gives_it_back_once(root):
    slots.begin_trial(root, B, 3, 60)
    slots.boot(root, "yesterday")
    assert slots.recover(root).boots_left == 3
    assert slots.recover(root).boots_left == 3
    assert slots.boot(root, slots.host_boot_id()).boots_left == 2
    assert slots.recover(root).boots_left == 2


def test_a_record_from_before_the_reboots_were_counted_is_read_as_having_none(root):
    old = slots._encoded(replace(ON_TRIAL, seq=1))
    length = slots._HEAD.unpack_from(old)[1]
    body = json.loads(old[slots._HEAD.size : slots._HEAD.size + length])
    del body["reboots"]
    payload = json.dumps(body).encode()
    head = slots._HEAD.pack(slots._MAGIC, len(payload), hashlib.sha256(payload).digest())
    assert slots._decoded((head + payload).ljust(slots.SLOT_LENGTH, b"\0")) == replace(ON_TRIAL, seq=1)


def test_a_skipped_bundle_comes_again_only_when_the_retry_epoch_grows():
    record = slots.rolled_back(replace(GOING_BACK, retry_epoch=5))
    assert [slots.skips(record, "b" * 64, epoch) for epoch in (0, 5, 6)] == [True, True, False]
    assert not slots.skips(record, "a" * 64, 5)
    again = slots.armed(record, B, 3, 60, 6)
    assert slots.skips(again, "b" * 12, 5), "the skip stays until the trial has succeeded"
    assert slots.committed(again).skip == ()


def test_the_skip_list_forgets_its_oldest_entry_and_an_operator_can_empty_it():
    record = RESTING
    for number in range(slots.SKIPS_MOST + 5):
        trial = slots.armed(record, f"2.0.{number}-{number:012x}", 3, 60)
        record = slots.rolled_back(slots.rolling_back(trial, "unhealthy"))
    assert len(record.skip) == slots.SKIPS_MOST
    assert (record.skip[0][0], record.skip[-1][0]) == (f"{5:012x}", f"{slots.SKIPS_MOST + 4:012x}")
    assert len(slots.unskipped(record, f"{7:012x}").skip) == slots.SKIPS_MOST - 1
    assert slots.unskipped(record).skip == ()


def test_versions_that_the_record_names_are_kept_from_collection():
    assert slots.kept(ON_TRIAL) == {P, A, B}
    assert slots.kept(Record()) == frozenset()


# The slots


def test_the_newest_of_two_records_counts_and_writing_never_touches_it(tmp_path):
    (tmp_path / "state").mkdir()
    held = Slots(tmp_path)
    assert held.read() is None
    for seq in range(1, 6):
        before = (tmp_path / "state/slots").read_bytes() if seq > 1 else b""
        assert held.write(replace(RESTING, floor=seq)).seq == seq
        assert (held.read().seq, held.read().floor) == (seq, seq)
        after = (tmp_path / "state/slots").read_bytes()
        newest = (seq % 2) * slots.SLOT_LENGTH
        if seq > 2:
            assert after[newest : newest + 4096] == before[newest : newest + 4096]


names = st.from_regex(r"[0-9][A-Za-z0-9.+_-]{0,63}-[0-9a-f]{12}", fullmatch=True)
records = st.builds(
    Record,
    seq=st.integers(0, 2**53),
    phase=st.sampled_from([IDLE, TRIAL, ROLLBACK]),
    good=names,
    previous=names,
    candidate=names,
    boots_left=st.integers(0, 100),
    boots_max=st.integers(0, 100),
    deadman_s=st.integers(0, 10**6),
    retry_epoch=st.integers(0, 2**31),
    boot_id=st.text("0123456789abcdef-", max_size=64),
    is_up=st.booleans(),
    refunds=st.integers(0, 16),
    reboots=st.integers(0, 8),
    tried=names,
    reason=st.from_regex(r"[a-z-]{0,64}", fullmatch=True),
    skip=st.lists(
        st.tuples(
            st.text("0123456789abcdef", min_size=12, max_size=12), st.just("x" * 64), st.integers(0, 2**31)
        ),
        max_size=slots.SKIPS_MOST,
    ).map(tuple),
    floor=st.integers(0, 2**53),
)


@settings(max_examples=40)
@given(records)
def test_what_is_written_is_read_again_and_the_fullest_record_fits(record):
    block = slots._encoded(record)
    assert block is not None
    assert len(block) == slots.SLOT_LENGTH
    assert slots._decoded(block) == record


@settings(max_examples=40)
@given(records, st.data())
def test_one_flipped_bit_makes_a_slot_invalid(record, data):
    block = bytearray(slots._encoded(record))
    used = slots._HEAD.size + int.from_bytes(block[8:12], "big")
    place = data.draw(st.integers(0, used * 8 - 1))
    block[place // 8] ^= 1 << place % 8
    assert slots._decoded(bytes(block)) is None


def test_a_record_that_does_not_fit_drops_old_skips_first_and_is_refused_when_that_is_not_enough(root):
    long = tuple((f"{number:012x}", "r" * 150, 0) for number in range(slots.SKIPS_MOST))
    written = Slots(root).write(replace(RESTING, skip=long))
    assert 0 < len(written.skip) < slots.SKIPS_MOST
    assert written.skip == long[-len(written.skip) :]
    with pytest.raises(IllegalTransitionError) as refusal:
        Slots(root).write(replace(RESTING, reason="r" * 5000))
    assert refusal.value.reason == "malformed"
    assert slots.read(root) == written


def sealed(body: bytes) -> bytes:
    """A slot with a checksum that fits whatever it holds."""
    return slots._HEAD.pack(slots._MAGIC, len(body), hashlib.sha256(body).digest()) + body


GARBAGE = {
    "zeros": bytes(4096),
    "ones": b"\xff" * 4096,
    "text": b"garbage " * 512,
    "no object": sealed(b"[1, 2]"),
    "no JSON": sealed(b"{"),
    "not UTF-8": sealed(b"\xff\xfe"),
    "wrong type": sealed(b'{"good": 7}'),
    "a number for a flag": sealed(b'{"is_up": 1}'),
    "unknown phase": sealed(b'{"phase": "dancing"}'),
    "bad skip": sealed(b'{"skip": [["x"]]}'),
    "length past the end": slots._HEAD.pack(slots._MAGIC, 2**31, bytes(32)),
}


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_garbage_in_the_newer_slot_leaves_the_older_record(root, garbage):
    older = slots.read(root)
    newer = Slots(root).write(replace(older, floor=9))
    with (root / "state/slots").open("r+b") as stream:
        stream.seek(((newer.seq + 1) % 2) * slots.SLOT_LENGTH)
        stream.write(garbage.ljust(4096, b"\0"))
    assert slots.read(root) == older
    assert slots.recover(root) == older
    assert slots.raise_floor(root, 11).floor == 11, "and it can be written again"


@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_both_slots_garbage_trust_the_current_link(root, garbage):
    (root / "state/slots").write_bytes(garbage.ljust(4096, b"\0") * 2)
    assert slots.read(root) is None
    assert plain(slots.recover(root)) == Record(good=A, previous=P, tried=A, reason="disk")
    assert slots.read(root).seq == 1


NO_FILES = {
    "directory": lambda path: (path / "inside").mkdir(parents=True),
    "pipe": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "a link in a circle": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nowhere/at-all"),
}


@pytest.mark.parametrize("put", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_in_the_place_of_the_slots_is_kept_beside_and_the_links_are_trusted(root, put):
    (root / "state/slots").unlink()
    put(root / "state/slots")
    before = (root / "state/slots").lstat().st_ino
    assert slots.read(root) is None
    assert plain(slots.recover(root)) == Record(good=A, previous=P, tried=A, reason="disk")
    assert (root / "state/slots").is_file()
    assert slots.raise_floor(root, 11) == slots.read(root)
    assert before in [path.lstat().st_ino for path in (root / "state").glob("slots.damaged-*")]


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 8191])
def test_a_slots_file_cut_short_never_stops_the_device(root, length):
    os.truncate(root / "state/slots", length)
    record = slots.recover(root)
    assert record.good == A
    assert slots.raise_floor(root, 11).floor == 11


@pytest.mark.parametrize("put", NO_FILES.values(), ids=NO_FILES)
def test_what_is_no_file_in_the_place_of_the_lock_keeps_nobody_from_holding_the_root(root, put):
    put(root / "lock")
    held, other = slots.open_lock(root), slots.open_lock(root)
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(held)
    os.close(other)


class SomebodyElse:
    """Comes to the lock right after somebody could not open what lies there, and holds it."""

    def __init__(self, root):
        self.root, self.held = root, None

    def before(self, *_):
        pass

    def after(self, name, words, _options, result):
        if self.held is None and name == "open" and isinstance(result, OSError):
            self.held = -1
            self.held = slots.open_lock(self.root)
            fcntl.flock(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_of_two_that_find_no_file_in_the_place_of_the_lock_one_holds_the_root(root):
    (root / "lock").mkdir()
    somebody = SomebodyElse(root)
    with disk.watched_by(somebody):
        handle = slots.open_lock(root)
    with pytest.raises(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(handle)
    os.close(somebody.held)


def test_a_removed_state_directory_is_made_again(root):
    (root / "state/slots").unlink()
    (root / "state").rmdir()
    assert slots.recover(root).good == A
    assert slots.read(root).good == A


def test_both_slots_garbage_and_current_damaged_trust_the_previous_link(root):
    (root / "state/slots").write_bytes(b"x" * 8192)
    (root / "versions" / A / "agent.py").unlink()
    assert plain(slots.recover(root)) == Record(good=P, previous=P, tried=P, reason="disk")
    assert links(root) == (P, P)


def test_both_slots_garbage_and_nothing_whole_is_nothing_installed(root):
    (root / "state/slots").write_bytes(b"x" * 8192)
    for name in (P, A):
        (root / "versions" / name / ".bundle.json").unlink()
    assert slots.recover(root) is None
    with pytest.raises(IllegalTransitionError) as refusal:
        slots.begin_trial(root, B, boots=3, deadman_s=60)
    assert refusal.value.reason == "no-record"


def test_a_record_by_a_newer_writer_is_read_without_what_is_not_known(root):
    body = {"schema": 2, "seq": 9, "good": A, "previous": P, "shoe_size": 43}
    (root / "state/slots").write_bytes(sealed(json.dumps(body).encode()))
    assert slots.read(root) == Record(seq=9, good=A, previous=P)


# The links


def test_links_are_relative_so_that_a_root_may_be_moved(root):
    assert (root / "current").readlink() == Path("versions") / A


@pytest.mark.parametrize("works", [True, False], ids=["exchange", "no exchange"])
def test_a_switch_ends_where_it_should_from_any_links(root, works):
    with patch.object(disk, "rename_exchange", disk.rename_exchange if works else lacking):
        for current in (P, A, B, None):
            for previous in (P, A, B, None):
                for name, version in (("current", current), ("previous", previous)):
                    (root / name).unlink(missing_ok=True)
                    if version:
                        (root / name).symlink_to(f"versions/{version}")
                slots.switch(root, B, A)
                assert links(root) == (B, A)
                slots.switch(root, B, A)
                assert links(root) == (B, A), "an exchange done twice would undo itself"


def lacking(one: str, other: str) -> None:
    raise OSError(errno.ENOSYS, "no renameat2 here")


def test_a_switch_without_a_second_version_keeps_the_old_one_as_previous(root):
    slots.switch(root, B)
    assert links(root) == (B, A)


def test_a_directory_in_the_place_of_a_link_stops_no_transition(root):
    (root / "current").unlink()
    (root / "current").mkdir()
    assert slots.begin_trial(root, B, boots=1, deadman_s=60).phase == TRIAL
    assert slots.roll_back(root, "unhealthy").good == A
    assert not slots.links_follow(root, slots.read(root))


def test_dangling_links_are_set_right(root):
    for name in ("current", "previous"):
        slots.point(root, name, "9.9.9-999999999999")
    slots.recover(root)
    assert links(root) == (A, P)


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "full")


def test_going_back_needs_no_room_on_the_disk(root):
    slots.begin_trial(root, B, boots=3, deadman_s=60)
    with patch.object(os, "symlink", full):
        record = slots.roll_back(root, "unhealthy")
    assert plain(record).good == A
    assert slots.link(root, "current") == A
    slots.recover(root)
    assert links(root) == (A, P)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["symlink", "pwrite"])
def test_a_full_disk_takes_the_ballast_and_the_step_is_done(root, call, code):
    (root / "ballast").write_bytes(b"\0" * 1024)
    real = getattr(os, call)

    def full_until_there_is_room(*words: object) -> object:
        if (root / "ballast").exists():
            raise OSError(code, "full")
        return real(*words)

    with patch.object(os, call, full_until_there_is_room):
        slots.begin_trial(root, B, boots=3, deadman_s=60)
    assert slots.read(root).phase == TRIAL
    assert links(root) == (B, A)
    assert not (root / "ballast").exists()


def test_a_record_that_cannot_be_written_leaves_the_old_one_and_the_links(root):
    before = slots.read(root)
    with patch.object(os, "pwrite", full), pytest.raises(OSError, match="full"):
        slots.begin_trial(root, B, boots=3, deadman_s=60)
    assert slots.read(root) == before
    assert links(root) == (A, P)


# The effects


def test_an_update_goes_from_staged_to_good(root):
    trial = slots.begin_trial(root, B, boots=3, deadman_s=60, retry_epoch=2, floor=8)
    assert (trial.phase, trial.good, trial.candidate, trial.floor) == (TRIAL, A, B, 8)
    assert links(root) == (B, A)
    assert slots.boot(root, slots.host_boot_id()).boots_left == 2
    good = slots.commit(root, B)
    assert (good.phase, good.good, good.previous, good.floor) == (IDLE, B, A, 8)
    assert links(root) == (B, A)


def test_a_failed_update_goes_back_and_is_not_tried_again(root):
    slots.begin_trial(root, B, boots=3, deadman_s=60)
    back = slots.roll_back(root, "workload-exited")
    assert (back.phase, back.good, back.previous) == (IDLE, A, P)
    assert back.skip == (("bbbbbbbbbbbb", "workload-exited", 0),)
    assert links(root) == (A, P)
    with pytest.raises(IllegalTransitionError) as refusal:
        slots.begin_trial(root, B, boots=3, deadman_s=60)
    assert refusal.value.reason == "skipped"
    slots.unskip(root, "bbbbbbbbbbbb")
    assert slots.begin_trial(root, B, boots=3, deadman_s=60).phase == TRIAL


def test_a_boot_finishes_the_switch_before_it_is_counted(root):
    Slots(root).write(ON_TRIAL)
    assert links(root) == (A, P)
    slots.boot(root, "one")
    assert links(root) == (B, A)


def test_a_version_that_fails_its_preflight_is_skipped_like_one_that_failed_its_trial(root):
    record = slots.refuse(root, B, "preflight", 2)
    assert (record.phase, record.good, record.tried) == (IDLE, A, A)
    assert record.skip == (("bbbbbbbbbbbb", "preflight", 2),)
    assert slots.refuse(root, B, "preflight", 2) == record
    with pytest.raises(IllegalTransitionError) as refusal:
        slots.begin_trial(root, B, boots=3, deadman_s=60, retry_epoch=2)
    assert refusal.value.reason == "skipped"
    assert slots.begin_trial(root, B, boots=3, deadman_s=60, retry_epoch=3).phase == TRIAL


def test_a_rollback_done_again_stays_done_even_when_another_version_was_refused_since(root):
    slots.begin_trial(root, B, boots=3, deadman_s=60)
    slots.roll_back(root, "unhealthy")
    record = slots.refuse(root, "1.2.0-cccccccccccc", "preflight")
    assert slots.roll_back(root, "unhealthy") == record


def test_arming_again_gives_no_boots_back(root):
    slots.begin_trial(root, B, boots=2, deadman_s=60)
    slots.boot(root, slots.host_boot_id())
    assert slots.begin_trial(root, B, boots=2, deadman_s=60).boots_left == 1


def test_a_second_version_cannot_be_armed_inside_a_trial(root):
    stage(root, "1.2.0-cccccccccccc")
    slots.begin_trial(root, B, boots=2, deadman_s=60)
    with pytest.raises(IllegalTransitionError) as refusal:
        slots.begin_trial(root, "1.2.0-cccccccccccc", boots=2, deadman_s=60)
    assert refusal.value.reason == "in-trial"
    assert slots.read(root).candidate == B


@pytest.mark.parametrize("missing", [".bundle.json", "agent.py"])
def test_a_half_written_version_is_never_armed(root, missing):
    (root / "versions" / B / missing).unlink()
    with pytest.raises(IllegalTransitionError) as refusal:
        slots.begin_trial(root, B, boots=2, deadman_s=60)
    assert refusal.value.reason == "not-found"


def test_a_link_in_versions_is_no_version(root):
    (root / "versions/2.0-dddddddddddd").symlink_to(B)
    assert not slots.is_complete(root, "2.0-dddddddddddd")
    assert not slots.is_complete(root, "..")


def test_the_good_version_is_never_rolled_back_after_the_commit(root):
    slots.begin_trial(root, B, boots=2, deadman_s=60)
    slots.commit(root, B)
    with pytest.raises(IllegalTransitionError) as refusal:
        slots.roll_back(root, "unhealthy")
    assert refusal.value.reason == "not-on-trial"
    assert links(root) == (B, A)


def test_a_commit_of_another_version_than_the_one_on_trial_is_refused(root):
    slots.begin_trial(root, B, boots=2, deadman_s=60)
    with pytest.raises(IllegalTransitionError):
        slots.commit(root, A)
    slots.roll_back(root, "unhealthy")
    with pytest.raises(IllegalTransitionError):
        slots.commit(root, B)


def test_the_reason_a_rollback_began_with_is_the_one_that_stays(root):
    put(root, GOING_BACK)
    assert slots.roll_back(root, "boots-used-up").reason == "unhealthy"
    assert slots.roll_back(root, "boots-used-up").skip == (("bbbbbbbbbbbb", "unhealthy", 0),)


def test_a_reason_in_odd_words_is_made_plain_rather_than_failing_the_rollback(root):
    slots.begin_trial(root, B, boots=2, deadman_s=60)
    assert slots.roll_back(root, "exit ☠ 3\n" + "x" * 99).reason == ("exit-3-" + "x" * 99)[:64]


def test_the_operator_goes_back_once_and_doing_it_again_does_not_return(root):
    first = slots.go_back(root, retry_epoch=3)
    assert (first.good, first.previous, first.skip) == (P, A, (("aaaaaaaaaaaa", "operator", 3),))
    assert links(root) == (P, A)
    assert slots.go_back(root) == first


def test_the_operator_ends_a_trial_by_going_back(root):
    slots.begin_trial(root, B, boots=2, deadman_s=60)
    record = slots.go_back(root)
    assert (record.good, record.skip) == (A, (("bbbbbbbbbbbb", "operator", 0),))
    assert links(root) == (A, P)


def test_the_operator_cannot_go_back_to_a_damaged_version(root):
    (root / "versions" / P / "agent.py").unlink()
    with pytest.raises(IllegalTransitionError) as refusal:
        slots.go_back(root)
    assert refusal.value.reason == "not-found"
    assert slots.read(root).good == A


def test_a_person_may_name_a_third_version_and_only_a_whole_one_that_did_not_fail(root):
    record = slots.go_back(root, 3, to=B)
    assert (record.good, record.previous, record.skip) == (B, A, (("aaaaaaaaaaaa", "operator", 3),))
    assert links(root) == (B, A)
    assert slots.go_back(root, 3, to=B) == record
    for name, reason in ((A, "skipped"), ("9.9.9-dddddddddddd", "not-found"), ("../x", "malformed")):
        with pytest.raises(IllegalTransitionError) as refusal:
            slots.go_back(root, to=name)
        assert refusal.value.reason == reason
    assert slots.read(root) == record


def test_a_trial_goes_back_to_the_good_version_only_whatever_a_person_names(root):
    slots.begin_trial(root, B, boots=2, deadman_s=60)
    with pytest.raises(IllegalTransitionError) as refusal:
        slots.go_back(root, to=P)
    assert (refusal.value.reason, slots.read(root).phase) == ("in-trial", "trial")
    assert slots.go_back(root, to=A).good == A


def test_the_first_version_is_good_at_once_and_no_other_is_first_after_it(tmp_path):
    stage(tmp_path, A, B)
    assert slots.recover(tmp_path) is None
    record = slots.install_first(tmp_path, A)
    assert (record.good, record.previous) == (A, A)
    assert links(tmp_path) == (A, A)
    assert slots.install_first(tmp_path, A) == record
    with pytest.raises(IllegalTransitionError) as refusal:
        slots.install_first(tmp_path, B)
    assert refusal.value.reason == "conflict"


def test_a_failed_first_update_goes_back_to_the_only_version(tmp_path):
    stage(tmp_path, A, B)
    slots.install_first(tmp_path, A)
    slots.begin_trial(tmp_path, B, boots=1, deadman_s=60)
    assert links(tmp_path) == (B, A)
    slots.roll_back(tmp_path, "unhealthy")
    assert links(tmp_path) == (A, A)


class OneRefusal:
    """A disk that fails one reading of a name under `versions`."""

    def __init__(self, at: int) -> None:
        self.at = at

    def before(self, name, words, options) -> None:
        if name == "stat" and "versions" in str(words[0]):
            self.at -= 1
            if self.at == 0:
                raise OSError(errno.EIO, "bad block")

    def after(self, name, words, options, result) -> None:
        pass


@pytest.mark.parametrize("at", range(1, 7))
def test_one_failed_read_does_not_unseat_the_good_version(root, at):
    put(root, RESTING)
    watch = OneRefusal(at)
    with disk.watched_by(watch):
        slots.recover(root)
    assert watch.at <= 0
    assert slots.read(root).good == A


def test_a_link_that_was_left_beside_is_taken_away(root):
    put(root, RESTING)
    (root / ".current.new").symlink_to("versions/nowhere")
    slots.recover(root)
    assert not (root / ".current.new").is_symlink()


def test_a_damaged_good_version_gives_way_to_the_previous_one(root):
    (root / "versions" / A / ".bundle.json").unlink()
    record = slots.recover(root)
    assert (record.good, record.previous, record.tried, record.reason) == (P, P, A, "disk")
    assert links(root) == (P, P)


def test_the_floor_only_grows(root):
    assert [slots.raise_floor(root, floor).floor for floor in (5, 3, 7)] == [5, 5, 7]
    assert slots.begin_trial(root, B, boots=1, deadman_s=60, floor=2).floor == 7


def test_a_recovery_with_nothing_to_do_writes_nothing(root):
    power = Power(0, "kept")
    with power.on():
        slots.recover(root)
        slots.refund(root)
        slots.unskip(root)
        slots.commit(root, A)
    assert power.steps == 0


@pytest.mark.parametrize(
    "step",
    [
        slots.refund,
        slots.commit,
        slots.go_back,
        slots.unskip,
        lambda root: slots.roll_back(root, "unhealthy"),
    ],
    ids=["refund", "commit", "go_back", "unskip", "roll_back"],
)
def test_nothing_is_done_on_a_device_without_a_record(tmp_path, step):
    with pytest.raises(IllegalTransitionError) as refusal:
        step(tmp_path)
    assert refusal.value.reason == "no-record"
    assert list(tmp_path.iterdir()) == []


def test_writers_take_turns_and_no_change_is_lost(root):
    start = slots.read(root).seq
    stage(root, *(f"3.0.{number}-{number:012x}" for number in range(1, 9)))
    floors = threading.Thread(target=lambda: [slots.raise_floor(root, floor) for floor in range(10, 40)])
    floors.start()
    for number in range(1, 9):
        slots.begin_trial(root, f"3.0.{number}-{number:012x}", boots=1, deadman_s=60)
        slots.roll_back(root, "unhealthy")
    floors.join()
    record = slots.read(root)
    assert (record.floor, len(record.skip), record.seq) == (39, 8, start + 30 + 8 * 3)


def test_a_stopped_writer_does_not_keep_others_waiting_for_ever(root, monkeypatch):
    monkeypatch.setattr(slots, "_LOCK_WAIT_S", 0.05)
    stopped = os.open(root, os.O_RDONLY)
    fcntl.flock(stopped, fcntl.LOCK_EX)
    with pytest.raises(OSError):
        slots.recover(root)
    assert slots.believed(root).good == A
    os.close(stopped)
    assert slots.recover(root).good == A


def test_a_record_that_the_disk_does_not_give_out_is_left_alone_and_the_links_are_believed(root):
    (root / "state/slots").unlink()
    (root / "state/slots").symlink_to("/proc/self/mem")  # a read at its beginning is an error of the device
    for call in (slots.read, slots.recover):
        with pytest.raises(OSError, match="Input/output error"):
            call(root)
    assert (root / "state/slots").is_symlink()
    assert slots.believed(root).good == A
    assert slots.seq_on_trial(root) is None


# Power cuts


class PowerCutError(BaseException):
    """Not an Exception, so that nothing in between can take it for an ordinary failure."""


class Power:
    """The disk under `slots`: it counts what changes it, and goes dark before the `cut_at`-th change.

    What was not synced by then is `kept`, `lost`, or (a record) `torn`.
    """

    def __init__(self, cut_at: int, unsynced: str) -> None:
        self.cut_at = cut_at
        self.unsynced = unsynced
        self.steps = 0
        self.undo: list[Callable[[], None]] = []
        self.twins: list[int] = []
        self.real = {
            name: getattr(os, name) for name in ("pwrite", "fdatasync", "symlink", "rename", "fsync")
        }
        self.real_exchange = disk.rename_exchange

    def step(self) -> None:
        self.steps += 1
        if self.steps == self.cut_at:
            if self.unsynced != "kept":
                for undo in reversed(self.undo):
                    undo()
            raise PowerCutError

    def pwrite(self, descriptor: int, block: bytes, offset: int) -> int:
        self.step()
        old = os.pread(descriptor, len(block), offset).ljust(len(block), b"\0")
        half = block[:100] + old[100:] if self.unsynced == "torn" else old
        twin = os.dup(descriptor)
        self.twins.append(twin)
        self.undo.append(lambda: self.real["pwrite"](twin, half, offset))
        return self.real["pwrite"](descriptor, block, offset)

    def fdatasync(self, descriptor: int) -> None:
        self.step()
        self.real["fdatasync"](descriptor)
        self.undo.clear()

    def fsync(self, descriptor: int) -> None:
        self.step()
        self.undo.clear()

    def symlink(self, target: str, path: str) -> None:
        self.step()
        self.real["symlink"](target, path)

    def rename(self, source: str, target: str) -> None:
        self.step()
        link = Path(target)
        old = link.readlink() if link.is_symlink() else None

        def put_back() -> None:
            link.unlink()
            if old:
                self.real["symlink"](old, target)

        self.real["rename"](source, target)
        self.undo.append(put_back)

    def exchange(self, one: str, other: str) -> None:
        self.step()
        self.real_exchange(one, other)
        self.undo.append(lambda: self.real_exchange(one, other))

    @contextmanager
    def on(self) -> Iterator[None]:
        try:
            with patch.multiple(os, **{name: getattr(self, name) for name in self.real}):
                with patch.object(disk, "rename_exchange", self.exchange):
                    yield
        finally:
            for twin in self.twins:
                os.close(twin)


EFFECTS = {
    "install_first": (None, lambda root: slots.install_first(root, A)),
    "begin_trial": (RESTING, lambda root: slots.begin_trial(root, B, boots=3, deadman_s=60)),
    "commit": (ON_TRIAL, lambda root: slots.commit(root, B)),
    "roll_back": (ON_TRIAL, lambda root: slots.roll_back(root, "unhealthy")),
    "go on rolling back": (GOING_BACK, slots.recover),
    "go_back": (RESTING, slots.go_back),
    "go_back in a trial": (ON_TRIAL, slots.go_back),
    "go_back to a third": (RESTING, lambda root: slots.go_back(root, to=B)),
    "refund": (replace(ON_TRIAL, is_up=True), slots.refund),
    "refuse": (RESTING, lambda root: slots.refuse(root, B, "preflight", 2)),
    "unskip": (replace(RESTING, skip=(("cccccccccccc", "unhealthy", 0),)), slots.unskip),
}


@pytest.mark.parametrize("unsynced", ["kept", "lost", "torn"])
@pytest.mark.parametrize("effect", EFFECTS)
def test_power_cut_between_any_two_steps_keeps_the_good_version_and_the_effect_can_be_finished(
    tmp_path, effect, unsynced
):
    before, step = EFFECTS[effect]
    uncut = None
    for cut_at in range(1, 60):
        root = tmp_path / str(cut_at)
        stage(root, P, A, B)
        if before is not None:
            put(root, before)
        power = Power(cut_at, unsynced)
        try:
            with power.on():
                uncut = step(root)
        except PowerCutError:
            assert_safe(root, installed=before is not None)
            assert_safe(root, installed=slots.recover(root) is not None)
            assert_finished(root, step)
            continue
        assert cut_at > 2, "a step that no cut can hit was not tested"
        assert not power.undo, "it ended before the disk did"
        break
    assert uncut is not None, "the effect never ended"
    for other in tmp_path.iterdir():
        assert plain(slots.read(other)) == plain(uncut)
        assert links(other) == links(root)


def assert_safe(root: Path, *, installed: bool) -> None:
    """Whatever was cut: both links lead to whole versions, and the version to run is one of the good two."""
    if not installed:
        return
    record = slots.believed(root)
    assert record.good in {P, A, B}
    assert slots.is_complete(root, record.good)
    for name in ("current", "previous"):
        assert (root / name / "agent.py").is_file()


def assert_finished(root: Path, step: Callable[[Path], object]) -> None:
    step(root)
    record = slots.read(root)
    assert slots.links_follow(root, record)
    assert [slots.is_complete(root, name) for name in slots.kept(record)].count(False) == 0


@pytest.mark.parametrize("unsynced", ["kept", "lost", "torn"])
def test_power_cut_while_a_boot_is_counted_never_gives_more_boots_than_were_granted(tmp_path, unsynced):
    for cut_at in range(1, 12):
        root = tmp_path / str(cut_at)
        stage(root, P, A, B)
        put(root, replace(ON_TRIAL, boots_left=3))
        started = 0
        try:
            with Power(cut_at, unsynced).on():
                slots.boot(root, "one")
            started += 1
        except PowerCutError:
            slots.recover(root)
        while slots.read(root).boots_left:
            slots.boot(root, "later")
            started += 1
        assert started in {2, 3}
        assert slots.read(root).good == A


def test_power_cut_on_a_file_system_without_exchange_keeps_both_links(tmp_path):
    for cut_at in range(1, 40):
        root = tmp_path / str(cut_at)
        stage(root, P, A, B)
        put(root, RESTING)
        power = Power(cut_at, "lost")
        power.real_exchange = lacking
        try:
            with power.on():
                slots.begin_trial(root, B, boots=3, deadman_s=60)
                slots.roll_back(root, "unhealthy")
        except PowerCutError:
            assert_safe(root, installed=True)
            slots.recover(root)
            assert slots.links_follow(root, slots.read(root))
            continue
        return
    pytest.fail("the effects never ended")


@pytest.mark.parametrize("name", ["disk.py", "slots.py", "launcher.py"])
def test_what_the_launcher_is_made_of_parses_as_python_3_9(name):
    source = (Path(slots.__file__).parent / name).read_text()
    ast.parse(source, feature_version=(3, 9))
