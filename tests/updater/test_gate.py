"""The gate of a trial: a table of what each fact decides, and properties over all of them."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_core import clock
from agent_core.health import Check, Kind, Monitor, Subject
from agent_core.wire import Reason
from agent_core.workload import Place
from updater.gate import Step, TrialFacts, judge, observed_s

GOOD = TrialFacts(
    started_s=1000.0,
    observe_s=60.0,
    healthy=True,
    ready=True,
    healthy_since_s=1005.0,
    manifest_verified=True,
    boots_left=2,
)


@pytest.mark.parametrize(
    ("change", "now_s", "step", "reason"),
    [
        pytest.param({}, 1065.0, Step.COMMIT, Reason.OBSERVED, id="healthy for the whole time is committed"),
        pytest.param({}, 1064.9, Step.REARM, Reason.IN_TRIAL, id="a moment too early only re-arms"),
        pytest.param({}, 1005.0, Step.REARM, Reason.IN_TRIAL, id="the first pass re-arms"),
        pytest.param({"boots_left": 0}, 1065.0, Step.COMMIT, Reason.OBSERVED, id="the last boot may commit"),
        pytest.param(
            {"ready": False, "healthy_since_s": None},
            1001.0,
            Step.WAIT,
            Reason.IN_TRIAL,
            id="a slow start is waited for",
        ),
        pytest.param(
            {"ready": False, "healthy_since_s": None},
            1e6,
            Step.WAIT,
            Reason.IN_TRIAL,
            id="never ready never re-arms: the dead-man or a check ends it",
        ),
        pytest.param(
            {"ready": False, "failures": ("http: 500",)},
            1065.0,
            Step.WAIT,
            Reason.IN_TRIAL,
            id="no commit in the middle of a tolerated failure",
        ),
        pytest.param(
            {"manifest_verified": False},
            1065.0,
            Step.REARM,
            Reason.OFFLINE,
            id="no network at the end delays the commit",
        ),
        pytest.param(
            {"manifest_verified": False},
            1e9,
            Step.REARM,
            Reason.OFFLINE,
            id="no network for ever is never a rollback",
        ),
        pytest.param(
            {"manifest_verified": False, "given_up": "up-to-date"},
            1010.0,
            Step.ROLL_BACK,
            Reason.CANNOT_UPDATE,
            id="one that cannot verify that it is not wanted any more goes back",
        ),
        pytest.param(
            {"given_up": "up-to-date"},
            1065.0,
            Step.COMMIT,
            Reason.OBSERVED,
            id="one that can verify follows the word by itself, once it is good",
        ),
        pytest.param({"healthy": False}, 1010.0, Step.ROLL_BACK, Reason.UNHEALTHY, id="unhealthy goes back"),
        pytest.param(
            {"healthy": False, "manifest_verified": False},
            1010.0,
            Step.ROLL_BACK,
            Reason.UNHEALTHY,
            id="unhealthy goes back without a network too",
        ),
        pytest.param(
            {"workload_exits": 1},
            1010.0,
            Step.ROLL_BACK,
            Reason.WORKLOAD_EXITED,
            id="an exit of the workload goes back",
        ),
        pytest.param(
            {"workload_exits": 1, "exits_allowed": 1},
            1065.0,
            Step.COMMIT,
            Reason.OBSERVED,
            id="a tolerated exit does not",
        ),
        pytest.param(
            {"workload_exits": 1},
            1065.0,
            Step.ROLL_BACK,
            Reason.WORKLOAD_EXITED,
            id="an exit at the last moment still does",
        ),
        pytest.param(
            {"boots_left": -1}, 1065.0, Step.ROLL_BACK, Reason.BOOTS_USED_UP, id="one boot too many goes back"
        ),
        pytest.param(
            {"hooked_s": None},
            1e6,
            Step.REARM,
            Reason.IN_TRIAL,
            id="no commit before the hook is done",
        ),
        pytest.param(
            {"hooked_s": 1060.0},
            1119.0,
            Step.REARM,
            Reason.IN_TRIAL,
            id="what the hook changed is observed for the whole time",
        ),
        pytest.param({"hooked_s": 1060.0}, 1120.0, Step.COMMIT, Reason.OBSERVED, id="and committed after it"),
        pytest.param(
            {"hooked_s": None, "hook_failure": "post_activate: exit 1"},
            1010.0,
            Step.ROLL_BACK,
            Reason.POST_ACTIVATE,
            id="a hook that fails goes back",
        ),
        pytest.param(
            {"healthy_since_s": 900.0},
            1030.0,
            Step.REARM,
            Reason.IN_TRIAL,
            id="health of an earlier run does not count",
        ),
        pytest.param(
            {"healthy_since_s": 9999.0},
            1065.0,
            Step.REARM,
            Reason.IN_TRIAL,
            id="health of the future does not count",
        ),
    ],
)
def test_the_table_of_verdicts(change: dict, now_s: float, step: Step, reason: Reason) -> None:
    verdict = judge(replace(GOOD, **change), now_s)
    assert (verdict.step, verdict.reason) == (step, reason)
    assert verdict.detail


def test_a_rollback_names_the_checks_that_failed() -> None:
    facts = replace(GOOD, healthy=False, failures=("http ready: status 500", "tcp 80: refused"))
    assert judge(facts, 1010.0).detail.endswith("http ready: status 500; tcp 80: refused")


moments = st.floats(min_value=0, max_value=1e9)
facts_of_any_kind = st.builds(
    TrialFacts,
    started_s=moments,
    observe_s=st.floats(min_value=0.1, max_value=1e6),
    healthy=st.booleans(),
    ready=st.booleans(),
    healthy_since_s=st.none() | moments,
    manifest_verified=st.booleans(),
    workload_exits=st.integers(0, 5),
    exits_allowed=st.integers(0, 5),
    hooked_s=st.none() | moments,
    hook_failure=st.sampled_from(["", "", "post_activate: exit 1"]),
    given_up=st.sampled_from(["", "", "", "revoked"]),
    boots_left=st.integers(-2, 5),
    failures=st.lists(st.text(max_size=300), max_size=5).map(tuple),
)


@given(facts_of_any_kind, moments)
def test_a_commit_is_fully_earned(facts: TrialFacts, now_s: float) -> None:
    if judge(facts, now_s).step is Step.COMMIT:
        assert facts.healthy
        assert facts.ready
        assert facts.manifest_verified
        assert facts.healthy_since_s is not None
        assert facts.hooked_s is not None
        assert now_s - facts.hooked_s >= facts.observe_s
        assert now_s - facts.healthy_since_s >= facts.observe_s
        assert now_s - facts.started_s >= facts.observe_s


@given(facts_of_any_kind, moments)
def test_only_local_faults_and_a_signed_word_roll_back(facts: TrialFacts, now_s: float) -> None:
    ended = facts.workload_exits > facts.exits_allowed or facts.hook_failure != ""
    local = not facts.healthy or ended or facts.boots_left < 0
    told = facts.given_up != "" and not facts.manifest_verified
    assert (judge(facts, now_s).step is Step.ROLL_BACK) == (local or told)


@given(facts_of_any_kind, moments)
def test_the_network_never_turns_a_verdict_into_a_rollback(facts: TrialFacts, now_s: float) -> None:
    facts = replace(facts, given_up="")  # which is a signed word, heard over a network that works
    online = judge(replace(facts, manifest_verified=True), now_s)
    offline = judge(replace(facts, manifest_verified=False), now_s)
    assert (online.step is Step.ROLL_BACK) == (offline.step is Step.ROLL_BACK)


@given(facts_of_any_kind, moments)
def test_only_a_version_whose_checks_pass_puts_off_its_dead_man(facts: TrialFacts, now_s: float) -> None:
    if judge(facts, now_s).step is Step.REARM:
        assert facts.healthy
        assert facts.ready


@given(facts_of_any_kind, moments, st.floats(min_value=0, max_value=1e6))
def test_a_commit_stays_a_commit_as_time_goes_on(facts: TrialFacts, now_s: float, later_s: float) -> None:
    if judge(facts, now_s).step is Step.COMMIT:
        assert judge(facts, now_s + later_s).step is Step.COMMIT


@given(facts_of_any_kind, moments)
def test_the_observed_time_is_never_negative_nor_longer_than_the_run(facts: TrialFacts, now_s: float) -> None:
    assert 0 <= observed_s(facts, now_s) <= max(0.0, now_s - facts.started_s)


@given(facts_of_any_kind, moments)
def test_the_detail_stays_short_enough_for_a_report(facts: TrialFacts, now_s: float) -> None:
    assert len(judge(facts, now_s).detail) <= 500


def test_a_sleep_after_the_hook_is_no_observation_of_what_it_did() -> None:
    """The service keeps the hook's end without the sleep before it, and hands it on with all of it."""
    slept_s = 8 * 3600
    facts = replace(GOOD, healthy_since_s=1005.0 + slept_s, hooked_s=1050.0 + slept_s)
    assert observed_s(facts, 1070.0 + slept_s) == 20.0


def test_no_wall_clock_is_asked_in_a_trial(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A clock that jumps in the observation ends nothing and shortens nothing: nobody looks at it."""

    def jumped() -> NoReturn:
        raise AssertionError("the wall clock was asked")

    monkeypatch.setattr(clock, "now", jumped)
    monkeypatch.setattr("time.time", jumped)
    workload = SimpleNamespace(pid=os.getpid(), restarts=0)
    subject = Subject(Place(tmp_path, tmp_path, "1.1.0"), workload)
    monitor = Monitor([Check(Kind.PROCESS, "lives")], subject, 1000.0, launch=lambda run: run())
    steps = []
    for now_s in range(1000, 1062):
        health = monitor.step(now_s)
        facts = replace(
            GOOD, ready=health.ready, healthy=health.healthy, healthy_since_s=health.healthy_since_s
        )
        steps.append(judge(facts, now_s).step)
    assert steps == [Step.REARM] * 60 + [Step.COMMIT] * 2
