"""What a release file can and cannot make a host believe; real keys, no server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from agent_core import release_file
from agent_core.errors import NotFoundError, TrustError
from agent_core.release_file import TARGETS, Member, Title
from tests.http_origin import Origin
from tests.repository_simulator import PRODUCT, RepositorySimulator
from updater.catalog import Catalog
from updater.offline import FileOrigin, KeptOrigin
from updater.transport import Transport

NOW = datetime(2026, 6, 1, 12, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)
TITLE = Title(PRODUCT, "1.0.0", ("any",))


class World:
    """A repository, and one host that knows its first root."""

    def __init__(self, home, **how) -> None:
        self.home = home
        self.repository = RepositorySimulator(home / "www", now=NOW, **how)
        self.repository.add_release("1.0.0", seq=1)
        self.repository.publish()
        self.root = self.repository.trusted_root

    def file(self, *, roots=None):
        """The release file of the newest targets."""
        repository = self.repository
        last = range(1, repository.root.version + 1) if roots is None else roots
        members = [f"{number}.root.json" for number in last]
        found = [Member.of(f"metadata/{name}", repository.read(name)) for name in members]
        found.append(Member.of(TARGETS, repository.read(f"{repository.targets.version}.targets.json")))
        path = self.home / f"{repository.targets.version}-{len(members)}.release"
        release_file.write(path, TITLE, found)
        return path

    def catalog(self, origin) -> Catalog:
        return Catalog(self.home / "tuf", origin, PRODUCT, self.root)

    def take(self, path, *, now=NOW, kept=None, high_water=None):
        with release_file.opened(path) as opened, self.catalog(FileOrigin(opened)) as catalog:
            return catalog.take(now, high_water, kept), catalog.release("1.0.0", ["any"]), catalog.policy()

    def refusal(self, path, **how) -> str:
        with pytest.raises(TrustError) as caught:
            self.take(path, **how)
        return caught.value.reason

    def refresh(self):
        """What the host learns of a server, in the same cache."""
        with Origin(self.repository.directory) as origin:
            with self.catalog(Transport(origin.url, proxies={})) as catalog:
                return catalog.refresh(self.repository.now, None)

    def cached(self):
        return {
            path.name: path.read_bytes()
            for path in (self.home / "tuf").rglob("*.json")
            if path.parent.name != "root_history" and path.name != "root.json"
        }


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_a_file_is_believed_by_the_release_keys_alone_and_gives_release_and_policy(world):
    world.repository.set_policy(floor_seq=1, revoked_seq=(7,))
    world.repository.publish()
    content, release, policy = world.take(world.file())
    assert content == world.repository.read("2.targets.json")
    assert (release.facts.seq, policy.floor_seq, policy.revoked_seq) == (1, 1, (7,))
    assert world.cached() == {}  # nothing of what a server said is made up


def test_one_of_two_signatures_and_keys_of_another_role_are_refused(tmp_path):
    world = World(tmp_path, thresholds={"targets": 2})
    assert world.take(world.file())[1]
    world.repository.signers["targets"].pop()
    world.repository.publish()
    assert world.refusal(world.file()) == "bad-signature"
    world.repository.signers["targets"] = world.repository.signers["snapshot"] * 2
    world.repository.publish()
    assert world.refusal(world.file()) == "bad-signature"


def test_the_chain_of_roots_is_followed_from_the_hosts_own_and_kept(world):
    world.repository.rotate("targets")
    world.repository.publish_root()
    world.repository.publish()
    assert world.refusal(world.file(roots=[1])) == "bad-signature"
    assert world.take(world.file())[1]
    # Now the host knows the newer root: a file of the old keys is refused.
    old = World(world.home / "other")
    assert (world.home / "tuf" / "root_history" / "2.root.json").exists()
    assert world.refusal(old.file()) == "bad-signature"


def test_a_root_that_skips_a_version_or_is_signed_by_the_new_keys_only_changes_nothing(world):
    world.repository.rotate("root")
    world.repository.publish_root(signers=world.repository.signers["root"])
    world.repository.publish()
    assert world.refusal(world.file()) == "bad-signature"
    assert not (world.home / "tuf" / "root_history" / "2.root.json").exists()


def test_expired_targets_and_an_expired_root_are_refused_by_signed_time_too(world):
    file = world.file()
    assert world.refusal(file, now=NOW + 61 * DAY) == "expired"
    assert world.refusal(file, now=NOW - 1000 * DAY, high_water=NOW + 61 * DAY) == "expired"
    assert world.refusal(file, now=NOW + 366 * DAY) == "expired"
    assert world.take(file, now=NOW + 59 * DAY)[1]


def test_a_file_older_than_what_a_server_or_another_file_brought_is_refused(world):
    old = world.file()
    world.repository.publish()
    world.refresh()
    before = world.cached()
    assert world.refusal(old) == "replayed"
    same = world.file()
    world.repository.publish()
    kept, *_ = world.take(world.file())
    assert world.refusal(same, kept=kept) == "replayed"
    assert world.cached() == before


def test_what_a_stolen_key_ran_forward_counts_no_longer_when_the_keys_were_changed(world):
    world.repository.targets.version = 2**31
    world.repository.publish()
    kept, *_ = world.take(world.file())
    world.repository.rotate("targets")
    world.repository.publish_root()
    world.repository.targets.version = 5
    world.repository.publish()
    assert world.take(world.file(), kept=kept)[1]


def test_delegations_by_which_others_could_sign_releases_are_refused(world):
    world.repository.delegate("helper", ["bundles/*/*/*"], world.repository.signers["cohorts"][0])
    world.repository.publish()
    assert world.refusal(world.file()) == "bad-delegation"


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"signed": {"_type": "targets"}}', b"\xff"])
def test_metadata_that_is_none_is_refused_and_nothing_else_is_raised(world, damage):
    path = world.home / "damaged"
    release_file.write(path, TITLE, [Member.of(TARGETS, damage)])
    assert world.refusal(path) == "bad-metadata"


def test_a_root_in_the_place_of_targets_is_refused(world):
    path = world.home / "damaged"
    release_file.write(path, TITLE, [Member.of(TARGETS, world.repository.read("1.root.json"))])
    assert world.refusal(path) == "bad-metadata"


def test_a_file_without_this_hosts_bundle_says_which_it_has(world):
    with release_file.opened(world.file()) as opened, pytest.raises(NotFoundError) as caught:
        FileOrigin(opened).get("/targets/bundles/x/1/any.tar.zst")
    assert (caught.value.reason, "for any" in caught.value.why) == ("no-bundle", True)
    with release_file.opened(world.file()) as opened, pytest.raises(NotFoundError):
        with FileOrigin(opened).open("/targets/bundles/x/1/any.tar.zst"):
            pass


def test_a_version_that_came_by_file_can_verify_itself_from_what_was_kept(world):
    kept, *_ = world.take(world.file())
    with world.catalog(KeptOrigin(kept)) as catalog:
        catalog.take(NOW, None)
        assert catalog.release("1.0.0", ["any"]).facts.seq == 1


def test_a_server_that_is_held_back_does_not_bring_back_what_a_file_revoked(world):
    tree = world.repository.tree()
    world.repository.set_policy(floor_seq=2, revoked_seq=(1,))
    world.repository.publish()
    kept, *_ = world.take(world.file())
    world.repository.replay(tree)
    with (
        Origin(world.repository.directory) as origin,
        world.catalog(Transport(origin.url, proxies={})) as one,
    ):
        one.refresh(NOW, None)
        assert (one.policy().floor_seq, one.policy().revoked_seq) == (0, ())
        assert (one.policy(kept).floor_seq, one.policy(kept).revoked_seq) == (2, (1,))
    # A server that went on may take it back.
    world.repository.set_policy(floor_seq=2)
    world.repository.publish()
    with (
        Origin(world.repository.directory) as origin,
        world.catalog(Transport(origin.url, proxies={})) as one,
    ):
        one.refresh(NOW, None)
        assert (one.policy(kept).floor_seq, one.policy(kept).revoked_seq) == (2, ())
