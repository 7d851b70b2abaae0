"""What was stolen, used against a running fleet: the rows of docs/security.md that want a fleet of their own.

The server here is this file's own: a floor never falls, and other stories are told with older versions.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from securesystemslib.signer import CryptoSigner

from agent_core import slots
from agent_core.errors import Exit
from keys.roles import COHORTS, ONLINE_ROLES, SNAPSHOT, TIMESTAMP
from release_server.config import Config
from tests import forger
from tests.integration.world import UNTIL_TOLD, running, until

HOUSE = Path(__file__).resolve().parents[2]
STRANGER = 65_534


@pytest.fixture(scope="module")
def world():
    """In a place of its own: below pytest's, `careless` would open what every run of pytest closes again."""
    home = Path(tempfile.mkdtemp(prefix="thefts-"))
    try:
        with running(home) as world:
            yield world
    finally:
        shutil.rmtree(home)


@pytest.fixture(scope="module")
def hosts(world):
    """One that stays on 1.0.0, and one on 1.1.0."""
    world.publish("1.1.0", "1.2.0")
    behind, ahead = world.hosts(world.cohort(), world.cohort())
    world.pin(ahead.cohort, "1.1.0")
    ahead.await_good("1.1.0")
    behind.await_look("up-to-date")
    return behind, ahead


@pytest.fixture
def untouched(hosts):
    """Which agents run, and what; the same at the end of whatever is done to their server."""
    ahead = hosts[1]
    ahead.await_good("1.1.0")
    before = {host: (host.await_agent(), host.record.good) for host in hosts}
    return lambda: {host: (host.pid(), host.record.good) for host in hosts} == before


def asked(world, *words):
    return json.loads(world.release(*words, "--json"))


# --- a token ---------------------------------------------------------------------------------------------


def test_a_stolen_admins_token_is_over_at_once_and_the_log_tells_what_it_did(world, hosts, untouched):
    ahead, stolen = hosts[1], world.make_token("admin")

    def thief(token, *words):
        return world.exit_of("release", *words, "--yes", environ={"RELFLEET_TOKEN_FILE": str(token)})

    # All that an admin may, he may: who and when, and a token of his own that outlives this one.
    second = world.home / "second.token"
    for words in (
        ("cohort", "freeze", ahead.cohort, "--reason", "mine"),
        ("cohort", "pin", ahead.cohort, "1.0.0", "--reason", "mine"),
        ("token", "create", "--role", "admin", "--name", "helper", "--out", str(second)),
    ):
        assert thief(stolen, *words)[0] == Exit.DONE
    # What may run he may not say: that takes a key, which no server has.
    no_keys = world.home / "no-keys"
    no_keys.mkdir(mode=0o700)
    world.derive("6.6.6", {"app/main.py": "raise SystemExit(6)\n"})
    keys = ("--keys-dir", str(no_keys), "--trust", str(world.trust))
    code, _, said = thief(stolen, "push", str(world.archive("6.6.6")), *keys)
    assert (code, "no release key" in said) == (Exit.NOT_ALLOWED, True), said

    tokens = {entry["name"]: entry["id"] for entry in asked(world, "token", "list")}
    code, _, said = world.exit_of("release", "token", "revoke", str(tokens[stolen.stem]), "--yes")
    assert (code, f"release token revoke {tokens['helper']}" in said) == (Exit.DONE, True), said
    assert thief(stolen, "whoami")[0] == Exit.NOT_ALLOWED
    assert thief(second, "whoami")[0] == Exit.DONE  # which is why it was named
    assert "still works" not in world.exit_of("release", "token", "revoke", str(tokens["helper"]), "--yes")[2]
    assert thief(second, "whoami")[0] == Exit.NOT_ALLOWED

    log = asked(world, "audit", "log", "--actor", stolen.stem)
    assert [(entry["action"], entry["subject"]) for entry in log] == [
        ("cohort.freeze", f"probe/{ahead.cohort}"),
        ("cohort.pin", f"probe/{ahead.cohort}"),
        ("token.create", "helper"),
    ]
    world.release("audit", "verify")
    # What he did is undone by what he did not have to be asked for; nobody was moved meanwhile.
    world.pin(ahead.cohort, "1.1.0")
    world.steer(ahead.cohort, "unfreeze")
    ahead.await_look("up-to-date")
    assert untouched()


# --- online keys -----------------------------------------------------------------------------------------


@contextmanager
def forged(world, lead_to, stolen):
    """Files of the thief in the place of the newest; what he has no key for he signs with one of his own."""
    keys = forger.steal(Config.load(world.server_data, environ={}).keys)
    keys |= {role: CryptoSigner.generate_ed25519() for role in ONLINE_ROLES if role not in stolen}
    with world.jobs_stopped():
        honest = world.timestamp()
        version = max(versions(world).values()) + 1
        for role, made in forger.run_forward(world.metadata, keys, version, lead_to=lead_to).items():
            name = "timestamp.json" if role == TIMESTAMP else f"{version}.{role}.json"
            (world.metadata / name).write_bytes(made.to_bytes())
        try:
            yield
        finally:
            (world.metadata / "timestamp.json").write_bytes(honest)
    overtake(world, version)


