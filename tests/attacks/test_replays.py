"""Old metadata, frozen servers, clocks and versions run forward: row 34 of docs/cases.md."""

from __future__ import annotations

from datetime import timedelta

import pytest

from agent_core import clock
from tests.attacks.victim import GOOD, NEW, OLD, SEQ
from tests.http_origin import Status
from updater import freshness, poll

DAY = timedelta(days=1)


def newer(victim):
    """What the server said before something newer that this host has seen."""
    old = victim.server.tree()
    victim.server.lead_to(GOOD, revision=2)
    assert victim.poll().reason == "up-to-date"
    return old


def test_an_old_timestamp(victim):
    victim.server.replay(newer(victim))
    victim.refuses("replayed")
    victim.is_well_again()


@pytest.mark.parametrize("role", ["snapshot", "targets", "cohorts"])
def test_an_old_role_under_new_ones(victim, role):
    """With the online keys it takes: whatever names an older version than this host has is refused."""
    newer(victim)
    server = victim.server
    if role == "snapshot":
        server.timestamp.snapshot_meta.version = 1
    else:
        server.snapshot.version += 1
        server.snapshot.meta[f"{role}.json"].version = 1
        server.write_snapshot()
    server.bump_timestamp()
    victim.refuses("replayed")
    victim.is_well_again()


@pytest.mark.parametrize("role", ["targets", "cohorts"])
def test_a_snapshot_that_leaves_a_role_out(victim, role):
    newer(victim)
    server = victim.server
    server.snapshot.version += 1
    del server.snapshot.meta[f"{role}.json"]
    server.write_snapshot()
    server.bump_timestamp()
    victim.refuses("bad-metadata")
    victim.is_well_again()


def test_a_frozen_server(victim, wall):
    """It answers as it did the day before yesterday; the timestamp has run out meanwhile."""
    wall(2 * DAY)
    victim.refuses("expired")
    wall(0 * DAY)
    victim.is_well_again()


def test_a_clock_set_back_to_make_old_metadata_fresh(victim, wall):
    """A timestamp key steals no time backwards either: what had run out by signed time stays so."""
    server, today = victim.server, victim.server.now
    server.bump_timestamp(today + 3 * DAY)
    wall(3 * DAY)
    assert victim.poll().reason == "up-to-date"
    server.bump_timestamp(today + DAY)
    wall(-100 * DAY)
    victim.refuses("expired")
    wall(3 * DAY)
    server.now = today + 3 * DAY
    victim.is_well_again()


def test_a_new_root_is_no_way_to_set_the_time_back(victim, wall):
    """Only the end of a key that signed the time ends what it said: not a new root, nor one more key."""
    server, today = victim.server, victim.server.now
    server.bump_timestamp(today + 3 * DAY)
    assert victim.poll().reason == "up-to-date"
    server.rotate("snapshot")
    server.add_signer("timestamp")
    server.publish_root()
    server.lead_to(GOOD, revision=2)
    server.bump_timestamp(today + DAY)
    wall(-100 * DAY)
    victim.refuses("expired")
    wall(3 * DAY)
    server.bump_timestamp(today + 3 * DAY)
    assert victim.poll().reason == "up-to-date"
    assert victim.state() == victim.before


def test_versions_run_forward_to_the_end_and_the_ceremony_that_recovers(victim):
    """A thief of the online keys leaves numbers nobody can follow; new keys, and no hand on the host, can."""
    server = victim.server
    server.snapshot.version = server.timestamp.version = server.cohorts.version = 2**31 - 1
    server.publish()
    assert victim.poll().reason == "up-to-date"
    server.snapshot.version = server.timestamp.version = server.cohorts.version = 2
    server.release(NEW, SEQ[NEW])
    server.lead_to(NEW)
    victim.refuses("replayed")
    for role in ("snapshot", "timestamp"):
        server.rotate(role)
    server.publish_root()
    server.publish()
    outcome = victim.poll()
    assert (outcome.reason, outcome.candidate) == ("update", victim.name_of(NEW))


def test_an_old_directive_cannot_be_said_again(victim):
    """The cohorts role as it was when it led to an older version, named by a snapshot of today."""
    server = victim.server
    server.set_directive("stable", release=OLD, base=OLD, rollback=True)
    older = server.sign(server.cohorts, server.signers["cohorts"])
    newer(victim)
    server.lead_to(GOOD, revision=3)
    server.write(f"{server.cohorts.version}.cohorts.json", older)
    victim.refuses("digest-mismatch")
    victim.is_well_again()


def test_a_304_for_ever_is_believed_for_six_hours_at_most(victim, monkeypatch):
    """The idle poll is answered by anybody in between; then the metadata is asked for."""
    newer(victim)
    victim.between.misbehave("timestamp.json", Status(304, {"ETag": '"any"'}))
    assert poll.is_unchanged(victim.device)
    later = clock.boot_s() + freshness.FULL_REFRESH_AFTER.total_seconds()
    monkeypatch.setattr(clock, "boot_s", lambda: later)
    assert not poll.is_unchanged(victim.device)
    victim.refuses("bad-answer")
    assert not poll.is_unchanged(victim.device)
    victim.is_well_again()
