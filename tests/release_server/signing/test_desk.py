"""Keys, memory, log and policy together, in this process; a kill is an error at each step of the disk."""

from __future__ import annotations

import contextlib
import json
import os
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Timestamp

from agent_core.clock import iso
from agent_core.errors import ConflictError, MalformedError, TrustError
from keys import ceremony
from keys.roles import COHORTS, ROLES, ROOT, SNAPSHOT, TARGETS, TIMESTAMP
from release_server import signer
from release_server.signing import log
from release_server.signing.desk import SERIALIZER

ASKER = {"uid": 1, "pid": 2}
DISK = ("os.write", "os.fsync", "pathlib.Path.rename", "pathlib.Path.unlink")


@pytest.fixture
def shown(desk, managers, blobs):
    """A desk that has verified root 1 and targets 1 with demo 1.0."""
    show(desk, managers, blobs)
    return desk


def show(desk, managers, blobs):
    metadata = managers.targets()
    managers.add(metadata, blobs, "1.0", 10)
    desk.trust(ROOT, managers.root().to_bytes(), ASKER)
    desk.trust(TARGETS, managers.sign(metadata), ASKER)


def unsigned(desk, role, version=1):
    """What the jobs process would send next."""
    now = desk.clock()
    expires = ROLES[role].expiry(now)
    if role == COHORTS:
        metadata = Metadata(ceremony.Targets(version, expires=expires))
    elif role == SNAPSHOT:
        cohorts = desk.memory.signed[COHORTS].file
        metadata = Metadata(
            Snapshot(
                version,
                expires=expires,
                meta={"targets.json": desk.memory.targets_file, "cohorts.json": cohorts},
            )
        )
    else:
        snapshot = desk.memory.signed[SNAPSHOT].file if SNAPSHOT in desk.memory.signed else MetaFile(1)
        fields = {"x-signed-at": iso(now)}
        metadata = Metadata(
            Timestamp(version, expires=expires, snapshot_meta=snapshot, unrecognized_fields=fields)
        )
    return metadata.to_bytes(SERIALIZER)


def sign(desk, role, version=1):
    return desk.sign(role, unsigned(desk, role, version), ASKER)


def entries(config):
    return [
        json.loads(line)
        for segment in sorted((config.signer_state / "log").glob("*.jsonl"))
        for line in segment.read_bytes().splitlines()
    ]


def test_a_signature_is_that_of_the_role_and_the_log_says_who_asked(shown, config, managers):
    envelope = sign(shown, COHORTS)
    metadata = Metadata.from_bytes(envelope)
    managers.targets().signed.verify_delegate(COHORTS, metadata.signed_bytes, metadata.signatures)
    line = entries(config)[-1]
    assert (line["op"], line["role"], line["version"], line["answer"]) == ("sign", COHORTS, 1, "sign")
    assert (line["uid"], line["pid"]) == (1, 2)
    assert line["digest"] == sha256(metadata.signed_bytes).hexdigest()


def test_signatures_that_come_along_are_dropped(shown):
    asked = Metadata.from_bytes(unsigned(shown, COHORTS))
    asked.sign(signer.signers.CryptoSigner.generate_ed25519())
    envelope = shown.sign(COHORTS, asked.to_bytes(SERIALIZER), ASKER)
    assert set(Metadata.from_bytes(envelope).signatures) == {shown.memory.signed[COHORTS].keyid}


def test_a_refusal_is_logged_with_its_reason_and_signs_nothing(shown, config):
    sign(shown, COHORTS)
    with pytest.raises(TrustError) as caught:
        sign(shown, COHORTS, version=3)
    assert caught.value.reason == "version"
    line = entries(config)[-1]
    assert (line["answer"], line["reason"]) == ("refuse", "version")
    assert shown.memory.signed[COHORTS].version == 1


def test_bytes_that_are_no_metadata_are_refused_and_logged(shown, config):
    with pytest.raises(MalformedError):
        shown.sign(COHORTS, b"{}", ASKER)
    assert entries(config)[-1]["reason"] == "bad-metadata"


