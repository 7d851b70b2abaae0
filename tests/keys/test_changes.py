"""What the next targets may change, and what a person is told of it: pure, no key and no file."""

from __future__ import annotations

from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, TargetFile, Targets

from agent_core.errors import ConflictError, TrustError
from agent_core.wire import Policy, ReleaseFacts, bundle_path, delta_path, index_path, policy_path
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


def with_delta(targets: Targets, version: str, before: str, *, length: int = 99, **said: str) -> str:
    """List a delta, with facts of it that are right unless said otherwise."""
    origin = digest(f"index {before} any")
    facts = {"from_version": before, "from_sha256": origin, "to_sha256": digest(f"index {version} any")}
    path = said.pop("path", delta_path("demo", version, "any", origin))
    custom = {"custom": {"schema": 1, **facts, **said}}
    targets.targets[path] = TargetFile(length, {"sha256": digest("delta")}, path, custom)
    return path


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
        (lambda t: with_policy(t, floor_seq=changes.STEP + 11), "seq"),
        (lambda t: with_policy(t, floor_seq=10, revoked_seq=(2**64,)), "seq"),
        (lambda t: listed(t, "1.1", 2**53), "seq"),
        (lambda t: listed(t, "1.0", 10, barrier=True), "changed"),
        (lambda t: (listed(t, "1.1", 11, barrier=True), listed(t, "1.2", 12)), "barrier"),
        (lambda t: setattr(t, "expires", NOW), "expired"),
        (lambda t: setattr(t, "expires", NOW + timedelta(days=63)), "bad-metadata"),
    ],
    ids=[
        *("no policy", "floor", "content", "bytes", "facts", "seq", "platform seq"),
        *(
            "far floor",
            "far revoked",
            "far seq",
            "a barrier afterwards",
            "past a barrier",
            "expired",
            "too long",
        ),
    ],
)
def test_what_the_rules_forbid(before, after, break_rule, reason):
    break_rule(after)
    with pytest.raises(TrustError) as caught:
        check(before, after)
    assert caught.value.reason == reason


def test_what_comes_after_a_barrier_says_that_hosts_have_passed_it(before, after):
    listed(after, "1.1", 11, barrier=True)
    listed(after, "1.2", 12, upgrade_from_seq=11)
    assert len(check(before, after)) == 2
    assert [changes.barrier_before(after.targets, "demo", seq) for seq in (11, 12)] == [0, 11]
    assert changes.barrier_before(after.targets, "other", 12) == 0
    told = {change.what: change.after for change in changes.changes(before.signed, after)}
    assert told["bundles/demo/1.1/any.tar.zst"].endswith(", barrier")


@pytest.mark.parametrize(
    ("rule", "barrier", "stones"),
    [
        ({"floor_seq": 10}, 12, {12}),
        ({"floor_seq": 12}, 12, {12}),
        ({"floor_seq": 13}, 0, {0, 11, 12}),
        ({"floor_seq": 10, "revoked_seq": (12,)}, 11, {11, 12}),
        ({"floor_seq": 10, "revoked_seq": (11, 12)}, 0, {0, 11, 12}),
    ],
    ids=["none", "floor at it", "floor above it", "revoked", "both revoked"],
)
def test_a_barrier_that_no_host_may_install_binds_nothing_that_is_signed_later(
    before, after, rule, barrier, stones
):
    """Hosts before it could go nowhere any more, and no release that rescues them could be signed."""
    listed(after, "1.1", 11, barrier=True)
    listed(after, "1.2", 12, barrier=True, upgrade_from_seq=11)
    with_policy(after, **rule)
    assert changes.barrier_before(after.targets, "demo", 13) == barrier
    for stone in (0, 11, 12):
        listed(after, "1.3", 13, upgrade_from_seq=stone)
        with nullcontext() if stone in stones else pytest.raises(TrustError, match="is a barrier"):
            check(before, after)


def test_a_revocation_of_a_barrier_stays_once_something_is_signed_past_it(before, after):
    listed(after, "1.1", 11, barrier=True)
    listed(after, "1.2", 12)
    with_policy(after, floor_seq=10, revoked_seq=(11,))
    check(before, after)
    following = ceremony.next_targets(Metadata(after), NOW + timedelta(days=2)).signed
    with_policy(following, floor_seq=10)
    with pytest.raises(TrustError) as caught:
        check(Metadata(after), following)
    assert (caught.value.reason, "keeps it revoked" in caught.value.then) == ("barrier", True)


