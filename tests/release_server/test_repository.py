from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner
from sqlalchemy import select
from tuf.api.exceptions import DownloadHTTPError
from tuf.api.metadata import DelegatedRole, Metadata, TargetFile
from tuf.ngclient import FetcherInterface, Updater

from agent_core.clock import iso
from agent_core.errors import ConflictError, MalformedError, TrustError, UsageError
from agent_core.wire import Directive, bundle_path, directive_path, index_path
from keys import ceremony
from release_server import repository
from release_server.models import (
    AuditEntry,
    Bundle,
    Cohort,
    CohortStatus,
    MetadataFile,
    Product,
    Release,
)

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


# --- root ------------------------------------------------------------------------------------------------


@pytest.fixture
def accept_root(sessions, clock, online):
    def send(metadata):
        with sessions.write() as session:
            return repository.accept_root(
                session, metadata.to_bytes(), now=clock(), actor="ada", online=online
            )

    return send


def test_the_first_root_is_trusted_and_noted(sessions, managers, accept_root):
    assert accept_root(managers.root()) == 1
    assert [entry.action for entry in rows(sessions, AuditEntry)] == ["trust.root"]


def test_the_next_root_is_signed_by_the_old_keys_and_the_new(trusted, clock, accept_root):
    heir = CryptoSigner.generate_ed25519()
    following = ceremony.next_root(trusted.root(), clock(), keys={"root": [heir.public_key]})
    for signers in ([heir], [trusted.root_key]):
        following.signatures.clear()
        ceremony.sign(following, signers)
        with pytest.raises(TrustError) as caught:
            accept_root(following)
        assert caught.value.reason == "bad-signature"
    following.signatures.clear()
    ceremony.sign(following, [heir, trusted.root_key])
    assert accept_root(following) == 2


@pytest.mark.parametrize("version", [1, 3])
def test_a_root_that_repeats_or_skips_a_version_is_refused(trusted, accept_root, version):
    metadata = trusted.root()
    metadata.signed.version = version
    with pytest.raises(ConflictError):
        accept_root(trusted.signed(metadata, trusted.root_key))


def test_a_first_root_that_is_not_version_1_is_refused(managers, accept_root):
    metadata = managers.root()
    metadata.signed.version = 2
    with pytest.raises(ConflictError):
        accept_root(managers.signed(metadata, managers.root_key))


def test_an_expired_root_is_refused(managers, accept_root, clock):
    metadata = managers.root()
    clock.step(days=366)
    with pytest.raises(TrustError) as caught:
        accept_root(metadata)
    assert caught.value.reason == "expired"


def test_a_root_with_another_servers_online_keys_is_refused(managers, accept_root):
    other = CryptoSigner.generate_ed25519().public_key
    managers.online = ceremony.OnlineKeys(other, managers.online.timestamp, managers.online.cohorts)
    with pytest.raises(TrustError) as caught:
        accept_root(managers.root())
    assert caught.value.reason == "online-key"


@pytest.mark.parametrize(
    "body", [b"", b"{}", b"[" * 100_000, b"\xff"], ids=["empty", "object", "deep", "bytes"]
)
def test_bytes_that_are_no_metadata_are_refused(trusted, accept, sessions, clock, online, body):
    with pytest.raises(TrustError) as caught:
        accept(None, body)
    assert caught.value.reason == "bad-metadata"
    with pytest.raises(TrustError), sessions.write() as session:
        repository.accept_root(session, body, now=clock(), actor="ada", online=online)


# --- accepting targets: every rule -----------------------------------------------------------------------


def test_accepted_targets_make_the_product_the_release_and_its_bundle(published, sessions):
    assert [product.name for product in rows(sessions, Product)] == ["demo"]
    release = rows(sessions, Release)[0]
    assert (release.version, release.seq, release.published_by) == ("1.0", 10, "ada")
    bundle = rows(sessions, Bundle)[0]
    assert bundle.sha256 == published.signed.targets[ONE].hashes["sha256"]
    assert bundle.facts["seq"] == 10
    actions = {entry.action for entry in rows(sessions, AuditEntry)}
    assert actions == {"trust.root", "product.create", "release.publish", "targets.accept"}


