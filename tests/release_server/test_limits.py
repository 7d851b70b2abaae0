"""Limits by who asks: the same ones for every web process of a database, and never more rows than callers."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import func, select

from agent_core.errors import UnreachableError
from release_server.limits import Limits, SharedLimit
from release_server.models import RateLimit


def taken(limits, sessions, clock, caller, times):
    """How many of so many requests were let through."""
    count = 0
    for _ in range(times):
        try:
            limits.take(sessions, clock(), (limits.hosts, caller))
        except UnreachableError:
            continue
        count += 1
    return count


def test_two_web_processes_of_one_database_have_one_limit(sessions, clock):
    one, other = Limits(), Limits()
    assert taken(one, sessions, clock, "loud", 6) == 6
    assert taken(other, sessions, clock, "loud", 6) == 4
    assert taken(other, sessions, clock, "quiet", 1) == 1
    with pytest.raises(UnreachableError) as caught:
        Limits().take(sessions, clock(), (one.hosts, "loud"))
    assert (caught.value.reason, caught.value.retry_after_s) == ("rate-limited", 10)
    clock.step(seconds=10)
    assert taken(one, sessions, clock, "loud", 2) == 1
    assert taken(other, sessions, clock, "loud", 2) == 0
    clock.step(seconds=100)
    assert taken(other, sessions, clock, "loud", 12) == 10


def test_at_the_same_moment_no_process_takes_what_another_has_taken(sessions, clock):
    count, lock = [], threading.Lock()

    def ask():
        done = taken(Limits(), sessions, clock, "loud", 5)
        with lock:
            count.append(done)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(count) == 10


def test_who_is_refused_by_one_limit_uses_up_nothing_of_another(sessions, clock):
    limits = Limits()
    narrow, wide = SharedLimit("narrow", 1.0, 1), SharedLimit("wide", 1.0, 2)
    limits.take(sessions, clock(), (narrow, "a"), (wide, "all"))
    for _ in range(5):
        with pytest.raises(UnreachableError):
            limits.take(sessions, clock(), (SharedLimit("narrow", 1.0, 1), "a"), (wide, "all"))
    limits.take(sessions, clock(), (narrow, "b"), (SharedLimit("wide", 1.0, 2), "all"))


def test_rows_of_callers_who_have_waited_long_enough_are_deleted(sessions, clock):
    limits = Limits()
    for number in range(50):
        taken(limits, sessions, clock, f"host-{number}", 1)
    clock.step(seconds=11)
    taken(limits, sessions, clock, "last", 1)
    with sessions.read() as session:
        assert session.scalar(select(func.count()).select_from(RateLimit)) == 1


def test_a_row_does_not_say_who_asked(sessions, clock):
    taken(Limits(), sessions, clock, "a-secret", 1)
    with sessions.read() as session:
        assert "a-secret" not in session.scalar(select(RateLimit.key))
