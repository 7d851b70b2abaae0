"""Why a rollout waits is what `reconcile` waits for, in any situation; and it moves when it is said to."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_core.clock import parse_iso
from agent_core.errors import Exit
from agent_core.wire import AttemptState, Window
from release_server import agents, cohorts, explain, rollout_view, yanks
from release_server import rollout_why as why
from release_server.figures import Worse
from release_server.foresight import Allowance
from release_server.hearing import ALWAYS, NEVER, Hearing
from release_server.rollout import FINISHED, Counters, Spec, StageState, State, Status, Wanted, Why, reconcile
from release_server.stages import Stage
from release_server.terms import Terms
from tests.release_server.fleet_world import World
from tests.release_server.operator_desk import desk

NOW = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)  # a Monday
SECOND, MINUTE = timedelta(seconds=1), timedelta(minutes=1)
HORIZON_S = 60 * 86_400
WINDOWS = (
    None,
    None,
    Window(("mon",), "08:00", "12:20", "UTC"),
    Window(("mon", "tue"), "22:00", "04:00", "Europe/Berlin"),
)
CALENDARS = ({}, {}, {}, {"lunch": "mon 12:30-13:00 UTC"}, {"week": "2026-03-02..2026-03-04 UTC"})
HEARINGS = (
    Hearing(((NOW - timedelta(minutes=20), NOW - 30 * SECOND),), 90 * SECOND),
    Hearing(((NOW - timedelta(minutes=80), NOW - timedelta(minutes=30)),), timedelta(hours=1)),
    Hearing(tuple((NOW - each * MINUTE, NOW - each * MINUTE + 20 * SECOND) for each in range(60, 0, -2))),
    Hearing(((NOW - timedelta(minutes=5), NEVER),), 90 * SECOND),
)
BEGUN = (StageState.OPEN, StageState.SOAKING)
STANDING = (Why.FROZEN, Why.OUTSIDE_WINDOW, Why.NO_AGENTS)


class Dice(random.Random):
    """Throws a situation. Most of it is most often as usual, or the first oddity would hide all the others.

    Hypothesis throws the seed alone: drawn one by one these many choices are slow, and cluster.
    """

    def mostly(self, usual, *others):
        return usual if self.random() < 0.85 else self.choice(others)

    def since(self):
        return NOW - timedelta(seconds=self.choice([0, 30, 300, 4_000]))

    def status(self):
        """A status such as `reconcile` leaves behind."""
        state = self.choice([*State, *[State.RUNNING] * 14, State.SCHEDULED, State.PAUSED])
        if state in (State.DRAFT, State.AWAITING_APPROVAL, State.SCHEDULED):
            return Status(state, spec_revision=1)
        if state is State.PAUSED:
            where = self.choice([StageState.PENDING, StageState.OPEN, StageState.HALTED])
            by_people = self.choice([Why.MANUAL, Why.PINNED])
            reason = Why.MAX_FAILED if where is StageState.HALTED else by_people
            return Status(state, stage_state=where, reason=str(reason), detail="2 of 4", spec_revision=1)
        stage_state = StageState.PASSED if state is State.COMPLETED else self.choice(BEGUN)
        opened = self.since()
        watched = state is State.COMPLETED and self.random() < 0.7
        return Status(
            state,
            stage=self.choice([0, 1]),
            stage_state=stage_state,
            progress=self.choice([0, 2_000, 10_000]),
            reason=str(self.mostly(Why.NONE, *STANDING)),
            opened_at=opened,
            soaking_since=max(opened, self.since()) if stage_state is StageState.SOAKING else None,
            spec_revision=1,
            tolerated=self.mostly(0, 1),
            watch_until=NOW + timedelta(minutes=self.randint(0, 50)) if watched else None,
        )

    def fleet(self):
        members = self.mostly(4, 0)
        reached = self.mostly(members, 0, min(1, members))
        waiting = self.choice([0, 0, min(1, reached), reached])
        attempts = {
            AttemptState.HEALTHY: max(0, reached - waiting - self.mostly(0, 3, 4)),
            self.choice([AttemptState.FAILED, AttemptState.SILENT]): self.mostly(0, 1, 2),
        }
        return Counters(
            members,
            reached,
            waiting,
            waiting_since=self.choice([None, self.since()]) if waiting else None,
            on_version=self.choice([0, 1, 2]),
            candidates=(2_000, 10_000),
            attempts=attempts,
            worse=self.mostly((), (Worse("rss", 3, 4),)),
            hearing=self.mostly(ALWAYS, *HEARINGS),
        )

    def situation(self):
        """What people want, what is so, what the cohort looks like and what it allows."""
        first = Stage(
            count=1,
            soak_s=self.choice([0, 600]),
            max_failed=self.choice([0, 1]),
            max_silent=self.choice([None, None, 1]),
            min_sample=self.choice([0, 2]),
            deadline_s=self.choice([60, 3_600]),
        )
        allowance = Allowance(
            by_hand=self.mostly(False, True),
            until=self.choice([None, NOW + timedelta(minutes=20)]),
            calendar=self.choice(CALENDARS),
            window=self.choice(WINDOWS),
            stopped=self.mostly(None, "", "a fire"),
        )
        spec = Spec(
            (first, replace(first, count=None, share_bp=10_000)),
            wanted=self.mostly(Wanted.RUN, *Wanted),
            advance_to=self.mostly(0, 1),
            revision=self.mostly(1, 2),
            pinned=self.mostly(False, True),
            not_before=self.choice([None, NOW + timedelta(minutes=45)]),
            approval=self.choice([False, True]),
            approved=self.choice([False, True]),
            figures=True,
        )
        fleet, status = self.fleet(), self.status()
        return why.Facts("r-1", "1.1.0", "eu", spec, status, fleet, allowance, by="olga", reason="tea")


SEEDS = st.integers(0, 2**32)
THROWS = 25


def looked_at(facts, moment):
    """What `reconcile` really does with these facts at a moment."""
    return reconcile(facts.allowance.at(facts.spec, moment), facts.status, facts.counters, moment)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_it_moves_at_the_moment_that_is_told_as_it_is_told_and_not_before(seed):
    """Other things equal: the told moment is the first at which the server would take a step."""
    dice = Dice(seed)
    for _ in range(THROWS):
        moves_as_told(dice.situation(), [dice.randrange(HORIZON_S) for _ in range(4)])


def moves_as_told(facts, later):
    following = why.explain(facts, NOW)["next"]
    if following is None:
        for seconds in later:
            assert looked_at(facts, NOW + timedelta(seconds=seconds)).events == ()
        return
    at = parse_iso(following["at"])
    event = looked_at(facts, at).events[-1]
    assert (event.name, event.reason, event.detail) == tuple(
        following[key] for key in ("event", "reason", "detail")
    )
    between = [NOW, at - SECOND] if at > NOW else []
    between += [NOW + (at - NOW) * (seconds / HORIZON_S) for seconds in later if at > NOW]
    for moment in between:
        assert moment == at or looked_at(facts, moment).events == ()


LIFTS = {
    "draft": lambda facts: asked(facts, wanted=Wanted.RESUME),
    "approval": lambda facts: asked(facts, approved=True),
    "not-before": lambda facts: asked(facts, not_before=None),
    "frozen": lambda facts: allowed(facts, by_hand=False, calendar={}),
    "stop-file": lambda facts: allowed(facts, stopped=None),
    "outside-window": lambda facts: allowed(facts, window=None),
    "pinned": lambda facts: replace(facts, spec=replace(facts.spec, pinned=False)),
    "paused": lambda facts: asked(facts, wanted=Wanted.RESUME),
    "manual": lambda facts: asked(facts, wanted=Wanted.RESUME),
    "max-failed": lambda facts: asked(facts, wanted=Wanted.RESUME),
    "no-agents": lambda facts: counted(facts, members=1),
    "unfinished": lambda facts: counted(facts, waiting=0, waiting_since=None),
    "min-sample": lambda facts: counted(facts, attempts={AttemptState.HEALTHY: facts.counters.reached}),
    "soaking": lambda facts: replace(
        facts, status=replace(facts.status, soaking_since=NOW - timedelta(days=9))
    ),
    "listening": lambda facts: counted(facts, hearing=ALWAYS),
    "going-back": lambda facts: counted(facts, on_version=0),
}
"""What would have to be so for each reason to go."""


def asked(facts, **changes):
    return replace(facts, spec=replace(facts.spec, revision=facts.spec.revision + 1, **changes))


def allowed(facts, **changes):
    return replace(facts, allowance=replace(facts.allowance, **changes))


def counted(facts, **changes):
    return replace(facts, counters=replace(facts.counters, **changes))


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_what_is_named_is_all_that_keeps_it_and_each_of_it_does(seed):
    dice = Dice(seed)
    for _ in range(THROWS):
        waits_as_told(dice.situation())


def waits_as_told(facts):
    following = looked_at(facts, NOW)
    moves = following.events
    blocked = [link["code"] for link in why.explain(facts, NOW)["chain"] if not link["ok"]]
    if facts.status.state in FINISHED:
        return
    if moves:
        assert blocked == [event.reason for event in moves if event.name == "halted"]
        return
    assert blocked, "nothing is named, and it does not move"
    facts = replace(facts, status=following.status)  # a wish to resume lapses under a pin
    gone = lift(facts, blocked)
    assert looked_at(gone, NOW).events or is_told_anew(gone, blocked), "it stays though all named is gone"
    if facts.status.state in (State.SCHEDULED, State.PAUSED):
        for kept in blocked:
            almost = lift(facts, [code for code in blocked if code != kept])
            assert not looked_at(almost, NOW).events, f"it moves although {kept} is still so"


def test_a_wish_to_resume_that_a_pin_overtakes_lapses_and_the_pause_stays_named():
    """Both came between two ticks. With the pin gone it still waits for a person, as is told."""
    plan = Spec((Stage(count=1),), wanted=Wanted.RESUME, revision=2, pinned=True)
    paused = Status(State.PAUSED, stage_state=StageState.OPEN, reason=str(Why.MANUAL), spec_revision=1)
    facts = why.Facts("r-1", "1.1.0", "eu", plan, paused, Counters(4, 4, 0))
    assert [link["code"] for link in why.explain(facts, NOW)["chain"]] == ["manual", "pinned"]
    waits_as_told(facts)


def lift(facts, codes):
    for code in codes:
        facts = LIFTS[code](facts)
    return facts


def is_told_anew(facts, blocked):
    """A running stage names one thing at a time: with that gone it waits for the next one."""
    return not {link["code"] for link in why.explain(facts, NOW)["chain"] if not link["ok"]} & set(blocked)


def test_a_way_back_that_nobody_may_take_now_says_so():
    """A freeze and a stop file keep hosts from going back as well."""
    back = Status(State.ROLLING_BACK, stage_state=StageState.OPEN, reason=str(Why.MANUAL), spec_revision=1)
    plan, seen = Spec((Stage(count=1),)), Counters(4, 0, 0, on_version=1)
    facts = why.Facts("r-1", "1.1.0", "eu", plan, back, seen, Allowance(by_hand=True, stopped="a fire"))
    blocked = [(link["code"], link["text"]) for link in why.explain(facts, NOW)["chain"] if not link["ok"]]
    assert [code for code, _ in blocked] == ["stop-file", "frozen", "going-back"]
    assert blocked[-1][1] == "1 agent still runs 1.1.0"


# --- on a real database, by every way it is told ---------------------------------------------------------


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    made.enroll_many(3)
    return made


@pytest.fixture
def at_desk(world, app, token, tmp_path, monkeypatch, capsys):
    with desk(app, token, tmp_path, monkeypatch, capsys) as sat:
        yield sat


def told(world, rollout=1):
    with world.read() as session:
        return explain.why_of_rollout(session, world.clock(), rollout)


def blocked(answer):
    return [link for link in answer["chain"] if not link["ok"]]


def test_through_a_whole_rollout_the_server_moves_when_it_was_told_to_and_no_second_before(world):
    """A start by the clock, a window that closes and opens again, a soak, and the watch at the end."""
    fridays = Window(("fri",), "12:00", "13:00", "UTC")
    world.call(cohorts.edit, "demo", "all", window=fridays.to_json())
    begins = world.clock() + timedelta(minutes=5)
    world.start("1.1.0", Stage(count=3, soak_s=600), terms=Terms(not_before=begins, watch_s=900))
    seen = []
    while (following := told(world)["next"]) is not None:
        before, at = world.events(1), parse_iso(following["at"])
        if at > world.clock():
            world.clock.now = at - SECOND
            world.tick()
            assert world.events(1) == before
            world.clock.now = at
        world.tick()
        seen += world.events(1)[len(before) :]
        assert following["event"] == seen[-1]
        if seen[-1] == "window-opened":
            for host in world.hosts.values():
                world.finish(host, 1, "healthy")
    assert seen == [
        "started",
        "outside-window",
        "window-opened",
        "soaking",
        "stage-passed",
        "completed",
        "watch-over",
    ]


def test_a_halt_is_told_with_the_numbers_that_were_stored_and_in_one_wording_everywhere(world, at_desk):
    world.start("1.1.0")
    (first,) = world.offered("1.1.0")
    world.finish(first, 1, "rolled_back")
    world.tick(seconds=1)
    world.call(agents.retire, world.hosts.popitem()[0])
    with world.read() as session:
        halt = rollout_view.events(session, 1)[-1]
    answer = told(world)
    (link,) = blocked(answer)
    assert (link["code"], link["text"]) == ("max-failed", "halted: 1 of 1 failed (limit 0)")
    assert link["seen"] == halt.numbers
    assert (link["seen"]["members"], answer["next"]) == (3, None)
    assert at_desk.json("rollout", "why", "r-1") == answer
    assert at_desk.json("rollout", "status", "r-1")["detail"] == halt.detail
    entry = at_desk.json("audit", "log")[-2]
    assert (entry["actor"], entry["action"], entry["subject"]) == ("server", "rollout.halt", "r-1")
    assert entry["detail"] == {"stage": 0, "reason": "max-failed", "detail": halt.detail}
    assert at_desk.run("rollout", "why")[1].splitlines() == [
        "r-1 takes 1.1.0 to all; it is paused in stage 1 of 2. It waits because:",
        "  no  halted: 1 of 1 failed (limit 0)",
        "      release agents list --cohort all --state failed",
        "      release rollout abort r-1 --rollback, or retry, or resume",
    ]


@pytest.mark.parametrize(
    ("reason", "attempts", "whom"),
    [
        (Why.MAX_FAILED, {"rolled_back": 1, "silent": 1}, " --state failed"),
        (Why.UNUSUAL, {"failed": 3}, " --state failed"),
        (Why.MAX_FAILED, {"silent": 2}, " --state silent"),
        (Why.MAX_SILENT, {"silent": 2, "failed": 1}, " --state silent"),
        (Why.FIGURES, {"healthy": 4}, " --version 1.1.0"),
        (Why.DEADLINE, {"downloading": 2}, ""),
    ],
)
def test_a_halt_says_whom_to_look_at_first(reason, attempts, whom):
    halted = Status(State.PAUSED, stage_state=StageState.HALTED, reason=str(reason), spec_revision=1)
    facts = why.Facts("r-1", "1.1.0", "eu", Spec((Stage(count=1),)), halted, Counters(4), halt=attempts)
    (link,) = why.chain(facts, NOW, None)
    assert link.then.splitlines()[0] == f"release agents list --cohort eu{whom}"


def test_a_soak_reads_as_documented_and_what_is_not_there_is_not_found(world, at_desk):
    world.start("1.1.0", Stage(count=3, soak_s=1_800), terms=Terms(watch_s=900))
    for host in world.hosts.values():
        world.finish(host, 1, "healthy")
    world.tick(seconds=60)
    assert at_desk.run("rollout", "why", "1")[1].splitlines() == [
        "r-1 takes 1.1.0 to all; it is running in stage 1 of 1. It waits because:",
        "  ok  0 of 3 failed (limit 0)",
        "  no  it soaks until 12:31 UTC",
        "  next  at 12:31 UTC it is complete, if nothing else happens",
    ]
    world.tick(seconds=1_800)
    assert "watched   until 2026-05-01T12:46:00Z" in at_desk.run("rollout", "status")[1].splitlines()
    code, _, said = at_desk.run("rollout", "why", "r-9")
    assert (code, "there is no rollout r-9" in said) == (Exit.NOT_FOUND, True)


def test_looking_writes_nothing(world):
    world.start("1.1.0", Stage(count=3))
    world.clock.step(hours=5)  # by now all are silent, which only the tick writes down
    told(world)
    assert world.counters(1) == {}
    world.tick()
    assert world.counters(1) == {"silent": 3}


# --- each reason in words --------------------------------------------------------------------------------


def test_a_freeze_and_a_pin_are_told_with_the_reason_that_they_were_made_for(world):
    world.start("1.1.0", terms=Terms(not_before=world.clock() + timedelta(days=1)))
    world.call(cohorts.freeze, "demo", "all", reason="year end")
    world.call(cohorts.edit, "demo", "all", splay_s=60, reason="a slower start")
    host = next(iter(world.hosts))
    with world.read() as session:
        of_agent = [link["text"] for link in explain.agent_why(session, world.clock(), host)["chain"]]
    assert "cohort all is frozen: year end" in of_agent
    assert blocked(told(world))[0]["text"] == "cohort all is frozen: year end"
    world.call(cohorts.unfreeze, "demo", "all", reason="it is over")
    world.call(cohorts.pin, "demo", "all", version="1.0.0", reason="the fair")
    world.call(cohorts.edit, "demo", "all", splay_s=0, reason="as before")
    world.tick()
    assert [link["text"] for link in blocked(told(world))] == [
        "a pin paused it",
        "cohort all is pinned to 1.0.0: the fair",
    ]


def test_what_was_done_again_has_the_newer_reason_everywhere(world, at_desk):
    """The same version pinned once more, the same freeze made once more: each is an act of its own."""
    world.call(cohorts.pin, "demo", "all", version="1.0.0", reason="the fair")
    world.call(cohorts.freeze, "demo", "all", reason="year end")
    world.clock.step(hours=1)
    world.call(cohorts.pin, "demo", "all", version="1.0.0", reason="the audit")
    world.call(cohorts.edit, "demo", "all", splay_s=60, reason="a slower start")
    with world.read() as session:
        spec = cohorts.newest_spec(session, 1)
        assert [cohorts.reason_of(spec, act) for act in ("pin", "freeze")] == ["the audit", "year end"]
        texts = [
            link["text"]
            for link in explain.agent_why(session, world.clock(), next(iter(world.hosts)))["chain"]
        ]
    assert "cohort all is frozen: year end" in texts
    shown = at_desk.json("cohort", "show", "all")
    assert shown["pinned"] == {"actor": "olga", "reason": "the audit", "at": "2026-05-01T13:00:00Z"}
    assert (shown["freeze"]["reason"], shown["reason"]) == ("year end", "a slower start")
    told = at_desk.run("cohort", "show", "all")[1]
    assert (
        "frozen 2026-05-01T12:00:00Z by olga: year end; pinned 2026-05-01T13:00:00Z by olga: the audit"
        in told
    )
    assert "by olga: a slower start" in told
    code, _, said = at_desk.run("rollout", "start", "1.1.0", "--cohort", "all", "--yes")
    assert (code, "the audit" in said) == (Exit.CONFLICT, True)
    for lift in (cohorts.unpin, cohorts.unfreeze):
        world.call(lift, "demo", "all")
    shown = at_desk.json("cohort", "show", "all")
    assert (shown["pinned"], shown["freeze"]) == (None, None)


def test_what_was_yanked_and_who_paused_are_named(world):
    world.start("1.1.0")
    world.call(yanks.yank, "demo", "1.1.0", "it burns")
    links = blocked(told(world))
    assert [link["code"] for link in links] == ["manual", "yanked"]
    assert links[0]["text"] == "paused by olga: 1.1.0 was yanked: it burns"


def test_a_plan_that_waits_for_a_second_person_says_which_and_who_may_not(world):
    world.start("1.1.0", terms=Terms(approval=True))
    (link,) = blocked(told(world))
    assert link["text"].endswith("; not olga, who asked for it")
    assert link["seen"]["askers"] == ["olga"]