def versions(world):
    """Of each online role, as it is served; after a tick that came to nothing any may be the highest."""
    newest = json.loads(world.timestamp())["signed"]
    number = newest["meta"]["snapshot.json"]["version"]
    listed = json.loads((world.metadata / f"{number}.snapshot.json").read_bytes())["signed"]["meta"]
    return {
        TIMESTAMP: newest["version"],
        SNAPSHOT: number,
        COHORTS: listed["cohorts.json"]["version"],
    }


def overtake(world, version):
    """Have the honest server sign until its own numbers are above the thief's; below, hosts wait."""
    cohort = world.cohort()

    def is_past():
        world.client.patch(f"/cohorts/probe/{cohort}", {"report_s": 1 + next(world.numbers)})
        return min(versions(world).values()) > version

    until("the server's numbers to be above the thief's", is_past)


@pytest.mark.parametrize(
    "stolen",
    [(TIMESTAMP,), (SNAPSHOT,), (COHORTS,), (SNAPSHOT, TIMESTAMP), (COHORTS, SNAPSHOT), (COHORTS, TIMESTAMP)],
    ids=" and ".join,
)
def test_a_thief_of_some_online_keys_moves_no_host(world, hosts, untouched, stolen):
    """The real server's key files, and real agents that are shown what he makes of them."""
    behind, ahead = hosts
    with forged(world, "1.2.0", stolen):
        for host in hosts:
            host.await_look("bad-signature")
        behind.await_seen(reason="bad-signature", version="1.0.0")
        ahead.await_seen(reason="bad-signature", version="1.1.0")
        assert untouched()
    for host in hosts:
        host.await_look("up-to-date")
    assert untouched()


def test_a_thief_of_all_online_keys_chooses_among_what_is_signed(world, hosts):
    """What he does get, so that the others are known to be refused for the key that is missing."""
    with forged(world, "1.2.0", ONLINE_ROLES):
        for host in hosts:
            host.await_good("1.2.0")
    for host, version in zip(hosts, ("1.0.0", "1.1.0"), strict=True):
        world.pin(host.cohort, version)
        host.await_good(version)


# --- the database ----------------------------------------------------------------------------------------

AS_STRANGER = """
import logging, os, sys
from pathlib import Path
sys.path.insert(0, {source!r})
from release_server import database, jobs, serve, signer
from release_server.config import Config
config = Config.load(Path(sys.argv[1]))
database.make_engine(config.database_url).connect().close()
serve.show_logs("INFO")
os.setgroups([])
os.setresgid(*[{user}] * 3)
os.setresuid(*[{user}] * 3)
serve.run_jobs(config)
"""
"""The server's own jobs process, by another user; loaded first, from where he may not be able to read."""


@contextmanager
def careless(path, home):
    """A socket left open to everybody, and the way to it: only the kernel is left to say who asks."""
    ours = [place for place in path.parents if place.is_relative_to(home)]
    opened = {path: 0o777} | dict.fromkeys(ours, 0o711)
    before = {place: place.stat().st_mode for place in opened}
    for place, mode in opened.items():
        place.chmod(mode)
    try:
        yield
    finally:
        for place, mode in before.items():
            place.chmod(mode)


@pytest.fixture
def copy(world):
    """The thief's: database, settings and files of the server; neither keys nor the signer's memory."""
    place = Path(tempfile.mkdtemp(prefix="stolen-"))
    with closing(sqlite3.connect(world.server_data / "relfleet.db")) as ours:
        with closing(sqlite3.connect(place / "relfleet.db")) as his:
            ours.backup(his)
            his.execute("UPDATE cohort_specs SET pin = '1.2.0'")
            his.execute("UPDATE cohort_status SET due_at = '2000-01-01 00:00:00.000000'")
            his.commit()
    shutil.copy2(world.server_data / "server.toml", place)
    for name in ("trust", "repository", "blobs", "uploads"):
        shutil.copytree(world.server_data / name, place / name)
    for entry in (place, *place.rglob("*")):
        os.chown(entry, STRANGER, STRANGER)
    yield place
    shutil.rmtree(place)


def newest_signed(database):
    with closing(sqlite3.connect(database)) as opened:
        return dict(opened.execute("SELECT role, max(version) FROM tuf_metadata GROUP BY role"))


