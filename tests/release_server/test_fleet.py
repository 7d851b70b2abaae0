"""Rollouts on a real database: agents report, the clock is stepped, and nothing but the tables remembers."""

from __future__ import annotations

import itertools
from datetime import timedelta

import pytest
from sqlalchemy import select, update

from agent_core.directive import bucket, progress_for
from agent_core.errors import ConflictError, NotFoundError, UsageError
from agent_core.wire import Mode, Phase
from release_server import agents, attempts, cohorts, fleet, launch, rollout_view, specs
from release_server.database import Sessions, make_engine
from release_server.models import AuditEntry, Cohort, Lease, RolloutCounter, RolloutStatus
from release_server.presence import with_gap
from release_server.rollout import State, Status
from release_server.stages import Stage
from release_server.terms import Terms
from tests.release_server.fleet_world import World

ONE_THEN_ALL = (Stage(count=1), Stage(share_bp=10_000))


@pytest.fixture
def world(sessions, clock):
    return World(sessions, clock)


def test_a_good_release_reaches_everyone_stage_by_stage_and_becomes_the_base(world):
    world.cohort()
    hosts = world.enroll_many(10)
    rollout = world.start("1.1.0", Stage(count=1, soak_s=60), Stage(share_bp=5000), Stage(share_bp=10_000))
    assert world.status(rollout).state == "running"
    for reach in (1, 5, 10):
        offered = world.offered("1.1.0")
        assert len(offered) == reach - sum(host.version == "1.1.0" for host in hosts)
        for host in offered:
            world.finish(host, rollout, "healthy")
        world.tick(seconds=1)
        world.tick(seconds=61)
    assert world.status(rollout).state == "completed"
    assert world.view().status.base == "1.1.0"
    assert world.directive().release == "1.1.0"
    assert world.counters(rollout) == {"healthy": 10}
    assert world.events(rollout)[0] == "started"
    assert world.events(rollout)[-1] == "completed"


def test_one_failure_halts_and_the_others_never_see_the_release(world):
    world.cohort()
    world.enroll_many(8)
    rollout = world.start("1.1.0")
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "rolled_back", "workload-exited", "exit code 1")
    assert world.tick(seconds=1)
    status = world.status(rollout)
    assert (status.state, status.stage_state, status.reason) == ("paused", "halted", "max-failed")
    assert status.detail == "1 of 1 failed (limit 0)"
    assert world.directive().mode is Mode.SUSPENDED
    assert world.offered("1.1.0") == []
    attempt = world.attempt(first, rollout)
    assert (attempt.state, attempt.reason, attempt.detail) == (
        "rolled_back",
        "workload-exited",
        "exit code 1",
    )
    assert world.agent(first.id).state == "failed"
    assert not world.tick(hours=10)


def test_a_restart_of_the_server_forgets_nothing(world, config, clock):
    world.cohort()
    world.enroll_many(4)
    rollout = world.start("1.1.0", Stage(count=1, soak_s=600), *ONE_THEN_ALL[1:])
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "healthy")
    world.tick(seconds=1)
    assert world.status(rollout).stage_state == "soaking"
    world.sessions.close()
    world.sessions = Sessions(make_engine(config.database_url))
    world.tick(seconds=599)
    assert world.status(rollout).stage_state == "soaking"
    world.tick(seconds=2)
    assert world.status(rollout).stage == 1
    world.finish(world.offered("1.1.0")[0], rollout, "rolled_back")
    world.tick(seconds=1)
    world.sessions.close()
    world.sessions = Sessions(make_engine(config.database_url))
    world.tick(hours=1)
    assert world.status(rollout).stage_state == "halted"
    world.sessions.close()


def test_a_failure_of_an_earlier_stage_halts_a_later_one(world):
    world.cohort()
    world.enroll_many(6)
    rollout = world.start()
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "healthy")
    world.tick(seconds=1)
    assert world.status(rollout).stage == 1
    told = world.rollout(rollout)
    world.report(first, first.step(world.clock(), "rolled_back", "1.1.0", told.salt, "operator"))
    world.tick(seconds=1)
    assert (world.status(rollout).stage, world.status(rollout).stage_state) == (1, "halted")
    assert world.counters(rollout) == {"rolled_back": 1}


