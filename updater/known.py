"""What the metadata on this disk say: verified when they were kept, read here with the standard library.

For people on the host and for what they ask by hand. Nothing is installed by it: an install verifies anew.
"""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from agent_core import clock, disk
from agent_core.errors import RelfleetError
from agent_core.late import late_dataclass
from agent_core.wire import Policy, policy_path

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from agent_core.layout import Layout

SIGNED_AT = "x-signed-at"
ROLES = ("root", "targets", "cohorts", "snapshot", "timestamp")


@late_dataclass(frozen=True)
class Role:
    """One role of the cache: its version, and when it stops being believed."""

    name: str
    version: int
    expires: datetime


def roles(layout: Layout) -> list[Role]:
    """The cached roles that can be read, and as `file` the targets that a release file brought."""
    files = {name: layout.tuf / f"{name}.json" for name in ROLES} | {"file": layout.file_targets}
    found = []
    for name, path in files.items():
        signed = _signed(path)
        try:
            if signed is not None:
                found.append(Role(name, int(signed["version"]), clock.parse_iso(signed["expires"])))
        except (KeyError, TypeError, ValueError, OverflowError):
            continue
    return found


@late_dataclass(frozen=True)
class Timestamp:
    """When the cached timestamp was signed, its keys, and when the first cached role expires."""

    signed_at: datetime | None
    keys: tuple[str, ...]
    earliest_expiry: datetime


def timestamp(metadata_dir: Path) -> Timestamp | None:
    """The cached timestamp, None when the cache cannot be read. All of it was verified before it was kept."""
    cached = {name: _signed(metadata_dir / f"{name}.json") or {} for name in ROLES}
    try:
        signed_at = cached["timestamp"].get(SIGNED_AT)
        keys = cached["root"]["roles"]["timestamp"]["keyids"]
        return Timestamp(
            None if signed_at is None else clock.parse_iso(signed_at),
            tuple(sorted(map(str, keys))),
            min(clock.parse_iso(role["expires"]) for role in cached.values() if role),
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def expiry(file: Path) -> datetime | None:
    """When these cached metadata expire, None when that cannot be read."""
    try:
        return clock.parse_iso((_signed(file) or {})["expires"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def contents(layout: Layout) -> list[bytes]:
    """The cached roles that are metadata: what is damaged is fetched anew, and other files are nobody's."""
    found = []
    for name in ROLES:
        with suppress(OSError):
            content = disk.read_file(layout.tuf / f"{name}.json")
            found += [content] if signed_part(content) else []
    return found


def policy(layout: Layout, product: str) -> Policy:
    """The highest floor and all revocations that are known here; none of either when none can be read."""
    policies = [_policy(path, product) for path in (layout.tuf / "targets.json", layout.file_targets)]
    revoked = {seq for policy in policies for seq in policy.revoked_seq}
    return Policy(max(policy.floor_seq for policy in policies), tuple(sorted(revoked)))


def _policy(path: Path, product: str) -> Policy:
    signed = _signed(path) or {}
    try:
        return Policy.from_json(signed["targets"][policy_path(product)]["custom"])
    except (RelfleetError, KeyError, TypeError):
        return Policy()


def _signed(path: Path) -> dict[str, Any] | None:
    try:
        return signed_part(disk.read_file(path))
    except OSError:
        return None


def signed_part(content: bytes) -> dict[str, Any] | None:
    """What metadata say, their signatures apart; None when these are none. Nothing is verified here."""
    try:
        signed = json.loads(content)["signed"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return signed if isinstance(signed, dict) else None
