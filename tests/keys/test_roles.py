"""The role table holds what the design promises, and renews in time."""

from datetime import UTC, datetime, timedelta

import pytest

from keys.roles import COHORTS, OFFLINE_ROLES, ONLINE_ROLES, ROLES, ROOT, SNAPSHOT, TARGETS, TIMESTAMP

NOW = datetime(2026, 5, 1, 12, 30, 15, 999_999, tzinfo=UTC)


@pytest.mark.parametrize(
    ("name", "online", "expires", "resign_before"),
    [
        (ROOT, False, timedelta(days=365), timedelta(days=60)),
        (TARGETS, False, timedelta(days=60), timedelta(days=14)),
        (COHORTS, True, timedelta(days=14), timedelta(days=7)),
        (SNAPSHOT, True, timedelta(days=14), timedelta(days=7)),
        (TIMESTAMP, True, timedelta(hours=24), timedelta(hours=18)),
    ],
)
def test_each_role_is_kept_as_the_table_says(name, online, expires, resign_before):
    rule = ROLES[name]
    assert (rule.online, rule.expires, rule.resign_before, rule.threshold) == (
        online,
        expires,
        resign_before,
        1,
    )
    assert rule.resign_before < rule.expires


def test_every_role_is_either_with_people_or_with_the_server():
    assert set(ONLINE_ROLES) | set(OFFLINE_ROLES) == set(ROLES)
    assert not set(ONLINE_ROLES) & set(OFFLINE_ROLES)


def test_expiry_is_in_whole_seconds_because_tuf_writes_no_fractions():
    assert ROLES[TIMESTAMP].expiry(NOW) == datetime(2026, 5, 2, 12, 30, 15, tzinfo=UTC)


@pytest.mark.parametrize("name", ROLES)
def test_a_fresh_version_is_not_due_and_an_ageing_one_is(name):
    rule = ROLES[name]
    expires = rule.expiry(NOW)
    assert not rule.is_due(expires, NOW)
    assert not rule.is_due(expires, expires - rule.resign_before - timedelta(seconds=1))
    assert rule.is_due(expires, expires - rule.resign_before)
    assert rule.is_due(expires, expires + timedelta(days=1))


def test_a_timestamp_is_renewed_after_six_hours():
    rule = ROLES[TIMESTAMP]
    assert rule.is_due(rule.expiry(NOW), NOW + timedelta(hours=6))
