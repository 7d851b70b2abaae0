"""Every transition of the rollout's state table, by name; and that there is no other.

The tests walk all that `reconcile` makes of a draft and of a rollout that is asked for, one fact at a time
out of the ordinary, times young and old. What happens must be a row of the table, and each row must happen.
"""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_core.wire import AttemptState
from release_server.figures import Worse
from release_server.rollout import FINISHED, Counters, Spec, StageState, State, Status, Wanted, reconcile
from release_server.sequential import Baseline
from release_server.stages import Stage

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
YOUNG, OLD = timedelta(seconds=10), timedelta(days=1)
GATE = Stage(share_bp=10_000, soak_s=60, deadline_s=600, max_silent=0, max_failed=1)
SPEC = Spec((replace(GATE, share_bp=None, count=1), GATE), watch_s=3_600, figures=True, false_halt_bp=100)


def fleet(members=4, reached=2, waiting=0, baseline=None, worse=(), on_version=0, **attempts):
    """Counters of a fleet; `attempts` by state, e.g. healthy=1."""
    counted = {AttemptState(name): count for name, count in attempts.items()}
    known = {} if baseline is None else {"baseline": baseline}
    told = {"candidates": (2_000, 10_000), "attempts": counted, "on_version": on_version, "worse": worse}
    return Counters(members, reached, waiting, **told, **known)


FLEETS = {
    "all is well": fleet(healthy=2),
    "unfinished": fleet(waiting=1, healthy=1),
    "no agents": fleet(0, 0),
    "nobody in progress": fleet(reached=0),
    "too few outcomes": fleet(skipped=2),
    "failures": fleet(failed=2),
    "silence": fleet(silent=1, healthy=1),
    "an unusual failure": fleet(reached=4, failed=1, baseline=Baseline.of(0, 100_000)),
    "worse figures": fleet(healthy=2, worse=(Worse("rss", 2, 2),)),
    "agents that run it": fleet(healthy=2, on_version=2),
}
ASKED = {
    "a plain wish": Wanted.RUN,
    "a resume": Wanted.RESUME,
    "a pause": Wanted.PAUSE,
    "an abort": Wanted.ABORT,
    "a way back": Wanted.ABORT_ROLLBACK,
    "a newer one": Wanted.SUPERSEDE,
}
ALLOWED = {
    "a pin": {"pinned": True},
    "a freeze": {"frozen": True},
    "window closed": {"window_open": False},
    "not approved": {"approval": True},
    "approved": {"approval": True, "approved": True},
    "too early": {"not_before": NOW + OLD},
    "a resume of before": {"wanted": Wanted.RESUME},
}
ODDITIES = (*FLEETS, *ASKED, *ALLOWED, "an advance", "unfinished, window closed")

