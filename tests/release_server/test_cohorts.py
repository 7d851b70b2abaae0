"""Who belongs where, and what people may ask of a cohort."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import select

from agent_core.errors import ConflictError, MalformedError, NotFoundError, UsageError
from agent_core.wire import Mode
from release_server import agents, cohort_view, cohorts
from release_server.models import AuditEntry, CohortSpec
from release_server.preview import preview
from release_server.webhooks.standstill import Stand
from tests.release_server.fleet_world import World


@pytest.fixture
def world(sessions, clock):
    return World(sessions, clock)


# --- assignment ------------------------------------------------------------------------------------------


def test_agents_move_when_cohorts_appear_change_and_go(world):
    world.cohort("all")
    world.enroll("a", labels={"region": "eu"})
    world.enroll("b")
    world.cohort("eu", match="region=eu")
    assert world.agent("a").cohort == "eu"
    assert world.agent("b").cohort == "all"
    world.call(cohorts.edit, "demo", "eu", match="region=us", reason="typo")
    assert world.agent("a").cohort == "all"
    world.call(cohorts.edit, "demo", "eu", match="region=eu")
    world.call(cohorts.delete, "demo", "eu")
    assert world.agent("a").cohort == "all"
    world.call(cohorts.delete, "demo", "all")
    assert world.agent("a").cohort is None


def test_an_agent_moves_when_it_reports_other_labels(world):
    world.cohort("all")
    world.cohort("eu", match="region=eu")
    host = world.enroll("a")
    host.labels = {"region": "eu"}
    assert world.report(host).cohort == "eu"


def test_an_operators_label_goes_before_the_hosts_own(world):
    world.cohort("all")
    world.cohort("eu", match="region=eu")
    host = world.enroll("a", labels={"region": "us"})
    world.call(agents.label, host.id, labels={"region": "eu"})
    assert world.agent("a").cohort == "eu"
    host.labels = {"region": "moon"}
    assert world.report(host).cohort == "eu"
    world.call(agents.label, host.id, labels={})
    assert world.agent("a").cohort == "all"


def test_an_operators_move_wins_until_it_is_taken_back(world):
    world.cohort("all", priority=9)
    world.cohort("canary", match="never=true")
    host = world.enroll("a")
    world.call(agents.move, host.id, cohort="canary")
    host.labels = {"x": "y"}
    assert world.report(host).cohort == "canary"
    world.call(cohorts.edit, "demo", "all", priority=10)
    assert world.agent("a").cohort == "canary"
    world.call(agents.move, host.id, cohort=None)
    assert world.agent("a").cohort == "all"


def test_a_moved_agent_goes_where_its_labels_say_when_its_cohort_is_deleted(world):
    world.cohort("all")
    world.cohort("canary", match="never=true")
    host = world.enroll("a")
    world.call(agents.move, host.id, cohort="canary")
    world.call(cohorts.delete, "demo", "canary")
    assert world.agent("a").cohort == "all"
    assert not world.agent("a").agent.cohort_fixed


def test_a_preview_names_who_would_come_and_go_and_changes_nothing(world):
    world.cohort("all")
    world.cohort("eu", match="region=eu")
    world.enroll("a", labels={"region": "eu"})
    world.enroll("b", labels={"region": "us"})
    world.enroll("c")
    world.call(agents.move, "c", cohort="eu")
    with world.read() as session:
        tried = preview(session, world.clock(), "demo", "eu", "region=us")
        same = preview(session, world.clock(), "demo", "eu")
        with pytest.raises(UsageError):
            preview(session, world.clock(), "demo", "eu", "=")
    assert (tried.inside.names, tried.joins.names, tried.leaves.names) == (["b", "c"], ["b"], ["a"])
    assert (same.match, same.inside.names, same.joins.names, same.leaves.names) == (
        "region=eu",
        ["a", "c"],
        [],
        [],
    )
    assert world.agent("a").cohort == "eu"


# --- what people ask -------------------------------------------------------------------------------------


def test_a_cohort_starts_from_the_release_it_was_made_with(world):
    world.cohort("all", release="1.1.0", poll_s=5, report_s=6, splay_s=7)
    told = world.directive()
    assert (told.release, told.base, told.progress, told.revision) == ("1.1.0", "1.1.0", 10_000, 1)
    assert (told.poll_s, told.report_s, told.splay_s) == (5, 6, 7)


def test_a_cohort_without_a_release_has_a_directive_that_names_none(world):
    world.cohort("all", release=None)
    assert world.directive().release is None


def test_names_are_taken_once_a_product(world):
    world.cohort("all")
    with pytest.raises(ConflictError):
        world.cohort("all")


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ({"product": "none"}, NotFoundError),
        ({"name": "Not A Name"}, UsageError),
        ({"match": "="}, UsageError),
        ({"release": "9.9.9"}, NotFoundError),
        ({"window": {"days": ["mon"], "from": "22:00", "to": "04:00", "zone": "Mars/Base"}}, UsageError),
        ({"window": {"days": [], "from": "22:00", "to": "04:00", "zone": "UTC"}}, MalformedError),
    ],
)
def test_a_cohort_that_cannot_be_made_leaves_nothing_behind(world, said, error):
    with pytest.raises(error):
        world.call(cohorts.create, **{"product": "demo", "name": "all"} | said)
    with world.read() as session:
        assert cohort_view.list_cohorts(session, world.clock()) == []


def test_every_change_is_a_revision_with_its_author_and_reason(world):
    world.cohort("all")
    world.call(cohorts.edit, "demo", "all", poll_s=10, reason="faster")
    world.call(cohorts.pin, "demo", "all", version="1.1.0", reason="audit")
    world.call(cohorts.unpin, "demo", "all")
    world.call(cohorts.freeze, "demo", "all", reason="fair")
    world.call(cohorts.unfreeze, "demo", "all")
    with world.read() as session:
        specs = session.scalars(select(CohortSpec).order_by(CohortSpec.revision)).all()
        actions = session.scalars(select(AuditEntry.action).where(AuditEntry.actor == "olga")).all()
    assert [spec.revision for spec in specs] == [1, 2, 3, 4, 5, 6]
    assert [spec.poll_s for spec in specs] == [60, 10, 10, 10, 10, 10]
    assert [spec.pin for spec in specs] == [None, None, "1.1.0", None, None, None]
    assert [spec.frozen for spec in specs] == [False, False, False, False, True, False]
    assert (specs[1].actor, specs[1].reason) == ("olga", "faster")
    assert actions == [f"cohort.{verb}" for verb in ("create", "edit", "pin", "unpin", "freeze", "unfreeze")]


def test_a_window_reaches_the_directive_and_can_be_taken_off(world):
    window = {"days": ["sat", "sun"], "from": "22:00", "to": "04:00", "zone": "Europe/Berlin"}
    world.cohort("all", window=window)
    assert world.directive().window.zone == "Europe/Berlin"
    world.call(cohorts.edit, "demo", "all", window=None)
    assert world.directive().window is None


def test_an_edit_that_changes_no_directive_makes_no_new_one(world):
    world.cohort("all")
    world.call(cohorts.edit, "demo", "all", match="region=eu")
    assert world.directive().revision == 1
    world.call(cohorts.edit, "demo", "all", poll_s=61)
    assert world.directive().revision == 2


def test_a_pin_to_an_older_release_lets_agents_go_back_and_a_newer_one_does_not(world):
    world.cohort("all")
    world.enroll("a", version="1.0.0")
    world.call(cohorts.pin, "demo", "all", version="0.9.0")
    assert world.directive().rollback
    world.call(cohorts.pin, "demo", "all", version="1.2.0")
    assert not world.directive().rollback


def test_a_pin_takes_back_an_agent_that_came_with_something_newer(world):
    world.cohort("all", release="1.0.0")
    world.enroll("a", version="1.2.0")
    world.call(cohorts.pin, "demo", "all", version="1.1.0")
    assert world.directive().rollback


def test_a_pin_needs_a_release_that_exists(world):
    world.cohort("all")
    with pytest.raises(NotFoundError):
        world.call(cohorts.pin, "demo", "all", version="9.9.9")


def test_after_a_pin_was_taken_off_an_agent_that_was_away_still_follows_the_base(world):
    world.cohort("all", release="1.1.0")
    world.call(cohorts.pin, "demo", "all", version="1.0.0")
    world.call(cohorts.unpin, "demo", "all")
    told = world.directive()
    assert (told.base, told.rollback) == ("1.0.0", True)
    world.call(cohorts.edit, "demo", "all", poll_s=10)
    assert world.directive().rollback


def test_a_freeze_ends_by_itself(world):
    world.cohort("all")
    world.call(cohorts.freeze, "demo", "all", until=world.clock() + timedelta(hours=1))
    assert world.directive().mode is Mode.SUSPENDED
    assert world.view().freeze
    assert not world.tick(minutes=59)
    assert world.tick(minutes=1)
    assert world.directive().mode is Mode.ENABLED
    assert not world.view().freeze
    assert not world.tick(minutes=1)


def test_a_freeze_in_the_past_is_refused(world):
    world.cohort("all")
    with pytest.raises(UsageError):
        world.call(cohorts.freeze, "demo", "all", until=world.clock())


def test_a_deleted_cohort_is_gone_and_its_name_comes_back_with_a_higher_revision(world):
    world.cohort("all")
    world.call(cohorts.edit, "demo", "all", poll_s=10)
    revision = world.directive().revision
    world.call(cohorts.delete, "demo", "all", reason="no use")
    with pytest.raises(NotFoundError):
        world.view()
    world.cohort("all", release="1.1.0")
    assert world.directive().release == "1.1.0"
    assert world.directive().revision > revision


def test_a_change_made_meanwhile_is_a_conflict(world):
    """Of two that read the same edition of a cohort, the second stores nothing."""
    world.cohort("all")
    seen = world.settled()
    world.call(cohorts.edit, "demo", "all", poll_s=10)
    kept = {"base": "1.1.0", "made": seen.directive, "due_at": None, "stand": Stand()}
    with world.write() as session:
        cohort = cohorts.find(session, "demo", "all")
        with pytest.raises(ConflictError):
            cohorts._store(session, world.clock(), cohort, seen, **kept)
    assert world.settled().base == "1.0.0"
    assert world.directive().poll_s == 10


def test_cohorts_are_listed_by_name_with_their_agents(world):
    world.cohort("b")
    world.cohort("a", match="region=eu")
    world.enroll("x")
    world.call(agents.retire, world.enroll("y").id)
    with world.read() as session:
        found = cohort_view.list_cohorts(session, world.clock(), "demo")
        with pytest.raises(NotFoundError):
            cohort_view.list_cohorts(session, world.clock(), "none")
    assert [(view.cohort.name, view.agents) for view in found] == [("a", 0), ("b", 1)]
