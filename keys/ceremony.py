"""Makes, signs and checks the metadata that people's keys hold: root, and the first targets.

Every function takes what it works on and the time, and touches nothing else; `keys.cli` reads and writes the
files around them.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from tuf.api.exceptions import RepositoryError, UnsignedMetadataError
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Role, Root, Targets
from tuf.api.serialization import DeserializationError, SerializationError

from agent_core.errors import ConflictError, TrustError, UsageError
from agent_core.wire import Getter
from keys.roles import (
    COHORT_PATHS,
    COHORTS,
    OFFLINE_ROLES,
    ONLINE_ROLES,
    RESERVED_PATHS,
    ROLES,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
)
from keys.signers import key_material, public_key

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from securesystemslib.signer import Key, Signer


@dataclass(frozen=True)
class OnlineKeys:
    """The public halves of the server's keys, as `GET /trust` shows them under `online`.

    Attributes:
        upcoming: the keys that are to take their place, once people have signed a root that names them.
    """

    snapshot: Key
    timestamp: Key
    cohorts: Key
    upcoming: OnlineKeys | None = field(default=None, compare=False)

    def of(self, role: str) -> list[Key]:
        """The keys that may be named for a role: today's, and the one to come."""
        found: list[Key] = [getattr(self, role)]
        return found + ([getattr(self.upcoming, role)] if self.upcoming else [])

    def to_json(self) -> dict[str, dict[str, str]]:
        return {name: _public(getattr(self, name)) for name in ONLINE_ROLES}

    @classmethod
    def from_json(cls, online: object, path: str = "online") -> Self:
        """Read `{role: {keytype, scheme, public}}`; key ids are computed, never believed."""
        get = Getter(online, path)
        return cls.of_roles({name: public_key(get.object(name), f"{path}.{name}") for name in ONLINE_ROLES})

    @classmethod
    def of_roles(cls, keys: Mapping[str, Key]) -> Self:
        return cls(keys[SNAPSHOT], keys[TIMESTAMP], keys[COHORTS])


def _public(key: Key) -> dict[str, str]:
    return {
        "keyid": key.keyid,
        "keytype": key.keytype,
        "scheme": key.scheme,
        "public": key.keyval["public"],
    }


# --- making ----------------------------------------------------------------------------------------------


def make_root(
    *,
    root_keys: Sequence[Key],
    release_keys: Sequence[Key],
    online: OnlineKeys,
    now: datetime,
    root_threshold: int = 1,
    targets_threshold: int = 1,
) -> Metadata[Root]:
    """The first root, not yet signed.

    Args:
        root_keys: any `root_threshold` of them change the root from now on.
        release_keys: any `targets_threshold` of them publish a release.

    Raises:
        TrustError: see `check_root`.
    """
    return _root(
        1,
        {
            ROOT: (root_keys, root_threshold),
            TARGETS: (release_keys, targets_threshold),
            SNAPSHOT: ([online.snapshot], 1),
            TIMESTAMP: ([online.timestamp], 1),
        },
        now,
    )


def next_root(
    current: Metadata[Root],
    now: datetime,
    *,
    keys: Mapping[str, Sequence[Key]] | None = None,
    thresholds: Mapping[str, int] | None = None,
) -> Metadata[Root]:
    """The root after `current`, not yet signed; it takes the signatures of the old keys and of the new.

    Args:
        keys: role → its keys from now on; roles that are not named keep theirs.
        thresholds: role → how many of them sign; likewise.
    """
    held = current.signed
    roles = {
        name: (
            (keys or {}).get(name) or [held.get_key(keyid) for keyid in role.keyids],
            (thresholds or {}).get(name, role.threshold),
        )
        for name, role in held.roles.items()
    }
    return _root(held.version + 1, roles, now)


def _root(version: int, roles: Mapping[str, tuple[Sequence[Key], int]], now: datetime) -> Metadata[Root]:
    known: dict[str, Key] = {}
    for name, (keys, threshold) in roles.items():
        _refuse_twice(name, keys)
        check_threshold(name, len(keys), threshold)
        for key in keys:
            if known.setdefault(key.keyid, key) != key:
                raise TrustError("two keys share one id", why=f"both are {key.keyid}", reason="duplicate-key")
    signed = Root(
        version=version,
        expires=ROLES[ROOT].expiry(now),
        keys=known,
        roles={
            name: Role([key.keyid for key in keys], threshold) for name, (keys, threshold) in roles.items()
        },
        consistent_snapshot=True,
    )
    check_root(signed)
    return Metadata(signed)


