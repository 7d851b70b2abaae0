"""This module signs what a thief of every online key signs: what is current, at versions far ahead."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from tuf.api.metadata import Metadata, MetaFile, Snapshot, Targets, Timestamp

from keys import signers
from keys.roles import COHORTS, ONLINE_ROLES, SNAPSHOT, TIMESTAMP
from release_server.signer import key_path

if TYPE_CHECKING:
    from pathlib import Path

    from securesystemslib.signer import Signer


def steal(keys: Path) -> dict[str, Signer]:
    """The online keys of a server, as whoever reads its files has them."""
    return {role: signers.load(key_path(keys, role)) for role in ONLINE_ROLES}


def run_forward(
    metadata: Path,
    keys: dict[str, Signer],
    version: int,
    *,
    life: timedelta = timedelta(days=1),
    lead_to: str = "",
) -> dict[str, Metadata[Any]]:
    """The newest cohorts, snapshot and timestamp below `metadata`, signed anew under another version.

    Args:
        lead_to: a version to which every directive then leads everyone.
    """
    expires = datetime.now(UTC).replace(microsecond=0) + life
    newest = json.loads((metadata / "timestamp.json").read_bytes())["signed"]
    number = newest["meta"]["snapshot.json"]["version"]
    listed = Metadata.from_bytes((metadata / f"{number}.snapshot.json").read_bytes()).signed.meta
    said = Metadata[Targets].from_bytes(
        (metadata / f"{listed['cohorts.json'].version}.cohorts.json").read_bytes()
    )
    made: dict[str, Metadata[Any]] = {}

    def sign(role: str, signed: Any) -> MetaFile:
        made[role] = Metadata(signed)
        made[role].sign(keys[role])
        body = made[role].to_bytes()
        return MetaFile(version, len(body), {"sha256": sha256(body).hexdigest()})

    said.signed.version = version
    for target in said.signed.targets.values():
        if lead_to:
            target.custom.update(release=lead_to, base=lead_to, progress=10_000, rollback=True)
    meta = listed | {"cohorts.json": sign(COHORTS, said.signed)}
    snapshot = sign(SNAPSHOT, Snapshot(version, expires=expires + timedelta(days=6), meta=meta))
    sign(TIMESTAMP, Timestamp(version, expires=expires, snapshot_meta=snapshot))
    return made
