"""Backups of a running server, on both databases, and what goes on above what agents have seen since."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing

import pytest
from sqlalchemy import select
from tuf.api.metadata import Metadata

from agent_core.errors import ConflictError, MalformedError, NotFoundError, TrustError
from agent_core.wire import Getter
from keys.roles import ONLINE_ROLES, TARGETS
from release_server import backup, cohorts, published, repository, signer
from release_server.blobs import Blobs
from release_server.database import Sessions, make_engine
from release_server.jobs import Jobs
from release_server.models import Cohort, Product, Release
from release_server.signing import desk as desk_of
from release_server.signing.client import SignerClient
from release_server.signing.process import Service
from tests import postgres


@pytest.fixture
def served(config, clock, make_signer, trusted, blobs, accept, sessions):
    """A server that has published a release and a cohort; calling it publishes what has changed since."""
    metadata = trusted.targets()
    trusted.add(metadata, blobs, "1.0.0", 10)
    accept(metadata)
    with sessions.write() as session:
        cohorts.create(session, clock(), "olga", product="demo", name="eu", release="1.0.0")
    jobs = Jobs(config, clock=clock, shared_now=lambda _: None, signer=make_signer())
    jobs.tick()
    yield jobs.tick
    jobs.close()


@pytest.fixture
def target(tmp_path, monkeypatch):
    """Where a backup goes; on PostgreSQL it is restored into another database."""
    if not postgres.WANTED:
        yield tmp_path / "backup"
        return
    monkeypatch.setenv("PATH", str(postgres.binaries()), prepend=os.pathsep)
    with postgres.cluster().database(empty=True) as url:
        monkeypatch.setenv("RELFLEET_TEST_RESTORED", url)
        yield tmp_path / "backup"


@pytest.fixture
def restore(tmp_path, target, monkeypatch, clock):
    """Restore the backup, beside the server that goes on, and follow what is published at a place."""

    def do(place=None, data="restored"):
        if postgres.WANTED:
            monkeypatch.setenv("RELFLEET_DATABASE_URL", os.environ["RELFLEET_TEST_RESTORED"])
        return backup.restore(target, tmp_path / data, lambda made: follow(made, clock, place))

    return do


def follow(config, clock, place):
    if place is None:
        return
    online, blobs = signer.read_public(config.trust), Blobs(config.blobs, config.uploads)
    with closing(Sessions(make_engine(config.database_url))) as sessions, sessions.write() as session:
        published.follow(session, blobs, published.origin(str(place)), now=clock(), online=online)


def tick(config, clock):
    """What the restored server's own jobs process and signer do, who remember nothing."""
    clock.now += config.lease  # of the jobs process that was backed up
    desk = desk_of.open_desk(config.keys, config.signer_state, clock=clock)
    service = Service(desk, frozenset())

    def ask(head, body):
        answer, content = service._ask(head["op"], head.get("role", ""), body, 0, 0)
        return Getter(json.loads(json.dumps(answer)), "message"), content

    jobs = Jobs(config, clock=clock, shared_now=lambda _: None, signer=SignerClient(ask))
    try:
        assert jobs.tick()
    finally:
        jobs.close()
        desk.journal.close()


def versions(config):
    """The newest version of each role, as it is published."""
    metadata = config.repository / "metadata"
    named = [tuple(place.name.split(".")[:2]) for place in metadata.glob("*.*.json")]
    timestamp = Metadata.from_bytes((metadata / "timestamp.json").read_bytes()).signed.version
    return {role: max(int(n) for n, name in named if name == role) for _, role in named} | {
        "timestamp": timestamp
    }


def names(config):
    with closing(Sessions(make_engine(config.database_url))) as sessions, sessions.read() as session:
        return set(session.scalars(select(Cohort.name))) | set(session.scalars(select(Release.version)))


def freeze(sessions, clock, *, frozen=True):
    with sessions.write() as session:
        change = cohorts.freeze if frozen else cohorts.unfreeze
        change(session, clock(), "olga", "demo", "eu")


def test_a_backup_of_a_server_that_goes_on_is_restored_whole(
    served, config, target, restore, clock, sessions
):
    said = backup.back_up(config, target, clock())
    with sessions.write() as session:
        session.add(Product(name="later", created_at=clock()))
    restored = restore()
    assert names(restored) == {"eu", "1.0.0"}
    assert said["files"].keys() >= {"server.toml", "trust/online.json"}
    assert any(name.startswith("keys/timestamp") for name in said["files"])
    tick(restored, clock)
    assert versions(restored) == versions(config)
    assert {place.name for place in restored.blobs.rglob("*") if place.is_file()} == {
        place.name for place in config.blobs.rglob("*") if place.is_file()
    }
    assert [place for place in (restored.data, restored.keys) if place.stat().st_mode & 0o077] == []


