"""The TUF repository: what release managers signed is checked and taken in, what the server says is signed.

Everything is decided in the database, in one transaction each; the files on disk follow it (`export`), in
the order bundles, root, targets, cohorts, snapshot, timestamp, so that a client never finds a name before
what it names (design section 5).
"""

from __future__ import annotations

import fcntl
import logging
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.api.serialization.json import JSONSerializer

from agent_core.bundle import Index
from agent_core.clock import iso
from agent_core.errors import ConflictError, MalformedError, RelfleetError, TrustError, UsageError
from agent_core.wire import (
    NAME,
    Directive,
    Policy,
    Reason,
    ReleaseFacts,
    bundle_path,
    directive_path,
    index_path,
)
from keys import ceremony
from keys.roles import COHORT_PATHS, COHORTS, ROLES, ROOT, SNAPSHOT, TARGETS, TIMESTAMP
from release_server import audit, releases
from release_server.blobs import write_file
from release_server.models import Bundle, Cohort, CohortStatus, MetadataFile, Product, Release

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from securesystemslib.signer import Key
    from sqlalchemy.orm import Session

    from keys.ceremony import OnlineKeys
    from release_server.blobs import Blobs
    from release_server.database import Sessions
    from release_server.signer import OnlineSigner

log = logging.getLogger(__name__)

S = TypeVar("S", Root, Targets, Snapshot, Timestamp)

SIGNED_AT = "x-signed-at"
EMPTY = sha256(b"").hexdigest()
BUNDLE = re.compile(r"bundles/([^/]+)/([^/]+)/([^/]+)\.tar\.zst")
INDEX = re.compile(r"bundles/([^/]+)/([^/]+)/([^/]+)\.index\.json")
POLICY = re.compile(rf"policy/({NAME.pattern})\.json")
SERIALIZER = JSONSerializer(compact=True)


# --- reading ---------------------------------------------------------------------------------------------


def newest(session: Session, role: str) -> MetadataFile | None:
    """The highest version of a role, published or about to be."""
    return session.scalar(
        select(MetadataFile).where(MetadataFile.role == role).order_by(MetadataFile.version.desc()).limit(1)
    )


def newest_version(session: Session, role: str) -> int:
    """The highest version of a role, 0 before the first."""
    found = session.scalar(select(func.max(MetadataFile.version)).where(MetadataFile.role == role))
    return found or 0


def read(row: MetadataFile, kind: type[S]) -> Metadata[S]:
    """A stored row as metadata of its role."""
    metadata = Metadata[S].from_bytes(row.body)
    if not isinstance(metadata.signed, kind):
        raise TypeError(f"{row.role} {row.version} is {metadata.signed.type}")
    return metadata


def _refuse(what: str, why: str, reason: str, then: str = "") -> TrustError:
    return TrustError(what, why=why, reason=reason, then=then)


def _store(session: Session, role: str, metadata: Metadata[Any], body: bytes, now: datetime) -> None:
    session.add(
        MetadataFile(
            role=role,
            version=metadata.signed.version,
            body=body,
            expires_at=metadata.signed.expires.replace(tzinfo=UTC),
            created_at=now,
        )
    )
    try:
        session.flush()
    except IntegrityError as error:
        raise ConflictError(
            f"{role} changed meanwhile", why=f"version {metadata.signed.version} exists", then="push again"
        ) from error


# --- root ------------------------------------------------------------------------------------------------


def accept_root(session: Session, body: bytes, *, now: datetime, actor: str, online: OnlineKeys) -> int:
    """Take in the first root, or the next one: signed by the old keys and the new, one version up.

    Args:
        session: of `Sessions.write()`.
        body: `root.json` as the ceremony wrote it.
        now: when.
        actor: who sent it.
        online: the server's public keys, which the root must name.

    Returns:
        The version that is trusted now.

    Raises:
        ConflictError: it is not the next version.
        TrustError: `bad-metadata`, `bad-signature`, `expired`, `online-key`; or see `ceremony.check_root`.
    """
    metadata = ceremony.parse_root(body)
    current = newest(session, ROOT)
    _check_next(ROOT, metadata.signed.version, current.version if current else 0)
    ceremony.verify_root(metadata, read(current, Root) if current else None)
    _check_fresh(ROOT, metadata, now)
    for role, key in ((SNAPSHOT, online.snapshot), (TIMESTAMP, online.timestamp)):
        named = metadata.signed.roles[role]
        if list(named.keyids) != [key.keyid] or metadata.signed.keys[key.keyid] != key:
            raise _refuse(
                "the root is refused",
                f"it does not name this server's {role} key, alone",
                "online-key",
                "make it with the keys of `GET /api/v1/trust`",
            )
    _store(session, ROOT, metadata, body, now)
    audit.record(session, now, actor, "trust.root", ROOT, version=metadata.signed.version)
    return metadata.signed.version


