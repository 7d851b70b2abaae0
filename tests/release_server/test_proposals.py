"""What waits for signatures at the server: what it takes, how long it waits, and what ends it."""

from __future__ import annotations

from dataclasses import replace
from hashlib import sha256

import pytest
from securesystemslib.signer import CryptoSigner

from agent_core.errors import ConflictError, NotAllowedError, NotFoundError, TrustError
from keys import ceremony
from release_server import auth, proposals, repository
from release_server.models import AuditEntry

ADA, BO = auth.Person("ada", auth.Role.RELEASER, 1), auth.Person("bo", auth.Role.RELEASER, 2)


@pytest.fixture
def managers(managers, accept_root, accept):
    """Two release keys are needed; empty targets are published."""
    managers.threshold = 2
    accept_root(managers.root())
    managers.first = managers.targets()
    accept(managers.first)
    return managers


@pytest.fixture
def desk(sessions, blobs, clock, online):
    """The server's half, one transaction a call."""

    class Desk:
        def propose(self, metadata, person=ADA):
            with sessions.write() as session:
                return proposals.propose(
                    session, blobs, metadata.to_bytes(), now=clock(), person=person, online=online
                )

        def sign(self, number, metadata, key, person=BO):
            signature = key.sign(metadata.signed_bytes)
            body = {"keyid": signature.keyid, "sig": signature.signature}
            with sessions.write() as session:
                return proposals.add_signature(
                    session, blobs, number, body, now=clock(), person=person, online=online
                )

        def withdraw(self, number, person=BO):
            with sessions.write() as session:
                return proposals.withdraw(session, clock(), person, number, "a mistake")

        def listed(self, **how):
            with sessions.read() as session:
                return [
                    (view.row.id, view.state) for view in proposals.list_proposals(session, clock(), **how)
                ]

        def newest(self):
            with sessions.read() as session:
                return repository.newest_version(session, "targets")

    return Desk()


@pytest.fixture
def proposed(managers, blobs):
    """Targets with a release, signed by the first of two keys."""
    metadata = managers.next_targets(managers.first)
    managers.add(metadata, blobs, "1.0", 10)
    return managers.signed(metadata, managers.release_keys[0])


def test_one_signature_waits_and_the_second_publishes(desk, proposed, managers, sessions):
    view = desk.propose(proposed)
    assert (view.state, view.missing, list(view.signers.values())) == ("open", 1, ["ada"])
    assert [change.kind for change in view.summary] == ["added", "expiry"]
    assert desk.newest() == 1
    done = desk.sign(view.row.id, proposed, managers.release_keys[1])
    assert (done.state, done.row.closed_by) == ("published", "bo")
    assert sorted(done.signers.values()) == ["ada", "bo"]
    assert (desk.newest(), desk.listed()) == (2, [])
    with sessions.read() as session:
        actions = [entry.action for entry in session.query(AuditEntry).order_by(AuditEntry.id)]
    assert actions[-5:] == [
        "proposal.create",
        "proposal.sign",
        "product.create",
        "release.publish",
        "targets.accept",
    ]


def test_what_is_signed_by_enough_is_published_at_once(desk, proposed, managers):
    managers.signed(proposed, managers.release_keys[1])
    assert desk.propose(proposed).state == "published"
    assert desk.newest() == 2


def test_signatures_that_do_not_count_are_not_kept(desk, proposed, managers):
    stranger = CryptoSigner.generate_ed25519()
    managers.signed(proposed, stranger)
    view = desk.propose(proposed)
    assert stranger.public_key.keyid not in ceremony.parse_targets(view.row.body).signatures
    with pytest.raises(TrustError) as caught:
        desk.sign(view.row.id, proposed, stranger)
    assert caught.value.reason == "bad-signature"


def test_what_no_release_key_signed_is_not_kept(desk, proposed, managers):
    proposed.signatures.clear()
    with pytest.raises(TrustError) as caught:
        desk.propose(managers.signed(proposed, managers.root_key))
    assert caught.value.reason == "bad-signature"
    assert desk.listed(everything=True) == []


def test_a_signature_over_something_else_is_refused(desk, proposed, managers):
    view = desk.propose(proposed)
    other = managers.next_targets(managers.first)
    with pytest.raises(TrustError) as caught:
        desk.sign(view.row.id, other, managers.release_keys[1])
    assert caught.value.reason == "bad-signature"
    assert desk.listed() == [(view.row.id, "open")]


def test_one_key_signs_once_and_one_token_once(desk, proposed, managers):
    number = desk.propose(proposed).row.id
    with pytest.raises(ConflictError) as twice:
        desk.sign(number, proposed, managers.release_keys[0])
    assert twice.value.reason == "signed-already"
    with pytest.raises(NotAllowedError) as alone:
        desk.sign(number, proposed, managers.release_keys[1], person=ADA)
    assert alone.value.reason == "self-approval"
    with pytest.raises(NotAllowedError) as again:
        desk.sign(number, proposed, managers.release_keys[1], person=replace(ADA, token_id=9))
    assert again.value.reason == "self-approval"
    assert desk.newest() == 1