def test_a_restored_server_goes_on_above_what_agents_have_seen_since(
    served, config, target, restore, clock, sessions, trusted, blobs, accept
):
    backup.back_up(config, target, clock())
    for frozen in (True, False, True):
        freeze(sessions, clock, frozen=frozen)
        served()
    metadata = trusted.next_targets(repository_newest(sessions))
    trusted.add(metadata, blobs, "1.1.0", 11)
    accept(metadata)
    served()
    seen = versions(config)
    restored = restore(config.repository)
    tick(restored, clock)
    now = versions(restored)
    assert all(now[role] > seen[role] for role in ONLINE_ROLES), f"{now} after {seen}"
    assert now[TARGETS] == seen[TARGETS]
    assert names(restored) == {"eu", "1.0.0", "1.1.0"}, "a release that agents know is not forgotten"


def repository_newest(sessions):
    with sessions.read() as session:
        return Metadata.from_bytes(repository.newest(session, TARGETS).body)


def test_an_agents_own_metadata_say_what_was_published(
    served, config, target, restore, clock, sessions, tmp_path
):
    backup.back_up(config, target, clock())
    freeze(sessions, clock)
    served()
    seen, kept = versions(config), tmp_path / "tuf"
    kept.mkdir()
    for role, version in seen.items():
        name = "timestamp.json" if role == "timestamp" else f"{version}.{role}.json"
        shutil.copy(config.repository / "metadata" / name, kept / f"{role}.json")
    restored = restore(kept)
    tick(restored, clock)
    assert all(versions(restored)[role] > seen[role] for role in ONLINE_ROLES)


def test_what_others_have_signed_is_not_taken_over_and_nothing_is_left(
    served, config, target, restore, clock, sessions, tmp_path
):
    backup.back_up(config, target, clock())
    freeze(sessions, clock)
    served()
    place = config.repository / "metadata" / "timestamp.json"
    forged = json.loads(place.read_bytes())
    forged["signed"]["version"] = 1_000
    place.write_text(json.dumps(forged))
    with pytest.raises(TrustError) as refused:
        restore(config.repository)
    assert refused.value.reason == "bad-signature"
    assert not list(tmp_path.glob("*restor*")), "no private key of a half server is left"


def test_nothing_is_overwritten(served, config, target, restore, clock, tmp_path):
    backup.back_up(config, target, clock())
    with pytest.raises(ConflictError):
        backup.back_up(config, target, clock())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConflictError):
        restore(data="full")
    restore()
    with pytest.raises(ConflictError):
        restore()


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ("changed", TrustError),
        ("gone", MalformedError),
        ("cut", MalformedError),
        ("of nothing", MalformedError),
    ],
)
def test_a_backup_that_is_not_as_it_was_written_is_refused(
    served, config, target, restore, clock, how, error, tmp_path
):
    backup.back_up(config, target, clock())
    blob = next(place for place in (target / "blobs").rglob("*") if place.is_file())
    blob.chmod(0o600)
    {
        "changed": lambda: blob.write_bytes(b"x"),
        "gone": blob.unlink,
        "cut": (target / "backup.json").unlink,
        "of nothing": lambda: (target / "backup.json").write_text('{"files": {}, "revision": null}'),
    }[how]()
    with pytest.raises(error):
        restore()
    assert not (tmp_path / "restored").exists()


def test_a_place_where_nothing_is_published_is_said(served, config, target, restore, clock, tmp_path):
    backup.back_up(config, target, clock())
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotFoundError):
        restore(tmp_path / "empty")


WRITER = """\
import sqlite3, sys, time
database = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
database.execute("PRAGMA synchronous=OFF")
database.execute("CREATE TABLE ballast AS SELECT randomblob(32000000) AS filling")
database.execute("CREATE TABLE written (number INTEGER)")
print("writing", flush=True)
for number in range(20_000):
    database.execute("INSERT INTO written VALUES (?)", (number,))
    time.sleep(0.001)
"""


@postgres.only_sqlite
def test_a_backup_ends_though_somebody_writes_all_the_time(served, config, target, clock):
    """Copied in several steps it began anew after each write, and ended when the writer did."""
    argv = [sys.executable, "-c", WRITER, config.data / "relfleet.db"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "writing\n"
        backup.back_up(config, target, clock())
        assert writer.poll() is None, "it is still writing"
        writer.kill()
    with closing(sqlite3.connect(target / "relfleet.db")) as copy:
        numbers = [row[0] for row in copy.execute("SELECT number FROM written ORDER BY rowid")]
    assert numbers == list(range(len(numbers))), "one moment: all before it, and nothing after"