def test_two_stages_failing_in_the_same_instant_halt_once_and_stay_halted(world):
    world.cohort()
    world.enroll_many(6)
    rollout = world.start()
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "healthy")
    world.tick(seconds=1)
    second = world.offered("1.1.0")[0]
    told = world.rollout(rollout)
    world.report(first, first.step(world.clock(), "failed", "1.1.0", told.salt))
    world.finish(second, rollout, "rolled_back")
    world.tick()
    world.tick()
    assert world.status(rollout).detail == "2 of 6 failed (limit 0)"
    assert world.events(rollout).count("halted") == 1


def test_two_rollouts_failing_in_the_same_tick_both_halt(world):
    rollouts = []
    for name in ("eu", "us"):
        world.cohort(name, match=f"region={name}")
        world.enroll(f"{name}-1", labels={"region": name})
        rollouts.append(world.start(cohort=name))
    for rollout, host in zip(rollouts, world.hosts.values(), strict=True):
        world.finish(host, rollout, "failed")
    world.tick()
    assert [world.status(rollout).stage_state for rollout in rollouts] == ["halted", "halted"]


def test_a_status_seen_before_a_halt_cannot_be_stored_over_it(world):
    """The loser of two that saw the same status stores nothing: compare-and-swap on the edition."""
    world.cohort()
    world.enroll_many(3)
    rollout = world.start()
    with world.read() as session:
        seen = session.get_one(RolloutStatus, rollout)
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "rolled_back")
    world.tick()
    with pytest.raises(ConflictError), world.write() as session:
        fleet._store(session, world.clock(), seen, Status(State.RUNNING, stage=1))
    assert world.status(rollout).stage_state == "halted"


def test_a_mistake_in_one_rollout_does_not_stop_the_others(world, caplog):
    for name in ("eu", "us"):
        world.cohort(name, match=f"region={name}")
        world.enroll(f"{name}-1", labels={"region": name})
    broken, sound = world.start(cohort="eu"), world.start(cohort="us")
    with world.write() as session:
        session.execute(
            update(RolloutStatus).where(RolloutStatus.rollout_id == broken).values(stage_state="?")
        )
    world.finish(world.hosts["us-1"], sound, "healthy")
    world.tick()
    assert world.status(sound).state == "completed"
    assert "could not be reconciled" in caplog.text


# --- who counts ------------------------------------------------------------------------------------------


def test_an_empty_cohort_waits_for_its_first_agent(world):
    world.cohort()
    rollout = world.start()
    for _ in range(3):
        world.tick(days=1)
    status = world.status(rollout)
    assert (status.state, status.stage_state, status.reason) == ("running", "open", "no-agents")
    host = world.enroll("late")
    world.tick()
    assert world.offered("1.1.0") == [host]
    world.finish(host, rollout, "healthy")
    world.tick()
    assert world.status(rollout).state == "completed"


def test_an_agent_silent_past_the_deadline_counts_as_failed(world):
    world.cohort()
    world.enroll_many(5)
    rollout = world.start("1.1.0", Stage(count=1, deadline_s=600), Stage(share_bp=10_000))
    world.tick(seconds=599)
    assert world.status(rollout).state == "running"
    world.tick(seconds=2)
    status = world.status(rollout)
    assert (status.stage_state, status.detail) == ("halted", "1 of 1 failed (limit 0)")
    assert world.counters(rollout) == {"silent": 1}


def test_nobody_is_silent_to_a_server_that_was_away_itself(world):
    world.cohort(poll_s=60, report_s=300)
    world.enroll_many(5)
    rollout = world.start("1.1.0", Stage(count=1, deadline_s=1_000), Stage(share_bp=10_000))
    world.clock.step(hours=9)
    with world.write() as session:
        gaps = with_gap([], world.clock() - timedelta(hours=9), world.clock())
        session.add(Lease(name=Lease.JOBS, holder="", fence=1, until=world.clock(), gaps=gaps))
    settles, rest = 300 + 30, 1_000 - (300 + 30) / 3
    world.tick(seconds=settles + rest - 1)
    assert (world.status(rollout).state, world.counters(rollout).get("silent", 0)) == ("running", 0)
    world.tick(seconds=1)
    assert (world.status(rollout).state, world.counters(rollout)) == ("paused", {"silent": 1})