def _check_next(role: str, version: int, current: int) -> None:
    if version != current + 1:
        raise ConflictError(
            f"the {role} is not the next version",
            why=f"it is {version}, the server has {current}",
            then="fetch the newest, change that, and send it again",
        )


def _check_fresh(role: str, metadata: Metadata[Any], now: datetime) -> None:
    if metadata.signed.is_expired(now):
        raise _refuse(
            f"the {role} is refused", f"it expired at {iso(metadata.signed.expires)}", Reason.EXPIRED
        )


# --- targets ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listed:
    """One bundle of targets metadata, with what is signed of it."""

    facts: ReleaseFacts
    sha256: str
    length: int


def accept_targets(
    session: Session, blobs: Blobs, body: bytes, *, now: datetime, actor: str, online: OnlineKeys
) -> int:
    """Take in what release managers signed, when every rule of it holds; else nothing of it.

    Args:
        session: of `Sessions.write()`.
        blobs: where the bundles were uploaded to.
        body: `targets.json`.
        now: when.
        actor: who sent it.
        online: the server's public keys; targets must delegate `cohorts` to one of them.

    Returns:
        The version; the jobs process publishes it.

    Raises:
        MalformedError: the facts of a release or a policy do not have their form.
        ConflictError: it is not the next version.
        TrustError: a signature, delegation, path, digest, seq or policy is not allowed; see `reason`.
        UsageError: `no-root`, or `no-blob` when a bundle was not uploaded.
    """
    metadata = ceremony.parse_targets(body)
    root = newest(session, ROOT)
    if root is None:
        raise UsageError(
            "the server trusts no release keys yet",
            why="it has no root",
            then="release key export-trust, then PUT /api/v1/trust/root",
            reason="no-root",
        )
    trusted = read(root, Root).signed
    if missing := ceremony.missing_signatures(trusted, TARGETS, metadata):
        raise _refuse(
            "the targets are refused",
            f"{missing} more signature(s) of release keys are needed",
            Reason.BAD_SIGNATURE,
        )
    current = newest(session, TARGETS)
    _check_next(TARGETS, metadata.signed.version, current.version if current else 0)
    _check_fresh(TARGETS, metadata, now)
    ceremony.check_targets(metadata.signed, trusted)
    _check_delegation(metadata.signed, online.cohorts)
    before = read(current, Targets).signed.targets if current else {}
    listed = _read_listed(metadata.signed.targets)
    _check_kept(before, metadata.signed.targets)
    _check_policies(before, metadata.signed.targets)
    fresh = {path: entry for path, entry in listed.items() if path not in before}
    _check_blobs(blobs, fresh.values())
    _store_releases(session, fresh.values(), now, actor)
    for path, entry in listed.items():
        if path in before and before[path].custom != metadata.signed.targets[path].custom:
            _follow_facts(session, entry.facts)
    _store(session, TARGETS, metadata, body, now)
    audit.record(session, now, actor, "targets.accept", "targets", version=metadata.signed.version)
    return metadata.signed.version


def _check_delegation(targets: Targets, online: Key) -> None:
    """`ceremony.check_targets` has seen that `cohorts` is the only role; it must be this server's, too."""
    delegations = targets.delegations
    role = delegations.roles[COHORTS] if delegations and delegations.roles else None
    if (
        delegations is None
        or role is None
        or delegations.keys != {online.keyid: online}
        or (list(role.keyids), role.threshold) != ([online.keyid], 1)
        or tuple(role.paths or ()) != COHORT_PATHS
    ):
        raise _refuse(
            "the targets are refused",
            f"they do not delegate {', '.join(COHORT_PATHS)} to this server's key, alone",
            Reason.BAD_DELEGATION,
        )


def _read_listed(targets: Mapping[str, TargetFile]) -> dict[str, Listed]:
    """The bundles of targets metadata by path; every other path must be an index or a policy."""
    listed = {}
    indexes = set()
    for path, target in targets.items():
        if set(target.hashes) != {"sha256"}:
            raise _refuse(f"{path} is refused", "its hashes must be sha256, alone", Reason.BAD_METADATA)
        if BUNDLE.fullmatch(path):
            listed[path] = _read_bundle(path, target, targets)
            facts = listed[path].facts
            indexes.add(index_path(facts.product, facts.version, facts.platform))
        elif not INDEX.fullmatch(path) and not POLICY.fullmatch(path):
            raise _refuse(
                f"{path} is refused", "top-level targets hold bundles and policies", Reason.BAD_METADATA
            )
    for path in targets:
        if INDEX.fullmatch(path) and path not in indexes:
            raise _refuse(f"{path} is refused", "it belongs to no bundle", Reason.BAD_METADATA)
    return listed


