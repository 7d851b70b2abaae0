"""A real release server on loopback, and the desks of people who use it, each a machine of its own."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from datetime import UTC, datetime
from functools import cache
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from werkzeug.serving import WSGIRequestHandler, make_server

from agent_core import clock
from agent_core.wire import Getter
from keys import signers
from keys.cli import hold_ceremony
from release_server import auth, signer
from release_server.app import create_app
from release_server.config import Config
from release_server.database import upgrade
from release_server.jobs import Jobs
from release_server.publish.cli import main
from release_server.signing.client import SignerClient
from release_server.signing.desk import open_desk
from release_server.signing.process import Service
from tests import postgres

if TYPE_CHECKING:
    from collections.abc import Iterator

PRODUCT = "demo"
WORDS = "correct horse battery"
CHEAP = 2**4


class _Quiet(WSGIRequestHandler):
    def log(self, *_: Any) -> None:
        """Quiet."""


@cache
def _schema() -> bytes:
    """A database of SQLite at the newest schema; made once a process."""
    with tempfile.TemporaryDirectory() as place:
        upgrade(f"sqlite:///{place}/relfleet.db")
        return Path(place, "relfleet.db").read_bytes()


class House:
    """A server: its web application in a thread, its jobs in another."""

    def __init__(self, data: Path, database_url: str) -> None:
        self.data = data
        for below in ("blobs", "uploads", "trust", "keys", "repository/metadata", "repository/targets"):
            (data / below).mkdir(parents=True, mode=0o700)
        signer.make_keys(data / "keys", datetime.now(UTC))
        signer.write_public(data / "trust" / "online.json", signer.public_halves(data / "keys"))
        database = f'[database]\nurl = "{database_url}"\n' if database_url else ""
        (data / "server.toml").write_text(f"[server]\nport = 0\n[jobs]\ntick_s = 0.05\n{database}")
        if not database_url:
            (data / "relfleet.db").write_bytes(_schema())
        self.config = Config.load(data, environ={})
        self.app = create_app(self.config)
        self.hub = self.app.extensions["relfleet"]
        self.server = make_server("127.0.0.1", 0, self.app, threaded=True, request_handler=_Quiet)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.stop = threading.Event()
        self.desk = open_desk(self.config.keys, self.config.signer_state, clock=clock.now)
        jobs = Jobs(self.config, signer=SignerClient(self._ask_signer))
        self.threads = [
            threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}),
            threading.Thread(target=jobs.run, args=(self.stop,)),
        ]

    def _ask_signer(self, head: dict[str, Any], body: bytes) -> tuple[Getter, bytes]:
        """The signer with no socket between: its real keys, policy and log, in this process."""
        service = Service(self.desk, frozenset())
        answer, content = service._ask(head["op"], head.get("role", ""), body, 0, 0)
        return Getter(json.loads(json.dumps(answer)), "message"), content

    @property
    def online(self) -> Any:
        return signer.read_public(self.config.trust)

    def token(self, role: str, name: str) -> str:
        with self.hub.sessions.write() as session:
            how = {"name": name, "role": auth.Role(role), "actor": "test"}
            return auth.add_token(session, self.hub.clock(), **how)[1]

    def audit(self) -> list[str]:
        from release_server import audit

        with self.hub.sessions.read() as session:
            return [entry.action for entry in reversed(audit.entries(session))]

    def lose_the_signer(self) -> None:
        """Another in its place, with keys of its own and without memory; jobs see it at their next start."""
        self.stop_jobs()
        self.desk.journal.close()
        shutil.rmtree(self.config.keys)
        shutil.rmtree(self.config.signer_state)
        signer.make_keys(self.config.keys, clock.now())
        self.desk = open_desk(self.config.keys, self.config.signer_state, clock=clock.now)
        self.stop.clear()
        jobs = Jobs(self.config, signer=SignerClient(self._ask_signer))
        self.threads[1] = threading.Thread(target=jobs.run, args=(self.stop,))
        self.threads[1].start()

    def stop_jobs(self) -> None:
        """Nothing is signed or exported any more; what lies in the repository is served as it is."""
        self.stop.set()
        self.threads[1].join()

    def close(self) -> None:
        self.stop.set()
        self.server.shutdown()
        for thread in self.threads:
            thread.join()
        self.server.server_close()
        self.desk.journal.close()
        self.hub.sessions.close()


@contextmanager
def serve(data: Path) -> Iterator[House]:
    with ExitStack() as stack:
        url = stack.enter_context(postgres.cluster().database()) if postgres.WANTED else ""
        house = House(data, url)
        stack.callback(house.close)
        for thread in house.threads:
            thread.start()
        yield house


class Desk:
    """One person's machine: keys, token, trusted root and memory of its own."""

    def __init__(self, house: House, home: Path, role: str = "releaser") -> None:
        self.home = home
        self.keys = home / "config" / "relfleet" / "keys"
        self.keys.mkdir(parents=True, mode=0o700)
        self.environ = {
            "HOME": str(home),
            "PATH": os.environ["PATH"],
            "XDG_CONFIG_HOME": str(home / "config"),
            "XDG_STATE_HOME": str(home / "state"),
            "RELFLEET_SERVER": house.url,
            "RELFLEET_PRODUCT": PRODUCT,
            "RELFLEET_TOKEN": house.token(role, home.name),
            "RELFLEET_PASSPHRASE": WORDS,
        }

    def __call__(self, *words: object, **environ: str) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of one `release` command typed here."""
        kept = dict(os.environ)
        os.environ.clear()
        os.environ.update(self.environ | environ)
        out, said = StringIO(), StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(said):
                code = main([str(word) for word in words])
        finally:
            os.environ.clear()
            os.environ.update(kept)
        return code, out.getvalue(), said.getvalue()

    def json(self, *words: object, **environ: str) -> Any:
        """What a command that must go well says under --json."""
        code, out, said = self(*words, "--json", **environ)
        assert code == 0, said
        return json.loads(out)

    def take(self, *files: Path) -> None:
        """Copy files here, as one carries them on a stick."""
        for file in files:
            place = self.keys / file.name
            place.write_bytes(file.read_bytes())
            place.chmod(0o600)

    def make_key(self, role: str, name: str) -> signers.KeyFile:
        path = self.keys / f"{name}{signers.SUFFIX}"
        signers.create(path, role=role, now=datetime.now(UTC), passphrase=WORDS, scrypt_n=CHEAP)
        return signers.read(path)


def ceremony_at(desk: Desk, house: House, **numbers: int) -> None:
    """Root 1 and targets 1, with all keys at one desk and cheap to open."""
    hold_ceremony(
        desk.keys, house.online, lambda _prompt: WORDS, datetime.now(UTC), scrypt_n=CHEAP, **numbers
    )
