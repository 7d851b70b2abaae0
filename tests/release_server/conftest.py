"""A server's data directory with real keys, a stepped clock, and release managers who sign."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from io import BytesIO

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, TargetFile

from agent_core.bundle import File, Index
from agent_core.wire import Getter, Policy, ReleaseFacts, bundle_path, index_path, policy_path
from keys import ceremony
from release_server import acceptance, auth, signer
from release_server.blobs import Blobs
from release_server.config import Config
from release_server.database import Sessions, make_engine, upgrade
from release_server.jobs import Jobs
from release_server.signing import desk as desk_of
from release_server.signing.client import SignerClient
from release_server.signing.process import Service
from tests import postgres

START = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
EMPTY = sha256(b"").hexdigest()


class Clock:
    """A wall clock that moves when a test says so."""

    def __init__(self):
        self.now = START

    def __call__(self):
        return self.now

    def step(self, **by):
        self.now += timedelta(**by)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A database at the newest schema, and online keys; copied for each test."""
    directory = tmp_path_factory.mktemp("template")
    upgrade(f"sqlite:///{directory / 'relfleet.db'}")
    signer.make_keys(directory / "keys", START)
    return directory


@pytest.fixture
def database_url(tmp_path, template):
    """A database at the newest schema: PostgreSQL's where `make test-postgres` asks for it, else SQLite's."""
    if postgres.WANTED:
        with postgres.cluster().database() as url:
            yield url
        return
    file = tmp_path / "server" / "relfleet.db"
    file.parent.mkdir(mode=0o700)
    file.write_bytes((template / "relfleet.db").read_bytes())
    yield ""


@pytest.fixture
def empty_url(tmp_path):
    """A database without any schema."""
    if postgres.WANTED:
        with postgres.cluster().database(empty=True) as url:
            yield url
        return
    yield f"sqlite:///{tmp_path / 'empty.db'}"


@pytest.fixture
def data(tmp_path, template, database_url):
    """A data directory as `release-server init` makes it."""
    directory = tmp_path / "server"
    for below in ("blobs", "uploads", "trust", "keys", "repository/metadata", "repository/targets"):
        (directory / below).mkdir(parents=True, mode=0o700)
    directory.chmod(0o700)
    for key in (template / "keys").iterdir():
        (directory / "keys" / key.name).write_bytes(key.read_bytes())
        (directory / "keys" / key.name).chmod(0o600)
    signer.write_public(directory / "trust" / "online.json", signer.public_halves(directory / "keys"))
    database = f'[database]\nurl = "{database_url}"\n' if database_url else ""
    (directory / "server.toml").write_text(
        f"[server]\nport = 0\nworkers = 1\n[jobs]\ntick_s = 0.05\n{database}"
    )
    return directory


@pytest.fixture
def config(data):
    return Config.load(data, environ={})


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def sessions(config):
    opened = Sessions(make_engine(config.database_url))
    yield opened
    opened.close()


@pytest.fixture
def blobs(config):
    return Blobs(config.blobs, config.uploads)


@pytest.fixture
def online(config):
    return signer.read_public(config.trust)


@pytest.fixture
def open_desk(config, clock):
    """Open the signer's desk, as its process does; opening it again ends the one before."""
    opened = []

    def open_it(**changed):
        while opened:
            opened.pop().journal.close()
        opened[:] = [desk_of.open_desk(config.keys, config.signer_state, **{"clock": clock} | changed)]
        return opened[0]

    yield open_it
    for desk in opened:
        desk.journal.close()


@pytest.fixture
def desk(open_desk):
    return open_desk()


@pytest.fixture
def make_signer(desk):
    """What a jobs process has, with no socket between: the real keys, policy and log in this process."""
    service = Service(desk, frozenset())

    def ask(head, body):
        answer, content = service._ask(head["op"], head.get("role", ""), body, 0, 0)
        return Getter(json.loads(json.dumps(answer)), "message"), content

    return lambda: SignerClient(ask)


@pytest.fixture
def make_jobs(config, clock, make_signer):
    made = []

    def make():
        made.append(Jobs(config, clock=clock, shared_now=lambda _: None, signer=make_signer()))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def online_signer(make_signer):
    return make_signer()


