from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from agent_core.directive import bucket
from release_server.shuffle import choose_salt, first_agents, first_progress

STRATA = st.dictionaries(
    st.integers(0, 400).map("host-{}".format), st.sampled_from(["eu", "us", "asia"]), min_size=1, max_size=40
)
SALTS = [str(number) for number in range(8)]


@given(STRATA, st.integers(1, 10), st.sampled_from(SALTS))
def test_a_stratified_stage_holds_one_of_each_and_never_fewer_than_asked(strata, count, salt):
    progress = first_progress(strata, salt, count, each=True)
    inside = [host for host in strata if bucket(host, salt) < progress]
    assert {strata[host] for host in inside} == set(strata.values())
    assert len(inside) >= min(count, len(strata))


def test_the_salt_with_the_right_number_wins_and_of_those_the_one_without_veterans():
    strata = dict.fromkeys((f"host-{number}" for number in range(30)), "eu")
    before = first_agents(strata, "before", 3)
    salt = choose_salt(map(str, range(200)), strata, 3, veterans=before)
    first = first_agents(strata, salt, 3)
    assert len(first) == 3
    assert not first & before


def test_veterans_serve_again_where_there_is_nobody_else():
    strata = {"a": "eu"}
    assert choose_salt(SALTS, strata, 1, veterans={"a"}) in SALTS
