"""What the next version of targets may change, and what it does change: the rules both ends hold it to.

The release manager who signs, the one who signs after him, and the server that takes it in each ask the same
functions; none believes what another has found. Metadata in, values out.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from agent_core.clock import iso
from agent_core.errors import ConflictError, TrustError
from agent_core.wire import (
    NAME,
    DeltaFacts,
    Policy,
    Reason,
    ReleaseFacts,
    bundle_path,
    delta_path,
    index_path,
    policy_path,
)
from keys.roles import ROLES, TARGETS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from tuf.api.metadata import TargetFile, Targets

    Files = Mapping[str, TargetFile]

EMPTY = sha256(b"").hexdigest()
BUNDLE = re.compile(r"bundles/([^/]+)/([^/]+)/([^/]+)\.tar\.zst")
INDEX = re.compile(r"bundles/([^/]+)/([^/]+)/([^/]+)\.index\.json")
DELTA = re.compile(r"deltas/([^/]+)/([^/]+)/([^/]+)/([^/]+)\.delta")
POLICY = re.compile(rf"policy/({NAME.pattern})\.json")
STEP = 1_000_000
"""So far above all before it a seq may be: a floor at the end of all numbers would leave none for people."""


@dataclass(frozen=True)
class Listed:
    """One bundle of targets metadata, with what is signed of it."""

    facts: ReleaseFacts
    sha256: str
    length: int

    @property
    def path(self) -> str:
        return bundle_path(self.facts.product, self.facts.version, self.facts.platform)

    @property
    def name(self) -> str:
        return f"{self.facts.product} {self.facts.version} for {self.facts.platform}"


@dataclass(frozen=True)
class ListedDelta:
    """One delta of targets metadata: from which bundle to which."""

    before: Listed
    after: Listed
    sha256: str
    length: int

    @property
    def name(self) -> str:
        return f"{self.after.name} from {self.before.facts.version}"


def _refuse(what: str, why: str, reason: str, then: str = "") -> TrustError:
    return TrustError(what, why=why, reason=reason, then=then)


# --- reading ---------------------------------------------------------------------------------------------


def read_listed(files: Files) -> dict[str, Listed]:
    """The bundles of targets metadata by path; every other path must be an index, a delta or a policy.

    Raises:
        TrustError: `bad-metadata`, `wrong-path` or `bad-index`.
        MalformedError: the facts of a release do not have their form.
    """
    listed = {}
    indexes = set()
    for path, target in files.items():
        if set(target.hashes) != {"sha256"}:
            raise _refuse(f"{path} is refused", "its hashes must be sha256, alone", Reason.BAD_METADATA)
        if BUNDLE.fullmatch(path):
            listed[path] = _read_bundle(path, target, files)
            facts = listed[path].facts
            indexes.add(index_path(facts.product, facts.version, facts.platform))
        elif not any(form.fullmatch(path) for form in (INDEX, DELTA, POLICY)):
            raise _refuse(
                f"{path} is refused",
                "top-level targets hold bundles, deltas and policies",
                Reason.BAD_METADATA,
            )
    for path in files:
        if INDEX.fullmatch(path) and path not in indexes:
            raise _refuse(f"{path} is refused", "it belongs to no bundle", Reason.BAD_METADATA)
    return listed


def read_deltas(files: Files, listed: Mapping[str, Listed]) -> dict[str, ListedDelta]:
    """The deltas of targets metadata by path, each between two of these bundles.

    Raises:
        TrustError: `bad-delta`.
        MalformedError: the facts of one do not have their form.
    """
    by_index = {
        (entry.facts.product, entry.facts.platform, entry.facts.index_sha256): entry
        for entry in listed.values()
    }
    deltas = {}
    for path, target in files.items():
        if found := DELTA.fullmatch(path):
            product, version, platform, _ = found.groups()
            facts = DeltaFacts.from_json(target.custom, path)
            before = by_index.get((product, platform, facts.from_sha256))
            after = listed.get(bundle_path(product, version, platform))
            if (
                path != delta_path(product, version, platform, facts.from_sha256)
                or before is None
                or after is None
                or (facts.from_version, facts.to_sha256) != (before.facts.version, after.facts.index_sha256)
                or before.facts.seq >= after.facts.seq
                or target.length >= after.length
            ):
                why = "it must lead from an earlier bundle here to this one, and be shorter than it"
                raise _refuse(f"{path} is refused", why, "bad-delta")
            deltas[path] = ListedDelta(before, after, target.hashes["sha256"], target.length)
    return deltas


def _read_bundle(path: str, target: TargetFile, files: Files) -> Listed:
    facts = ReleaseFacts.from_json(target.custom, path)
    if bundle_path(facts.product, facts.version, facts.platform) != path:
        raise _refuse(
            f"{path} is refused",
            f"its facts are of {facts.product} {facts.version} for {facts.platform}",
            "wrong-path",
        )
    index = files.get(index_path(facts.product, facts.version, facts.platform))
    if index is None:
        raise _refuse(f"{path} is refused", "its index is not listed", Reason.BAD_INDEX)
    if (index.hashes.get("sha256"), index.length) != (facts.index_sha256, facts.index_length):
        raise _refuse(f"{path} is refused", "its facts name another index", Reason.BAD_INDEX)
    return Listed(facts, target.hashes["sha256"], target.length)


def barrier_before(files: Files, product: str, seq: int) -> int:
    """The seq of the newest barrier below `seq`, which nobody goes past without having run it; 0 for none."""
    return max((each for each in barriers(files, product) if each < seq), default=0)


def barriers(files: Files, product: str) -> dict[int, str]:
    """The barriers of a product that bind what is signed, seq to version.

    One that the policy of the same targets forbids is none any more: hosts before it could install neither it
    nor anything after it, and no release could be signed that takes them on.
    """
    policy = policy_of(files, product)
    return {
        facts.seq: facts.version
        for facts in _facts_of(files, product)
        if facts.barrier and not forbids(policy, facts.seq)
    }


def forbids(policy: Policy, seq: int) -> bool:
    """Whether no host may install a release of this seq."""
    return seq < policy.floor_seq or seq in policy.revoked_seq


def beside_barriers(files: Files, product: str) -> dict[str, list[str]]:
    """The barriers that leave hosts behind: version to platforms that only earlier releases are for."""
    known = _facts_of(files, product)
    found = {}
    for seq, version in barriers(files, product).items():
        own = {facts.platform for facts in known if facts.seq == seq}
        earlier = {facts.platform for facts in known if facts.seq < seq}
        if alone := sorted(each for each in earlier if not any(_serves(bundle, each) for bundle in own)):
            found[version] = alone
    return found


def _serves(bundle: str, platform: str) -> bool:
    return bundle in ("any", platform) or platform.startswith(f"{bundle}-")


def _facts_of(files: Files, product: str) -> list[ReleaseFacts]:
    return [
        ReleaseFacts.from_json(target.custom, path)
        for path, target in files.items()
        if (found := BUNDLE.fullmatch(path)) and found.group(1) == product
    ]


def policy_of(files: Files, product: str) -> Policy:
    """A product's floor and revoked releases; nothing of either when none was signed."""
    target = files.get(policy_path(product))
    return Policy.from_json(target.custom, policy_path(product)) if target else Policy()


