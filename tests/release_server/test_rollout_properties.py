"""What holds for a rollout whatever happens to it, in any order."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from hypothesis import given, settings
from hypothesis import strategies as st

from agent_core.directive import assign, bucket, progress_for
from agent_core.wire import AttemptState, Mode
from release_server.directives import CohortFacts, RolloutFacts, directive_for
from release_server.figures import Worse
from release_server.rollout import FINISHED, Counters, Spec, StageState, State, Status, Wanted, reconcile
from release_server.stages import Stage, wanted_count

SALT = "salt"
BAD = {AttemptState.ROLLED_BACK, AttemptState.FAILED, AttemptState.SILENT}
ENDED = BAD | {AttemptState.HEALTHY, AttemptState.SKIPPED}
STAGES = (Stage(count=1, soak_s=30), Stage(share_bp=3000, soak_s=30), Stage(share_bp=10_000, soak_s=30))


@dataclass
class Model:
    """A fleet in memory, stepped by events, with the promises checked after every step."""

    spec: Spec = field(default_factory=lambda: Spec(STAGES, watch_s=3_600, false_halt_bp=100, figures=True))
    status: Status = field(default_factory=Status)
    attempts: dict = field(default_factory=dict)
    now: datetime = datetime(2026, 5, 1, tzinfo=UTC)
    halted_at: int | None = None
    worse: tuple = ()

    def counters(self):
        places = {agent: bucket(agent, SALT) for agent in self.attempts}
        reached = [agent for agent, place in places.items() if place < self.status.progress]
        counted = [state for state in self.attempts.values() if state is not None]
        return Counters(
            members=len(places),
            reached=len(reached),
            waiting=sum(self.attempts[agent] not in ENDED for agent in reached),
            on_version=counted.count(AttemptState.HEALTHY),
            candidates=tuple(
                progress_for(places, SALT, wanted_count(stage, len(places))) for stage in self.spec.stages
            ),
            attempts={state: counted.count(state) for state in AttemptState},
            worse=self.worse,
        )

    def settle(self):
        for _ in range(20):
            before = self.status
            following = reconcile(self.spec, before, self.counters(), self.now)
            self.status = following.status
            self.check(before)
            if following.status == before:
                return
        raise AssertionError("reconcile does not come to rest")

    def check(self, before):
        after = self.status
        if after.state not in (State.ABORTED, State.ROLLING_BACK, State.ROLLED_BACK, State.SUPERSEDED):
            assert after.progress >= before.progress, "progress shrank without an abort"
        if after.stage_state is StageState.HALTED and before.stage_state is not StageState.HALTED:
            self.halted_at = self.spec.revision
        if before.stage_state is StageState.HALTED and after.state is State.RUNNING:
            assert self.spec.wanted is Wanted.RESUME
            assert self.spec.revision > self.halted_at, "a wish from before the halt ended it"
        if before.stage_state is StageState.PENDING and after.stage_state is not StageState.PENDING:
            self.check_may_begin()
        if after.state in FINISHED or after.state is State.PAUSED or after.stage_state is StageState.PENDING:
            self.check_offers_nothing()

    def check_may_begin(self):
        """Only what was submitted and approved begins, and not before its time nor in a frozen cohort."""
        assert not self.spec.approval or self.spec.approved
        assert self.spec.not_before is None or self.now >= self.spec.not_before
        assert not self.spec.frozen
        assert not self.spec.pinned

    def check_offers_nothing(self):
        """A stopped rollout gives its release to nobody who has another."""
        rollout = RolloutFacts("2.0.0", SALT, self.status.state, self.status.progress)
        base = "2.0.0" if self.status.state is State.COMPLETED else "1.0.0"
        made = directive_for(CohortFacts("demo", "all", base=base), rollout, 1)
        if self.status.state is State.COMPLETED:
            return
        for agent in self.attempts:
            assert assign(made, agent, "1.0.0").version != "2.0.0"
            assert assign(made, agent, None).version != "2.0.0"

    def ask(self, wanted, **changes):
        self.spec = replace(self.spec, wanted=wanted, revision=self.spec.revision + 1, **changes)


AGENTS = st.integers(0, 14).map("agent-{}".format)
EVENTS = st.one_of(
    st.tuples(st.just("enroll"), AGENTS),
    st.tuples(st.just("retire"), AGENTS),
    st.tuples(st.just("report"), AGENTS, st.sampled_from(list(AttemptState))),
    st.tuples(st.just("finish"), st.sampled_from([AttemptState.HEALTHY] * 5 + [AttemptState.ROLLED_BACK])),
    st.tuples(st.just("ask"), st.sampled_from([Wanted.RUN, Wanted.PAUSE, Wanted.RESUME, Wanted.RESUME])),
    st.tuples(st.just("advance")),
    st.tuples(st.just("end"), st.sampled_from([Wanted.ABORT, Wanted.ABORT_ROLLBACK, Wanted.SUPERSEDE])),
    st.tuples(st.just("cohort"), st.sampled_from(["pinned", "frozen", "window_open"]), st.booleans()),
    st.tuples(st.just("approve")),
    st.tuples(st.just("wait"), st.integers(0, 10_000)),
    st.tuples(st.just("figures"), st.sampled_from([(), (Worse("rss", 3, 4),)])),
    st.tuples(st.just("settle")),
)


def apply(model, event):
    match event:
        case ("enroll", agent):
            model.attempts.setdefault(agent, None)
        case ("retire", agent):
            model.attempts.pop(agent, None)
        case ("report", agent, state) if agent in model.attempts:
            model.attempts[agent] = state
        case ("finish", state):
            for agent in model.attempts:
                if bucket(agent, SALT) < model.status.progress and model.attempts[agent] not in ENDED:
                    model.attempts[agent] = state
        case ("ask", wanted):
            model.ask(wanted)
        case ("advance",):
            model.ask(Wanted.RUN, advance_to=model.status.stage + 1)
        case ("end", wanted):
            model.ask(wanted)
        case ("cohort", fact, value):
            model.spec = replace(model.spec, **{fact: value})
        case ("approve",):
            model.ask(model.spec.wanted, approved=True)
        case ("wait", seconds):
            model.now += timedelta(seconds=seconds)
        case ("figures", worse):
            model.worse = worse
        case ("settle",):
            model.settle()


PLANS = st.fixed_dictionaries(
    {
        "approval": st.booleans(),
        "not_before": st.sampled_from([None, Model.now + timedelta(seconds=5_000)]),
    }
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([State.SCHEDULED, State.SCHEDULED, State.DRAFT]), PLANS, st.lists(EVENTS, max_size=60))
def test_whatever_happens_halts_hold_progress_grows_and_a_stopped_rollout_offers_nothing(state, plan, events):
    """Drafts, approvals, windows, freezes, pins, wishes and reports in any order, looked at now and then."""
    model = Model(attempts={f"agent-{number}": None for number in range(8)}, status=Status(state))
    model.spec = replace(model.spec, **plan)
    for event in events:
        apply(model, event)
    model.settle()


@settings(max_examples=80, deadline=None)
@given(
    st.permutations(range(10)),
    st.sets(st.integers(0, 9), min_size=1),
    st.lists(st.integers(0, 3), min_size=40, max_size=40),
    st.integers(0, 3),
)
def test_no_order_of_outcomes_loses_a_halt(order, failing, gaps, limit):
    """Agents end in any order, with looks in between or not: too many failures always end in a halt."""
    stages = tuple(replace(stage, max_failed=limit) for stage in STAGES)
    model = Model(Spec(stages), attempts={f"agent-{number}": None for number in range(10)})
    model.settle()
    for turn, look in enumerate(gaps):
        number = order[turn % 10]
        agent = f"agent-{number}"
        if bucket(agent, SALT) < model.status.progress and model.status.state is State.RUNNING:
            model.attempts[agent] = AttemptState.FAILED if number in failing else AttemptState.HEALTHY
        model.now += timedelta(seconds=20)
        for _ in range(look):
            model.settle()
    model.settle()
    failed = sum(state in BAD for state in model.attempts.values())
    if failed > limit:
        assert (model.status.state, model.status.stage_state) == (State.PAUSED, StageState.HALTED)
    else:
        assert model.status.state in (State.RUNNING, State.COMPLETED)


@settings(max_examples=150, deadline=None)
@given(st.sets(AGENTS, min_size=1))
def test_a_rollout_whose_agents_are_all_healthy_completes(names):
    model = Model(attempts=dict.fromkeys(names))
    for _ in range(20):
        model.settle()
        for agent in model.attempts:
            if bucket(agent, SALT) < model.status.progress:
                model.attempts[agent] = AttemptState.HEALTHY
        model.now += timedelta(seconds=31)
    assert model.status.state is State.COMPLETED


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(list(State)), st.integers(0, 10_000), st.booleans(), st.text(max_size=8))
def test_a_frozen_cohort_offers_nothing_new_in_any_state(state, progress, older, agent):
    cohort = CohortFacts("demo", "all", base="1.0.0", frozen=True)
    made = directive_for(cohort, RolloutFacts("2.0.0", SALT, state, progress, is_older=older), 1)
    assert made.mode is Mode.SUSPENDED
    assert assign(made, agent, "0.9.0").version is None