def _read_bundle(path: str, target: TargetFile, targets: Mapping[str, TargetFile]) -> Listed:
    facts = ReleaseFacts.from_json(target.custom, path)
    if bundle_path(facts.product, facts.version, facts.platform) != path:
        raise _refuse(
            f"{path} is refused",
            f"its facts are of {facts.product} {facts.version} for {facts.platform}",
            "wrong-path",
        )
    index = targets.get(index_path(facts.product, facts.version, facts.platform))
    if index is None:
        raise _refuse(f"{path} is refused", "its index is not listed", Reason.BAD_INDEX)
    if (index.hashes.get("sha256"), index.length) != (facts.index_sha256, facts.index_length):
        raise _refuse(f"{path} is refused", "its facts name another index", Reason.BAD_INDEX)
    return Listed(facts, target.hashes["sha256"], target.length)


def _check_kept(before: Mapping[str, TargetFile], after: Mapping[str, TargetFile]) -> None:
    """What was published stays, byte for byte and fact for fact; only its gates and notes may change."""
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


def _lasting(target: TargetFile) -> ReleaseFacts:
    return replace(ReleaseFacts.from_json(target.custom), gates=(), notes="")


def _check_policies(before: Mapping[str, TargetFile], after: Mapping[str, TargetFile]) -> None:
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


def _check_blobs(blobs: Blobs, fresh: Iterable[Listed]) -> None:
    for entry in fresh:
        facts = entry.facts
        name = f"{facts.product} {facts.version} for {facts.platform}"
        _check_blob(blobs, entry.sha256, entry.length, f"the bundle of {name}")
        _check_blob(blobs, facts.index_sha256, facts.index_length, f"the index of {name}")
        index = Index.from_bytes(blobs.path(facts.index_sha256).read_bytes())
        if (index.product, index.version, index.platform) != (facts.product, facts.version, facts.platform):
            raise _refuse(
                f"the index of {name} is refused",
                f"it is of {index.product} {index.version} for {index.platform}",
                Reason.BAD_INDEX,
            )


def _check_blob(blobs: Blobs, digest: str, length: int, what: str) -> None:
    found = blobs.length(digest)
    if found is None:
        raise UsageError(
            f"{what} was not uploaded", why=f"there is no {digest[:12]}…", then="push again", reason="no-blob"
        )
    if found != length:
        raise _refuse(f"{what} is refused", f"it has {found} bytes, not {length}", Reason.LENGTH_MISMATCH)


def _store_releases(session: Session, fresh: Iterable[Listed], now: datetime, actor: str) -> None:
    for entry in sorted(fresh, key=lambda entry: entry.facts.seq):
        facts = entry.facts
        product = releases.ensure_product(session, facts.product, now, actor)
        release = releases.find_release(session, product, facts.version)
        if release is None:
            release = _add_release(session, product, facts, now, actor)
        elif release.seq != facts.seq:
            raise _refuse(
                f"{facts.product} {facts.version} for {facts.platform} is refused",
                f"the version has seq {release.seq}, not {facts.seq}",
                "seq",
            )
        _add_bundle(session, release, entry)


def _add_release(
    session: Session, product: Product, facts: ReleaseFacts, now: datetime, actor: str
) -> Release:
    highest = session.scalar(select(func.max(Release.seq)).where(Release.product_id == product.id)) or 0
    if facts.seq <= highest:
        raise _refuse(
            f"{facts.product} {facts.version} is refused",
            f"its seq {facts.seq} is not above {highest}",
            "seq",
            "build it again with a higher seq",
        )
    release = Release(
        product=product,
        version=facts.version,
        seq=facts.seq,
        notes=facts.notes,
        published_at=now,
        published_by=actor,
    )
    session.add(release)
    session.flush()
    audit.record(session, now, actor, "release.publish", f"{product.name}/{facts.version}", seq=facts.seq)
    return release


def _add_bundle(session: Session, release: Release, entry: Listed) -> None:
    session.add(
        Bundle(
            release=release,
            platform=entry.facts.platform,
            sha256=entry.sha256,
            length=entry.length,
            unpacked=entry.facts.unpacked,
            facts=entry.facts.to_json(),
        )
    )


def _follow_facts(session: Session, facts: ReleaseFacts) -> None:
    release = releases.get_release(session, facts.product, facts.version)
    release.notes = facts.notes
    for bundle in release.bundles:
        if bundle.platform == facts.platform:
            bundle.facts = facts.to_json()


