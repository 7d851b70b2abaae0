"""Any order of updates, boots, stops, power cuts and garbage: good stays good, and failures stay skipped."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent_core import disk, slots
from agent_core.launcher import ROLL_BACK, RUN, TRY, decide
from agent_core.slots import IDLE, ROLLBACK, TRIAL, IllegalTransitionError, Record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NAMES = [f"1.{number}.0-{number:012x}" for number in range(5)]
cuts = st.one_of(st.just(0), st.integers(1, 16))
"""The change of the disk before which the power goes; 0: it stays on."""


class PowerCutError(BaseException):
    """Not an Exception, so that nothing in between can take it for an ordinary failure."""


@contextmanager
def power(cut_at: int) -> Iterator[None]:
    """Let `slots` change the disk `cut_at - 1` times, then no more."""
    steps = 0

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def call(*words: object, **options: object) -> object:
            nonlocal steps
            steps += 1
            if steps == cut_at:
                raise PowerCutError
            return real(*words, **options)

        return call

    calls = {
        name: counted(getattr(os, name)) for name in ("pwrite", "fdatasync", "symlink", "rename", "unlink")
    }
    # What fsync does cannot be seen from here; leaving it out keeps many examples cheap.
    with patch.multiple(os, fsync=counted(lambda descriptor: None), **calls):
        with patch.object(disk, "rename_exchange", counted(disk.rename_exchange)):
            yield


class Device(RuleBasedStateMachine):
    """One device through updates. The model is a record and what happened; the truth is on a real disk."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="device-"))
        self.slots = self.root / "state" / "slots"
        self.slots.parent.mkdir()
        for name in NAMES:
            (self.root / "versions" / name).mkdir(parents=True)
            for part in ("agent.py", ".bundle.json"):
                (self.root / "versions" / name / part).write_text(name)
        self.epoch = 0
        self.boots_granted = 0
        self.boots_taken = 0
        self.boot = 1
        self.host = patch.object(slots, "host_boot_id", lambda: f"boot {self.boot}")
        self.host.start()

    def teardown(self) -> None:
        self.host.stop()
        shutil.rmtree(self.root)

    @property
    def record(self) -> Record:
        record = slots.read(self.root)
        assert record is not None
        return record

    def do(self, cut_at: int, step: Callable[[], Record], expected: Callable[[Record], Record]) -> None:
        """Take a step that may be cut short; it ends as before or as expected, never in between."""
        before = self.record
        try:
            allowed = expected(before)
        except IllegalTransitionError as refusal:
            self.refuse(step, refusal.reason)
            assert self.record == before
            return
        try:
            with power(cut_at):
                step()
        except PowerCutError:
            slots.recover(self.root)
            assert plain(self.record) in (plain(before), plain(allowed))
        else:
            assert plain(self.record) == plain(allowed)
        slots.recover(self.root)
        assert slots.links_follow(self.root, self.record)

    def refuse(self, step: Callable[[], Record], reason: str) -> None:
        with pytest.raises(IllegalTransitionError) as refusal:
            step()
        assert refusal.value.reason == reason

    @initialize(cut_at=cuts)
    def install(self, cut_at: int) -> None:
        try:
            with power(cut_at):
                slots.install_first(self.root, NAMES[0])
        except PowerCutError:
            slots.recover(self.root)
            slots.install_first(self.root, NAMES[0])
        assert self.record.good == NAMES[0]

    @rule(name=st.sampled_from(NAMES), boots=st.integers(1, 3), cut_at=cuts)
    def arm(self, name: str, boots: int, cut_at: int) -> None:
        before = self.record
        if before.phase == TRIAL and before.candidate == name:
            assert slots.begin_trial(self.root, name, boots, 60, retry_epoch=self.epoch) == before
            return
        self.do(
            cut_at,
            lambda: slots.begin_trial(self.root, name, boots, 60, retry_epoch=self.epoch),
            lambda record: slots.armed(record, name, boots, 60, self.epoch),
        )
        if before.phase == IDLE and self.record.phase == TRIAL:
            skipped = {digest for digest, _, epoch in before.skip if epoch >= self.epoch}
            assert slots.digest_of(name) not in skipped
            self.boots_granted, self.boots_taken = boots, 0

    @rule(cut_at=cuts)
    def launch(self, cut_at: int) -> None:
        """What the launcher does, up to exec."""
        record = slots.recover(self.root)
        plan = decide(record, slots.complete(self.root, record))
        assert plan.order[0] == record.good
        if plan.act == TRY:
            before = self.record
            boot = slots.host_boot_id()
            self.do(cut_at, lambda: slots.boot(self.root, boot), lambda held: slots.booted(held, boot))
            if self.record.boots_left < before.boots_left:
                self.boots_taken += 1
                assert self.boots_taken <= self.boots_granted
        elif plan.act == ROLL_BACK:
            assert record.boots_left == 0
            self.fail(plan.reason, cut_at)
        else:
            assert plan.act == RUN

    @precondition(lambda self: self.record.phase == TRIAL)
    @rule(reason=st.sampled_from(["unhealthy", "workload-exited"]), cut_at=cuts)
    def fail(self, reason: str, cut_at: int) -> None:
        candidate = self.record.candidate
        self.do(
            cut_at,
            lambda: slots.roll_back(self.root, reason),
            lambda record: slots.rolled_back(slots.rolling_back(record, reason)),
        )
        if self.record.phase == IDLE:
            assert self.record.skip[-1] == (slots.digest_of(candidate), reason, self.record.retry_epoch)

    @rule(cut_at=cuts)
    def be_healthy(self, cut_at: int) -> None:
        if self.record.phase == IDLE and self.record.reason == "observed":
            assert slots.commit(self.root) == self.record
        else:
            self.do(cut_at, lambda: slots.commit(self.root), slots.committed)

    @rule(cut_at=cuts)
    def stop(self, cut_at: int) -> None:
        before = self.record
        step = slots.refunded if before.phase == TRIAL else lambda record: record
        self.do(cut_at, lambda: slots.refund(self.root), step)
        self.boots_taken -= self.record.boots_left - before.boots_left

    @rule(cut_at=cuts)
    def lose_the_power(self, cut_at: int) -> None:
        """The host goes down and comes up; the start it cut short is no fault of the candidate, so often."""
        self.boot += 1
        before, boot = self.record, slots.host_boot_id()
        self.do(
            cut_at, lambda: slots.recover(self.root) or before, lambda record: slots.rebooted(record, boot)
        )
        given = self.record.reboots - before.reboots
        assert given == (before.is_up and before.phase == TRIAL and before.reboots < slots.REBOOTS_MOST)
        assert self.record.boots_left == before.boots_left + given
        self.boots_taken -= given

    @precondition(lambda self: self.record.phase == IDLE)
    @rule(cut_at=cuts)
    def go_back(self, cut_at: int) -> None:
        record = self.record
        if record.reason == "operator" and record.tried == record.previous != record.good:
            assert slots.go_back(self.root) == record
            return
        self.do(
            cut_at,
            lambda: slots.go_back(self.root, self.epoch),
            lambda held: slots.gone_back(held, self.epoch),
        )

    @rule()
    def ask_for_a_retry(self) -> None:
        self.epoch += 1

    @rule(name=st.sampled_from(NAMES), cut_at=cuts)
    def unskip(self, name: str, cut_at: int) -> None:
        digest = slots.digest_of(name)
        self.do(
            cut_at,
            lambda: slots.unskip(self.root, digest),
            lambda record: slots.unskipped(record, digest),
        )

    @rule(floor=st.integers(0, 9), cut_at=cuts)
    def raise_floor(self, floor: int, cut_at: int) -> None:
        before = self.record.floor
        self.do(
            cut_at,
            lambda: slots.raise_floor(self.root, floor),
            lambda record: replace(record, floor=max(floor, record.floor)),
        )
        assert self.record.floor >= before

    @rule(noise=st.binary(min_size=1, max_size=64), place=st.integers(0, 4000))
    def tear_the_older_slot(self, noise: bytes, place: int) -> None:
        """What a power cut inside a write does; the record is in the other slot."""
        before = self.record
        self.scribble((before.seq + 1) % 2, noise, place)
        assert self.record == before

    @rule(noise=st.binary(min_size=1, max_size=64), place=st.integers(0, 60))
    def lose_the_newer_slot(self, noise: bytes, place: int) -> None:
        """A bad block: the record is as it was one step before, and nothing worse."""
        before, whole = self.record, self.slots.read_bytes()
        self.scribble(before.seq % 2, noise, place)
        after = slots.read(self.root)
        if after is None or after == before:
            self.slots.write_bytes(whole)
            return
        assert after.seq == before.seq - 1
        slots.recover(self.root)
        # The start that the lost record counted is counted anew; that is all a lost record may give away.
        self.boots_granted, self.boots_taken = self.record.boots_left, 0

    def scribble(self, slot: int, noise: bytes, place: int) -> None:
        # Odd numbers lie in the first place: writing starts there with number 1.
        offset = (1 - slot) * slots.SLOT_LENGTH + place
        with self.slots.open("r+b") as stream:
            stream.seek(offset)
            stream.write(noise)

    @invariant()
    def both_links_lead_to_a_version(self) -> None:
        for name in ("current", "previous"):
            assert (self.root / name / "agent.py").is_file()

    @invariant()
    def what_is_good_is_whole_and_untouched(self) -> None:
        for name in slots.kept(self.record):
            assert slots.is_complete(self.root, name)
            assert (self.root / "versions" / name / "agent.py").read_text() == name

    @invariant()
    def the_phases_hold_what_they_must(self) -> None:
        record = self.record
        assert record.phase != ROLLBACK, "a rollback is finished by recovery"
        assert (record.phase == TRIAL) == bool(record.candidate)
        assert 0 <= record.boots_left <= record.boots_max
        assert 0 <= record.refunds <= slots.REFUNDS_MOST
        assert 0 <= record.reboots <= slots.REBOOTS_MOST
        assert record.candidate != record.good


def plain(record: Record) -> Record:
    return replace(record, seq=0)


TestDevice = Device.TestCase
TestDevice.settings = settings(
    max_examples=30,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
