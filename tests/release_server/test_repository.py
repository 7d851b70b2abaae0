from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from sqlalchemy import select
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import Metadata
from tuf.ngclient import FetcherInterface, Updater

from agent_core.clock import iso
from agent_core.errors import TrustError
from agent_core.wire import Directive, bundle_path, directive_path, index_path
from keys import ceremony
from keys.roles import ONLINE_ROLES
from release_server import acceptance, repository, signer
from release_server.models import (
    Cohort,
    CohortStatus,
    MetadataFile,
    Product,
)
from release_server.signing.policy import Memory

ONE = bundle_path("demo", "1.0", "any")
EMPTY = {"sha256": sha256(b"").hexdigest()}


@pytest.fixture
def published(trusted, blobs, accept):
    """Targets with demo 1.0, accepted; not yet exported."""
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    accept(metadata)
    return metadata


@pytest.fixture
def publish(sessions, blobs, config, online_signer, clock):
    """What the jobs process does in a tick; whether something was signed."""

    def both():
        with sessions.write() as session:
            signed = repository.publish(session, online_signer, clock())
        repository.export(sessions, blobs, config.repository)
        return signed

    return both


@pytest.fixture
def steer(sessions, clock):
    """Give a cohort a directive, as the reconciler does."""

    def to(release, cohort="eu", revision=1, **fields):
        directive = Directive("demo", cohort, release, release, 10_000, "salt", revision, **fields).to_json()
        with sessions.write() as session:
            product = session.scalars(select(Product).where(Product.name == "demo")).one()
            found = session.scalar(select(Cohort).where(Cohort.name == cohort))
            if found is None:
                found = Cohort(product_id=product.id, name=cohort, created_at=clock(), deleted_at=None)
                session.add(found)
                session.flush()
            status = session.get(CohortStatus, found.id) or CohortStatus(cohort_id=found.id, base=None)
            status.directive = directive
            status.updated_at = clock()
            session.add(status)
        return directive

    return to


def rows(sessions, model):
    with sessions.read() as session:
        return list(session.scalars(select(model)))


def versions(sessions):
    return {(row.role, row.version) for row in rows(sessions, MetadataFile)}


def read_newest(sessions, role):
    with sessions.read() as session:
        return Metadata.from_bytes(repository.newest(session, role).body).signed


# --- publishing ------------------------------------------------------------------------------------------


def test_before_root_and_targets_there_is_nothing_to_publish(trusted, publish, config):
    assert publish() is False
    names = {entry.name for entry in (config.repository / "metadata").iterdir()}
    assert names == {"1.root.json"}


def test_what_did_not_change_is_not_signed_again(published, publish, sessions):
    assert publish() is True
    before = versions(sessions)
    assert publish() is False
    assert versions(sessions) == before


def test_a_directive_becomes_a_target_of_the_cohorts_role(published, publish, steer, sessions):
    publish()
    directive = steer("1.0")
    assert publish() is True
    signed = read_newest(sessions, "cohorts")
    entry = signed.targets[directive_path("demo", "eu")]
    assert (entry.length, entry.hashes, entry.custom) == (0, EMPTY, directive)
    assert signed.version == 2


def test_snapshot_and_timestamp_name_what_they_list_by_length_and_sha256(published, publish, sessions):
    publish()
    stored = {row.role: row for row in rows(sessions, MetadataFile)}
    snapshot = read_newest(sessions, "snapshot")
    assert set(snapshot.meta) == {"targets.json", "cohorts.json"}
    listed = {"targets": snapshot.meta["targets.json"], "cohorts": snapshot.meta["cohorts.json"]}
    listed["snapshot"] = read_newest(sessions, "timestamp").snapshot_meta
    for role, meta in listed.items():
        assert meta.length == len(stored[role].body)
        assert meta.hashes == {"sha256": sha256(stored[role].body).hexdigest()}


def test_the_timestamp_carries_the_signed_time(published, publish, sessions, clock):
    publish()
    assert read_newest(sessions, "timestamp").unrecognized_fields["x-signed-at"] == iso(clock())


@pytest.mark.parametrize(
    ("passed", "resigned"),
    [
        ({"hours": 5}, set()),
        ({"hours": 6}, {"timestamp"}),
        ({"days": 6}, {"timestamp"}),
        ({"days": 7}, {"timestamp", "snapshot", "cohorts"}),
    ],
    ids=["5 h", "6 h", "6 d", "7 d"],
)
def test_each_role_is_signed_again_at_its_time(published, publish, sessions, clock, passed, resigned):
    publish()
    before = versions(sessions)
    clock.step(**passed)
    publish()
    assert {role for role, _ in versions(sessions) - before} == resigned