def test_the_bytes_are_kept_as_they_were_signed(trusted, accept, sessions):
    body = trusted.sign(trusted.targets())
    accept(None, body)
    with sessions.read() as session:
        assert repository.newest(session, "targets").body == body


def test_without_a_root_nothing_is_accepted(managers, accept):
    with pytest.raises(UsageError) as caught:
        accept(managers.targets())
    assert caught.value.reason == "no-root"


def test_a_key_that_is_no_release_key_signs_nothing(trusted, accept):
    stranger = CryptoSigner.generate_ed25519()
    for signer in (stranger, trusted.root_key):
        body = trusted.signed(trusted.targets(), signer).to_bytes()
        with pytest.raises(TrustError) as caught:
            accept(None, body)
        assert caught.value.reason == "bad-signature"


def test_one_of_two_signatures_is_not_enough(managers, accept_root, accept):
    managers.threshold = 2
    accept_root(managers.root())
    metadata = managers.targets()
    with pytest.raises(TrustError) as caught:
        accept(None, managers.signed(metadata, managers.release_keys[0]).to_bytes())
    assert caught.value.reason == "bad-signature"
    assert accept(metadata) == 1


def test_changed_bytes_are_refused(trusted, accept):
    signed = trusted.sign(trusted.targets())
    body = signed.replace(b'"version":1', b'"version":2')
    assert body != signed
    with pytest.raises(TrustError) as caught:
        accept(None, body)
    assert caught.value.reason == "bad-signature"


@pytest.mark.parametrize("version", [1, 3, 2**31])
def test_a_version_that_is_not_the_next_is_a_conflict(published, trusted, accept, version):
    metadata = trusted.next_targets(published)
    metadata.signed.version = version
    with pytest.raises(ConflictError):
        accept(metadata)


def test_of_two_publishers_at_once_the_second_is_told_of_the_conflict(published, trusted, blobs, accept):
    first, second = trusted.next_targets(published), trusted.next_targets(published)
    trusted.add(first, blobs, "1.1", 11)
    trusted.add(second, blobs, "1.2", 11)
    assert accept(first) == 2
    with pytest.raises(ConflictError):
        accept(second)


def test_expired_targets_are_refused(trusted, accept, clock):
    metadata = trusted.targets()
    clock.step(days=61)
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "expired"


def delegate_elsewhere(targets, role):
    other = CryptoSigner.generate_ed25519().public_key
    targets.delegations.keys = {other.keyid: other}
    role.keyids = [other.keyid]


def delegate_more(targets, role):
    targets.delegations.roles["extra"] = DelegatedRole(
        "extra", role.keyids, 1, terminating=False, paths=["bundles/*/*/*"]
    )


@pytest.mark.parametrize(
    "change",
    [
        delegate_elsewhere,
        delegate_more,
        lambda targets, role: setattr(targets, "delegations", None),
        lambda targets, role: setattr(role, "paths", ["bundles/*/*"]),
        lambda targets, role: setattr(role, "paths", ["cohorts/*/*", "policy/*"]),
        lambda targets, role: setattr(role, "paths", []),
        lambda targets, role: setattr(role, "terminating", False),
        lambda targets, role: setattr(role, "threshold", 2),
    ],
    ids=[
        "other key",
        "extra role",
        "none",
        "bundles",
        "policy too",
        "no paths",
        "not terminating",
        "threshold",
    ],
)
def test_targets_delegate_cohorts_to_this_servers_key_and_nothing_else(trusted, accept, change):
    metadata = trusted.targets()
    change(metadata.signed, metadata.signed.delegations.roles["cohorts"])
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "bad-delegation"


def test_a_published_bundle_never_changes_its_bytes(published, trusted, blobs, accept):
    metadata = trusted.next_targets(published)
    trusted.add(metadata, blobs, "1.0", 10, content=b"other bytes")
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "changed"


