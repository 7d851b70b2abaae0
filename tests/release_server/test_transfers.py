"""How many transfers there are at a time, and which are too slow; `test_slow_clients` has real ones."""

from __future__ import annotations

import contextlib
import io
import socket

import pytest

from agent_core.errors import UnreachableError
from release_server import slow
from release_server.slow import Connection, Mark, Pace, Watch, judge
from release_server.transfers import FILE_TYPE, RETRY_AFTER_S, SHORT, Body, Slots, Transfers

CLIENT = ("192.0.2.1", 8470)
PACE = Pace(least_bps=1000, within_s=30)


# --- slots -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threads", "most", "of_a_kind"), [(2, 1, 1), (3, 1, 1), (4, 2, 1), (8, 4, 3), (32, 16, 12)]
)
def test_transfers_have_half_of_the_threads_and_one_kind_three_quarters_of_that(threads, most, of_a_kind):
    slots = Slots(threads)
    files = [slots.enter("file", CLIENT) for _ in range(threads)]
    assert sum(one is not None for one in files) == of_a_kind
    bodies = [slots.enter("body", CLIENT) for _ in range(threads)]
    assert sum(one is not None for one in bodies) == most - of_a_kind
    assert len(slots.held()) == most


def test_who_leaves_makes_room_once():
    slots = Slots(2)
    first = slots.enter("file", CLIENT)
    assert slots.enter("file", CLIENT) is None
    slots.leave(first)
    slots.leave(first)
    assert slots.enter("file", CLIENT) is not None
    assert slots.enter("file", CLIENT) is None


# --- bodies ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [10, None], ids=["with a length", "in chunks"])
def test_a_body_is_a_transfer_from_its_first_byte_to_its_last(length):
    slots = Slots(4)
    body = Body(io.BytesIO(b"0123456789"), length, slots, CLIENT)
    assert not slots.held()
    assert body.read(4) == b"0123"
    assert len(slots.held()) == 1
    assert body.read(6) == b"456789"
    assert (body.read(1), slots.held()) == (b"", frozenset())


@pytest.mark.parametrize("whole", [(), (-1,), (None,)])
def test_a_body_that_is_read_at_once_is_over_at_once(whole):
    slots = Slots(4)
    assert Body(io.BytesIO(b"0123"), None, slots, CLIENT).read(*whole) == b"0123"
    assert not slots.held()


def test_a_body_too_many_is_not_read_and_told_to_come_again():
    slots, inner = Slots(2), io.BytesIO(b"0123")
    slots.enter("file", CLIENT)
    with pytest.raises(UnreachableError) as caught:
        Body(inner, 4, slots, CLIENT).read(4)
    assert (caught.value.reason, caught.value.retry_after_s, inner.tell()) == ("overloaded", RETRY_AFTER_S, 0)


# --- answers ---------------------------------------------------------------------------------------------


class Answer:
    """Pieces that know whether they were closed."""

    def __init__(self, *pieces):
        self.pieces, self.closed = iter(pieces), False

    def __iter__(self):
        return self.pieces

    def close(self):
        self.closed = True


def ask(answer, length, slots, kind=FILE_TYPE, method="GET"):
    def app(_environ, start):
        start("200 OK", [("Content-Type", kind), ("Content-Length", str(length))])
        return answer

    said = []
    environ = {"REQUEST_METHOD": method, "REMOTE_ADDR": "192.0.2.1", "SERVER_PORT": "8470"}
    body = Transfers(app, slots)(environ, lambda *words: said.append(words))
    return said[0], body


def test_a_long_file_is_a_transfer_until_it_is_closed():
    slots, answer = Slots(4), Answer(b"ab", b"c")
    (status, _), body = ask(answer, SHORT + 1, slots)
    assert (status, list(body)) == ("200 OK", [b"ab", b"c"])
    assert [transfer.client for transfer in slots.held()] == [CLIENT]
    body.close()
    assert (answer.closed, slots.held()) == (True, frozenset())


