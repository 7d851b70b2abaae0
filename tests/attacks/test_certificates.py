"""A line that ends at somebody else: row 35 of docs/cases.md. Nothing is asked over it, and nothing said.

What may run is safe without TLS; this is for the tokens and reports that cross the line.
"""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.attacks.victim import NEW, SEQ
from tests.certificates import Authority, shown
from tests.http_origin import Origin, Proxy

HOUR = timedelta(hours=1)


@pytest.fixture
def authorities(tmp_path):
    """The one that the host believes, and another."""
    return Authority(tmp_path, "ours"), Authority(tmp_path, "theirs")


@pytest.fixture
def tls(authorities):
    ours, _ = authorities
    return shown(ours.issue("server")), ours.file


WRONG = {
    "of another authority": lambda ours, theirs: theirs.issue("his"),
    "of yesterday": lambda ours, theirs: ours.issue("his", since=2 * HOUR, left=-HOUR),
    "of tomorrow": lambda ours, theirs: ours.issue("his", since=-HOUR, left=2 * HOUR),
    "of another host": lambda ours, theirs: ours.issue("his", address="127.0.0.2"),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG.keys())
def test_a_server_that_shows_a_wrong_certificate(make_victim, authorities, tls, wrong):
    victim = make_victim(tls=tls)
    asked = len(victim.between.requests)
    victim.between.show(shown(wrong(*authorities)))
    victim.refuses("bad-certificate", on_the_line=True)
    assert len(victim.between.requests) == asked
    victim.between.show(tls[0])
    victim.tells("bad-certificate")
    victim.is_well_again()


@pytest.mark.parametrize("name", ["of another authority", "of another host"])
def test_a_proxy_that_shows_a_certificate_of_its_own(make_victim, authorities, tls, name):
    """Behind it lies a copy of the honest server; what is signed is right, and still nobody is spoken to."""
    victim = make_victim(tls=tls)
    victim.server.release(NEW, SEQ[NEW])
    his = shown(WRONG[name](*authorities))
    with Proxy() as proxy, Origin(victim.server.directory, his) as impostor:
        victim.settings["server_proxy"] = proxy.url
        assert victim.poll().reason == "up-to-date"
        assert proxy.heads
        proxy.elsewhere = impostor.port
        victim.refuses("bad-certificate", on_the_line=True)
        assert impostor.requests == []
        proxy.elsewhere = None
        victim.tells("bad-certificate")
        victim.is_well_again()