# --- publishing ------------------------------------------------------------------------------------------


def publish(session: Session, signer: OnlineSigner, now: datetime) -> bool:
    """Sign what has changed since the last time, and what is about to expire.

    Args:
        session: of `Sessions.write()`, in the process that holds the jobs lease.
        signer: the online keys.
        now: when; the timestamp carries it as `x-signed-at`.

    Returns:
        Whether there is a new timestamp to export. Without root or targets there is nothing to publish.

    Raises:
        TrustError: `online-key`; the root or the targets name other online keys than the server has.
    """
    root_row, targets_row = newest(session, ROOT), newest(session, TARGETS)
    if root_row is None or targets_row is None:
        return False
    root, targets = read(root_row, Root).signed, read(targets_row, Targets).signed
    cohorts_row = _publish_cohorts(session, targets, signer, now)
    snapshot_row = _publish_snapshot(session, root, signer, now, (targets_row, cohorts_row))
    return _publish_timestamp(session, root, signer, now, snapshot_row)


def _publish_cohorts(session: Session, targets: Targets, signer: OnlineSigner, now: datetime) -> MetadataFile:
    current = newest(session, COHORTS)
    before = read(current, Targets) if current else None
    wanted = _directive_targets(session, before.signed.targets if before else {})
    unchanged = before is not None and before.signed.targets == wanted
    if current is not None and before is not None and unchanged and _holds(COHORTS, targets, before, now):
        return current
    version = current.version + 1 if current else 1
    signed = Targets(version, expires=ROLES[COHORTS].expiry(now), targets=wanted)
    return _sign(session, Metadata(signed), targets, signer, now)


def _directive_targets(session: Session, before: Mapping[str, TargetFile]) -> dict[str, TargetFile]:
    """The directives of all cohorts as targets; one that does not fit keeps its last good word."""
    rows = session.execute(
        select(Product.name, Cohort.name, CohortStatus.directive)
        .join(Cohort, Cohort.product_id == Product.id)
        .join(CohortStatus, CohortStatus.cohort_id == Cohort.id)
        .where(Cohort.deleted_at.is_(None))
        .order_by(Product.name, Cohort.name)
    )
    wanted = {}
    for product, cohort, directive in rows:
        if directive is None:
            continue
        path = directive_path(product, cohort)
        try:
            _check_directive(session, product, cohort, directive)
        except RelfleetError as error:
            log.error("a directive is not fit to be signed", extra={"path": path, "why": str(error)})  # noqa: TRY400 - the cause is the text
            if path in before:
                wanted[path] = before[path]
            continue
        wanted[path] = TargetFile(0, {"sha256": EMPTY}, path, {"custom": directive})
    return wanted


def _check_directive(session: Session, product: str, cohort: str, custom: object) -> None:
    directive = Directive.from_json(custom)
    if (directive.product, directive.cohort) != (product, cohort):
        raise MalformedError("the directive is another cohort's", reason=Reason.BAD_DIRECTIVE)
    for version in {directive.release, directive.base} - {None}:
        named = session.scalar(
            select(Release.id).join(Product).where(Product.name == product, Release.version == version)
        )
        if named is None:
            raise MalformedError(
                "the directive names no verified release", why=f"{version}", reason=Reason.BAD_DIRECTIVE
            )


def _publish_snapshot(
    session: Session,
    root: Root,
    signer: OnlineSigner,
    now: datetime,
    rows: tuple[MetadataFile, MetadataFile],
) -> MetadataFile:
    current = newest(session, SNAPSHOT)
    before = read(current, Snapshot) if current else None
    wanted = {f"{row.role}.json": _meta(row) for row in rows}
    unchanged = before is not None and before.signed.meta == wanted
    if current is not None and before is not None and unchanged and _holds(SNAPSHOT, root, before, now):
        return current
    version = current.version + 1 if current else 1
    signed = Snapshot(version, expires=ROLES[SNAPSHOT].expiry(now), meta=wanted)
    return _sign(session, Metadata(signed), root, signer, now)


def _publish_timestamp(
    session: Session, root: Root, signer: OnlineSigner, now: datetime, snapshot: MetadataFile
) -> bool:
    current = newest(session, TIMESTAMP)
    before = read(current, Timestamp) if current else None
    wanted = _meta(snapshot)
    if before is not None and before.signed.snapshot_meta == wanted and _holds(TIMESTAMP, root, before, now):
        return False
    signed = Timestamp(
        current.version + 1 if current else 1,
        expires=ROLES[TIMESTAMP].expiry(now),
        snapshot_meta=wanted,
        unrecognized_fields={SIGNED_AT: iso(now)},
    )
    _sign(session, Metadata(signed), root, signer, now)
    return True


