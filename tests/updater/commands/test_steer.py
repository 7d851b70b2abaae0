"""Going back, trying again and holding by hand, where no agent runs."""

from __future__ import annotations

import errno
import json
from contextlib import nullcontext
from datetime import timedelta

import pytest

from agent_core import clock, disk
from agent_core.bundle import INDEX_NAME
from tests.updater.commands.conftest import INDEXES, TWIN_OF_A, A, B, C
from updater import control


def test_back_to_a_third_version_by_name_and_only_by_name(host):
    host.stage(A, B, C)
    host.on(C, B)
    code, said = host.ask("rollback", "--to", "1.0.0", "--yes")
    assert (code, said) == (0, {"good": A, "left": C})
    assert (host.record.good, host.record.previous) == (A, C)
    assert host.agent("rollback", "--yes")[0] == 6  # the version before failed here, by the same word
    assert host.agent("retry")[0] == 0
    assert host.agent("rollback", "--to", C, "--yes")[0] == 0


def test_nobody_is_asked_and_nothing_is_done(host):
    host.stage(A, B)
    host.on(B, A)
    code, _, said = host.agent("rollback")
    assert (code, "This host leaves" in said, host.record.good) == (2, True, B)


def cut_short(place):
    """As a power cut leaves a file whose length was on the disk before its bytes."""
    (place / "agent.py").write_bytes(b"\0" * 2)


def other_index(place):
    (place / INDEX_NAME).write_bytes(INDEXES[TWIN_OF_A])


def empty_index(place):
    (place / INDEX_NAME).write_bytes(b"")


def linked(place):
    (place / "agent.py").rename(place / "elsewhere")
    (place / "agent.py").symlink_to("elsewhere")


NAMED, BEFORE = ("--to", "1.0.0"), ()
UNSIGNED = "its index is not the one that was signed"


@pytest.mark.parametrize(
    ("spoil", "words", "agents", "why"),
    [
        (cut_short, BEFORE, False, "agent.py is missing, or not as it was signed"),
        (cut_short, NAMED, True, "agent.py is missing, or not as it was signed"),
        (linked, NAMED, False, "agent.py is missing, or not as it was signed"),
        (other_index, BEFORE, True, UNSIGNED),
        (empty_index, NAMED, False, UNSIGNED),
    ],
)
def test_what_is_damaged_within_is_not_gone_back_to(host, spoil, words, agents, why):
    host.stage(A, B)
    host.on(B, A)
    spoil(host.layout.version_dir(A))
    with control.alone(host.layout) if agents else nullcontext():
        code, _, said = host.agent("rollback", *words, "--yes", "--json", "--timeout", "1s")
    error = json.loads(said)["error"]
    assert (code, error["reason"], why in error["why"]) == (7, "not-found", True)
    assert "agent versions" in error["then"]
    assert (host.record.good, control.read_request(host.layout)) == (B, None)


@pytest.mark.parametrize("spoil", [cut_short, other_index])
def test_a_trial_ends_at_the_good_version_however_that_is(host, spoil):
    host.stage(A, B)
    host.on(A, A, phase="trial", candidate=B, boots_left=1, boots_max=2, deadman_s=9)
    spoil(host.layout.version_dir(A))
    assert host.ask("rollback", "--yes") == (0, {"good": A, "left": B})


@pytest.mark.parametrize(
    ("word", "code", "reason"),
    [("9.9.9", 7, "not-found"), ("1.2.0", 7, "not-found"), ("1.1.0", 7, "not-found")],
    ids=["not here", "not whole", "runs already"],
)
def test_back_to_what_cannot_be_is_refused_with_words(host, word, code, reason):
    host.stage(A, B, C)
    host.on(B, A)
    (host.layout.version_dir(C) / "agent.py").unlink()
    got, out, said = host.agent("rollback", "--to", word, "--yes", "--json")
    error = json.loads(said)["error"]
    assert (got, out, error["reason"]) == (code, "", reason)
    assert error["what"]
    assert error["then"]
    assert host.record.good == B


class BadBlock:
    """A disk that does not say whether version A is whole, from some look on."""

    def __init__(self, seen=0):
        self.seen = seen

    def before(self, name, words, options):
        if name == "stat" and str(words[0]).endswith(f"{A}/agent.py"):
            self.seen -= 1
            if self.seen < 0:
                raise OSError(errno.EIO, "Input/output error")

    def after(self, *_):
        pass


@pytest.mark.parametrize("seen", [0, 1], ids=["by the command", "by the deed"])
def test_back_to_what_cannot_be_looked_at_is_refused_and_may_be_typed_again(host, seen):
    host.stage(A, B, C)
    host.on(C, B)

    with disk.watched_by(BadBlock(seen)):
        code, out, said = host.agent("rollback", "--to", "1.0.0", "--yes", "--json")
    error = json.loads(said)["error"]
    assert (code, out, error["reason"]) == (1, "", "unreadable")
    assert "Input/output error" in error["why"]
    assert "the same again" in error["then"]
    assert host.record.good == C
    assert host.ask("rollback", "--to", "1.0.0", "--yes") == (0, {"good": A, "left": C})


