"""The TUF repository: versions of every role as rows, what the server itself says signed, and the files.

Everything is decided in the database, in one transaction each; the files on disk follow it (`export`), in
the order bundles, root, targets, cohorts, snapshot, timestamp, so that a client never finds a name before
what it names (design section 5).
"""

from __future__ import annotations

import fcntl
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from agent_core.clock import iso
from agent_core.errors import ConflictError, MalformedError, RelfleetError, TrustError
from agent_core.wire import Directive, Reason, directive_path
from keys.changes import EMPTY, POLICY
from keys.roles import COHORTS, ONLINE_ROLES, ROLES, ROOT, SNAPSHOT, TARGETS, TIMESTAMP
from release_server.blobs import write_file
from release_server.database import stir
from release_server.models import Cohort, CohortStatus, MetadataFile, Product, Release
from release_server.signing.policy import MOST_FIRST, SIGNED_AT

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy.orm import Session

    from release_server.blobs import Blobs
    from release_server.database import Sessions
    from release_server.signing.client import SignerClient

log = logging.getLogger(__name__)

S = TypeVar("S", Root, Targets, Snapshot, Timestamp)


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


def named_by_newest(session: Session) -> dict[str, int]:
    """The versions that whoever asks now is given: role → version; empty before the first timestamp."""
    timestamp = newest(session, TIMESTAMP)
    if timestamp is None:
        return {}
    number = read(timestamp, Timestamp).signed.snapshot_meta.version
    listed = read(_row(session, SNAPSHOT, number), Snapshot).signed.meta
    named = {role: listed[f"{role}.json"].version for role in (TARGETS, COHORTS)}
    return named | {TIMESTAMP: timestamp.version, SNAPSHOT: number}


def read(row: MetadataFile, kind: type[S]) -> Metadata[S]:
    """A stored row as metadata of its role."""
    metadata = Metadata[S].from_bytes(row.body)
    if not isinstance(metadata.signed, kind):
        raise TypeError(f"{row.role} {row.version} is {metadata.signed.type}")
    return metadata


def _refuse(what: str, why: str, reason: str, then: str = "") -> TrustError:
    return TrustError(what, why=why, reason=reason, then=then)


def store(session: Session, role: str, metadata: Metadata[Any], body: bytes, now: datetime) -> None:
    """Keep one version of a role, byte for byte as it was signed.

    Raises:
        ConflictError: somebody else was faster.
    """
    session.add(
        MetadataFile(
            role=role,
            version=metadata.signed.version,
            body=body,
            expires_at=metadata.signed.expires.replace(tzinfo=UTC),
            created_at=now,
        )
    )
    stir(session)
    try:
        session.flush()
    except IntegrityError as error:
        raise ConflictError(
            f"{role} changed meanwhile", why=f"version {metadata.signed.version} exists", then="push again"
        ) from error


def forget_run_forward(session: Session, role: str) -> None:
    """Drop versions that only a thief can have reached, once his key counts no more: clients do the same."""
    session.execute(delete(MetadataFile).where(MetadataFile.role == role, MetadataFile.version > MOST_FIRST))


# --- publishing ------------------------------------------------------------------------------------------


def publish(session: Session, signer: SignerClient, now: datetime) -> bool:
    """Sign what has changed since the last time, and what is about to expire.

    Args:
        session: of `Sessions.write()`, in the process that holds the jobs lease.
        signer: signs with the online keys, what its policy allows.
        now: when; the timestamp carries it as `x-signed-at`.

    Returns:
        Whether there is a new timestamp to export. Without root or targets there is nothing to publish.

    Raises:
        TrustError: the signer refuses; `reason` says why.
        UnreachableError: the signer is away. Nothing may be committed then.
    """
    root_row, targets_row = newest(session, ROOT), newest(session, TARGETS)
    if root_row is None or targets_row is None:
        return False
    if signer.briefed != (root_row.version, targets_row.version):
        _brief(session, signer, root_row.version, targets_row, now)
        signer.briefed = (root_row.version, targets_row.version)
    root, targets = read(root_row, Root).signed, read(targets_row, Targets).signed
    cohorts_row = _publish_cohorts(session, targets, signer, now)
    snapshot_row = _publish_snapshot(session, root, signer, now, (targets_row, cohorts_row))
    return _publish_timestamp(session, root, signer, now, snapshot_row)


