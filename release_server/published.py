"""This module takes over what was published after a backup was made, so that no version ever runs backwards.

Agents have seen it and refuse whatever is older. It is read where it still is: the old `repository/`, a
mirror, the file server or CDN in front, or an agent's `state/tuf`. Nothing is believed for where it lies:
roots and targets go the way of what people send, and what the online keys signed has to be signed by them.
"""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, Snapshot, Targets, Timestamp

from agent_core.errors import NotFoundError, TrustError, UnreachableError
from keys.roles import COHORTS, ROOT, SNAPSHOT, TARGETS, TIMESTAMP
from release_server import acceptance, repository

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from sqlalchemy.orm import Session

    from keys.ceremony import OnlineKeys
    from release_server.blobs import Blobs

    Fetch = Callable[[str], bytes | None]

ACTOR = "restore"
TIMEOUT_S = 60


def origin(place: str) -> Fetch:
    """How to read what is published at a URL or in a directory: a path's content, None without it."""
    if place.startswith(("http://", "https://")):
        return lambda path: _get(f"{place.rstrip('/')}/{path}")
    directory = Path(place)
    if not directory.is_dir():
        raise NotFoundError(f"there is no directory {place}", then="name a URL, a repository/ or a state/tuf")
    return lambda path: _read(directory, path)


def _get(url: str) -> bytes | None:
    import requests

    try:
        answer = requests.get(url, timeout=TIMEOUT_S, allow_redirects=False)
    except requests.RequestException as error:
        raise UnreachableError(f"{url} cannot be read", why=type(error).__name__) from error
    if answer.status_code == 404:
        return None
    if answer.status_code != 200:
        raise UnreachableError(f"{url} cannot be read", why=f"it answers {answer.status_code}")
    return answer.content


def _read(directory: Path, path: str) -> bytes | None:
    """Below `metadata/` and `targets/`, or as an agent keeps it: beside each other, without versions."""
    name = path.rpartition("/")[2]
    places = [directory / path]
    if path.startswith("metadata/"):
        places += [directory / name, directory / name.lstrip("0123456789").lstrip(".")]
    return next((place.read_bytes() for place in places if place.is_file()), None)


def follow(
    session: Session, blobs: Blobs, fetch: Fetch, *, now: datetime, online: OnlineKeys
) -> dict[str, int]:
    """Bring the database up to what was published; what it knows already stays.

    Args:
        session: of `Sessions.write()`.
        fetch: of `origin`.
        online: the public halves of the keys that sign from now on.

    Returns:
        The version of each role that was taken over, the newer ones alone.

    Raises:
        NotFoundError: nothing is published there, or a part of it is missing.
        TrustError: it is not signed as it should be.
    """
    before = {role: repository.newest_version(session, role) for role in (ROOT, TARGETS)}
    body = _need(fetch, f"metadata/{TIMESTAMP}.json")
    _follow_roots(session, fetch, now, online)
    timestamp = _verified(session, TIMESTAMP, body, Timestamp)
    number = timestamp.signed.snapshot_meta.version
    snapshot_body = _need(fetch, f"metadata/{number}.{SNAPSHOT}.json")
    snapshot = _verified(session, SNAPSHOT, snapshot_body, Snapshot)
    listed = snapshot.signed.meta
    _follow_targets(session, blobs, fetch, listed[f"{TARGETS}.json"].version, now, online)
    cohorts_body = _need(fetch, f"metadata/{listed[f'{COHORTS}.json'].version}.{COHORTS}.json")
    cohorts = _verified(session, COHORTS, cohorts_body, Targets)
    after = {role: repository.newest_version(session, role) for role in (ROOT, TARGETS)}
    taken = {role: after[role] for role in after if after[role] > before[role]}
    parts = (
        (COHORTS, cohorts, cohorts_body),
        (SNAPSHOT, snapshot, snapshot_body),
        (TIMESTAMP, timestamp, body),
    )
    for role, metadata, signed in parts:
        if metadata.signed.version > repository.newest_version(session, role):
            repository.store(session, role, metadata, signed, now)
            taken[role] = metadata.signed.version
    return taken


def _need(fetch: Fetch, path: str) -> bytes:
    found = fetch(path)
    if found is None:
        raise NotFoundError(f"{path} is not there", then="name a place that has all that was published")
    return found


def _follow_roots(session: Session, fetch: Fetch, now: datetime, online: OnlineKeys) -> None:
    while True:
        version = repository.newest_version(session, ROOT) + 1
        body = fetch(f"metadata/{version}.{ROOT}.json")
        if body is None or Metadata.from_bytes(body).signed.version != version:
            return
        # Its targets may be signed by the keys that it names: they follow.
        acceptance.accept_root(session, body, now=now, actor=ACTOR, online=online, with_targets=True)


def _follow_targets(
    session: Session, blobs: Blobs, fetch: Fetch, version: int, now: datetime, online: OnlineKeys
) -> None:
    """One by one, with the bytes that each lists and that are not here yet."""
    for number in range(repository.newest_version(session, TARGETS) + 1, version + 1):
        body = _need(fetch, f"metadata/{number}.{TARGETS}.json")
        for path, target in Metadata[Targets].from_bytes(body).signed.targets.items():
            digest = str(target.hashes["sha256"])
            if target.length and blobs.length(digest) is None:
                folder, _, name = path.rpartition("/")
                content = _need(fetch, f"targets/{folder}/{digest}.{name}")
                blobs.append(digest, 0, len(content), BytesIO(content))
        acceptance.accept_targets(session, blobs, body, now=now, actor=ACTOR, online=online)


def _verified(session: Session, role: str, body: bytes, kind: type[Any]) -> Metadata[Any]:
    metadata: Metadata[Any] = Metadata.from_bytes(body)
    row = repository.newest(session, TARGETS if role == COHORTS else ROOT)
    if row is None or not isinstance(metadata.signed, kind):
        raise TrustError(
            f"the published {role} is refused", why="it is something else", reason="bad-metadata"
        )
    try:
        delegator: Any = Metadata.from_bytes(row.body).signed
        delegator.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    except UnsignedMetadataError:
        raise TrustError(
            f"the published {role} is refused",
            why="the key that counts has not signed it",
            then="name another place, or move the online keys (docs/security.md)",
            reason="bad-signature",
        ) from None
    return metadata
