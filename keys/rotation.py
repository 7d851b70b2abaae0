"""The next root, on its way to everybody who has to sign it: one file, carried from holder to holder.

The file holds the whole chain of roots, so that each holder begins from the root they trust themselves, and
the targets that must be signed anew with it. Whoever carries it, the server included, can drop signatures
but make none. Pure: metadata and the time in, metadata out.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, Targets

from agent_core.clock import iso
from agent_core.errors import ConflictError, MalformedError, NotFoundError, TrustError, UsageError
from agent_core.wire import Getter
from keys import ceremony, changes
from keys.changes import Change
from keys.roles import COHORT_PATHS, COHORTS, ROOT, SNAPSHOT, TARGETS, TIMESTAMP

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from securesystemslib.signer import Key, Signer

    from keys.ceremony import OnlineKeys

KIND = "relfleet-next-root"
SCHEMA = 1
PEOPLE = {ROOT: "root", TARGETS: "release"}
"""The roles that people hold, in the words of their key files."""


@dataclass(frozen=True)
class Wanted:
    """What the next root changes; nothing of it is a renewal, the same held for another year.

    Attributes:
        add: role → keys that it gets.
        remove: ids of keys that go, from every role.
        thresholds: role → how many of its keys sign from now on.
        online: the server's keys from now on; None keeps those that are named.
    """

    add: Mapping[str, Sequence[Key]] = field(default_factory=dict)
    remove: frozenset[str] = frozenset()
    thresholds: Mapping[str, int] = field(default_factory=dict)
    online: OnlineKeys | None = None


@dataclass(frozen=True)
class Missing:
    """How many signatures are still needed: of old root keys, of new ones, and of the new release keys."""

    old: int
    new: int
    targets: int

    @property
    def is_none(self) -> bool:
        return not (self.old or self.new or self.targets)


@dataclass(frozen=True)
class NextRoot:
    """A root that is being signed, and what it stands on.

    Attributes:
        chain: every root from the first to the current one.
        root: the one that follows.
        before: the current targets.
        targets: the targets that go with the new root; None where the current ones stay good.
    """

    chain: tuple[Metadata[Root], ...]
    root: Metadata[Root]
    before: Metadata[Targets]
    targets: Metadata[Targets] | None

    @property
    def current(self) -> Metadata[Root]:
        return self.chain[-1]

    def to_bytes(self) -> bytes:
        held: dict[str, Any] = {
            "kind": KIND,
            "schema": SCHEMA,
            "chain": [each.to_dict() for each in self.chain],
            "root": self.root.to_dict(),
            "before": self.before.to_dict(),
            "targets": self.targets.to_dict() if self.targets else None,
        }
        return json.dumps(held, indent=1, sort_keys=True).encode() + b"\n"

    @classmethod
    def from_bytes(cls, body: bytes) -> NextRoot:
        """Read a file that somebody brought, trusting nothing in it yet.

        Raises:
            MalformedError, TrustError: it is none.
        """
        try:
            get = Getter(json.loads(body), "next root")
        except (ValueError, RecursionError) as error:
            raise MalformedError("this is no file of a next root", why=str(error)) from None
        if get.text("kind") != KIND:
            raise get.refuse("kind", f"a next root says {KIND!r}")
        get.integer("schema", low=1, high=SCHEMA)
        chain = get.mapping.get("chain")
        if not isinstance(chain, list) or not chain:
            raise get.refuse("chain", "it is no list of roots")
        signed = get.mapping.get("targets")
        return cls(
            tuple(ceremony.parse_root(_plain(each)) for each in chain),
            ceremony.parse_root(_plain(get.object("root"))),
            ceremony.parse_targets(_plain(get.object("before"))),
            ceremony.parse_targets(_plain(signed)) if signed is not None else None,
        )


def _plain(metadata: object) -> bytes:
    return json.dumps(metadata).encode()


# --- making ----------------------------------------------------------------------------------------------


def make_next(
    chain: Sequence[Metadata[Root]], before: Metadata[Targets], wanted: Wanted, now: datetime
) -> NextRoot:
    """The root after the current one, not yet signed, and the targets that must be signed anew with it.

    Args:
        chain: every root from the first to the current one.
        before: the current targets.

    Raises:
        NotFoundError: a key that is to go is not there.
        ConflictError: a key that is to come is there already.
        UsageError, TrustError: see `ceremony.check_root`.
    """
    current = chain[-1].signed
    keys = {role: _keys_after(current, role, wanted) for role in PEOPLE}
    known = {keyid for role in PEOPLE for keyid in current.roles[role].keyids}
    if strange := wanted.remove - known:
        raise NotFoundError(
            f"no root or release key is {min(strange)[:12]}",
            then="release key list shows those that are here",
        )
    if wanted.online is not None:
        keys |= {SNAPSHOT: [wanted.online.snapshot], TIMESTAMP: [wanted.online.timestamp]}
    root = ceremony.next_root(chain[-1], now, keys=keys, thresholds=wanted.thresholds)
    moved = wanted.online is not None and _cohorts_key(before.signed) != wanted.online.cohorts
    if not moved and not ceremony.missing_signatures(root.signed, TARGETS, before):
        return NextRoot(tuple(chain), root, before, None)
    targets = ceremony.next_targets(before, now)
    if wanted.online is not None:
        _delegate(targets.signed, wanted.online.cohorts)
    ceremony.check_targets(targets.signed, root.signed)
    return NextRoot(tuple(chain), root, before, targets)


def _keys_after(current: Root, role: str, wanted: Wanted) -> list[Key]:
    held = [current.get_key(keyid) for keyid in current.roles[role].keyids if keyid not in wanted.remove]
    fresh = list(wanted.add.get(role, ()))
    if there := {key.keyid for key in held} & {key.keyid for key in fresh}:
        raise ConflictError(f"key {min(there)[:12]} is a {PEOPLE[role]} key already", reason="key-exists")
    if not held and not fresh:
        raise UsageError(
            f"this would leave no {PEOPLE[role]} key",
            then="add the key that takes its place in the same root",
            reason="bad-threshold",
        )
    return held + fresh


def _cohorts_key(targets: Targets) -> Key | None:
    keys = list(targets.delegations.keys.values()) if targets.delegations else []
    return keys[0] if len(keys) == 1 else None


def _delegate(targets: Targets, key: Key) -> None:
    role = DelegatedRole(COHORTS, [key.keyid], 1, terminating=True, paths=list(COHORT_PATHS))
    targets.delegations = Delegations({key.keyid: key}, {COHORTS: role})


# --- checking --------------------------------------------------------------------------------------------


def check(following: NextRoot, trusted: Metadata[Root], now: datetime) -> None:
    """Hold a file to every rule but the number of its signatures, from a root that is trusted here.

    Args:
        trusted: the root that this holder has from elsewhere; it must be in the chain.

    Raises:
        TrustError: the chain does not lead from the trusted root to the current one; the new root is not
            sound; the targets change what was published.
        ConflictError: a version does not follow.
    """
    chain = following.chain
    mine = [place for place, each in enumerate(chain) if each.signed == trusted.signed]
    if not mine:
        raise TrustError(
            "this file is refused",
            why=f"its roots do not begin from root {trusted.signed.version}, which is trusted here",
            then="ask who made it; or name the right root with --trust",
            reason="other-root",
        )
    for place in range(mine[0] + 1, len(chain)):
        ceremony.verify_root(chain[place], chain[place - 1])
    current, root = following.current.signed, following.root.signed
    changes.check_version(ROOT, current.version, root.version)
    ceremony.check_root(root)
    if ceremony.missing_signatures(current, TARGETS, following.before):
        raise TrustError(
            "this file is refused", why="its current targets are not signed", reason="bad-signature"
        )
    if following.targets is None:
        if ceremony.missing_signatures(root, TARGETS, following.before):
            raise TrustError(
                "this file is refused",
                why="the current targets would no longer be signed, and it brings no others",
                reason="bad-signature",
            )
        return
    ceremony.check_targets(following.targets.signed, root)
    if changes.check_successor(following.before.signed, following.targets.signed, now):
        raise TrustError("this file is refused", why="it adds releases; push them apart", reason="changed")


def missing(following: NextRoot) -> Missing:
    """How many signatures are still needed, and of whom."""
    found = following.root.signed.get_root_verification_result(
        following.current.signed, ceremony.signed_bytes(following.root), following.root.signatures
    )
    targets = following.targets
    return Missing(
        found.first.missing,
        found.second.missing,
        ceremony.missing_signatures(following.root.signed, TARGETS, targets) if targets else 0,
    )


def may_sign(following: NextRoot) -> set[str]:
    """The ids of the keys whose signatures are of use and are not there yet."""
    old, root = following.current.signed, following.root.signed
    wanted = {*old.roles[ROOT].keyids, *root.roles[ROOT].keyids} - _signers_of_root(following)
    if following.targets is not None:
        done = ceremony.signed_by(root, TARGETS, following.targets)
        wanted |= {*root.roles[TARGETS].keyids} - {*done}
    return wanted


def _signers_of_root(following: NextRoot) -> set[str]:
    signed = ceremony.signed_bytes(following.root), following.root.signatures
    found = following.root.signed.get_root_verification_result(following.current.signed, *signed)
    return {*found.first.signed, *found.second.signed}


def sign(following: NextRoot, signers: Iterable[Signer]) -> None:
    """Add signatures, each where its key counts."""
    roots = {*following.current.signed.roles[ROOT].keyids, *following.root.signed.roles[ROOT].keyids}
    for signer in signers:
        keyid = signer.public_key.keyid
        if keyid in roots:
            ceremony.sign(following.root, [signer])
        if following.targets and keyid in following.root.signed.roles[TARGETS].keyids:
            ceremony.sign(following.targets, [signer])


def describe(following: NextRoot) -> list[Change]:
    """Everything that the new root changes, for people who are asked to sign it."""
    old, new = following.current.signed, following.root.signed
    found = []
    for role in (ROOT, TARGETS, SNAPSHOT, TIMESTAMP):
        name = PEOPLE.get(role, role)
        before, after = set(old.roles[role].keyids), set(new.roles[role].keyids)
        found += [Change("removed", f"{name} key", before=keyid[:12]) for keyid in sorted(before - after)]
        found += [Change("added", f"{name} key", after=keyid[:12]) for keyid in sorted(after - before)]
        thresholds = old.roles[role].threshold, new.roles[role].threshold
        if thresholds[0] != thresholds[1]:
            found.append(Change("threshold", name, *(str(each) for each in thresholds)))
    found.append(Change("expiry", f"root {new.version}", iso(old.expires), iso(new.expires)))
    if following.targets:
        found += changes.changes(following.before.signed, following.targets.signed)
    return found