def askers(world):
    """The user ids in the signer's log."""
    log = world.server_data / "signer" / "log"
    entries = [json.loads(text) for file in log.iterdir() for text in file.read_text().splitlines()]
    return {entry["uid"] for entry in entries if "uid" in entry}


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_a_stolen_database_has_nothing_signed_by_the_signer_it_came_from(world, hosts, untouched, copy):
    """He runs the server's own jobs process on it, beside the signer, as a user that is not the server's."""
    if world.database_url:
        pytest.skip("a copy of PostgreSQL is not one file")
    before = newest_signed(copy / "relfleet.db")
    socket, log = world.server_data / "run" / "signer.sock", world.home / "thief.log"
    argv = [sys.executable, "-c", AS_STRANGER.format(source=str(HOUSE), user=STRANGER), str(copy)]
    environ = {**world.processes.environ, "RELFLEET_SIGNER_SOCKET": str(socket)}
    with careless(socket, world.home), log.open("wb") as said:
        thief = subprocess.Popen(argv, cwd="/", stdout=said, stderr=said, env=environ)
        try:
            until("him to be refused", lambda: "nothing is signed" in log.read_text() or thief.poll())
            refused = f"user {STRANGER} may not ask the signer"
            until("the signer to say so", lambda: refused in (world.home / "server.log").read_text())
        finally:
            thief.terminate()
            assert thief.wait(60) == 0, log.read_text()
    assert newest_signed(copy / "relfleet.db") == before
    assert askers(world) == {os.geteuid()}
    for host in hosts:
        host.await_look("up-to-date")
    assert untouched()


# --- a floor, last: it stays -----------------------------------------------------------------------------


def test_a_floor_that_rose_in_a_trial_leaves_the_host_what_is_good_though_it_is_below(world):
    """Going back asks no policy: the good version is there, and what keeps it off would leave nothing."""
    world.publish("1.1.0", "1.2.0")
    host = world.host(world.cohort())
    host.await_good("1.0.0")
    world.derive("1.3.1", {"app/main.py": UNTIL_TOLD}, observe_s=3600.0)
    world.pin(host.cohort, "1.3.1")
    until("the trial", lambda: slots.version_of(host.news.get("version", "")) == "1.3.1")
    assert host.record.phase == slots.TRIAL
    world.release("policy", "set", "--floor", "1.1.0", "--yes")
    host.await_look("in-trial")
    until("the version on trial to have seen the floor", lambda: host.look() and host.record.floor == 2)

    (host.root / "leave").touch()
    host.await_good("1.0.0")
    assert host.await_skip("1.3.1") == "workload-exited"
    assert host.record.floor == 2
    host.await_seen(version="1.0.0", reason="skipped")
    assert host.states("1.3.1")[-1] == "rolled_back"
    # It starts from there again, with and without its server's leave, and asks nobody.
    host.kill(everything=True)
    host.start_again()
    host.await_agent()
    host.await_look("skipped")
    assert (host.good, host.record.floor) == ("1.0.0", 2)

    # A new version is taken from there; of what is below the floor only what runs may go on.
    world.derive("1.3.2", {})
    world.pin(host.cohort, "1.3.2")
    host.await_good("1.3.2")
    world.pin(host.cohort, "1.0.0")
    host.await_seen(reason="below-floor", version="1.3.2")
    code, _, said = host.agent("rollback", "--to", "1.0.0", "--yes")
    assert (code, "the floor is 2" in said) == (Exit.TRUST, True), said


def test_a_floor_that_a_thief_raised_stops_nobody_and_is_outrun_by_a_new_version(world, hosts, untouched):
    """With a release key and a token. What runs goes on; the same files under a new version are taken."""
    ahead = hosts[1]
    old = world.home / "old.release"
    world.release("export", "1.0.0", "-o", str(old))
    world.release("policy", "set", "--floor", "1.2.0", "--yes")
    for host in hosts:
        host.await_look("up-to-date")
        until("the host to have seen the floor", lambda host=host: host.record.floor == 3)
    assert untouched()

    # Neither the server nor a file brings back what is below, though every byte of it is signed.
    world.pin(ahead.cohort, "1.0.0")
    ahead.await_seen(reason="below-floor", version="1.1.0")
    code, said, _ = ahead.agent("why")
    assert (code, "1.0.0 has seq 1, the floor is 3" in said) == (Exit.DONE, True), said
    code, _, said = ahead.agent("install", str(old), "--older")
    assert (code, "older than" in said) == (Exit.TRUST, True), said
    again = world.home / "again.release"
    world.release("export", "1.0.0", "-o", str(again))
    code, _, said = ahead.agent("install", str(again), "--older")
    assert (code, "the floor is 3" in said) == (Exit.TRUST, True), said
    code, _, said = world.exit_of("release", "policy", "set", "--floor", "1.0.0", "--yes")
    assert (code, "floors never fall" in said) == (Exit.CONFLICT, True), said
    assert untouched()

    # The runbook: what they have, under a new version.
    world.derive("1.1.1", {})
    world.publish("1.1.1")
    for host in hosts:
        world.pin(host.cohort, "1.1.1")
    for host in hosts:
        host.await_good("1.1.1")
