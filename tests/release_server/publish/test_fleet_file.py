"""Fleet files: what is in them, what lies between them and what is so, and that applying one ends that."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_core.errors import Exit, SettingsError
from release_server import cohort_view, cohorts
from release_server.publish import fleet_file, fleet_plan, fleet_text, words
from release_server.publish.commands import fleet as fleet_commands
from tests.release_server.fleet_world import World
from tests.release_server.operator_desk import desk

EXAMPLE = Path(__file__).parents[3] / "examples" / "warehouse-agent" / "fleet.toml"
NOW = "2026-05-01T12:00:00Z"


@pytest.fixture
def world(sessions, clock):
    return World(sessions, clock)


@pytest.fixture
def at_desk(world, app, token, tmp_path, monkeypatch, capsys):
    with desk(app, token, tmp_path, monkeypatch, capsys) as sat:
        yield sat


def write(text: str) -> None:
    Path("fleet.toml").write_text(text)


# --- the file --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "why"),
    [
        pytest.param('product = "a"\nx = ?\n', "f.toml:2", "", id="no TOML"),
        pytest.param("x = 1\n", "f.toml:1: x", "no such key", id="an unknown table"),
        pytest.param("product = 3\n", "f.toml:1: product", "a text", id="a product that is no text"),
        pytest.param("cohorts = 3\n", "f.toml:1: cohorts", "not a table", id="cohorts that are no table"),
        pytest.param(
            "[cohorts.a]\n\nmatsch = ''\n", "f.toml:3: cohorts.a.matsch", "no such key", id="a misspelt key"
        ),
        pytest.param("[cohorts.a]\nmatch = 'a=(b'\n", "f.toml:2: cohorts.a.match", "match", id="a match"),
        pytest.param("[cohorts.a]\npoll = 'soon'\n", "f.toml:2: cohorts.a.poll", "duration", id="a duration"),
        pytest.param("[cohorts.a]\npoll = '0.5s'\n", "f.toml:2: cohorts.a.poll", "whole", id="half a second"),
        pytest.param("[cohorts.a]\nwindow = 'x'\n", "f.toml:2: cohorts.a.window", "window", id="a window"),
        pytest.param("[cohorts.a]\nlease = 'site'\n", "f.toml:2: cohorts.a.lease", "lease", id="a lease"),
        pytest.param("[cohorts.a]\nbudget = 'a=1B'\n", "f.toml:2: cohorts.a.budget", "4096", id="a drip"),
        pytest.param(
            "[cohorts.a]\npriority = true\n", "f.toml:2: cohorts.a.priority", "number", id="a number"
        ),
        pytest.param(
            "[cohorts.a]\napproval = 1\n", "f.toml:2: cohorts.a.approval", "true or", id="yes or no"
        ),
        pytest.param("[cohorts.a]\npin = 'v'\n", "f.toml:2: cohorts.a.pin", "version", id="a version"),
        pytest.param(
            "[cohorts.a]\npin = '1.0'\n", "f.toml:1: cohorts.a", "reason", id="a pin without reason"
        ),
        pytest.param(
            "[cohorts.a]\nfrozen = true\n", "f.toml:1: cohorts.a", "reason", id="a freeze without reason"
        ),
        pytest.param(
            "[cohorts.a]\nfrozen_until = '36h'\n",
            "f.toml:2: cohorts.a.frozen_until",
            "time",
            id="a moving end",
        ),
        pytest.param(
            "[cohorts.a]\nfrozen_until = 2026-01-01T00:00:00\n",
            "f.toml:2: cohorts.a.frozen_until",
            "zone",
            id="a time without a zone",
        ),
        pytest.param(
            "[cohorts.a]\nfrozen = false\nfrozen_until = 2026-01-01T00:00:00Z\n",
            "f.toml:3: cohorts.a.frozen_until",
            "not frozen",
            id="an end of nothing",
        ),
        pytest.param(
            "[calendars]\nx = 'sat'\n", "f.toml:2: calendars.x", "sat,sun ZONE", id="an entry without a zone"
        ),
        pytest.param(
            "[cohorts.a]\ncalendar = ['x']\n", "f.toml:2: cohorts.a.calendar", "no x", id="no entry"
        ),
        pytest.param("[cohorts.A]\n", "f.toml:1: cohorts.A", "form", id="a name that is none"),
        pytest.param("[cohorts]\na = 1\n", "f.toml:2: cohorts.a", "not a table", id="a cohort that is none"),
        pytest.param(
            "[policy]\nrevoked = '1.0'\n", "f.toml:2: policy.revoked", "list", id="a list that is none"
        ),
        pytest.param("[policy]\nflor = '1'\n", "f.toml:2: policy.flor", "no such key", id="a policy's key"),
    ],
)
def test_what_cannot_be_used_is_named_by_file_line_and_key(text, where, why):
    with pytest.raises(SettingsError) as refused:
        fleet_file.read(text, "f.toml")
    assert refused.value.what == f"{where} cannot be {'used' if why else 'read'}"
    assert why in refused.value.why


def test_a_misspelt_key_is_refused_with_the_nearest_one():
    with pytest.raises(SettingsError) as refused:
        fleet_file.read("[cohorts.a]\nprioryti = 3\n", "f.toml")
    assert (refused.value.then, refused.value.reason) == ("did you mean priority?", "unknown-setting")


# --- the plan --------------------------------------------------------------------------------------------


def cohort_of(name="a", **changes):
    standing = {"pin": None, "frozen": False, "frozen_until": None, "reason": ""}
    return fleet_file.DEFAULTS | standing | {"name": name, "revision": 7, "agents": 3} | changes


def planned(text, *present, **how):
    return fleet_plan.plan(fleet_file.read(text, "f.toml"), "demo", present, NOW, **how)


@pytest.mark.parametrize(
    ("text", "present", "steps"),
    [
        pytest.param("[cohorts.a]\n", cohort_of(), [], id="nothing"),
        pytest.param(
            "[cohorts.a]\npriority = 3\n", cohort_of(), [{"verb": "edit", "priority": 3}], id="edit"
        ),
        pytest.param(
            "[cohorts.a]\n",
            cohort_of(match="b=c", poll_s=5),
            [{"verb": "edit", "match": "", "poll_s": 60}],
            id="what is not said has its default",
        ),
        pytest.param(
            "[cohorts.a]\n", cohort_of(pin="1.0", frozen=True), [], id="a pin and a freeze by hand stay"
        ),
        pytest.param(
            "[cohorts.a]\npin = false\nfrozen = false\n",
            cohort_of(pin="1.0", frozen=True),
            [{"verb": "unpin"}, {"verb": "unfreeze"}],
            id="unless the file ends them",
        ),
        pytest.param(
            "[cohorts.a]\npin = '1.1'\nreason = 'r'\n",
            cohort_of(pin="1.0"),
            [{"verb": "pin", "version": "1.1", "reason": "r"}],
            id="another pin",
        ),
        pytest.param(
            "[cohorts.a]\nfrozen_until = 2026-05-02T00:00:00Z\nreason = 'r'\n",
            cohort_of(frozen=True),
            [{"verb": "freeze", "until": "2026-05-02T00:00:00Z", "reason": "r"}],
            id="a freeze that gets an end",
        ),
        pytest.param(
            "[cohorts.a]\nfrozen_until = 2026-04-02T00:00:00Z\nreason = 'r'\n",
            cohort_of(),
            [],
            id="a freeze that is over is none",
        ),
    ],
)
def test_a_plan_holds_what_differs_and_nothing_else(text, present, steps):
    found = planned(text, present)
    assert [step.to_json() for step in found.steps] == [{"cohort": "a", **step} for step in steps]
    assert found.seen == ({"a": 7} if steps else {})


def test_cohorts_name_calendars_that_they_share_or_have_their_own():
    text = (
        '[calendars]\nweekends = "sat,sun  UTC"\n'
        '[cohorts.a]\ncalendar = ["weekends"]\n[cohorts.b]\ncalendar = { x = "12-24 UTC" }\n'
    )
    steps = [step.to_json() for step in planned(text, cohort_of("a"), cohort_of("b")).steps]
    assert [step["calendar"] for step in steps] == [{"weekends": "sat,sun UTC"}, {"x": "12-24 UTC"}]


def test_a_cohort_that_only_the_calendar_freezes_is_not_frozen_to_the_file():
    by_calendar = cohort_of(frozen=True, freeze=None, calendar={"x": "12-24 UTC"})
    text = "[cohorts.a]\nfrozen = false\ncalendar = { x = '12-24 UTC' }\n"
    assert planned(text, by_calendar) == planned(text, cohort_of(calendar={"x": "12-24 UTC"}))
    assert planned(text, by_calendar).steps == ()


def test_what_the_file_does_not_name_is_left_alone_unless_pruned():
    there = [cohort_of("a"), cohort_of("old")]
    found = planned("[cohorts.a]\n", *there)
    assert (found.steps, found.left) == ((), ("old",))
    pruned = planned("[cohorts.a]\n", *there, prune=True)
    assert [step.to_json() for step in pruned.steps] == [{"verb": "delete", "cohort": "old"}]
    assert pruned.seen == {"old": 7}


LEASES = [
    None,
    {"scope": "site", "limit": 2},
    {"scope": "rack", "share_bp": 1050},
    {"scope": "site", "limit": 2, "share_bp": 1000},
]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("none", "none"),
        ("site=2", LEASES[1]),
        ("rack=10.5%", LEASES[2]),
        ("site=2,10%", LEASES[3]),
        ("site=10%,2", LEASES[3]),
    ],
)
def test_a_lease_is_a_count_a_share_or_both(text, read):
    assert words.lease(text) == read


@pytest.mark.parametrize(
    "text", ["", "site", "site=", "site=2,3", "site=1%,2%", "site=0", "site=2,0%", "=2", "site=2,"]
)
def test_a_lease_that_cannot_be_meant_is_refused(text):
    with pytest.raises(ValueError, match="is n"):
        words.lease(text)


BUDGETS = [
    None,
    {"scope": "site", "bytes_per_s": 500_000, "at_once": 1},
    {"scope": "rack", "bytes_per_s": 2_000_000, "at_once": 4},
]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("none", "none"),
        ("site=500kB", BUDGETS[1]),
        ("site=0.5MB/s", BUDGETS[1]),
        ("site=500000", BUDGETS[1]),
        ("rack=2MB,4", BUDGETS[2]),
        ("rack=2000000,4", BUDGETS[2]),
    ],
)
def test_a_budget_is_bytes_a_second_and_for_how_many_at_once(text, read):
    assert words.budget(text) == read


@pytest.mark.parametrize(
    "text",
    ["", "site", "site=", "=1MB", "site=1TB", "site=-1", "site=1MB,0", "site=4kB", "S=1MB"],
)
def test_a_budget_that_cannot_be_meant_is_refused(text):
    with pytest.raises(ValueError, match="is not"):
        words.budget(text)


NAMES = st.from_regex(r"[a-z0-9][a-z0-9._-]{0,8}", fullmatch=True)
WINDOWS = {"days": ["mon", "tue"], "from": "22:00", "to": "04:00", "zone": "Europe/Berlin"}
PRESENT = st.fixed_dictionaries(
    {
        "match": st.sampled_from(["", "region=eu", 'a="b c", !d', "version<1.4"]),
        "priority": st.integers(-5, 5),
        "window": st.sampled_from([None, WINDOWS]),
        "lease": st.sampled_from(LEASES),
        "budget": st.sampled_from(BUDGETS),
        "poll_s": st.integers(1, 90_000),
        "report_s": st.integers(1, 90_000),
        "splay_s": st.integers(0, 90_000),
        "approval": st.booleans(),
        "pin": st.sampled_from([None, "1.0.0"]),
        "freeze": st.sampled_from([None, {"until": None}, {"until": "2027-01-01T00:00:00Z"}]),
        "calendar": st.sampled_from([{}, {"year-end": "12-20..01-04 UTC", "a.b": "sat,sun UTC"}]),
        "reason": st.text(max_size=20),
    }
)


@settings(deadline=None)
@given(st.dictionaries(NAMES, PRESENT, max_size=4))
def test_what_is_so_written_down_and_read_again_changes_nothing(there):
    present = [{"name": name, "revision": 1, **values} for name, values in there.items()]
    text = fleet_text.write("demo", present)
    found = planned(text, *present)
    assert (found.steps, found.left, found.kept) == ((), (), ())


# --- diff and apply --------------------------------------------------------------------------------------


TWO = """
[cohorts.canary]
match = "ring=first"
priority = 20
release = "1.0.0"