def test_an_agent_that_reports_but_does_not_finish_halts_by_the_deadline(world):
    world.cohort()
    world.enroll_many(3)
    rollout = world.start("1.1.0", Stage(count=1, deadline_s=600), Stage(share_bp=10_000))
    world.clock.step(seconds=599)
    world.heartbeats()
    world.tick(seconds=2)
    assert (world.status(rollout).stage_state, world.status(rollout).reason) == ("halted", "deadline")


def test_a_silent_agent_that_is_heard_again_is_waited_for(world):
    world.cohort()
    world.enroll_many(4)
    stage = Stage(share_bp=10_000, deadline_s=600, max_failed=3)
    rollout = world.start("1.1.0", stage)
    first, *others = world.offered("1.1.0")
    world.tick(seconds=598)
    for host in others:
        world.finish(host, rollout, "healthy")
    world.tick(seconds=3)
    assert world.counters(rollout) == {"healthy": 3, "silent": 1}
    assert world.status(rollout).state == "completed"
    world.finish(first, rollout, "healthy")
    assert world.counters(rollout) == {"healthy": 4}


def test_a_silent_agent_back_while_the_rollout_runs_is_offered_the_release_again(world):
    world.cohort()
    world.enroll_many(2)
    stage = Stage(share_bp=10_000, deadline_s=600, max_silent=1, soak_s=3600)
    rollout = world.start("1.1.0", stage)
    away, other = world.offered("1.1.0")
    world.tick(seconds=598)
    world.finish(other, rollout, "healthy")
    world.tick(seconds=3)
    assert world.status(rollout).stage_state == "soaking"
    world.report(away)
    world.tick(seconds=1)
    assert world.attempt(away, rollout).state == "offered"
    assert world.status(rollout).stage_state == "open"


def test_an_agent_that_runs_the_release_already_is_healthy_without_a_word(world):
    world.cohort()
    world.enroll("a", version="1.1.0")
    rollout = world.start()
    assert world.status(rollout).state == "completed"
    assert world.counters(rollout) == {"healthy": 1}


def test_held_agents_are_named_and_neither_wait_nor_fail(world):
    world.cohort()
    hosts = world.enroll_many(3)
    world.report(hosts[0], held=True)
    rollout = world.start("1.1.0", Stage(share_bp=10_000))
    for host in hosts[1:]:
        world.finish(host, rollout, "healthy")
    world.tick()
    assert world.status(rollout).state == "completed"
    with world.read() as session:
        seen = rollout_view.events(session, rollout)
        passed = next(event for event in seen if event.event == "stage-passed")
    assert passed.detail == "2 of 3 healthy; 1 set aside: web-00"


def test_a_stage_of_held_agents_only_does_not_turn_green(world):
    world.cohort()
    world.report(world.enroll("a"), held=True)
    rollout = world.start("1.1.0", Stage(share_bp=10_000, deadline_s=600))
    assert world.status(rollout).reason == "min-sample"
    world.tick(seconds=601)
    assert (world.status(rollout).stage_state, world.status(rollout).reason) == ("halted", "min-sample")


def test_an_agent_that_says_it_cannot_take_the_release_stands_aside(world):
    world.cohort()
    first, second = world.enroll_many(2)
    rollout = world.start("1.1.0", Stage(share_bp=10_000))
    world.finish(second, rollout, "healthy")
    world.tick(seconds=1)
    assert world.status(rollout).state == "running"
    world.clock.step(seconds=150)
    world.report(first, reason="no-bundle")
    world.tick()
    assert world.status(rollout).state == "completed"


def test_a_retired_agent_is_waited_for_no_longer(world):
    world.cohort()
    first, second = world.enroll_many(2)
    rollout = world.start("1.1.0", Stage(share_bp=10_000))
    world.finish(first, rollout, "healthy")
    world.tick()
    assert world.status(rollout).state == "running"
    world.call(agents.retire, second.id)
    world.tick()
    assert world.status(rollout).state == "completed"


