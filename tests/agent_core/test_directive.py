"""Which version one agent should run: golden places, fair shuffles, and the table of assignments."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_core.directive import Assignment, assign, bucket, is_in_progress, progress_for
from agent_core.wire import PROGRESS_FULL, Directive, Mode, Reason

unhurried = settings(deadline=None)
"""A busy machine is no failure."""

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "buckets.json").read_text())

FLEET = [f"host-{number:05d}" for number in range(10_000)]

# One agent that enters at half of the salt's line and one far behind it; both places are golden.
EARLY, LATE, SALT = "demo-02", "demo-03", "salt"

DIRECTIVE = Directive(
    product="warehouse-agent",
    cohort="eu-web",
    release="1.5.0",
    base="1.4.2",
    progress=5_000,
    salt=SALT,
    revision=3,
)

ids = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)
fleets = st.lists(ids, max_size=60, unique=True)


# --- bucket ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", GOLDEN, ids=[f"{row['salt'][:16]}+{row['agent_id'][:16]}" for row in GOLDEN])
def test_an_agents_place_never_changes_between_versions_of_relfleet(row: dict[str, str | int]) -> None:
    assert bucket(str(row["agent_id"]), str(row["salt"])) == row["bucket"]


@unhurried
@given(agent_id=ids, salt=ids)
def test_every_place_is_on_the_line(agent_id: str, salt: str) -> None:
    assert 0 <= bucket(agent_id, salt) < PROGRESS_FULL


def test_places_are_spread_evenly() -> None:
    tenths = [0] * 10
    for agent_id in FLEET:
        tenths[bucket(agent_id, "even") // 1_000] += 1
    # 1,000 expected in each, standard deviation 30: five of them is one false alarm in two million.
    assert all(850 < count < 1_150 for count in tenths), tenths


def test_both_ends_of_the_line_are_reached() -> None:
    places = {bucket(f"host-{number}", "ends") for number in range(100_000)}
    assert min(places) == 0
    assert max(places) == PROGRESS_FULL - 1


def test_another_salt_puts_other_hosts_first() -> None:
    first = {salt: {host for host in FLEET if bucket(host, salt) < 100} for salt in ("r-1", "r-2")}
    # About 100 hosts are in the first hundredth of each; one of them is expected to be first twice.
    assert len(first["r-1"] & first["r-2"]) < 10


@unhurried
@given(agent_id=ids, low=st.integers(0, PROGRESS_FULL), more=st.integers(0, PROGRESS_FULL))
def test_raising_progress_never_drops_an_agent(agent_id: str, low: int, more: int) -> None:
    high = min(low + more, PROGRESS_FULL)
    before = is_in_progress(replace(DIRECTIVE, progress=low), agent_id)
    assert is_in_progress(replace(DIRECTIVE, progress=high), agent_id) or not before


@unhurried
@given(agent_id=ids, salt=ids)
def test_no_progress_is_nobody_and_full_progress_is_everybody(agent_id: str, salt: str) -> None:
    assert not is_in_progress(replace(DIRECTIVE, salt=salt, progress=0), agent_id)
    assert is_in_progress(replace(DIRECTIVE, salt=salt, progress=PROGRESS_FULL), agent_id)


# --- progress_for ----------------------------------------------------------------------------------------


@unhurried
@given(fleet=fleets, salt=ids, count=st.integers(-3, 70))
def test_progress_takes_in_exactly_that_many_agents_and_whoever_shares_the_last_place(
    fleet: list[str], salt: str, count: int
) -> None:
    progress = progress_for(fleet, salt, count)
    places = sorted(bucket(agent_id, salt) for agent_id in fleet)
    inside = sum(place < progress for place in places)
    asked = max(0, min(count, len(places)))
    sharing = sum(place == places[asked - 1] for place in places[asked:]) if asked else 0
    assert inside == asked + sharing


@unhurried
@given(fleet=fleets, salt=ids, count=st.integers(1, 70))
def test_no_smaller_progress_would_do(fleet: list[str], salt: str, count: int) -> None:
    progress = progress_for(fleet, salt, count)
    if count < len(fleet):
        assert sum(bucket(agent_id, salt) < progress - 1 for agent_id in fleet) < count


@unhurried
@given(fleet=fleets, salt=ids, count=st.integers(0, 70))
def test_raising_the_count_never_drops_an_agent(fleet: list[str], salt: str, count: int) -> None:
    assert progress_for(fleet, salt, count) <= progress_for(fleet, salt, count + 1)


@unhurried
@given(fleet=fleets, salt=ids, more=st.integers(0, 5))
def test_all_of_them_leaves_room_for_newcomers(fleet: list[str], salt: str, more: int) -> None:
    expected = PROGRESS_FULL if fleet or more else 0
    assert progress_for(fleet, salt, len(fleet) + more) == expected


@unhurried
@given(fleet=st.lists(ids, min_size=2, max_size=20, unique=True), salt=ids, count=st.integers(0, 20))
def test_the_order_in_which_agents_are_listed_does_not_matter(
    fleet: list[str], salt: str, count: int
) -> None:
    assert progress_for(fleet, salt, count) == progress_for(reversed(fleet), salt, count)


def test_agents_in_one_basis_point_enter_together() -> None:
    hosts_at: dict[int, list[str]] = {}
    for host in FLEET:
        hosts_at.setdefault(bucket(host, SALT), []).append(host)
    place, twins = next(
        (place, hosts) for place, hosts in hosts_at.items() if len(hosts) == 2 and place < 9_000
    )
    later = next(host for host in FLEET if bucket(host, SALT) > place)
    assert progress_for([twins[0], later, twins[1]], SALT, 1) == place + 1
    assert progress_for([twins[0], later, twins[1]], SALT, 2) == place + 1


# --- assign ----------------------------------------------------------------------------------------------

NONE_YET = {"release": None, "base": None, "progress": 0}
FIRST_ROLLOUT = {"base": None}
SETTLED = {"base": "1.5.0", "progress": 0}

TABLE = [
    # directive, agent, running → version, reason, in progress
    ("inside, on the base", {}, EARLY, "1.4.2", "1.5.0", Reason.UPDATE, True),
    ("inside, done", {}, EARLY, "1.5.0", None, Reason.UP_TO_DATE, True),
    ("inside, on something else", {}, EARLY, "0.9.0", "1.5.0", Reason.UPDATE, True),
    ("inside, nothing installed", {}, EARLY, None, "1.5.0", Reason.FIRST_INSTALL, True),
    ("outside, on the base: its turn comes", {}, LATE, "1.4.2", None, Reason.NOT_YET, False),
    ("outside, nothing installed", {}, LATE, None, "1.4.2", Reason.FIRST_INSTALL, False),
    ("outside, behind the base", {}, LATE, "1.3.0", "1.4.2", Reason.UPDATE, False),
    ("outside, already on the release: back", {}, LATE, "1.5.0", "1.4.2", Reason.UPDATE, False),
    ("no release at all", NONE_YET, EARLY, "1.4.2", None, Reason.NOT_YET, False),
    ("no release at all, nothing installed", NONE_YET, EARLY, None, None, Reason.NOT_YET, False),
    ("first rollout, inside", FIRST_ROLLOUT, EARLY, None, "1.5.0", Reason.FIRST_INSTALL, True),
    ("first rollout, outside", FIRST_ROLLOUT, LATE, None, None, Reason.NOT_YET, False),
    ("settled, up to date", SETTLED, LATE, "1.5.0", None, Reason.UP_TO_DATE, False),
    ("settled, newcomer", SETTLED, LATE, None, "1.5.0", Reason.FIRST_INSTALL, False),
    ("settled without a release", {"release": None}, LATE, "1.4.2", None, Reason.UP_TO_DATE, False),
    ("suspended", {"mode": Mode.SUSPENDED}, EARLY, "1.4.2", None, Reason.SUSPENDED, True),
    ("suspended, newcomer", {"mode": Mode.SUSPENDED}, EARLY, None, "1.4.2", Reason.FIRST_INSTALL, False),
    (
        "suspended, newcomer, no base",
        {"mode": Mode.SUSPENDED, "base": None},
        EARLY,
        None,
        None,
        Reason.SUSPENDED,
        True,
    ),
    ("disabled", {"mode": Mode.DISABLED}, EARLY, "1.4.2", None, Reason.DISABLED, True),
    ("disabled, newcomer", {"mode": Mode.DISABLED}, LATE, None, None, Reason.DISABLED, False),
]


@pytest.mark.parametrize(
    ("changes", "agent_id", "running", "version", "reason", "inside"),
    [row[1:] for row in TABLE],
    ids=[row[0] for row in TABLE],
)
def test_assignment(
    changes: dict[str, object],
    agent_id: str,
    running: str | None,
    version: str | None,
    reason: Reason,
    inside: bool,
) -> None:
    directive = replace(DIRECTIVE, **changes)
    assert assign(directive, agent_id, running) == Assignment(version, reason, inside)


directives = st.builds(
    replace,
    st.just(DIRECTIVE),
    release=st.sampled_from([None, "1.4.2", "1.5.0"]),
    base=st.sampled_from([None, "1.4.2", "1.5.0"]),
    progress=st.integers(0, PROGRESS_FULL),
    mode=st.sampled_from(Mode),
    salt=ids,
)


@unhurried
@given(directive=directives, agent_id=ids, running=st.sampled_from([None, "1.3.0", "1.4.2", "1.5.0"]))
def test_an_agent_that_follows_its_assignment_has_arrived(
    directive: Directive, agent_id: str, running: str | None
) -> None:
    wanted = assign(directive, agent_id, running).version
    assert wanted != running or wanted is None
    if wanted is not None:
        assert wanted in (directive.release, directive.base)
        assert assign(directive, agent_id, wanted).version is None


@unhurried
@given(directive=directives, agent_id=ids)
def test_the_server_and_the_agent_read_the_same_place_from_the_signed_form(
    directive: Directive, agent_id: str
) -> None:
    read_back = Directive.from_json(json.loads(json.dumps(directive.to_json())))
    assert assign(read_back, agent_id, "1.3.0") == assign(directive, agent_id, "1.3.0")
