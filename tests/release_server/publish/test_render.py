"""What operators read: durations, times, shares, the explanation of an agent, and the watch views."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from agent_core.console import duration_s
from release_server.publish import render, words

NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)

unhurried = settings(deadline=None)


def rollout(**changes: Any) -> dict[str, Any]:
    gate = {"soak_s": 1_800, "max_failed_bp": 100, "max_failed": None, "min_sample": 1, "deadline_s": 7_200}
    return {
        "id": 31,
        "name": "r-31",
        "product": "warehouse-agent",
        "cohort": "eu-web",
        "version": "1.5.0",
        "base": "1.4.2",
        "state": "running",
        "stage": 1,
        "stage_state": "open",
        "progress": 1_000,
        "reason": "",
        "detail": "",
        "stages": [{"share_bp": share_bp, "count": None, **gate} for share_bp in (100, 1_000, 10_000)],
        "members": 20,
        "counters": {"offered": 1, "healthy": 2, "failed": 0, "rolled_back": 1, "trial": 1},
        "created_at": "2026-01-31T11:00:00Z",
        "created_by": "ada",
        "finished_at": None,
        "events": [],
    } | changes


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0 s"),
        (0, "0 s"),
        (0.9, "0 s"),
        (42, "42 s"),
        (60, "1 min"),
        (61, "1 min 1 s"),
        (3_599, "59 min 59 s"),
        (3_600, "1 h"),
        (7_500, "2 h 5 min"),
        (3_601, "1 h"),
        (86_400, "1 d"),
        (273_600, "3 d 4 h"),
        (40_000_000, "462 d 23 h"),
    ],
)
def test_a_duration_shows_its_two_largest_units(seconds: float, text: str) -> None:
    assert render.duration(seconds) == text


@unhurried
@given(st.integers(0, 10**9))
def test_a_shown_duration_is_never_more_than_it_was_and_never_off_by_more_than_a_twenty_fourth(
    seconds: int,
) -> None:
    parts = render.duration(seconds).replace("min", "m").split()
    shown = sum(duration_s(number + unit) for number, unit in zip(parts[::2], parts[1::2], strict=True))
    assert shown <= seconds
    assert seconds - shown < max(1, seconds / 24)


@pytest.mark.parametrize(
    ("moment", "text"),
    [
        (None, "never"),
        ("", "never"),
        ("2026-01-31T12:00:00Z", "just now"),
        ("2026-01-31T12:00:02Z", "just now"),
        ("2026-01-31T11:59:18Z", "42 s ago"),
        ("2026-01-30T12:00:00Z", "1 d ago"),
        ("2026-01-31T12:03:00Z", "in 3 min"),
    ],
)
def test_how_long_ago(moment: str | None, text: str) -> None:
    assert render.ago(moment, NOW) == text


@pytest.mark.parametrize(
    ("basis_points", "text"),
    [(0, "0%"), (1, "0.01%"), (50, "0.5%"), (100, "1%"), (1_250, "12.5%"), (10_000, "100%")],
)
def test_basis_points_are_shown_as_percent(basis_points: int, text: str) -> None:
    assert render.percent(basis_points) == text


def test_stages_say_their_reach_and_limit_in_the_unit_they_were_given() -> None:
    assert render.size_of({"share_bp": 1_000}) == "10%"
    assert render.size_of({"count": 1, "share_bp": None}) == "1 agent"
    assert render.limit_of({"max_failed_bp": 100}) == "1%"
    assert render.limit_of({"max_failed": 0}) == "0 agents"


# --- agents ----------------------------------------------------------------------------------------------

WHY = {
    "agent": "web-17",
    "summary": "web-17 runs 1.4.2; its cohort eu-web is moving to 1.5.0. It is not updating because:",
    "chain": [
        {"ok": True, "code": "reported", "text": "reported 42 s ago"},
        {"ok": True, "code": "cohort", "text": "cohort eu-web"},
        {"ok": True, "code": "platform", "text": "platform linux-x86_64 has a bundle"},
        {
            "ok": False,
            "code": "not-yet",
            "text": "rollout r-31 is at 10%; this agent's place is 63%. "
            "At this pace its turn comes about 15:40.",
            "then": "to move it now:  release agents move web-17 --cohort …",
        },
    ],
}


def test_why_reads_as_a_summary_then_what_holds_then_what_does_not_and_the_way_out() -> None:
    assert render.why(WHY) == (
        "web-17 runs 1.4.2; its cohort eu-web is moving to 1.5.0. It is not updating because:\n"
        "  ok  reported 42 s ago        ok  cohort eu-web        ok  platform linux-x86_64 has a bundle\n"
        "  no  rollout r-31 is at 10%; this agent's place is 63%. At this pace its turn comes about 15:40.\n"
        "      to move it now:  release agents move web-17 --cohort …"
    )


def test_why_breaks_a_line_of_things_that_hold_when_it_is_full() -> None:
    assert render.why(WHY, width=50).splitlines()[1:4] == [
        "  ok  reported 42 s ago        ok  cohort eu-web",
        "  ok  platform linux-x86_64 has a bundle",
        "  no  rollout r-31 is at 10%; this agent's place is 63%. At this pace its turn comes about 15:40.",
    ]


def test_why_of_an_agent_that_is_well_is_its_summary_alone() -> None:
    assert render.why({"agent": "a", "summary": "a runs 1.5.0, as it should.", "chain": []}) == (
        "a runs 1.5.0, as it should."
    )


def test_an_agent_shows_the_operators_labels_over_its_own_and_its_history() -> None:
    agent = {
        "id": "web-17",
        "product": "warehouse-agent",
        "platform": "linux-x86_64",
        "gate": "",
        "labels": {"region": "eu", "tier": "web"},
        "operator_labels": {"tier": "db"},
        "cohort": "eu-web",
        "cohort_fixed": True,
        "version": "1.4.2",
        "phase": "idle",
        "reason": "skipped",
        "detail": "1.5.0 failed here",
        "held": True,
        "state": "held",
        "seen_at": "2026-01-31T11:59:18Z",
        "enrolled_at": "2026-01-01T12:00:00Z",
        "retired_at": None,
        "events": [
            {"at": "2026-01-31T11:00:00Z", "version": "1.5.0", "state": "rolled_back", "reason": "unhealthy"}
        ],
    }
    shown = render.agent_view(agent, NOW)
    for said in (
        "region=eu,tier=db",
        "eu-web (moved here)",
        "state          held\n",
        "skipped · 1.5.0 failed here",
        "42 s ago",
        "rolled_back",
    ):
        assert said in shown
    assert "failed, held on the host" in render.agent_view(agent | {"state": "failed"}, NOW)
    assert "retired" not in shown
    assert "retired" in render.agent_view(agent | {"retired_at": "2026-01-31T11:00:00Z"}, NOW)
    assert "web-17" in render.agent_table([agent], NOW)
    assert render.agent_table([], NOW) == "no agents match"


# --- cohorts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cohort", "text"),
    [
        ({}, "follows"),
        ({"pin": "1.4.2"}, "pinned to 1.4.2"),
        ({"frozen": True, "frozen_until": None}, "frozen"),
        ({"frozen": True, "frozen_until": "2026-02-01T06:00:00Z"}, "frozen until 2026-02-01T06:00:00Z"),
        ({"frozen": True, "pin": "1.4.2"}, "frozen"),
    ],
)
def test_what_holds_a_cohort(cohort: dict[str, Any], text: str) -> None:
    assert render.standing(cohort) == text


@pytest.mark.parametrize("text", ["always", "fri,sat 22:00-04:00 Europe/Berlin"])
def test_a_window_is_shown_as_the_option_takes_it(text: str) -> None:
    said = words.window(text)
    shown = render.cohort_view({"name": "eu-web", "window": said if isinstance(said, dict) else None})
    assert f"window    {text}\n" in shown


@pytest.mark.parametrize(
    ("lease", "budget", "lines"),
    [
        (None, None, ("lease     none", "budget    none")),
        (
            "site=2,10%",
            "site=500kB",
            ("lease     site=2,10%", "budget    500 kB/s into each site, for one agent at a time"),
        ),
        (
            "rack=2",
            "rack=2MB,4",
            ("lease     rack=2", "budget    2000 kB/s into each rack, for 4 agents at once"),
        ),
    ],
)
def test_what_limits_a_failure_domain_is_shown(
    lease: str | None, budget: str | None, lines: tuple[str, str]
) -> None:
    said = {"lease": lease and words.lease(lease), "budget": budget and words.budget(budget)}
    assert set(lines) <= set(render.cohort_view({"name": "eu-web", **said}).splitlines())


def test_a_preview_marks_who_joins_and_who_leaves() -> None:
    answer = {"match": "", "agents": ["a", "b"], "joins": ["b"], "leaves": ["c"]}
    assert render.preview(answer) == "2 agents would match everything: 1 join, 1 leave\n  a\n+ b\n- c"


# --- rollouts --------------------------------------------------------------------------------------------


def test_a_rollout_in_one_line() -> None:
    assert render.rollout_line(rollout()) == (
        "r-31  1.4.2 → 1.5.0  running  stage 2/3 (10%) open  2/20 healthy, 1 offered, 1 trial, 1 rolled back"
    )


def test_a_halted_rollout_says_why_in_its_line() -> None:
    halted = rollout(
        state="paused", stage_state="halted", reason="max-failed", detail="1 of 1 failed (limit 0)"
    )
    assert "paused (max-failed: 1 of 1 failed (limit 0))" in render.rollout_line(halted)


def test_a_first_rollout_comes_from_nothing() -> None:
    assert render.travel(rollout(base=None)) == "nothing → 1.5.0"


def test_the_view_of_a_rollout_shows_each_stage_as_passed_current_or_pending() -> None:
    shown = render.rollout_view(rollout(), NOW)
    stages = [line.split() for line in shown.splitlines()[-3:]]
    assert [words[1:3] for words in stages] == [["1%", "passed"], ["10%", "open"], ["100%", "pending"]]
    assert "1 h ago by ada" in shown
    assert "finished" not in shown
    done = rollout(state="completed", stage=2, finished_at="2026-01-31T11:59:00Z")
    assert "finished  1 min ago" in render.rollout_view(done, NOW)
    assert [render.stage_state(done, place) for place in range(3)] == ["passed"] * 3


USUAL = {"not_before": None, "approval": False, "downgrade": False, "stratified": False}
USUAL |= {"watch_s": 3_600, "false_halt_bp": 100, "figures": True}


def test_whoever_approves_a_rollout_sees_all_that_the_digest_is_of() -> None:
    said = USUAL | dict.fromkeys(("approval", "downgrade", "stratified"), True)
    said |= {"not_before": "2026-02-01T02:00:00Z", "watch_s": 0, "figures": False}
    plan = {"state": "awaiting_approval", "stage": 0, "stage_state": "pending", "digest": "ab" * 32}
    waits = rollout(terms=said, **plan)
    waits["stages"][2] |= {"max_silent": 3}
    shown = render.rollout_view(waits, NOW).splitlines()
    assert "asked     1 h ago by ada" in shown
    assert "begins    not before 2026-02-01T02:00:00Z" in shown
    assert shown[8] == (
        "terms     a downgrade, on purpose; first an agent of each site and platform; a second person"
        " approves; nothing is compared with before; not watched afterwards"
    )
    assert f"plan      {'ab' * 32}" in shown, "whole, as `approve --digest` takes it"
    assert "MAY BE SILENT" in shown[-4]
    assert [line.split()[-2:] for line in shown[-3:]] == [["h", "-"], ["h", "-"], ["3", "agents"]]


def test_terms_that_are_as_usual_are_not_told() -> None:
    assert render.rollout_view(rollout(terms=USUAL), NOW) == render.rollout_view(rollout(), NOW)
    longer = render.rollout_view(rollout(terms=USUAL | {"watch_s": 7_200}), NOW)
    assert "terms     watched for 2 h afterwards" in longer


def test_history_says_who_did_it_and_the_server_where_nobody_did() -> None:
    events = [
        {
            "at": "2026-01-31T11:00:00Z",
            "event": "opened",
            "stage": 0,
            "reason": "",
            "detail": "",
            "actor": "",
        },
        {"at": "2026-01-31T11:05:00Z", "event": "paused", "stage": 0, "reason": "manual", "actor": "ada"},
    ]
    lines = render.event_table(events).splitlines()
    assert lines[1].endswith("server")
    assert lines[2].endswith("ada")
    assert render.event_table([]) == "nothing happened yet"


@pytest.mark.parametrize(
    ("place", "changes", "part"),
    [
        (0, {}, 1.0),
        (1, {}, 1.0),
        (1, {"counters": {"healthy": 1}}, 0.5),
        (2, {}, 0.0),
        (2, {"stage": 2, "counters": {"healthy": 5}}, 0.25),
        (1, {"members": 0, "counters": {}}, 0.0),
    ],
    ids=["passed", "full", "half", "not begun", "quarter", "nobody there"],
)
def test_how_much_of_a_stages_bar_is_filled(place: int, changes: dict[str, Any], part: float) -> None:
    assert render.filled(rollout(**changes), place) == part


def test_a_stage_of_a_count_reaches_at_most_everybody() -> None:
    stages = [{"count": 5, "share_bp": None}, {"count": 50}]
    assert [render.target(rollout(stages=stages), place) for place in (0, 1)] == [5, 20]


def test_without_a_terminal_a_watch_is_one_line_a_change() -> None:
    lines: list[str] = []
    with render.RolloutView(None, lines.append) as view:
        view.show(rollout())
        view.show(rollout())
        view.show(rollout(counters={"healthy": 3}))
        view.show(rollout(counters={"healthy": 3}), "the server does not answer")
    assert [line.split("  ")[-1] for line in lines] == [
        "2/20 healthy, 1 offered, 1 trial, 1 rolled back",
        "3/20 healthy",
        "(the server does not answer)",
    ]
    assert not any("\x1b" in line for line in lines)


def test_on_a_terminal_a_watch_draws_a_bar_for_each_stage_and_the_counters() -> None:
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100, color_system=None, _environ={})
    with render.RolloutView(terminal) as view:
        view.show(rollout(), "the server does not answer")
    shown = screen.getvalue()
    for said in (
        "r-31",
        "1.4.2 → 1.5.0",
        "━",
        "passed",
        "pending",
        "2/20 healthy",
        "1 rolled back",
        "not answer",
    ):
        assert said in shown


@pytest.mark.parametrize("state", ["completed", "aborted", "paused", "running", "superseded"])
def test_a_rollout_can_be_drawn_in_any_state(state: str) -> None:
    screen = io.StringIO()
    Console(file=screen, width=100, _environ={}).print(
        render.picture(rollout(state=state, stages=[], counters={}))
    )
    assert state in screen.getvalue()


@pytest.mark.parametrize(
    ("state", "style"),
    [
        ("completed", "green"),
        ("halted", "red"),
        ("rolled_back", "red"),
        ("soaking", "yellow"),
        ("running", ""),
    ],
)
def test_good_is_green_and_bad_is_red(state: str, style: str) -> None:
    assert render.style_of(state) == style
