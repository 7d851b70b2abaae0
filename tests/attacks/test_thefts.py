"""Each key stolen by itself, and used as well as it can be: the table of docs/security.md.

The thief stands on the wire as well: he may put any file in the place of any other.
"""

from __future__ import annotations

from copy import deepcopy
from datetime import timedelta
from hashlib import sha256

import pytest
from securesystemslib.signer import CryptoSigner

from agent_core.wire import bundle_path
from tests.attacks.victim import GOOD, NEW, OLD, PRODUCT, SEQ
from tests.repository_simulator import LIFE
from updater.decide import Action

DAY = timedelta(days=1)


def test_one_of_three_root_keys_names_no_release_key(make_victim):
    """Threshold 2 of 3. His own root names his own release key, which signs."""
    victim = make_victim(thresholds={"root": 2})
    server, honest = victim.server, list(victim.server.signers["root"])
    server.root.revoke_key(server.signers["targets"].pop().public_key.keyid, "targets")
    server.add_signer("targets", CryptoSigner.generate_ed25519())
    server.publish_root(signers=honest[:1])
    server.release("6.6.6", 666)
    server.lead_to("6.6.6")
    victim.refuses("bad-signature")
    victim.is_well_again()


def test_one_of_three_root_keys_does_not_lower_the_threshold(make_victim):
    victim = make_victim(thresholds={"root": 2})
    victim.server.root.roles["root"].threshold = 1
    victim.server.publish_root(signers=victim.server.signers["root"][:1])
    victim.refuses("bad-signature")
    victim.is_well_again()


def test_root_keys_at_the_threshold_come_too_late_after_the_ceremony(make_victim):
    """Threshold 2 of 2, both stolen, and people were first: a root without these keys is out."""
    victim = make_victim(thresholds={"root": 2})
    server, stolen = victim.server, list(victim.server.signers["root"])
    server.rotate("root")
    server.rotate("root")
    server.publish_root()
    assert victim.poll().reason == "up-to-date"
    victim.says_otherwise()
    server.add_signer("targets", CryptoSigner.generate_ed25519())
    server.publish_root(signers=stolen)
    victim.refuses("bad-signature")
    (server.directory / "metadata" / f"{server.root.version}.root.json").unlink()
    assert victim.poll().reason == "up-to-date"
    assert victim.state() == victim.before


def test_root_keys_at_the_threshold_are_everything_but_what_the_host_knows_by_itself(make_victim):
    """The thief was first: his root names his release key, and hosts follow. This is what is left to them."""
    victim = make_victim()
    server = victim.server
    server.root.revoke_key(server.signers["targets"].pop().public_key.keyid, "targets")
    server.add_signer("targets", CryptoSigner.generate_ed25519())
    server.publish_root()
    server.release("1.0.1", victim.before[0].floor - 1)  # a floor that was seen does not fall
    server.set_policy(0)
    server.lead_to("1.0.1")
    victim.refuses("below-floor")
    server.release("6.6.6", 666, platform="another")
    server.lead_to("6.6.6")
    victim.says_otherwise()
    victim.refuses("no-bundle")
    server.release("6.6.7", 667)  # and here is the end of it: no way but to install the hosts anew
    server.lead_to("6.6.7")
    outcome = victim.poll()
    assert (outcome.action, outcome.candidate) == (Action.INSTALL, victim.name_of("6.6.7"))


def test_one_of_two_release_keys_with_all_online_keys_beside_it(make_victim):
    """The worst case: published by the server's keys, with a floor that would lock people out."""
    victim = make_victim(thresholds={"targets": 2})
    victim.server.release("6.6.6", 666)
    victim.server.set_policy(floor_seq=666)
    victim.server.signers["targets"].pop(0)
    victim.server.lead_to("6.6.6")
    victim.refuses("bad-signature")
    assert victim.before[0].floor < 666
    victim.is_well_again()


def test_a_release_key_alone_is_nothing_that_snapshot_names(victim):
    """He signs what he likes, and nobody who has not the server's keys as well can have a host look at it."""
    server = victim.server
    server.lead_to(GOOD, revision=2)
    honest = deepcopy(server.targets)
    path = bundle_path(PRODUCT, GOOD, "any")
    server.targets.targets[path].hashes["sha256"] = sha256(b"his").hexdigest()
    server.forge(f"{honest.version}.targets.json", "targets")
    victim.refuses("digest-mismatch")
    server.targets.version += 1
    server.forge(f"{server.targets.version}.targets.json", "targets")
    server.targets = honest
    server.forge(f"{honest.version}.targets.json", "targets")
    assert victim.poll().reason == "up-to-date"
    assert victim.state() == victim.before
    victim.is_well_again()


def test_the_cohorts_key_alone_says_nothing_that_anybody_takes(victim):
    """Nobody asks for one that snapshot does not name, and in the place of the one it names he has others."""
    server = victim.server
    server.set_directive("stable", release=OLD, base=OLD, rollback=True)
    server.cohorts.version += 1
    forged = server.sign(server.cohorts, server.signers["cohorts"])
    server.write(f"{server.cohorts.version}.cohorts.json", forged)
    assert victim.poll().reason == "up-to-date"
    server.cohorts.version -= 1
    server.lead_to(GOOD, revision=2)
    server.write(f"{server.cohorts.version}.cohorts.json", forged)
    victim.refuses("digest-mismatch")
    victim.is_well_again()


