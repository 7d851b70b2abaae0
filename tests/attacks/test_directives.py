"""A thief of all online keys steers: row 32 of docs/cases.md. He chooses among what people signed."""

from __future__ import annotations

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Delegations, Targets

from agent_core import slots, wire
from agent_core.bundle import host_platforms
from tests.attacks.victim import COHORT, GOOD, NEW, OLD, PRODUCT, SEQ, bundle

FOREIGN = "linux-s390x" if "linux-s390x" not in host_platforms() else "linux-riscv64"
BELOW_THE_FLOOR = 1


def in_his_own_role(victim, version, seq):
    """A bundle of his making, listed with its facts in the role that his key signs."""
    server = victim.server
    server.release(version, seq)
    listed = server.targets.targets
    for path in [path for path in listed if f"/{version}/" in path]:
        server.cohorts.targets[path] = listed.pop(path)


def test_a_file_that_he_lists_in_his_own_role_is_nothing_that_may_run(victim):
    in_his_own_role(victim, "6.6.6", 666)
    victim.server.lead_to("6.6.6")
    victim.refuses("no-bundle")
    assert not any("bundles/" in path and "6.6.6" in path for path in victim.between.paths())
    victim.is_well_again()


def test_a_version_that_people_signed_is_not_his_to_fill(victim):
    """The path of a real release, listed again in his role with other bytes: his are never fetched."""
    server = victim.server
    server.release(NEW, SEQ[NEW])
    server.publish()
    path = wire.bundle_path(PRODUCT, NEW, "any")
    server.add_target(path, b"his bytes", server.targets.targets[path].custom, server.cohorts)
    server.archive_file(NEW).write_bytes(b"his bytes")
    server.lead_to(NEW)
    victim.refuses("length-mismatch")
    victim.is_well_again()


@pytest.mark.parametrize("progress", [10_000, 0], ids=["by release", "by base"])
def test_a_release_below_the_floor(victim, progress):
    victim.server.release("0.1.0", BELOW_THE_FLOOR)
    victim.server.lead_to("0.1.0", rollback=True, progress=progress)
    victim.refuses("below-floor")
    victim.is_well_again()


def test_a_policy_of_his_own_lowers_no_floor(victim):
    victim.server.release("0.1.0", BELOW_THE_FLOOR)
    path = wire.policy_path(PRODUCT)
    victim.server.add_target(path, b"", wire.Policy(0, ()).to_json(), victim.server.cohorts)
    victim.server.lead_to("0.1.0", rollback=True)
    victim.refuses("below-floor")
    victim.is_well_again()


def test_a_floor_that_this_host_has_seen_holds_when_the_policy_that_said_it_is_gone(victim):
    """A careless release manager drops the policy; the thief uses the same day."""
    victim.server.release("0.1.0", BELOW_THE_FLOOR)
    del victim.server.targets.targets[wire.policy_path(PRODUCT)]
    victim.server.lead_to("0.1.0", rollback=True)
    victim.refuses("below-floor")
    victim.is_well_again()


def test_a_revoked_release(victim):
    victim.server.release("1.0.1", 5)
    victim.server.set_policy(2, (5,))
    victim.server.lead_to("1.0.1")
    victim.refuses("revoked")
    victim.is_well_again()


def test_an_older_release_without_a_word(victim):
    victim.server.lead_to(OLD)
    victim.refuses("older")
    victim.is_well_again()


def test_a_release_of_another_platform(victim):
    victim.server.release("1.0.1", 5, FOREIGN)
    victim.server.lead_to("1.0.1")
    victim.refuses("no-bundle")
    victim.is_well_again()


def test_a_release_of_another_product(victim):
    """Signed by the same people, for other hosts: it does not stand where this host looks."""
    other = wire.bundle_path("other-agent", "7.0.0", "any")
    victim.server.add_target(other, b"other", {})
    victim.server.lead_to("7.0.0")
    victim.refuses("no-bundle")
    victim.is_well_again()


