"""Every row of the rollout's table, with a clock that is stepped."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from agent_core.directive import assign
from agent_core.errors import MalformedError, UsageError
from agent_core.wire import AttemptState, Mode, Reason
from release_server.directives import CohortFacts, Pace, RolloutFacts, directive_for
from release_server.hearing import ALWAYS, NEVER, Hearing
from release_server.rollout import (
    LOOK_EVERY,
    Counters,
    Spec,
    StageState,
    State,
    Status,
    Wanted,
    Why,
    reconcile,
)
from release_server.stages import Stage, check_stages, failed_limit, wanted_count

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
STAGES = (Stage(count=1, soak_s=60, deadline_s=600), Stage(share_bp=5000, soak_s=60), Stage(share_bp=10_000))
DEADLINE, SOAK = (timedelta(seconds=each) for each in (STAGES[0].deadline_s, STAGES[0].soak_s))
RUNNING = Status(
    State.RUNNING, 0, StageState.OPEN, 500, opened_at=NOW - timedelta(seconds=10), spec_revision=1
)


def spec(**changes):
    return replace(Spec(STAGES), **changes)


def fleet(members=10, reached=1, waiting=0, **attempts):
    """Counters of a fleet; `attempts` by state, e.g. healthy=1."""
    known = {
        key: attempts.pop(key)
        for key in ("waiting_since", "aside", "aside_count", "on_version", "hearing")
        if key in attempts
    }
    counted = {AttemptState(name): count for name, count in attempts.items()}
    return Counters(members, reached, waiting, candidates=(500, 5000, 10_000), attempts=counted, **known)


def halted(**changes):
    kept = {
        "state": State.PAUSED,
        "stage_state": StageState.HALTED,
        "reason": "max-failed",
        "spec_revision": 1,
    }
    return replace(RUNNING, **kept | changes)


def names(following):
    return [event.name for event in following.events]


# --- scheduled -------------------------------------------------------------------------------------------


def test_a_scheduled_rollout_opens_its_first_stage_with_the_progress_it_needs():
    following = reconcile(spec(), Status(), fleet(reached=0), NOW)
    assert following.status == Status(State.RUNNING, 0, StageState.OPEN, 500, opened_at=NOW, spec_revision=1)
    assert names(following) == ["started"]
    assert following.events[0].numbers["members"] == 10


def test_an_empty_cohort_waits_for_agents_instead_of_turning_green():
    empty = fleet(members=0, reached=0)
    status = reconcile(spec(), Status(), empty, NOW).status
    assert (status.state, status.stage_state, status.progress) == (State.RUNNING, StageState.OPEN, 0)
    assert status.reason == Why.NO_AGENTS
    later = reconcile(spec(), status, empty, NOW + timedelta(days=30))
    assert later.status == status
    assert not later.events


def test_the_stage_opens_anew_when_the_first_agent_appears():
    status = reconcile(spec(), Status(), fleet(members=0, reached=0), NOW).status
    following = reconcile(spec(), status, fleet(members=1, reached=0), NOW + timedelta(days=1))
    assert names(following) == ["widened"]
    assert following.status.progress == 500
    assert following.status.opened_at == NOW + timedelta(days=1)
    assert following.status.reason == ""


def test_a_cohort_that_empties_in_the_middle_waits_too():
    following = reconcile(spec(), RUNNING, fleet(members=0, reached=0), NOW)
    assert (following.status.state, following.status.reason) == (State.RUNNING, Why.NO_AGENTS)
    assert following.status.progress == RUNNING.progress


def test_a_stage_whose_agents_all_left_takes_in_others():
    following = reconcile(spec(), replace(RUNNING, progress=10), fleet(reached=0), NOW)
    assert names(following) == ["widened"]
    assert following.status.progress == 500


def test_a_draft_does_nothing():
    draft = Status(State.DRAFT)
    assert reconcile(spec(), draft, fleet(), NOW).status == draft


# --- running: gates --------------------------------------------------------------------------------------


def test_a_stage_waits_while_an_agent_is_unfinished():
    assert reconcile(spec(), RUNNING, fleet(waiting=1, trial=1), NOW).status == RUNNING


def test_one_failure_over_the_limit_halts_with_the_numbers_in_words():
    following = reconcile(spec(), RUNNING, fleet(rolled_back=1), NOW)
    assert (following.status.state, following.status.stage_state) == (State.PAUSED, StageState.HALTED)
    assert following.status.reason == "max-failed"
    assert following.status.detail == "1 of 1 failed (limit 0)"
    (event,) = following.events
    assert (event.name, event.reason) == ("halted", "max-failed")
    assert event.numbers["rolled_back"] == 1
    assert event.numbers["limit"] == 0


@pytest.mark.parametrize("state", ["rolled_back", "failed", "silent"])
def test_every_kind_of_failure_counts(state):
    assert reconcile(spec(), RUNNING, fleet(**{state: 1}), NOW).status.reason == "max-failed"


@pytest.mark.parametrize("stage_state", [StageState.OPEN, StageState.SOAKING])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_failure_halts_in_any_stage_open_or_soaking(stage, stage_state):
    status = replace(RUNNING, stage=stage, stage_state=stage_state, soaking_since=NOW)
    following = reconcile(
        spec(), status, fleet(reached=10, healthy=9, rolled_back=1), NOW + timedelta(hours=1)
    )
    assert following.status.stage_state is StageState.HALTED
    assert following.status.stage == stage


def test_failures_within_the_limit_are_outcomes():
    stages = (Stage(count=10, max_failed=1), STAGES[2])
    following = reconcile(spec(stages=stages), RUNNING, fleet(reached=10, healthy=9, failed=1), NOW)
    assert following.status.stage_state is StageState.SOAKING


def test_the_deadline_halts_a_stage_with_agents_that_never_finish():
    late = NOW + timedelta(seconds=600)
    following = reconcile(spec(), RUNNING, fleet(waiting=1, staged=1), late)
    assert (following.status.stage_state, following.status.reason) == (StageState.HALTED, "deadline")
    assert following.status.detail == "1 of 1 not finished in 600 s"


def test_an_agent_that_joined_late_has_the_whole_deadline():
    joined = NOW + timedelta(seconds=595)
    seen = fleet(reached=2, waiting=1, healthy=1, waiting_since=joined)
    assert reconcile(spec(), RUNNING, seen, NOW + timedelta(seconds=600)).status.state is State.RUNNING
    assert reconcile(spec(), RUNNING, seen, joined + timedelta(seconds=600)).status.reason == "deadline"


def test_more_silent_than_allowed_halts_by_its_own_limit():
    stages = (Stage(count=10, max_silent=1),)
    kept = reconcile(spec(stages=stages), RUNNING, fleet(reached=10, waiting=8, silent=1, healthy=1), NOW)
    assert kept.status.state is State.RUNNING
    following = reconcile(spec(stages=stages), RUNNING, fleet(reached=10, silent=2, healthy=8), NOW)
    assert following.status.reason == "max-silent"
    assert following.status.detail == "2 of 10 silent (limit 1)"


def test_too_few_outcomes_wait_and_name_who_stands_aside_then_halt_at_the_deadline():
    seen = fleet(aside=("web-1",), aside_count=1, skipped=1)
    waiting = reconcile(spec(), RUNNING, seen, NOW)
    assert names(waiting) == ["waiting"]
    assert waiting.status.reason == "min-sample"
    assert "web-1" in waiting.status.detail
    assert reconcile(spec(), waiting.status, seen, NOW).events == ()
    late = reconcile(spec(), waiting.status, seen, NOW + timedelta(seconds=600))
    assert (late.status.stage_state, late.status.reason) == (StageState.HALTED, "min-sample")


def test_the_reason_to_wait_goes_when_an_agent_begins():
    waiting = replace(RUNNING, reason="min-sample", detail="0 outcomes")
    assert reconcile(spec(), waiting, fleet(waiting=1, trial=1), NOW).status == RUNNING


def test_a_sample_larger_than_the_stage_asks_for_all_of_it():
    stages = (Stage(count=2, min_sample=50),)
    following = reconcile(spec(stages=stages), RUNNING, fleet(reached=2, healthy=2), NOW)
    assert following.status.stage_state is StageState.SOAKING


# --- running: soak and pass ------------------------------------------------------------------------------


def test_the_soak_begins_when_the_last_agent_has_finished():
    following = reconcile(spec(), RUNNING, fleet(healthy=1), NOW)
    assert names(following) == ["soaking"]
    assert (following.status.stage_state, following.status.soaking_since) == (StageState.SOAKING, NOW)
    assert following.status.progress == RUNNING.progress


def test_the_next_stage_opens_when_the_soak_is_over_and_not_before():
    soaking = replace(RUNNING, stage_state=StageState.SOAKING, soaking_since=NOW)
    seen = fleet(healthy=1)
    assert reconcile(spec(), soaking, seen, NOW + timedelta(seconds=59)).status == soaking
    following = reconcile(spec(), soaking, seen, NOW + timedelta(seconds=60))
    assert names(following) == ["stage-passed", "stage-opened"]
    assert (following.status.stage, following.status.stage_state) == (1, StageState.OPEN)
    assert following.status.progress == 5000
    assert following.status.soaking_since is None


def test_a_soaking_stage_opens_again_for_an_agent_that_comes_late_with_a_new_deadline():
    soaking = replace(RUNNING, stage_state=StageState.SOAKING, soaking_since=NOW)
    later = NOW + timedelta(days=1)
    following = reconcile(spec(), soaking, fleet(reached=2, waiting=1, healthy=1), later)
    assert names(following) == ["reopened"]
    assert following.status.stage_state is StageState.OPEN
    assert following.status.opened_at == later
    assert following.status.soaking_since is None


def test_the_rollout_is_complete_when_its_last_stage_has_passed():
    last = replace(RUNNING, stage=2, stage_state=StageState.SOAKING, soaking_since=NOW, progress=10_000)
    following = reconcile(spec(), last, fleet(reached=10, healthy=10), NOW)
    assert names(following) == ["stage-passed", "completed"]
    assert (following.status.state, following.status.stage_state) == (State.COMPLETED, StageState.PASSED)
    assert following.status.finished_at == NOW


# --- pause, resume, advance ------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [Status(), RUNNING], ids=["scheduled", "running"])
def test_pause_stops_a_rollout_where_it_is(status):
    following = reconcile(spec(wanted=Wanted.PAUSE, revision=2), status, fleet(waiting=1, trial=1), NOW)
    assert (following.status.state, following.status.reason) == (State.PAUSED, "manual")
    assert following.status.stage_state is status.stage_state


@pytest.mark.parametrize("status", [Status(), RUNNING], ids=["scheduled", "running"])
def test_a_pin_pauses_a_rollout(status):
    following = reconcile(spec(pinned=True), status, fleet(waiting=1, trial=1), NOW)
    assert (following.status.state, following.status.reason) == (State.PAUSED, "pinned")


def test_a_failure_is_looked_at_before_a_pause():
    following = reconcile(spec(wanted=Wanted.PAUSE, revision=2), RUNNING, fleet(failed=1), NOW)
    assert following.status.reason == "max-failed"


def test_resume_opens_the_stage_again_with_a_new_deadline():
    paused = replace(RUNNING, state=State.PAUSED, reason="manual", spec_revision=2)
    later = NOW + timedelta(days=1)
    following = reconcile(spec(wanted=Wanted.RESUME, revision=3), paused, fleet(waiting=1, trial=1), later)
    assert names(following) == ["resumed"]
    assert following.status == replace(RUNNING, opened_at=later, spec_revision=3)


def test_resume_of_one_that_never_started_starts_it():
    paused = replace(Status(), state=State.PAUSED, reason="manual", spec_revision=2)
    asked = spec(wanted=Wanted.RESUME, revision=3)
    scheduled = reconcile(asked, paused, fleet(reached=0), NOW).status
    assert scheduled.state is State.SCHEDULED
    assert reconcile(asked, scheduled, fleet(reached=0), NOW).status.state is State.RUNNING


def test_a_halt_stays_without_an_explicit_resume():
    for wanted in (Wanted.RUN, Wanted.PAUSE):
        following = reconcile(
            spec(wanted=wanted, revision=5, advance_to=2), halted(), fleet(rolled_back=1), NOW
        )
        assert following.status.state is State.PAUSED
        assert following.status.stage_state is StageState.HALTED


def test_a_resume_from_before_the_halt_does_not_end_it():
    old = spec(wanted=Wanted.RESUME, revision=4)
    following = reconcile(old, halted(spec_revision=4), fleet(rolled_back=1), NOW)
    assert following.status.stage_state is StageState.HALTED


def test_resuming_a_halt_tolerates_what_has_failed_and_nothing_more():
    asked = spec(wanted=Wanted.RESUME, revision=2)
    status = reconcile(asked, halted(), fleet(reached=3, waiting=2, rolled_back=1), NOW).status
    assert (status.state, status.tolerated) == (State.RUNNING, 1)
    assert (
        reconcile(asked, status, fleet(reached=3, waiting=2, rolled_back=1), NOW).status.state
        is State.RUNNING
    )
    again = reconcile(asked, status, fleet(reached=3, waiting=1, rolled_back=2), NOW)
    assert again.status.detail == "2 of 3 failed (limit 0, 1 tolerated)"


def test_tolerance_lapses_when_the_failure_heals_and_does_not_excuse_a_new_one():
    running = replace(RUNNING, tolerated=1)
    healed = reconcile(spec(), running, fleet(reached=2, waiting=1, healthy=1), NOW).status
    assert healed.tolerated == 0
    assert reconcile(spec(), healed, fleet(reached=2, healthy=1, failed=1), NOW).status.reason == "max-failed"


def test_failures_during_a_manual_pause_halt_when_it_is_resumed():
    paused = replace(RUNNING, state=State.PAUSED, reason="manual", spec_revision=2)
    asked = spec(wanted=Wanted.RESUME, revision=3)
    running = reconcile(asked, paused, fleet(failed=1), NOW).status
    assert running.tolerated == 0
    assert reconcile(asked, running, fleet(failed=1), NOW).status.reason == "max-failed"


def test_a_pinned_cohort_is_not_resumed():
    paused = replace(RUNNING, state=State.PAUSED, reason="pinned", spec_revision=1)
    asked = spec(wanted=Wanted.RESUME, revision=2, pinned=True)
    assert reconcile(asked, paused, fleet(), NOW).status.state is State.PAUSED


def test_advance_opens_the_next_stage_without_its_gate():
    following = reconcile(spec(advance_to=1, revision=2), RUNNING, fleet(waiting=1, trial=1), NOW)
    assert names(following) == ["stage-passed", "stage-opened"]
    assert following.events[0].reason == "advanced"
    assert following.status.stage == 1
    assert reconcile(spec(advance_to=1, revision=2), following.status, fleet(waiting=1), NOW).events == ()


def test_advance_past_the_last_stage_completes():
    last = replace(RUNNING, stage=2, progress=10_000)
    following = reconcile(spec(advance_to=3, revision=2), last, fleet(waiting=1), NOW)
    assert following.status.state is State.COMPLETED


def test_an_advance_does_not_undo_a_halt_of_the_same_instant():
    following = reconcile(spec(advance_to=1, revision=2), RUNNING, fleet(rolled_back=1), NOW)
    assert following.status.stage_state is StageState.HALTED
    assert reconcile(spec(advance_to=1, revision=2), following.status, fleet(rolled_back=1), NOW).events == ()


# --- freeze ----------------------------------------------------------------------------------------------


def test_a_freeze_stops_deadlines_and_gates_but_not_halts():
    frozen = reconcile(spec(frozen=True), RUNNING, fleet(waiting=1, trial=1), NOW)
    assert (frozen.status.state, frozen.status.reason) == (State.RUNNING, "frozen")
    late = NOW + timedelta(days=1)
    assert reconcile(spec(frozen=True), frozen.status, fleet(waiting=1, trial=1), late).events == ()
    assert reconcile(spec(frozen=True), frozen.status, fleet(failed=1), late).status.reason == "max-failed"


def test_unfreezing_goes_on_in_the_same_stage_with_a_new_deadline():
    late = NOW + timedelta(days=1)
    following = reconcile(spec(), replace(RUNNING, reason="frozen"), fleet(waiting=1, trial=1), late)
    assert names(following) == ["unfrozen"]
    assert following.status == replace(RUNNING, opened_at=late)


def test_a_frozen_cohort_keeps_a_rollout_scheduled():
    assert reconcile(spec(frozen=True), Status(), fleet(), NOW).status.state is State.SCHEDULED


# --- the ends --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [Status(), RUNNING, halted()], ids=["scheduled", "running", "halted"])
def test_abort_ends_a_rollout(status):
    following = reconcile(spec(wanted=Wanted.ABORT, revision=2), status, fleet(rolled_back=1), NOW)
    assert following.status.state is State.ABORTED
    assert following.status.progress == 0
    assert following.status.finished_at == NOW


@pytest.mark.parametrize("status", [RUNNING, halted()], ids=["running", "halted"])
def test_abort_with_rollback_waits_until_no_agent_runs_the_version(status):
    asked = spec(wanted=Wanted.ABORT_ROLLBACK, revision=2)
    going = reconcile(asked, status, fleet(healthy=1, on_version=1), NOW).status
    assert (going.state, going.progress) == (State.ROLLING_BACK, 0)
    assert reconcile(asked, going, fleet(healthy=1, on_version=1), NOW).status == going
    gone = reconcile(asked, going, fleet(rolled_back=1, on_version=0), NOW)
    assert (gone.status.state, names(gone)) == (State.ROLLED_BACK, ["rolled-back"])


def test_a_rollback_of_one_that_never_started_is_an_abort():
    following = reconcile(spec(wanted=Wanted.ABORT_ROLLBACK, revision=2), Status(), fleet(), NOW)
    assert following.status.state is State.ABORTED


def test_an_aborted_rollout_may_still_be_taken_back():
    aborted = replace(RUNNING, state=State.ABORTED, progress=0, finished_at=NOW, spec_revision=2)
    following = reconcile(spec(wanted=Wanted.ABORT_ROLLBACK, revision=3), aborted, fleet(on_version=1), NOW)
    assert following.status.state is State.ROLLING_BACK
    assert following.status.finished_at is None


@pytest.mark.parametrize("state", [State.SCHEDULED, State.RUNNING, State.PAUSED, State.ROLLING_BACK])
def test_a_newer_rollout_supersedes_one_that_has_not_ended(state):
    asked = spec(wanted=Wanted.SUPERSEDE, revision=2)
    assert reconcile(asked, replace(RUNNING, state=state), fleet(), NOW).status.state is State.SUPERSEDED


@pytest.mark.parametrize("state", [State.COMPLETED, State.ROLLED_BACK, State.SUPERSEDED, State.ABORTED])
@pytest.mark.parametrize("wanted", [Wanted.RUN, Wanted.RESUME, Wanted.PAUSE, Wanted.SUPERSEDE])
def test_an_end_is_an_end(state, wanted):
    ended = replace(RUNNING, state=state)
    assert reconcile(spec(wanted=wanted, revision=9), ended, fleet(failed=5), NOW).status == ended


# --- sizes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "members", "count"),
    [
        (Stage(share_bp=100), 20, 1),
        (Stage(share_bp=100), 0, 0),
        (Stage(share_bp=1000), 15, 2),
        (Stage(share_bp=10_000), 15, 15),
        (Stage(count=5), 20, 5),
        (Stage(count=5), 3, 3),
        (Stage(count=5), 0, 0),
    ],
)
def test_a_stage_reaches_at_least_one_agent_unless_there_is_none(stage, members, count):
    assert wanted_count(stage, members) == count


@pytest.mark.parametrize(
    ("stage", "reached", "limit"),
    [
        (Stage(count=1), 100, 0),
        (Stage(count=1, max_failed=3), 1, 3),
        (Stage(count=1, max_failed_bp=100), 99, 0),
        (Stage(count=1, max_failed_bp=100), 250, 2),
        (Stage(count=1, max_failed=3, max_failed_bp=1000), 100, 10),
    ],
)
def test_the_failure_limit_is_a_count_or_a_share(stage, reached, limit):
    assert failed_limit(stage, reached) == limit


def test_a_stage_survives_json():
    stage = Stage(share_bp=100, soak_s=5, min_sample=2, max_failed_bp=50, max_silent=1, deadline_s=9)
    assert Stage.from_json(stage.to_json()) == stage


@pytest.mark.parametrize(
    "stage",
    [{}, {"count": 1, "share_bp": 1}, {"count": 0}, {"share_bp": 10_001}, {"count": 1, "deadline_s": 0}],
)
def test_a_stage_that_cannot_be_meant_is_refused(stage):
    with pytest.raises(MalformedError):
        Stage.from_json(stage)


@pytest.mark.parametrize("stages", [(), (Stage(count=5), Stage(count=1)), (Stage(count=1),) * 51])
def test_stages_that_cannot_be_meant_are_refused(stages):
    with pytest.raises(UsageError) as refused:
        check_stages(stages)
    assert refused.value.reason == "bad-stages"


# --- the directive ---------------------------------------------------------------------------------------

COHORT = CohortFacts("demo", "all", base="1.0.0", pace=Pace(poll_s=7, report_s=8, splay_s=9, retry_epoch=3))


def facts(state, **changes):
    return replace(RolloutFacts("1.1.0", "salt", state, 5000), **changes)


def test_without_a_rollout_everyone_runs_the_base():
    made = directive_for(COHORT, None, 4)
    assert (made.release, made.base, made.progress, made.mode) == ("1.0.0", "1.0.0", 10_000, Mode.ENABLED)
    assert (made.poll_s, made.report_s, made.splay_s, made.retry_epoch, made.revision) == (7, 8, 9, 3, 4)


def test_before_any_release_there_is_nothing_to_run():
    made = directive_for(replace(COHORT, base=None), None, 1)
    assert (made.release, made.base) == (None, None)


def test_a_running_rollout_offers_its_release_as_far_as_its_progress():
    made = directive_for(COHORT, facts(State.RUNNING), 1)
    assert (made.release, made.base, made.progress, made.salt) == ("1.1.0", "1.0.0", 5000, "salt")
    assert not made.rollback


def test_a_rollout_to_an_older_release_lets_agents_go_back():
    assert directive_for(COHORT, facts(State.RUNNING, is_older=True), 1).rollback


STOPPED = [State.PAUSED, State.ABORTED, State.SUPERSEDED]


@pytest.mark.parametrize("state", STOPPED)
@pytest.mark.parametrize("running", ["1.0.0", "1.1.0", "0.9.0"])
def test_a_stopped_rollout_offers_nothing_to_an_agent_that_has_something(state, running):
    made = directive_for(COHORT, facts(state, progress=10_000), 1)
    assert made.mode is Mode.SUSPENDED
    assert assign(made, "any", running).version is None


@pytest.mark.parametrize("state", STOPPED)
def test_under_a_stopped_rollout_a_new_agent_gets_the_base(state):
    given = assign(directive_for(COHORT, facts(state, progress=10_000), 1), "any", None)
    assert (given.version, given.reason) == ("1.0.0", Reason.FIRST_INSTALL)


@pytest.mark.parametrize("state", [State.ROLLING_BACK, State.ROLLED_BACK])
def test_a_rollback_sends_everyone_to_the_base(state):
    made = directive_for(COHORT, facts(state, progress=0), 1)
    assert (made.release, made.progress, made.rollback) == ("1.0.0", 10_000, True)
    assert assign(made, "any", "1.1.0").version == "1.0.0"


def test_a_completed_rollout_is_the_base_for_all():
    made = directive_for(replace(COHORT, base="1.1.0"), facts(State.COMPLETED, progress=10_000), 1)
    assert (made.release, made.base, made.progress, made.mode) == ("1.1.0", "1.1.0", 10_000, Mode.ENABLED)


@pytest.mark.parametrize("state", [State.DRAFT, State.SCHEDULED])
def test_a_rollout_that_has_not_begun_changes_nothing(state):
    assert directive_for(COHORT, facts(state), 1).release == "1.0.0"


@pytest.mark.parametrize("state", list(State))
def test_a_pin_goes_before_any_rollout(state):
    made = directive_for(replace(COHORT, pin="0.9.0", pin_is_older=True), facts(state), 1)
    assert (made.release, made.base, made.progress, made.rollback) == ("0.9.0", "0.9.0", 10_000, True)
    assert made.mode is Mode.ENABLED


def test_a_newer_pin_asks_nobody_to_go_back():
    assert not directive_for(replace(COHORT, pin="2.0.0"), None, 1).rollback


@pytest.mark.parametrize("state", list(State))
def test_a_frozen_cohort_takes_nothing_new(state):
    assert directive_for(replace(COHORT, frozen=True), facts(state), 1).mode is Mode.SUSPENDED


# --- after the server was away -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "wish", "waiting", "ends"),
    [
        pytest.param(replace(RUNNING, opened_at=NOW - DEADLINE), Wanted.RUN, 1, "halted", id="deadline"),
        pytest.param(
            replace(RUNNING, stage_state=StageState.SOAKING, soaking_since=NOW - SOAK),
            Wanted.RUN,
            0,
            "stage-passed",
            id="soak",
        ),
        pytest.param(
            replace(RUNNING, state=State.COMPLETED, watch_until=NOW, watch_at=NOW),
            Wanted.RUN,
            0,
            "watch-over",
            id="watch",
        ),
        pytest.param(
            replace(RUNNING, state=State.ROLLING_BACK), Wanted.ABORT_ROLLBACK, 0, "rolled-back", id="way back"
        ),
    ],
)
def test_nothing_ends_by_time_before_the_server_has_listened(status, wish, waiting, ends):
    minute = timedelta(minutes=1)
    came = Hearing(((NOW - 2 * minute, NOW - minute + timedelta(seconds=1)),), minute)
    gone = Hearing(((NOW - minute, NEVER),), minute)
    heard = Hearing(((NOW - timedelta(days=9), NOW - timedelta(days=8)),), minute)
    for hearing, expected in ((came, []), (gone, []), (heard, [ends]), (ALWAYS, [ends])):
        seen = fleet(waiting=waiting, healthy=1 - waiting, hearing=hearing)
        assert names(reconcile(spec(wanted=wish), status, seen, NOW))[:1] == expected


def test_a_watch_that_waits_for_the_server_to_be_heard_is_looked_at_once_a_minute_as_before():
    """Else each tick would write it anew, for as long as no web process is there."""
    minute = timedelta(minutes=1)
    seen = fleet(healthy=1, hearing=Hearing(((NOW - minute, NEVER),), minute))
    over = replace(RUNNING, state=State.COMPLETED, watch_until=NOW, watch_at=NOW)
    assert reconcile(spec(), over, seen, NOW).status.watch_at == NOW + LOOK_EVERY
    back = fleet(healthy=1, hearing=Hearing(((NOW - minute, NOW),), minute / 6))
    assert reconcile(spec(), over, back, NOW).status.watch_at == NOW + minute / 6