# --- what people ask -------------------------------------------------------------------------------------


def test_pause_and_resume(world):
    world.cohort()
    world.enroll_many(3)
    rollout = world.start()
    world.call(fleet.pause, rollout, reason="lunch")
    assert world.status(rollout).state == "paused"
    assert world.directive().mode is Mode.SUSPENDED
    world.call(fleet.resume, rollout)
    assert world.status(rollout).state == "running"
    assert world.directive().mode is Mode.ENABLED
    with world.read() as session:
        assert [event.actor for event in rollout_view.events(session, rollout)] == ["olga", "olga", "olga"]
        actions = session.scalars(select(AuditEntry.action).where(AuditEntry.actor == "olga")).all()
    assert actions[-3:] == ["rollout.start", "rollout.pause", "rollout.resume"]


def test_resuming_a_halt_goes_on_and_halts_again_at_the_next_failure(world):
    world.cohort()
    world.enroll_many(4)
    rollout = world.start()
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "rolled_back")
    world.tick()
    world.call(fleet.resume, rollout, reason="known disk fault")
    assert world.status(rollout).state == "running"
    assert world.status(rollout).tolerated == 1
    world.tick()
    assert world.status(rollout).stage == 1
    second = next(host for host in world.offered("1.1.0") if host is not first)
    world.finish(second, rollout, "rolled_back")
    world.tick()
    assert world.status(rollout).detail == "2 of 4 failed (limit 0, 1 tolerated)"


def test_advance_opens_the_next_stage_at_once(world):
    world.cohort()
    world.enroll_many(4)
    rollout = world.start()
    world.call(fleet.advance, rollout, reason="hurry")
    assert (world.status(rollout).stage, world.directive().progress) == (1, 10_000)
    world.call(fleet.advance, rollout)
    assert world.status(rollout).state == "completed"


def test_abort_leaves_agents_where_they_are(world):
    world.cohort()
    world.enroll_many(3)
    rollout = world.start()
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "healthy")
    world.call(fleet.abort, rollout, reason="no")
    assert world.status(rollout).state == "aborted"
    assert world.offered("1.1.0") == []
    assert world.offered("1.0.0") == []
    newcomer = world.enroll("new", version="")
    assert world.offered("1.0.0") == [newcomer]


def test_abort_with_rollback_takes_agents_back_and_ends_when_they_are(world):
    world.cohort()
    world.enroll_many(4)
    rollout = world.start()
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "healthy")
    world.tick()
    world.call(fleet.abort, rollout, rollback=True)
    assert world.status(rollout).state == "rolling_back"
    told = world.directive()
    assert (told.release, told.rollback, told.progress) == ("1.0.0", True, 10_000)
    assert world.offered("1.0.0") == [first]
    first.version = "1.0.0"
    world.report(first, first.step(world.clock(), "healthy", "1.0.0", world.rollout(rollout).salt))
    world.tick()
    assert world.status(rollout).state == "rolled_back"
    assert world.counters(rollout) == {"rolled_back": 1}
    assert world.attempt(first, rollout).reason == "go-back"
    assert world.agent(first.id).state == "ok"


def test_a_rollback_waits_for_a_trial_and_not_for_a_dead_host(world):
    world.cohort()
    first, second = world.enroll_many(2)
    rollout = world.start("1.1.0", Stage(share_bp=10_000))
    told = world.rollout(rollout)
    world.report(first, first.step(world.clock(), "trial", "1.1.0", told.salt), phase=Phase.TRIAL)
    world.finish(second, rollout, "healthy")
    world.call(fleet.abort, rollout, rollback=True)
    second.version = "1.0.0"
    world.report(second)
    assert not world.tick(seconds=1)
    world.tick(minutes=10)
    assert world.status(rollout).state == "rolled_back"