# --- the rules -------------------------------------------------------------------------------------------


def check_successor(before: Targets | None, after: Targets, now: datetime) -> list[Listed]:
    """Hold the next targets to every rule that needs no key and no blob.

    Args:
        before: what is current; None before the first.
        after: what is proposed.

    Returns:
        The bundles that are new in it.

    Raises:
        ConflictError: it is not the version after the current one.
        TrustError: see the functions below, by `reason`.
        MalformedError: facts or a policy do not have their form.
    """
    check_version(TARGETS, before.version if before else 0, after.version)
    check_expiry(after, now)
    old = before.targets if before else {}
    listed = read_listed(after.targets)
    check_kept(old, after.targets)
    check_policies(old, after.targets)
    read_deltas(after.targets, listed)
    fresh = [entry for path, entry in listed.items() if path not in old]
    check_seqs(read_listed(old).values(), fresh)
    check_barriers(after.targets, listed.values())
    check_room(old, after.targets, fresh)
    return fresh


def check_version(role: str, current: int, version: int) -> None:
    """Refuse a version that is not the one after the current one: a jump, or a base that has gone by.

    Raises:
        ConflictError: with what to do about it.
    """
    if version == current + 1:
        return
    jump = version > current
    raise ConflictError(
        f"the {role} is not the next version",
        why=f"it is {version}, the current one is {current}",
        then="versions go up by one: find out who made this" if jump else "make it anew from the current one",
        reason="version-jump" if jump else "old-base",
    )


