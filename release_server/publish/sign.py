"""What the release keys sign: from verified targets to the next ones, with a release added.

The release manager trusts the server no more than an agent does: the current targets come through a TUF
client that starts from the release manager's own root and remembers what it has seen.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from tuf.api import exceptions
from tuf.api.metadata import Metadata, TargetFile
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from agent_core.errors import (
    ConflictError,
    NotAllowedError,
    NotFoundError,
    RelfleetError,
    TrustError,
    UnreachableError,
)
from agent_core.wire import DeltaFacts, Reason, ReleaseFacts, bundle_path, index_path, policy_path
from keys import ceremony, changes, signers
from keys.roles import TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    import requests
    from securesystemslib.signer import Key, Signer
    from tuf.api.metadata import Root, Targets

    from agent_core.wire import Policy
    from release_server.publish.client import Client

CHUNK = 64 * 1024
MAX_TARGETS = 64 * 2**20
MAX_ROOT = 512 * 1024


@dataclass(frozen=True)
class Trusted:
    """What the release manager's own TUF client has verified."""

    root: Metadata[Root]
    targets: Metadata[Targets]

    @property
    def version(self) -> int:
        return self.targets.signed.version


@dataclass(frozen=True)
class Blob:
    """One file of a bundle, by what is signed of it."""

    path: Path
    sha256: str
    length: int


@dataclass(frozen=True)
class Release:
    """One bundle that is to be published, with what is to be signed of it."""

    facts: ReleaseFacts
    archive: Blob
    index: Blob

    @property
    def target(self) -> str:
        return bundle_path(self.facts.product, self.facts.version, self.facts.platform)


@dataclass(frozen=True)
class Delta:
    """One delta to a bundle that is to be published, with what is to be signed of it."""

    target: str
    facts: DeltaFacts
    blob: Blob


# --- fetching ----------------------------------------------------------------------------------------------