@pytest.mark.parametrize(
    ("second", "refused"),
    [("ada", True), ("ADA", True), ("ada/laptop", True), ("adam", False)],
)
def test_a_second_signature_is_of_a_second_person_whatever_token_brings_it(
    desk, proposed, managers, second, refused
):
    number = desk.propose(proposed).row.id
    person = replace(ADA, name=second, token_id=9)
    if not refused:
        assert desk.sign(number, proposed, managers.release_keys[1], person=person).state == "published"
        return
    with pytest.raises(NotAllowedError) as caught:
        desk.sign(number, proposed, managers.release_keys[1], person=person)
    assert caught.value.reason == "self-approval"


def test_the_same_is_proposed_once(desk, proposed):
    desk.propose(proposed)
    with pytest.raises(ConflictError) as caught:
        desk.propose(proposed)
    assert caught.value.reason == "proposed"


def test_a_proposal_waits_a_week(desk, proposed, managers, clock):
    number = desk.propose(proposed).row.id
    clock.step(days=7, seconds=-1)
    assert desk.listed() == [(number, "open")]
    clock.step(seconds=1)
    assert (desk.listed(), desk.listed(everything=True)) == ([], [(number, "expired")])
    with pytest.raises(ConflictError) as caught:
        desk.sign(number, proposed, managers.release_keys[1])
    assert caught.value.reason == "expired"


def test_of_two_proposals_the_second_is_outdated_when_the_first_is_published(
    desk, proposed, managers, clock, blobs
):
    first = desk.propose(proposed).row.id
    rival = managers.next_targets(managers.first)
    managers.add(rival, blobs, "2.0", 20)
    managers.signed(rival, managers.release_keys[1])
    second = desk.propose(rival, person=BO).row.id
    assert desk.listed() == [(second, "open"), (first, "open")]
    desk.sign(second, rival, managers.release_keys[0], person=ADA)
    assert desk.listed(everything=True) == [(second, "published"), (first, "outdated")]
    with pytest.raises(ConflictError) as caught:
        desk.sign(first, proposed, managers.release_keys[1])
    assert caught.value.reason == "old-base"


def test_a_withdrawn_proposal_is_over(desk, proposed, managers):
    number = desk.propose(proposed).row.id
    assert desk.withdraw(number).state == "withdrawn"
    with pytest.raises(ConflictError):
        desk.withdraw(number)
    with pytest.raises(ConflictError):
        desk.sign(number, proposed, managers.release_keys[1])
    with pytest.raises(NotFoundError):
        desk.withdraw(99)


def test_a_token_cannot_fill_the_database(desk, managers, monkeypatch):
    monkeypatch.setattr(proposals, "MOST_OPEN", 2)
    for days in range(3):
        metadata = managers.next_targets(managers.first)
        metadata.signed.expires = metadata.signed.expires.replace(hour=days)
        managers.signed(metadata, managers.release_keys[0])
        if days < 2:
            desk.propose(metadata)
    with pytest.raises(ConflictError):
        desk.propose(metadata)


def test_a_key_that_the_next_root_drops_counts_no_more(desk, proposed, managers, accept_root, clock):
    view = desk.propose(proposed)
    heir = CryptoSigner.generate_ed25519()
    keys = [heir.public_key, managers.release_keys[1].public_key]
    changed = {"keys": {"targets": keys}, "thresholds": {"targets": 1}}
    following = ceremony.next_root(managers.root(), clock(), **changed)
    accept_root(managers.signed(following, managers.root_key))
    with pytest.raises(TrustError):
        desk.sign(view.row.id, proposed, managers.release_keys[0])
    assert desk.sign(view.row.id, proposed, managers.release_keys[1]).state == "published"


# --- over HTTP ---


def test_what_is_proposed_is_fetched_by_people_and_by_nobody_else(
    desk, proposed, sign_in, managers, client, config
):
    number = desk.propose(proposed).row.id
    digest = next(target.hashes["sha256"] for target in proposed.signed.targets.values())
    releaser, reader = sign_in("releaser"), sign_in("reader")
    fetched = releaser("GET", f"/proposals/{number}/metadata")
    assert ceremony.parse_targets(fetched.data).signed == proposed.signed
    with releaser("GET", f"/proposals/{number}/blobs/{digest}") as answer:
        assert sha256(answer.data).hexdigest() == digest
    assert releaser("GET", f"/proposals/{number}/blobs/{'0' * 64}").status_code == 404
    assert reader("GET", f"/proposals/{number}").get_json()["missing"] == 1
    assert reader("GET", f"/proposals/{number}/blobs/{digest}").status_code == 403
    assert client.get(f"/api/v1/proposals/{number}/metadata").status_code == 401
    assert not list((config.repository / "targets").rglob(f"*{digest}*"))


@pytest.mark.parametrize(
    "body", [{}, {"keyid": "ab", "sig": "no hex"}, {"keyid": "ab", "sig": "ab", "more": 1}]
)
def test_a_signature_of_the_wrong_shape_is_refused(desk, proposed, sign_in, managers, body):
    number = desk.propose(proposed).row.id
    assert sign_in("releaser")("POST", f"/proposals/{number}/signatures", json=body).status_code == 422
