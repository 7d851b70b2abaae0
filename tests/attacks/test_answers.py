"""What a hostile server, or a hostile proxy before an honest one, answers: row 35 of docs/cases.md.

Each lie is told about each kind of file. It is refused with its reason; the bytes that were taken, the memory
they took and the time have ends; and the next honest poll works.
"""

from __future__ import annotations

import gzip
import tracemalloc
from contextlib import contextmanager

import pytest

from tests.attacks.victim import NEW, SEQ, bundle
from tests.http_origin import ContentRange, Endless, Gzip, Raw, Slow, Status, Truncated
from updater import trusted_metadata

METADATA = ("timestamp.json", "2.snapshot.json", "2.targets.json", "2.cohorts.json")
BUNDLE = ("any.index.json", "any.tar.zst")
MUCH = 8 * 2**20
"""Memory that no refusal needs; the lies below would fill any."""


@contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < MUCH


def offers_news(victim):
    """Something to fetch for each role, and a bundle."""
    victim.server.release(NEW, SEQ[NEW])
    victim.server.publish_root()
    victim.server.lead_to(NEW)


LIES = {
    "a body without end": Endless(),
    "gzip that nobody asked for": Gzip(),
    "half a gigabyte in a small body": Status(
        200, {"Content-Encoding": "gzip"}, gzip.compress(b"[" * 2**20, 1) * 512
    ),
    "a redirect to another host": Status(302, {"Location": "http://127.0.0.1:1/elsewhere"}),
    "a redirect for ever": Status(308, {"Location": "/the/same"}),
    "a 304 unasked": Status(304),
    "a 206 unasked": Status(206, {"Content-Range": "bytes 0-1/2"}, b"{}"),
    "headers without end": Raw(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 20_000 + b"\r\n"),
    "no HTTP": Raw(b"220 mail ready\r\n"),
}
SORTED_OTHERWISE = {("a body without end", "any.tar.zst"): "length-mismatch"}
"""A bundle's length is signed: what goes on after it is no answer that makes no sense, but another file."""


@pytest.mark.parametrize("proxied", [False, True], ids=["server", "proxy"])
@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
def test_an_answer_that_no_honest_server_gives(make_victim, lie, proxied):
    victim = make_victim(proxied=proxied)
    offers_news(victim)
    name = next(name for name, each in LIES.items() if each is lie)
    for ending in ("timestamp.json", BUNDLE[1]) if proxied else ("2.root.json", "2.cohorts.json", *BUNDLE):
        victim.between.behave()
        victim.between.misbehave(ending, lie)
        victim.says_otherwise()
        with little_memory():
            victim.refuses(SORTED_OTHERWISE.get((name, ending), "bad-answer"))
    victim.is_well_again()


@pytest.mark.parametrize("piece", [b"", b"{", b"[]", b"<html>Sign in</html>", b"[" * 9000, b"\xff\xfe{"])
def test_metadata_that_is_cut_short_or_something_else(victim, piece):
    victim.between.misbehave("timestamp.json", Status(200, {}, piece))
    victim.refuses("bad-metadata")
    victim.is_well_again()


@pytest.mark.parametrize("ending", [*METADATA, *BUNDLE])
def test_a_line_that_is_cut_in_the_middle(victim, ending):
    """Nobody's lie: it is tried again later, and what has arrived of a bundle is kept."""
    offers_news(victim)
    victim.between.misbehave(ending, Truncated(40))
    victim.refuses("offline")
    victim.is_well_again()


@contextmanager
def impatient(victim, **limits):
    """Limits that a test reaches soon; an honest server on a busy machine is given the usual ones."""
    before = dict(victim.settings)
    victim.settings |= limits
    try:
        yield
    finally:
        victim.settings = before


@pytest.mark.parametrize(
    ("ending", "headers"),
    [("timestamp.json", False), ("timestamp.json", True), ("2.targets.json", False), (BUNDLE[0], True)],
    ids=["timestamp", "its headers", "targets", "the headers of an index"],
)
def test_one_byte_and_then_another_in_what_is_small(victim, ending, headers, monkeypatch):
    offers_news(victim)
    with monkeypatch.context() as patch, impatient(victim, server_timeout_s=2.0 if headers else 20.0):
        patch.setattr(trusted_metadata, "METADATA_DEADLINE_S", 0.3)
        victim.between.misbehave(ending, Slow(piece=1, pause_s=0.1 if headers else 0.02, headers=headers))
        victim.refuses("offline")
    victim.is_well_again()


def test_one_byte_and_then_another_in_a_bundle(victim):
    offers_news(victim)
    with impatient(victim, download_deadline_s=0.2):
        victim.between.misbehave("any.tar.zst", Slow(piece=1, pause_s=0.02))
        victim.refuses("offline")
    victim.is_well_again()


def test_other_bytes_of_the_same_length(victim):
    offers_news(victim)
    packed = bundle(NEW).archive
    victim.between.misbehave("any.tar.zst", Status(200, {}, packed[:-1] + bytes([packed[-1] ^ 1])))
    victim.refuses("digest-mismatch")
    assert list(victim.layout.download.iterdir()) == []
    victim.is_well_again()


@pytest.mark.parametrize("ending", BUNDLE)
def test_a_file_of_another_length(victim, ending):
    offers_news(victim)
    victim.between.misbehave(ending, Status(200, {}, b"short"))
    victim.refuses("length-mismatch")
    victim.is_well_again()


def half_way(victim):
    """A download that was cut, with what had arrived kept."""
    offers_news(victim)
    victim.between.misbehave("any.tar.zst", Truncated(len(bundle(NEW).archive) // 2), times=1)
    victim.refuses("offline")
    assert any(victim.layout.download.iterdir())


@pytest.mark.parametrize("value", ["bytes 0-9/10", "bytes */9", "bytes 1-2/3", "pages 1-2/3", ""])
def test_a_resume_that_is_answered_with_another_range(victim, value):
    half_way(victim)
    victim.between.misbehave("any.tar.zst", ContentRange(value))
    victim.refuses("bad-answer")
    victim.is_well_again()


def test_a_file_that_changes_behind_its_name_in_the_middle_of_a_resume(victim):
    half_way(victim)
    packed, file = bundle(NEW).archive, victim.server.archive_file(NEW)
    file.write_bytes(packed[: len(packed) // 2] + bytes(len(packed) - len(packed) // 2))
    victim.refuses("digest-mismatch")
    assert list(victim.layout.download.iterdir()) == []
    victim.is_well_again()


def test_a_proxy_that_keeps_yesterday(make_victim):
    """What it has is signed, and old: nobody is told that it is the newest."""
    victim = make_victim(proxied=True)
    old = victim.server.tree()
    offers_news(victim)
    victim.server.lead_to("1.0.0", revision=9)
    assert victim.poll().reason == "up-to-date"
    victim.server.replay(old)
    victim.refuses("replayed")
    victim.is_well_again()
