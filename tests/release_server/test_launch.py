"""How rollouts begin: drafts, approval, appointed times, ways, rehearsals; and how they are undone."""

from __future__ import annotations

from datetime import timedelta

import pytest

from agent_core.errors import ConflictError, NotAllowedError
from release_server import cohorts, explain, fleet, rehearsal, rollout_view, yanks
from release_server.models import AuditEntry
from release_server.stages import Stage
from release_server.terms import Terms, plan_digest
from tests.release_server.fleet_world import World

ALL = Stage(share_bp=10_000)
NIGHT = {
    "days": ["mon", "tue", "wed", "thu", "fri", "sat", "sun"],
    "from": "22:00",
    "to": "23:00",
    "zone": "UTC",
}


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    made.enroll_many(4)
    return made


def digest(world, rollout):
    with world.read() as session:
        view = rollout_view.show(session, rollout)
        return fleet.digest_of(view.rollout, view.spec)


def approve(world, actor, rollout, said=None):
    with world.write() as session:
        fleet.approve(session, world.clock(), actor, rollout, digest=said or digest(world, rollout))


def test_a_draft_offers_nothing_until_it_is_submitted(world):
    rollout = world.start("1.1.0", ALL, draft=True)
    world.tick(hours=2)
    assert world.status(rollout).state == "draft"
    assert not world.offered("1.1.0")
    world.call(fleet.resume, rollout)
    assert world.status(rollout).state == "running"
    assert world.events(rollout) == ["submitted", "started"]


def test_an_agent_that_failed_is_failed_until_a_newer_rollout_has_begun(world):
    host = next(iter(world.hosts.values()))
    world.finish(host, world.start("1.1.0", ALL), "rolled_back")
    world.tick(seconds=1)
    assert world.agent(host.id).state == "failed"
    draft = world.start("1.2.0", ALL, draft=True, supersede=True)
    assert world.agent(host.id).state == "failed", "a draft says nothing of how an agent is"
    world.call(fleet.resume, draft)
    assert world.agent(host.id).state != "failed"


def test_a_draft_leaves_the_rollout_before_alone_until_it_begins(world):
    first = world.start("1.1.0", Stage(count=1), ALL)
    world.call(fleet.pause, first)
    told = world.directive()
    second = world.start("1.2.0", ALL, draft=True)
    world.tick()
    assert (world.status(first).state, world.directive()) == ("paused", told)
    world.call(fleet.resume, second)
    assert (world.status(first).state, world.status(second).state) == ("superseded", "running")


def test_awaiting_approval_goes_on_by_a_second_person_alone(world):
    rollout = world.start("1.1.0", ALL, terms=Terms(approval=True))
    world.tick()
    assert world.status(rollout).state == "awaiting_approval"
    assert not world.offered("1.1.0")
    for herself in ("olga", "Olga", "olga/phone"):
        with pytest.raises(NotAllowedError) as caught:
            approve(world, herself, rollout)
        assert caught.value.reason == "self-approval"
    approve(world, "paul", rollout)
    assert world.status(rollout).state == "running"
    assert world.events(rollout) == ["awaiting-approval", "approved", "started"]


def test_an_approval_of_another_plan_is_refused(world):
    rollout = world.start("1.1.0", ALL, terms=Terms(approval=True))
    with pytest.raises(ConflictError) as caught:
        approve(world, "paul", rollout, "0" * 64)
    assert caught.value.reason == "changed"
    assert world.status(rollout).state == "awaiting_approval"


def test_whoever_submits_a_draft_does_not_approve_it(world):
    rollout = world.start("1.1.0", ALL, terms=Terms(approval=True), draft=True)
    with world.write() as session:
        fleet.resume(session, world.clock(), "paul", rollout)
    with pytest.raises(NotAllowedError):
        approve(world, "paul", rollout)
    approve(world, "rita", rollout)
    assert world.status(rollout).state == "running"


def test_a_cohort_may_ask_for_a_second_person_every_time(world):
    world.call(cohorts.edit, "demo", "all", approval=True)
    assert world.status(world.start("1.1.0", ALL)).state == "awaiting_approval"