def test_the_snapshot_key_alone_puts_nothing_together(victim):
    """A snapshot of his, in the place of the one that the timestamp names."""
    server = victim.server
    server.lead_to(GOOD, revision=2)
    named = deepcopy(server.snapshot)
    named.meta["targets.json"].version = 9
    server.write(f"{named.version}.snapshot.json", server.sign(named, server.signers["snapshot"]))
    victim.refuses("digest-mismatch")
    victim.is_well_again()


def test_the_timestamp_key_alone_names_no_older_snapshot(victim):
    server = victim.server
    server.lead_to(GOOD, revision=2)
    assert victim.poll().reason == "up-to-date"
    server.timestamp.snapshot_meta.version -= 1
    server.bump_timestamp()
    victim.refuses("replayed")
    victim.is_well_again()


def test_the_timestamp_key_alone_throws_no_host_past_what_others_signed(victim):
    """A signed time past the expiry of a role of others is no time: every host would refuse all there is."""
    victim.server.snapshot.expires = victim.server.now + 3 * DAY
    victim.server.publish()
    victim.server.bump_timestamp(victim.server.now + 10_000 * DAY)
    victim.refuses("expired")
    victim.is_well_again()


@pytest.mark.parametrize("ahead", [1, 6], ids=["a day", "a week, nearly"])
def test_the_timestamp_key_alone_costs_a_week_at_most(victim, ahead):
    """What he can do is said in docs/security.md; the host is well again with the server's next timestamp."""
    victim.server.bump_timestamp(victim.server.now + ahead * DAY)
    assert victim.poll().reason == "up-to-date"
    assert victim.state() == victim.before
    victim.server.now += ahead * DAY
    victim.is_well_again()


def test_the_snapshot_and_timestamp_keys_name_nothing_that_others_did_not_sign(victim):
    """Both together vouch for any file; what is in it still takes the key of its role."""
    server = victim.server
    server.signers["cohorts"] = [CryptoSigner.generate_ed25519()]
    server.lead_to(OLD, rollback=True)
    victim.refuses("bad-signature")
    victim.is_well_again()


def test_the_snapshot_and_timestamp_keys_hold_a_host_back_for_as_long_as_other_roles_hold(victim, wall):
    """Day after day he says that nothing is new, until what he has of the cohorts role has expired."""
    server, today = victim.server, victim.server.now
    for day in (6, 13, 15):
        server.now = today + day * DAY
        wall(day * DAY)
        server.snapshot.version += 1
        server.snapshot.expires = server.now + LIFE["snapshot"]
        server.write_snapshot()
        server.bump_timestamp()
        if day < LIFE["cohorts"] / DAY:
            assert victim.poll().reason == "up-to-date"
    victim.refuses("expired")
    server.cohorts.expires = server.now + LIFE["cohorts"]
    server.release(NEW, SEQ[NEW])
    server.lead_to(NEW)
    outcome = victim.poll()
    assert (outcome.reason, outcome.candidate) == ("update", victim.name_of(NEW))


def test_all_online_keys_make_no_code_run(victim):
    """He has directives, snapshot and timestamp, and signs a role of the releases by all three."""
    server = victim.server
    server.release("6.6.6", 666)
    server.signers["targets"] = [server.signers[role][0] for role in ("cohorts", "snapshot", "timestamp")]
    server.lead_to("6.6.6")
    victim.refuses("bad-signature")
    victim.is_well_again()


def test_all_online_keys_are_of_no_use_after_the_ceremony(victim):
    """What the stolen keys sign from then on is refused; the honest server's next word is taken."""
    server = victim.server
    stolen = {role: list(server.signers[role]) for role in ("snapshot", "timestamp")}
    for role in stolen:
        server.rotate(role)
    server.publish_root()
    server.lead_to(GOOD, revision=2)
    assert victim.poll().reason == "up-to-date"
    fresh = {role: list(server.signers[role]) for role in stolen}
    server.signers |= stolen
    server.lead_to(OLD, rollback=True, revision=3)
    victim.refuses("bad-signature")
    server.signers |= fresh
    server.release(NEW, SEQ[NEW])
    server.lead_to(NEW, revision=4)
    outcome = victim.poll()
    assert (outcome.reason, outcome.candidate) == ("update", victim.name_of(NEW))


@pytest.mark.parametrize("roles", [("timestamp",), ("snapshot", "timestamp")], ids=["one key", "both"])
def test_time_that_stolen_keys_ran_ahead_is_over_with_the_ceremony(victim, roles):
    """Two steps of a week each: timestamps that hold a day would be old to this host for two weeks."""
    server, today = victim.server, victim.server.now
    server.snapshot.expires = server.cohorts.expires = today + 60 * DAY
    server.publish()
    for week in (1, 2):
        server.bump_timestamp(today + 7 * week * DAY)
        assert victim.poll().reason == "up-to-date"
    server.bump_timestamp(today)
    victim.refuses("expired")
    for role in roles:
        server.rotate(role)
    server.publish_root()
    server.release(NEW, SEQ[NEW])
    server.timestamp.expires = today + DAY
    server.lead_to(NEW)
    outcome = victim.poll()
    assert (outcome.reason, outcome.candidate) == ("update", victim.name_of(NEW))
