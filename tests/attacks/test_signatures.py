"""Signatures that are not what they must be: row 33 of docs/cases.md."""

from __future__ import annotations

from securesystemslib.signer import CryptoSigner

TWO_PEOPLE = {"targets": 2, "root": 2}


def test_one_of_two_signatures(make_victim):
    victim = make_victim(thresholds=TWO_PEOPLE)
    victim.server.release("6.6.6", 666)
    victim.server.signers["targets"].pop()
    victim.server.lead_to("6.6.6")
    victim.refuses("bad-signature")
    victim.is_well_again()


def test_one_signature_twice(make_victim):
    victim = make_victim(thresholds=TWO_PEOPLE)
    victim.server.release("6.6.6", 666)
    signer = victim.server.signers["targets"][0]
    other_id = CryptoSigner(signer._private_key, victim.server.twin(signer.public_key))
    victim.server.signers["targets"] = [signer, other_id]
    victim.server.lead_to("6.6.6")
    victim.refuses("bad-signature")
    victim.is_well_again()


def test_signatures_by_the_keys_of_other_roles(victim):
    """All online keys sign the targets: none of them counts there."""
    victim.server.release("6.6.6", 666)
    online = ("cohorts", "snapshot", "timestamp")
    victim.server.signers["targets"] = [victim.server.signers[role][0] for role in online]
    victim.server.lead_to("6.6.6")
    victim.refuses("bad-signature")
    victim.is_well_again()


def test_no_signature_at_all(victim):
    victim.server.lead_to("6.6.6")
    victim.server.unsign("timestamp.json")
    victim.refuses("bad-signature")
    victim.is_well_again()


def test_one_key_under_two_ids(make_victim):
    """The root of a careless ceremony, signed by everyone it takes: the second person would be the first."""
    victim = make_victim()
    server = victim.server
    signer = server.signers["targets"][0]
    twin = server.twin(signer.public_key)
    server.root.add_key(twin, "targets")
    server.root.roles["targets"].threshold = 2
    server.publish_root()
    server.signers["targets"] = [signer, CryptoSigner(signer._private_key, twin)]
    server.publish()
    victim.refuses("bad-metadata")
    victim.is_well_again()


def test_a_root_that_skips_a_version(victim):
    victim.server.root.version = 3
    victim.server.forge("2.root.json", "root")
    victim.refuses("replayed")
    victim.is_well_again()


def test_a_root_signed_by_its_new_keys_only(victim):
    victim.server.rotate("root")
    victim.server.publish_root(signers=victim.server.signers["root"])
    victim.refuses("bad-signature")
    victim.is_well_again()


def test_a_root_that_forgot_its_new_keys(victim):
    """Signed by the old ones only: whoever follows could never follow again."""
    old = list(victim.server.signers["root"])
    victim.server.rotate("root")
    victim.server.publish_root(signers=old)
    victim.refuses("bad-signature")
    victim.is_well_again()
