"""A release server on loopback, a ceremony for it, a client, and real bundles."""

from __future__ import annotations

from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest

from agent_core.bundle import Index, host_platforms, pack
from keys.cli import hold_ceremony
from release_server.publish.client import Client
from tests.release_origin import PASSPHRASE, PRODUCT, TOKEN, serve

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def origin():
    """A running server that has no root yet."""
    with serve() as running:
        yield running


@pytest.fixture
def keys_dir(tmp_path):
    return tmp_path / "keys"


@pytest.fixture
def held(origin, keys_dir):
    """The server after a ceremony; root, targets and key files are in `keys_dir`."""
    ceremony_held = hold_ceremony(
        keys_dir, origin.online_keys, lambda _prompt: PASSPHRASE, datetime.now(UTC), scrypt_n=2**4
    )
    origin.begin(ceremony_held)
    return ceremony_held


@pytest.fixture
def waits():
    """How long a client wanted to wait, instead of waiting."""
    return []


@pytest.fixture
def make_client():
    """Makes clients, and closes them at the end."""
    made = []

    def make(url: str, token: str | None = TOKEN, **how) -> Client:
        made.append(Client(url, token, **how))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def client(origin, waits, make_client):
    return make_client(origin.url, sleep=waits.append, jitter=lambda: 1.0)


@pytest.fixture
def make_bundle(tmp_path):
    """Makes a real bundle on disk and returns its archive."""

    def make(
        version: str = "1.0.0",
        *,
        platform: str | None = None,
        content: bytes = b"print('hello')\n",
        product: str = PRODUCT,
        into: Path | None = None,
    ) -> Path:
        platform = platform or host_platforms()[0]
        tree = tmp_path / "trees" / sha256(f"{version}{platform}".encode() + content).hexdigest()[:16]
        (tree / "app").mkdir(parents=True, exist_ok=True)
        (tree / "agent.py").write_bytes(b"raise SystemExit(0)\n")
        (tree / "app" / "main.py").write_bytes(content)
        for path in tree.rglob("*.py"):
            path.chmod(0o644)
        out = into or tmp_path / "dist"
        out.mkdir(parents=True, exist_ok=True)
        archive = out / f"{product}-{version}-{platform}.tar.zst"
        files = pack(tree, archive)
        index = Index(
            product=product,
            version=version,
            platform=platform,
            entry=("{python}", "app/main.py"),
            files=files,
        )
        archive.with_name(archive.name.removesuffix(".tar.zst") + ".index.json").write_bytes(index.to_bytes())
        return archive

    return make
