from __future__ import annotations

import random

import pytest

from release_server.sequential import UNKNOWN, Baseline, boundary, evidence

SEEN = [(0, 0), (0, 400), (5, 400), (40, 400)]
FALSE_HALT_BP = 100


def halts_at(baseline, rate, most, chance):
    """After how many agents, one by one, the test halts; None when it does not within `most`."""
    failed = 0
    for ended in range(1, most + 1):
        failed += chance.random() < rate
        if evidence(baseline, failed, ended) >= boundary(FALSE_HALT_BP):
            return ended
    return None


@pytest.mark.parametrize(("failed", "ended"), SEEN)
def test_a_usual_release_is_halted_as_rarely_as_the_page_says(failed, ended):
    baseline, chance = Baseline.of(failed, ended), random.Random(11)
    halted = sum(halts_at(baseline, baseline.usual, 400, chance) is not None for _ in range(1_000))
    assert halted <= 20, "at most 1% is promised; 2% of 1000 runs would be seven deviations off"


@pytest.mark.parametrize(("most", "missed"), [(100, 0.40), (200, 0.12), (400, 0.02)])
def test_a_wrong_release_is_missed_as_rarely_as_the_page_says(most, missed):
    chance = random.Random(12)
    runs = [halts_at(UNKNOWN, UNKNOWN.wrong, most, chance) for _ in range(500)]
    assert runs.count(None) / len(runs) <= missed


def test_the_evidence_grows_with_failures_and_falls_with_good_ends():
    before = evidence(UNKNOWN, 1, 10)
    assert evidence(UNKNOWN, 2, 11) > before > evidence(UNKNOWN, 1, 11)
    assert evidence(UNKNOWN, 0, 0) == 0


def test_three_failures_among_the_first_agents_halt_and_two_do_not():
    assert evidence(UNKNOWN, 3, 10) >= boundary(FALSE_HALT_BP)
    assert evidence(UNKNOWN, 2, 10) < boundary(FALSE_HALT_BP)


@pytest.mark.parametrize("failed", [0, 1, 50, 99, 100])
def test_a_baseline_is_a_rate_and_what_is_wrong_is_above_it(failed):
    baseline = Baseline.of(failed, 100)
    assert 0 < baseline.usual < baseline.wrong <= 0.9