def test_an_aborted_rollout_can_still_be_taken_back_until_another_takes_its_place(world):
    world.cohort()
    world.enroll_many(2)
    rollout = world.start()
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "healthy")
    world.call(fleet.abort, rollout)
    world.call(fleet.abort, rollout, rollback=True)
    assert world.status(rollout).state == "rolling_back"
    first.version = "1.0.0"
    world.report(first)
    world.tick()
    other = world.start("1.2.0")
    world.call(fleet.abort, other)
    world.start("1.1.0")
    with pytest.raises(ConflictError) as refused:
        world.call(fleet.abort, other, rollback=True)
    assert refused.value.reason == "superseded"
    assert "release cohort pin all 1.0.0" in refused.value.then


def test_a_first_rollout_has_nothing_to_go_back_to(world):
    world.cohort(release=None)
    world.enroll("a", version="")
    rollout = world.start("1.0.0")
    with pytest.raises(ConflictError):
        world.call(fleet.abort, rollout, rollback=True)
    assert world.status(rollout).state == "running"


def test_retry_lets_agents_that_failed_begin_anew(world):
    world.cohort()
    world.enroll_many(3)
    rollout = world.start()
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "rolled_back")
    world.tick()
    epoch = world.directive().retry_epoch
    world.call(fleet.retry, rollout, reason="fixed the disk")
    assert world.status(rollout).state == "running"
    assert world.directive().retry_epoch == epoch + 1
    assert world.counters(rollout) == {"offered": 1}
    assert not world.tick(seconds=1)
    world.finish(first, rollout, "healthy")
    world.tick()
    assert (world.status(rollout).stage, world.status(rollout).tolerated) == (1, 0)


@pytest.mark.parametrize(("way", "then"), [("draft", "abort"), ("undo", "status --watch")])
def test_what_stands_in_the_way_of_a_rollout_comes_with_what_is_not_refused_there(world, way, then):
    world.cohort()
    world.enroll_many(2)
    first = world.start("1.1.0", draft=way == "draft")
    if way == "undo":
        world.finish(world.offered("1.1.0")[0], first, "healthy")
        world.call(fleet.undo, first)
    with pytest.raises(ConflictError) as refused:
        world.start("1.2.0")
    assert refused.value.then == f"release rollout {then} r-{first}, or --supersede"


def test_a_second_rollout_in_a_cohort_is_refused_unless_it_supersedes(world):
    world.cohort()
    world.enroll_many(2)
    first = world.start("1.1.0")
    with pytest.raises(ConflictError) as refused:
        world.start("1.2.0")
    assert (refused.value.reason, refused.value.then) == (
        "busy",
        f"release rollout pause r-{first}, or --supersede",
    )
    second = world.start("1.2.0", supersede=True)
    assert world.status(first).state == "superseded"
    assert world.directive().release == "1.2.0"
    assert world.status(second).state == "running"


def test_a_halted_rollout_makes_way_for_the_fix(world):
    world.cohort()
    world.enroll_many(2)
    first = world.start("1.1.0")
    world.finish(world.offered("1.1.0")[0], first, "rolled_back")
    world.tick()
    world.start("1.2.0")
    assert world.status(first).state == "superseded"
    world.tick(hours=1)
    assert world.status(first).state == "superseded"


@pytest.mark.parametrize(
    ("act", "state"),
    [
        (fleet.resume, "running"),
        (fleet.pause, "completed"),
        (fleet.advance, "completed"),
        (fleet.abort, "completed"),
        (fleet.pause, "paused"),
        (fleet.advance, "paused"),
        (fleet.retry, "aborted"),
        (fleet.resume, "aborted"),
    ],
)
def test_what_a_state_does_not_allow_is_refused_with_the_state(world, act, state):
    world.cohort()
    world.enroll("a")
    rollout = world.start()
    if state == "completed":
        world.finish(world.hosts["a"], rollout, "healthy")
        world.tick()
    if state == "paused":
        world.call(fleet.pause, rollout)
    if state == "aborted":
        world.call(fleet.abort, rollout)
    with pytest.raises(ConflictError) as refused:
        world.call(act, rollout)
    assert state in refused.value.why


