from __future__ import annotations

import pytest

from release_server.figures import LIMITS, MIB, compare

CALM = {"rss": 100 * MIB, "cpu": 5.0, "fds": 20.0, "restarts": 0.0, "errors": 3.0}


def worse(pairs):
    return [str(each) for each in compare(pairs)]


@pytest.mark.parametrize("limit", LIMITS, ids=lambda limit: limit.figure)
def test_each_figure_halts_when_it_is_worse_on_the_only_canary(limit):
    grown = limit.factor * CALM[limit.figure] + limit.slack
    assert worse([(CALM, CALM | {limit.figure: grown})]) == []
    assert worse([(CALM, CALM | {limit.figure: grown + 1})]) == [f"{limit.figure} worse on 1 of 1"]


def test_one_busy_host_of_many_is_no_fault_of_the_release():
    busy = (CALM, CALM | {"rss": 900 * MIB})
    assert worse([busy] + 19 * [(CALM, CALM)]) == []


def test_a_minority_beyond_chance_is():
    leaking = (CALM, CALM | {"rss": 900 * MIB})
    assert worse(5 * [leaking] + 15 * [(CALM, CALM)]) == ["rss worse on 5 of 20"]


def test_a_figure_that_one_side_lacks_is_not_compared():
    assert worse([({}, CALM | {"rss": 10_000 * MIB}), (CALM, {})]) == []
    assert worse([]) == []
