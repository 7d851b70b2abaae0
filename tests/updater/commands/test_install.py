"""Whether the running agent did what `install FILE` asked of it."""

from __future__ import annotations

import pytest

from agent_core import slots
from agent_core.slots import Record
from tests.updater.commands.conftest import A, B
from updater.commands.install import _is_taken
from updater.decide import Action
from updater.device import Outcome

DIGEST = slots.digest_of(B)


@pytest.mark.parametrize(
    ("record", "taken"),
    [
        pytest.param(Record(good=A), False, id="not looked at"),
        pytest.param(Record(good=A, phase=slots.TRIAL, candidate=B), True, id="on trial"),
        pytest.param(Record(good=B, previous=A), True, id="kept already"),
        pytest.param(Record(good=A, skip=((DIGEST, "crashed", 0),)), True, id="back already"),
        pytest.param(Record(good=A, skip=(("0" * 12, "crashed", 0),)), False, id="another is skipped"),
    ],
)
def test_a_version_was_taken_however_fast_its_trial_went(record, taken):
    outcome = Outcome(Action.INSTALL, "", "", "2026-01-01T00:00:00Z", version="1.1.0", candidate=B)
    assert _is_taken(outcome, record) is taken
