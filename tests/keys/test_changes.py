"""What the next targets may change, and what a person is told of it: pure, no key and no file."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import TargetFile, Targets

from agent_core.errors import ConflictError, TrustError
from agent_core.wire import Policy, ReleaseFacts, bundle_path, index_path, policy_path
from keys import ceremony, changes

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


def digest(text: str) -> str:
    return sha256(text.encode()).hexdigest()


def listed(targets: Targets, version: str, seq: int, platform: str = "any", **facts: object) -> None:
    index = digest(f"index {version} {platform}")
    said = ReleaseFacts("demo", version, seq, platform, index, 100, 5, 1, **facts)
    for path, name, length, custom in (
        (bundle_path("demo", version, platform), f"{version} {platform}", 1000, {"custom": said.to_json()}),
        (index_path("demo", version, platform), f"index {version} {platform}", 100, {}),
    ):
        targets.targets[path] = TargetFile(length, {"sha256": digest(name)}, path, custom)


def with_policy(targets: Targets, **said: object) -> None:
    path = policy_path("demo")
    custom = {"custom": Policy(**said).to_json()}
    targets.targets[path] = TargetFile(0, {"sha256": changes.EMPTY}, path, custom)


@pytest.fixture
def before():
    metadata = ceremony.make_targets(CryptoSigner.generate_ed25519().public_key, NOW)
    listed(metadata.signed, "1.0", 10)
    with_policy(metadata.signed, floor_seq=10)
    return metadata


@pytest.fixture
def after(before):
    return ceremony.next_targets(before, NOW + timedelta(days=1)).signed


def check(before, after):
    return changes.check_successor(before.signed, after, NOW + timedelta(days=1))


def test_a_new_version_is_what_is_fresh(before, after):
    listed(after, "1.1", 11, notes="faster")
    assert [(entry.name, entry.path) for entry in check(before, after)] == [
        ("demo 1.1 for any", "bundles/demo/1.1/any.tar.zst")
    ]


@pytest.mark.parametrize(
    ("version", "reason"), [(1, "old-base"), (3, "version-jump"), (2**31, "version-jump")]
)
def test_versions_go_up_by_one(before, after, version, reason):
    after.version = version
    with pytest.raises(ConflictError) as caught:
        check(before, after)
    assert caught.value.reason == reason
    assert caught.value.then


@pytest.mark.parametrize(
    ("break_rule", "reason"),
    [
        (lambda t: t.targets.pop("policy/demo.json"), "removed"),
        (lambda t: with_policy(t, floor_seq=9), "below-floor"),
        (lambda t: setattr(t.targets["policy/demo.json"], "length", 1), "bad-metadata"),
        (lambda t: setattr(t.targets["bundles/demo/1.0/any.tar.zst"], "length", 1), "changed"),
        (lambda t: listed(t, "1.0", 11), "changed"),
        (lambda t: listed(t, "1.1", 10), "seq"),
        (lambda t: listed(t, "1.0", 11, "linux-x86_64"), "seq"),
        (lambda t: setattr(t, "expires", NOW), "expired"),
        (lambda t: setattr(t, "expires", NOW + timedelta(days=63)), "bad-metadata"),
    ],
    ids=["no policy", "floor", "content", "bytes", "facts", "seq", "platform seq", "expired", "too long"],
)
def test_what_the_rules_forbid(before, after, break_rule, reason):
    break_rule(after)
    with pytest.raises(TrustError) as caught:
        check(before, after)
    assert caught.value.reason == reason


def test_a_person_is_told_everything_that_changes_allowed_or_not(before, after):
    listed(after, "1.1", 11, gates=("canary",), upgrade_from_seq=10, notes="faster")
    with_policy(after, floor_seq=11, revoked_seq=(10,))
    after.targets.pop("bundles/demo/1.0/any.tar.zst")
    after.targets["bundles/demo/1.0/any.index.json"].hashes["sha256"] = digest("other")
    role = after.delegations.roles["cohorts"]
    role.keyids, role.terminating = ["ab" * 32], False
    found = [(change.kind, change.what) for change in changes.changes(before.signed, after)]
    assert found == [
        ("changed", "bundles/demo/1.0/any.index.json"),
        ("removed", "bundles/demo/1.0/any.tar.zst"),
        ("added", "bundles/demo/1.1/any.tar.zst"),
        ("policy", "demo"),
        ("delegation", "cohorts"),
        ("expiry", "targets"),
    ]
    said = {change.kind: change for change in changes.changes(before.signed, after)}
    assert said["added"].after == (
        f"seq 11, 1000 bytes, sha256 {digest('1.1 any')[:12]}, gates canary, from seq 10 on, notes 'faster'"
    )
    assert said["delegation"].after == "cohorts/*/* to 1 of abababababab, not terminating"


def test_a_policy_is_told_by_versions_where_it_can_be(before, after):
    listed(after, "1.1", 11)
    with_policy(after, floor_seq=11, revoked_seq=(3,))
    policy = next(change for change in changes.changes(before.signed, after) if change.kind == "policy")
    assert policy.before == "floor 1.0 (seq 10); revoked: none"
    assert policy.after == "floor 1.1 (seq 11); revoked: seq 3"


def test_targets_that_are_only_held_anew_change_nothing_but_their_expiry(before, after):
    assert check(before, after) == []
    [only] = changes.changes(before.signed, after)
    assert (only.kind, only.before, only.after) == ("expiry", "2026-06-30T12:00:00Z", "2026-07-01T12:00:00Z")