def _brief(session: Session, signer: SignerClient, root: int, targets: MetadataFile, now: datetime) -> None:
    """Show the signer what people have signed since, and settle what it and the database remember.

    A tick that was rolled back leaves signatures that only the signer knows; a restored backup of either
    side leaves it behind the other. The higher version of each role is right: somebody may have seen it.
    """
    known = signer.known()
    for version in range(known.root + 1, root + 1):
        signer.trust(ROOT, _row(session, ROOT, version).body)
    if known.targets < targets.version:
        signer.trust(TARGETS, targets.body)
    known = signer.known()  # it may have put other keys in place
    for role in ONLINE_ROLES:
        row, signed = newest(session, role), known.signed.get(role, 0)
        keyid = known.keys.of(role)[0].keyid
        if row is not None and row.version > signed:
            if keyid in Metadata.from_bytes(row.body).signatures:  # else it is of a key that counts no more
                signer.trust(role, row.body)
        elif signed > (row.version if row else 0) and known.signed_by[role] == keyid:
            body = signer.last(role)
            store(session, role, Metadata.from_bytes(body), body, now)


def _publish_cohorts(session: Session, targets: Targets, signer: SignerClient, now: datetime) -> MetadataFile:
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
    signer: SignerClient,
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
    session: Session, root: Root, signer: SignerClient, now: datetime, snapshot: MetadataFile
) -> bool:
    current = newest(session, TIMESTAMP)
    before = read(current, Timestamp) if current else None
    wanted = _meta(snapshot)
    if before is not None and before.signed.snapshot_meta == wanted and _holds(TIMESTAMP, root, before, now):
        return False
    # After the clock was corrected backward the time that was said last is said again: it never goes back.
    # What a key said that counts no more may be a thief's.
    counts = before is not None and _counts(TIMESTAMP, root, before)
    said = str(before.signed.unrecognized_fields.get(SIGNED_AT, "")) if before and counts else ""
    signed = Timestamp(
        current.version + 1 if current else 1,
        expires=ROLES[TIMESTAMP].expiry(now),
        snapshot_meta=wanted,
        unrecognized_fields={SIGNED_AT: max(iso(now), said)},
    )
    _sign(session, Metadata(signed), root, signer, now)
    return True


def _meta(row: MetadataFile) -> MetaFile:
    return MetaFile(row.version, len(row.body), {"sha256": sha256(row.body).hexdigest()})


def _holds(role: str, delegator: Root | Targets, metadata: Metadata[Any], now: datetime) -> bool:
    """Whether signed metadata can stay: not due, and still signed by the keys that count today."""
    if ROLES[role].is_due(metadata.signed.expires.replace(tzinfo=UTC), now):
        return False
    return _counts(role, delegator, metadata)


def _counts(role: str, delegator: Root | Targets, metadata: Metadata[Any]) -> bool:
    """Whether metadata is signed by the keys that count today."""
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError:
        return False
    return True


def _sign(
    session: Session,
    metadata: Metadata[Any],
    delegator: Root | Targets,
    signer: SignerClient,
    now: datetime,
) -> MetadataFile:
    role: str = COHORTS if isinstance(metadata.signed, Targets) else metadata.signed.type
    body = signer.sign(role, metadata)
    metadata = Metadata.from_bytes(body)
    try:
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError:
        raise _refuse(
            f"{role} cannot be published",
            "the server's key is not the one that is trusted",
            "online-key",
            "restore the signer's keys, or make a new root with today's keys",
        ) from None
    store(session, role, metadata, body, now)
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
        named = named_by_newest(session)
        if not named:
            return False
        timestamp, snapshot, targets, cohorts = (
            _row(session, role, named[role]) for role in (TIMESTAMP, SNAPSHOT, TARGETS, COHORTS)
        )
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


# --- how long it holds -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lifetime:
    """How long one role still holds; the same numbers for `doctor`, metrics and alerts.

    Attributes:
        left: until it expires; negative when it has.
        is_due: it should have been signed anew by now: by the jobs process, or soon by people.
    """

    role: str
    version: int
    expires_at: datetime
    left: timedelta
    is_due: bool

    @property
    def is_expired(self) -> bool:
        return self.left <= timedelta(0)


def lifetimes(session: Session, now: datetime) -> list[Lifetime]:
    """How long the newest version of each role still holds; roles without one are left out."""
    found = {role: newest(session, role) for role in ROLES}
    return [
        Lifetime(
            role, row.version, row.expires_at, row.expires_at - now, ROLES[role].is_late(row.expires_at, now)
        )
        for role, row in found.items()
        if row is not None
    ]