@pytest.mark.parametrize(
    "lie",
    [
        {"product": "other-agent"},
        {"cohort": "canary"},
        {"release": "../other-agent/7.0.0"},
        {"release": "1.0.1/any.tar.zst#"},
        {"progress": 10_001},
        {"schema": 99},
    ],
    ids=["another product", "another cohort", "a path", "a file", "too much progress", "a later schema"],
)
def test_a_directive_that_speaks_of_something_else_or_makes_no_sense(victim, lie):
    victim.server.lead_to(GOOD)
    said = victim.server.cohorts.targets[wire.directive_path(PRODUCT, COHORT)]
    said.unrecognized_fields["custom"].update(lie)
    victim.server.publish()
    victim.refuses("bad-directive")
    victim.is_well_again()


def test_a_release_without_the_gate_of_this_host(make_victim):
    victim = make_victim(gate="stable")
    victim.server.release("1.0.1", 5, gates=("canary",))
    victim.server.lead_to("1.0.1")
    victim.refuses("gate")
    victim.is_well_again()


def test_a_release_over_the_head_of_its_stepping_stone(victim):
    victim.server.release("2.0.0", 9, upgrade_from_seq=8)
    victim.server.lead_to("2.0.0")
    victim.refuses("stepping-stone")
    victim.is_well_again()


def test_a_release_that_this_host_has_no_launcher_for(victim):
    victim.server.release("2.0.0", 9, min_launcher=999)
    victim.server.lead_to("2.0.0")
    victim.refuses("old-launcher")
    victim.is_well_again()


# --- what release keys signed, carelessly or by another's hand ---------------------------------------------


@pytest.mark.parametrize("pattern", ["bundles/*/*/*", "*/*/*/*", "policy/*"])
def test_a_role_that_would_speak_for_releases(victim, pattern):
    """However it came to be signed: a host takes releases and policies of the release keys alone."""
    server = victim.server
    server.delegate("extra", ["harmless/*", pattern], CryptoSigner.generate_ed25519())
    server.extra["extra"] = Targets(version=1, expires=server.targets.expires)
    server.lead_to(GOOD)
    victim.refuses("bad-delegation")
    victim.is_well_again()


def test_a_cohorts_key_that_lets_another_speak(victim):
    key = CryptoSigner.generate_ed25519().public_key
    victim.server.cohorts.delegations = Delegations({key.keyid: key}, {})
    victim.server.lead_to(GOOD)
    victim.refuses("bad-delegation")
    victim.is_well_again()


@pytest.mark.parametrize(
    ("archive", "index", "reason"),
    [
        (bundle(NEW).archive, b"{}", "bad-index"),
        (bundle(NEW).archive, bundle(NEW).index.replace(b"1.1.0", b"1.0.9"), "bad-index"),
        (b"no archive", bundle("1.0.1").index, "bad-archive"),
        (bundle(NEW).archive, bundle("1.0.1").index, "digest-mismatch"),
    ],
    ids=["no index", "an index of another version", "no archive", "an archive of another index"],
)
def test_a_signed_bundle_that_is_none(victim, archive, index, reason):
    """The signature is right and says only whose it is: what is inside is read as if nobody had signed it."""
    sizes = {"unpacked": bundle("1.0.1").unpacked, "files": bundle("1.0.1").files}
    victim.server.add_release("1.0.1", 5, archive, index, **sizes)
    victim.server.lead_to("1.0.1")
    victim.refuses(reason)
    victim.is_well_again()


# --- and what he does get ----------------------------------------------------------------------------------


def test_what_a_thief_of_all_online_keys_does_get_is_a_choice_among_signed_releases(victim):
    """Said in docs/security.md, so it is tested as well: an older one above the floor, said aloud."""
    victim.server.lead_to(OLD, rollback=True)
    outcome = victim.poll()
    assert (outcome.reason, outcome.candidate) == ("go-back", victim.name_of(OLD))
    assert slots.is_complete(victim.layout.root, outcome.candidate)