def test_the_same_question_gets_the_same_answer_and_no_version_is_left_out(shown, open_desk):
    asked = unsigned(shown, COHORTS)
    first = shown.sign(COHORTS, asked, ASKER)
    assert shown.sign(COHORTS, asked, ASKER) == first
    again = open_desk()
    assert again.sign(COHORTS, asked, ASKER) == first
    assert again.last(COHORTS) == first
    sign(again, COHORTS, version=2)


@pytest.mark.parametrize("call", DISK)
@pytest.mark.parametrize("step", range(3))
def test_a_kill_at_any_step_leaves_either_no_signature_or_this_one(
    shown, open_desk, clock, config, monkeypatch, call, step
):
    """Version 2 of three roles; the process dies, a new one opens, and the jobs process asks once more."""
    for role in (COHORTS, SNAPSHOT, TIMESTAMP):
        sign(shown, role)
    asked = unsigned(shown, TIMESTAMP, version=2)
    left = [step]

    def die(*given, **named):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        return real(*given, **named)

    module, _, name = call.rpartition(".")
    owner = os if module == "os" else Path
    real = getattr(owner, name)
    answered = None
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, die)
        with contextlib.suppress(KeyboardInterrupt):
            answered = shown.sign(TIMESTAMP, asked, ASKER)
    died = open_desk()
    counted = died.memory.signed[TIMESTAMP].version
    assert counted == 2 if answered else counted in (1, 2)
    before = died.last(TIMESTAMP)
    clock.step(seconds=1)
    envelope = died.sign(TIMESTAMP, asked, ASKER)
    assert envelope == before or counted == 1
    assert answered in (None, envelope)
    assert len(list((config.signer_state / "signed").iterdir())) == 3
    assert sign(died, TIMESTAMP, version=3)
    log.verify(config.signer_state / "log")


def test_a_log_without_its_envelope_is_refused(shown, open_desk, config):
    sign(shown, COHORTS)
    for envelope in (config.signer_state / "signed").iterdir():
        envelope.unlink()
    with pytest.raises(TrustError) as caught:
        open_desk()
    assert caught.value.reason == "log-broken"


# --- what others have signed -----------------------------------------------------------------------------


def test_memory_is_the_same_after_a_restart(shown, open_desk):
    for role in (COHORTS, SNAPSHOT, TIMESTAMP):
        sign(shown, role)
    before = shown.memory
    after = open_desk().memory
    assert (after.signed, after.entries, after.signed_at) == (before.signed, before.entries, before.signed_at)
    assert (after.root, after.targets, after.targets_file) == (
        before.root,
        before.targets,
        before.targets_file,
    )


def test_targets_that_the_release_keys_did_not_sign_count_for_nothing(shown, managers, blobs, config):
    metadata = managers.targets()
    metadata.signed.version = 2
    managers.add(metadata, blobs, "6.6", 66)
    managers.signed(metadata, managers.root_key)
    with pytest.raises(TrustError) as caught:
        shown.trust(TARGETS, metadata.to_bytes(), ASKER)
    assert caught.value.reason == "bad-signature"
    assert shown.memory.targets.version == 1
    assert entries(config)[-1]["reason"] == "bad-signature"


def test_another_first_root_does_not_take_the_place_of_the_one_that_is_trusted(shown, managers):
    thief = type(managers)(managers.online, managers.clock)
    shown.trust(ROOT, thief.root().to_bytes(), ASKER)  # version 1 again: nothing new
    assert set(shown.memory.root.roles[ROOT].keyids) == {managers.root_key.public_key.keyid}
    second = ceremony.next_root(thief.root(), managers.clock())
    thief.signed(second, thief.root_key)
    with pytest.raises(TrustError):
        shown.trust(ROOT, second.to_bytes(), ASKER)


def test_a_pinned_root_is_the_only_one_to_begin_with(open_desk, managers, tmp_path):
    pinned = managers.root().to_bytes()
    desk = open_desk(pinned=pinned)
    assert desk.memory.root.version == 1
    open_desk(pinned=pinned)
    thief = type(managers)(managers.online, managers.clock)
    with pytest.raises(ConflictError):
        open_desk(pinned=thief.root().to_bytes())


