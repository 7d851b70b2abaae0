"""What the release keys and the cohorts key say of one product, looked up in verified metadata.

Loaded in the short-lived checker only. Nothing here is trusted because a server said it: bundles and policy
are looked up in top-level targets alone, the directive in the delegated role `cohorts` alone, at paths built
here. How the metadata are verified is `trusted_metadata`'s matter.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from hashlib import sha256
from typing import TYPE_CHECKING, Self, TypeVar

from agent_core import clock, disk, wire
from agent_core.errors import ConflictError, MalformedError
from agent_core.late import late_dataclass
from agent_core.wire import Reason
from updater.download import hashed_path
from updater.freshness import Memory, raise_high_water, trusted_time
from updater.trusted_metadata import (
    COHORTS,
    Client,
    Fetcher,
    check_delegations,
    refreshed,
    refused,
    signed_time,
    sorted_errors,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

    from tuf.api.metadata import TargetFile, Targets

    from updater.transport import Origin

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
        self._client: Client | None = None

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
            check_delegations(client.targets)
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
            client = self._new_client(now, memory)
            targets = client.take_targets(kept)
            check_delegations(client.targets)
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
            raise refused(Reason.BAD_DIRECTIVE, why)
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
            raise refused(
                Reason.BAD_METADATA, f"{path} is signed as {facts.product} {facts.version} {facts.platform}"
            )
        signed_index = (facts.index_sha256, facts.index_length)
        if index is None or (_sha256_of(index, index_path), index.length) != signed_index:
            raise refused(Reason.BAD_METADATA, f"{index_path} is not the index that {path} names")
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
            raise refused(Reason.BAD_METADATA, f"{path} is signed as something else")
        return Delta(facts.from_version, path, _sha256_of(target, path), target.length)

    def _refreshed(self, now: datetime, memory: Memory) -> Client:
        return refreshed(lambda: self._new_client(now, memory))

    def _new_client(self, now: datetime, memory: Memory) -> Client:
        return Client(self._dir, Fetcher(self._transport), self._bootstrap, memory, now)

    def _verified_client(self) -> Client:
        if self._client is None:
            raise RuntimeError("a catalog is asked only after its refresh")
        return self._client

    def _verified(self, client: Client, cohorts: Targets | None, now: datetime) -> Verified:
        trusted = client.trusted
        expires = {role.type: role.expires for role in (trusted.root, trusted.timestamp, trusted.snapshot)}
        expires["targets"] = trusted.targets.expires
        if cohorts:
            expires[COHORTS] = cohorts.expires
        earliest = min(expires, key=expires.__getitem__)
        signed_at = signed_time(trusted.timestamp)
        raised = raise_high_water(client.high_water, signed_at, now)
        if expires[earliest] <= trusted_time(Memory(high_water=raised), now):
            raise refused(Reason.EXPIRED, f"{earliest} had expired when the timestamp was signed")
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


def _read(target: TargetFile, path: str, parse: Callable[[object, str], T], reason: Reason) -> T:
    try:
        return parse(target.custom, path)
    except MalformedError as error:
        raise refused(reason, str(error)) from error


def _sha256_of(target: TargetFile, path: str) -> str:
    digest = target.hashes.get("sha256", "")
    if not wire.SHA256.fullmatch(digest):
        raise refused(Reason.BAD_METADATA, f"{path} is signed without a sha256")
    return digest


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
