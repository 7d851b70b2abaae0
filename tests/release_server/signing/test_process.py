"""The signer as a real process, and real users who try to do what only it may."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from tuf.api.metadata import Metadata, Targets

from agent_core.clock import boot_s
from agent_core.errors import MalformedError, TrustError, UnreachableError, UsageError
from keys import roles
from release_server import serve, signer
from release_server.signing import protocol
from release_server.signing.client import over_socket
from release_server.signing.log import verify
from release_server.signing.process import Brake, Service, listen

SOURCE = Path(serve.__file__).parents[1]
LONGEST_S = 60
STRANGER, SIGNER, JOBS = 65_534, 64_001, 64_002
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users takes root")


def wait_for(what, condition):
    deadline = time.monotonic() + LONGEST_S
    while time.monotonic() < deadline:
        with contextlib.suppress(UnreachableError):
            if found := condition():
                return found
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen")


def start(place, *words, **popen):
    argv = [sys.executable, "-m", "release_server.cli", "signer", *map(str, words)]
    environ = os.environ | {"PYTHONPATH": str(SOURCE)}
    process = subprocess.Popen(argv, env=environ, **popen)
    wait_for("an answer", lambda: process.poll() is not None or over_socket(place).known())
    assert process.poll() is None
    return process


def end(process):
    process.kill()
    process.wait(LONGEST_S)


@contextlib.contextmanager
def at(desk, users=None):
    """The real socket, in front of a desk of this process."""
    place = Path(tempfile.mkdtemp()) / "signer.sock"
    service = Service(desk, users or frozenset({os.geteuid()}))
    with listen(place, shared=False) as listening:
        thread = threading.Thread(target=service.run, args=(listening,))
        thread.start()
        try:
            yield place
        finally:
            service.stop.set()
            thread.join()
            shutil.rmtree(place.parent)


def show(client, managers, blobs):
    metadata = managers.targets()
    managers.add(metadata, blobs, "1.0", 10)
    client.trust(roles.ROOT, managers.root().to_bytes())
    client.trust(roles.TARGETS, managers.sign(metadata))


def cohorts(version):
    now = datetime.now(UTC)
    return Metadata(Targets(version, expires=roles.ROLES[roles.COHORTS].expiry(now)))


# --- the socket ------------------------------------------------------------------------------------------


def test_questions_and_refusals_go_over_the_socket(open_desk, managers, blobs):
    with at(open_desk(clock=lambda: datetime.now(UTC))) as place:
        client = over_socket(place)
        show(client, managers, blobs)
        envelope = client.sign(roles.COHORTS, cohorts(1))
        assert (client.known().signed, client.last(roles.COHORTS)) == ({roles.COHORTS: 1}, envelope)
        with pytest.raises(TrustError) as caught:
            client.sign(roles.COHORTS, cohorts(3))
        assert caught.value.reason == "version"
        with pytest.raises(TrustError) as caught:
            client.sign(roles.ROOT, cohorts(2))
        assert caught.value.reason == "malformed"


def test_the_socket_is_closed_to_others_and_gone_at_the_end(desk):
    with at(desk) as place:
        assert place.stat().st_mode & 0o777 == 0o600
    assert not place.exists()


def test_a_directory_that_others_can_write_is_no_place_for_a_socket(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(UsageError) as caught, listen(tmp_path / "signer.sock", shared=False):
        pass
    assert caught.value.reason == "exposed"


def test_a_socket_far_down_is_reached_all_the_same(desk, tmp_path):
    deep = tmp_path / ("d" * 100) / "signer.sock"
    with listen(deep, shared=False), socket.socket(socket.AF_UNIX) as connection:
        with protocol.reachable(deep) as name:
            connection.connect(name)


@pytest.mark.parametrize(
    "sent",
    [
        struct.pack(">I", 2**31),
        struct.pack(">I", 4) + b"nope",
        struct.pack(">I", 2) + b"{}",
        struct.pack(">I", 36) + b'{"schema":1,"length":99999999999999}',
        struct.pack(">I", 5) + b"[[[[[",
        struct.pack(">I", 34) + b'{"schema":1,"length":0,"op":"dump"}'[:34],
        b"",
        b"\0\0",
    ],
    ids=["a long head", "no JSON", "empty", "a long body", "nested", "cut off", "nothing", "half a length"],
)
def test_what_is_no_question_ends_the_connection_and_the_next_one_is_answered(desk, sent):
    with at(desk) as place:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(place))
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(LONGEST_S)
            assert b"status" not in connection.recv(1 << 16)
        assert over_socket(place).known().root == 0


def test_a_signer_that_is_away_is_said_so(tmp_path):
    with pytest.raises(UnreachableError) as caught:
        over_socket(tmp_path / "signer.sock").known()
    assert caught.value.reason == "signer-away"


def test_a_signer_that_never_answers_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("release_server.signing.client.ASK_S", 0.2)
    with listen(tmp_path / "signer.sock", shared=False), pytest.raises(UnreachableError):
        over_socket(tmp_path / "signer.sock").known()


def test_a_message_that_drips_is_given_up():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"\0")
        with pytest.raises(TimeoutError):
            protocol.receive(ours, boot_s() + 0.05)


def test_a_head_of_another_form_is_refused():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(struct.pack(">I", protocol.MAX_HEAD + 1))
        with pytest.raises(MalformedError):
            protocol.receive(ours, boot_s() + LONGEST_S)


def test_refusals_pass_at_once_until_they_are_too_many():
    brake = Brake()
    waits = [brake.wait_s(1000.0) for _ in range(110)]
    assert set(waits[:100]) == {0.0}
    assert waits[100:] == [float(number) for number in range(1, 11)]
    assert Brake(due=1000.0).wait_s(2000.0) == 0.0


# --- other users -----------------------------------------------------------------------------------------

# The interpreter may lie where only this user reads, so a process becomes another user once it
# has loaded them. It is made open to its own user again, as a program that was started by that user is.
BECOME = """
import ctypes, os, sys
from pathlib import Path
sys.path.insert(0, {source!r})
from agent_core.errors import RelfleetError
from release_server import cli, serve, signer
from release_server.signing import client, desk, process
os.setgroups([])
os.setresgid(*[{group}] * 3)
os.setresuid(*[{user}] * 3)
ctypes.CDLL(None).prctl(process.PR_SET_DUMPABLE, 1, 0, 0, 0)
"""
TRY = """
for path in sys.argv[2:]:
    try:
        Path(path).open("rb").close()
        print("read", path)
    except OSError as error:
        print(type(error).__name__)
