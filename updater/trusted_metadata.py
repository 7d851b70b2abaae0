"""TUF's client workflow as an agent goes it: python-tuf's, with signed time, strict roots and durable files.

Loaded in the short-lived checker only. What is looked up in metadata once they are verified: see `catalog`.
"""

from __future__ import annotations

import errno
import json
from contextlib import contextmanager
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import agent_core.late_signers  # noqa: F401 - before tuf
import updater.without_urllib3  # noqa: F401 - before tuf

# isort: split
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, Root, Targets, Timestamp
from tuf.ngclient._internal.trusted_metadata_set import TrustedMetadataSet
from tuf.ngclient.config import UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface
from tuf.ngclient.updater import Updater

from agent_core import clock, disk, layout
from agent_core.errors import DiskError, TrustError, UnreachableError
from agent_core.wire import Reason
from updater import notes
from updater.freshness import TIMESTAMP_MAX, Memory, trusted_time

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from datetime import datetime

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
METADATA_DEADLINE_S = 120.0
COHORTS = "cohorts"
CACHED = frozenset({"timestamp.json", "snapshot.json", "targets.json", f"{COHORTS}.json"})
"""What the next refresh fetches anew when it is damaged."""
RELEASE_DIRECTORIES = ("bundles", "deltas", "policy")
SIGNED_AT = "x-signed-at"


class Client(Updater):
    """python-tuf's updater, with a time that goes by signed time too, strict roots and durable files.

    Whatever reaches below its public face is in this class and the next; `tests/updater/test_catalog.py`
    walks each, so that a new release of python-tuf that moves one of them fails there and not on a device.
    """

    def __init__(
        self, metadata_dir: Path, fetcher: Fetcher, bootstrap: bytes, memory: Memory, now: datetime
    ) -> None:
        super().__init__(str(metadata_dir), "/metadata/", fetcher=fetcher, config=LIMITS, bootstrap=bootstrap)
        self.fetcher = fetcher
        self.trusted = TrustedSet(bootstrap, LIMITS.envelope_type)
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
            raise refused(Reason.BAD_DELEGATION, "the role cohorts delegates further")
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
        except (FileNotFoundError, IsADirectoryError):
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
        file = Path(filename)

        def persist() -> None:
            layout.write_durable(file, data, 0o644)

        if file.name in CACHED:
            notes.replace(file, persist, layout.Layout(file.parents[2]).trash)
        else:
            persist()  # a root decides: what lies in its place is left to a person

    def _load_local_metadata(self, rolename: str) -> bytes:
        # Upstream would wait for ever for a pipe, and hold whatever is there in memory.
        return disk.read_file(Path(self._dir, f"{rolename}.json"), METADATA_MAX)


class TrustedSet(TrustedMetadataSet):
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


def refreshed(make: Callable[[], Client]) -> Client:
    """A client that has fetched and verified all that changed; made anew, once, if a signature does not hold.

    Signers may have rotated after its look at the root and before the timestamp.
    """
    for last in (False, True):
        client = make()
        try:
            client.refresh()
            break
        except tuf_errors.UnsignedMetadataError:
            if last:
                raise
    return client


def follow_roots(bootstrap: bytes, later: list[bytes]) -> int:
    """The version of the newest root that follows, one by one, from the one this host was installed with.

    Raises:
        TrustError: the first one, or one of the later, is not what its keys and its predecessor's allow.
    """
    with sorted_errors():
        trusted = TrustedSet(bootstrap, LIMITS.envelope_type)
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


class Fetcher(FetcherInterface):
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


def check_delegations(targets: Targets) -> None:
    """Refuse delegations by which an online key could say what may run."""
    delegations = targets.delegations
    if delegations is None:
        return
    if delegations.succinct_roles is not None:
        raise refused(
            Reason.BAD_DELEGATION, "top-level targets delegates by hash bins, which reach every path"
        )
    _check_distinct(delegations.keys, "the delegations of targets")
    for name, pattern in _delegated_patterns(delegations):
        if _reaches_releases(pattern):
            why = f"top-level targets lets the role {name} speak for {pattern or 'paths by hash'}"
            raise refused(Reason.BAD_DELEGATION, why)


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
            raise refused(Reason.BAD_METADATA, why)


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


def signed_time(timestamp: Timestamp) -> datetime | None:
    """When the server says that it signed this, None when it does not say."""
    text = timestamp.unrecognized_fields.get(SIGNED_AT)
    if text is None:
        return None
    try:
        return clock.parse_iso(text)
    except (TypeError, ValueError) as error:
        raise refused(Reason.BAD_METADATA, f"the timestamp's {SIGNED_AT} is no time") from error


def refused(reason: Reason, why: str) -> TrustError:
    return TrustError(
        "the metadata is refused",
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
        raise refused(reason, str(error) or type(error).__name__) from error
    except tuf_errors.DownloadError as error:
        raise UnreachableError(
            "the metadata could not be fetched", why=str(error), reason=Reason.OFFLINE
        ) from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise refused(Reason.BAD_METADATA, f"{type(error).__name__}: {error}") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DiskError(
            "the metadata cannot be kept",
            why=str(error),
            then="free some room" if full else "check state/tuf and its permissions",
            reason=Reason.NO_ROOM if full else Reason.DISK,
        ) from error