def check_expiry(after: Targets, now: datetime) -> None:
    """Refuse targets that have expired, or that would hold longer than the role does.

    Raises:
        TrustError: `expired`, or `bad-metadata` when it would hold too long.
    """
    if after.is_expired(now):
        raise _refuse("the targets is refused", f"it expired at {iso(after.expires)}", Reason.EXPIRED)
    if after.expires > ROLES[TARGETS].latest(now):
        days = ROLES[TARGETS].expires.days
        raise _refuse(
            "the targets is refused",
            f"it would hold until {iso(after.expires)}; {days} days are the most",
            Reason.BAD_METADATA,
        )


def check_kept(before: Files, after: Files) -> None:
    """What was published stays, byte for byte and fact for fact; only its gates and notes may change.

    Raises:
        TrustError: `removed` or `changed`.
    """
    for path, old in before.items():
        new = after.get(path)
        if new is None:
            raise _refuse(
                f"{path} is gone", "what was published stays; revoke it in the policy instead", "removed"
            )
        if POLICY.fullmatch(path):
            continue
        if (old.length, old.hashes) != (new.length, new.hashes):
            raise _refuse(
                f"{path} has changed", "a version never changes", "changed", "publish a new version"
            )
        if BUNDLE.fullmatch(path) and _lasting(old) != _lasting(new):
            raise _refuse(f"{path} has other facts", "only gates and notes may change", "changed")
        if DELTA.fullmatch(path) and old.custom != new.custom:
            raise _refuse(f"{path} has other facts", "a delta never changes", "changed")


def _lasting(target: TargetFile) -> ReleaseFacts:
    return replace(ReleaseFacts.from_json(target.custom), gates=(), notes="")


def check_policies(before: Files, after: Files) -> None:
    """Policies have no content of their own, and a floor never falls: agents remember it.

    Raises:
        TrustError: `bad-metadata` or `below-floor`.
    """
    for path, target in after.items():
        if not POLICY.fullmatch(path):
            continue
        if (target.length, target.hashes) != (0, {"sha256": EMPTY}):
            raise _refuse(f"{path} is refused", "a policy has no content of its own", Reason.BAD_METADATA)
        policy = Policy.from_json(target.custom, path)
        old = Policy.from_json(before[path].custom, path) if path in before else Policy()
        if policy.floor_seq < old.floor_seq:
            raise _refuse(
                f"{path} is refused",
                f"its floor {policy.floor_seq} is lower than {old.floor_seq}, which agents remember",
                Reason.BELOW_FLOOR,
            )


def check_seqs(known: Iterable[Listed], fresh: Iterable[Listed]) -> None:
    """A new version's seq is above all of its product; a version's platforms share one seq.

    Raises:
        TrustError: `seq`.
    """
    seqs: dict[str, dict[str, int]] = {}
    for entry in known:
        seqs.setdefault(entry.facts.product, {})[entry.facts.version] = entry.facts.seq
    for entry in sorted(fresh, key=lambda entry: entry.facts.seq):
        facts, own = entry.facts, seqs.setdefault(entry.facts.product, {})
        if facts.version in own:
            if own[facts.version] != facts.seq:
                why = f"the version has seq {own[facts.version]}, not {facts.seq}"
                raise _refuse(f"{entry.name} is refused", why, "seq")
        elif own and facts.seq <= max(own.values()):
            raise _refuse(
                f"{facts.product} {facts.version} is refused",
                f"its seq {facts.seq} is not above {max(own.values())}",
                "seq",
                "make it anew from the current targets",
            )
        own[facts.version] = facts.seq


def check_barriers(files: Files, listed: Iterable[Listed]) -> None:
    """Nothing leads past a barrier that binds: hosts go by the stepping stone that is signed, not the server.

    Raises:
        TrustError: `barrier`.
    """
    known = [entry.facts for entry in listed]
    binding = {product: barriers(files, product) for product in {facts.product for facts in known}}
    for facts in known:
        for seq, version in binding[facts.product].items():
            if facts.upgrade_from_seq < seq < facts.seq:
                raise _refuse(
                    f"{facts.product} {facts.version} for {facts.platform} is refused",
                    f"{version} is a barrier, and it would install over what is older",
                    "barrier",
                    "make it anew from the current targets; "
                    "what was signed past a revoked barrier keeps it revoked",
                )