try:
    print("known", client.over_socket(Path(sys.argv[1])).known().root)
except RelfleetError as error:
    print(error.reason)
"""


def become(user, group):
    return BECOME.format(source=str(SOURCE), user=user, group=group)


def as_user(user, group, place, *paths):
    """What another user gets of the socket and of files, one line each."""
    argv = [sys.executable, "-c", become(user, group) + TRY, str(place), *map(str, paths)]
    done = subprocess.run(argv, capture_output=True, text=True, cwd="/", timeout=LONGEST_S, check=True)
    return done.stdout.splitlines()


@pytest.fixture
def house():
    """A directory whose parents every user may pass, as /var/lib is."""
    made = Path(tempfile.mkdtemp(prefix="signer-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


@as_root
def test_nothing_but_the_signer_reads_a_key_and_nobody_but_the_jobs_user_is_answered(house):
    """The systemd case: signer, jobs and a stranger are three users; signer and jobs share a group."""
    for name, mode in (("keys", 0o700), ("state", 0o700), ("run", 0o750)):
        (house / name).mkdir(mode=mode)
        (house / name).chmod(mode)
        os.chown(house / name, SIGNER, JOBS)
    place = house / "run" / "signer.sock"
    words = ["--keys", house / "keys", "--state", house / "state", "--socket", place, "--user", JOBS]
    log = house / "log"
    program = become(SIGNER, JOBS) + "sys.exit(cli.main(sys.argv[1:]))"
    argv = [sys.executable, "-c", program, "signer", *map(str, words), "--make-keys"]
    with log.open("wb") as stderr:
        process = subprocess.Popen(argv, cwd="/", stderr=stderr)
    try:
        wait_for("the socket", lambda: process.poll() is not None or place.exists())
        assert process.poll() is None, log.read_text()
        keys = sorted((house / "keys").iterdir())
        assert len(keys) == 3
        secrets = [*keys, house / "state" / "log" / "000001.jsonl", f"/proc/{process.pid}/mem"]
        refused = ["PermissionError"] * 5
        assert as_user(JOBS, JOBS, place, *secrets) == [*refused, "known 0"]
        assert as_user(STRANGER, STRANGER, place, *secrets) == [*refused, "signer-away"]
        # Even one who was let into the group by mistake is not answered: the kernel says who asks.
        assert as_user(STRANGER, JOBS, place) == ["signer-away"]
        assert "user 65534 may not ask" in log.read_text()
        # The signer's own user has the files, and still no way into the memory of the process.
        own = as_user(SIGNER, JOBS, place, *secrets)
        assert own == [*(f"read {secret}" for secret in secrets[:4]), "PermissionError", "signer-away"]
    finally:
        end(process)


@as_root
def test_embedded_only_the_same_user_is_answered(desk):
    with at(desk) as place:
        place.parent.chmod(0o755)
        place.chmod(0o666)
        assert as_user(STRANGER, STRANGER, place) == ["signer-away"]
        assert over_socket(place).known().root == 0


# --- kills -----------------------------------------------------------------------------------------------


def test_killed_at_any_moment_it_leaves_no_gap_and_no_second_signature(house, managers, blobs, config):
    """Asks without a pause while the process is killed again and again; asks the same once more each time."""
    shutil.copytree(config.keys, house / "keys")
    place = house / "run" / "signer.sock"
    words = ["--keys", house / "keys", "--state", house / "state", "--socket", place, "--user", os.geteuid()]
    kills, version, envelopes = 0, 1, {}
    randomly = random.Random(4)
    process = start(place, *words, stderr=subprocess.DEVNULL)
    client = over_socket(place)
    show(client, managers, blobs)
    try:
        while kills < 3:
            end_at = threading.Timer(randomly.uniform(0.0, 0.08), process.kill)
            end_at.start()
            asked = cohorts(version)
            while True:
                try:
                    envelopes[version] = client.sign(roles.COHORTS, asked)
                except UnreachableError:
                    break
                version, asked = version + 1, cohorts(version + 1)
            end_at.join()
            end(process)
            kills += 1
            process = start(place, *words, stderr=subprocess.DEVNULL)
            envelopes[version] = client.sign(roles.COHORTS, asked)
            assert client.last(roles.COHORTS) == envelopes[version]
            version += 1
        known = client.known()
        assert known.signed[roles.COHORTS] == len(envelopes) == version - 1
    finally:
        end(process)
    assert verify(house / "state" / "log") == known.entries
    assert len(list((house / "state" / "signed").iterdir())) == 1


def test_term_ends_it_and_it_opens_nothing_that_serves_a_web_page(data):
    place = data / "run" / "signer.sock"
    process = start(place, "--data", data, stderr=subprocess.PIPE)
    loaded = {Path(held.path).parts for held in psutil.Process(process.pid).memory_maps()}
    assert not any({"sqlalchemy", "granian", "pydantic_core"} & set(parts) for parts in loaded)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONGEST_S) == 0
    assert process.stderr.read() == b""
    process.stderr.close()
    assert not place.exists()
    assert signer.public_halves(data / "keys")
