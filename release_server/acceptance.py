"""What the server takes in of what people signed: the next root and the next targets, or nothing of them.

Each rule is checked here again, whatever the sender's tools have checked. A deed is one transaction; the jobs
process publishes it (`repository.publish`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tuf.api.metadata import Metadata, Root, Targets

from agent_core.bundle import Index
from agent_core.clock import iso
from agent_core.errors import TrustError, UsageError
from agent_core.wire import Reason, ReleaseFacts
from keys import ceremony, changes
from keys.roles import COHORT_PATHS, COHORTS, ROOT, SNAPSHOT, TARGETS, TIMESTAMP
from release_server import audit, releases
from release_server.models import Bundle, Product, Release
from release_server.repository import forget_run_forward, newest, read, store
from release_server.webhooks import events, outbox

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from securesystemslib.signer import Key
    from sqlalchemy.orm import Session

    from keys.ceremony import OnlineKeys
    from keys.changes import Listed
    from release_server.blobs import Blobs


def _refuse(what: str, why: str, reason: str, then: str = "") -> TrustError:
    return TrustError(what, why=why, reason=reason, then=then)


# --- root ------------------------------------------------------------------------------------------------


def accept_root(
    session: Session,
    body: bytes,
    *,
    now: datetime,
    actor: str,
    online: OnlineKeys,
    with_targets: bool = False,
) -> int:
    """Take in the first root, or the next one: signed by the old keys and the new, one version up.

    Args:
        session: of `Sessions.write()`.
        body: `root.json` as the ceremony wrote it.
        now: when.
        actor: who sent it.
        online: the server's public keys, which the root must name.
        with_targets: targets that the new root's keys signed follow in the same transaction.

    Returns:
        The version that is trusted now.

    Raises:
        ConflictError: it is not the next version.
        TrustError: `bad-metadata`, `bad-signature`, `expired`, `online-key`; or see `ceremony.check_root`.
            `unsigned-targets`, when nobody could verify the current targets any more.
    """
    metadata = ceremony.parse_root(body)
    current = newest(session, ROOT)
    changes.check_version(ROOT, current.version if current else 0, metadata.signed.version)
    ceremony.verify_root(metadata, read(current, Root) if current else None)
    _check_fresh(ROOT, metadata, now)
    for role in (SNAPSHOT, TIMESTAMP):
        named = [metadata.signed.keys[keyid] for keyid in metadata.signed.roles[role].keyids]
        if named not in [[key] for key in online.of(role)]:
            raise _refuse(
                "the root is refused",
                f"it does not name this server's {role} key, alone",
                "online-key",
                "make it with the keys of `GET /api/v1/trust`",
            )
    if not with_targets:
        _check_targets_stay(session, metadata.signed)
    store(session, ROOT, metadata, body, now)
    before = read(current, Root).signed if current else metadata.signed
    for role in (SNAPSHOT, TIMESTAMP):
        if before.roles[role].keyids != metadata.signed.roles[role].keyids:
            forget_run_forward(session, role)
    audit.record(session, now, actor, "trust.root", ROOT, version=metadata.signed.version)
    return metadata.signed.version


def accept_ceremony(
    session: Session,
    blobs: Blobs,
    root: bytes,
    targets: bytes,
    *,
    now: datetime,
    actor: str,
    online: OnlineKeys,
) -> tuple[int, int]:
    """Take in a root and the targets that its release keys signed, both or neither; their versions.

    Raises:
        ConflictError, TrustError, MalformedError, UsageError: see `accept_root` and `accept_targets`.
    """
    how: dict[str, Any] = {"now": now, "actor": actor, "online": online}
    return (
        accept_root(session, root, with_targets=True, **how),
        accept_targets(session, blobs, targets, **how),
    )


def _check_targets_stay(session: Session, root: Root) -> None:
    row = newest(session, TARGETS)
    if row is not None and ceremony.missing_signatures(root, TARGETS, read(row, Targets)):
        raise _refuse(
            "the root is refused",
            "its release keys have not signed the current targets, so nobody could verify them",
            "unsigned-targets",
            "send it together with targets that they have signed: release key publish FILE",
        )


def _check_fresh(role: str, metadata: Metadata[Any], now: datetime) -> None:
    if metadata.signed.is_expired(now):
        raise _refuse(
            f"the {role} is refused", f"it expired at {iso(metadata.signed.expires)}", Reason.EXPIRED
        )


# --- targets ---------------------------------------------------------------------------------------------


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
    if missing := ceremony.missing_signatures(trusted_root(session), TARGETS, metadata):
        raise _refuse(
            "the targets are refused",
            f"{missing} more signature(s) of release keys are needed",
            Reason.BAD_SIGNATURE,
        )
    fresh = check_targets(session, blobs, metadata.signed, now=now, online=online)
    before = current_targets(session)
    _store_releases(session, fresh, now, actor)
    for path, entry in changes.read_listed(metadata.signed.targets).items():
        old = before.targets.get(path) if before else None
        if old is not None and old.custom != metadata.signed.targets[path].custom:
            _follow_facts(session, entry.facts)
    store(session, TARGETS, metadata, body, now)
    if before and _delegated(before) != _delegated(metadata.signed):
        forget_run_forward(session, COHORTS)
    audit.record(session, now, actor, "targets.accept", "targets", version=metadata.signed.version)
    return metadata.signed.version


def check_targets(
    session: Session, blobs: Blobs, targets: Targets, *, now: datetime, online: OnlineKeys
) -> list[Listed]:
    """Hold proposed targets to every rule but the number of their signatures; the bundles that are new.

    Raises:
        MalformedError, ConflictError, TrustError, UsageError: see `accept_targets`.
    """
    root, before = trusted_root(session), current_targets(session)
    changes.check_version(TARGETS, before.version if before else 0, targets.version)
    ceremony.check_targets(targets, root)
    _check_delegation(targets, online.of(COHORTS))
    fresh = changes.check_successor(before, targets, now)
    _check_blobs(blobs, fresh)
    _check_deltas(blobs, targets, before)
    return fresh


def trusted_root(session: Session) -> Root:
    """The newest root.

    Raises:
        UsageError: `no-root`.
    """
    row = newest(session, ROOT)
    if row is None:
        raise UsageError(
            "the server trusts no release keys yet",
            why="it has no root",
            then="release key export-trust, then PUT /api/v1/trust/root",
            reason="no-root",
        )
    return read(row, Root).signed


def current_targets(session: Session) -> Targets | None:
    """The newest targets, published or about to be; None before the first."""
    row = newest(session, TARGETS)
    return read(row, Targets).signed if row else None


def _delegated(targets: Targets) -> set[str]:
    return set(targets.delegations.keys) if targets.delegations else set()


def _check_delegation(targets: Targets, online: list[Key]) -> None:
    """`ceremony.check_targets` has seen that `cohorts` is the only role; it must be this server's, too."""
    delegations = targets.delegations
    role = delegations.roles[COHORTS] if delegations and delegations.roles else None
    if (
        delegations is None
        or role is None
        or delegations.keys not in [{key.keyid: key} for key in online]
        or (list(role.keyids), role.threshold) != (list(delegations.keys), 1)
        or tuple(role.paths or ()) != COHORT_PATHS
    ):
        raise _refuse(
            "the targets are refused",
            f"they do not delegate {', '.join(COHORT_PATHS)} to this server's key, alone",
            Reason.BAD_DELEGATION,
        )


