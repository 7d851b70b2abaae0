"""This module prepares hosts for the tiers that run real agents: a real origin, bundles and launcher.

The bundles are slim: the device's half stands in one zip, and what it imports comes from the environment that
runs the tests, so that one upgrade costs a second of processor time. Everything lies in memory where it can.
"""

from __future__ import annotations

import json
import py_compile
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Self

from agent_core import delta, slots
from agent_core.bundle import Index, host_platforms, pack
from agent_core.layout import write_durable
from agent_core.wire import DeltaFacts, ReleaseFacts, ReportAnswer, bundle_path, delta_path
from tests.crash.host import RUNS, Host
from tests.http_origin import Origin, Request, Status
from tests.repository_simulator import RepositorySimulator
from updater import identity as identities
from updater import install, poll

HERE = Path(__file__).resolve().parents[2]
PRODUCT, COHORT = "probe", "stable"
OLD, GOOD, NEW, BAD = "0.9.0", "1.0.0", "1.1.0", "1.2.0"
BY_DELTA = "1.1.0 by a delta"
"""Offered like a version: the new one, with a delta that leads to it from the good one."""
BOOTS = 2
FLOOR = 1
OLD_SKIP = ("0" * 12, "unhealthy", 0)
"""A bundle that failed here long ago: no crash may make the host forget it."""