def test_a_rollout_that_does_not_exist_is_not_found(world):
    for act in (fleet.pause, fleet.resume, fleet.advance, fleet.abort, fleet.retry):
        with pytest.raises(NotFoundError):
            world.call(act, 99)
    with pytest.raises(NotFoundError), world.read() as session:
        rollout_view.show(session, 99)


def test_a_rollout_needs_a_release_a_cohort_and_stages(world):
    world.cohort()
    with pytest.raises(NotFoundError):
        world.start("9.9.9")
    with pytest.raises(NotFoundError):
        world.start(cohort="none")
    with pytest.raises(UsageError):
        world.call(launch.start_rollout, product="demo", cohort="all", version="1.1.0", stages=[])
    with pytest.raises(ConflictError) as refused:
        world.start("1.0.0")
    assert refused.value.reason == "already-there"


# --- pins and freezes ------------------------------------------------------------------------------------


def test_a_pin_is_obeyed_over_a_running_rollout_which_pauses(world):
    world.cohort()
    world.enroll_many(3)
    rollout = world.start()
    (first,) = world.offered("1.1.0")
    world.finish(first, rollout, "healthy")
    world.call(cohorts.pin, "demo", "all", version="1.0.0", reason="audit")
    told = world.directive()
    assert (told.release, told.base, told.progress, told.rollback) == ("1.0.0", "1.0.0", 10_000, True)
    assert world.offered("1.0.0") == [first]
    world.tick()
    assert (world.status(rollout).state, world.status(rollout).reason) == ("paused", "pinned")
    for act in (lambda: world.call(fleet.resume, rollout), lambda: world.start("1.2.0")):
        with pytest.raises(ConflictError) as refused:
            act()
        assert refused.value.reason == "pinned"


def test_taking_a_pin_off_moves_nobody_until_a_rollout_goes_on(world):
    world.cohort()
    world.enroll_many(3)
    rollout = world.start()
    world.call(cohorts.pin, "demo", "all", version="0.9.0")
    world.tick()
    for host in world.hosts.values():
        host.version = "0.9.0"
    world.heartbeats()
    world.call(cohorts.unpin, "demo", "all")
    assert world.offered("1.0.0") == world.offered("1.1.0") == []
    world.call(fleet.resume, rollout)
    assert len(world.offered("1.1.0")) == 1
    assert world.directive().base == "0.9.0"


def test_a_frozen_cohort_offers_nothing_and_its_rollout_goes_on_when_the_freeze_ends_by_itself(world):
    world.cohort()
    world.enroll_many(3)
    rollout = world.start("1.1.0", Stage(count=1, deadline_s=60), Stage(share_bp=10_000))
    until = world.clock() + timedelta(hours=2)
    world.call(cohorts.freeze, "demo", "all", until=until, reason="fair")
    assert world.offered("1.1.0") == []
    world.tick()
    assert world.status(rollout).reason == "frozen"
    with pytest.raises(ConflictError) as refused:
        world.start("1.2.0")
    assert refused.value.reason == "frozen"
    world.tick(hours=1)
    assert world.status(rollout).state == "running"
    world.tick(hours=1)
    assert world.directive().mode is Mode.ENABLED
    assert len(world.offered("1.1.0")) == 1
    assert world.status(rollout).stage_state == "open"


def test_unfreezing_resumes_as_before(world):
    world.cohort()
    world.enroll_many(3)
    world.start()
    offered = world.offered("1.1.0")
    world.call(cohorts.freeze, "demo", "all")
    world.tick(hours=1)
    world.call(cohorts.unfreeze, "demo", "all")
    world.tick()
    assert world.offered("1.1.0") == offered


# --- directives ------------------------------------------------------------------------------------------


def test_a_directive_grows_its_revision_only_when_it_says_something_new(world):
    world.cohort()
    world.enroll_many(2)
    assert world.directive().revision == world.settled().directive_revision == 1
    rollout = world.start("1.1.0", Stage(count=1, soak_s=60), Stage(share_bp=10_000))
    assert world.directive().revision == 2
    world.tick(seconds=1)
    world.finish(world.offered("1.1.0")[0], rollout, "healthy")
    world.tick(seconds=1)
    assert world.status(rollout).stage_state == "soaking"
    assert world.directive().revision == 2


