"""What the release keys and the cohorts key say: TUF's client workflow plus the checks of design section 2.

Loaded in the short-lived checker only. Nothing here is trusted because a server said it: bundles and policy
are looked up in top-level targets alone, the directive in the delegated role `cohorts` alone, at paths built
here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from contextlib import contextmanager
from datetime import datetime, timedelta
from fnmatch import fnmatchcase
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Self, TypeVar

import agent_core.late_signers  # noqa: F401 - before tuf
import updater.without_urllib3  # noqa: F401 - before tuf

# isort: split
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, TargetFile, Targets, Timestamp
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from agent_core import clock, disk, layout, wire
from agent_core.errors import ConflictError, DiskError, MalformedError, TrustError, UnreachableError
from agent_core.late import late_dataclass
from agent_core.wire import Reason
from updater.download import hashed_path
from updater.freshness import TIMESTAMP_MAX, Memory, trusted_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from securesystemslib.signer import Key

    from updater.transport import Answer, Origin

LIMITS = UpdaterConfig(
    max_root_rotations=64,
    max_delegations=4,
    root_max_length=256 * 1024,
    timestamp_max_length=TIMESTAMP_MAX,
    snapshot_max_length=256 * 1024,
    targets_max_length=16 * 1024 * 1024,
    app_user_agent="relfleet",
)
METADATA_MAX = 16 * 1024 * 1024
"""Also for lengths that signed metadata announces: an online key may not ask for a download without end."""
COHORTS = "cohorts"
RELEASE_DIRECTORIES = ("bundles", "deltas", "policy")
SIGNED_AT = "x-signed-at"
MAX_CLOCK_STEP = timedelta(days=7)
METADATA_DEADLINE_S = 120.0
LOCK_WAIT_S = 20.0

T = TypeVar("T")


@late_dataclass(frozen=True)
class Verified:
    """What one full refresh established.

    Attributes:
        signed_at: the timestamp's own signed time, None when it carries none.
        expires: of each role, by name.
        earliest_expiry: the first of them.
        high_water: the highest signed time seen, to persist and to give to the next refresh.
        time_keys: ids of the timestamp keys that may have said it, to persist and give as well.
        etag: the server's, of exactly the timestamp that was verified; empty when it gave none.
        refreshed_at: the wall clock of the caller.
    """

    timestamp_version: int
    timestamp_sha256: str
    signed_at: datetime | None
    root_version: int
    targets_version: int
    expires: Mapping[str, datetime]
    earliest_expiry: datetime
    high_water: datetime | None
    time_keys: tuple[str, ...]
    etag: str
    refreshed_at: datetime

    def memory(self, boot_s: float, boot_id: str) -> Memory:
        """What the resident agent has to remember of this refresh."""
        return Memory(
            etag=self.etag,
            timestamp_sha256=self.timestamp_sha256,
            earliest_expiry=self.earliest_expiry,
            refreshed_at=self.refreshed_at,
            refreshed_boot_s=boot_s,
            boot_id=boot_id,
            high_water=self.high_water,
            time_keys=self.time_keys,
        )


@late_dataclass(frozen=True)
class Release:
    """One release for one platform of this host, as the release managers signed it."""

    facts: wire.ReleaseFacts
    platform: str
    path: str
    sha256: str
    length: int
    index_path: str
    index_sha256: str
    index_length: int

    @property
    def archive_url(self) -> str:
        """Where the archive is published, for `download.fetch`."""
        return hashed_path(self.path, self.sha256)

    @property
    def index_url(self) -> str:
        """Where the index is published, for `download.fetch_small`."""
        return hashed_path(self.index_path, self.index_sha256)


@late_dataclass(frozen=True)
class Delta:
    """What makes a release's bundle of another one, as the release managers signed it."""

    from_version: str
    path: str
    sha256: str
    length: int

    @property
    def url(self) -> str:
        """Where it is published, for `download.fetch`."""
        return hashed_path(self.path, self.sha256)