def test_what_the_same_key_signed_elsewhere_is_learned_and_never_forgotten(shown, online):
    key = signer.signers.load(signer.key_path(shown.keyring.directory, COHORTS))
    ahead = Metadata(ceremony.Targets(9, expires=ROLES[COHORTS].expiry(shown.clock())))
    ahead.sign(key)
    shown.trust(COHORTS, ahead.to_bytes(SERIALIZER), ASKER)
    with pytest.raises(TrustError):
        sign(shown, COHORTS, version=1)
    sign(shown, COHORTS, version=10)
    shown.trust(COHORTS, ahead.to_bytes(SERIALIZER), ASKER)
    assert shown.memory.signed[COHORTS].version == 10


def test_what_another_key_signed_is_not_learned(shown):
    ahead = Metadata(ceremony.Targets(2**31 - 1, expires=ROLES[COHORTS].expiry(shown.clock())))
    ahead.sign(signer.signers.CryptoSigner.generate_ed25519())
    with pytest.raises(TrustError) as caught:
        shown.trust(COHORTS, ahead.to_bytes(SERIALIZER), ASKER)
    assert caught.value.reason == "bad-signature"


# --- keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o640, 0o604])
def test_a_key_that_others_can_read_opens_nothing(open_desk, config, mode):
    signer.key_path(config.keys, TIMESTAMP).chmod(mode)
    with pytest.raises(TrustError) as caught:
        open_desk()
    assert caught.value.reason == "exposed"


def test_a_new_key_is_taken_up_without_a_restart_and_signs_once_people_name_it(
    shown, config, managers, clock
):
    sign(shown, COHORTS)
    place = signer.key_path(config.keys, SNAPSHOT)
    place.unlink()
    signer.make_keys(config.keys, clock())
    with pytest.raises(TrustError) as caught:
        sign(shown, SNAPSHOT)
    assert caught.value.reason == "online-key"
    online = signer.public_halves(config.keys)
    second = ceremony.next_root(managers.root(), clock(), keys={SNAPSHOT: [online.snapshot]})
    shown.trust(ROOT, managers.signed(second, managers.root_key).to_bytes(), ASKER)
    sign(shown, SNAPSHOT)


def test_a_key_that_waits_takes_the_place_of_one_that_people_took_away(shown, config, managers, clock):
    for role in (COHORTS, SNAPSHOT):
        sign(shown, role)
    signer.make_keys(config.keys, clock(), beside=signer.NEXT)
    fresh = signer.upcoming_halves(config.keys)
    assert shown.status()["upcoming"] == fresh.to_json()
    sign(shown, COHORTS, version=2)  # today's key goes on until then
    second = ceremony.next_root(managers.root(), clock(), keys={SNAPSHOT: [fresh.snapshot]})
    shown.trust(ROOT, managers.signed(second, managers.root_key).to_bytes(), ASKER)
    assert signer.public_halves(config.keys).snapshot == fresh.snapshot
    assert not signer.key_path(config.keys, f"{SNAPSHOT}{signer.NEXT}").exists()
    assert signer.key_path(config.keys, f"{COHORTS}{signer.NEXT}").exists()
    assert entries(config)[-1]["op"] == "promote"
    sign(shown, SNAPSHOT, version=1)
    assert shown.memory.signed[SNAPSHOT].keyid == fresh.snapshot.keyid


def test_a_timestamp_that_a_thief_made_without_a_time_is_learned_all_the_same(shown):
    key = signer.signers.load(signer.key_path(shown.keyring.directory, TIMESTAMP))
    forged = Metadata(Timestamp(5, expires=ROLES[TIMESTAMP].expiry(shown.clock()), snapshot_meta=MetaFile(1)))
    forged.sign(key)
    shown.trust(TIMESTAMP, forged.to_bytes(SERIALIZER), ASKER)
    assert shown.memory.signed[TIMESTAMP].version == 5


def test_the_clock_is_the_signers_own(shown, clock):
    for role in (COHORTS, SNAPSHOT):
        sign(shown, role)
    asked = unsigned(shown, TIMESTAMP)
    clock.now += timedelta(minutes=3)
    with pytest.raises(TrustError) as caught:
        shown.sign(TIMESTAMP, asked, ASKER)
    assert caught.value.reason == "time"