def check_threshold(role: str, count: int, threshold: int) -> None:
    """Refuse a threshold that so many keys cannot meet.

    Raises:
        UsageError: it is above the number of keys, or below 1.
    """
    if not 1 <= threshold <= count:
        raise UsageError(
            f"{role} cannot have threshold {threshold}",
            why="it is below 1" if threshold < 1 else f"with {count} key(s) it could never be signed",
            then="use more keys or a lower threshold",
            reason="bad-threshold",
        )


def _refuse_twice(role: str, keys: Sequence[Key]) -> None:
    if len({key_material(key) for key in keys}) < len(keys):
        raise TrustError(f"{role} lists one key twice", why="it would count twice", reason="duplicate-key")


def make_targets(cohorts_key: Key, now: datetime) -> Metadata[Targets]:
    """The first targets, not yet signed: no release, and the directives delegated to the server."""
    role = DelegatedRole(COHORTS, [cohorts_key.keyid], 1, terminating=True, paths=list(COHORT_PATHS))
    delegations = Delegations({cohorts_key.keyid: cohorts_key}, {COHORTS: role})
    return Metadata(Targets(version=1, expires=ROLES[TARGETS].expiry(now), delegations=delegations))


def next_targets(current: Metadata[Targets], now: datetime) -> Metadata[Targets]:
    """The targets after `current`: the same, held anew, not yet signed; `current` stays as it is."""
    following = parse_targets(current.to_bytes())
    following.signed.version += 1
    following.signed.expires = ROLES[TARGETS].expiry(now)
    following.signatures.clear()
    return following


def sign(metadata: Metadata[Any], signers: Iterable[Signer]) -> None:
    """Add these signers' signatures, each in place of its own older one; others' stay.

    Raises:
        TrustError: a signer failed.
    """
    for signer in signers:
        try:
            metadata.sign(signer, append=True)
        except UnsignedMetadataError as error:
            raise TrustError(
                "a signature could not be made", why=str(error), reason="no-signature"
            ) from error


# --- checking --------------------------------------------------------------------------------------------


def duplicate_keys(keys: Mapping[str, Key]) -> list[tuple[str, ...]]:
    """Groups of key ids that are one and the same key; TUF would count each of them."""
    ids = defaultdict(list)
    for keyid, key in keys.items():
        ids[key_material(key)].append(keyid)
    return [tuple(group) for group in ids.values() if len(group) > 1]


def check_root(root: Root) -> None:
    """Refuse a root that promises more than it keeps.

    Raises:
        TrustError: one key under two ids, a threshold that its keys cannot meet, an offline role that a key
            of the server may sign, or no consistent snapshots.
    """
    if twice := duplicate_keys(root.keys):
        raise TrustError(
            "the root lists one key under two ids",
            why=f"{' and '.join(keyid[:12] for keyid in twice[0])} are the same key and would count twice",
            reason="duplicate-key",
        )
    for name, role in root.roles.items():
        able = [keyid for keyid in role.keyids if keyid in root.keys]
        if len(able) < role.threshold:
            raise TrustError(
                f"the root's {name} can never be signed",
                why=f"threshold {role.threshold} with {len(able)} usable key(s)",
                reason="bad-threshold",
            )
    offline = {keyid for name in OFFLINE_ROLES for keyid in root.roles[name].keyids}
    online = {keyid for name in (SNAPSHOT, TIMESTAMP) for keyid in root.roles[name].keyids}
    if shared := offline & online:
        raise TrustError(
            "a key of the server may sign for people",
            why=f"{min(shared)[:12]} is in an offline and in an online role",
            reason="shared-key",
        )
    if not root.consistent_snapshot:
        raise TrustError("the root has no consistent snapshots", reason="no-consistent-snapshot")