class Catalog:
    """The verified metadata of one repository, for one product; hold it with `with`, it locks its directory.

    Args:
        metadata_dir: TUF's cache (`state/tuf`), this catalog's alone.
        transport: of the server that publishes `/metadata/…`, or a file in its place.
        product: whose releases and directives are looked up.
        bootstrap_root: the root this agent was installed with, never one that came later.
    """

    def __init__(self, metadata_dir: Path, transport: Origin, product: str, bootstrap_root: bytes) -> None:
        self._dir = metadata_dir
        self._transport = transport
        self._product = product
        self._bootstrap = bootstrap_root
        self._lock: int | None = None
        self._client: _Client | None = None

    def __enter__(self) -> Self:
        self._lock = _lock(self._dir, LOCK_WAIT_S)
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def refresh(
        self, now: datetime, high_water: datetime | None, time_keys: tuple[str, ...] = ()
    ) -> Verified:
        """Fetch and verify everything that changed; the lookups below then answer from it.

        Args:
            now: wall clock.
            high_water: the highest signed time that an earlier refresh returned, None before any.
            time_keys: the keys that it returned with it; where a newer root has taken one of them away, the
                time they said is forgotten, as the versions are.

        Raises:
            TrustError: with one `Reason` that says what is wrong; the cache keeps what was good before.
            UnreachableError: the server is away or overloaded, or has no such file.
            DiskError: the cache cannot be written.
        """
        if self._lock is None:
            raise RuntimeError("a catalog is refreshed inside its `with` block")
        self._client = None
        with sorted_errors():
            client = self._refreshed(now, Memory(high_water=high_water, time_keys=time_keys))
            _check_delegations(client.targets)
            verified = self._verified(client, client.cohorts(), now)
        self._client = client
        return verified

    def take(
        self,
        now: datetime,
        high_water: datetime | None,
        kept: bytes | None = None,
        time_keys: tuple[str, ...] = (),
    ) -> bytes:
        """Verify the root chain and the targets of an origin that has neither timestamp nor snapshot: a file.

        What the release keys say is asked for whole (full threshold, not expired, not older than any targets
        known here); what the online keys add, that nothing newer exists, nobody can say offline. Newer roots
        are kept, as always. Nothing else of the cache changes. The lookups below then answer from it.

        Args:
            now: wall clock.
            high_water: the highest signed time seen.
            kept: the targets that the last file brought, if any.
            time_keys: as of `refresh`.

        Returns:
            The verified targets, to be kept.

        Raises:
            TrustError, UnreachableError, DiskError: as of `refresh`.
        """
        if self._lock is None:
            raise RuntimeError("a catalog is asked inside its `with` block")
        self._client = None
        with sorted_errors():
            memory = Memory(high_water=high_water, time_keys=time_keys)
            client = _Client(self._dir, _Fetcher(self._transport), self._bootstrap, memory, now)
            targets = client.take_targets(kept)
            _check_delegations(client.targets)
        self._client = client
        return targets

    def directive(self, cohort: str) -> wire.Directive | None:
        """The directive of `cohort`, None when there is none.

        Raises:
            TrustError: `bad-directive`, when it is malformed or speaks of another product or cohort.
        """
        with sorted_errors():
            client = self._verified_client()
            path = wire.directive_path(self._product, cohort)
            cohorts = client.cohorts() if client.delegates_to_cohorts(path) else None
        target = cohorts.targets.get(path) if cohorts else None
        if target is None:
            return None
        directive = _read(target, path, wire.Directive.from_json, Reason.BAD_DIRECTIVE)
        if (directive.product, directive.cohort) != (self._product, cohort):
            why = f"{path} speaks of {directive.product}/{directive.cohort}"
            raise _refused(Reason.BAD_DIRECTIVE, why)
        return directive

    def policy(self, kept: bytes | None = None) -> wire.Policy:
        """Floor and revocations; no policy signed means none of either.

        Args:
            kept: targets that a file brought. Where they are newer than the server's, what they forbid is
                forbidden too: a server that is held back, or frozen, does not bring it back.
        """
        client = self._verified_client()
        policy = self._policy_in(client.targets)
        newer = client.newer_than(kept, client.targets.version) if kept else None
        if newer is None:
            return policy
        other = self._policy_in(newer)
        revoked = tuple(sorted({*policy.revoked_seq, *other.revoked_seq}))
        return wire.Policy(max(policy.floor_seq, other.floor_seq), revoked)

    def _policy_in(self, targets: Targets) -> wire.Policy:
        path = wire.policy_path(self._product)
        target = targets.targets.get(path)
        return _read(target, path, wire.Policy.from_json, Reason.BAD_METADATA) if target else wire.Policy()

    def release(self, version: str, platforms: list[str]) -> Release | None:
        """The release's bundle for the first of `platforms` that has one, None when none has.

        Raises:
            TrustError: `bad-metadata`, when what is signed contradicts itself.
        """
        targets = self._verified_client().targets.targets
        for platform in platforms:
            path = wire.bundle_path(self._product, version, platform)
            if target := targets.get(path):
                index_path = wire.index_path(self._product, version, platform)
                return self._release(version, platform, target, targets.get(index_path))
        return None

    def _release(self, version: str, platform: str, target: TargetFile, index: TargetFile | None) -> Release:
        path = wire.bundle_path(self._product, version, platform)
        index_path = wire.index_path(self._product, version, platform)
        facts = _read(target, path, wire.ReleaseFacts.from_json, Reason.BAD_METADATA)
        if (facts.product, facts.version, facts.platform) != (self._product, version, platform):
            raise _refused(
                Reason.BAD_METADATA, f"{path} is signed as {facts.product} {facts.version} {facts.platform}"
            )
        signed_index = (facts.index_sha256, facts.index_length)
        if index is None or (_sha256_of(index, index_path), index.length) != signed_index:
            raise _refused(Reason.BAD_METADATA, f"{index_path} is not the index that {path} names")
        return Release(
            facts=facts,
            platform=platform,
            path=path,
            sha256=_sha256_of(target, path),
            length=target.length,
            index_path=index_path,
            index_sha256=facts.index_sha256,
            index_length=facts.index_length,
        )

    def delta(self, release: Release, from_sha256: str) -> Delta | None:
        """What makes this release of the bundle with that index, None when nothing was signed that does.

        Raises:
            TrustError: `bad-metadata`, when what is signed contradicts itself.
        """
        path = wire.delta_path(self._product, release.facts.version, release.platform, from_sha256)
        target = self._verified_client().targets.targets.get(path)
        if target is None:
            return None
        facts = _read(target, path, wire.DeltaFacts.from_json, Reason.BAD_METADATA)
        if (facts.from_sha256, facts.to_sha256) != (from_sha256, release.index_sha256):
            raise _refused(Reason.BAD_METADATA, f"{path} is signed as something else")
        return Delta(facts.from_version, path, _sha256_of(target, path), target.length)

    def _refreshed(self, now: datetime, memory: Memory) -> _Client:
        try:
            return self._refreshed_once(now, memory)
        except tuf_errors.UnsignedMetadataError:
            # Signers may have rotated after our look at the root and before the timestamp; once.
            return self._refreshed_once(now, memory)

    def _refreshed_once(self, now: datetime, memory: Memory) -> _Client:
        fetcher = _Fetcher(self._transport)
        client = _Client(self._dir, fetcher, self._bootstrap, memory, now)
        client.refresh()
        return client

    def _verified_client(self) -> _Client:
        if self._client is None:
            raise RuntimeError("a catalog is asked only after its refresh")
        return self._client

    def _verified(self, client: _Client, cohorts: Targets | None, now: datetime) -> Verified:
        trusted = client.trusted
        expires = {role.type: role.expires for role in (trusted.root, trusted.timestamp, trusted.snapshot)}
        expires["targets"] = trusted.targets.expires
        if cohorts:
            expires[COHORTS] = cohorts.expires
        earliest = min(expires, key=expires.__getitem__)
        signed_at = _signed_at(trusted.timestamp.unrecognized_fields)
        raised = raise_high_water(client.high_water, signed_at, now)
        if expires[earliest] <= trusted_time(Memory(high_water=raised), now):
            raise _refused(Reason.EXPIRED, f"{earliest} had expired when the timestamp was signed")
        digest = sha256((self._dir / "timestamp.json").read_bytes()).hexdigest()
        return Verified(
            timestamp_version=trusted.timestamp.version,
            timestamp_sha256=digest,
            signed_at=signed_at,
            root_version=trusted.root.version,
            targets_version=trusted.targets.version,
            expires=expires,
            earliest_expiry=expires[earliest],
            high_water=raised,
            time_keys=tuple(sorted(client.time_keys)),
            etag=client.fetcher.etags.get(digest, ""),
            refreshed_at=now,
        )