def check_room(before: Files, after: Files, fresh: Iterable[Listed]) -> None:
    """No floor, revocation or release uses up the numbers: whoever had the keys, a next release has one.

    Raises:
        TrustError: `seq`.
    """
    said: dict[str, int] = {}
    for path, target in after.items():
        if found := POLICY.fullmatch(path):
            policy = Policy.from_json(target.custom, path)
            said[found.group(1)] = max(policy.floor_seq, *policy.revoked_seq, 0)
    for entry in fresh:
        said[entry.facts.product] = max(said.get(entry.facts.product, 0), entry.facts.seq)
    for product, seq in said.items():
        known = highest_seq(before, product)
        if seq > known + STEP:
            why = f"its seq {seq} is more than {STEP} above {known}, and floors never fall"
            raise _refuse(f"the next step of {product} is refused", why, "seq", "find out who signed this")


# --- what changes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """One line of what a person is asked to sign.

    Attributes:
        kind: `added`, `removed`, `changed`, `policy`, `delegation` or `expiry`.
        what: the thing, in words.
        before, after: what is said of it; empty where there is nothing.
    """

    kind: str
    what: str
    before: str = ""
    after: str = ""

    def to_json(self) -> dict[str, str]:
        return asdict(self)


def changes(before: Targets, after: Targets) -> list[Change]:
    """Everything that differs, also what the rules forbid: who signs sees it all."""
    return [
        *_file_changes(before.targets, after.targets),
        *_policy_changes(before.targets, after.targets),
        *_delegation_changes(before, after),
        Change("expiry", "targets", iso(before.expires), iso(after.expires)),
    ]


def _file_changes(before: Files, after: Files) -> Iterator[Change]:
    for path in sorted({*before, *after}):
        old, new = before.get(path), after.get(path)
        if POLICY.fullmatch(path) or old == new:
            continue
        if new is None:
            yield Change("removed", path, _said(old))
        elif old is not None:
            yield Change("changed", path, _said(old), _said(new))
        elif not INDEX.fullmatch(path):
            yield Change("added", path, "", _said(new))


def _said(target: TargetFile | None) -> str:
    """What is signed of one path, in a line."""
    if target is None:
        return ""
    words = [f"{target.length} bytes", f"sha256 {target.hashes.get('sha256', '')[:12]}"]
    if target.custom and "from_version" in target.custom:
        words.insert(0, f"from {DeltaFacts.from_json(target.custom).from_version}")
    elif target.custom:
        facts = ReleaseFacts.from_json(target.custom)
        words.insert(0, f"seq {facts.seq}")
        words += [f"gates {', '.join(facts.gates)}"] if facts.gates else []
        words += [f"from seq {facts.upgrade_from_seq} on"] if facts.upgrade_from_seq else []
        words += ["barrier"] if facts.barrier else []
        words += [f"notes {facts.notes[:60]!r}"] if facts.notes else []
    return ", ".join(words)


def _policy_changes(before: Files, after: Files) -> Iterator[Change]:
    for path in sorted({*before, *after}):
        if (found := POLICY.fullmatch(path)) is None or before.get(path) == after.get(path):
            continue
        product = found.group(1)
        versions = versions_by_seq(after, product)
        old, new = policy_of(before, product), policy_of(after, product)
        yield Change("policy", product, describe_policy(old, versions), describe_policy(new, versions))


def versions_by_seq(files: Files, product: str) -> dict[int, str]:
    """The versions of a product, by seq."""
    return {facts.seq: facts.version for facts in _facts_of(files, product)}


def highest_seq(files: Files, product: str) -> int:
    """The highest seq that a product's releases and policy have used; 0 when there is none."""
    policy = policy_of(files, product)
    return max(policy.floor_seq, *policy.revoked_seq, *versions_by_seq(files, product), 0)


def describe_policy(policy: Policy, versions: Mapping[int, str]) -> str:
    """A policy in a line, with versions where seqs have one."""

    def named(seqs: Sequence[int]) -> str:
        return ", ".join(f"{versions[seq]} (seq {seq})" if seq in versions else f"seq {seq}" for seq in seqs)

    floor = f"floor {named([policy.floor_seq])}" if policy.floor_seq else "no floor"
    return f"{floor}; revoked: {named(policy.revoked_seq) or 'none'}"


def _delegation_changes(before: Targets, after: Targets) -> Iterator[Change]:
    old, new = _delegated(before), _delegated(after)
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            yield Change("delegation", name, old.get(name, ""), new.get(name, ""))


def _delegated(targets: Targets) -> dict[str, str]:
    roles = targets.delegations.roles if targets.delegations else None
    return {
        name: f"{', '.join(role.paths or ())} to {role.threshold} of "
        f"{', '.join(sorted(keyid[:12] for keyid in role.keyids))}"
        f"{'' if role.terminating else ', not terminating'}"
        for name, role in (roles or {}).items()
    }
