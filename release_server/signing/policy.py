"""What the signer is ready to sign: a pure answer, with a reason for each refusal.

Whoever asks may be a thief who owns the rest of the server. So nothing here believes the request: versions,
entries and releases are compared with what the signer itself has signed or verified (`Memory`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from tuf.api.metadata import MetaFile, Root, Snapshot, Targets, Timestamp

from agent_core.clock import parse_iso
from agent_core.errors import MalformedError
from agent_core.wire import Directive, bundle_path, directive_path
from keys.roles import COHORTS, ROLES, SNAPSHOT, TARGETS, TIMESTAMP

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tuf.api.metadata import Metadata, TargetFile

SIGNED_AT = "x-signed-at"
SLOWEST = timedelta(minutes=2)
"""How old the time may be that a timestamp says it is signed at: one slow tick of the jobs process."""
AHEAD = timedelta(seconds=5)
INTERVAL = timedelta(seconds=1)
"""One signature of a role in so long, on average: running versions forward to 2^31 then takes a lifetime."""
BURST = 120
MOST_FIRST = 1_000_000
"""Highest version that a key which never signed anything may begin with."""
EMPTY = sha256(b"").hexdigest()
TYPES: dict[str, type[Targets | Snapshot | Timestamp]] = {
    COHORTS: Targets,
    SNAPSHOT: Snapshot,
    TIMESTAMP: Timestamp,
}
FIELDS = frozenset(Directive("p", "c", None, None, 0, "", 0).to_json())


class Answer(StrEnum):
    """What is done with a request."""

    SIGN = "sign"
    REPEAT = "repeat"
    REFUSE = "refuse"


class Refusal(StrEnum):
    """Why a signature is refused; codes of the log, the API's errors and the tests."""

    WRONG_ROLE = "wrong-role"
    NO_ROOT = "no-root"
    NO_TARGETS = "no-targets"
    ONLINE_KEY = "online-key"
    VERSION = "version"
    EXPIRY = "expiry"
    UNKNOWN_FIELD = "unknown-field"
    DELEGATES = "delegates"
    PATH = "path"
    CONTENT = "content"
    BAD_DIRECTIVE = "bad-directive"
    UNKNOWN_RELEASE = "unknown-release"
    DROPPED = "dropped"
    LOWERED = "lowered"
    NOT_VERIFIED = "not-verified"
    TIME = "time"
    RATE = "rate"


@dataclass(frozen=True)
class Signed:
    """The newest signature of a role.

    Attributes:
        keyid: of the key that made it.
        digest: sha256 of the bytes that are signed.
        file: version, length and sha256 of the whole envelope, as the role above names it.
        due: until when the signatures so far use up the allowed rate.
    """

    version: int
    keyid: str
    digest: str
    file: MetaFile
    due: datetime


@dataclass(frozen=True)
class Memory:
    """What the signer knows by itself, each part from its own disk and its own verification.

    Attributes:
        root: the newest root of its own chain.
        targets: the newest top-level targets it has verified, and `targets_file` as snapshot names them.
        signed: role → its newest signature.
        entries: what the newest snapshot lists, name → version.
        signed_at: the time that the newest timestamp says.
    """

    root: Root | None = None
    targets: Targets | None = None
    targets_file: MetaFile | None = None
    signed: Mapping[str, Signed] = field(default_factory=dict)
    entries: Mapping[str, int] = field(default_factory=dict)
    signed_at: datetime | None = None


@dataclass(frozen=True)
class Verdict:
    """The answer to one request, with the reason when it is a refusal."""

    answer: Answer
    reason: str = ""
    why: str = ""


def refuse(reason: Refusal, why: str) -> Verdict:
    return Verdict(Answer.REFUSE, reason, why)