def raise_high_water(
    high_water: datetime | None, signed_at: datetime | None, now: datetime
) -> datetime | None:
    """The highest signed time seen, after one more verified timestamp.

    It never falls, never passes `signed_at`, and one step goes at most 7 days beyond what was known: a stolen
    timestamp key cannot throw a fleet years ahead. The first reading has nothing to be measured by but the
    wall clock; a host that boots in 1970 takes it whole, and `Catalog.refresh` refuses one past any expiry.
    """
    if signed_at is None:
        return high_water
    if high_water is None:
        behind = now < signed_at - MAX_CLOCK_STEP
        return signed_at if behind else min(signed_at, now + MAX_CLOCK_STEP)
    return max(high_water, min(signed_at, max(high_water, now) + MAX_CLOCK_STEP))


class _Client(Updater):
    """python-tuf's updater, with a time that goes by signed time too, strict roots and durable files.

    Whatever reaches below its public face is in this class and the next; `tests/updater/test_catalog.py`
    walks each, so that a new release of python-tuf that moves one of them fails there and not on a device.
    """

    def __init__(
        self, metadata_dir: Path, fetcher: _Fetcher, bootstrap: bytes, memory: Memory, now: datetime
    ) -> None:
        super().__init__(str(metadata_dir), "/metadata/", fetcher=fetcher, config=LIMITS, bootstrap=bootstrap)
        self.fetcher = fetcher
        self.trusted = _TrustedSet(bootstrap, LIMITS.envelope_type)
        self.trusted.reference_time = trusted_time(memory, now)
        self._trusted_set = self.trusted
        self.high_water = memory.high_water
        self._memory, self._now = memory, now

    @property
    def targets(self) -> Targets:
        return self.trusted.targets

    @property
    def time_keys(self) -> set[str]:
        """Ids of the keys that sign the time, by the newest root."""
        return set(self.trusted.root.roles[Timestamp.type].keyids)

    def _load_root(self) -> None:
        super()._load_root()
        if not self.time_keys.issuperset(self._memory.time_keys):
            # A thief who ran the time ahead would else have every honest timestamp of a day refused, for as
            # long as he liked and whatever keys people made since.
            self.high_water = None
            self.trusted.reference_time = self._now

    def delegates_to_cohorts(self, path: str) -> bool:
        """Whether the role cohorts may speak for this path."""
        role = self._cohorts_role()
        return role is not None and role.is_delegated_path(path)

    def _cohorts_role(self) -> DelegatedRole | None:
        delegations = self.targets.delegations
        return delegations.roles.get(COHORTS) if delegations and delegations.roles else None

    def cohorts(self) -> Targets | None:
        """The verified delegated role, None when top-level targets delegates to none."""
        if self._cohorts_role() is None:
            return None
        cohorts = self._load_targets(COHORTS, Targets.type)
        if cohorts.delegations is not None:
            raise _refused(Reason.BAD_DELEGATION, "the role cohorts delegates further")
        return cohorts

    def take_targets(self, kept: bytes | None) -> bytes:
        """Load targets of an origin without timestamp and snapshot; none older than what is known here."""
        self._load_root()
        root, time = self.trusted.root, self.trusted.reference_time
        if root.is_expired(time):
            raise tuf_errors.ExpiredMetadataError("the newest root known here has expired")
        content = self._download_metadata(Targets.type, self.config.targets_max_length)
        targets = _signed_targets(root, content)
        for known in filter(None, (self._cached_targets(), kept)):
            if newer := self.newer_than(known, targets.version):
                why = f"targets {targets.version} are older than {newer.version}, which is known here"
                raise tuf_errors.BadVersionNumberError(why)
        if targets.is_expired(time):
            raise tuf_errors.ExpiredMetadataError(f"targets {targets.version} have expired")
        self.trusted.put_targets(targets)
        return content

    def _cached_targets(self) -> bytes | None:
        try:
            return self._load_local_metadata(Targets.type)
        except FileNotFoundError:
            return None

    def newer_than(self, known: bytes, version: int) -> Targets | None:
        """These known targets, when they are newer; None as well when today's keys did not sign them.

        So versions that a stolen key ran forward count no longer once the keys were changed.
        """
        try:
            targets = _signed_targets(self.trusted.root, known)
        except (tuf_errors.RepositoryError, ValueError, KeyError, TypeError):
            return None
        return targets if targets.version > version else None

    def _persist_file(self, filename: str, data: bytes) -> None:
        # Upstream renames without fsync: after a power cut an empty timestamp.json would stand there, count
        # as a missing one, and take the protection against older metadata with it.
        layout.write_durable(filename, data, 0o644)


