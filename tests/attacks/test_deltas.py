"""A delta is whatever bytes somebody put there: it is held to the signed index, or the full bundle is taken.

Deltas are signed with the release, so these are what a careless or a stolen release key could say as well; a
thief without one can only put other bytes in their place.
"""

from __future__ import annotations

import re
import tempfile
from hashlib import sha256
from pathlib import Path

import pytest

from agent_core import delta, slots
from agent_core.bundle import Index, unpack
from agent_core.delta import WHOLE, zstd
from agent_core.wire import DeltaFacts, delta_path
from tests.attacks.victim import GOOD, NEW, OLD, PRODUCT, SEQ, bundle
from updater.decide import Action

BOMB = WHOLE + zstd.compress(bytes(2**22))
"""4 MiB of nothing, in fewer bytes than the bundle: a device takes no delta that is longer."""


def digest(version):
    return sha256(bundle(version).index).hexdigest()


def made(base, version):
    """The honest delta between two releases."""
    with tempfile.TemporaryDirectory() as place:
        trees, indexes = [], []
        for each in (base, version):
            archive, tree = Path(place) / f"{each}.tar.zst", Path(place) / each
            archive.write_bytes(bundle(each).archive)
            indexes.append(Index.from_bytes(bundle(each).index))
            unpack(archive, indexes[-1], tree)
            trees.append(tree)
        out = Path(place) / "delta"
        delta.make(trees[0], indexes[0], trees[1], indexes[1], out)
        for directory in Path(place).rglob("*"):
            if directory.is_dir():
                directory.chmod(0o755)
        return out.read_bytes()


def offer(victim, content, put=None):
    """Lead the host to the next release, with this as the delta to it; what lies there is `put`."""
    server, path = victim.server, delta_path(PRODUCT, NEW, "any", digest(GOOD))
    server.release(NEW, SEQ[NEW])
    server.add_target(path, content, DeltaFacts(GOOD, digest(GOOD), digest(NEW)).to_json())
    server.lead_to(NEW)
    if put is not None:
        server.target_file(path, sha256(content).hexdigest()).write_bytes(put)
    victim.between.requests.clear()


def asked_for(victim, *endings):
    """Which of these the host fetched since it was offered the release, in order."""
    found = [ending for path in victim.between.paths() for ending in endings if path.endswith(ending)]
    victim.between.requests.clear()
    return found


def test_an_honest_delta_is_taken(victim):
    """Else nothing below would try anything."""
    offer(victim, made(GOOD, NEW))
    outcome = victim.poll()
    assert (outcome.action, outcome.detail) == (Action.INSTALL, f"to {NEW}"), outcome
    assert outcome.candidate == victim.name_of(NEW)
    assert asked_for(victim, ".delta", ".tar.zst") == [".delta"]
    victim.is_well_again(told=True)


@pytest.mark.parametrize(
    ("content", "put", "reason"),
    [
        pytest.param(made(GOOD, NEW), made(GOOD, OLD), "length-mismatch|digest-mismatch", id="swapped"),
        pytest.param(made(GOOD, NEW), made(GOOD, NEW)[:-1], "length-mismatch", id="truncated"),
        pytest.param(made(GOOD, NEW), b"", "length-mismatch", id="empty"),
        pytest.param(made(GOOD, NEW)[:-1], None, "bad-archive", id="signed, truncated"),
        pytest.param(made(GOOD, OLD), None, "bad-archive|digest-mismatch", id="signed, to another release"),
        pytest.param(made(NEW, GOOD), None, "bad-archive|digest-mismatch", id="signed, of another base"),
        pytest.param(BOMB, None, "bad-archive", id="signed, a bomb"),
    ],
)
def test_a_delta_that_does_not_give_the_signed_files_costs_its_own_download(victim, content, put, reason):
    """Case 30. The version that runs is not touched, what is staged is whole, and the next check goes on."""
    offer(victim, content, put)
    outcome = victim.poll()
    assert (outcome.action, outcome.candidate) == (Action.INSTALL, victim.name_of(NEW)), outcome
    assert re.search(rf"did not serve \(({reason})\)", outcome.detail), outcome
    assert asked_for(victim, ".delta", ".tar.zst") == [".delta", ".tar.zst"]
    assert slots.is_complete(victim.layout.root, outcome.candidate)
    (record, links, files), (kept, led, now) = victim.before, victim.state()
    assert (kept, led) == (record, links)
    assert files.items() <= now.items()
    assert list(victim.layout.staging.iterdir()) == list(victim.layout.download.iterdir()) == []
    victim.is_well_again(told=True)