def _check_blobs(blobs: Blobs, fresh: Iterable[Listed]) -> None:
    for entry in fresh:
        facts, name = entry.facts, entry.name
        _check_blob(blobs, entry.sha256, entry.length, f"the bundle of {name}")
        _check_blob(blobs, facts.index_sha256, facts.index_length, f"the index of {name}")
        index = Index.from_bytes(blobs.path(facts.index_sha256).read_bytes())
        if (index.product, index.version, index.platform) != (facts.product, facts.version, facts.platform):
            raise _refuse(
                f"the index of {name} is refused",
                f"it is of {index.product} {index.version} for {index.platform}",
                Reason.BAD_INDEX,
            )


def _check_deltas(blobs: Blobs, targets: Targets, before: Targets | None) -> None:
    """A delta must be there and fit its facts; what it makes is proved by each device that applies it."""
    files = targets.targets
    for path, entry in changes.read_deltas(files, changes.read_listed(files)).items():
        if before is None or path not in before.targets:
            _check_blob(blobs, entry.sha256, entry.length, f"the delta of {entry.name}")


def _check_blob(blobs: Blobs, digest: str, length: int, what: str) -> None:
    found = blobs.length(digest)
    if found is None:
        raise UsageError(
            f"{what} was not uploaded", why=f"there is no {digest[:12]}…", then="push again", reason="no-blob"
        )
    if found != length:
        raise _refuse(f"{what} is refused", f"it has {found} bytes, not {length}", Reason.LENGTH_MISMATCH)


# --- the rows that follow --------------------------------------------------------------------------------


def _store_releases(session: Session, fresh: Iterable[Listed], now: datetime, actor: str) -> None:
    for entry in sorted(fresh, key=lambda entry: entry.facts.seq):
        facts = entry.facts
        product = releases.ensure_product(session, facts.product, now, actor)
        release = releases.find_release(session, product, facts.version)
        _add_bundle(session, release or _add_release(session, product, facts, now, actor), entry)


def _add_release(
    session: Session, product: Product, facts: ReleaseFacts, now: datetime, actor: str
) -> Release:
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
    said = {"version": facts.version, "seq": facts.seq, "actor": actor}
    outbox.tell(session, now, events.RELEASE_PUBLISHED, product.name, **said)
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