AGENT = """\
import os, sys
here = os.path.dirname(os.path.realpath(__file__))
sys.dont_write_bytecode = True
sys.path[:0] = [os.path.join(here, "lib.zip"), {packages!r}]
if __name__ == "__main__":
    from updater.__main__ import main
    sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Release:
    """What the release keys say of a version: its facts, and where the archive is."""

    facts: ReleaseFacts
    path: str
    sha256: str
    length: int
    index: bytes


class Rig:
    """Origins, bundles and prepared hosts; `with Rig() as rig`.

    Attributes:
        home: where all of it lies.
        names: `VERSION-DIGEST12` by version.
    """

    def __init__(self) -> None:
        memory = Path("/dev/shm")
        self.home = Path(tempfile.mkdtemp(prefix="relfleet-crash-", dir=memory if memory.is_dir() else None))
        self.names: dict[str, str] = {}
        self.releases: dict[str, Release] = {}
        self._origins: dict[str, Origin] = {}
        self._trust = b""

    def __enter__(self) -> Self:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was prepared goes with us then too
        try:
            self._publish()
            for offer in (*self.releases, BY_DELTA):
                origin = Origin(self.home / f"www-{offer}")
                origin.answer("POST", "/api/v1/report", _accept)
                self._origins[offer] = origin.__enter__()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for origin in self._origins.values():
            origin.__exit__()
        subprocess.run(["chmod", "-R", "u+w", self.home], check=False)
        shutil.rmtree(self.home, ignore_errors=True)

    # --- what is on offer --------------------------------------------------------------------------------

    def _publish(self) -> None:
        library = self.home / "lib.zip"
        _pack_device(library)
        repository = RepositorySimulator(self.home / "www", PRODUCT)
        repository.set_policy(FLOOR)
        for seq, version in enumerate((OLD, GOOD, NEW, BAD), 1):
            archive, index = self._bundle(version, library)
            self.names[version] = f"{version}-{sha256(index.to_bytes()).hexdigest()[:12]}"
            facts = repository.add_release(
                version,
                seq,
                archive.read_bytes(),
                index.to_bytes(),
                index.platform,
                unpacked=index.unpacked,
                files=len(index.files),
            )
            packed = archive.read_bytes()
            self.releases[version] = Release(
                facts,
                bundle_path(PRODUCT, version, index.platform),
                sha256(packed).hexdigest(),
                len(packed),
                index.to_bytes(),
            )
        for revision, offer in enumerate((OLD, GOOD, NEW, BAD, BY_DELTA), 1):
            version = offer.split()[0]
            if offer == BY_DELTA:
                self._add_delta(repository, GOOD, version)
            repository.set_directive(
                COHORT,
                release=version,
                base=version,
                revision=revision,
                salt=version,
                poll_s=1,
                report_s=3600,
            )
            repository.publish()
            shutil.copytree(repository.directory, self.home / f"www-{offer}")
        self._trust = repository.trusted_root
        for version in self.releases:
            shutil.rmtree(self.home / f"tree-{version}")

    def _add_delta(self, repository: RepositorySimulator, before: str, after: str) -> None:
        old, new = (self.releases[version] for version in (before, after))
        trees = [self.home / f"tree-{version}" for version in (before, after)]
        indexes = [Index.from_bytes(release.index) for release in (old, new)]
        out = self.home / "delta"
        delta.make(trees[0], indexes[0], trees[1], indexes[1], out)
        facts = DeltaFacts(before, old.facts.index_sha256, new.facts.index_sha256)
        path = delta_path(PRODUCT, after, new.facts.platform, old.facts.index_sha256)
        repository.add_target(path, out.read_bytes(), facts.to_json())

    def _bundle(self, version: str, library: Path) -> tuple[Path, Index]:
        tree = self.home / f"tree-{version}"
        files = {
            "agent.py": AGENT.format(packages=sysconfig.get_paths()["purelib"]),
            "app/check": "#!/bin/sh\nexit 0\n",
            "app/notes/version.txt": version * 999,
        }
        for path, text in files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text)
        shutil.copy(library, tree / "lib.zip")
        archive = self.home / f"{version}.tar.zst"
        packed = pack(tree, archive)
        bad = f'echo run >> "$RELFLEET_ROOT/{RUNS}"; exit 3'
        index = Index(
            product=PRODUCT,
            version=version,
            platform=host_platforms()[0],
            entry=("/bin/sh", "-c", bad) if version == BAD else ("/bin/sleep", "3600"),
            files=packed,
            health=({"kind": "process", "interval_s": 0.05, "timeout_s": 0.2, "grace_s": 0},),
            observe_s=0.2,
            boots=BOOTS,
            deadman_s=20,
        )
        return archive, index

    def origin(self, version: str) -> Origin:
        return self._origins[version]

    def url(self, version: str) -> str:
        """The server that leads every agent to this version."""
        return self._origins[version].url

    # --- hosts -------------------------------------------------------------------------------------------

    def host(self, root: Path) -> Host:
        return Host(self, root)

    def enrolled(self, root: Path, *, reserve: int = 0) -> Host:
        """A new host without a version."""
        host = Host(self, root)
        layout = host.layout
        layout.make()
        write_durable(layout.trust_root, self._trust)
        identities.make_key(layout)
        identities.save(
            layout, identities.Identity("http://127.0.0.1:9", PRODUCT, "crash-1", host_platforms()[0], COHORT)
        )
        host.lead_to(GOOD, reserve=reserve)
        return host

    def installed(self, root: Path, *, reserve: int = 0) -> Host:
        """A host with 1.0.0 good, 0.9.0 before it, a floor and a bundle that failed once."""
        host = self.enrolled(root, reserve=reserve)
        for version in (OLD, GOOD):
            host.lead_to(version, reserve=reserve)
            outcome = install.first_version(host.device)
            assert outcome.candidate == self.names[version], outcome
            if version == GOOD:
                slots.begin_trial(root, outcome.candidate, BOOTS, 20)
                slots.boot(root, "")
                slots.commit(root)
                poll.check(host.device)
        record = slots.refuse(root, f"0.1.0-{OLD_SKIP[0]}", OLD_SKIP[1], OLD_SKIP[2])
        assert record.floor == FLOOR
        return host

    def copy(self, source: Path, to: Path) -> Host:
        """The host that lies in `source`, again."""
        subprocess.run(["cp", "-a", source, to], check=True)
        return Host(self, to)


def _accept(request: Request) -> Status:
    """Take every report, as the server does."""
    told = json.loads(request.body)
    accepted = max([step["number"] for step in told.get("transitions", [])], default=0)
    answer = ReportAnswer(COHORT, accepted, "session", 86_400)
    return Status(200, {"Content-Type": "application/json"}, json.dumps(answer.to_json()).encode())


def _pack_device(library: Path) -> None:
    """`agent_core` and `updater` with their byte code, as one zip that Python imports from."""
    with zipfile.ZipFile(library, "w", zipfile.ZIP_STORED) as archive:
        for package in ("agent_core", "updater"):
            for source in sorted((HERE / package).rglob("*.py")):
                name = str(source.relative_to(HERE))
                archive.write(source, name)
                with tempfile.NamedTemporaryFile() as compiled:
                    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
                    py_compile.compile(str(source), compiled.name, name, doraise=True, invalidation_mode=mode)
                    archive.write(compiled.name, name + "c")
