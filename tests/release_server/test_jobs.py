from __future__ import annotations

import json
import logging
import threading
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update

from agent_core import clock as wall
from agent_core.errors import TrustError
from release_server import fleet, jobs, signer
from release_server.config import Config
from release_server.jobs import Jobs, LostLeaseError
from release_server.models import Lease, MetadataFile
from tests import postgres
from tests.agent_core.loop import wait_until


def lease(sessions):
    with sessions.read() as session:
        return session.scalars(select(Lease)).one()


def test_one_process_works_and_the_others_wait(make_jobs):
    first, second = make_jobs(), make_jobs()
    assert [first.tick(), second.tick(), first.tick(), second.tick()] == [True, False, True, False]


def test_another_takes_over_when_the_holder_is_silent(make_jobs, clock, config):
    first, second = make_jobs(), make_jobs()
    first.tick()
    clock.now += config.lease
    assert second.tick() is True
    assert first.tick() is False


def test_another_takes_over_at_once_when_the_holder_leaves(make_jobs):
    first, second = make_jobs(), make_jobs()
    first.tick()
    first.close()
    assert second.tick() is True


def test_the_fence_grows_with_every_change_of_hands_and_not_with_renewals(make_jobs, clock, config, sessions):
    first, second = make_jobs(), make_jobs()
    first.tick()
    first.tick()
    assert lease(sessions).fence == 1
    clock.now += config.lease
    second.tick()
    assert lease(sessions).fence == 2


def test_a_lease_from_a_clock_that_was_far_ahead_does_not_last(make_jobs, clock):
    first, second = make_jobs(), make_jobs()
    clock.step(days=3650)
    first.tick()
    clock.step(days=-3650)
    assert second.tick() is True


@pytest.mark.skipif(not postgres.WANTED, reason="on SQLite all processes are of one host, and have one clock")
@pytest.mark.parametrize(
    "skew", [timedelta(minutes=10), timedelta(minutes=-10), timedelta(days=3650)], ids=str
)
def test_no_clock_of_a_replica_takes_a_lease_that_is_held_or_holds_one_that_has_ended(
    config, make_signer, sessions, skew, monkeypatch
):
    ticked = []
    monkeypatch.setattr(fleet, "tick", lambda session, now: ticked.append(abs(wall.now() - now)))
    right, wrong = (
        Jobs(config, signer=make_signer(), clock=lambda by=by: wall.now() + by) for by in (timedelta(), skew)
    )
    assert [right.tick(), wrong.tick(), right.tick(), wrong.tick()] == [True, False, True, False]
    right.close()
    assert [wrong.tick(), right.tick()] == [True, False]
    assert lease(sessions).until - wall.now() < config.lease + timedelta(seconds=1)
    with sessions.write() as session:
        over = func.clock_timestamp() - timedelta(seconds=1)
        session.execute(update(Lease).values(until=over))
    assert [right.tick(), wrong.tick()] == [True, False]
    assert lease(sessions).since is None, "somebody always was there"
    assert max(ticked) < timedelta(minutes=1), "nor does it end a stage before its time"
    wrong.close()
    right.close()


def test_a_pause_in_which_no_process_was_there_is_told_from_a_change_of_hands(
    make_jobs, clock, config, sessions
):
    first, second = make_jobs(), make_jobs()
    first.tick()
    clock.now += 2 * config.lease
    second.tick()
    assert lease(sessions).since is None
    clock.now += 2 * config.lease + timedelta(seconds=1)
    first.tick()
    assert lease(sessions).since == clock.now
    clock.now += timedelta(days=365)
    first.tick()
    clock.now -= timedelta(days=365)
    first.tick()
    assert lease(sessions).since == clock.now


def test_a_process_that_lost_the_lease_within_a_tick_writes_nothing(
    make_jobs, published_targets, clock, config, sessions, monkeypatch
):
    """It was paused between taking the lease and its work, for longer than the lease lasts."""
    first, second = make_jobs(), make_jobs()
    take = jobs.take_lease

    def pause(session, holder, now, length):
        fence = take(session, holder, now, length)
        if holder == first.holder:
            session.commit()
            clock.now += config.lease
            assert second.tick()
        return fence

    monkeypatch.setattr(jobs, "take_lease", pause)
    with sessions.read() as session:
        before = session.query(MetadataFile).count()
    with pytest.raises(LostLeaseError):
        first.tick()
    with sessions.read() as session:
        rows = list(session.scalars(select(MetadataFile)))
    assert len(rows) == before + 3  # what the second process signed: cohorts, snapshot, timestamp
    assert lease(sessions).holder == second.holder


def test_a_lease_that_is_lost_while_a_sender_asks_for_it_is_lost(config, clock, make_signer, sessions):
    """The thread that ticks takes the fence away between two looks at it."""
    seen = [1]

    class Losing(Jobs):
        fence = property(lambda self: seen.pop() if seen else None, lambda self, value: None)

    one = Losing(config, clock=clock, signer=make_signer())
    with sessions.read() as session, pytest.raises(LostLeaseError):
        one._check_own_fence(session)
    one.close()


@pytest.fixture
def published_targets(trusted, blobs, accept):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    accept(metadata)


