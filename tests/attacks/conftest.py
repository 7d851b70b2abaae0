"""Hosts to attack; each is gone with its test."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from agent_core import clock
from tests.attacks.victim import Victim


@pytest.fixture
def make_victim(tmp_path):
    """Makes a host with 1.0.0; `thresholds`, `proxied`, `gate` and `tls` as of `Victim`."""
    with ExitStack() as stack:
        yield lambda **how: stack.enter_context(Victim(tmp_path, **how))


@pytest.fixture
def victim(make_victim):
    return make_victim()


@pytest.fixture
def wall(monkeypatch):
    """Sets the host's wall clock this far from the right time."""
    right = clock.now

    def sets(by):
        monkeypatch.setattr(clock, "now", lambda: right() + by)

    return sets
