"""The monitor against a real server: silent while all is well, and each alarm with what, why and next."""

from __future__ import annotations

import json
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

import pytest
from tuf.api.metadata import Metadata

from agent_core.errors import Exit
from keys import signers
from keys.cli import hold_ceremony
from release_server import monitor
from release_server.cli import main
from release_server.demo.processes import wait_for
from release_server.publish import sign
from release_server.publish.client import Client
from tests.release_server.publish.house import CHEAP, WORDS, serve

ROLES = {"root", "targets", "cohorts", "snapshot", "timestamp"}


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A server that has published once and signs nothing more; `house.trust` is its root."""
    home = tmp_path_factory.mktemp("monitored")
    with serve(home / "server") as running:
        held = hold_ceremony(
            home / "keys", running.online, lambda _: WORDS, datetime.now(UTC), scrypt_n=CHEAP
        )
        client = Client(running.url, running.token("admin", "ada"))
        client.put("/trust/root", held.root.to_bytes())
        client.post("/metadata/targets", held.targets.to_bytes())
        client.close()
        running.trust = home / "root.json"
        running.trust.write_bytes(held.root.to_bytes())
        running.metadata = running.config.repository / "metadata"
        wait_for("the first timestamp", (running.metadata / "timestamp.json").exists, within_s=60)
        running.stop_jobs()
        yield running


@pytest.fixture
def call(house, tmp_path, capsys):
    """`release-server monitor`: exit code and findings, by a memory of this test's own."""

    def run(*words, url=house.url, trust=house.trust):
        capsys.readouterr()
        said = ["monitor", url, "--trust", str(trust), "--state", str(tmp_path / "state"), *words]
        code = main([*said, "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def look(house, tmp_path):
    """What the monitor finds when its own clock is ahead."""

    def run(ahead):
        client = Client(house.url)
        try:
            now = datetime.now(UTC) + ahead
            return monitor.look(client, sign.read_trust(house.trust), tmp_path / "cache", now)
        finally:
            client.close()

    return run


@contextmanager
def served(file, content):
    """Have the server give out other bytes for a while; None: nothing at all."""
    right, mode = file.read_bytes(), file.stat().st_mode
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        file.write_bytes(right)
        file.chmod(mode)


def signed_again(house, **changes):
    """A second timestamp, by the key that is on the server."""
    metadata = Metadata.from_bytes((house.metadata / "timestamp.json").read_bytes())
    for name, value in changes.items():
        setattr(metadata.signed, name, value)
    metadata.signatures.clear()
    [entry] = [entry for entry in signers.find(house.config.keys) if entry.role == "timestamp"]
    metadata.sign(signers.load(entry.path, lambda _: ""))
    return metadata.to_bytes()


def test_a_server_that_is_well_is_good_for_so_long_and_cron_hears_nothing(house, call, tmp_path, capsys):
    code, found = call()
    assert code == Exit.DONE
    assert {finding["check"] for finding in found} == ROLES
    assert {(finding["state"], finding["reason"]) for finding in found} == {("ok", "ok")}
    words = ["monitor", house.url, "--trust", str(house.trust), "--state", str(tmp_path / "state"), "-q"]
    assert main(words) == Exit.DONE
    printed = capsys.readouterr()
    assert printed.out + printed.err == ""


@pytest.mark.parametrize(
    ("ahead", "alarms"),
    [
        (timedelta(hours=14), {}),
        (timedelta(hours=16), {"timestamp": "stalled"}),
        (timedelta(days=12), dict.fromkeys(("timestamp", "snapshot", "cohorts"), "stalled")),
        (
            timedelta(days=47),
            dict.fromkeys(("timestamp", "snapshot", "cohorts"), "stalled") | {"targets": "expires"},
        ),
        (
            timedelta(days=306),
            dict.fromkeys(("timestamp", "snapshot", "cohorts"), "stalled")
            | dict.fromkeys(("targets", "root"), "expires"),
        ),
    ],
    ids=["due, and still in time", "timestamp", "what the server signs", "targets", "root"],
)
def test_what_is_not_signed_in_time_and_what_runs_out_is_an_alarm_with_what_to_type(look, ahead, alarms):
    found = look(ahead)
    assert {finding.check: finding.reason for finding in found if finding.is_alarm} == alarms
    assert monitor.exit_code(found) == (Exit.FAILED if alarms else Exit.DONE)
    for finding in found[: len(alarms)]:
        line = finding.line()
        assert "\n" not in line
        assert line.startswith(f"alarm {finding.check}: version ")
        assert "next: release" in line


def test_two_timestamps_of_one_version_are_two_truths(house, call):
    """Both are signed by the right key; a host takes either, and no client sees that there are two."""
    assert call()[0] == Exit.DONE
    later = Metadata.from_bytes((house.metadata / "timestamp.json").read_bytes()).signed.expires
    with served(house.metadata / "timestamp.json", signed_again(house, expires=later - timedelta(hours=1))):
        code, found = call()
        assert (code, found[0]["check"], found[0]["reason"]) == (Exit.TRUST, "timestamp", "differs")
    assert call()[0] == Exit.DONE


@pytest.mark.parametrize("name", ["1.root.json", "1.targets.json", "1.cohorts.json", "1.snapshot.json"])
def test_a_file_whose_version_has_other_bytes_now_is_found(house, call, name):
    assert call()[0] == Exit.DONE
    with served(house.metadata / name, (house.metadata / name).read_bytes() + b"\n"):
        code, found = call()
        assert (code, found[0]["reason"]) == (Exit.TRUST, "differs")
        assert found[0]["check"] == name.split(".")[1]
        assert "version 1 is served with other bytes" in found[0]["what"]


def test_a_file_that_is_gone_is_an_alarm(house, call):
    assert call()[0] == Exit.DONE
    with served(house.metadata / "1.targets.json", None):
        code, found = call()
        assert (code, found[0]["check"], found[0]["reason"]) == (Exit.FAILED, "targets", "missing")


def test_metadata_that_a_host_would_refuse_is_refused_with_its_reason(house, call):
    assert call()[0] == Exit.DONE
    file = house.metadata / "timestamp.json"
    newer = signed_again(house, version=9)
    unsigned = json.dumps(json.loads(newer) | {"signatures": []}).encode()
    before = file.read_bytes()
    for content, reason in ((unsigned, "bad-signature"), (b"<html>", "bad-metadata")):
        with served(file, content):
            code, found = call()
            assert (code, found[0]["check"], found[0]["reason"]) == (Exit.TRUST, "server", reason)
            assert found[0]["then"]
    with served(file, newer):
        assert call()[0] == Exit.DONE
    with served(file, before):
        code, found = call()
        assert (code, found[0]["reason"]) == (Exit.TRUST, "replayed")


def test_a_root_of_other_people_is_another_truth(house, call, tmp_path):
    other = hold_ceremony(tmp_path / "k", house.online, lambda _: WORDS, datetime.now(UTC), scrypt_n=CHEAP)
    trust = tmp_path / "other.json"
    trust.write_bytes(other.root.to_bytes())
    code, found = call(trust=trust)
    assert (code, found[0]["state"]) == (Exit.TRUST, "refused")


def test_a_server_that_does_not_answer_is_unreachable(call):
    code, found = call("--timeout", "1s", url="http://127.0.0.1:9")
    assert (code, found[0]["state"]) == (Exit.UNREACHABLE, "unreachable")


def test_a_trust_file_that_is_not_there_is_said_before_anything_is_asked(house, tmp_path, capsys):
    assert main(["monitor", house.url, "--trust", str(tmp_path / "none.json")]) == Exit.NOT_FOUND
    assert "no trusted root" in capsys.readouterr().err