def check_targets(targets: Targets, root: Root) -> None:
    """Refuse top-level targets whose delegations let anyone else say what may run.

    Raises:
        TrustError: a delegation other than `cohorts`, one that reaches `bundles/`, `deltas/` or `policy/`, or
            a cohorts key that is one of the offline keys, under whatever id.
    """
    delegations = targets.delegations
    roles = dict(delegations.roles or {}) if delegations else {}
    if delegations is None or set(roles) != {COHORTS}:
        named = ", ".join(sorted(roles)) or "nothing"
        raise _bad_delegation(f"targets delegate to {named}, not to {COHORTS} alone")
    role = roles[COHORTS]
    if role.paths is None or not set(role.paths) <= set(COHORT_PATHS) or not role.terminating:
        raise _bad_delegation(f"{COHORTS} reaches further than {', '.join(COHORT_PATHS)}")
    if twice := duplicate_keys(delegations.keys):
        raise _bad_delegation(f"{' and '.join(keyid[:12] for keyid in twice[0])} are the same key")
    if len([keyid for keyid in role.keyids if keyid in delegations.keys]) < role.threshold:
        raise _bad_delegation(f"{COHORTS} can never be signed")
    offline = {
        key_material(root.keys[keyid])
        for name in OFFLINE_ROLES
        for keyid in root.roles[name].keyids
        if keyid in root.keys
    }
    if offline & {key_material(key) for key in delegations.keys.values()}:
        raise _bad_delegation(f"an offline key signs for {COHORTS} as well")
    outside = [path for path in targets.targets if path.split("/")[0] not in RESERVED_PATHS]
    if outside:
        raise _bad_delegation(f"targets list {outside[0]}, which is none of {', '.join(RESERVED_PATHS)}")


def _bad_delegation(why: str) -> TrustError:
    return TrustError("these targets are refused", why=why, reason="bad-delegation")


def verify_root(new: Metadata[Root], current: Metadata[Root] | None = None) -> None:
    """Check a root's own soundness and its signatures.

    Args:
        current: the root it follows, whose keys must have signed it too; None for a first one.

    Raises:
        ConflictError: it is not the version after `current`.
        TrustError: see `check_root`; or signatures are missing.
    """
    check_root(new.signed)
    if current is not None and new.signed.version != current.signed.version + 1:
        raise ConflictError(
            f"root {new.signed.version} does not follow root {current.signed.version}",
            why="root versions go up by one",
            then="fetch the current root and start from it",
        )
    previous = current.signed if current else None
    outcome = new.signed.get_root_verification_result(previous, signed_bytes(new), new.signatures)
    if not outcome:
        missing = max(outcome.first.missing, outcome.second.missing)
        raise TrustError(
            f"root {new.signed.version} is not signed by enough root keys",
            why=f"{missing} more signature(s) are needed",
            then="sign it with the other root keys",
            reason="bad-signature",
        )


def signed_bytes(metadata: Metadata[Any]) -> bytes:
    """What signatures are made over.

    Raises:
        TrustError: there is none: a fraction, or half a surrogate pair, has no canonical form.
    """
    try:
        return metadata.signed_bytes
    except SerializationError as error:
        raise TrustError(
            "nobody can have signed this",
            why=f"it has no canonical form: {error.__cause__ or error}",
            reason="bad-metadata",
        ) from None


def signed_by(root: Root, role: str, metadata: Metadata[Any]) -> dict[str, Key]:
    """The keys of `role` whose signatures over `metadata` are valid, by id; equal keys count once."""
    found = root.get_verification_result(role, signed_bytes(metadata), metadata.signatures).signed
    distinct = {key_material(key): keyid for keyid, key in sorted(found.items(), reverse=True)}
    return {keyid: found[keyid] for keyid in sorted(distinct.values())}


def missing_signatures(root: Root, role: str, metadata: Metadata[Any]) -> int:
    """How many more valid signatures `metadata` needs to be taken for `role`; 0 when it is signed."""
    return max(0, root.roles[role].threshold - len(signed_by(root, role, metadata)))


def parse_root(body: bytes) -> Metadata[Root]:
    """Read a root, trusting nothing in it yet.

    Raises:
        TrustError: these bytes are no root.
    """
    return _parse(body, Root, ROOT)


def parse_targets(body: bytes) -> Metadata[Targets]:
    """Read targets, trusting nothing in them yet.

    Raises:
        TrustError: these bytes are no targets.
    """
    return _parse(body, Targets, TARGETS)


def _parse(body: bytes, kind: type[Any], name: str) -> Metadata[Any]:
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(body)
    except (DeserializationError, RepositoryError) as error:
        raise TrustError(f"this is no {name} metadata", why=str(error), reason="bad-metadata") from None
    if not isinstance(metadata.signed, kind):
        raise TrustError(
            f"this is no {name} metadata", why=f"it is {metadata.signed.type}", reason="bad-metadata"
        )
    return metadata


def export_trust(root: Metadata[Root]) -> bytes:
    """The trust file: the signed root that agents are installed with.

    Raises:
        TrustError: it does not verify under its own keys.
    """
    check_root(root.signed)
    if missing := missing_signatures(root.signed, ROOT, root):
        raise TrustError(
            f"root {root.signed.version} is not signed yet",
            why=f"{missing} more signature(s) are needed",
            reason="bad-signature",
        )
    return root.to_bytes()
