"""A stop without a server or a key: on the host, or as a plain file beside the metadata."""

from __future__ import annotations

import errno
import json
import os
from types import SimpleNamespace

import pytest

from agent_core import clock, disk
from agent_core.errors import TrustError, UnreachableError
from agent_core.wire import Reason
from tests.http_origin import Origin
from updater import poll, stop
from updater.decide import Action
from updater.device import Outcome
from updater.transport import Answer, Transport

PLAIN = Outcome(Action.INSTALL, "update", "to 2.0.0", "2026-03-02T12:00:00Z", version="2.0.0")


class Served:
    """An origin that has one answer, or one error, for everything."""

    def __init__(self, said):
        self.said, self.asked = said, []

    def get(self, path, headers=None, **limits):
        self.asked.append(path)
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


def answer(body, status=200):
    return Served(Answer(status, {}, body))


@pytest.mark.parametrize(
    ("origin", "stops"),
    [
        pytest.param(answer(b"", 404), False, id="no file"),
        pytest.param(answer(b""), True, id="an empty file"),
        pytest.param(answer(b"{}"), True, id="everything"),
        pytest.param(answer(b"not json"), True, id="nonsense"),
        pytest.param(answer(b"[]"), True, id="no object"),
        pytest.param(answer(b'{"products": 7}'), True, id="products that cannot be read"),
        pytest.param(answer(b'{"products": ["shop"]}'), True, id="this product"),
        pytest.param(answer(b'{"products": ["other"]}'), False, id="another product"),
        pytest.param(Served(UnreachableError("away")), False, id="no answer"),
        pytest.param(Served(TrustError("a lie")), False, id="an answer of a liar"),
    ],
)
def test_a_served_file_can_only_stop(origin, stops):
    found = stop.served(origin, "shop")
    assert (found is not None) is stops
    assert origin.asked == ["/metadata/stop.json"]


def test_the_file_is_a_plain_one_of_any_file_server(tmp_path):
    (tmp_path / "metadata").mkdir()
    with Origin(tmp_path) as origin:
        transport = Transport(origin.url)
        assert stop.served(transport, "shop") is None
        (tmp_path / "metadata" / "stop.json").write_text('{"reason": "fair"}')
        assert stop.served(transport, "shop") == stop.Stop(stop.SERVED, "fair")


def test_who_stops_and_why_is_said():
    found = stop.served(answer(json.dumps({"reason": "bad disks"}).encode()), "shop")
    assert str(found) == "updates are stopped by /metadata/stop.json: bad disks"


@pytest.mark.parametrize("content", ["", "a fair\nsecond line"])
def test_a_file_on_the_host_stops_by_being_there(tmp_path, content):
    file = tmp_path / "stop"
    assert stop.on_host(str(file)) is None
    file.write_text(content)
    assert stop.on_host(str(file)) == stop.Stop(str(file), content.partition("\n")[0])
    assert stop.on_host("") is None


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda file: file.mkdir(), id="a directory"),
        pytest.param(os.mkfifo, id="a pipe that nobody writes to"),
        pytest.param(lambda file: file.symlink_to(file), id="a link to itself"),
        pytest.param(lambda file: file.symlink_to("nothing"), id="a link to nothing"),
        pytest.param(lambda file: file.symlink_to("/etc/passwd/stop"), id="a link through a file"),
        pytest.param(lambda file: file.symlink_to("/dev/zero"), id="a device without an end"),
    ],
)
def test_whatever_stands_in_the_place_of_a_stop_stops(tmp_path, make):
    make(tmp_path / "stop")
    assert stop.on_host(str(tmp_path / "stop")).why


def test_a_stop_of_ten_gigabytes_is_read_no_further_than_its_first_line_may_go(tmp_path):
    file, taken = tmp_path / "stop", []
    file.write_text("fair")
    os.truncate(file, 10 * 10**9)

    class Reads:
        def before(self, *_):
            pass

        def after(self, name, words, options, result):
            taken.append(len(result) if name == "read" else 0)

    with disk.watched_by(Reads()):
        assert stop.on_host(str(file)).why.startswith("fair")
    assert sum(taken) == stop.MOST


@pytest.mark.parametrize("name", ["stat", "open", "read"])
def test_a_stop_that_the_disk_does_not_give_stops(tmp_path, name):
    (tmp_path / "stop").write_text("fair")

    class BadBlock:
        def before(self, called, words, options):
            if called == name:
                raise OSError(errno.EIO, "Input/output error")

        def after(self, *_):
            pass

    with disk.watched_by(BadBlock()):
        assert stop.on_host(str(tmp_path / "stop")).why == "it cannot be read (Input/output error)"


def checking(tmp_path, origin, *, by_hand=False):
    settings = SimpleNamespace(stop_file=str(tmp_path / "stop"), poll_min_s=5)
    device = SimpleNamespace(settings=settings, identity=SimpleNamespace(product="shop"), seen=lambda: None)
    return poll._Check(device, None, origin, clock.now(), None, by_hand)


def test_the_host_goes_first_and_what_a_person_brings_asks_no_server(tmp_path):
    origin = answer(b"{}")
    assert checking(tmp_path, origin, by_hand=True)._stop() is None
    assert checking(tmp_path, origin)._stop() == stop.Stop("/metadata/stop.json", "")
    (tmp_path / "stop").write_text("fair")
    assert checking(tmp_path, origin, by_hand=True)._stop().why == "fair"
    assert len(origin.asked) == 1


def test_a_stopped_install_waits_and_looks_again(tmp_path):
    check = checking(tmp_path, answer(b"{}"))
    waits = check._wait_for_stop(PLAIN, check._stop())
    assert (waits.action, waits.reason, waits.failed) == (Action.STAY, Reason.STOP_FILE, False)
    assert waits.again is not None
    assert not poll.is_due(waits, "1.0.0-aaaaaaaaaaaa", clock.parse_iso(waits.at))
    assert poll.is_due(waits, "1.0.0-aaaaaaaaaaaa", clock.parse_iso(waits.again))
