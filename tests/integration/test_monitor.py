"""`release-server monitor` as cron starts it, word for word from docs/operations.md, beside a real server."""

from __future__ import annotations

import re
import shlex
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata

from agent_core import clock
from agent_core.errors import Exit
from release_server.config import Config
from release_server.publish import sign
from tests import forger
from tests.integration.world import until

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"


def crontab(world, state):
    """The words of the line for the crontab, with this server's address, root and a memory of this test's."""
    [line] = re.findall(r"^\*/15 \* \* \* \* (release-server monitor .*)$", PAGE.read_text(), re.MULTILINE)
    command, *words = shlex.split(line)
    ours = {
        "https://releases.example.org": world.url,
        "/etc/relfleet/root.json": str(world.trust),
        "/var/lib/relfleet-monitor": str(state),
    }
    assert set(ours) < set(words)
    return command, *(ours.get(word, word) for word in words)


@pytest.fixture
def cron(world, tmp_path):
    """Runs the line once: exit code, and what cron would send by mail."""

    def run(state=tmp_path / "memory"):
        code, out, said = world.exit_of(*crontab(world, state))
        return code, out + said

    return run


@contextmanager
def another_timestamp(world, life):
    """Have the server give out one that its own key signed under the version of the right one."""
    keys = forger.steal(Config.load(world.server_data, environ={}).keys)
    with world.jobs_stopped():
        honest = world.timestamp()
        metadata = Metadata.from_bytes(honest)
        metadata.signed.expires = clock.now().replace(microsecond=0) + life
        metadata.sign(keys["timestamp"])
        (world.metadata / "timestamp.json").write_bytes(metadata.to_bytes())
        try:
            yield
        finally:
            (world.metadata / "timestamp.json").write_bytes(honest)


def test_cron_hears_nothing_of_a_server_that_is_well_and_a_sentence_of_one_that_is_not(world, cron, tmp_path):
    assert cron() == (Exit.DONE, "")
    assert cron() == (Exit.DONE, "")

    # Two timestamps of one version, both signed: only who remembers the first knows of the second.
    with another_timestamp(world, timedelta(hours=23)):
        code, mail = cron()
        assert (code, mail.count("\n")) == (Exit.TRUST, 1), mail
        assert re.match(r"refused timestamp: version \d+ is served with other bytes than before; ", mail)
        assert cron(tmp_path / "no memory") == (Exit.DONE, "")
    assert cron() == (Exit.DONE, "")

    # Nothing is signed any more: the newest timestamp is older than it ever gets while all is well.
    with another_timestamp(world, timedelta(hours=5)):
        code, mail = cron(tmp_path / "other memory")
        assert (code, mail.count("\n")) == (Exit.FAILED, 1), mail
        assert re.match(r"alarm timestamp: version \d+ is good for 4 h, .*release-server doctor", mail)
    with another_timestamp(world, -timedelta(hours=1)):
        code, mail = cron(tmp_path / "third memory")
        assert (code, "expired" in mail, "release-server doctor" in mail) == (Exit.TRUST, True, True), mail
    assert cron() == (Exit.DONE, "")


def test_cron_hears_what_people_have_to_sign_until_they_have(world, cron):
    assert cron() == (Exit.DONE, "")
    trust, cache = world.trust.read_bytes(), world.home / "cache"
    trusted = sign.fetch(world.client, trust, cache)
    targets = sign.next_targets(trusted, clock.now() - timedelta(days=50))
    held = sign.release_signers(world.keys, trusted.root.signed, lambda _: "correct horse")
    assert sign.sign_targets(targets, trusted.root.signed, held) == 0
    world.client.post("/metadata/targets", targets.to_bytes())
    until("the old targets", lambda: sign.fetch(world.client, trust, cache).version == targets.signed.version)
    code, mail = cron()
    assert (code, mail.count("\n")) == (Exit.FAILED, 1), mail
    assert re.match(r"alarm targets: version \d+ is good for 9 d, .*next: release renew", mail)
    world.release("renew", "--yes")
    assert cron() == (Exit.DONE, "")


def test_cron_hears_of_a_server_that_is_away_and_no_more_when_it_is_back(world, cron):
    assert cron() == (Exit.DONE, "")
    world.stop_server()
    code, mail = cron()
    assert (code, mail.startswith("unreachable server: ")) == (Exit.UNREACHABLE, True), mail
    world.start_server()
    assert cron() == (Exit.DONE, "")