class _TrustedSet(TrustedMetadataSet):
    """Refuses every root, the one installed included, that lists one public key under two ids."""

    def _load_trusted_root(self, data: bytes) -> None:
        super()._load_trusted_root(data)
        _check_distinct(self.root.keys, "root")

    def update_root(self, data: bytes) -> Root:
        root = super().update_root(data)
        _check_distinct(root.keys, f"root {root.version}")
        return root

    def put_targets(self, targets: Targets) -> None:
        """Let targets that were verified apart from any snapshot be looked up."""
        self._add(Targets.type, targets, Root.type)


def follow_roots(bootstrap: bytes, later: list[bytes]) -> int:
    """The version of the newest root that follows, one by one, from the one this host was installed with.

    Raises:
        TrustError: the first one, or one of the later, is not what its keys and its predecessor's allow.
    """
    with sorted_errors():
        trusted = _TrustedSet(bootstrap, LIMITS.envelope_type)
        first = trusted.root.version
        for content in later:
            if Metadata[Root].from_bytes(content).signed.version > first:
                trusted.update_root(content)
    return trusted.root.version


def _signed_targets(root: Root, content: bytes) -> Targets:
    """Top-level targets that enough of the release keys signed; version and expiry are not looked at."""
    metadata = Metadata[Targets].from_bytes(content)
    if metadata.signed.type != Targets.type:
        raise tuf_errors.RepositoryError(f"there is {metadata.signed.type} where targets should be")
    root.verify_delegate(Targets.type, metadata.signed_bytes, metadata.signatures)
    return metadata.signed