class Fetcher(FetcherInterface):
    """Downloads for the TUF client: no redirects, no encodings, whole answers only."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.last: requests.Response | None = None

    def close(self) -> None:
        """Let go of a download that was refused in the middle."""
        if self.last is not None:
            self.last.close()

    def _fetch(self, url: str) -> Iterator[bytes]:
        path = url.removeprefix(self.client.url)
        response = self.client.call("GET", path, static=True, accept=frozenset({403, 404}))
        if response.status_code != 200 or response.headers.get("Content-Encoding", "identity") != "identity":
            response.close()
            raise exceptions.DownloadHTTPError(f"status {response.status_code}", response.status_code)
        self.last = response
        chunks: Iterator[bytes] = response.iter_content(CHUNK)
        return chunks


def cache_dir(state: Path, server: str, root: bytes) -> Path:
    """Where verified metadata of one server under one first root is remembered."""
    return state / "tuf" / sha256(server.encode() + b"\n" + root).hexdigest()[:24]


def read_trust(path: Path) -> bytes:
    """The root that the release manager starts from.

    Raises:
        NotFoundError: there is none.
        TrustError: it is no sound root.
    """
    try:
        body = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError(
            f"there is no trusted root at {path}",
            then="bring the fleet's root file there, or name it with --trust; a new fleet: release key gen",
            reason="no-trust",
        ) from None
    ceremony.verify_root(ceremony.parse_root(body))
    return body


def fetch(client: Client, root: bytes, cache: Path) -> Trusted:
    """Fetch and verify the server's current metadata.

    Args:
        root: the bytes of the first root; later ones are followed from there.
        cache: remembers what was seen, so that nothing older is taken again. One process at a time uses it.

    Raises:
        TrustError: what the server serves is not what the keys signed, is older than before, or has expired.
        NotFoundError: the server has published nothing yet.
        UnreachableError: it does not answer.
    """
    with refreshed(client, root, cache):
        trusted = recall(cache)
    ceremony.check_root(trusted.root.signed)
    ceremony.check_targets(trusted.targets.signed, trusted.root.signed)
    return trusted


@contextmanager
def refreshed(client: Client, root: bytes, cache: Path) -> Iterator[Updater]:
    """A TUF client that has verified the server's current metadata; nobody else uses the cache meanwhile.

    Args, Raises: as of `fetch`, which what is asked of the client inside may raise as well.
    """
    cache.mkdir(parents=True, exist_ok=True, mode=0o700)
    fetcher = Fetcher(client)
    with closing(fetcher), _locked(cache / "lock"):
        try:
            updater = Updater(
                str(cache),
                f"{client.url}/metadata/",
                fetcher=fetcher,
                config=UpdaterConfig(targets_max_length=MAX_TARGETS),
                bootstrap=root,
            )
            updater.refresh()
            yield updater
        except (exceptions.RepositoryError, exceptions.DownloadError) as error:
            raise refusal(error, client.url) from error


def recall(cache: Path) -> Trusted:
    """What `fetch` has verified last.

    Raises:
        NotFoundError: nothing yet.
    """
    try:
        return Trusted(
            ceremony.parse_root((cache / "root.json").read_bytes()),
            ceremony.parse_targets((cache / "targets.json").read_bytes()),
        )
    except FileNotFoundError:
        raise NotFoundError(
            "this machine has verified nothing of this server yet", then="run this once without --offline"
        ) from None


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def refusal(error: Exception, server: str) -> RelfleetError:
    """What a failure of the TUF client means to a person."""
    if isinstance(error.__cause__, RelfleetError):
        return error.__cause__
    if isinstance(error, exceptions.DownloadHTTPError):
        return NotFoundError(
            f"{server} has published no metadata yet",
            why=str(error),
            then="release key gen makes the first; if it was just made, try again in a second",
            reason="nothing-published",
        )
    if isinstance(error, exceptions.DownloadLengthMismatchError):
        reason = Reason.LENGTH_MISMATCH
    elif isinstance(error, exceptions.DownloadError):
        return UnreachableError(f"metadata of {server} cannot be fetched", why=str(error))
    elif isinstance(error, exceptions.ExpiredMetadataError):
        reason = Reason.EXPIRED
    elif isinstance(error, exceptions.BadVersionNumberError):
        reason = Reason.REPLAYED
    elif isinstance(error, exceptions.UnsignedMetadataError):
        reason = Reason.BAD_SIGNATURE
    elif isinstance(error, exceptions.LengthOrHashMismatchError):
        reason = Reason.DIGEST_MISMATCH
    else:
        reason = Reason.BAD_METADATA
    return TrustError(
        f"the metadata of {server} is refused",
        why=str(error),
        then="nothing was published; ask who runs the server before you go on",
        reason=reason,
    )


# --- adding a release --------------------------------------------------------------------------------------


def releases(targets: Targets, product: str) -> dict[str, ReleaseFacts]:
    """The facts of every bundle of a product, by target path."""
    prefix = f"bundles/{product}/"
    return {
        path: ReleaseFacts.from_json(target.custom, path)
        for path, target in targets.targets.items()
        if path.startswith(prefix) and path.endswith(".tar.zst")
    }


def next_seq(targets: Targets, product: str, version: str) -> int:
    """The seq of a version: its own when a bundle of it is there, else one above all that was ever used."""
    for facts in releases(targets, product).values():
        if facts.version == version:
            return facts.seq
    return 1 + changes.highest_seq(targets.targets, product)


def is_published(targets: Targets, release: Release) -> bool:
    """Whether these very bytes are published under this version.

    Raises:
        ConflictError: the version is there with other bytes; it never changes.
    """
    present = targets.targets.get(release.target)
    if present is None:
        return False
    listed = targets.targets.get(
        index_path(release.facts.product, release.facts.version, release.facts.platform)
    )
    same_archive = present.hashes.get("sha256") == release.archive.sha256
    if same_archive and listed is not None and listed.hashes.get("sha256") == release.index.sha256:
        return True
    raise ConflictError(
        f"version exists: {release.facts.product} {release.facts.version} for {release.facts.platform}",
        why=f"it is published with digest {present.hashes.get('sha256', '')[:12]}, "
        f"this bundle has {release.archive.sha256[:12]}; a version never changes",
        then="build it under a new version",
        reason="version-exists",
    )


def add(targets: Targets, release: Release) -> None:
    """List a release's archive, with its facts, and its index in targets."""
    facts = release.facts
    archive = TargetFile(
        release.archive.length,
        {"sha256": release.archive.sha256},
        release.target,
        {"custom": facts.to_json()},
    )
    index = TargetFile(
        release.index.length,
        {"sha256": release.index.sha256},
        index_path(facts.product, facts.version, facts.platform),
    )
    targets.targets[archive.path] = archive
    targets.targets[index.path] = index