def test_a_directive_that_does_not_fit_keeps_its_last_good_word(published, publish, steer, sessions):
    good = steer("1.0")
    publish()
    steer("6.6", revision=2)
    steer("1.0", cohort="us")
    publish()
    targets = read_newest(sessions, "cohorts").targets
    assert targets[directive_path("demo", "eu")].custom == good
    assert directive_path("demo", "us") in targets


def test_a_deleted_cohort_is_no_longer_listed(published, publish, steer, sessions, clock):
    steer("1.0")
    publish()
    with sessions.write() as session:
        session.scalars(select(Cohort)).one().deleted_at = clock()
    publish()
    assert read_newest(sessions, "cohorts").targets == {}


def test_online_keys_that_the_root_does_not_name_publish_nothing(
    published, sessions, online_signer, clock, config
):
    place = signer.key_path(config.keys, "timestamp")
    place.unlink()
    signer.make_keys(config.keys, clock())
    with pytest.raises(TrustError) as caught, sessions.write() as session:
        repository.publish(session, online_signer, clock())
    assert caught.value.reason == "online-key"
    assert {role for role, _ in versions(sessions)} == {"root", "targets"}


def test_signatures_of_a_tick_that_was_rolled_back_are_taken_up_and_leave_no_gap(
    published, publish, sessions, online_signer, clock, desk
):
    """The jobs process died between the signatures and its commit."""
    with sessions.write() as session:
        repository.publish(session, online_signer, clock())
        signed = {role: online_signer.last(role) for role in ONLINE_ROLES}
        session.rollback()
    online_signer.forget()
    clock.step(minutes=1)
    publish()
    stored = {row.role: row for row in rows(sessions, MetadataFile)}
    assert {role: stored[role].body for role in ONLINE_ROLES} == signed
    assert {held.version for held in desk.memory.signed.values()} == {1}


def test_a_database_from_a_backup_goes_on_above_what_was_signed_since(
    published, publish, steer, sessions, online_signer, clock
):
    publish()
    with sessions.write() as session:
        backup = [(row.role, row.version) for row in session.scalars(select(MetadataFile))]
    for revision in (1, 2, 3):
        steer("1.0", revision=revision)
        publish()
    with sessions.write() as session:
        for row in session.scalars(select(MetadataFile)):
            if (row.role, row.version) not in backup:
                session.delete(row)
    online_signer.forget()
    steer("1.0", revision=4)
    publish()
    assert read_newest(sessions, "cohorts").version == 5
    assert read_newest(sessions, "timestamp").version == 5


def test_a_signer_that_lost_its_memory_learns_it_from_what_its_keys_have_signed(
    published, publish, steer, sessions, online_signer, desk
):
    publish()
    steer("1.0")
    publish()
    desk.memory = Memory()
    online_signer.forget()
    steer("1.0", revision=2)
    publish()
    assert {role: held.version for role, held in desk.memory.signed.items()} == dict.fromkeys(ONLINE_ROLES, 3)


def test_after_a_clock_that_was_ahead_the_signed_time_stays_and_signing_goes_on(
    published, publish, steer, sessions, clock
):
    clock.step(days=2)
    publish()
    ahead = read_newest(sessions, "timestamp").unrecognized_fields["x-signed-at"]
    clock.step(days=-2)
    steer("1.0")
    publish()
    newest = read_newest(sessions, "timestamp")
    assert (newest.version, newest.unrecognized_fields["x-signed-at"]) == (2, ahead)


# --- files -----------------------------------------------------------------------------------------------


class Disk(FetcherInterface):
    """Lets the TUF client read the exported files as it would from a file server."""

    def __init__(self, directory):
        self.directory = directory

    def _fetch(self, url):
        place = self.directory / url.removeprefix("repo:///")
        if not place.exists():
            raise DownloadHTTPError("not found", 404)
        yield place.read_bytes()


@pytest.fixture
def tuf_client(tmp_path, config, clock):
    """A real TUF client that starts from root 1, at the test's time."""

    def make():
        cache = tmp_path / "client"
        cache.mkdir(exist_ok=True)
        client = Updater(
            str(cache),
            "repo:///metadata/",
            str(tmp_path),
            "repo:///targets/",
            Disk(config.repository),
            bootstrap=(config.repository / "metadata" / "1.root.json").read_bytes(),
        )
        client._trusted_set.reference_time = clock()
        return client

    return make