def judge(memory: Memory, role: str, metadata: Metadata[Any], keyid: str, now: datetime) -> Verdict:
    """Say whether the signer signs `metadata` for `role`.

    The same bytes again are answered with the signature that was made, so that whoever did not hear the
    answer may ask again: that is no second signature, and the version has no gap.

    Args:
        memory: what the signer knows by itself.
        role: one of the online roles.
        metadata: what is to be signed; its signatures are not looked at.
        keyid: of the signer's key for that role.
        now: the signer's own clock.
    """
    if not isinstance(metadata.signed, TYPES[role]):
        return refuse(Refusal.WRONG_ROLE, f"it is {metadata.signed.type}")
    last = memory.signed.get(role)
    same_key = last is not None and last.keyid == keyid
    if last and same_key and last.digest == sha256(metadata.signed_bytes).hexdigest():
        return Verdict(Answer.REPEAT)
    return (
        _judge_key(memory, role, keyid)
        or _judge_version(last if same_key else None, metadata.signed.version)
        or _judge_expiry(role, metadata.signed.expires.replace(tzinfo=UTC), now)
        or _judge_content(memory, metadata.signed, now, same_key=same_key)
        or _judge_rate(last, now)
        or Verdict(Answer.SIGN)
    )


def _judge_key(memory: Memory, role: str, keyid: str) -> Verdict | None:
    """A key signs only for the role that people gave it."""
    if memory.root is None:
        return refuse(Refusal.NO_ROOT, "the signer trusts no root yet")
    if memory.targets is None:
        return refuse(Refusal.NO_TARGETS, "the signer has verified no targets yet")
    if keyid not in named_keys(memory, role):
        giver = TARGETS if role == COHORTS else "root"
        return refuse(Refusal.ONLINE_KEY, f"the {giver} that people signed name another key for {role}")
    return None


def named_keys(memory: Memory, role: str) -> list[str]:
    """The ids of the keys that people have named for an online role, as far as the signer has verified."""
    if role != COHORTS:
        return memory.root.roles[role].keyids if memory.root else []
    delegations = memory.targets.delegations if memory.targets else None
    named = (delegations.roles or {}).get(COHORTS) if delegations else None
    return named.keyids if named else []


def _judge_version(last: Signed | None, version: int) -> Verdict | None:
    if last is None:
        if version > MOST_FIRST:
            return refuse(Refusal.VERSION, f"a new key does not begin with {version}")
    elif version != last.version + 1:
        return refuse(Refusal.VERSION, f"{version} does not follow {last.version}, which was signed last")
    return None


def _judge_expiry(role: str, expires: datetime, now: datetime) -> Verdict | None:
    if expires > now + ROLES[role].expires + AHEAD:
        return refuse(Refusal.EXPIRY, f"it would hold longer than {ROLES[role].expires}")
    return None


def _judge_content(
    memory: Memory, signed: Targets | Snapshot | Timestamp, now: datetime, *, same_key: bool
) -> Verdict | None:
    allowed = {SIGNED_AT} if isinstance(signed, Timestamp) else set()
    if unknown := set(signed.unrecognized_fields) - allowed:
        return refuse(Refusal.UNKNOWN_FIELD, min(unknown))
    if isinstance(signed, Targets):
        return _judge_cohorts(memory, signed)
    if isinstance(signed, Snapshot):
        return _judge_snapshot(memory, signed, same_key=same_key)
    return _judge_timestamp(memory, signed, now, same_key=same_key)


# --- cohorts ---------------------------------------------------------------------------------------------


def _judge_cohorts(memory: Memory, cohorts: Targets) -> Verdict | None:
    if cohorts.delegations is not None:
        return refuse(Refusal.DELEGATES, "directives are not delegated further")
    released = _released(memory.targets)
    for path, target in cohorts.targets.items():
        if verdict := _judge_directive(released, path, target):
            return verdict
    return None


def _released(targets: Targets | None) -> frozenset[str]:
    """`bundles/PRODUCT/VERSION` of every release that people signed, for whatever platform."""
    paths = targets.targets if targets else ()
    return frozenset(path.rpartition("/")[0] for path in paths if path.endswith(".tar.zst"))


