"""What is foretold of a fleet is what the census and `reconcile` come to when they are stepped there."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from agent_core.clock import parse_iso
from agent_core.wire import AttemptState
from release_server import explain, members, standing
from release_server.foresight import Allowance, foresee
from release_server.hearing import NEVER, Hearing
from release_server.members import Look, Member, Outlook
from release_server.models import Lease
from release_server.presence import with_gap
from release_server.rollout import Counters, Spec, StageState, State, Status, reconcile
from release_server.stages import Stage
from tests.release_server.fleet_world import World

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)  # a Monday
SECOND, MINUTE, DAY = timedelta(seconds=1), timedelta(minutes=1), timedelta(days=1)
JUST_BACK = ((NOW - 20 * MINUTE, NOW - 2 * MINUTE),)
AWAY = (
    (),
    (),
    JUST_BACK,
    ((NOW - DAY, NOW - 30 * MINUTE),),
    tuple((NOW - each * MINUTE, NOW - each * MINUTE + 20 * SECOND) for each in range(40, 0, -2)),
    ((NOW - 5 * MINUTE, NEVER),),
)
LUNCH = Allowance(calendar={"lunch": "mon 12:10-13:00 UTC"})


class Dice(random.Random):
    """Throws a fleet, of which some agents are on time and others late or long silent."""

    def member(self, number, *, away):
        attempt = self.choice([None, "offered", "downloading", "staged", "healthy", "failed", "silent"])
        quiet = self.choice([0, 30, 100, 151, 200, 211, 900, 8_000])
        seen_at = NOW - timedelta(seconds=quiet + (700 if away else 0))
        version = "1.1.0" if attempt == "healthy" or (self.random() < 0.1 and not away) else "1.0.0"
        joined = NOW - timedelta(seconds=self.choice([9_000, 9_000, 100]))
        held = self.random() < 0.05
        return Member(
            f"web-{number}",
            number * 1_000,
            min(joined, seen_at),
            seen_at,
            version,
            "idle",
            "",
            held,
            attempt,
        )

    def outlook(self):
        gaps = self.choice(AWAY)
        away = gaps == JUST_BACK
        there = [self.member(number, away=away) for number in range(self.choice([3, 10]))]
        state = self.choice([State.RUNNING, State.RUNNING, State.RUNNING, State.ROLLING_BACK])
        stage = Stage(
            share_bp=10_000,
            soak_s=self.choice([0, 600]),
            max_failed=self.choice([0, 3, 5]),
            max_silent=self.choice([None, None, 2]),
            deadline_s=self.choice([60, 1_000, 3_600]),
        )
        soaking = state is State.RUNNING and self.random() < 0.2
        opened = NOW - timedelta(seconds=self.choice([0, 300, 2_000]))
        status = Status(
            state,
            stage_state=StageState.SOAKING if soaking else StageState.OPEN,
            progress=self.choice([5_000, 10_000]),
            opened_at=opened,
            soaking_since=opened if soaking else None,
            spec_revision=1,
        )
        look = Look(
            "1.1.0", Spec((stage,)), status, NOW, MINUTE, MINUTE, Hearing(gaps, standing.back_after(MINUTE))
        )
        return Outlook(look, there, Counters(attempts=tally(there), candidates=(10_000,)))


def tally(there):
    return Counter(AttemptState(member.attempt) for member in there if member.attempt)


def really(outlook, allowance, moments):
    """The first event that the census and `reconcile` come to, stepped through the moments, and when."""
    there, status = list(outlook.members), outlook.look.status
    quiet = outlook._quiet
    for moment in moments:
        spec = allowance.at(outlook.look.spec, moment)
        look = replace(outlook.look, spec=spec, status=status, now=moment)
        if moment > NOW:
            there = [each if each.id in quiet else each._replace(seen_at=moment) for each in there]
        if look.corrects:
            there = [corrected(look, each) if each.place < status.progress else each for each in there]
        reached = [member for member in there if member.place < status.progress]
        counted = members.count(look, there, reached, replace(outlook.counters, attempts=tally(there)))
        following = reconcile(spec, status, counted, moment)
        if following.events:
            return moment, following.events[-1]
        status = following.status
    return None


def corrected(look, member):
    now = members.truth(look, member)
    return member if now is None else member._replace(attempt=str(now[0]))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32))
def test_a_forecast_is_what_the_stepped_census_and_reconciler_come_to(seed):
    dice = Dice(seed)
    for _ in range(10):
        foretold_as_stepped(dice.outlook(), dice.choice([Allowance(), Allowance(), LUNCH]), dice)


def foretold_as_stepped(outlook, allowance, dice):
    move = foresee(outlook.look.spec, outlook.look.status, outlook, NOW, allowance)
    end = NOW + timedelta(days=2) if move is None else move.at
    on_the_way = {NOW + (end - NOW) * dice.random() for _ in range(12)}
    falls = {at for member in outlook.members for at in turning(outlook, member)}
    moments = sorted(
        {NOW, end, max(NOW, end - SECOND), *on_the_way, *(at for at in falls if NOW <= at <= end)}
    )
    came = really(outlook, allowance, moments)
    assert came == (None if move is None else (move.at, move.event))


def turning(outlook, member):
    """Moments at which a time is up: as a ticking server does, none is stepped over."""
    look, stage = outlook.look, outlook.look.spec.stages[0]
    opened, now, began = look.status.opened_at, timedelta(), max(look.status.opened_at, member.enrolled_at)
    allowed, soak = (timedelta(seconds=each) for each in (stage.deadline_s, stage.soak_s))
    own = ((member.seen_at, look.silent_after), (began, allowed))
    for span in (*own, (opened, allowed), (opened, soak), (NOW, now)):
        at = look.hearing.ends(*span)
        if at != NEVER:
            yield from (at, members.whole(at)) if span != own[0] else (members.whole(at),)


class Counting(dict):
    """A calendar that counts how often its entries are gone through."""

    reads = 0

    def items(self):
        self.reads += 1
        return super().items()


def test_of_many_late_agents_the_calendar_is_read_once_for_each_of_its_changes():
    late = [
        Member(f"h{n}", n, NOW - DAY, seen, "1.0.0", "idle", "", False, "offered")
        for n, seen in enumerate(NOW - 160 * SECOND - n * SECOND / 5 for n in range(200))
    ]
    stage = Stage(share_bp=10_000, max_failed=200, deadline_s=3_600)
    status = Status(State.RUNNING, stage_state=StageState.OPEN, progress=10_000, opened_at=NOW - 10 * MINUTE)
    plan, calendar = Spec((stage,)), Counting(lunch="mon 12:10-13:00 UTC", tea="tue 16:00-17:00 UTC")
    outlook = Outlook(Look("1.1.0", plan, status, NOW, MINUTE, MINUTE), late, Counters(members=200))
    assert outlook.turns(status) > 30
    move = foresee(plan, status, outlook, NOW, Allowance(calendar=calendar))
    assert (move.at if move else None) == NOW + 50 * SECOND
    assert calendar.reads <= 2


# --- on a real database ----------------------------------------------------------------------------------


def told(world):
    with world.read() as session:
        return explain.why_of_rollout(session, world.clock(), 1)


def ready(sessions, clock, count, *stages):
    world = World(sessions, clock)
    world.cohort()
    hosts = world.enroll_many(count)
    return world, hosts, stages


def test_of_a_host_that_was_quiet_before_the_stage_the_halt_is_foretold_that_comes(sessions, clock):
    world, (one, *_), _ = ready(sessions, clock, 3)
    world.clock.step(minutes=20)  # one host was last heard before
    for host in list(world.hosts.values())[1:]:
        world.report(host)
    world.start("1.1.0", Stage(count=3, deadline_s=7_200))
    for host in list(world.hosts.values())[1:]:
        world.finish(host, 1, "healthy")
    following = told(world)["next"]
    assert (following["event"], following["reason"]) == ("halted", "max-failed")
    assert following["detail"] == "1 of 3 failed (limit 0)"
    comes_as_told(world, following, by=timedelta(minutes=30))
    assert world.attempt(one, 1).state == "silent"


def test_of_hosts_that_fall_silent_the_halt_is_foretold_and_of_hosts_on_time_the_deadline(sessions, clock):
    world, (one, *others), _ = ready(sessions, clock, 3)
    world.start("1.1.0", Stage(count=3, deadline_s=7_200))
    world.clock.step(seconds=30)
    world.heartbeats()
    assert told(world)["next"]["reason"] == "deadline"
    for _ in range(3):
        world.clock.step(seconds=60)
        for host in others:
            world.report(host)
    following = told(world)["next"]
    assert following["reason"] == "max-failed"
    comes_as_told(world, following, others)
    assert world.attempt(one, 1).state == "silent"


def comes_as_told(world, following, heard=(), by=MINUTE):
    """Now and then up to the second before nothing happens; at the second what was told."""
    at, before = parse_iso(following["at"]), world.events(1)
    while world.clock() < at - SECOND:
        world.clock.now = min(at - SECOND, world.clock() + by)
        for host in heard:
            world.report(host)
        world.tick()
        assert world.events(1) == before
    world.clock.now = at
    world.tick()
    assert world.events(1)[len(before) :][-1] == following["event"]


def test_an_outage_counts_for_no_soak_and_that_is_said(sessions, clock):
    world, hosts, _ = ready(sessions, clock, 2)
    world.start("1.1.0", Stage(count=2, soak_s=600))
    for host in hosts:
        world.finish(host, 1, "healthy")
    world.tick(seconds=1)
    begun = world.clock()
    world.clock.step(hours=2)
    with world.write() as session:
        until, away = world.clock() + MINUTE, with_gap([], begun + MINUTE, world.clock())
        session.add(Lease(name=Lease.JOBS, holder="me", fence=2, until=until, gaps=away))
    answer = told(world)
    (link,) = [link for link in answer["chain"] if not link["ok"]]
    assert link["code"] == "soaking"
    assert link["text"] == "it soaks until 14:10 UTC; the server was away meanwhile, which does not count"
    ends = world.clock() + 90 * SECOND + timedelta(seconds=600 - 60 - 30)
    assert parse_iso(answer["next"]["at"]) == ends
    assert answer["next"]["event"] == "completed"
    world.clock.now = ends - SECOND
    assert world.tick() is False
    world.tick(seconds=1)
    assert world.status(1).state == "completed"