def test_a_tuf_client_finds_bundle_index_and_directive(published, publish, steer, tuf_client, tmp_path):
    directive = steer("1.0")
    publish()
    client = tuf_client()
    client.refresh()
    assert client.get_targetinfo(directive_path("demo", "eu")).custom == directive
    for path in (ONE, index_path("demo", "1.0", "any")):
        entry = client.get_targetinfo(path)
        got = Path(client.download_target(entry, str(tmp_path / "got")))
        assert sha256(got.read_bytes()).hexdigest() == entry.hashes["sha256"]


def test_a_tuf_client_follows_new_roots_and_releases(
    published, publish, trusted, blobs, sessions, online, clock, tuf_client
):
    publish()
    heir = CryptoSigner.generate_ed25519()
    following = ceremony.next_root(trusted.root(), clock(), keys={"targets": [heir.public_key]})
    root = trusted.signed(following, trusted.root_key)
    metadata = trusted.next_targets(published)
    trusted.release_keys = [heir]
    with sessions.write() as session:
        how = {"now": clock(), "actor": "ada", "online": online}
        acceptance.accept_ceremony(session, blobs, root.to_bytes(), trusted.sign(metadata), **how)
    publish()
    client = tuf_client()
    client.refresh()
    assert (client._trusted_set.root.version, client._trusted_set.targets.version) == (2, 2)
    assert client.get_targetinfo(ONE).custom["seq"] == 10


def test_targets_that_are_accepted_but_not_published_are_not_exported(
    published, publish, trusted, accept, config, sessions, blobs
):
    publish()
    accept(trusted.next_targets(published))
    repository.export(sessions, blobs, config.repository)
    assert not (config.repository / "metadata" / "2.targets.json").exists()
    publish()
    assert (config.repository / "metadata" / "2.targets.json").exists()


def test_a_crash_between_commit_and_export_heals(
    published, sessions, online_signer, clock, blobs, config, tuf_client
):
    with sessions.write() as session:
        assert repository.publish(session, online_signer, clock())
    # … here the process dies; the next one starts with an export although nothing is to be signed.
    with sessions.write() as session:
        assert not repository.publish(session, online_signer, clock())
    assert repository.export(sessions, blobs, config.repository) is True
    tuf_client().refresh()


@pytest.mark.parametrize("step", range(9))
def test_a_crash_within_the_export_never_shows_a_name_before_what_it_names(
    published, publish, trusted, blobs, accept, steer, config, tuf_client, monkeypatch, sessions, step
):
    """The process dies before its n-th rename; a client still gets a whole repository, the old or the new."""
    publish()
    metadata = trusted.next_targets(published)
    trusted.add(metadata, blobs, "1.1", 11)
    accept(metadata)
    steer("1.1")
    left = [step]
    rename = type(config.data).rename

    def dying(path, target):
        if config.signer_state in path.parents:
            return rename(path, target)  # another process, which lives on
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return rename(path, target)

    monkeypatch.setattr(type(config.data), "rename", dying)
    try:
        publish()
        died = False
    except KeyboardInterrupt:
        died = True
    monkeypatch.undo()
    assert died == (step < 6)  # two blobs, targets, cohorts, snapshot, timestamp
    timestamp = json.loads((config.repository / "metadata" / "timestamp.json").read_bytes())
    shown = timestamp["signed"]["version"]
    assert shown == (1 if died else 2)
    for version in range(1, shown + 1):
        assert (config.repository / "metadata" / f"{version}.snapshot.json").exists()
    repository.export(sessions, blobs, config.repository)
    timestamp = json.loads((config.repository / "metadata" / "timestamp.json").read_bytes())
    assert timestamp["signed"]["version"] == 2


def test_an_older_export_never_puts_an_older_timestamp_back(
    published, publish, steer, sessions, blobs, config
):
    publish()
    steer("1.0")
    publish()
    newest = (config.repository / "metadata" / "timestamp.json").read_bytes()
    assert repository.export(sessions, blobs, config.repository) is False
    assert (config.repository / "metadata" / "timestamp.json").read_bytes() == newest


def test_a_lost_repository_directory_is_made_again_from_the_database(
    published, publish, sessions, blobs, config, tuf_client
):
    publish()
    shutil.rmtree(config.repository)
    repository.restore_bundles(sessions, blobs, config.repository)
    assert repository.export(sessions, blobs, config.repository) is True
    client = tuf_client()
    client.refresh()
    assert client.get_targetinfo(ONE) is not None


def test_the_export_leaves_no_temporary_files(published, publish, config):
    publish()
    hidden = [place.name for place in config.repository.rglob(".*")]
    assert hidden == [".lock"]
