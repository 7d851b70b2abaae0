"""Delegated roles: which are asked, in what order, by what name, and for how long they count."""

from __future__ import annotations

from datetime import timedelta
from urllib.parse import quote

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Targets

from tests.conformance.runner import OK, REFUSED

DAY = timedelta(days=1)


def delegate(repository, delegator, name, paths=("*",), terminating=False):
    """A role of a graph, published with the next `publish`."""
    above = repository.targets if delegator == "targets" else repository.extra[delegator]
    if above.delegations is None:
        above.delegations = Delegations({}, {})
    signer = repository.signers.setdefault(name, [CryptoSigner.generate_ed25519()])[0]
    above.delegations.roles[name] = DelegatedRole(name, [], 1, terminating, list(paths))
    above.add_key(signer.public_key, name)
    repository.extra.setdefault(name, Targets(1, expires=repository.now + DAY))


def visited(runner):
    """The delegated roles that were fetched, in order; the four of the top level come first."""
    asked = [path for path in runner.origin.paths() if path.startswith("/metadata/")]
    return [path.partition(".")[2].removesuffix(".json") for path in asked[4:]]


AB = [("targets", "A"), ("targets", "B")]
GRAPHS = {
    "one": ([("targets", "A")], "A"),
    "two beside each other": (AB, "AB"),
    "two levels": ([*AB, ("B", "C")], "ABC"),
    "depth first": ([*AB, ("A", "C"), ("A", "D")], "ACDB"),
    "depth first, three levels": ([*AB, ("A", "C"), ("C", "D")], "ACDB"),
    "terminating": ([*AB, ("A", "C", ("*",), True), ("A", "D")], "AC"),
    "terminating, but for its own": ([*AB, ("A", "C", ("*",), True), ("C", "D")], "ACD"),
    "paths": ([("targets", "A", ("*.py",)), ("targets", "B"), ("A", "C")], "B"),
    "paths below": ([*AB, ("A", "C", ("*.py",)), ("C", "D")], "AB"),
    "cyclic": ([*AB, ("B", "C"), ("C", "D"), ("D", "B")], "ABCD"),
    "a third of two": ([*AB, ("B", "C"), ("A", "C")], "ACB"),
    "a third of two, by paths": ([*AB, ("B", "C"), ("A", "C", ("*.py",))], "ABC"),
}


@pytest.mark.parametrize(("edges", "order"), GRAPHS.values(), ids=GRAPHS)
def test_delegations_are_walked_in_their_order(runner, repository, edges, order):
    for edge in edges:
        delegate(repository, *edge)
    repository.publish()
    assert runner.download("missing") == REFUSED
    assert visited(runner) == list(order)


@pytest.mark.parametrize(
    ("path", "order", "content"),
    [
        ("file.txt", "", b"content"),
        ("readme.md", "A", b"by A"),
        ("releases/x/one", "BC", b"by C"),
        ("releases/y/two.zip", "BD", b"by D"),
        ("releases/z/three.zip", "B", None),
    ],
    ids=["of targets itself", "by a wildcard", "below", "below, by more", "listed where it may not be"],
)
def test_a_target_is_found_in_the_role_that_may_list_it_and_in_no_other(
    runner, repository, path, order, content
):
    delegate(repository, "targets", "A", ("*.txt.bak", "*.md"))
    delegate(repository, "targets", "B", ("releases/*/*",))
    delegate(repository, "B", "C", ("releases/x/*",))
    delegate(repository, "B", "D", ("releases/y/*.zip",))
    for role, name in (("A", "readme.md"), ("C", "releases/x/one"), ("D", "releases/y/two.zip")):
        repository.add_target(name, f"by {role}".encode(), role=repository.extra[role])
    repository.add_target("releases/z/three.zip", b"by D", role=repository.extra["D"])
    repository.publish()
    assert runner.download(path) == (OK if content else REFUSED)
    assert "".join(visited(runner)) == order
    assert runner.downloaded() == ([content] if content else [])


@pytest.fixture
def lasting(repository):
    """A delegated role that counts for a week, with two files."""
    delegate(repository, "targets", "A", ("docs/*",))
    role = repository.extra["A"]
    role.expires = repository.now + 7 * DAY
    for name in ("one", "two"):
        repository.add_target(f"docs/{name}", name.encode(), role=role)
    later = repository.now + 18 * DAY
    for signed in (repository.timestamp, repository.snapshot, repository.targets):
        signed.expires = later + 3 * DAY
    repository.publish()
    return later


def test_a_delegated_role_that_has_expired_is_not_taken(runner, repository, lasting):
    repository.extra["A"].expires = repository.now - DAY
    repository.publish()
    assert runner.refresh() == OK
    assert runner.download("docs/one") == REFUSED
    assert (runner.downloaded(), set(runner.versions())) == (
        [],
        {"root", "timestamp", "snapshot", "targets"},
    )


def test_a_delegated_role_that_has_expired_since_it_was_taken_counts_no_more(runner, lasting):
    assert runner.download("docs/one") == OK
    assert runner.at(lasting, runner.words_to_download("docs/two")) == REFUSED
    assert runner.downloaded() == [b"one"]


def test_a_delegated_role_that_has_expired_here_is_brought_up_to_date(runner, repository, lasting):
    assert runner.download("docs/one") == OK
    repository.extra["A"].expires = lasting + 3 * DAY
    repository.publish()
    assert runner.at(lasting, runner.words_to_download("docs/two")) == OK
    assert runner.downloaded() == [b"one", b"two"]


@pytest.mark.parametrize("name", ["?", "#", "/delegated", "../delegated"])
def test_an_odd_name_of_a_role_is_quoted_on_the_way_and_on_the_disk(runner, repository, name):
    write = repository.write
    repository.write = lambda file, content: write(quote(file, safe=""), content)
    delegate(repository, "targets", name)
    repository.publish()
    before = set(runner.metadata.parent.iterdir())
    assert runner.download("missing") == REFUSED
    assert runner.origin.paths()[-1] == f"/metadata/2.{quote(name, safe='')}.json"
    assert len(runner.versions()) == 5
    assert set(runner.metadata.parent.iterdir()) == before
