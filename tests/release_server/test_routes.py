from __future__ import annotations

import pytest

from release_server.routes import Stop, route

PLAIN = (Stop("1", 1), Stop("2", 2), Stop("3", 3))
STONE = (Stop("1", 1), Stop("2", 2), Stop("3", 3, from_seq=2))
WALL = (Stop("1", 1), Stop("2", 2, barrier=True), Stop("3", 3))
DEAD = (Stop("1", 1), Stop("3", 3, from_seq=2))
LONG = (Stop("1", 1), Stop("2", 2, from_seq=1), Stop("3", 3, from_seq=2), Stop("4", 4, from_seq=3))


@pytest.mark.parametrize(
    ("stops", "here", "there", "way"),
    [
        (PLAIN, 1, 3, ["3"]),
        (STONE, 1, 3, ["2", "3"]),
        (STONE, 2, 3, ["3"]),
        (WALL, 1, 3, ["2", "3"]),
        (WALL, 2, 3, ["3"]),
        (WALL, 1, 2, ["2"]),
        (DEAD, 1, 3, None),
        (LONG, 1, 4, ["2", "3", "4"]),
        (PLAIN, 3, 3, []),
        (PLAIN, 1, 9, None),
    ],
    ids=[
        "plain",
        "stone",
        "on-the-stone",
        "barrier",
        "past-it",
        "to-it",
        "dead-end",
        "long",
        "there",
        "none",
    ],
)
def test_a_way_keeps_to_stepping_stones_and_barriers(stops, here, there, way):
    found = route(stops, here, there)
    assert (None if found is None else [stop.version for stop in found]) == way