def _judge_directive(released: frozenset[str], path: str, target: TargetFile) -> Verdict | None:
    if not path.startswith("cohorts/"):
        return refuse(Refusal.PATH, f"{path} is no cohort's")
    if (target.length, target.hashes) != (0, {"sha256": EMPTY}):
        return refuse(Refusal.CONTENT, f"{path} has content of its own")
    if set(target.unrecognized_fields) != {"custom"} or not isinstance(target.custom, dict):
        return refuse(Refusal.UNKNOWN_FIELD, f"{path} is a directive and nothing else")
    if unknown := set(target.custom) - FIELDS:
        return refuse(Refusal.UNKNOWN_FIELD, f"{path}: {min(unknown)}")
    try:
        directive = Directive.from_json(target.custom, path)
    except MalformedError as error:
        return refuse(Refusal.BAD_DIRECTIVE, f"{error.what}: {error.why}")
    if directive_path(directive.product, directive.cohort) != path:
        return refuse(Refusal.PATH, f"{path} holds the word to {directive.product}/{directive.cohort}")
    for version in {directive.release, directive.base} - {None}:
        if bundle_path(directive.product, str(version), "").rpartition("/")[0] not in released:
            return refuse(Refusal.UNKNOWN_RELEASE, f"{path} names {version}, which nobody signed")
    return None


# --- snapshot --------------------------------------------------------------------------------------------


def _judge_snapshot(memory: Memory, snapshot: Snapshot, *, same_key: bool) -> Verdict | None:
    # Clients forget what a key said that people have taken away; so versions that a thief ran forward end.
    entries = memory.entries if same_key else {}
    if dropped := set(entries) - set(snapshot.meta):
        return refuse(Refusal.DROPPED, f"{min(dropped)} was listed before")
    for name, entry in snapshot.meta.items():
        if entry.version < entries.get(name, 0):
            return refuse(Refusal.LOWERED, f"{name} was at {entries[name]}, not {entry.version}")
    cohorts = memory.signed.get(COHORTS)
    known = {f"{TARGETS}.json": memory.targets_file, f"{COHORTS}.json": cohorts.file if cohorts else None}
    for name in snapshot.meta.keys() | known.keys():
        if snapshot.meta.get(name) is None or snapshot.meta[name] != known.get(name):
            return refuse(Refusal.NOT_VERIFIED, f"{name} is not what the signer has verified or signed last")
    return None


# --- timestamp -------------------------------------------------------------------------------------------


def _judge_timestamp(
    memory: Memory, timestamp: Timestamp, now: datetime, *, same_key: bool
) -> Verdict | None:
    snapshot = memory.signed.get(SNAPSHOT)
    if snapshot is None or timestamp.snapshot_meta != snapshot.file:
        return refuse(Refusal.NOT_VERIFIED, "its snapshot is not the one that was signed last")
    before = memory.signed_at if same_key else None
    try:
        said = parse_iso(timestamp.unrecognized_fields[SIGNED_AT])
    except (KeyError, TypeError, ValueError):
        return refuse(Refusal.TIME, f"{SIGNED_AT} is no time")
    if before is not None and said < before:
        return refuse(Refusal.TIME, f"{SIGNED_AT} would go back")
    # After the clock was corrected backward the last time may be said again: signing goes on at once, and
    # what agents remember does not move.
    if said < now - SLOWEST or (said > now + AHEAD and said != before):
        return refuse(Refusal.TIME, f"{SIGNED_AT} is far from the signer's clock")
    return None


# --- rate ------------------------------------------------------------------------------------------------


def _judge_rate(last: Signed | None, now: datetime) -> Verdict | None:
    if last is not None and next_due(last, now) > now + BURST * INTERVAL:
        return refuse(Refusal.RATE, f"more than {BURST} signatures at once, and one in {INTERVAL} after that")
    return None


def next_due(last: Signed | None, now: datetime) -> datetime:
    """Until when the rate is used up once one more signature is made (a leaky bucket of BURST)."""
    if last is None or last.due > now + BURST * INTERVAL:
        return now + INTERVAL  # so far ahead it could only get by a clock that has since gone back
    return max(last.due, now) + INTERVAL