def next_targets(trusted: Trusted, now: datetime) -> Metadata[Targets]:
    """The targets after the current ones: the same, held anew, not yet signed; `trusted` stays as it is."""
    return ceremony.next_targets(trusted.targets, now)


def with_releases(
    trusted: Trusted, added: Sequence[Release], now: datetime, deltas: Sequence[Delta] = ()
) -> Metadata[Targets]:
    """The targets after the current ones with releases added, not yet signed.

    Args:
        added: releases that are not published yet; their seq is set here, and the barrier before them.
        deltas: to these releases.
    """
    metadata = next_targets(trusted, now)
    for release in added:
        facts = release.facts
        seq = next_seq(metadata.signed, facts.product, facts.version)
        barrier = changes.barrier_before(metadata.signed.targets, facts.product, seq)
        stone = max(facts.upgrade_from_seq, barrier)
        add(metadata.signed, replace(release, facts=replace(facts, seq=seq, upgrade_from_seq=stone)))
    for delta in deltas:
        custom = {"custom": delta.facts.to_json()}
        hashes = {"sha256": delta.blob.sha256}
        target = TargetFile(delta.blob.length, hashes, delta.target, custom)
        metadata.signed.targets[delta.target] = target
    return metadata


def with_policy(trusted: Trusted, product: str, rule: Policy, now: datetime) -> Metadata[Targets]:
    """The targets after the current ones with another policy of one product, not yet signed."""
    metadata = next_targets(trusted, now)
    path = policy_path(product)
    target = TargetFile(0, {"sha256": changes.EMPTY}, path, {"custom": rule.to_json()})
    metadata.signed.targets[path] = target
    return metadata


# --- signing -----------------------------------------------------------------------------------------------


def release_signers(
    directory: Path, root: Root, passphrase: Callable[[str], str], *, signed: Mapping[str, Key] | None = None
) -> list[Signer]:
    """Open as many of the release keys in a directory as are still needed; others stay closed.

    Args:
        signed: the keys that have signed already, by id; none when it is something new.

    Raises:
        NotAllowedError: there is none, or the passphrase is wrong.
        ConflictError: `signed-already`; those that are here have signed.
    """
    role, done = root.roles[TARGETS], signed or {}
    here = [entry for entry in signers.find(directory) if entry.keyid in role.keyids]
    mine = [entry for entry in here if entry.keyid not in done]
    if here and not mine:
        raise ConflictError(
            f"key {here[0].name} has signed this already",
            why=f"targets need {role.threshold} signatures of different people",
            then="somebody else has to sign it",
            reason="signed-already",
        )
    if not mine:
        raise NotAllowedError(
            "there is no release key to sign with",
            why=f"targets need {role.threshold} signature(s); {directory} holds no key that counts",
            then="name the directory of your release keys with --keys-dir",
            reason="no-release-key",
        )
    return [signers.load(entry.path, passphrase) for entry in mine[: role.threshold - len(done)]]


def sign_targets(metadata: Metadata[Targets], root: Root, with_keys: Sequence[Signer]) -> int:
    """Sign targets and prove that the signatures count; how many more they need.

    Raises:
        TrustError: none counts, or the delegations are not as they must be.
    """
    ceremony.check_targets(metadata.signed, root)
    ceremony.sign(metadata, with_keys)
    if not ceremony.signed_by(root, TARGETS, metadata):
        raise TrustError(
            "these targets are not signed",
            why="none of these keys is a release key of the trusted root",
            reason=Reason.BAD_SIGNATURE,
        )
    return ceremony.missing_signatures(root, TARGETS, metadata)
