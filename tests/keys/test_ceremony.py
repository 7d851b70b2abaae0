"""What a ceremony makes, and what it refuses to make or to take."""

from datetime import UTC, datetime, timedelta

import pytest
from securesystemslib.signer import CryptoSigner, Signature, SSlibKey
from tuf.api.metadata import DelegatedRole, Metadata, Role, Snapshot, TargetFile

from agent_core.errors import ConflictError, MalformedError, TrustError, UsageError
from keys import ceremony
from keys.ceremony import OnlineKeys

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
make = CryptoSigner.generate_ed25519
ROOTS = [make() for _ in range(3)]
RELEASES = [make() for _ in range(2)]
ONLINE_SIGNERS = {name: make() for name in ("snapshot", "timestamp", "cohorts")}
ONLINE = OnlineKeys(**{name: signer.public_key for name, signer in ONLINE_SIGNERS.items()})


def public(signers):
    return [signer.public_key for signer in signers]


def first_root(**changes):
    how = {
        "root_keys": public(ROOTS),
        "release_keys": public(RELEASES),
        "online": ONLINE,
        "now": NOW,
        "root_threshold": 2,
    }
    return ceremony.make_root(**{**how, **changes})


def signed(metadata, *signers):
    ceremony.sign(metadata, signers)
    return metadata


def test_the_first_root_is_what_the_design_asks_for():
    root = first_root().signed
    assert root.version == 1
    assert root.consistent_snapshot
    assert root.expires == NOW + timedelta(days=365)
    assert {name: (len(role.keyids), role.threshold) for name, role in root.roles.items()} == {
        "root": (3, 2),
        "targets": (2, 1),
        "snapshot": (1, 1),
        "timestamp": (1, 1),
    }


def test_two_of_three_signatures_make_a_root_and_one_does_not():
    root = signed(first_root(), ROOTS[0])
    assert ceremony.missing_signatures(root.signed, "root", root) == 1
    with pytest.raises(TrustError) as caught:
        ceremony.verify_root(root)
    assert caught.value.reason == "bad-signature"
    with pytest.raises(TrustError):
        ceremony.export_trust(root)
    ceremony.verify_root(signed(root, ROOTS[2]))


def test_signing_again_replaces_ones_own_signature_and_keeps_the_others():
    root = signed(first_root(), ROOTS[0], ROOTS[1])
    before = {keyid: signature.to_dict() for keyid, signature in root.signatures.items()}
    root.signatures[ROOTS[0].public_key.keyid].signature = "00" * 64
    signed(root, ROOTS[0])
    assert {keyid: signature.to_dict() for keyid, signature in root.signatures.items()} == before


def test_a_signature_of_a_key_of_another_role_does_not_count():
    root = signed(first_root(), ROOTS[0], RELEASES[0])
    assert ceremony.missing_signatures(root.signed, "root", root) == 1


def test_one_key_under_two_ids_is_refused():
    key = ROOTS[0].public_key
    twin = SSlibKey("f" * 64, key.keytype, key.scheme, {"public": key.keyval["public"].upper()})
    with pytest.raises(TrustError) as caught:
        first_root(root_keys=[key, twin])
    assert caught.value.reason == "duplicate-key"
    root = first_root().signed
    root.keys[twin.keyid] = twin
    root.roles["root"] = Role([key.keyid, twin.keyid], 2)
    with pytest.raises(TrustError) as caught:
        ceremony.check_root(root)
    assert caught.value.reason == "duplicate-key"
    assert ceremony.duplicate_keys(root.keys) == [(key.keyid, twin.keyid)]


def test_one_key_under_two_ids_counts_once_even_in_a_root_that_lists_it_so():
    key = RELEASES[0]
    twin = SSlibKey("f" * 64, key.public_key.keytype, key.public_key.scheme, dict(key.public_key.keyval))
    root = first_root(release_keys=public([key]), targets_threshold=1).signed
    root.keys[twin.keyid] = twin
    root.roles["targets"] = Role([key.public_key.keyid, twin.keyid], 2)
    targets = signed(ceremony.make_targets(ONLINE.cohorts, NOW), key)
    signature = targets.signatures[key.public_key.keyid]
    targets.signatures[twin.keyid] = Signature(twin.keyid, signature.signature)
    assert root.get_verification_result("targets", targets.signed_bytes, targets.signatures).verified
    assert ceremony.missing_signatures(root, "targets", targets) == 1
    assert len(ceremony.signed_by(root, "targets", targets)) == 1


def test_one_key_listed_twice_for_a_role_is_refused():
    with pytest.raises(TrustError) as caught:
        first_root(root_keys=public([ROOTS[0], ROOTS[0]]))
    assert caught.value.reason == "duplicate-key"


@pytest.mark.parametrize("changes", [{"root_threshold": 4}, {"root_threshold": 0}, {"targets_threshold": 3}])
def test_a_threshold_that_cannot_be_met_is_refused(changes):
    with pytest.raises(UsageError) as caught:
        first_root(**changes)
    assert caught.value.reason == "bad-threshold"


def test_a_root_whose_keys_are_missing_can_never_be_signed_and_is_refused():
    root = first_root().signed
    del root.keys[RELEASES[0].public_key.keyid]
    root.roles["targets"] = Role([RELEASES[0].public_key.keyid], 1)
    with pytest.raises(TrustError) as caught:
        ceremony.check_root(root)
    assert caught.value.reason == "bad-threshold"


def test_a_key_of_the_server_may_not_sign_for_people():
    with pytest.raises(TrustError) as caught:
        first_root(release_keys=[ONLINE.snapshot])
    assert caught.value.reason == "shared-key"


