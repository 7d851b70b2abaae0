from __future__ import annotations

import threading

import pytest

from release_server.bell import Bell, ring

LONG_S = 3600.0
"""Nobody waits for this: what does not end earlier fails."""


@pytest.fixture
def bell(tmp_path):
    made = Bell(tmp_path / ("a-long-name" * 9) / "jobs.sock")
    made.listen()
    yield made
    made.mute()


def waits(bell, stop):
    """Whether a wait goes on; one that does is ended by `stop`."""
    waiting = threading.Thread(target=bell.wait, args=(stop, 0.0, LONG_S))
    waiting.start()
    waiting.join(0.5)
    goes_on = waiting.is_alive()
    stop.set()
    waiting.join(20)
    assert not waiting.is_alive()
    return goes_on


def test_a_ring_ends_the_wait_and_several_are_one(bell):
    for _ in range(3):
        ring(bell.place)
    bell.wait(threading.Event(), 0.0, LONG_S)
    assert waits(bell, threading.Event())


def test_a_ring_that_comes_too_soon_is_heeded_later(bell):
    ring(bell.place)
    bell.wait(threading.Event(), 0.05, LONG_S)


def test_a_wait_ends_by_itself(bell):
    bell.wait(threading.Event(), 0.0, 0.05)
    bell.mute()
    bell.wait(threading.Event(), 0.0, 0.05)


def test_the_last_that_began_is_heard(bell):
    other = Bell(bell.place)
    other.listen()
    ring(bell.place)
    other.wait(threading.Event(), 0.0, LONG_S)
    assert waits(bell, threading.Event())
    other.mute()


def test_nobody_who_listens_is_no_error(bell, tmp_path):
    ring(tmp_path / "nowhere" / "jobs.sock")
    bell.mute()
    ring(bell.place)


def test_where_no_socket_can_be_made_there_are_the_ticks(tmp_path):
    (tmp_path / "run").touch()
    bell = Bell(tmp_path / "run" / "jobs.sock")
    bell.listen()
    bell.wait(threading.Event(), 0.0, 0.05)