def test_keys_that_the_signer_made_for_later_are_told_within_a_minute(
    make_jobs, published_targets, config, clock
):
    jobs = make_jobs()
    jobs.tick()
    assert signer.read_public(config.trust).upcoming is None
    signer.make_keys(config.keys, clock(), beside=signer.NEXT)
    clock.step(seconds=60)
    jobs.tick()
    assert signer.read_public(config.trust).upcoming == signer.upcoming_halves(config.keys)


def test_a_signer_that_lost_its_keys_and_made_others_is_followed_though_nothing_is_signed(
    make_jobs, published_targets, config, clock
):
    """Else no ceremony could name the new ones: it takes them from what the server says."""
    jobs = make_jobs()
    jobs.tick()
    for role in signer.ONLINE:
        signer.key_path(config.keys, role).unlink()
    signer.make_keys(config.keys, clock())
    clock.step(hours=7)  # a timestamp is due
    with pytest.raises(TrustError) as refused:
        jobs.tick()
    assert refused.value.reason == "online-key"
    assert signer.read_public(config.trust) == signer.public_halves(config.keys)


def test_other_keys_of_a_signer_are_told_before_there_is_a_root(make_jobs, config, clock):
    for role in signer.ONLINE:
        signer.key_path(config.keys, role).unlink()
    signer.make_keys(config.keys, clock())
    make_jobs().tick()
    assert signer.read_public(config.trust) == signer.public_halves(config.keys)


def test_a_tick_publishes_what_was_accepted(make_jobs, published_targets, config):
    assert make_jobs().tick() is True
    timestamp = json.loads((config.repository / "metadata" / "timestamp.json").read_bytes())
    assert timestamp["signed"]["version"] == 1


def test_the_fleet_is_reconciled_in_the_same_transaction(make_jobs, monkeypatch, sessions):
    seen = []
    monkeypatch.setattr(fleet, "tick", lambda session, now: seen.append((session.in_transaction(), now)))
    one = make_jobs()
    one.tick()
    assert seen == [(True, one.clock())]


def test_a_start_after_a_crash_exports_what_was_committed(make_jobs, published_targets, config, monkeypatch):
    first = make_jobs()
    with monkeypatch.context() as patched:
        patched.setattr("release_server.repository.export", lambda *_: None)
        first.tick()
    assert not (config.repository / "metadata" / "timestamp.json").exists()
    first.close()
    make_jobs().tick()
    assert (config.repository / "metadata" / "timestamp.json").exists()


def test_published_bundles_that_were_lost_come_back_at_start(make_jobs, published_targets, config):
    first = make_jobs()
    first.tick()
    first.close()
    lost = sorted((config.repository / "targets").rglob("*.*"))
    lost = [place for place in lost if place.is_file()]
    assert len(lost) == 2
    for place in lost:
        place.unlink()
    make_jobs().tick()
    assert all(place.exists() for place in lost)


def test_nothing_that_goes_wrong_in_a_tick_ends_the_loop(make_jobs, monkeypatch, caplog):
    one = make_jobs()
    stop = threading.Event()
    ticks = []

    def tick():
        ticks.append(1)
        if len(ticks) == 1:
            raise OSError("the disk is gone")
        if len(ticks) == 2:
            raise LostLeaseError
        stop.set()

    monkeypatch.setattr(one, "tick", tick)
    with caplog.at_level(logging.INFO):
        one.run(stop)
    assert len(ticks) == 3
    assert "a tick failed" in caplog.text


def test_what_an_operator_asks_is_signed_within_a_tick(make_jobs, published_targets, sign_in, config):
    asked = {"product": "demo", "name": "eu", "match": "region=eu", "release": "1.0"}
    assert sign_in("operator")("POST", "/cohorts", json=asked).status_code == 201
    make_jobs().tick()
    newest = max((config.repository / "metadata").glob("*.cohorts.json"))
    custom = json.loads(newest.read_bytes())["signed"]["targets"]["cohorts/demo/eu.json"]["custom"]
    assert (custom["base"], custom["cohort"]) == ("1.0", "eu")


@pytest.fixture
def rarely(data, make_jobs):
    """A jobs process that runs, and whose ticks are further apart than anybody waits here."""
    one, stop = make_jobs(), threading.Event()
    one.config = Config.load(data, environ={"RELFLEET_JOBS_TICK_S": "60", "RELFLEET_JOBS_LEASE_S": "600"})
    ticking = threading.Thread(target=one.run, args=(stop,))
    ticking.start()
    wait_until(one.config.bell.exists)
    yield one
    stop.set()
    ticking.join(20)
    assert not ticking.is_alive()


def test_what_is_asked_in_a_web_process_is_signed_before_the_next_tick(
    published_targets, rarely, sign_in, config
):
    def names_the_cohort():
        signed = (config.repository / "metadata").glob("*.cohorts.json")
        return any("cohorts/demo/eu.json" in place.read_text() for place in signed)

    wait_until((config.repository / "metadata" / "timestamp.json").exists)
    asked = {"product": "demo", "name": "eu", "match": "region=eu", "release": "1.0"}
    assert sign_in("operator")("POST", "/cohorts", json=asked).status_code == 201
    wait_until(names_the_cohort, timeout_s=30)
