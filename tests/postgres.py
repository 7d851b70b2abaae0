"""A private PostgreSQL cluster, started from the installed binaries, and a database of its own for each test.

`RELFLEET_TEST_DATABASE=postgres` says that tests of the server use it, and not SQLite (`make test-postgres`).
"""

from __future__ import annotations

import atexit
import itertools
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import pytest

WANTED = os.environ.get("RELFLEET_TEST_DATABASE", "sqlite") == "postgres"
PLACES = (
    os.environ.get("RELFLEET_POSTGRES_BIN", ""),
    "/usr/lib/postgresql/15/bin",
    "/usr/lib/postgresql/16/bin",
    "/usr/lib/postgresql/17/bin",
    "/usr/pgsql-15/bin",
)
USER = "relfleet"
SETTINGS = {
    "listen_addresses": "",  # the socket below its own directory is the only way in
    "max_connections": "300",
    "fsync": "off",  # no power is cut here; a killed server keeps what it wrote
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "timezone": "Asia/Kathmandu",  # whoever keeps times without a zone is found out
    "lc_messages": "C",
}

only_sqlite = pytest.mark.skipif(WANTED, reason="it is about SQLite")


@cache
def binaries() -> Path | None:
    """Where PostgreSQL's programs are, or None."""
    return next((Path(place) for place in PLACES if place and Path(place, "initdb").exists()), None)


def _user() -> pwd.struct_passwd | None:
    """Who runs it: PostgreSQL refuses root."""
    if os.geteuid():
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise RuntimeError("root runs the tests, and there is neither a user postgres nor nobody")


class Cluster:
    """One server of its own in a directory of its own.

    Args:
        settings: beside those of all clusters here, e.g. `{"fsync": "on"}`.
    """

    def __init__(self, **settings: str) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="relfleet-pg-"))
        self.programs = binaries()
        self.user = _user()
        self.settings = SETTINGS | settings
        self.numbers = itertools.count(1)
        self.process: subprocess.Popen[bytes] | None = None
        if self.user:
            os.chown(self.home, self.user.pw_uid, self.user.pw_gid)
        self._run(
            "initdb", "-D", self.files, "-U", USER, "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C"
        )
        atexit.register(self.remove)
        self.start()

    @property
    def files(self) -> Path:
        return self.home / "data"

    def _run(self, program: str, *words: object) -> None:
        argv = [str(self.programs / program), *map(str, words)]
        done = subprocess.run(argv, cwd=self.home, capture_output=True, text=True, check=False, **self._who())
        if done.returncode:
            raise RuntimeError(f"{program} failed: {done.stdout}{done.stderr}")

    def _who(self) -> dict[str, int]:
        return {"user": self.user.pw_uid, "group": self.user.pw_gid} if self.user else {}

    def start(self) -> None:
        """Start it, and return when it takes connections; after a kill it recovers first."""
        said = [word for name, value in self.settings.items() for word in ("-c", f"{name}={value}")]
        argv = [self.programs / "postgres", "-D", self.files, "-k", self.home, *said]
        with (self.home / "log").open("ab") as log:
            self.process = subprocess.Popen(argv, cwd=self.home, stdout=log, stderr=log, **self._who())
        ready = [str(self.programs / "pg_isready"), "-q", "-h", str(self.home)]
        while subprocess.run(ready, check=False).returncode:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(0.03)
                raise RuntimeError((self.home / "log").read_text())

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End it; SIGINT drops all connections, SIGQUIT leaves the next start to recover as after a crash."""
        if self.process is not None:
            self.process.send_signal(how)
            self.process.wait(60)
            self.process = None

    def remove(self) -> None:
        atexit.unregister(self.remove)
        self.stop()
        shutil.rmtree(self.home, ignore_errors=True)

    # --- databases -----------------------------------------------------------------------------------------

    def url(self, database: str) -> str:
        return f"postgresql+psycopg://{USER}@/{database}?host={self.home}"

    def execute(self, statement: str) -> None:
        """One statement outside of any test's database."""
        import psycopg

        with psycopg.connect(f"host={self.home} user={USER} dbname=postgres", autocommit=True) as connection:
            connection.execute(statement)

    @cache  # noqa: B019 - one cluster a process
    def _template(self) -> str:
        from release_server.database import upgrade

        self.execute("CREATE DATABASE template_of_tests")
        upgrade(self.url("template_of_tests"))
        return "template_of_tests"

    @contextmanager
    def database(self, *, empty: bool = False):
        """A new database at the newest schema, or without one; its URL. It is dropped at the end."""
        name = f"test_{next(self.numbers)}"
        self.execute(f"CREATE DATABASE {name} TEMPLATE {'template0' if empty else self._template()}")
        try:
            yield self.url(name)
        finally:
            if self.process is not None:
                self.execute(f"DROP DATABASE {name} WITH (FORCE)")


@cache
def cluster() -> Cluster:
    """The one of this process; skips the test where PostgreSQL or its driver is not installed."""
    pytest.importorskip("psycopg", reason="the extra `postgres` is not installed")
    if binaries() is None:
        pytest.skip("no PostgreSQL here: its programs were looked for in " + ", ".join(filter(None, PLACES)))
    return Cluster()