def test_a_root_without_consistent_snapshots_is_refused():
    root = first_root().signed
    root.consistent_snapshot = False
    with pytest.raises(TrustError) as caught:
        ceremony.check_root(root)
    assert caught.value.reason == "no-consistent-snapshot"


# --- the next root ---


def test_the_next_root_needs_the_old_keys_and_the_new():
    one = signed(first_root(), *ROOTS[:2])
    new = [make(), make()]
    two = ceremony.next_root(one, NOW + timedelta(days=300), keys={"root": public(new)})
    assert (two.signed.version, two.signed.expires) == (2, NOW + timedelta(days=665))
    assert two.signed.roles["targets"] == one.signed.roles["targets"]
    signed(two, *new)
    with pytest.raises(TrustError):
        ceremony.verify_root(two, one)
    ceremony.verify_root(signed(two, *ROOTS[1:]), one)


def test_a_revoked_release_key_is_gone_from_the_next_root():
    one = signed(first_root(), *ROOTS[:2])
    two = ceremony.next_root(one, NOW, keys={"targets": public(RELEASES[:1])})
    assert RELEASES[1].public_key.keyid not in two.signed.keys
    with pytest.raises(UsageError):
        ceremony.next_root(two, NOW, thresholds={"targets": 2})


def test_a_root_that_skips_a_version_is_refused():
    one = signed(first_root(), *ROOTS[:2])
    three = signed(ceremony.next_root(ceremony.next_root(one, NOW), NOW), *ROOTS[:2])
    with pytest.raises(ConflictError):
        ceremony.verify_root(three, one)


# --- the first targets ---


def test_the_first_targets_delegate_directives_and_nothing_else():
    targets = ceremony.make_targets(ONLINE.cohorts, NOW).signed
    assert (targets.version, targets.targets, targets.expires) == (1, {}, NOW + timedelta(days=60))
    role = targets.delegations.roles["cohorts"]
    assert (role.paths, role.terminating, role.threshold) == (["cohorts/*/*"], True, 1)
    assert role.is_delegated_path("cohorts/warehouse-agent/eu.json")
    assert not role.is_delegated_path("bundles/warehouse-agent/1.0.0/any.tar.zst")
    ceremony.check_targets(targets, first_root().signed)


def _widen(targets):
    targets.delegations.roles["cohorts"].paths = ["*/*/*"]


def _second_role(targets):
    keyid = ONLINE.cohorts.keyid
    targets.delegations.roles["mine"] = DelegatedRole(
        "mine", [keyid], 1, terminating=False, paths=["bundles/*/*/*"]
    )


def _not_terminating(targets):
    targets.delegations.roles["cohorts"].terminating = False


def _by_hash(targets):
    role = targets.delegations.roles["cohorts"]
    role.paths, role.path_hash_prefixes = None, ["0"]


def _offline_key(targets):
    key = RELEASES[0].public_key
    twin = SSlibKey("e" * 64, key.keytype, key.scheme, dict(key.keyval))
    targets.delegations.keys = {twin.keyid: twin}
    targets.delegations.roles["cohorts"].keyids = [twin.keyid]


def _no_key(targets):
    targets.delegations.keys = {}


def _twins(targets):
    key = ONLINE.cohorts
    targets.delegations.keys["d" * 64] = SSlibKey("d" * 64, key.keytype, key.scheme, dict(key.keyval))


def _no_delegation(targets):
    targets.delegations = None


def _outside(targets):
    targets.targets["cohorts/p/c.json"] = TargetFile(0, {"sha256": "0" * 64}, "cohorts/p/c.json")


@pytest.mark.parametrize(
    "spoil",
    [
        _widen,
        _second_role,
        _not_terminating,
        _by_hash,
        _offline_key,
        _no_key,
        _twins,
        _no_delegation,
        _outside,
    ],
)
def test_targets_that_let_anybody_else_say_what_may_run_are_refused(spoil):
    targets = ceremony.make_targets(ONLINE.cohorts, NOW).signed
    spoil(targets)
    with pytest.raises(TrustError) as caught:
        ceremony.check_targets(targets, first_root().signed)
    assert caught.value.reason == "bad-delegation"


# --- bytes ---


def test_the_trust_file_is_the_signed_root():
    root = signed(first_root(), *ROOTS[:2])
    again = ceremony.parse_root(ceremony.export_trust(root))
    assert again == root
    ceremony.verify_root(again)


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b'{"signed": {"_type": "root"}, "signatures": []}', b"[" * 2000],
    ids=["empty", "object", "hollow", "deep"],
)
def test_bytes_that_are_no_metadata_are_refused(body):
    with pytest.raises(TrustError) as caught:
        ceremony.parse_root(body)
    assert caught.value.reason == "bad-metadata"


def test_metadata_of_another_role_is_refused():
    body = Metadata(Snapshot(expires=NOW)).to_bytes()
    for parse in (ceremony.parse_root, ceremony.parse_targets):
        with pytest.raises(TrustError, match="metadata"):
            parse(body)


def test_a_signer_that_fails_is_a_refusal():
    class Broken(CryptoSigner):
        def sign(self, payload):
            raise OSError("token was pulled out")

    with pytest.raises(TrustError) as caught:
        signed(first_root(), Broken(ROOTS[0]._private_key))
    assert "pulled out" in caught.value.why
    assert caught.value.reason == "no-signature"


def test_online_keys_survive_the_wire_and_their_ids_are_computed():
    wire = ONLINE.to_json()
    assert OnlineKeys.from_json(wire) == ONLINE
    wire["snapshot"]["keyid"] = "0" * 64
    assert OnlineKeys.from_json(wire) == ONLINE
    del wire["cohorts"]
    with pytest.raises(MalformedError, match=r"online\.cohorts"):
        OnlineKeys.from_json(wire)