def test_a_barrier_leaves_platforms_behind_that_it_has_no_bundle_for(after):
    listed(after, "1.0", 10, "linux-aarch64")
    listed(after, "1.0", 10, "linux-x86_64-gpu")
    listed(after, "1.1", 11, "linux-x86_64", barrier=True)
    listed(after, "1.2", 12, "linux-riscv64", upgrade_from_seq=11)
    assert changes.beside_barriers(after.targets, "demo") == {"1.1": ["any", "linux-aarch64"]}
    assert changes.beside_barriers(after.targets, "other") == {}
    listed(after, "1.1", 11, "linux-aarch64")
    assert changes.beside_barriers(after.targets, "demo") == {"1.1": ["any"]}
    listed(after, "1.1", 11)
    assert changes.beside_barriers(after.targets, "demo") == {}


def test_above_a_floor_that_was_raised_too_far_there_is_room_for_the_next_release(before, after):
    """As far as a thief gets in one step, and then people once more: what agents remember can be outrun."""
    with_policy(after, floor_seq=10 + changes.STEP)
    check(before, after)
    following = ceremony.next_targets(Metadata(after), NOW + timedelta(days=2)).signed
    listed(following, "1.1", 1 + changes.highest_seq(after.targets, "demo"))
    assert [entry.facts.seq for entry in check(Metadata(after), following)] == [11 + changes.STEP]


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


# --- deltas -----------------------------------------------------------------------------------------------


def test_a_delta_from_an_earlier_release_is_taken_and_told(before, after):
    listed(after, "1.1", 11)
    path = with_delta(after, "1.1", "1.0")
    assert [entry.facts.version for entry in check(before, after)] == ["1.1"]
    told = {change.what: change.after for change in changes.changes(before.signed, after)}
    assert told[path] == f"from 1.0, 99 bytes, sha256 {digest('delta')[:12]}"


@pytest.mark.parametrize(
    "said",
    [
        pytest.param({"to_sha256": "0" * 64}, id="to another index"),
        pytest.param({"from_sha256": digest("index 1.1 any")}, id="from another index than its path"),
        pytest.param({"from_version": "1.1"}, id="from another version than its index"),
        pytest.param({"before": "0.9"}, id="from a release that is not there"),
        pytest.param({"version": "1.2"}, id="to a release that is not there"),
        pytest.param({"version": "1.0", "before": "1.1"}, id="from a later release"),
        pytest.param({"version": "1.0"}, id="from a release to itself"),
        pytest.param({"length": 1000}, id="as long as the bundle"),
        pytest.param({"path": f"deltas/demo/1.1/any/{'0' * 64}.delta"}, id="at another digest's path"),
        pytest.param({"path": f"deltas/other/1.1/any/{digest('index 1.0 any')}.delta"}, id="of a product"),
        pytest.param({"path": f"deltas/demo/1.1/x/{digest('index 1.0 any')}.delta"}, id="of a platform"),
    ],
)
def test_a_delta_that_does_not_fit_its_facts_is_refused(before, after, said):
    listed(after, "1.1", 11)
    with_delta(after, **{"version": "1.1", "before": "1.0", **said})
    with pytest.raises(TrustError) as caught:
        check(before, after)
    assert caught.value.reason == "bad-delta"


@pytest.mark.parametrize("path", ["deltas/demo/1.1.delta", "deltas/demo/1.1/any/x/y.delta", "deltas/a.zst"])
def test_a_delta_has_one_place(before, after, path):
    listed(after, "1.1", 11)
    with_delta(after, "1.1", "1.0", path=path)
    with pytest.raises(TrustError) as caught:
        check(before, after)
    assert caught.value.reason == "bad-metadata"


def test_a_published_delta_stays_as_it_is(before, after):
    listed(before.signed, "1.1", 11)
    path = with_delta(before.signed, "1.1", "1.0")
    after = ceremony.next_targets(before, NOW + timedelta(days=1)).signed
    check(before, after)
    for spoil, reason in (
        (lambda files: files.pop(path), "removed"),
        (lambda files: setattr(files[path], "length", 98), "changed"),
        (lambda files: files[path].custom.update(note="other"), "changed"),
    ):
        after = ceremony.next_targets(before, NOW + timedelta(days=1)).signed
        spoil(after.targets)
        with pytest.raises(TrustError) as caught:
            check(before, after)
        assert caught.value.reason == reason
