"""Drives the classes that an agent runs the way the public TUF conformance suite asks for.

A refresh is the agent's: one conditional GET by `freshness`, and when something changed python-tuf under the
strict rules, limits and durable files of `trusted_metadata`, over `transport`. Left out is only what the
agent wants beyond TUF: which roles may be delegated, and what a release and a directive say. State lies in
the metadata directory; what is not metadata has names that do not end in `.json`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from urllib.parse import quote

sys.path.insert(0, str(Path(__file__).parents[2]))

from updater import freshness
from updater.catalog import Catalog

# isort: split
from agent_core import clock
from agent_core.errors import NotFoundError, RelfleetError, UsageError
from updater import download
from updater.transport import Transport
from updater.trusted_metadata import sorted_errors

BOOTSTRAP = "trusted_root"
MEMORY = "poll"
PREFIX = "/metadata"


class Client:
    """One metadata directory and one server."""

    def __init__(self, directory: Path, metadata_url: str) -> None:
        base = metadata_url.rstrip("/")
        if not base.endswith(PREFIX):
            raise UsageError("the metadata address cannot be used", why=f"it does not end in {PREFIX}/")
        self.directory = directory
        self.transport = Transport(base.removesuffix(PREFIX), proxies={})

    def refresh(self) -> None:
        memory = freshness.recall(self.directory / MEMORY, self.directory, clock.now())
        unchanged = freshness.is_unchanged(
            self.transport,
            memory,
            self.directory,
            now=clock.now(),
            boot_s=clock.boot_s(),
            boot_id=freshness.boot_id(),
        )
        if not unchanged:
            with self._catalog() as catalog:
                self._refreshed(catalog, memory)

    def download(self, names: list[str], directory: Path, base_url: str) -> None:
        with self._catalog() as catalog:
            tuf = self._refreshed(
                catalog, freshness.recall(self.directory / MEMORY, self.directory, clock.now())
            )
            with sorted_errors():
                targets = [(name, tuf.get_targetinfo(name)) for name in names]
        consistent = tuf.trusted.root.consistent_snapshot
        server = Transport(base_url.rstrip("/"), proxies={})
        for name, target in targets:
            if target is None:
                raise NotFoundError(f"{name} is no target")
            kind = "sha256" if "sha256" in target.hashes else next(iter(target.hashes))
            digest = target.hashes[kind]
            path = download.hashed_path(name, digest) if consistent else f"/targets/{name}"
            path = path.removeprefix("/targets")
            # Beside the metadata, so that nothing half shows among what was asked for.
            part = self.directory / f"{digest}.part"
            if kind == "sha256":
                download.fetch(server, path, digest, target.length, part)
            else:
                # Every file of ours has a sha256, which is what a device fetches by: here python-tuf decides.
                answer = server.get(path, max_length=target.length)
                with sorted_errors():
                    target.verify_length_and_hashes(answer.body)
                part.write_bytes(answer.body)
            part.replace(directory / quote(name, safe=""))

    def _catalog(self) -> Catalog:
        return Catalog(
            self.directory, self.transport, "conformance", (self.directory / BOOTSTRAP).read_bytes()
        )

    def _refreshed(self, catalog, memory):
        """`Catalog.refresh` without the agent's rules for delegations."""
        now = clock.now()
        with sorted_errors():
            tuf = catalog._refreshed(now, memory)
            verified = catalog._verified(tuf, None, now)
        learned = verified.memory(clock.boot_s(), freshness.boot_id())
        freshness.remember(self.directory / MEMORY, learned)
        return tuf


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--metadata-url", default="")
    parser.add_argument("--metadata-dir", type=Path, required=True)
    parser.add_argument("--target-name", action="append", default=[])
    parser.add_argument("--target-dir", type=Path)
    parser.add_argument("--target-base-url", default="")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("init").add_argument("trusted_root", type=Path)
    commands.add_parser("refresh")
    commands.add_parser("download")
    asked = parser.parse_args(argv)
    try:
        if asked.command == "init":
            (asked.metadata_dir / BOOTSTRAP).write_bytes(asked.trusted_root.read_bytes())
        elif asked.command == "refresh":
            Client(asked.metadata_dir, asked.metadata_url).refresh()
        else:
            client = Client(asked.metadata_dir, asked.metadata_url)
            client.download(asked.target_name, asked.target_dir, asked.target_base_url)
    except (RelfleetError, OSError) as error:
        print(f"refused: {getattr(error, 'reason', 'os')}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
