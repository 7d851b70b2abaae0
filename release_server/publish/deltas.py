"""Makes the deltas of a push: from the newest earlier releases, fetched and verified as a device would.

A delta spares devices a download and nothing depends on one, so a delta that cannot be made, or is not worth
it, is told and left out.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from agent_core import bundle, console, delta
from agent_core.bundle import Index
from agent_core.errors import RelfleetError
from agent_core.wire import DeltaFacts, bundle_path, delta_path, index_path
from release_server.publish import sign
from release_server.publish.sign import Blob, Delta

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from tuf.api.metadata import Targets

    from agent_core.wire import ReleaseFacts
    from release_server.publish.sign import Release

    Fetch = Callable[[str, int, str, Path], Path]

MOST_SHARE = 0.7
"""Of the bundle's length: a delta that spares less is not worth a device's second look."""


@dataclass(frozen=True)
class Workshop:
    """Where deltas are made.

    Attributes:
        cache: bundles that were fetched, by digest; only those of the last push are kept.
        out: where finished deltas lie until they are uploaded.
        fetch: gives a file with the target of a published name, length and sha256, as of `export`.
        tell: told of each step, for people.
    """

    cache: Path
    out: Path
    fetch: Fetch
    tell: Callable[[str], None] = console.say

    def make(self, targets: Targets, releases: Sequence[Release], most: int) -> list[Delta]:
        """The deltas to these releases from the `most` newest earlier ones of their platform."""
        self.cache.mkdir(parents=True, exist_ok=True)
        used: set[str] = set()
        made = []
        for release in releases:
            for base in earlier(targets, release, most):
                try:
                    found = self._made(targets, release, base, used)
                except (RelfleetError, OSError) as error:
                    self.tell(f"no delta from {base.version}: {error}")
                else:
                    made += [found] if found else []
        for file in self.cache.iterdir():
            if file.name not in used:
                file.unlink()
        return made

    def _made(self, targets: Targets, release: Release, base: ReleaseFacts, used: set[str]) -> Delta | None:
        """The delta, proved by applying it; None when it is not short enough."""
        facts = release.facts
        file = self.out / f"{facts.version}-{facts.platform}-from-{base.version}.delta"
        with tempfile.TemporaryDirectory(prefix="relfleet-delta-") as home:
            place = Path(home)
            old = self._fetched(targets, base, place / "old", used)
            new = _unpacked(release.archive.path, release.index.path, place / "new")
            length = delta.make(place / "old", old, place / "new", new, file)
            share = length / release.archive.length
            if not length:  # both hold the same files, and there is no blob without a byte
                return None
            if share > MOST_SHARE:
                self.tell(f"no delta from {base.version}: it would be {share:.0%} of the bundle")
                return None
            digest = delta.apply(file, place / "old", old, new, place / "again")
        self.tell(f"made the delta from {base.version}: {share:.1%} of the bundle")
        target = delta_path(facts.product, facts.version, facts.platform, base.index_sha256)
        signed = DeltaFacts(base.version, base.index_sha256, facts.index_sha256)
        return Delta(target, signed, Blob(file, digest, length))

    def _fetched(self, targets: Targets, facts: ReleaseFacts, into: Path, used: set[str]) -> Index:
        """An earlier bundle, from the cache or the server, each byte verified."""
        names = (facts.product, facts.version, facts.platform)
        raw, archive = (self._blob(targets, path, used) for path in (index_path(*names), bundle_path(*names)))
        return _unpacked(archive, raw, into)

    def _blob(self, targets: Targets, path: str, used: set[str]) -> Path:
        target = targets.targets[path]
        digest = target.hashes["sha256"]
        file = self.cache / digest
        used.add(digest)
        if not file.exists() or _digest(file) != digest:
            self.tell(f"fetching {path}")
            folder, _, name = path.rpartition("/")
            part = self.cache / f"{digest}.part"
            self.fetch(f"targets/{folder}/{digest}.{name}", target.length, digest, part).replace(file)
        return file


def _unpacked(archive: Path, index_file: Path, into: Path) -> Index:
    index = Index.from_bytes(index_file.read_bytes())
    bundle.unpack(archive, index, into)
    return index


def earlier(targets: Targets, release: Release, most: int) -> list[ReleaseFacts]:
    """The newest earlier releases that have a bundle for the same platform, the newest first."""
    facts = release.facts
    seq = sign.next_seq(targets, facts.product, facts.version)
    known = [
        other
        for other in sign.releases(targets, facts.product).values()
        if other.platform == facts.platform and other.seq < seq
    ]
    return sorted(known, key=lambda other: -other.seq)[:most]


def _digest(file: Path) -> str:
    digest = sha256()
    with file.open("rb") as content:
        while chunk := content.read(bundle.CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
