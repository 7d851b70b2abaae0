"""The quick form of the model tier, and that the model is what it says."""

from __future__ import annotations

from dataclasses import replace

import pytest

from agent_core import slots
from tests.crash import model
from tests.crash.journal import Directory, File, Journal, Link
from tests.crash.tally import Tally
from tests.crash.watch import harvest

ROOT = {"": Directory(0o755), "a": File(b"old", 0o644)}
PAIR = {**ROOT, "from": Directory(0o755), "to": Directory(0o755), "from/f": File(b"f", 0o644)}


def all_of(journal: Journal) -> list[dict[str, object]]:
    return list(journal.states(10_000, ()))


def contents(journal: Journal, path: str) -> set[object]:
    found = (tree.get(path) for tree in all_of(journal))
    return {entry.content if isinstance(entry, File) else entry for entry in found}


def places(journal: Journal) -> set[tuple[bool, bool]]:
    return {("from/f" in tree, "to/f" in tree) for tree in all_of(journal)}


def test_no_promise_breaks_in_a_few_hundred_states():
    tally = Tally("model")
    model.run(tally, quick=True)
    assert tally.failures == []
    assert tally.tried > 300


def test_a_host_that_tries_without_end_is_told_so_and_not_looked_at_without_end():
    def try_again(host):
        slots.roll_back(host.root, "unhealthy")
        slots.unskip(host.root)

    restless = replace(model.stories()["agent goes back"], trial=try_again)
    told = model.explore(restless, model.QUICK._replace(goes_on=False))
    assert [failure.endswith("and does not rest") for failure in told.failures] == [True]


def test_bytes_are_old_new_torn_or_zero_until_their_file_is_synced():
    journal = Journal(ROOT)
    number = journal.find([Journal.ROOT, "a"])
    journal.write(number, 0, b"new!")
    assert contents(journal, "a") == {b"old", b"ned", bytes(4), b"new!"}
    journal.sync(number)
    assert contents(journal, "a") == {b"new!"}


def test_a_file_that_is_synced_may_still_have_no_name():
    journal = Journal(ROOT)
    root = journal.find([Journal.ROOT])
    number = journal.make(root, "b", "file", 0o644)
    journal.write(number, 0, b"xy")
    journal.sync(number)
    assert contents(journal, "b") == {None, b"xy"}
    journal.sync(root)
    assert contents(journal, "b") == {b"xy"}


def test_a_rename_happens_whole_or_not_at_all():
    journal = Journal({**ROOT, "b": File(b"fresh", 0o644)})
    root = journal.find([Journal.ROOT])
    journal.move((root, "b"), (root, "a"))
    found = {(tree["a"].content, "b" in tree) for tree in all_of(journal)}
    assert found == {(b"old", True), (b"fresh", False)}


def test_two_changes_of_a_directory_may_be_lost_one_by_one():
    journal = Journal(ROOT)
    root = journal.find([Journal.ROOT])
    for name in "xy":
        journal.make(root, name, "link", 0o777, "to")
    found = {"".join(sorted(set(tree) & {"x", "y"})) for tree in all_of(journal)}
    assert found == {"", "x", "y", "xy"}


def test_an_old_name_may_come_back_until_its_directory_is_synced():
    journal = Journal(PAIR)
    source, target = (journal.find([Journal.ROOT, name]) for name in ("from", "to"))
    journal.move((source, "f"), (target, "f"))
    assert places(journal) == {(True, False), (False, True)}
    journal.sync(target)
    assert places(journal) == {(True, True), (False, True)}
    journal.sync(source)
    assert places(journal) == {(False, True)}


def test_what_left_a_directory_that_is_synced_is_where_it_went():
    journal = Journal(PAIR)
    source, target = (journal.find([Journal.ROOT, name]) for name in ("from", "to"))
    journal.move((source, "f"), (target, "f"))
    journal.sync(source)
    assert places(journal) == {(False, True)}


def test_an_exchange_is_both_or_none():
    journal = Journal({"": Directory(0o755), "one": Link("1"), "two": Link("2")})
    root = journal.find([Journal.ROOT])
    journal.exchange((root, "one"), (root, "two"))
    found = {(tree["one"].text, tree["two"].text) for tree in all_of(journal)}
    assert found == {("1", "2"), ("2", "1")}


def test_beyond_the_bound_both_ends_and_each_deviation_from_them_are_left():
    journal = Journal(ROOT)
    root = journal.find([Journal.ROOT])
    for name in "wxyz":
        journal.make(root, name, "link", 0o777, "to")
    found = {len(set(tree) & set("wxyz")) for tree in journal.states(15, (1,))}
    assert found == {0, 1, 3, 4}


@pytest.mark.parametrize("story", model.stories())
def test_the_journal_of_a_story_ends_with_what_is_really_there(story):
    script = model.stories()[story]
    with model.playground() as place, model.fast_motion(), model.planted(place, script.tree) as root:
        model.LIFE.begin(0)
        host = model.Host(root, script, script.ledger, step=lambda _journal, _ledger: None)
        assert host.live()
        assert host.watch.journal.now() == harvest(root)
