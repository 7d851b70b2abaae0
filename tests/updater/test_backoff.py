"""Backoff: bounded, spread, and never sooner than the server asked."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from updater.backoff import bound_s, ceiling_s, jittered, wait_s

chances = st.floats(0, 1, exclude_max=True)


def test_the_bound_doubles_up_to_the_most():
    assert [bound_s(n, 2, 60) for n in range(8)] == [0, 2, 4, 8, 16, 32, 60, 60]


@given(st.integers(0, 10**6), chances)
def test_a_wait_never_passes_the_most(failures, chance):
    assert 0 <= wait_s(failures, base_s=1, most_s=3600, chance=chance) <= 3600


@given(st.integers(1, 50), chances, st.floats(0, 300))
def test_a_wait_is_never_sooner_than_the_server_asked(failures, chance, asked):
    assert wait_s(failures, base_s=1, most_s=3600, chance=chance, retry_after_s=asked) >= asked


def test_an_absurd_retry_after_is_bounded():
    assert wait_s(1, base_s=1, most_s=600, chance=0.5, retry_after_s=10**9) <= ceiling_s(600) == 900


@given(st.floats(1, 10**5), chances)
def test_a_period_is_spread_by_a_tenth(period, chance):
    assert 0.9 * period <= jittered(period, chance) <= 1.1 * period
