"""What the signer signs and what it refuses, as a table and as properties; no key and no disk."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from hypothesis import given
from hypothesis import strategies as st
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Delegations, Metadata, MetaFile, Snapshot, TargetFile, Targets, Timestamp

from agent_core.clock import iso
from agent_core.wire import Directive, bundle_path, directive_path
from keys import ceremony
from keys.roles import COHORTS, ONLINE_ROLES, ROLES, SNAPSHOT, TIMESTAMP
from release_server.signing import policy
from release_server.signing.policy import Answer, Memory, Refusal, Signed, judge

NOW = datetime(2026, 5, 1, 12, tzinfo=UTC)
EMPTY = {"sha256": sha256(b"").hexdigest()}
KEYS = {role: CryptoSigner.generate_ed25519().public_key for role in (*ONLINE_ROLES, "root", "release")}
SECOND = timedelta(seconds=1)


def file(version, text):
    return MetaFile(version, len(text), {"sha256": sha256(text.encode()).hexdigest()})


def make_memory():
    """A signer that has verified targets 3 with demo 1.0, and signed version 7 of each role."""
    online = ceremony.OnlineKeys(**{role: KEYS[role] for role in ONLINE_ROLES})
    root = ceremony.make_root(
        root_keys=[KEYS["root"]], release_keys=[KEYS["release"]], online=online, now=NOW
    ).signed
    targets = ceremony.make_targets(KEYS[COHORTS], NOW).signed
    targets.version = 3
    place = bundle_path("demo", "1.0", "any")
    targets.targets[place] = TargetFile(1, {"sha256": "0" * 64}, place)
    signed = {role: Signed(7, KEYS[role].keyid, "0" * 64, file(7, role), NOW) for role in ONLINE_ROLES}
    entries = {"targets.json": 3, "cohorts.json": 7}
    return Memory(root, targets, file(3, "targets"), signed, entries, NOW - timedelta(minutes=1))


MEMORY = make_memory()


def directive(**changed):
    return Directive("demo", "eu", "1.0", "1.0", 10_000, "salt", 1).to_json() | changed


def listed(path="cohorts/demo/eu.json", custom=None, length=0, hashes=EMPTY, **fields):
    return {path: TargetFile(length, hashes, path, {"custom": custom or directive()} | fields)}


def cohorts(targets=None, version=8, expires=None, **fields):
    expires = expires or ROLES[COHORTS].expiry(NOW)
    return Targets(version, None, expires, listed() if targets is None else targets, **fields)


def snapshot(version=8, expires=None, fields=None, **meta):
    held = {"targets": file(3, "targets"), "cohorts": file(7, "cohorts")} | meta
    named = {f"{name}.json": entry for name, entry in held.items() if entry}
    return Snapshot(version, None, expires or ROLES[SNAPSHOT].expiry(NOW), named, fields)


def timestamp(version=8, expires=None, said=NOW, meta=None, fields=None):
    text = iso(said) if isinstance(said, datetime) else said
    unknown = ({} if text is None else {"x-signed-at": text}) | (fields or {})
    expires = expires or ROLES[TIMESTAMP].expiry(NOW)
    return Timestamp(version, None, expires, meta or file(7, "snapshot"), unknown)


def ask(signed, role=None, memory=MEMORY, now=NOW, keyid=None):
    role = role or {"targets": COHORTS}.get(signed.type, signed.type)
    return judge(memory, role, Metadata(signed), keyid or KEYS[role].keyid, now)


MAKE = {COHORTS: cohorts, SNAPSHOT: snapshot, TIMESTAMP: timestamp}
DELEGATED = {"delegations": Delegations({}, {})}


@pytest.mark.parametrize("role", ONLINE_ROLES)
def test_the_next_version_of_what_is_known_is_signed(role):
    assert ask(MAKE[role]()).answer is Answer.SIGN


REFUSED = {
    "a role's key signs no other role's metadata": (snapshot(), {"role": TIMESTAMP}, Refusal.WRONG_ROLE),
    "nothing before a root": (cohorts(), {"memory": Memory()}, Refusal.NO_ROOT),
    "nothing before targets": (
        cohorts(),
        {"memory": replace(MEMORY, targets=None, targets_file=None)},
        Refusal.NO_TARGETS,
    ),
    "a key that the root does not name": (snapshot(), {"keyid": "f" * 64}, Refusal.ONLINE_KEY),
    "a key that the targets do not name": (cohorts(), {"keyid": "f" * 64}, Refusal.ONLINE_KEY),
    "cohorts: a version twice": (cohorts(version=7), {}, Refusal.VERSION),
    "cohorts: a version left out": (cohorts(version=9), {}, Refusal.VERSION),
    "cohorts: versions run forward": (cohorts(version=2**31 - 1), {}, Refusal.VERSION),
    "snapshot: a lower version": (snapshot(version=6), {}, Refusal.VERSION),
    "timestamp: a version left out": (timestamp(version=9), {}, Refusal.VERSION),
    "cohorts hold too long": (
        cohorts(expires=ROLES[COHORTS].expiry(NOW) + timedelta(minutes=1)),
        {},
        Refusal.EXPIRY,
    ),
    "a snapshot for ever": (snapshot(expires=datetime(2099, 1, 1, tzinfo=UTC)), {}, Refusal.EXPIRY),
    "a timestamp for a week": (timestamp(expires=NOW + timedelta(days=7)), {}, Refusal.EXPIRY),
    "cohorts with another field": (
        cohorts(unrecognized_fields={"x-run": "this"}),
        {},
        Refusal.UNKNOWN_FIELD,
    ),
    "a snapshot with another field": (snapshot(fields={"x": 1}), {}, Refusal.UNKNOWN_FIELD),
    "a timestamp with another field": (timestamp(fields={"x": 1}), {}, Refusal.UNKNOWN_FIELD),
    "cohorts that delegate": (cohorts(**DELEGATED), {}, Refusal.DELEGATES),
    "cohorts that list a bundle": (cohorts(listed("bundles/demo/1.0/any.tar.zst")), {}, Refusal.PATH),
    "another cohort's word": (cohorts(listed("cohorts/demo/us.json")), {}, Refusal.PATH),
    "another product's word": (cohorts(listed("cohorts/other/eu.json")), {}, Refusal.PATH),
    "a directive with content": (cohorts(listed(length=1)), {}, Refusal.CONTENT),
    "a directive with another hash": (cohorts(listed(hashes={"sha256": "1" * 64})), {}, Refusal.CONTENT),
    "a directive with a field beside it": (cohorts(listed(extra=1)), {}, Refusal.UNKNOWN_FIELD),
    "a directive with a field of its own": (
        cohorts(listed(custom=directive(path="/etc"))),
        {},
        Refusal.UNKNOWN_FIELD,
    ),
    "a directive that does not fit": (
        cohorts(listed(custom=directive(progress=10_001))),
        {},
        Refusal.BAD_DIRECTIVE,
    ),
    "a release that nobody signed": (
        cohorts(listed(custom=directive(release="6.6"))),
        {},
        Refusal.UNKNOWN_RELEASE,
    ),
    "a base that nobody signed": (cohorts(listed(custom=directive(base="6.6"))), {}, Refusal.UNKNOWN_RELEASE),
    "a release of another product": (
        cohorts(listed("cohorts/other/eu.json", directive(product="other"))),
        {},
        Refusal.UNKNOWN_RELEASE,
    ),
    "a snapshot without targets": (snapshot(targets=None), {}, Refusal.DROPPED),
    "a snapshot without cohorts": (snapshot(cohorts=None), {}, Refusal.DROPPED),
    "a snapshot with older targets": (snapshot(targets=file(2, "targets")), {}, Refusal.LOWERED),
    "a snapshot with older cohorts": (snapshot(cohorts=file(6, "cohorts")), {}, Refusal.LOWERED),
    "a snapshot with one entry more": (snapshot(extra=file(1, "x")), {}, Refusal.NOT_VERIFIED),
    "a snapshot with targets nobody verified": (
        snapshot(targets=file(4, "targets")),
        {},
        Refusal.NOT_VERIFIED,
    ),
    "a snapshot with other bytes of targets": (snapshot(targets=file(3, "x")), {}, Refusal.NOT_VERIFIED),
    "a snapshot with cohorts of another": (snapshot(cohorts=file(8, "cohorts")), {}, Refusal.NOT_VERIFIED),
    "a timestamp of an older snapshot": (timestamp(meta=file(6, "snapshot")), {}, Refusal.NOT_VERIFIED),
    "a timestamp of another snapshot": (timestamp(meta=file(7, "x")), {}, Refusal.NOT_VERIFIED),
    "a timestamp without its time": (timestamp(said=None), {}, Refusal.TIME),
    "a timestamp with a time that is none": (timestamp(said="soon"), {}, Refusal.TIME),
    "a signed time that goes back": (timestamp(said=NOW - timedelta(seconds=61)), {}, Refusal.TIME),
    "a signed time ahead": (timestamp(said=NOW + timedelta(seconds=6)), {}, Refusal.TIME),
    "a signed time long ago": (
        timestamp(said=NOW - timedelta(minutes=3)),
        {"memory": replace(MEMORY, signed_at=None)},
        Refusal.TIME,
    ),
    "too many at once": (
        timestamp(),
        {
            "memory": replace(
                MEMORY,
                signed=dict(MEMORY.signed)
                | {TIMESTAMP: replace(MEMORY.signed[TIMESTAMP], due=NOW + policy.BURST * SECOND)},
            )
        },
        Refusal.RATE,
    ),
}


@pytest.mark.parametrize(("signed", "told", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(signed, told, reason):
    verdict = ask(signed, **told)
    assert (verdict.answer, verdict.reason) == (Answer.REFUSE, reason)
    assert verdict.why


def test_every_refusal_has_a_row():
    assert {reason for _, _, reason in REFUSED.values()} == set(Refusal)


@pytest.mark.parametrize("role", ONLINE_ROLES)
def test_the_same_bytes_again_are_answered_again_whatever_time_it_is(role):
    signed = MAKE[role](version=7)
    digest = sha256(Metadata(signed).signed_bytes).hexdigest()
    held = {**MEMORY.signed, role: replace(MEMORY.signed[role], digest=digest)}
    verdict = ask(signed, memory=replace(MEMORY, signed=held), now=NOW + timedelta(days=400))
    assert verdict.answer is Answer.REPEAT


def test_a_new_key_begins_where_it_is_told_but_not_at_the_end_of_the_world():
    before = replace(MEMORY.signed[SNAPSHOT], keyid="f" * 64, version=2**31 - 1)
    memory = replace(MEMORY, signed={**MEMORY.signed, SNAPSHOT: before})
    assert ask(snapshot(version=9), memory=memory).answer is Answer.SIGN
    assert ask(snapshot(version=2**30), memory=memory).reason == Refusal.VERSION


def test_a_new_snapshot_key_is_not_held_to_what_a_thief_listed_with_the_old_one():
    before = replace(MEMORY.signed[SNAPSHOT], keyid="f" * 64)
    far = {"targets.json": 3, "cohorts.json": 2**31, "evil.json": 1}
    held = replace(MEMORY, entries=far)
    assert ask(snapshot(), memory=held).reason == Refusal.DROPPED
    moved = replace(held, signed={**MEMORY.signed, SNAPSHOT: before})
    assert ask(snapshot(), memory=moved).answer is Answer.SIGN


def test_after_a_clock_that_was_ahead_the_last_signed_time_may_be_said_again():
    ahead = replace(MEMORY, signed_at=NOW + timedelta(days=3))
    assert ask(timestamp(said=NOW + timedelta(days=3)), memory=ahead).answer is Answer.SIGN
    assert ask(timestamp(said=NOW + timedelta(days=3, seconds=1)), memory=ahead).reason == Refusal.TIME
    assert ask(timestamp(said=NOW), memory=ahead).reason == Refusal.TIME


def test_a_full_rate_lets_one_through_each_second():
    held, now, signed = MEMORY.signed[TIMESTAMP], NOW, 0
    for _ in range(1000):
        memory = replace(MEMORY, signed={**MEMORY.signed, TIMESTAMP: held})
        if ask(timestamp(said=now), memory=memory, now=now).answer is Answer.SIGN:
            signed, held = signed + 1, replace(held, due=policy.next_due(held, now))
        now += timedelta(milliseconds=100)
    assert signed == policy.BURST + 99


@given(version=st.integers(1, 2**31), last=st.integers(1, 2**31))
def test_only_the_next_version_is_ever_signed(version, last):
    held = {**MEMORY.signed, TIMESTAMP: replace(MEMORY.signed[TIMESTAMP], version=last)}
    verdict = ask(timestamp(version=version), memory=replace(MEMORY, signed=held))
    assert (verdict.answer is Answer.SIGN) == (version == last + 1)


@given(targets=st.integers(1, 9), cohort=st.integers(1, 9), text=st.sampled_from(["targets", "cohorts", "x"]))
def test_a_snapshot_lists_exactly_what_was_verified_and_signed_last(targets, cohort, text):
    asked = snapshot(targets=file(targets, text), cohorts=file(cohort, "cohorts"))
    assert (ask(asked).answer is Answer.SIGN) == ((targets, cohort, text) == (3, 7, "targets"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@given(changed=st.dictionaries(st.sampled_from(sorted(policy.FIELDS)), JSON, max_size=3), extra=JSON)
def test_a_signed_directive_can_be_read_and_names_what_people_signed(changed, extra):
    custom = json.loads(json.dumps(directive(**changed)))
    verdict = ask(cohorts(listed(custom=custom)))
    assert verdict.answer in (Answer.SIGN, Answer.REFUSE)
    if verdict.answer is Answer.SIGN:
        read = Directive.from_json(custom)
        assert {read.release, read.base} <= {"1.0", None}
        assert directive_path(read.product, read.cohort) == "cohorts/demo/eu.json"
    assert ask(cohorts(listed(custom={**custom, "more": extra}))).answer is Answer.REFUSE