def _meta(row: MetadataFile) -> MetaFile:
    return MetaFile(row.version, len(row.body), {"sha256": sha256(row.body).hexdigest()})


def _holds(role: str, delegator: Root | Targets, metadata: Metadata[Any], now: datetime) -> bool:
    """Whether signed metadata can stay: not due, and still signed by the keys that count today."""
    if ROLES[role].is_due(metadata.signed.expires.replace(tzinfo=UTC), now):
        return False
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError:
        return False
    return True


def _sign(
    session: Session,
    metadata: Metadata[Any],
    delegator: Root | Targets,
    signer: OnlineSigner,
    now: datetime,
) -> MetadataFile:
    role: str = COHORTS if isinstance(metadata.signed, Targets) else metadata.signed.type
    signer.sign(role, metadata)
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError:
        raise _refuse(
            f"{role} cannot be published",
            "the server's key is not the one that is trusted",
            "online-key",
            "restore keys/ of the data directory, or make a new root with today's keys",
        ) from None
    body = metadata.to_bytes(SERIALIZER)
    _store(session, role, metadata, body, now)
    row = newest(session, role)
    if row is None:
        raise RuntimeError("a row that was just flushed is gone")
    return row


# --- files -----------------------------------------------------------------------------------------------


def export(sessions: Sessions, blobs: Blobs, directory: Path) -> bool:
    """Make the files follow the database: what is missing is written, `timestamp.json` last.

    Idempotent; run at start as well, so that a crash between commit and export heals. The lock and the
    transaction that begins under it keep a slower process from putting an older timestamp back.

    Args:
        directory: `repository/`, with `metadata/` and `targets/` inside.

    Returns:
        Whether `timestamp.json` changed.
    """
    metadata = directory / "metadata"
    metadata.mkdir(parents=True, exist_ok=True)
    with _alone(directory), sessions.read() as session:
        _export_roots(session, metadata)
        timestamp = newest(session, TIMESTAMP)
        if timestamp is None:
            return False
        snapshot = _row(session, SNAPSHOT, read(timestamp, Timestamp).signed.snapshot_meta.version)
        listed = read(snapshot, Snapshot).signed.meta
        targets = _row(session, TARGETS, listed[f"{TARGETS}.json"].version)
        cohorts = _row(session, COHORTS, listed[f"{COHORTS}.json"].version)
        if not (metadata / f"{targets.version}.{TARGETS}.json").exists():
            _export_bundles(read(targets, Targets).signed, blobs, directory / "targets")
        for row in (targets, cohorts, snapshot):
            _write_missing(metadata / f"{row.version}.{row.role}.json", row.body)
        return _replace(metadata / f"{TIMESTAMP}.json", timestamp.body)


def restore_bundles(sessions: Sessions, blobs: Blobs, directory: Path) -> None:
    """Put back published bundles that are missing from `targets/`; run once at start."""
    with _alone(directory), sessions.read() as session:
        row = newest(session, TARGETS)
        if row is not None:
            _export_bundles(read(row, Targets).signed, blobs, directory / "targets")


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _row(session: Session, role: str, version: int) -> MetadataFile:
    return session.get_one(MetadataFile, (role, version))


def _export_roots(session: Session, metadata: Path) -> None:
    version = newest_version(session, ROOT)
    missing = []
    while version > 0 and not (metadata / f"{version}.{ROOT}.json").exists():
        missing.append(version)
        version -= 1
    for version in reversed(missing):
        _write_missing(metadata / f"{version}.{ROOT}.json", _row(session, ROOT, version).body)


def _export_bundles(targets: Targets, blobs: Blobs, directory: Path) -> None:
    for path, target in targets.targets.items():
        if POLICY.fullmatch(path):
            continue  # a policy's meaning is in the metadata; nobody fetches its empty content
        digest = target.hashes["sha256"]
        folder, _, name = path.rpartition("/")
        blobs.link(digest, directory / folder / f"{digest}.{name}")


def _write_missing(place: Path, body: bytes) -> None:
    if not place.exists():
        write_file(place, body)


def _replace(place: Path, body: bytes) -> bool:
    try:
        if place.read_bytes() == body:
            return False
    except FileNotFoundError:
        pass
    write_file(place, body)
    return True


def expiries(session: Session) -> dict[str, datetime]:
    """When the newest version of each role expires."""
    found = {role: newest(session, role) for role in ROLES}
    return {role: row.expires_at for role, row in found.items() if row is not None}
