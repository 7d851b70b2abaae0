"""Puts a signed release with its metadata into one file, for hosts that reach no server.

What goes in is verified first as a device will verify it, so that a file that no host would take is not made.
Nothing is signed here, and no key is needed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from agent_core.errors import NotFoundError, RelfleetError, TrustError, UnreachableError
from agent_core.release_file import TARGETS, Member, Title, write
from agent_core.wire import Reason, bundle_path, index_path
from keys import ceremony
from release_server.publish import sign

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime
    from pathlib import Path

    from tuf.api.metadata import TargetFile, Targets

    from release_server.publish.client import Client

CHUNK = 2**20
ROOT_NAME = re.compile(r"([1-9][0-9]*)\.root\.json")
TARGETS_NAME = re.compile(r"([1-9][0-9]*)\.targets\.json")


@dataclass(frozen=True)
class Source:
    """Verified metadata that a release file is made of.

    Attributes:
        roots: every root that is known, by version.
        targets: as they were signed.
    """

    roots: dict[int, bytes]
    targets: bytes
    listed: Targets


@dataclass(frozen=True)
class _Wanted:
    """One target, and the name under which it is published."""

    name: str
    length: int
    sha256: str


def from_server(client: Client, trust: bytes, cache: Path) -> Source:
    """The server's current metadata, by the release manager's own TUF client; errors as of `sign.fetch`."""
    trusted = sign.fetch(client, trust, cache)
    first = ceremony.parse_root(trust).signed.version
    roots = {first: trust, **_by_version(cache / "root_history", ROOT_NAME)}
    return Source(roots, (cache / "targets.json").read_bytes(), trusted.targets.signed)


def from_directory(directory: Path, trust: bytes, now: datetime) -> Source:
    """Metadata as published, or as a release manager's cache has it, verified from the trusted root on.

    Raises:
        NotFoundError: there are no targets.
        TrustError: the chain of roots is broken, or the targets are not signed, or have expired.
    """
    root = ceremony.parse_root(trust)
    ceremony.verify_root(root)
    found = _by_version(directory, ROOT_NAME) | _by_version(directory / "root_history", ROOT_NAME)
    roots = {root.signed.version: trust}
    while (body := found.get(root.signed.version + 1)) is not None:
        following = ceremony.parse_root(body)
        ceremony.verify_root(following, root)
        root = following
        roots[root.signed.version] = body
    numbered = _by_version(directory, TARGETS_NAME)
    plain = directory / "targets.json"
    if not numbered and not plain.is_file():
        raise NotFoundError(f"there are no targets in {directory}", then="copy the server's metadata there")
    content = numbered[max(numbered)] if numbered else plain.read_bytes()
    metadata = ceremony.parse_targets(content)
    if ceremony.missing_signatures(root.signed, "targets", metadata):
        raise TrustError(
            "the targets are not signed by enough of the release keys",
            why=f"root {root.signed.version} is the newest in {directory}",
            reason=Reason.BAD_SIGNATURE,
        )
    for role, signed in (("root", root.signed), ("targets", metadata.signed)):
        if signed.is_expired(now):
            raise TrustError(f"the {role} expired at {signed.expires}", reason=Reason.EXPIRED)
    return Source(roots, content, metadata.signed)


def _by_version(directory: Path, form: re.Pattern[str]) -> dict[int, bytes]:
    if not directory.is_dir():
        return {}
    return {
        int(match[1]): path.read_bytes()
        for path in directory.iterdir()
        if (match := form.fullmatch(path.name))
    }


def export(
    source: Source,
    product: str,
    version: str,
    out: Path,
    *,
    platforms: Sequence[str] = (),
    fetch: Callable[[str, int, str, Path], Path],
    progress: Callable[[int, int], None] | None = None,
) -> Title:
    """Write the release file of one version; the same release always gives the same bytes.

    Args:
        platforms: which bundles; all that are signed when empty.
        fetch: gives a file with the target of that published name, length and sha256; the path is where it
            may put one.

    Raises:
        NotFoundError: this version, or a platform of it, is not signed.
        TrustError, UnreachableError, DiskError: as of `fetch` and `release_file.write`.
    """
    chosen = _platforms(source.listed, product, version, platforms)
    members = [
        Member.of(f"metadata/{number}.root.json", source.roots[number]) for number in sorted(source.roots)
    ]
    members.append(Member.of(TARGETS, source.targets))
    fetched: list[Path] = []
    try:
        for platform in chosen:
            for path in (index_path(product, version, platform), bundle_path(product, version, platform)):
                wanted = _wanted(path, source.listed.targets[path])
                place = out.with_name(f".{out.name}.{wanted.sha256[:12]}")
                fetched.append(place)
                file = fetch(wanted.name, wanted.length, wanted.sha256, place)
                members.append(Member(wanted.name, file, wanted.length, wanted.sha256))
        title = Title(product, version, chosen)
        write(out, title, members, progress)
    finally:
        for place in fetched:
            place.unlink(missing_ok=True)
    return title


def _platforms(targets: Targets, product: str, version: str, asked: Sequence[str]) -> tuple[str, ...]:
    known = sorted(
        facts.platform for facts in sign.releases(targets, product).values() if facts.version == version
    )
    if not known:
        raise NotFoundError(f"there is no signed {product} {version}", then="release list")
    if unknown := sorted(set(asked) - set(known)):
        raise NotFoundError(
            f"{product} {version} has no bundle for {', '.join(unknown)}", why=f"it has {', '.join(known)}"
        )
    return tuple(sorted(set(asked) or known))


def _wanted(path: str, target: TargetFile) -> _Wanted:
    folder, _, name = path.rpartition("/")
    digest = target.hashes["sha256"]
    return _Wanted(f"targets/{folder}/{digest}.{name}", target.length, digest)


def download(
    client: Client, progress: Callable[[int, int], None] | None
) -> Callable[[str, int, str, Path], Path]:
    """A `fetch` that asks the server."""

    def fetch(name: str, length: int, digest: str, place: Path) -> Path:
        response = client.call("GET", f"/{name}", static=True)
        seen, got = sha256(), 0
        try:
            with place.open("wb") as out:
                for piece in response.iter_content(CHUNK):
                    got += len(piece)
                    if got > length:
                        break
                    seen.update(piece)
                    out.write(piece)
                    if progress:
                        progress(got, length)
        except OSError as error:  # also of requests, for a connection that broke
            raise UnreachableError(f"{name} could not be fetched", why=str(error)) from error
        finally:
            response.close()
        if (got, seen.hexdigest()) != (length, digest):
            raise _changed(f"what {client.url} serves as {name}", digest)
        return place

    return fetch


def local(bundles: Sequence[Path]) -> Callable[[str, int, str, Path], Path]:
    """A `fetch` that looks among bundles on this machine, each with its index beside it."""
    found: dict[str, Path] = {}
    for archive in bundles:
        index = archive.with_name(archive.name.removesuffix(".tar.zst") + ".index.json")
        for path in (archive, index):
            if not path.is_file():
                raise NotFoundError(f"there is no {path}", then="an archive and its index stand side by side")
            with path.open("rb") as content:
                digest = sha256()
                while piece := content.read(CHUNK):
                    digest.update(piece)
            found[digest.hexdigest()] = path

    def fetch(name: str, _length: int, digest: str, _place: Path) -> Path:
        if digest not in found:
            raise _changed(f"none of the bundles given is {name}", digest)
        return found[digest]

    return fetch


def _changed(what: str, digest: str) -> RelfleetError:
    return TrustError(
        what if what.startswith("none") else f"{what} is not what the release keys signed",
        why=f"the signed sha256 is {digest}",
        reason=Reason.DIGEST_MISMATCH,
    )
