"""What the server takes in of what people signed: every rule, and that what is refused leaves nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256

import pytest
from securesystemslib.signer import CryptoSigner
from sqlalchemy import select
from tuf.api.metadata import DelegatedRole, TargetFile

from agent_core.errors import ConflictError, MalformedError, TrustError, UsageError
from agent_core.wire import DeltaFacts, bundle_path, delta_path, index_path
from keys import ceremony
from release_server import acceptance, repository
from release_server.models import AuditEntry, Bundle, MetadataFile, Product, Release
from tests.release_server.conftest import target, upload

ONE = bundle_path("demo", "1.0", "any")
EMPTY = {"sha256": sha256(b"").hexdigest()}


@pytest.fixture
def published(trusted, blobs, accept):
    """Targets with demo 1.0, accepted."""
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0", 10)
    accept(metadata)
    return metadata


def rows(sessions, model):
    with sessions.read() as session:
        return list(session.scalars(select(model)))


def versions(sessions):
    return {(row.role, row.version) for row in rows(sessions, MetadataFile)}


# --- root ------------------------------------------------------------------------------------------------


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


def test_a_root_that_the_targets_could_not_follow_is_taken_with_others_or_not_at_all(
    published, trusted, accept_root, sessions, blobs, clock, online
):
    heir = CryptoSigner.generate_ed25519()
    root = ceremony.next_root(trusted.root(), clock(), keys={"targets": [heir.public_key]})
    ceremony.sign(root, [trusted.root_key])
    with pytest.raises(TrustError) as caught:
        accept_root(root)
    assert caught.value.reason == "unsigned-targets"

    def both(*signers):
        targets = trusted.next_targets(published)
        ceremony.sign(targets, signers)
        with sessions.write() as session:
            bodies = root.to_bytes(), targets.to_bytes()
            how = {"now": clock(), "actor": "ada", "online": online}
            return acceptance.accept_ceremony(session, blobs, *bodies, **how)

    with pytest.raises(TrustError):
        both(*trusted.release_keys)
    assert ("root", 2) not in versions(sessions)
    assert both(heir) == (2, 2)


def test_a_root_may_name_the_keys_that_wait_beside_todays(trusted, accept_root, clock, online):
    fresh = ceremony.OnlineKeys(*(CryptoSigner.generate_ed25519().public_key for _ in range(3)))
    keys = {"snapshot": [fresh.snapshot], "timestamp": [fresh.timestamp]}
    root = ceremony.next_root(trusted.root(), clock(), keys=keys)
    ceremony.sign(root, [trusted.root_key])
    with pytest.raises(TrustError) as caught:
        accept_root(root)
    assert caught.value.reason == "online-key"
    assert accept_root(root, replace(online, upcoming=fresh)) == 2


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
        acceptance.accept_root(session, body, now=clock(), actor="ada", online=online)


def test_targets_that_nobody_can_have_signed_are_refused_as_such(trusted, accept):
    """A fraction has no canonical form, so there are no bytes that a signature could be over."""
    body = json.loads(trusted.sign(trusted.targets()))
    body["signed"]["more"] = 0.5
    with pytest.raises(TrustError) as caught:
        accept(None, json.dumps(body).encode())
    assert caught.value.reason == "bad-metadata"


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


# --- deltas -----------------------------------------------------------------------------------------------


@pytest.fixture
def with_delta(published, trusted, blobs):
    """Targets with 1.1, and with a delta to it from 1.0, whose blob is not uploaded yet."""
    metadata = trusted.next_targets(published)
    after = trusted.add(metadata, blobs, "1.1", 11)
    before = metadata.signed.targets[ONE].custom["index"]["sha256"]
    path = delta_path("demo", "1.1", "any", before)
    facts = DeltaFacts("1.0", before, after.index_sha256)
    metadata.signed.targets[path] = target(path, b"delta", facts.to_json())
    return metadata


def test_a_delta_is_taken_in_when_it_was_uploaded(with_delta, accept, blobs):
    with pytest.raises(UsageError) as caught:
        accept(with_delta)
    assert (caught.value.reason, caught.value.what) == (
        "no-blob",
        "the delta of demo 1.1 for any from 1.0 was not uploaded",
    )
    upload(blobs, b"delta")
    assert accept(with_delta) == 2


def test_a_delta_of_another_length_is_refused(with_delta, accept, blobs):
    upload(blobs, b"delta")
    next(file for path, file in with_delta.signed.targets.items() if path.endswith(".delta")).length = 4
    with pytest.raises(TrustError) as caught:
        accept(with_delta)
    assert caught.value.reason == "length-mismatch"
