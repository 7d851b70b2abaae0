"""This module makes tiny real bundles, and gives them out as a server would."""

from __future__ import annotations

import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from agent_core import delta as deltas
from agent_core.archive import stored_zip
from agent_core.bundle import INDEX_NAME, Index, pack
from agent_core.slots import digest_of
from agent_core.wire import ReleaseFacts
from tests.crash.journal import Directory, File, Tree
from updater.catalog import Delta, Release
from updater.transport import Answer, Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PRODUCT = "shop"
BOOTS = 3
FLOOR = 5


@dataclass(frozen=True)
class Bundle:
    """A release as it is published, and the directory that it has to become."""

    archive: bytes
    index: Index
    index_bytes: bytes
    release: Release
    name: str
    tree: Tree

    @property
    def digest(self) -> str:
        return digest_of(self.name)


def _files(version: str) -> dict[str, str]:
    common = f"# {sha256(PRODUCT.encode()).hexdigest()}\n"
    return {
        "agent.py": f"VERSION = {version!r}\n",
        "app/main.py": f"{common}# {version}\n" * 3,
        "app/empty": "",
    }


def _laid(tree: Path, files: dict[str, str]) -> Path:
    for path, content in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(content)
    return tree


@cache
def bundle(version: str) -> Bundle:
    """The release `version`: three files in two directories."""
    files = _files(version)
    with tempfile.TemporaryDirectory() as place:
        tree = _laid(Path(place) / "tree", files)
        packed = pack(tree, Path(place) / "archive")
        archive = (Path(place) / "archive").read_bytes()
    index = Index(
        product=PRODUCT, version=version, platform="any", entry=("{python}", "app/main.py"), files=packed, boots=BOOTS
    )  # fmt: skip
    index_bytes = index.to_bytes()
    facts = ReleaseFacts(
        product=PRODUCT,
        version=version,
        seq=int(version.replace(".", "")),
        platform="any",
        index_sha256=sha256(index_bytes).hexdigest(),
        index_length=len(index_bytes),
        unpacked=index.unpacked,
        files=len(index.files),
    )
    path = f"bundles/{PRODUCT}/{version}/any"
    release = Release(
        facts, "any", f"{path}.tar.zst", sha256(archive).hexdigest(), len(archive), f"{path}.json",
        facts.index_sha256, facts.index_length,
    )  # fmt: skip
    stands: Tree = {
        "": Directory(0o555),
        "app": Directory(0o555),
        INDEX_NAME: File(index_bytes, 0o444),
        **{path: File(content.encode(), 0o444) for path, content in files.items()},
    }
    return Bundle(archive, index, index_bytes, release, f"{version}-{facts.index_sha256[:12]}", stands)


class Offer(NamedTuple):
    """A delta as it is published, and the digest of the index that it leads from."""

    delta: Delta
    base: str
    content: bytes


@cache
def offer(before: str, version: str, *, spoilt: bool = False) -> Offer:
    """The delta between two releases; a spoilt one is signed and whole, and makes other bytes than the index lists."""
    base, goal = bundle(before), bundle(version)
    files = _files(version)
    if spoilt:
        files["app/main.py"] = files["app/main.py"].replace("#", "!")
    with tempfile.TemporaryDirectory() as place:
        tree, out = _laid(Path(place) / "tree", files), Path(place) / "delta"
        made = replace(goal.index, files=pack(tree, Path(place) / "archive"))
        deltas.make(_laid(Path(place) / "base", _files(before)), base.index, tree, made, out)
        content = out.read_bytes()
    path = f"deltas/{PRODUCT}/{before}/{version}/any"
    signed = Delta(before, path, sha256(content).hexdigest(), len(content))
    return Offer(signed, base.release.facts.index_sha256, content)


def launcher_file(number: int) -> bytes:
    """What passes for a launcher that can do so much."""
    return stored_zip({"agent_core/launcher.py": f"LAUNCHER = {number}\n".encode()})


class Origin:
    """The server's files without the network, which is not what this tier is about; it honours Range.

    Args:
        bundles: what is published.
        ranges: whether it answers 206, or sends the whole file again.
        offer: a delta that is published too.
        began: told when its download begins.
    """

    PIECES = 3

    def __init__(
        self,
        *bundles: Bundle,
        ranges: bool = True,
        offer: Offer | None = None,
        began: Callable[[], None] = lambda: None,
    ) -> None:
        self.ranges, self._began = ranges, began
        self._delta = offer.delta.url if offer else ""
        self.files = {each.release.archive_url: each.archive for each in bundles}
        self.files |= {each.release.index_url: each.index_bytes for each in bundles}
        self.files |= {offer.delta.url: offer.content} if offer else {}

    def get(self, path: str, *, max_length: int) -> Answer:
        return Answer(200, {}, self.files[path][:max_length])

    @contextmanager
    def open(
        self, path: str, headers: dict[str, str] | None = None, *, deadline_s: float | None = None
    ) -> Iterator[Stream]:
        if path == self._delta:
            self._began()
        content = self.files[path]
        etag = f'"{sha256(content).hexdigest()}"'
        asked = re.fullmatch(r"bytes=(\d+)-", (headers or {}).get("Range", ""))
        said = {"etag": etag}
        begin = (
            int(asked[1]) if asked and self.ranges and (headers or {}).get("If-Range", etag) == etag else 0
        )
        if begin:
            said["content-range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        rest = content[begin:]
        step = -(-len(rest) // self.PIECES)
        pieces = (rest[at : at + step] for at in range(0, len(rest), step))
        yield Stream(206 if begin else 200, said, len(rest), pieces)