@pytest.mark.parametrize(
    ("kind", "length", "method"),
    [
        pytest.param(FILE_TYPE, SHORT, "GET", id="a short file"),
        pytest.param("application/json", SHORT + 1, "GET", id="whatever is in memory"),
        pytest.param(FILE_TYPE, SHORT + 1, "HEAD", id="a head"),
    ],
)
def test_what_holds_no_thread_is_handed_over_whole_though_there_is_no_slot(kind, length, method):
    slots, answer = Slots(2), Answer(b"ab", b"c")
    slots.enter("body", CLIENT)
    (status, _), body = ask(answer, length, slots, kind, method)
    assert (status, body, answer.closed) == ("200 OK", [b"abc"], True)


def test_a_long_file_too_many_is_closed_and_told_to_come_again():
    slots, answer = Slots(2), Answer(b"ab")
    slots.enter("body", CLIENT)
    (status, headers), body = ask(answer, SHORT + 1, slots)
    assert (status[:3], dict(headers)["Retry-After"], answer.closed) == ("503", str(RETRY_AFTER_S), True)
    assert b'"overloaded"' in body[0]


# --- who is too slow -------------------------------------------------------------------------------------


def connection(moved, cookie=1, waits=False, client=CLIENT):
    return Connection(cookie, client, moved, waits)


def test_a_connection_has_its_time_and_is_slow_when_too_little_moved_in_it():
    marks, late = judge({}, [connection(5)], 100.0, PACE)
    assert (marks, late) == ({1: Mark(100.0, 5)}, set())
    assert judge(marks, [connection(6)], 129.9, PACE) == (marks, set())
    assert judge(marks, [connection(30_004)], 130.0, PACE)[1] == {1}


def test_a_connection_that_moved_enough_has_its_time_anew():
    marks, late = judge({1: Mark(100.0, 5)}, [connection(30_005)], 131.0, PACE)
    assert (marks, late) == ({1: Mark(131.0, 30_005)}, set())


def test_a_connection_that_is_gone_is_forgotten():
    assert judge({1: Mark(0.0, 0)}, [], 100.0, PACE) == ({}, set())


@pytest.mark.parametrize(
    ("kind", "found", "is_one"),
    [
        pytest.param("body", connection(0), True, id="a body"),
        pytest.param("file", connection(0, waits=True), True, id="a file that waits for the other end"),
        pytest.param("file", connection(0), False, id="a request that waits for us"),
        pytest.param("body", connection(0, client=("192.0.2.2", 8470)), False, id="another client"),
        pytest.param("body", connection(0, client=("192.0.2.1", 5432)), False, id="another port"),
    ],
)
def test_only_a_connection_that_may_carry_a_transfer_is_ended(kind, found, is_one):
    slots = Slots(4)
    slots.enter(kind, CLIENT)
    assert slow.is_of(found, slots.held()) is is_one


def test_the_kernel_says_what_moved_and_what_waits():
    with socket.create_server(("127.0.0.1", 0)) as server:
        ours = ("127.0.0.1", server.getsockname()[1])
        with socket.create_connection(ours) as theirs:
            accepted, _ = server.accept()
            with accepted:
                theirs.sendall(b"x" * 100)
                assert accepted.recv(100, socket.MSG_WAITALL) == b"x" * 100
                assert look(ours)[1:] == (ours, 100, False)
                accepted.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    while accepted.send(b"y" * 65_536):
                        pass
                assert look(ours).waits


def look(client):
    """The one connection that a server on this port has with it."""
    found = list(slow.connections({client}))
    for _, mine in found:
        mine.close()
    assert len(found) == 1
    return found[0][0]


def test_a_watch_begins_no_thread_before_there_is_a_transfer_and_one_for_all_of_them():
    slots = Slots(4)
    watch = Watch(slots, PACE)
    slots.entered = watch.wake
    assert watch._thread is None
    for _ in range(2):
        slots.leave(slots.enter("body", CLIENT))
    assert watch._thread.is_alive()
    assert watch._thread.daemon