@dataclass
class Managers:
    """Release managers: they hold the offline keys and make what the server is sent."""

    online: ceremony.OnlineKeys
    clock: Clock
    root_key: CryptoSigner = field(default_factory=CryptoSigner.generate_ed25519)
    release_keys: list = field(default_factory=lambda: [CryptoSigner.generate_ed25519() for _ in range(2)])
    threshold: int = 1

    def root(self):
        metadata = ceremony.make_root(
            root_keys=[self.root_key.public_key],
            release_keys=[key.public_key for key in self.release_keys],
            online=self.online,
            now=self.clock(),
            targets_threshold=self.threshold,
        )
        return self.signed(metadata, self.root_key)

    def signed(self, metadata, *keys):
        ceremony.sign(metadata, keys)
        return metadata

    def targets(self):
        """Empty targets, version 1, not signed."""
        return ceremony.make_targets(self.online.cohorts, self.clock())

    def next_targets(self, before):
        """A copy of what `before` says, one version up, not signed."""
        metadata = Metadata.from_bytes(before.to_bytes())
        metadata.signatures.clear()
        metadata.signed.version += 1
        return metadata

    def add(self, metadata, blobs, version, seq, *, platform="any", product="demo", content=None, **facts):
        """List one release and upload its two blobs; returns the facts that are signed of it."""
        archive = content if content is not None else f"{product} {version} {platform}".encode()
        index = make_index(product, version, platform)
        for blob in (archive, index):
            upload(blobs, blob)
        signed = ReleaseFacts(
            product, version, seq, platform, sha256(index).hexdigest(), len(index), 5, 1, **facts
        )
        place = bundle_path(product, version, platform)
        beside = index_path(product, version, platform)
        metadata.signed.targets[place] = target(place, archive, signed.to_json())
        metadata.signed.targets[beside] = target(beside, index)
        return signed

    def set_policy(self, metadata, product="demo", **policy):
        place = policy_path(product)
        metadata.signed.targets[place] = target(place, b"", Policy(**policy).to_json())

    def sign(self, metadata):
        """The bytes of targets, signed by as many release keys as it takes."""
        return self.signed(metadata, *self.release_keys[: self.threshold]).to_bytes()


def make_index(product, version, platform):
    file = File("app/main.py", 0o644, 5, sha256(b"hello").hexdigest())
    return Index(product, version, platform, ("{python}", "app/main.py"), (file,)).to_bytes()


def target(path, content, custom=None):
    fields = {} if custom is None else {"custom": custom}
    return TargetFile(len(content), {"sha256": sha256(content).hexdigest()}, path, fields)


def upload(blobs, content):
    digest = sha256(content).hexdigest()
    blobs.append(digest, 0 if blobs.length(digest) is None else len(content), len(content), BytesIO(content))
    return digest


@pytest.fixture
def managers(online, clock):
    return Managers(online, clock)


@pytest.fixture
def trusted(sessions, managers, clock, online):
    """The server trusts the managers' root."""
    with sessions.write() as session:
        acceptance.accept_root(session, managers.root().to_bytes(), now=clock(), actor="ada", online=online)
    return managers


@pytest.fixture
def accept_root(sessions, clock, online):
    """Send a root in, as PUT /trust/root does."""

    def send(metadata, keys=online):
        body = metadata.to_bytes()
        with sessions.write() as session:
            return acceptance.accept_root(session, body, now=clock(), actor="ada", online=keys)

    return send


@pytest.fixture
def accept(sessions, blobs, clock, online, managers):
    """Sign targets and send them in, as POST /metadata/targets does."""

    def send(metadata, body=None):
        with sessions.write() as session:
            return acceptance.accept_targets(
                session,
                blobs,
                managers.sign(metadata) if body is None else body,
                now=clock(),
                actor="ada",
                online=online,
            )

    return send


@pytest.fixture
def token(sessions, clock):
    """Make a token of a role; its text."""

    def make(role="admin", **limits):
        with sessions.write() as session:
            name = limits.pop("name", role)
            return auth.add_token(session, clock(), name=name, role=auth.Role(role), actor="test", **limits)[
                1
            ]

    return make


@pytest.fixture
def app(config, clock):
    from release_server.app import create_app

    made = create_app(config, clock=clock)
    yield made
    made.extensions["relfleet"].sessions.close()


@pytest.fixture
def client(app):
    return app.test_client()


@pytest.fixture
def sign_in(client, token):
    """A caller signed in with a role: `call("GET", "/whoami")`."""

    def as_role(role, **limits):
        text = token(role, **limits)

        def call(method, path, **rest):
            headers = {"Authorization": f"Bearer {text}"} | rest.pop("headers", {})
            return client.open("/api/v1" + path, method=method, headers=headers, **rest)

        return call

    return as_role
