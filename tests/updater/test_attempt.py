"""An attempt's end is read off the record, whoever wrote it, and told once."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent_core.slots import Record
from agent_core.wire import AttemptState
from updater.attempt import Attempt, load, save, settled

A, B = "1.0.0-aaaaaaaaaaaa", "1.1.0-bbbbbbbbbbbb"
STAGED = Attempt("1.1.0", "b" * 12, "salt", AttemptState.STAGED)
IDLE_ON_A = Record(good=A, previous=A)

TABLE = {
    "no attempt": (None, IDLE_ON_A, None),
    "still downloading": (STAGED.to(AttemptState.DOWNLOADING), IDLE_ON_A, None),
    "staged, not yet armed": (STAGED, IDLE_ON_A, None),
    "on trial": (STAGED, Record(phase="trial", good=A, candidate=B), AttemptState.TRIAL),
    "on trial, told already": (
        STAGED.to(AttemptState.TRIAL),
        Record(phase="trial", good=A, candidate=B),
        None,
    ),
    "rolling back is not an end": (STAGED, Record(phase="rollback", good=A, candidate=B), None),
    "committed": (STAGED.to(AttemptState.TRIAL), Record(good=B, previous=A), AttemptState.HEALTHY),
    "committed before the trial was told": (STAGED, Record(good=B, previous=A), AttemptState.HEALTHY),
    "rolled back by anyone": (
        STAGED.to(AttemptState.TRIAL),
        Record(good=A, previous=A, skip=(("b" * 12, "unhealthy", 0),)),
        AttemptState.ROLLED_BACK,
    ),
    "staged anew after a retry": (
        replace(STAGED, retry_epoch=1),
        Record(good=A, previous=A, skip=(("b" * 12, "unhealthy", 0),)),
        None,
    ),
    "rolled back again, before the trial was told": (
        replace(STAGED, retry_epoch=1),
        Record(good=A, previous=A, skip=(("b" * 12, "unhealthy", 1),)),
        AttemptState.ROLLED_BACK,
    ),
    "on trial, and rolled back under an epoch that a lost note has forgotten": (
        replace(STAGED, state=AttemptState.TRIAL, retry_epoch=1),
        Record(good=A, previous=A, skip=(("b" * 12, "unhealthy", 0),)),
        AttemptState.ROLLED_BACK,
    ),
    "ended and told": (STAGED.to(AttemptState.HEALTHY), Record(good=B, previous=A), None),
}


@pytest.mark.parametrize(("attempt", "record", "state"), TABLE.values(), ids=TABLE.keys())
def test_table(attempt, record, state):
    after = settled(attempt, record)
    assert (after.state if after else None) == state


def test_the_reason_of_a_rollback_is_the_one_the_record_keeps():
    record = Record(good=A, previous=A, skip=(("b" * 12, "boots-used-up", 0),))
    assert settled(STAGED.to(AttemptState.TRIAL), record).reason == "boots-used-up"


def test_what_the_agent_said_of_a_rollback_outlives_its_restart():
    record = Record(good=A, previous=A, skip=(("b" * 12, "unhealthy", 0),))
    told = replace(STAGED, state=AttemptState.TRIAL, detail="web: no answer (3 in a row, 2 allowed)")
    assert settled(told, record).detail == told.detail


def test_an_attempt_survives_a_restart(tmp_path):
    save(tmp_path / "attempt.json", STAGED)
    assert load(tmp_path / "attempt.json") == STAGED


@pytest.mark.parametrize("damage", [b"", b"null", b"[]", b"{", b'{"version": 3}'])
def test_a_damaged_note_is_no_attempt(tmp_path, damage):
    (tmp_path / "attempt.json").write_bytes(damage)
    assert load(tmp_path / "attempt.json") is None
    assert load(tmp_path / "missing.json") is None