class _Fetcher(FetcherInterface):
    """Hands python-tuf what `Transport` fetched; keeps the ETag of each timestamp by its digest."""

    def __init__(self, transport: Origin) -> None:
        self._transport = transport
        self.etags: dict[str, str] = {}

    def download_bytes(self, url: str, max_length: int) -> bytes:
        answer = self._get(url, min(max_length, METADATA_MAX))
        etag = answer.headers.get("etag", "")
        if url.endswith("/timestamp.json") and len(etag) <= 256:
            self.etags[sha256(answer.body).hexdigest()] = etag
        return answer.body

    def _fetch(self, url: str) -> Iterator[bytes]:
        yield self._get(url, METADATA_MAX).body

    def _get(self, url: str, max_length: int) -> Answer:
        answer = self._transport.get(url, max_length=max_length, deadline_s=METADATA_DEADLINE_S)
        if answer.status != 200:
            raise tuf_errors.DownloadHTTPError(f"{url}: the server answered {answer.status}", answer.status)
        return answer


def _check_delegations(targets: Targets) -> None:
    """Refuse delegations by which an online key could say what may run."""
    delegations = targets.delegations
    if delegations is None:
        return
    if delegations.succinct_roles is not None:
        raise _refused(
            Reason.BAD_DELEGATION, "top-level targets delegates by hash bins, which reach every path"
        )
    _check_distinct(delegations.keys, "the delegations of targets")
    for name, pattern in _delegated_patterns(delegations):
        if _reaches_releases(pattern):
            why = f"top-level targets lets the role {name} speak for {pattern or 'paths by hash'}"
            raise _refused(Reason.BAD_DELEGATION, why)


def _delegated_patterns(delegations: Delegations) -> Iterator[tuple[str, str]]:
    """Each role with each of its patterns; the empty pattern stands for hash prefixes."""
    for name, role in (delegations.roles or {}).items():
        for pattern in role.paths if role.paths is not None else [""]:
            yield name, pattern


def _reaches_releases(pattern: str) -> bool:
    first = pattern.split("/", maxsplit=1)[0]
    return not pattern or any(fnmatchcase(directory, first) for directory in RELEASE_DIRECTORIES)


