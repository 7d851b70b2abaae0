"""One client of the conformance cases: its directories, and calls of its command line."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from agent_core import clock
from tests.conformance import client

if TYPE_CHECKING:
    from datetime import datetime

    from tests.http_origin import Origin
    from tests.repository_simulator import RepositorySimulator

PROGRAM = Path(client.__file__).with_name("tuf_client")
OK, REFUSED = 0, 1


class Runner:
    """One client: its directories, and calls of the command line in this process."""

    def __init__(self, home: Path, origin: Origin, repository: RepositorySimulator):
        self.metadata, self.files = home / "client", home / "files"
        for directory in (self.metadata, self.files):
            directory.mkdir()
        self.url = f"{origin.url}/metadata/"
        self.root = home / "trusted_root.json"
        self.root.write_bytes(repository.trusted_root)
        self.origin = origin

    def words(self, command, *more):
        place = ["--metadata-dir", str(self.metadata)]
        if command == "init":
            return [*place, "init", str(self.root)]
        return ["--metadata-url", self.url, *place, *map(str, more), command]

    def init(self):
        return client.main(self.words("init"))

    def refresh(self):
        return client.main(self.words("refresh"))

    def download(self, *names):
        return client.main([*map(str, self.words_to_download(*names))])

    def versions(self):
        """What is trusted, read back as the suite reads it."""
        return {
            place.stem: json.loads(place.read_bytes())["signed"]["version"]
            for place in self.metadata.glob("*.json")
        }

    def downloaded(self):
        return sorted(place.read_bytes() for place in self.files.rglob("*") if place.is_file())

    def words_to_download(self, *names):
        named = [word for name in names for word in ("--target-name", name)]
        base = f"{self.origin.url}/targets/"
        return self.words("download", *named, "--target-dir", self.files, "--target-base-url", base)

    def content(self, role):
        """The bytes that are kept of a role."""
        return (self.metadata / f"{role}.json").read_bytes()

    def at(self, when: datetime, words):
        """One call while the clock shows another time; its exit code."""
        if shutil.which("faketime") is None:
            pytest.skip("faketime is not here: scripts/test-setup installs it")
        said = clock.iso(when).replace("T", " ").rstrip("Z")
        environ = {"TZ": "UTC", "PATH": "/usr/bin:/bin"}
        argv = ["faketime", said, PROGRAM, *map(str, words)]
        return subprocess.run(argv, check=False, env=environ, capture_output=True).returncode
