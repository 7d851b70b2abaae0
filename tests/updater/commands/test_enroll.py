"""`agent run` on a host that has lost what it was told when it enrolled."""

from __future__ import annotations

import signal

import pytest

from agent_core.errors import Exit
from tests.updater.commands.conftest import A, B
from updater import install


@pytest.fixture
def started(host, monkeypatch):
    """The roots whose launcher took this process's place."""
    roots = []
    monkeypatch.setattr(install, "exec_launcher", lambda layout, supervise: roots.append(layout.root) or 0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return roots


def lose_identity(host):
    host.layout.identity.unlink()
    host.layout.identity_copy.unlink()


def test_a_version_that_is_here_is_run_though_nothing_says_who_this_host_is(host, started):
    host.stage(A, B)
    host.on(B, A)
    lose_identity(host)
    assert host.agent("run", "--supervise")[0] == 0
    assert started == [host.root]


def test_without_a_version_and_an_identity_there_is_nothing_to_run(host, started):
    lose_identity(host)
    assert host.agent("run", "--supervise")[0] == Exit.NOT_FOUND
    assert started == []