def _check_distinct(keys: Mapping[str, Key], where: str) -> None:
    """TUF counts key ids, not keys: one key under two ids would meet a threshold of two alone."""
    seen: dict[bytes, str] = {}
    for keyid, key in keys.items():
        other = seen.setdefault(_material(key), keyid)
        if other != keyid:
            why = f"{where} lists one public key under two ids, {other[:16]} and {keyid[:16]}"
            raise _refused(Reason.BAD_METADATA, why)


def _material(key: Key) -> bytes:
    """The public key itself, in one form however it was written; opaque keys by their value."""
    public = str(key.keyval.get("public", ""))
    try:
        loaded: Any = Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
    except ValueError:
        try:
            loaded = load_pem_public_key(public.encode())
        except ValueError:
            return json.dumps(key.keyval, sort_keys=True).encode()
    material: bytes = loaded.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return material


def _signed_at(fields: Mapping[str, Any]) -> datetime | None:
    text = fields.get(SIGNED_AT)
    if text is None:
        return None
    try:
        return clock.parse_iso(text)
    except (TypeError, ValueError) as error:
        raise _refused(Reason.BAD_METADATA, f"the timestamp's {SIGNED_AT} is no time") from error


def _read(target: TargetFile, path: str, parse: Callable[[object, str], T], reason: Reason) -> T:
    try:
        return parse(target.custom, path)
    except MalformedError as error:
        raise _refused(reason, str(error)) from error


def _sha256_of(target: TargetFile, path: str) -> str:
    digest = target.hashes.get("sha256", "")
    if not wire.SHA256.fullmatch(digest):
        raise _refused(Reason.BAD_METADATA, f"{path} is signed without a sha256")
    return digest


def _refused(reason: Reason, why: str) -> TrustError:
    return TrustError(
        "the server's metadata is refused",
        why=why,
        then="this agent keeps running what it runs; compare with `release verify` on a trusted machine",
        reason=reason,
    )


REASONS: tuple[tuple[type[Exception], Reason], ...] = (
    (tuf_errors.UnsignedMetadataError, Reason.BAD_SIGNATURE),
    (tuf_errors.ExpiredMetadataError, Reason.EXPIRED),
    (tuf_errors.BadVersionNumberError, Reason.REPLAYED),
    (tuf_errors.LengthOrHashMismatchError, Reason.DIGEST_MISMATCH),
    (tuf_errors.DownloadLengthMismatchError, Reason.LENGTH_MISMATCH),
    (tuf_errors.RepositoryError, Reason.BAD_METADATA),
)
"""First match wins; python-tuf's errors in the words of the wire."""


@contextmanager
def sorted_errors() -> Iterator[None]:
    """Turn whatever python-tuf and the disk raise into this project's errors, with their reasons."""
    try:
        yield
    except tuf_errors.DownloadHTTPError as error:
        raise UnreachableError(
            "the server does not give out its metadata", why=str(error), reason=Reason.OFFLINE
        ) from error
    except (tuf_errors.RepositoryError, tuf_errors.DownloadLengthMismatchError) as error:
        reason = next(reason for kind, reason in REASONS if isinstance(error, kind))
        raise _refused(reason, str(error) or type(error).__name__) from error
    except tuf_errors.DownloadError as error:
        raise UnreachableError(
            "the metadata could not be fetched", why=str(error), reason=Reason.OFFLINE
        ) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise _refused(Reason.BAD_METADATA, f"{type(error).__name__}: {error}") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DiskError(
            "the metadata cannot be kept",
            why=str(error),
            then="free some room" if full else "check state/tuf and its permissions",
            reason=Reason.NO_ROOM if full else Reason.DISK,
        ) from error


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Hold the lock of a metadata directory without asking anything of it.

    Raises:
        ConflictError: a check holds it now.
    """
    fd = _lock(directory, wait_s=0)
    try:
        yield
    finally:
        os.close(fd)


def _lock(directory: Path, wait_s: float) -> int:
    """Take the one lock of this metadata directory; two writers would corrupt each other's cache."""
    disk.make_dirs(directory)
    fd = disk.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
    gives_up = clock.boot_s() + wait_s
    while True:
        try:
            disk.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError as error:
            if clock.boot_s() > gives_up:
                os.close(fd)
                raise ConflictError(
                    "another check is running",
                    why=f"it holds {directory}/.lock",
                    then="wait for it, then try again",
                ) from error
        time.sleep(0.05)