def test_a_version_that_cannot_be_looked_at_does_not_keep_one_from_a_whole_one_of_its_number(host):
    host.stage(A, B)
    host.stage(TWIN_OF_A, seq=1)
    host.on(B, B)
    with disk.watched_by(BadBlock()):
        assert host.ask("rollback", "--to", "1.0.0", "--yes") == (0, {"good": TWIN_OF_A, "left": B})


@pytest.mark.parametrize("words", [(), ("--to", "1.0.0")], ids=["the version before", "by name"])
def test_what_cannot_be_looked_at_is_told_where_an_agent_runs_too(host, words):
    host.stage(A, B)
    host.on(B, A)
    with control.alone(host.layout), disk.watched_by(BadBlock()):  # the lock is an agent's, for the command
        code, _, said = host.agent("rollback", *words, "--yes", "--json", "--timeout", "1s")
    assert (code, json.loads(said)["error"]["reason"]) == (1, "unreadable")
    assert control.read_request(host.layout) is None


def test_a_version_that_stands_here_twice_must_be_named_whole(host):
    host.stage(A, B)
    host.stage(TWIN_OF_A, seq=1)
    host.on(B, B)
    code, _, said = host.agent("rollback", "--to", "1.0.0", "--yes")
    assert (code, A in said, TWIN_OF_A in said) == (2, True, True)
    assert host.agent("rollback", "--to", A, "--yes")[0] == 0


@pytest.mark.parametrize("words", [(), ("--to", "1.0.0")], ids=["the version before", "by name"])
def test_what_the_release_keys_forbid_is_not_gone_back_to(host, words):
    host.stage(A, B)
    host.on(B, A)
    host.targets(floor=2)
    code, _, said = host.agent("rollback", *words, "--yes")
    assert (code, "floor is 2" in said) == (3, True)
    host.targets(revoked=[1])
    code, _, said = host.agent("rollback", *words, "--yes")
    assert (code, "revoked" in said) == (3, True)
    host.device().facts_file(A).unlink()
    code, _, said = host.agent("rollback", *words, "--yes")
    assert (code, "may be forbidden" in said, host.record.good) == (3, True, B)
    host.targets()
    assert host.agent("rollback", *words, "--yes")[0] == 0


def test_the_floor_of_the_record_forbids_too(host):
    host.stage(A, B)
    host.on(B, A, floor=2)
    assert host.agent("rollback", "--yes")[0] == 3


def test_a_trial_ends_at_the_good_version_whatever_is_forbidden(host):
    host.stage(A, B, C)
    host.on(A, A, phase="trial", candidate=B, boots_left=1, boots_max=2, deadman_s=9, floor=99)
    code, said = host.ask("rollback", "--yes")
    assert (code, said) == (0, {"good": A, "left": B})


@pytest.mark.parametrize("command", ["rollback", "retry"])
def test_where_nothing_is_installed_there_is_nothing_to_steer(host, command):
    code, _, said = host.agent(command, "--yes")
    assert (code in (6, 7), "next:" in said or "why:" in said) == (True, True)


def test_a_hold_lasts_until_a_moment_that_is_named_with_its_zone(host):
    code, said = host.ask("hold", "--until", "2h", "--reason", "stocktaking")
    hold = host.device().hold()
    assert (code, said["reason"], hold.reason) == (0, "stocktaking", "stocktaking")
    assert timedelta(minutes=119) < hold.until - clock.now() <= timedelta(hours=2)
    assert host.agent("hold", "--until", "2999-01-01T01:00:00+01:00")[0] == 0
    assert clock.iso(host.device().hold().until) == "2999-01-01T00:00:00Z"
    assert host.ask("hold")[1]["until"] is None
    assert host.ask("unhold") == (0, {"held": False})
    assert host.device().hold() is None
    assert host.agent("unhold")[0] == 0


def test_what_is_advised_for_a_date_without_a_zone_can_be_typed(host):
    said = host.agent("hold", "--until", "2999-01-01")[2]
    assert host.agent("hold", "--until", said.split("--until ")[1].split()[0])[0] == 0
    assert clock.iso(host.device().hold().until) == "2999-01-01T00:00:00Z"


SAY_NOTHING = (
    *("2999-01-01T01:00:00", "2001-01-01T00:00:00Z", "9999-12-31T23:59:59-14:00", "soon", "99999999999d"),
    *("0s", "20991231", ""),
)


@pytest.mark.parametrize("text", SAY_NOTHING)
def test_a_time_that_says_nothing_is_refused_and_nothing_is_held(host, text):
    code, _, said = host.agent("hold", "--until", text)
    assert (code, "next:" in said, host.device().hold()) == (2, True, None)
