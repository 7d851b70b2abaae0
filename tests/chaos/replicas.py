"""Two replicas on one PostgreSQL, one signer, and what kills them.

Replicas have a data directory each; blobs, uploads, published files and the public halves of the online keys
are on a file system that they share (docs/operations.md), which links say here.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import time
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import psycopg

from agent_core.bundle import Index, pack
from agent_core.errors import RelfleetError
from release_server.publish.client import Client
from tests.integration.world import World, index_of, until

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.postgres import Cluster

SHARED = ("blobs", "uploads", "repository", "trust")
MOMENT_S = 3.0
"""How long a kill waits for its moment before it kills anyway."""


class Replicas(World):
    """A world whose server is two replicas, of which any process may be killed."""

    def __init__(self, home: Path, cluster: Cluster, url: str, dice: random.Random) -> None:
        super().__init__(home, url)
        self.cluster, self.dice = cluster, dice
        self.kills: Counter[str] = Counter()
        self.ports = {name: _free_port() for name in ("a", "b")}
        self.frozen = False

    @property
    def urls(self) -> list[str]:
        return [f"http://127.0.0.1:{port}" for port in self.ports.values()]

    @property
    def client(self) -> Client:
        """Of any replica, as behind a load balancer; what fails is for the caller to ask again."""
        token = (self.server_data / "admin.token").read_text().strip()
        return Client(self.dice.choice(self.urls), token, timeout_s=20, attempts=1)

    def derive(self, version: str, files: Mapping[str, str | bytes], **said: Any) -> Path:
        """A bundle without an agent inside: nobody starts it here, and packing one takes seconds."""
        del files, said
        tree = self.home / f"tree-{version}"
        (tree / "app").mkdir(parents=True)
        (tree / "app" / "main.py").write_text(f"# {version}\n")
        index = Index.from_bytes(index_of(self.archive("1.0.0")).read_bytes())
        entry = ("{python}", "app/main.py")
        packed = pack(tree, self.archive(version))
        fresh = replace(index, version=version, entry=entry, files=packed)
        index_of(self.archive(version)).write_bytes(fresh.to_bytes())
        return self.archive(version)

    def data_of(self, name: str) -> Path:
        return self.server_data if name == "a" else self.home / f"server-{name}"

    def start_server(self) -> None:
        """The signer, then both replicas; all of them are started again by `processes.revive`."""
        place = self.server_data / "run" / "signer.sock"
        self.processes.keep_command(
            "signer",
            "release-server",
            "signer",
            "--data",
            str(self.server_data),
            log=self.home / "signer.log",
        )
        self.processes.environ["RELFLEET_SIGNER_SOCKET"] = str(place)
        until("the signer", place.exists)
        for name, port in self.ports.items():
            self._make_data(self.data_of(name))
            words = ("--data", str(self.data_of(name)), "--port", str(port))
            self.processes.keep_command(name, "release-server", "run", *words, log=self.home / f"{name}.log")
        for name in self.ports:
            until(f"replica {name}", (self.data_of(name) / "run" / "url").exists)
        self.url = self.urls[0]

    def _make_data(self, data: Path) -> None:
        if data.exists():
            return
        data.mkdir(mode=0o700)
        shutil.copy(self.server_data / "server.toml", data)
        for name in SHARED:
            (data / name).symlink_to(self.server_data / name)

    # --- what can be killed --------------------------------------------------------------------------------

    def _children(self, word: str) -> list[psutil.Process]:
        found = []
        for name in self.ports:
            with suppress(psutil.NoSuchProcess, KeyError):
                parent = psutil.Process(self.processes.pids()[name])
                found += [one for one in parent.children() if word in one.cmdline()]
        return found

    def leader(self) -> psutil.Process | None:
        """The jobs process that holds the lease."""
        with suppress(psycopg.Error), self._database() as database:
            row = database.execute("SELECT holder FROM locks WHERE name = 'jobs'").fetchone()
            holder = int(row[0].split(":")[1]) if row else 0
            return next((one for one in self._children("worker") if one.pid == holder), None)
        return None

    def _database(self) -> psycopg.Connection:
        address = self.database_url.replace("postgresql+psycopg", "postgresql")
        return psycopg.connect(address, autocommit=True)

    def is_well(self) -> bool:
        """Whether both replicas answer and one of them has the lease."""
        with suppress(RelfleetError):
            for url in self.urls:
                Client(url, timeout_s=2, attempts=1).get("/health")
            return self.leader() is not None
        return False

    # --- kills ---------------------------------------------------------------------------------------------

    def kill_one(self, how: str) -> None:
        """One kill; `how` is a method's name without `_kill_`."""
        if getattr(self, f"_kill_{how}")():
            self.kills[how.replace("_", " ")] += 1

    def _kill_web(self) -> bool:
        return _end(self.dice.choice(self._children("web") or [None]))

    def _kill_web_worker(self) -> bool:
        """The process that answers requests, below the web server."""
        below = [one for parent in self._children("web") for one in _offspring(parent)]
        return _end(self.dice.choice(below or [None]))

    def _kill_jobs(self) -> bool:
        return _end(self.leader())

    def _kill_jobs_at_a_signature(self) -> bool:
        """It has a signature and has not committed what it signed."""
        log = self.server_data / "signer" / "log"
        return self._kill_jobs_when(lambda: _newest_change(log))

    def _kill_jobs_at_a_commit(self) -> bool:
        """The database says what the files do not say yet."""
        with suppress(psycopg.Error), self._database() as database:
            query = "SELECT max(version) FROM tuf_metadata WHERE role = 'timestamp'"
            return self._kill_jobs_when(lambda: database.execute(query).fetchone())
        return False

    def _kill_jobs_at_an_export(self) -> bool:
        """The snapshot is a file, and the timestamp that names it is none yet."""
        return self._kill_jobs_when(lambda: len(list(self.metadata.glob("*.snapshot.json"))))

    def _kill_jobs_when(self, watched) -> bool:
        leader = self.leader()
        before, ends = watched(), time.monotonic() + MOMENT_S
        self._give_it_something_to_sign()
        while leader is not None and watched() == before and time.monotonic() < ends:
            time.sleep(0.0005)
        return _end(leader)

    def _give_it_something_to_sign(self) -> None:
        """A cohort without agents is frozen and thawed again, which is a directive each time."""
        self.frozen = not self.frozen
        with suppress(Exception):
            self.steer("spare", "freeze" if self.frozen else "unfreeze")

    def _kill_signer(self) -> bool:
        return _end(psutil.Process(self.processes.pids()["signer"]))

    def _kill_replica(self) -> bool:
        """Everything of one replica at once, as a power cut of its host would."""
        parent = psutil.Process(self.processes.pids()[self.dice.choice(list(self.ports))])
        doomed = [parent, *_offspring(parent)]
        return sum(map(_end, doomed)) > 0

    def _kill_backend(self) -> bool:
        """One connection's process of the database: PostgreSQL then drops all and recovers by itself."""
        with suppress(psycopg.Error), self._database() as database:
            query = "SELECT pid FROM pg_stat_activity WHERE usename = 'relfleet' AND pid != pg_backend_pid()"
            busy = [row[0] for row in database.execute(f"{query} AND datname = current_database()")]
            if busy:
                os.kill(self.dice.choice(busy), signal.SIGKILL)
                return True
        return False

    def _kill_database(self) -> bool:
        """The whole of it, without a checkpoint; the next start recovers from its log."""
        self.cluster.stop(signal.SIGQUIT)
        self.cluster.start()
        return True


KILLS = {
    "web": 2,
    "web_worker": 3,
    "jobs": 4,
    "jobs_at_a_signature": 4,
    "jobs_at_a_commit": 4,
    "jobs_at_an_export": 4,
    "signer": 2,
    "replica": 3,
    "backend": 2,
    "database": 2,
}
"""How often each is chosen beside the others."""


def _end(process: psutil.Process | None) -> bool:
    with suppress(psutil.NoSuchProcess):
        if process is not None:
            process.kill()
            return True
    return False


def _offspring(process: psutil.Process) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return process.children(recursive=True)
    return []


def _newest_change(directory: Path) -> int:
    """Grows with every line that is written into a directory of logs, or into one log."""
    files = [directory] if directory.is_file() else list(directory.rglob("*"))
    return sum(file.stat().st_size for file in files)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
