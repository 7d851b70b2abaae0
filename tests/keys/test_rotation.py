"""The next root: what it may change, who has to sign it, and what a holder refuses. Pure."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from securesystemslib.signer import CryptoSigner

from agent_core.errors import ConflictError, MalformedError, NotFoundError, TrustError, UsageError
from keys import ceremony, rotation
from keys.ceremony import OnlineKeys
from keys.rotation import Missing, NextRoot, Wanted

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
LATER = NOW + timedelta(days=300)
make = CryptoSigner.generate_ed25519
ROOTS, RELEASES = [make() for _ in range(3)], [make() for _ in range(2)]
HEIR = make()


def public(*signers):
    return [signer.public_key for signer in signers]


def online():
    return OnlineKeys(*public(make(), make(), make()))


def begin(root_threshold=2, targets_threshold=1):
    """Root 1 and targets 1, signed by everybody."""
    served = online()
    root = ceremony.make_root(
        root_keys=public(*ROOTS),
        release_keys=public(*RELEASES),
        online=served,
        now=NOW,
        root_threshold=root_threshold,
        targets_threshold=targets_threshold,
    )
    targets = ceremony.make_targets(served.cohorts, LATER)
    ceremony.sign(root, ROOTS)
    ceremony.sign(targets, RELEASES)
    return root, targets


def following(wanted=None, **how):
    root, targets = begin(**how)
    return rotation.make_next([root], targets, wanted or Wanted(), LATER)


def without(*signers):
    return frozenset(signer.public_key.keyid for signer in signers)


def kinds(made):
    return [(change.kind, change.what) for change in rotation.describe(made)]


def test_a_renewal_changes_the_expiry_alone_and_old_and_new_are_the_same_keys():
    made = following()
    assert kinds(made) == [("expiry", "root 2")]
    assert rotation.missing(made) == Missing(2, 2, 0)
    rotation.sign(made, ROOTS[:1])
    assert rotation.missing(made) == Missing(1, 1, 0)
    rotation.sign(made, ROOTS[1:2])
    assert rotation.missing(made).is_none
    ceremony.verify_root(made.root, made.current)


def test_a_key_that_goes_signs_for_the_old_root_and_one_that_comes_for_the_new():
    wanted = Wanted(add={"root": public(HEIR)}, remove=without(ROOTS[2]))
    made = following(wanted)
    assert kinds(made) == [("removed", "root key"), ("added", "root key"), ("expiry", "root 2")]
    rotation.sign(made, [ROOTS[2], HEIR])
    assert rotation.missing(made) == Missing(1, 1, 0)
    assert rotation.may_sign(made) == without(ROOTS[0], ROOTS[1])
    rotation.sign(made, [ROOTS[0]])
    assert rotation.missing(made).is_none


def test_targets_come_along_when_their_keys_go_and_stay_when_enough_are_left():
    assert following(Wanted(remove=without(RELEASES[0]))).targets is None
    made = following(Wanted(add={"targets": public(HEIR)}, remove=without(*RELEASES)))
    assert made.targets.signed.version == 2
    assert rotation.missing(made) == Missing(2, 2, 1)
    rotation.sign(made, [*ROOTS, HEIR])
    assert rotation.missing(made).is_none


def test_a_raised_release_threshold_asks_for_its_signatures_at_once():
    made = following(Wanted(add={"targets": public(HEIR)}, thresholds={"targets": 3}))
    assert ("threshold", "release") in kinds(made)
    rotation.sign(made, [*ROOTS, *RELEASES])
    assert rotation.missing(made) == Missing(0, 0, 1)
    assert rotation.may_sign(made) == without(HEIR)


def test_moved_online_keys_are_named_in_root_and_targets():
    fresh = online()
    made = following(Wanted(online=fresh))
    assert [made.root.signed.roles[role].keyids for role in ("snapshot", "timestamp")] == [
        [fresh.snapshot.keyid],
        [fresh.timestamp.keyid],
    ]
    assert list(made.targets.signed.delegations.keys) == [fresh.cohorts.keyid]
    assert ("delegation", "cohorts") in kinds(made)


@pytest.mark.parametrize(
    ("wanted", "error"),
    [
        (Wanted(remove=without(make())), NotFoundError),
        (Wanted(add={"root": public(ROOTS[0])}), ConflictError),
        (Wanted(remove=without(*RELEASES)), UsageError),
        (Wanted(remove=without(*ROOTS[:2])), UsageError),
        (Wanted(thresholds={"root": 4}), UsageError),
        (Wanted(add={"targets": public(ROOTS[0], ROOTS[0])}), TrustError),
    ],
    ids=["stranger", "twice", "no release key", "too few roots", "threshold", "one key twice"],
)
def test_what_cannot_be_a_root_is_not_made(wanted, error):
    with pytest.raises(error):
        following(wanted)


def test_the_file_is_read_as_it_was_written_with_its_signatures():
    made = following(Wanted(add={"targets": public(HEIR)}, remove=without(*RELEASES)))
    rotation.sign(made, [ROOTS[0], HEIR])
    again = NextRoot.from_bytes(made.to_bytes())
    assert again == made
    assert rotation.missing(again) == Missing(1, 1, 0)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b"\xff", b"[" * 100_000, b'{"kind": "relfleet-next-root", "schema": 1, "chain": []}'],
    ids=["empty", "list", "object", "bytes", "deep", "no chain"],
)
def test_bytes_that_are_no_next_root_are_refused(body):
    with pytest.raises((MalformedError, TrustError)):
        NextRoot.from_bytes(body)


# --- what a holder checks ---


def test_a_holder_who_is_behind_follows_the_chain_from_the_root_of_his_own():
    first, targets = begin()
    second = rotation.make_next([first], targets, Wanted(add={"root": public(HEIR)}), LATER)
    rotation.sign(second, ROOTS)
    third = rotation.make_next([first, second.root], targets, Wanted(), LATER)
    for trusted in (first, second.root):
        rotation.check(third, trusted, LATER)
    gap = replace(third, chain=(first, third.root))
    with pytest.raises((ConflictError, TrustError)):
        rotation.check(gap, first, LATER)


def test_a_holder_refuses_a_chain_that_is_not_his():
    other, _ = begin()
    with pytest.raises(TrustError) as caught:
        rotation.check(following(), other, LATER)
    assert caught.value.reason == "other-root"


def test_a_holder_refuses_targets_that_change_more_than_keys():
    made = following(Wanted(add={"targets": public(HEIR)}, remove=without(*RELEASES)))
    made.targets.signed.version += 1
    with pytest.raises(ConflictError):
        rotation.check(made, made.chain[0], LATER)


def test_a_holder_refuses_a_root_under_which_nobody_could_verify_the_targets():
    made = replace(following(Wanted(add={"targets": public(HEIR)}, remove=without(*RELEASES))), targets=None)
    with pytest.raises(TrustError) as caught:
        rotation.check(made, made.chain[0], LATER)
    assert caught.value.reason == "bad-signature"


def test_a_false_signature_under_somebody_s_id_does_not_keep_him_from_signing():
    made = following()
    rotation.sign(made, [ROOTS[0]])
    keyid = ROOTS[0].public_key.keyid
    made.root.signatures[keyid].signature = "00" * 64
    assert keyid in rotation.may_sign(made)
    rotation.sign(made, [ROOTS[0]])
    assert keyid not in rotation.may_sign(made)