TABLE = (
    # where it is, what is so, what happens, why, where it is then
    ("draft", "an abort", "aborted", "manual", "aborted"),
    ("draft", "a resume", "submitted", "", "scheduled"),
    ("draft", "a newer one", "superseded", "superseded", "superseded"),
    ("awaiting_approval", "an abort", "aborted", "manual", "aborted"),
    ("awaiting_approval", "approved", "approved", "", "scheduled"),
    ("awaiting_approval", "a newer one", "superseded", "superseded", "superseded"),
    ("scheduled", "an abort", "aborted", "manual", "aborted"),
    ("scheduled", "not approved", "awaiting-approval", "approval", "awaiting_approval"),
    ("scheduled", "a pause", "paused", "manual", "paused pending"),
    ("scheduled", "a pin", "paused", "pinned", "paused pending"),
    ("scheduled", "all is well", "started", "", "running open"),
    ("scheduled", "no agents", "started", "no-agents", "running open"),
    ("scheduled", "a newer one", "superseded", "superseded", "superseded"),
    ("running open", "an abort", "aborted", "manual", "aborted"),
    ("running open", "a freeze", "frozen", "frozen", "running open"),
    ("running open", "unfinished", "halted", "deadline", "paused halted"),
    ("running open", "worse figures", "halted", "figures-worse", "paused halted"),
    ("running open", "failures", "halted", "max-failed", "paused halted"),
    ("running open", "silence", "halted", "max-silent", "paused halted"),
    ("running open", "too few outcomes", "halted", "min-sample", "paused halted"),
    ("running open", "an unusual failure", "halted", "unusual-failures", "paused halted"),
    ("running open", "unfinished, window closed", "outside-window", "outside-window", "running open"),
    ("running open", "a pause", "paused", "manual", "paused open"),
    ("running open", "a pin", "paused", "pinned", "paused open"),
    ("running open", "a way back", "rolling-back", "manual", "rolling_back"),
    ("running open", "all is well", "soaking", "all-finished", "running soaking"),
    ("running open", "an advance", "stage-passed+completed", "advanced", "completed"),
    ("running open", "an advance", "stage-passed+stage-opened", "advanced", "running open"),
    ("running open", "a newer one", "superseded", "superseded", "superseded"),
    ("running open", "all is well", "unfrozen", "", "running open"),
    ("running open", "no agents", "unfrozen", "no-agents", "running open"),
    ("running open", "too few outcomes", "waiting", "min-sample", "running open"),
    ("running open", "no agents", "waiting", "no-agents", "running open"),
    ("running open", "all is well", "widened", "", "running open"),
    ("running open", "all is well", "window-opened", "", "running open"),
    ("running open", "no agents", "window-opened", "no-agents", "running open"),
    ("running soaking", "an abort", "aborted", "manual", "aborted"),
    ("running soaking", "a freeze", "frozen", "frozen", "running soaking"),
    ("running soaking", "worse figures", "halted", "figures-worse", "paused halted"),
    ("running soaking", "failures", "halted", "max-failed", "paused halted"),
    ("running soaking", "silence", "halted", "max-silent", "paused halted"),
    ("running soaking", "too few outcomes", "halted", "min-sample", "paused halted"),
    ("running soaking", "an unusual failure", "halted", "unusual-failures", "paused halted"),
    ("running soaking", "a pause", "paused", "manual", "paused soaking"),
    ("running soaking", "a pin", "paused", "pinned", "paused soaking"),
    ("running soaking", "unfinished", "reopened", "unfinished", "running open"),
    ("running soaking", "a way back", "rolling-back", "manual", "rolling_back"),
    ("running soaking", "an advance", "stage-passed+completed", "advanced", "completed"),
    ("running soaking", "all is well", "stage-passed+completed", "soaked", "completed"),
    ("running soaking", "an advance", "stage-passed+stage-opened", "advanced", "running open"),
    ("running soaking", "all is well", "stage-passed+stage-opened", "soaked", "running open"),
    ("running soaking", "a newer one", "superseded", "superseded", "superseded"),
    ("running soaking", "all is well", "unfrozen", "", "running open"),
    ("running soaking", "no agents", "unfrozen", "no-agents", "running open"),
    ("running soaking", "too few outcomes", "waiting", "min-sample", "running open"),
    ("running soaking", "no agents", "waiting", "no-agents", "running open"),
    ("running soaking", "nobody in progress", "widened", "", "running open"),
    ("paused pending", "an abort", "aborted", "manual", "aborted"),
    ("paused pending", "a resume", "resumed", "", "scheduled"),
    ("paused pending", "a newer one", "superseded", "superseded", "superseded"),
    ("paused open", "an abort", "aborted", "manual", "aborted"),
    ("paused open", "a resume", "resumed", "", "running open"),
    ("paused open", "a way back", "rolling-back", "manual", "rolling_back"),
    ("paused open", "a newer one", "superseded", "superseded", "superseded"),
    ("paused soaking", "an abort", "aborted", "manual", "aborted"),
    ("paused soaking", "a resume", "resumed", "", "running open"),
    ("paused soaking", "a way back", "rolling-back", "manual", "rolling_back"),
    ("paused soaking", "a newer one", "superseded", "superseded", "superseded"),
    ("paused halted", "an abort", "aborted", "manual", "aborted"),
    ("paused halted", "a resume", "resumed", "", "running open"),
    ("paused halted", "a way back", "rolling-back", "manual", "rolling_back"),
    ("paused halted", "a newer one", "superseded", "superseded", "superseded"),
    ("completed", "worse figures", "halted", "figures-worse", "paused halted"),
    ("completed", "failures", "halted", "max-failed", "paused halted"),
    ("completed", "silence", "halted", "max-silent", "paused halted"),
    ("completed", "an unusual failure", "halted", "unusual-failures", "paused halted"),
    ("completed", "a way back", "rolling-back", "manual", "rolling_back"),
    ("completed", "all is well", "watch-over", "watched", "completed"),
    ("aborted", "a way back", "rolling-back", "manual", "rolling_back"),
    ("rolling_back", "all is well", "rolled-back", "gone-back", "rolled_back"),
    ("rolling_back", "a newer one", "superseded", "superseded", "superseded"),
)