@pytest.mark.parametrize("path", [ONE, index_path("demo", "1.0", "any")])
def test_a_published_path_never_disappears(published, trusted, accept, path):
    metadata = trusted.next_targets(published)
    del metadata.signed.targets[ONE]
    if path != ONE:
        del metadata.signed.targets[path]
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason in ("removed", "bad-metadata")


@pytest.mark.parametrize("change", [{"seq": 11}, {"upgrade_from_seq": 3}, {"unpacked": 6}])
def test_published_facts_never_change(published, trusted, accept, change):
    metadata = trusted.next_targets(published)
    metadata.signed.targets[ONE].custom.update(change)
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "changed"


def test_gates_and_notes_of_a_published_release_may_change(published, trusted, accept, sessions):
    metadata = trusted.next_targets(published)
    metadata.signed.targets[ONE].custom.update(gates=["canary", "stable"], notes="now for all")
    assert accept(metadata) == 2
    assert rows(sessions, Bundle)[0].facts["gates"] == ["canary", "stable"]
    assert rows(sessions, Release)[0].notes == "now for all"


def test_facts_of_another_path_are_refused(trusted, blobs, accept):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    metadata.signed.targets[ONE].custom["version"] = "9.9"
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "wrong-path"


def test_facts_that_do_not_have_their_form_are_refused(trusted, blobs, accept):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    metadata.signed.targets[ONE].custom["seq"] = "ten"
    with pytest.raises(MalformedError) as caught:
        accept(metadata)
    assert f"{ONE}.seq" in caught.value.what


@pytest.mark.parametrize("missing", ["bundle", "index"])
def test_a_blob_that_was_not_uploaded_is_named(trusted, blobs, accept, missing):
    metadata = trusted.targets()
    facts = trusted.add(metadata, blobs, "1.0", 10)
    digest = facts.index_sha256 if missing == "index" else metadata.signed.targets[ONE].hashes["sha256"]
    blobs.path(digest).unlink()
    with pytest.raises(UsageError) as caught:
        accept(metadata)
    assert caught.value.reason == "no-blob"
    assert missing in caught.value.what


def test_a_length_that_is_not_the_blobs_is_refused(trusted, blobs, accept):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    metadata.signed.targets[ONE].length += 1
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "length-mismatch"


@pytest.mark.parametrize("change", ["digest", "length", "missing"])
def test_the_facts_name_the_index_that_is_listed(trusted, blobs, accept, change):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    index = metadata.signed.targets[index_path("demo", "1.0", "any")]
    if change == "digest":
        index.hashes["sha256"] = "0" * 64
    elif change == "length":
        index.length += 1
    else:
        del metadata.signed.targets[index.path]
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "bad-index"


def test_an_index_of_another_release_is_refused(trusted, blobs, accept):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    facts = trusted.add(metadata, blobs, "2.0", 20)
    custom = metadata.signed.targets[ONE].custom
    custom["index"] = {"sha256": facts.index_sha256, "length": facts.index_length}
    metadata.signed.targets[index_path("demo", "1.0", "any")] = TargetFile(
        facts.index_length, {"sha256": facts.index_sha256}, index_path("demo", "1.0", "any")
    )
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "bad-index"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("cohorts/demo/eu.json", "bad-delegation"),
        ("evil.tar.zst", "bad-delegation"),
        ("bundles/demo/1.0/any.zip", "bad-metadata"),
        ("bundles/demo/any.tar.zst", "bad-metadata"),
        ("deltas/demo/x", "bad-metadata"),
        ("policy/a/b.json", "bad-metadata"),
        ("bundles/demo/9.9/any.index.json", "bad-metadata"),
    ],
)
def test_top_level_targets_hold_bundles_and_policies_only(trusted, accept, path, reason):
    metadata = trusted.targets()
    metadata.signed.targets[path] = TargetFile(0, dict(EMPTY), path)
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == reason


def test_other_hashes_than_sha256_are_refused(trusted, blobs, accept):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    metadata.signed.targets[ONE].hashes["md5"] = "0" * 32
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "bad-metadata"