@pytest.mark.parametrize(
    "change",
    [
        {"product": "other"},
        {"cohort": "other"},
        {"version": "1.2.0"},
        {"base": None},
        {"stages": (Stage(count=1),)},
        {"terms": Terms(downgrade=True)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_digest_names_all_of_a_plan(change):
    said = {"product": "demo", "cohort": "all", "version": "1.1.0", "stages": (ALL,), "base": "1.0.0"}
    said["terms"] = Terms()
    assert plan_digest(**said) != plan_digest(**said | change)


def test_an_appointed_rollout_begins_at_its_time_and_not_before(world):
    begins = world.clock() + timedelta(hours=3)
    rollout = world.start("1.1.0", ALL, terms=Terms(not_before=begins))
    world.tick(hours=2, minutes=59)
    assert (world.status(rollout).state, world.offered("1.1.0")) == ("scheduled", [])
    world.tick(minutes=1)
    assert world.status(rollout).state == "running"


def test_a_deadline_stands_still_outside_the_window(world):
    world.clock.step(hours=24 - world.clock().hour)  # midnight: the window is closed until 22:00
    world.call(cohorts.edit, "demo", "all", window=NIGHT)
    rollout = world.start("1.1.0", Stage(share_bp=10_000, deadline_s=900))
    world.heartbeats()
    world.tick(hours=4)
    assert (world.status(rollout).state, world.status(rollout).reason) == ("running", "outside-window")
    assert world.counters(rollout) == {}, "an agent that may not begin is not silent"
    world.tick(hours=18)
    assert world.status(rollout).reason == ""
    assert world.status(rollout).opened_at == world.clock()
    world.heartbeats()
    world.tick(seconds=901)
    assert world.status(rollout).stage_state == "halted"


def test_undo_takes_a_completed_rollout_back(world):
    rollout = world.start("1.1.0", ALL)
    for host in world.hosts.values():
        world.finish(host, rollout, "healthy")
    world.tick()
    assert (world.status(rollout).state, world.view().status.base) == ("completed", "1.1.0")
    world.call(fleet.undo, rollout)
    assert (world.status(rollout).state, world.view().status.base) == ("rolling_back", "1.0.0")
    assert len(world.offered("1.0.0")) == 4
    assert world.directive().rollback
    for host in world.hosts.values():
        host.version = "1.0.0"
        world.report(host)
    world.tick()
    assert world.status(rollout).state == "rolled_back"


def test_undo_is_refused_when_something_newer_has_begun(world):
    first = world.start("1.1.0", ALL)
    for host in world.hosts.values():
        world.finish(host, first, "healthy")
    world.tick()
    world.start("1.2.0", ALL)
    with pytest.raises(ConflictError) as caught:
        world.call(fleet.undo, first)
    assert caught.value.reason == "superseded"


def test_a_stepping_stone_is_named_and_a_dead_end_is_called_one(world):
    world.add_release("2.0.0", 5, upgrade_from_seq=4)
    world.add_release("3.0.0", 7, upgrade_from_seq=6)
    with pytest.raises(ConflictError) as caught:
        world.start("2.0.0", ALL)
    assert (caught.value.reason, caught.value.then) == ("stepping-stone", "release rollout start 1.2.0 first")
    with pytest.raises(ConflictError) as caught:
        world.start("3.0.0", ALL)
    assert caught.value.reason == "dead-end"


def test_a_barrier_is_reached_before_what_comes_after_it(world):
    world.add_release("2.0.0", 5, barrier=True)
    world.add_release("2.1.0", 6)
    with pytest.raises(ConflictError) as caught:
        world.start("2.1.0", ALL)
    assert caught.value.then == "release rollout start 2.0.0 first"


def test_no_way_leads_over_what_no_host_may_install(world):
    world.add_release("2.0.0", 5, barrier=True)
    world.add_release("2.1.0", 6)
    world.add_release("2.2.0", 7, upgrade_from_seq=6)
    world.add_release("2.3.0", 8, upgrade_from_seq=5)
    world.sign_policy(revoked_seq=(5,))
    with pytest.raises(ConflictError) as caught:
        world.start("2.2.0", ALL)
    assert caught.value.then == "release rollout start 2.1.0 first"
    with pytest.raises(ConflictError) as caught:
        world.start("2.3.0", ALL)
    assert caught.value.then == "release rollout start 2.1.0 first"
    world.start("2.1.0", ALL)


def test_a_pin_leads_nobody_to_what_no_host_would_install(world):
    world.add_release("2.0.0", 5, barrier=True)
    world.add_release("2.1.0", 6, upgrade_from_seq=5)
    with pytest.raises(ConflictError) as caught:
        world.call(cohorts.pin, "demo", "all", version="2.1.0", reason="in a hurry")
    assert (caught.value.reason, world.view().status.base) == ("stepping-stone", "1.0.0")
    for version in ("2.0.0", "2.1.0", "2.1.0", "0.9.0"):
        world.call(cohorts.pin, "demo", "all", version=version, reason="one by one")
        assert world.view().status.base == version


def test_a_downgrade_is_an_act_of_its_own_in_the_audit_log(world):
    rollout = world.start("0.9.0", ALL, terms=Terms(downgrade=True))
    assert world.status(rollout).state == "running"
    with world.read() as session:
        entry = session.query(AuditEntry).filter_by(action="rollout.start").one()
    assert entry.detail["downgrade"] is True


def test_a_stratified_first_stage_has_an_agent_of_each_site(world):
    for number in range(6):
        world.enroll(f"db-{number}", labels={"site": f"site-{number % 3}"})
    world.start("1.1.0", Stage(count=1), ALL, terms=Terms(stratified=True))
    sites = {host.labels.get("site") for host in world.offered("1.1.0")}
    assert sites == {None, "site-0", "site-1", "site-2"}


def test_canary_duty_goes_round(world):
    firsts = []
    for version in ("1.1.0", "1.2.0"):
        rollout = world.start(version, Stage(count=1), ALL)
        firsts += [host.id for host in world.offered(version)]
        world.call(fleet.abort, rollout)
    assert len(set(firsts)) == 2


def test_a_rehearsal_says_whom_each_stage_reaches_and_changes_nothing(world):
    with world.read() as session:
        said = rehearsal.rehearse(
            session,
            world.clock(),
            product="demo",
            cohort="all",
            version="1.1.0",
            stages=(Stage(count=1, soak_s=3600), ALL),
        )
    assert [stage["agents"] for stage in said["stages"]] == [1, 4]
    assert said["stages"][1]["opens_at"] > said["stages"][0]["opens_at"]
    assert said["done_at"] > said["stages"][1]["opens_at"]
    with world.read() as session:
        assert rollout_view.list_rollouts(session) == []


def test_a_rehearsal_that_would_halt_comes_to_an_end_too(world):
    said = {"product": "demo", "cohort": "all", "version": "1.1.0", "stages": (Stage(count=1, deadline_s=1),)}
    with world.read() as session:
        assert rehearsal.rehearse(session, world.clock(), **said)["done_at"] is None


# --- what was asked for one day and begins another ---------------------------------------------------------


def complete(world, rollout):
    for host in world.hosts.values():
        world.finish(host, rollout, "healthy")
    world.tick()
    assert world.status(rollout).state == "completed"


def pin_for_a_while(world, version):
    world.call(cohorts.pin, "demo", "all", version=version, reason="an emergency")
    world.call(cohorts.unpin, "demo", "all")
    world.tick(seconds=1)


def test_what_begins_later_begins_from_where_its_cohort_is_then_and_goes_back_there(world):
    first = world.start("1.1.0", ALL)
    second = world.start("1.2.0", ALL, draft=True, supersede=True)
    complete(world, first)
    assert world.rollout(second).base == "1.1.0"
    world.call(fleet.resume, second)
    complete(world, second)
    world.call(fleet.undo, second)
    assert world.view().status.base == world.directive().base == "1.1.0"


def test_an_approval_is_void_once_the_cohort_is_on_another_release(world):
    first = world.start("1.1.0", ALL)
    terms = Terms(approval=True, not_before=world.clock() + timedelta(days=1))
    second = world.start("1.2.0", ALL, terms=terms, supersede=True)
    approved = digest(world, second)
    approve(world, "paul", second)
    assert world.status(second).state == "scheduled"
    complete(world, first)
    world.tick(days=1)
    assert world.status(second).state == "awaiting_approval"
    with pytest.raises(ConflictError) as caught:
        approve(world, "paul", second, approved)
    assert caught.value.reason == "changed"
    approve(world, "paul", second)
    assert world.status(second).state == "running"


def test_what_its_cohort_went_past_before_it_began_never_leads_back(world):
    rollout = world.start("1.1.0", ALL, draft=True)
    pin_for_a_while(world, "1.2.0")
    assert (world.status(rollout).state, world.offered("1.1.0")) == ("superseded", [])
    with world.read() as session:
        said = explain.why_of_rollout(session, world.clock(), rollout)["chain"][0]["text"]
    assert said.endswith("by server: 1.1.0 is older than 1.2.0, which cohort all is on")


def test_what_its_cohort_went_past_while_it_was_paused_is_not_resumed(world):
    rollout = world.start("1.1.0", Stage(count=1), ALL)
    pin_for_a_while(world, "1.2.0")
    assert world.status(rollout).state == "paused"
    for again in (fleet.resume, fleet.retry):
        with pytest.raises(ConflictError) as caught:
            world.call(again, rollout)
        assert caught.value.reason == "older"
    assert not world.offered("1.1.0")


def test_a_pin_to_the_very_release_of_a_rollout_leaves_nobody_on_a_way_back_without_end(world):
    """It is how people give a release to all at once; what they are told to type then is not refused."""
    rollout = world.start("1.1.0", Stage(count=1), ALL)
    pin_for_a_while(world, "1.1.0")
    with world.read() as session:
        answer = explain.why_of_rollout(session, world.clock(), rollout)
    last = answer["chain"][-1]
    assert (last["code"], last["then"]) == ("gone-past", f"release rollout abort r-{rollout}")
    assert last["text"] == "cohort all is on 1.1.0 already: it cannot go on"
    with pytest.raises(ConflictError) as caught:
        world.call(fleet.resume, rollout)
    assert (caught.value.reason, caught.value.then) == ("already-there", last["then"])
    for back in ({"rollback": True}, None):
        with pytest.raises(ConflictError) as caught:
            world.call(fleet.undo, rollout) if back is None else world.call(fleet.abort, rollout, **back)
        assert caught.value.then == "to go back all the same: release cohort pin all 1.0.0"
    world.call(fleet.abort, rollout)
    assert world.status(rollout).state == "aborted"


def test_what_was_approved_from_one_release_does_not_go_on_from_another(world):
    rollout = world.start("1.2.0", ALL, terms=Terms(approval=True))
    world.tick()
    approve(world, "paul", rollout)
    world.tick()
    pin_for_a_while(world, "1.1.0")
    world.tick()
    assert world.status(rollout).state == "paused"
    for again in (fleet.resume, fleet.retry):
        with pytest.raises(ConflictError) as caught:
            world.call(again, rollout)
        assert caught.value.reason == "changed"
    assert world.status(rollout).state == "paused"
    with world.read() as session:
        said = explain.why_of_rollout(session, world.clock(), rollout)["chain"][-1]
    assert f"r-{rollout} was approved from 1.0.0, and cohort all is on 1.1.0" in said["text"]


def test_a_release_that_was_yanked_meanwhile_is_not_approved(world):
    rollout = world.start("1.1.0", ALL, terms=Terms(approval=True))
    world.call(yanks.yank, "demo", "1.1.0", "it burns")
    with pytest.raises(ConflictError) as caught:
        approve(world, "paul", rollout)
    assert caught.value.reason == "yanked"
    assert world.status(rollout).state == "awaiting_approval"


def test_an_older_release_is_no_newer_because_the_cohort_is_on_a_yanked_one(world):
    world.call(yanks.yank, "demo", "1.0.0", "it burns")
    with pytest.raises(ConflictError) as caught:
        world.start("0.9.0", ALL)
    assert caught.value.reason == "older"
    world.start("1.1.0", ALL)
