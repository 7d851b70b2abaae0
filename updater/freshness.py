"""What the resident agent remembers of the last verified refresh, and when a 304 may skip the next one.

Standard library only: the poll is one conditional GET, and TUF is loaded when that says something changed.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_core import clock, disk, layout
from agent_core.errors import RelfleetError
from agent_core.late import late_dataclass
from agent_core.wire import Getter
from updater import known, notes

if TYPE_CHECKING:
    from updater.transport import Transport

log = logging.getLogger(__name__)

FULL_REFRESH_AFTER = timedelta(hours=6)
TIMESTAMP_PATH = "/metadata/timestamp.json"
TIMESTAMP_MAX = 16_384
MAX_CLOCK_STEP = timedelta(days=7)


@late_dataclass(frozen=True)
class Memory:
    """What `state/poll.json` keeps of the last full refresh; the empty one means there was none.

    Attributes:
        etag: the server's, of exactly the timestamp that has `timestamp_sha256`; empty when it gave none.
        timestamp_sha256: of the verified timestamp as cached.
        earliest_expiry: the first of the cached roles to expire.
        refreshed_boot_s: seconds since boot at the last full refresh, in the boot that `boot_id` names.
        high_water: the highest signed time seen; expiry is held against it when the wall clock is behind.
        time_keys: ids of the timestamp keys of then. When a root takes one of them away, what it said of the
            time counts no more either.
    """

    etag: str = ""
    timestamp_sha256: str = ""
    earliest_expiry: datetime | None = None
    refreshed_at: datetime | None = None
    refreshed_boot_s: float = 0.0
    boot_id: str = ""
    high_water: datetime | None = None
    time_keys: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "etag": self.etag,
            "timestamp_sha256": self.timestamp_sha256,
            "earliest_expiry": _iso(self.earliest_expiry),
            "refreshed_at": _iso(self.refreshed_at),
            "refreshed_boot_s": self.refreshed_boot_s,
            "boot_id": self.boot_id,
            "high_water": _iso(self.high_water),
            "time_keys": list(self.time_keys),
        }

    @classmethod
    def from_json(cls, body: object, path: str = "poll") -> Memory:
        get = Getter(body, path)
        earliest_expiry, high_water = _moment(get, "earliest_expiry"), _moment(get, "high_water")
        if earliest_expiry and high_water and high_water >= earliest_expiry:
            # No refresh ends so. Believed, a time that is far ahead would have everything expired for ever.
            raise get.refuse("high_water", "by it, what was verified had expired already")
        return cls(
            etag=get.text("etag", ""),
            timestamp_sha256=get.text("timestamp_sha256", ""),
            earliest_expiry=earliest_expiry,
            refreshed_at=_moment(get, "refreshed_at"),
            refreshed_boot_s=get.number("refreshed_boot_s", 0.0),
            boot_id=get.text("boot_id", ""),
            high_water=high_water,
            time_keys=get.texts("time_keys", []),
        )


def recall(path: Path, metadata_dir: Path, now: datetime) -> Memory:
    """Read the memory; what is missing or damaged counts as nothing remembered, so a full refresh follows.

    The highest signed time is not forgotten with a damaged file, nor believed whatever it is: in its place
    stands what the timestamp says that lies verified in `metadata_dir`, taken as a first reading is.
    """
    memory, doubt = believed(path, metadata_dir)
    if not doubt:
        return memory
    log.warning("signed time not believed", extra={"why": doubt})
    cached = known.timestamp(metadata_dir)
    high_water = raise_high_water(None, cached.signed_at, now) if cached else None
    if cached is None or high_water is None or high_water >= cached.earliest_expiry:
        return replace(memory, high_water=None, time_keys=())  # no refresh has ended by such a timestamp
    return replace(memory, high_water=high_water, time_keys=cached.keys)


def believed(path: Path, metadata_dir: Path) -> tuple[Memory, str]:
    """The memory, and why its signed time is not to be believed; empty when it is.

    A timestamp is kept here only when it had not expired by the highest signed time of then. So a time beyond
    the expiry of the one that is kept was never seen: believed, it would have everything expired for ever.
    Nobody on the network can bring that about, for he can have none kept that has expired.
    """
    try:
        body = layout.read_json(path)
        memory = Memory() if body is None else Memory.from_json(body, path.name)
    except (RelfleetError, OSError, ValueError) as error:
        return Memory(), str(error)
    expires = known.expiry(metadata_dir / "timestamp.json")
    if expires is None or memory.high_water is None or memory.high_water < expires:
        return memory, ""
    what = f"{path.name} says that it was {clock.iso(memory.high_water)}"
    return memory, f"{what}, and the verified timestamp ends at {clock.iso(expires)}"


def remember(path: Path, memory: Memory) -> None:
    """Write the memory durably, beside whatever else the file holds."""
    try:
        others = layout.read_json(path)
    except (RelfleetError, OSError, ValueError):
        others = {}
    notes.write(path, {**(others if isinstance(others, dict) else {}), **memory.to_json()})


def trusted_time(memory: Memory, now: datetime) -> datetime:
    """`max(wall clock, highest signed time seen)`: a clock set back makes nothing old fresh again."""
    return now if memory.high_water is None else max(now, memory.high_water)


def raise_high_water(
    high_water: datetime | None, signed_at: datetime | None, now: datetime
) -> datetime | None:
    """The highest signed time seen, after one more verified timestamp.

    It never falls, never passes `signed_at`, and one step goes at most 7 days beyond what was known: a stolen
    timestamp key cannot throw a fleet years ahead. The first reading has nothing to be measured by, since a
    host may boot in 1970: it is taken whole, and `Catalog.refresh` refuses one past any expiry.
    """
    if signed_at is None:
        return high_water
    if high_water is None:
        return signed_at
    return max(high_water, min(signed_at, max(high_water, now) + MAX_CLOCK_STEP))


def is_fresh(
    memory: Memory, *, timestamp_sha256: str | None, now: datetime, boot_s: float, boot_id: str
) -> bool:
    """Whether a 304 may stand for a full refresh (design section 2).

    Args:
        memory: of the last full refresh.
        timestamp_sha256: of the timestamp in the cache now, None when there is none.
        now: wall clock.
        boot_s: seconds since boot.
        boot_id: of this boot; after a reboot the age of the last refresh is not known.
    """
    if not memory.timestamp_sha256 or memory.timestamp_sha256 != timestamp_sha256:
        return False
    if memory.earliest_expiry is None or memory.earliest_expiry <= trusted_time(memory, now):
        return False
    age_s = boot_s - memory.refreshed_boot_s
    return memory.boot_id == boot_id and 0 <= age_s < FULL_REFRESH_AFTER.total_seconds()


def is_unchanged(
    transport: Transport, memory: Memory, metadata_dir: Path, *, now: datetime, boot_s: float, boot_id: str
) -> bool:
    """Ask, with one conditional GET, whether the published timestamp is still the verified one.

    False means that a full refresh is due; nothing is asked when it is due anyway. Without an ETag it always
    is: the very same timestamp may stand beside a new root, which only the ETag of ours would show.

    Raises:
        UnreachableError: the server is away or overloaded.
        TrustError: the answer is none that an honest server gives.
    """
    cached = cached_timestamp_sha256(metadata_dir)
    if not memory.etag or not is_fresh(
        memory, timestamp_sha256=cached, now=now, boot_s=boot_s, boot_id=boot_id
    ):
        return False
    answer = transport.get(TIMESTAMP_PATH, {"If-None-Match": memory.etag}, max_length=TIMESTAMP_MAX)
    return answer.status == 304


def cached_timestamp_sha256(metadata_dir: Path) -> str | None:
    """Digest of the timestamp in the TUF cache, None when it cannot be read."""
    try:
        return sha256(disk.read_file(metadata_dir / "timestamp.json")).hexdigest()
    except OSError:
        return None


def boot_id() -> str:
    """The kernel's name of this boot; empty where it has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else clock.iso(moment)


def _moment(get: Getter, key: str) -> datetime | None:
    text = get.optional_text(key)
    return None if text is None else clock.parse_iso(text)