@pytest.mark.parametrize("seq", [9, 10])
def test_a_new_release_has_a_higher_seq_than_all_others(published, trusted, blobs, accept, seq, sessions):
    metadata = trusted.next_targets(published)
    trusted.add(metadata, blobs, "1.1", seq)
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "seq"
    assert ("targets", 2) not in versions(sessions)


def test_two_new_releases_cannot_share_a_seq(trusted, blobs, accept):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    trusted.add(metadata, blobs, "1.1", 10)
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "seq"


def test_products_count_their_seqs_apart(published, trusted, blobs, accept):
    metadata = trusted.next_targets(published)
    trusted.add(metadata, blobs, "0.1", 1, product="other")
    assert accept(metadata) == 2


def test_a_platform_may_follow_later_under_the_same_seq_only(published, trusted, blobs, accept, sessions):
    metadata = trusted.next_targets(published)
    trusted.add(metadata, blobs, "1.0", 11, platform="linux-x86_64")
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "seq"
    trusted.add(metadata, blobs, "1.0", 10, platform="linux-x86_64")
    assert accept(metadata) == 2
    assert {bundle.platform for bundle in rows(sessions, Bundle)} == {"any", "linux-x86_64"}


def test_a_policys_floor_only_rises_and_its_revocations_may_change(published, trusted, accept):
    metadata = trusted.next_targets(published)
    trusted.set_policy(metadata, floor_seq=5, revoked_seq=(7,))
    accept(metadata)
    lower = trusted.next_targets(metadata)
    trusted.set_policy(lower, floor_seq=4)
    with pytest.raises(TrustError) as caught:
        accept(lower)
    assert caught.value.reason == "below-floor"
    trusted.set_policy(lower, floor_seq=6)
    assert accept(lower) == 3


def test_a_policy_never_disappears(published, trusted, accept):
    metadata = trusted.next_targets(published)
    trusted.set_policy(metadata, floor_seq=5)
    accept(metadata)
    without = trusted.next_targets(metadata)
    del without.signed.targets["policy/demo.json"]
    with pytest.raises(TrustError) as caught:
        accept(without)
    assert caught.value.reason == "removed"


def test_a_policy_with_content_is_refused(published, trusted, accept):
    metadata = trusted.next_targets(published)
    trusted.set_policy(metadata, floor_seq=5)
    metadata.signed.targets["policy/demo.json"].length = 1
    with pytest.raises(TrustError) as caught:
        accept(metadata)
    assert caught.value.reason == "bad-metadata"


def test_refused_targets_leave_nothing_behind(trusted, blobs, accept, sessions):
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    trusted.add(metadata, blobs, "1.1", 9)
    metadata.signed.targets[bundle_path("demo", "1.1", "any")].custom["seq"] = 10
    with pytest.raises(TrustError):
        accept(metadata)
    assert rows(sessions, Product) == rows(sessions, Release) == []


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


def test_online_keys_that_the_root_does_not_name_publish_nothing(published, sessions, online_signer, clock):
    stranger = CryptoSigner.generate_ed25519()
    online_signer._signer_of = {**online_signer._signer_of, "timestamp": stranger}
    with pytest.raises(TrustError) as caught, sessions.write() as session:
        repository.publish(session, online_signer, clock())
    assert caught.value.reason == "online-key"
    assert {role for role, _ in versions(sessions)} == {"root", "targets"}


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
    published, publish, trusted, blobs, accept, accept_root, clock, tuf_client
):
    publish()
    heir = CryptoSigner.generate_ed25519()
    following = ceremony.next_root(trusted.root(), clock(), keys={"targets": [heir.public_key]})
    accept_root(trusted.signed(following, trusted.root_key))
    metadata = trusted.next_targets(published)
    trusted.add(metadata, blobs, "1.1", 11)
    trusted.release_keys = [heir]
    accept(metadata)
    publish()
    client = tuf_client()
    client.refresh()
    assert client.get_targetinfo(bundle_path("demo", "1.1", "any")).custom["seq"] == 11


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