def test_an_idle_tick_writes_nothing(world):
    world.cohort()
    world.enroll_many(2)
    rollout = world.start()
    world.call(fleet.pause, rollout)
    before = world.status(rollout).edition
    assert not world.tick(seconds=1)
    assert world.status(rollout).edition == before


def test_a_wish_written_by_another_process_is_answered_at_the_next_tick(world):
    world.cohort()
    world.enroll_many(2)
    rollout = world.start()
    world.call(fleet.pause, rollout)
    with world.write() as session:
        specs.ask(session, world.clock(), "olga", rollout, wanted=fleet.Wanted.RESUME, reason="")
    assert world.tick()
    assert world.status(rollout).state == "running"


def test_a_rollout_back_to_an_older_release_lets_agents_go_back(world):
    world.cohort()
    world.enroll("a")
    forward = world.start("1.1.0")
    world.finish(world.hosts["a"], forward, "healthy")
    world.tick()
    with pytest.raises(ConflictError) as caught:
        world.start("1.0.0")
    assert caught.value.reason == "older", "nobody asked for a downgrade"
    back = world.start("1.0.0", terms=Terms(downgrade=True))
    assert world.directive().rollback
    world.finish(world.hosts["a"], back, "healthy")
    world.tick()
    assert world.view().status.base == "1.0.0"
    assert world.directive().rollback, "an agent that was away still has to come back"


def test_each_rollout_shuffles_anew(world):
    world.cohort()
    world.enroll_many(12)
    firsts = set()
    for version in ("1.1.0", "1.2.0", "0.9.0", "1.1.0", "1.2.0"):
        rollout = world.start(version, terms=Terms(downgrade=True))
        firsts |= {host.id for host in world.offered(version)}
        world.call(fleet.abort, rollout)
    assert len(firsts) > 1


def test_rollouts_are_listed_the_newest_first_with_their_counters(world):
    world.cohort()
    world.cohort("other", match="none")
    world.enroll("a")
    first, second = world.start("1.1.0"), world.start(cohort="other")
    world.finish(world.hosts["a"], first, "healthy")
    with world.read() as session:
        assert [view.rollout.id for view in rollout_view.list_rollouts(session)] == [second, first]
        (view,) = rollout_view.list_rollouts(session, product="demo", cohort="all")
        assert (view.members, view.counters["healthy"], len(view.counters)) == (1, 1, 9)
        assert [view.rollout.id for view in rollout_view.list_rollouts(session, limit=1)] == [second]
        assert [view.rollout.id for view in rollout_view.list_rollouts(session, after=second)] == [first]


def test_a_recount_finds_a_counter_that_is_wrong(world):
    world.cohort()
    world.enroll("a")
    rollout = world.start()
    with world.write() as session:
        session.execute(update(RolloutCounter).where(RolloutCounter.state == "healthy").values(count=7))
        assert attempts.counters(session, rollout) != attempts.recount(session, rollout)


def test_a_cohort_with_a_rollout_going_on_is_not_deleted(world):
    world.cohort()
    rollout = world.start()
    with pytest.raises(ConflictError):
        world.call(cohorts.delete, "demo", "all")
    world.call(fleet.abort, rollout)
    world.call(cohorts.delete, "demo", "all")
    with world.read() as session:
        assert session.scalar(select(Cohort).where(Cohort.deleted_at.is_(None))) is None


def test_a_canary_of_one_is_one_although_two_agents_share_a_place(world, monkeypatch):
    world.cohort()
    hosts = world.enroll_many(12)
    names = [host.id for host in hosts]

    def canaries(salt):
        return sum(bucket(name, salt) < progress_for(names, salt, 1) for name in names)

    shared = next(salt for salt in map(str, itertools.count()) if canaries(salt) == 2)
    alone = next(salt for salt in map(str, itertools.count()) if canaries(salt) == 1)
    salts = iter([shared, alone])
    monkeypatch.setattr(launch.secrets, "token_hex", lambda _: next(salts))
    world.start("1.1.0", *ONE_THEN_ALL)
    assert len(world.offered("1.1.0")) == 1