[cohorts.main]
release = "1.0.0"
pin = "1.1.0"
reason = "the fair"
"""


def test_applied_twice_a_file_changes_nothing_the_second_time(at_desk, world):
    world.enroll("web-1", labels={"ring": "first"})
    write(TWO)
    assert at_desk.run("diff", "--detailed-exitcode")[0] == 10
    applied = at_desk.json("apply")
    assert [cohort["name"] for cohort in applied["cohorts"]] == ["canary", "main"]
    assert (world.directive("main").release, world.agent("web-1").cohort) == ("1.1.0", "canary")
    assert at_desk.run("diff", "--detailed-exitcode")[:2] == (0, "nothing to change\n")
    before = world.view("main").spec.revision
    assert at_desk.json("apply")["steps"] == []
    assert world.view("main").spec.revision == before


def test_a_diff_shows_what_is_and_what_will_be_and_changes_nothing(at_desk, world):
    world.cohort("main", poll_s=60, report_s=300)
    world.cohort("other", priority=-1)
    write('[cohorts.main]\nwindow = "sat 01:00-05:00 UTC"\npoll = "10s"\n')
    code, out, err = at_desk.run("diff")
    assert code == 0
    rows = [line.split("  ") for line in out.splitlines()]
    assert [[cell.strip() for cell in row if cell] for row in rows[1:]] == [
        ["edit", "main", "window", "always", "sat 01:00-05:00 UTC", "0 agents"],
        ["edit", "main", "poll", "60s", "10s", "0 agents"],
    ]
    assert "left alone: other" in err
    assert world.view("main").spec.revision == 1


def test_apply_asks_and_without_anybody_to_ask_does_nothing(at_desk, world):
    world.cohort("main", report_s=300)
    world.enroll("web-1")
    write('[cohorts.main]\npoll = "10s"\n')
    code, _, err = at_desk.run("apply", "--no-input")
    assert code == Exit.USAGE
    assert "changes 1 cohort and reaches 1 agent" in err
    assert world.view("main").spec.revision == 1


def test_a_plan_says_who_comes_into_a_cohort_that_is_made(at_desk, world):
    world.cohort("main", report_s=300)
    world.enroll("web-1", labels={"site": "b"})
    write('[cohorts.main]\nreport = "300s"\n[cohorts.b]\nmatch = "site=b"\npriority = 1\n')
    code, out, _ = at_desk.run("diff")
    assert code == 0
    assert {line.split()[-2] for line in out.splitlines() if line.startswith("create")} == {"1"}
    assert "reaches 1 agent" in at_desk.run("apply", "--no-input")[2]


def test_of_a_plan_that_is_refused_nothing_is_done(at_desk, world):
    world.cohort("main", report_s=300)
    write('[cohorts.new]\n[cohorts.main]\npoll = "10s"\npin = "9.9.9"\nreason = "no such release"\n')
    code, _, err = at_desk.run("apply", "--yes")
    assert (code, "no release 9.9.9" in err) == (Exit.NOT_FOUND, True)
    assert world.view("main").spec.revision == 1
    with world.read() as session:
        assert [view.cohort.name for view in cohort_view.list_cohorts(session, world.clock())] == ["main"]


def test_a_cohort_that_was_changed_meanwhile_is_a_conflict_and_nothing_is_done(world, app, token):
    headers = {"Authorization": f"Bearer {token('operator')}"}
    asked = app.test_client()
    world.cohort("a")
    world.cohort("b", priority=1)
    plan = {
        "product": "demo",
        "seen": {"a": 1, "b": 1},
        "steps": [{"verb": "edit", "cohort": name, "poll_s": 7} for name in "ab"],
    }
    world.call(cohorts.edit, "demo", "b", poll_s=9)
    answer = asked.post("/api/v1/plan", headers=headers, json=plan)
    assert (answer.status_code, answer.json["reason"]) == (412, "stale")
    assert answer.json["title"] == "cohort b was changed meanwhile"
    assert (world.view("a").spec.poll_s, world.view("b").spec.poll_s) == (60, 9)
    made = plan | {"seen": {"c": 0}, "steps": [{"verb": "create", "cohort": "c"}]}
    assert asked.post("/api/v1/plan", headers=headers, json=made).status_code == 200
    assert asked.post("/api/v1/plan", headers=headers, json=made).status_code == 412


def test_a_change_while_the_operator_is_asked_is_a_conflict(at_desk, world, monkeypatch):
    world.cohort("main", report_s=300)
    write('[cohorts.main]\npoll = "10s"\n')
    meanwhile = lambda *_: world.call(cohorts.edit, "demo", "main", priority=3)  # noqa: E731 - reads as it is
    monkeypatch.setattr(fleet_commands, "confirm_reach", meanwhile)
    code, _, err = at_desk.run("apply")
    assert (code, "cohort main was changed meanwhile" in err) == (Exit.CONFLICT, True)
    assert world.view("main").spec.poll_s == 60


def test_a_plan_names_each_deed_in_the_audit_log(at_desk, world):
    from release_server import audit

    write(TWO)
    at_desk.json("apply")
    with world.read() as session:
        deeds = [(entry.action, entry.subject) for entry in audit.entries(session)]
    assert {("cohort.create", "demo/canary"), ("cohort.pin", "demo/main")} <= set(deeds)


def test_pruned_cohorts_are_deleted(at_desk, world):
    world.cohort("old")
    write("[cohorts.main]\n")
    at_desk.json("apply", "--prune")
    assert [row["name"] for row in at_desk.json("cohort", "list")] == ["main"]


def test_the_present_state_as_a_file_is_where_to_begin(at_desk, world):
    world.cohort("main", poll_s=10)
    world.call(cohorts.freeze, "demo", "main", reason="the fair")
    code, out, _ = at_desk.run("diff", "--present")
    assert code == 0
    write(out)
    assert at_desk.run("diff", "--detailed-exitcode")[:2] == (0, "nothing to change\n")


def test_a_file_that_is_not_there_is_a_usage_error_that_says_how_to_make_one(at_desk):
    code, _, err = at_desk.run("diff")
    assert (code, "release diff --present" in err) == (Exit.USAGE, True)


def test_the_example_applies_to_a_server_that_has_its_release(at_desk, world):
    write(EXAMPLE.read_text().replace('"warehouse-agent"', '"demo"'))
    applied = at_desk.json("apply")
    assert json.loads(json.dumps([cohort["name"] for cohort in applied["cohorts"]])) == [
        "canary",
        "eu",
        "main",
    ]
    assert world.directive("main").mode == "suspended"
    assert at_desk.run("diff", "--detailed-exitcode")[0] == 0
