"""Dataclasses that are finished when the first one is made."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading

import pytest

from agent_core.late import late_dataclass


@late_dataclass(frozen=True)
class Point:
    x: int
    y: int = 2
    tags: tuple[str, ...] = dataclasses.field(default=())


def test_nothing_is_compiled_before_the_first_and_then_it_is_a_dataclass_like_any_other():
    @late_dataclass(frozen=True)
    class Pair:
        left: int
        right: int = 0

    assert "__init__" not in vars(Pair)
    one = Pair(1)
    assert dataclasses.is_dataclass(Pair)
    assert (one, repr(one)[-20:]) == (Pair(1, 0), "Pair(left=1, right=0)"[-20:])
    assert hash(one) == hash(Pair(1))
    assert dataclasses.replace(one, right=5) == Pair(1, 5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.left = 2
    with pytest.raises(TypeError):
        Pair()
    match one:
        case Pair(left, right):
            assert (left, right) == (1, 0)


def test_it_is_copied_and_pickled_like_any_other():
    one = Point(1, tags=("a",))
    assert copy.copy(one) == copy.deepcopy(one) == pickle.loads(pickle.dumps(one)) == one


def test_threads_that_meet_at_the_first_instance_wait_for_each_other():
    for _ in range(50):

        @late_dataclass(frozen=True)
        class Fresh:
            a: int
            b: int = 1

        gate = threading.Barrier(4)
        made: list[object] = []

        def make(cls=Fresh, gate=gate, made=made) -> None:
            gate.wait()
            made.append(cls(7))

        threads = [threading.Thread(target=make) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert made == [Fresh(7)] * 4


def test_a_subclass_whose_fields_would_be_missed_is_refused():
    with pytest.raises(TypeError, match="may not be finished"):

        @late_dataclass(frozen=True)
        class Space(Point):
            z: int = 0
