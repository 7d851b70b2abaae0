"""This module makes tiny real bundles, and gives them out as a server would."""

from __future__ import annotations

import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from agent_core.bundle import INDEX_NAME, Index, pack
from agent_core.slots import digest_of
from agent_core.wire import ReleaseFacts
from tests.crash.journal import Directory, File, Tree
from updater.catalog import Release
from updater.transport import Answer, Stream

if TYPE_CHECKING:
    from collections.abc import Iterator

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


@cache
def bundle(version: str) -> Bundle:
    """The release `version`: three files in two directories."""
    files = {"agent.py": f"VERSION = {version!r}\n", "app/main.py": f"# {version}\n" * 3, "app/empty": ""}
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        for path, content in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(content)
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


class Origin:
    """The server's files without the network, which is not what this tier is about; it honours Range.

    Args:
        bundles: what is published.
        ranges: whether it answers 206, or sends the whole file again.
    """

    PIECES = 3

    def __init__(self, *bundles: Bundle, ranges: bool = True) -> None:
        self.ranges = ranges
        self.files = {each.release.archive_url: each.archive for each in bundles}
        self.files |= {each.release.index_url: each.index_bytes for each in bundles}

    def get(self, path: str, *, max_length: int) -> Answer:
        return Answer(200, {}, self.files[path][:max_length])

    @contextmanager
    def open(
        self, path: str, headers: dict[str, str] | None = None, *, deadline_s: float | None = None
    ) -> Iterator[Stream]:
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