# --- the walk --------------------------------------------------------------------------------------------


def look(status, *oddities):
    """What `reconcile` makes of a status when these facts are out of the ordinary."""
    spec, seen = SPEC, FLEETS["all is well"]
    for oddity in ", ".join(oddities).split(", "):
        if oddity in FLEETS:
            seen = FLEETS[oddity]
        elif oddity in ALLOWED:
            spec = replace(spec, **ALLOWED[oddity])
        else:
            further = {"advance_to": status.stage + 1} if oddity == "an advance" else {}
            spec = replace(
                spec, wanted=ASKED.get(oddity, Wanted.RUN), revision=status.spec_revision + 1, **further
            )
    return reconcile(spec, status, seen, NOW)


def place(status):
    """State and stage of what runs or is paused; where everything else was left does not matter."""
    staged = status.state in (State.RUNNING, State.PAUSED)
    return f"{status.state} {status.stage_state}" if staged else str(status.state)


def transition(before, following):
    names = "+".join(event.name for event in following.events)
    return (place(before), names, following.events[0].reason, place(following.status))


def aged(status):
    """The status as it is found soon after, and long after; what is told of it is left out."""
    for age in (YOUNG, OLD):
        yield replace(
            status,
            opened_at=status.opened_at and NOW - age,
            soaking_since=status.soaking_since and NOW - age,
            watch_until=status.watch_until and NOW + timedelta(hours=1) - age,
            detail="",
            finished_at=None,
            watch_at=None,
            spec_revision=1,
        )


@cache
def walk():
    """Every status that can be reached, and for each transition that happens what made it happen."""
    ahead = [Status(state, spec_revision=1) for state in (State.DRAFT, State.SCHEDULED)]
    reached, happened = set(ahead), {}
    while ahead:
        status = ahead.pop()
        for oddity in ODDITIES:
            following = look(status, oddity)
            if following.events:
                found = happened.setdefault(transition(status, following), {})
                found.setdefault(oddity, (status, following))
            fresh = set(aged(following.status)) - reached if following.status != status else set()
            reached |= fresh
            ahead += fresh
    return reached, happened


@pytest.mark.parametrize("row", TABLE, ids=lambda row: "{}, {}: {} ({}), {}".format(*row))
def test_it_happens(row):
    before, oddity, names, why, after = row
    _, happened = walk()
    status, following = happened[before, names, why, after][oddity]
    assert place(status) == before
    assert (look(status, oddity), place(following.status)) == (following, after)
    for event in following.events:
        assert event.numbers["members"] == FLEETS.get(oddity.partition(",")[0], FLEETS["all is well"]).members


def test_nothing_else_happens():
    _, happened = walk()
    assert sorted(happened) == sorted({(before, names, why, after) for before, _, names, why, after in TABLE})


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32))
def test_nothing_else_happens_when_several_things_are_odd_at_once(seed):
    dice, (reached, happened) = random.Random(seed), walk()
    statuses = sorted(reached, key=repr)
    for _ in range(200):
        status = dice.choice(statuses)
        following = look(status, *dice.sample(ODDITIES, dice.randint(2, 4)))
        assert not following.events or transition(status, following) in happened


# --- what holds for every one of them --------------------------------------------------------------------


def steps():
    _, happened = walk()
    return [(oddity, *step) for found in happened.values() for oddity, step in found.items()]


def test_only_an_answer_to_a_new_wish_leaves_a_halt():
    left = {
        oddity
        for oddity, before, after in steps()
        if before.stage_state is StageState.HALTED
        and before.state is State.PAUSED
        and after.status.state is not State.PAUSED
    }
    assert left == {"a resume", "an abort", "a way back", "a newer one"}


def test_progress_shrinks_by_an_abort_or_a_way_back_and_by_nothing_else():
    shrinking = {
        event.name
        for _, before, after in steps()
        for event in after.events
        if after.status.progress < before.progress
    }
    assert shrinking == {"aborted", "rolling-back"}


def test_an_end_is_left_by_a_way_back_or_by_a_regression_and_by_nothing_else():
    left = {
        (str(before.state), str(after.status.state))
        for _, before, after in steps()
        if before.state in FINISHED and after.status.state is not before.state
    }
    assert left == {("completed", "paused"), ("completed", "rolling_back"), ("aborted", "rolling_back")}


def test_a_way_back_asked_of_one_that_never_began_does_not_end_it_again():
    ended = look(Status(State.SCHEDULED, spec_revision=1), "an abort").status
    assert look(ended, "a way back").events == ()
