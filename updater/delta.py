"""Whether a release can be made of a version that is here, and making it so; the full bundle is never far.

A delta saves a download and decides nothing: what it gives is held to the same signed index. Whatever goes
wrong with one is noted by its digest, so that it is not tried again, and the caller takes the full bundle.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from hashlib import sha256
from typing import TYPE_CHECKING

from agent_core import disk, slots
from agent_core.bundle import INDEX_NAME, Index
from agent_core.errors import RelfleetError, UnreachableError
from agent_core.late import late_dataclass
from agent_core.layout import read_json
from agent_core.wire import Getter, Reason
from updater import notes
from updater.share import NoShareError
from updater.stage import check_room, stage

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from agent_core.layout import Layout
    from updater.catalog import Catalog, Delta, Release

    Fetch = Callable[[str, str, int, Path], object]

log = logging.getLogger(__name__)

MOST_TRIES = 3
"""How often a delta is begun whose download is cut; it is resumed. Any other failure is the last."""
MOST_NOTES = 32


@late_dataclass(frozen=True)
class Way:
    """A delta that leads from a version that stands here to a release."""

    delta: Delta
    base: Path
    index: Index


def find(layout: Layout, catalog: Catalog, release: Release) -> Way | None:
    """The way from the good version, or else from another one here; None when there is none to be tried."""
    record = slots.read(layout.root)
    good = record.good if record else ""
    for name in sorted(disk.listdir(layout.versions), key=lambda name: (name != good, name)):
        try:
            raw = disk.read_file(layout.version_dir(name) / INDEX_NAME)
            delta = catalog.delta(release, sha256(raw).hexdigest())
            if delta and delta.length < release.length and _Tries(layout).of(delta) < MOST_TRIES:
                return Way(delta, layout.version_dir(name), Index.from_bytes(raw))
        except (OSError, RelfleetError) as error:
            log.warning("no delta from this version", extra={"base": name, "why": str(error)})
    return None


def take(layout: Layout, way: Way, release: Release, index_bytes: bytes, reserve: int, fetch: Fetch) -> str:
    """Stage a release by a delta.

    Args:
        way: as `find` said.
        index_bytes: the release's index.
        reserve: bytes that must stay free afterwards.
        fetch: downloads a published path with its sha256 and length into a part file.

    Returns:
        Why it could not be done, in words; empty when the version is staged.

    Raises:
        DiskError: `no-room`, before anything was begun: there is none for the full bundle either.
        NoShareError: it has to wait, as it would for the full bundle; that is no try.
    """
    delta, tries = way.delta, _Tries(layout)
    before = tries.of(delta)
    part = layout.download / f"{delta.sha256}.part"
    check_room(layout, Index.from_bytes(index_bytes), reserve, part, delta.length)
    try:
        tries.note(delta, before + 1)
        fetch(delta.url, delta.sha256, delta.length, part)
        # Before it is applied: what ends this process, as the kernel does for want of memory, ends it once.
        tries.note(delta, MOST_TRIES)
        base = (way.base, way.index)
        stage(layout, part, index_bytes, release.facts, delta.sha256, reserve=reserve, base=base)
        with suppress(RelfleetError, OSError):  # the version stands; a note is no reason to fetch it again
            tries.note(delta, 0)
    except NoShareError:
        tries.note(delta, before)
        raise
    except UnreachableError as error:
        return _told(delta, error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the full bundle is there
        with suppress(RelfleetError, OSError):
            tries.note(delta, MOST_TRIES)
        with suppress(OSError):
            disk.remove(part)
        return _told(delta, error)
    with suppress(OSError):
        disk.remove(part)
    log.info("staged by a delta", extra={"base": way.base.name, "length": delta.length})
    return ""


def _told(delta: Delta, error: Exception) -> str:
    reason = error.reason if isinstance(error, RelfleetError) else Reason.INTERNAL
    why = f"{type(error).__name__}: {error}" if reason == Reason.INTERNAL else str(error)
    log.warning("delta given up", extra={"delta": delta.path, "reason": str(reason), "why": why})
    return f"the delta from {delta.from_version} did not serve ({reason}), the full bundle was taken"


class _Tries:
    """How often each delta was begun here, by digest; deltas that came to a version are forgotten."""

    def __init__(self, layout: Layout) -> None:
        self._file = layout.state / "deltas.json"

    def of(self, delta: Delta) -> int:
        return self._all().get(delta.sha256, 0)

    def note(self, delta: Delta, tries: int) -> None:
        others = {digest: count for digest, count in self._all().items() if digest != delta.sha256}
        kept = list(others.items())[-MOST_NOTES:] + ([(delta.sha256, tries)] if tries else [])
        notes.write(self._file, dict(kept))

    def _all(self) -> dict[str, int]:
        """A note that cannot be read is one that is begun anew."""
        try:
            get = Getter(read_json(self._file, {}), self._file.name)
            return {digest: get.integer(digest) for digest in get.mapping}
        except RelfleetError:
            return {}
