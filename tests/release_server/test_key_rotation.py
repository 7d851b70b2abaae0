"""An agent changes its key: the device's own code against the real server, cut wherever it can be."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent_core import wire
from agent_core.errors import ConflictError, NotAllowedError, UnreachableError
from agent_core.layout import Layout
from release_server import agents, audit, enrolment, reports
from release_server.models import Agent
from tests.release_server.fleet_world import PLATFORM, World
from updater import identity as identities
from updater import server
from updater.transport import Answer


class Wire:
    """The network between the two; `cut` loses the next request or the next answer."""

    def __init__(self, client):
        self.client, self.cut = client, ""

    def post(self, path, body, headers, *, max_length, deadline_s):
        cut, self.cut = self.cut, ""
        if cut == "request":
            raise UnreachableError("cut")
        answer = self.client.post(path, data=body, headers=dict(headers))
        if cut == "answer":
            raise UnreachableError("cut")
        return Answer(answer.status_code, {k.lower(): v for k, v in answer.headers.items()}, answer.data)


class Device:
    """One host with its files, enrolled."""

    def __init__(self, world, client, root):
        self.wire, self.paths = Wire(client), Layout(root)
        self.paths.make()
        key = identities.make_key(self.paths)
        request = wire.EnrollRequest("demo", "web", key, PLATFORM)
        answer = server.enroll(self.wire, world.token, request)
        self.identity = identities.Identity("http://x", "demo", answer.agent_id, PLATFORM)

    @property
    def key(self):
        return identities.public_key(self.paths)

    def rotate(self):
        return server.rotate_key(self.wire, self.identity, self.paths)

    def report(self):
        said = wire.Report(self.identity.agent_id, "demo", "1.0.0", "", wire.Phase.IDLE, PLATFORM)
        return server.report_signed(self.wire, self.identity, self.paths, said)


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort("all")
    return made


@pytest.fixture
def device(world, client, tmp_path):
    return Device(world, client, tmp_path / "host")


def known(world):
    with world.read() as session:
        agent = session.get_one(Agent, "web")
        return agent.public_key, agent.counter


def test_the_old_key_signs_for_the_new_one_and_is_refused_from_then_on(world, device):
    old, before = device.key, known(world)[1]
    kept = device.paths.key.read_bytes()
    new = device.rotate()
    assert (device.key, known(world)[0]) == (new, new) != (old, old)
    assert known(world)[1] > before, "the counter goes on"
    device.report()
    device.paths.key.write_bytes(kept)
    with pytest.raises(NotAllowedError) as refused:
        device.report()
    assert refused.value.reason == "bad-signature"
    with world.read() as session:
        assert "agent.rotate-key" in [entry.action for entry in audit.entries(session)]


@pytest.mark.parametrize("cut", ["request", "answer"])
@pytest.mark.parametrize("then", ["report", "rotate"])
def test_cut_anywhere_the_agent_is_heard_and_a_second_try_ends_it(world, device, cut, then):
    device.wire.cut = cut
    with pytest.raises(UnreachableError):
        device.rotate()
    getattr(device, then)()
    device.report()
    device.rotate()
    assert device.key == known(world)[0]
    assert not device.paths.next_key.exists()


def test_killed_before_the_new_key_took_its_place_the_next_report_puts_it_there(world, device, monkeypatch):
    monkeypatch.setattr(identities, "take_next_key", lambda paths: None)
    new = device.rotate()
    monkeypatch.undo()
    assert device.key != new
    device.report()
    assert device.key == new


def test_the_new_key_is_private_and_on_the_disk_before_anybody_hears_of_it(device):
    device.wire.cut = "request"
    with pytest.raises(UnreachableError):
        device.rotate()
    assert device.paths.next_key.stat().st_mode & 0o777 == 0o600


def test_a_session_of_the_old_key_is_over(world, device):
    session = device.report().session
    device.rotate()
    with world.read() as reading:
        assert reading.get_one(Agent, "web").session_hash is None
    said = wire.Report("web", "demo", "1.0.0", "", wire.Phase.IDLE, PLATFORM)
    with pytest.raises(NotAllowedError) as refused:
        server.report_session(device.wire, session, said)
    assert refused.value.reason == "session-over"


def change(agent_id, key, signer=None):
    public = key.public_key().public_bytes_raw().hex()
    return wire.KeyChange(public, (signer or key).sign(wire.key_text(agent_id, public)).hex())


def rotate(world, proof, wanted):
    with world.write() as session:
        enrolment.rotate_key(session, world.clock(), proof, wanted)


def test_nobody_else_changes_a_key_and_no_key_of_somebody_else_is_taken(world):
    host, other = world.enroll("web"), world.enroll("other")
    fresh = Ed25519PrivateKey.generate()
    proof, _ = host.sign(host.report())
    with pytest.raises(NotAllowedError, match="new key"):
        rotate(world, proof, change("web", fresh, signer=host.key))
    with pytest.raises(NotAllowedError, match="new key"):
        rotate(world, host.sign(host.report())[0], change("other", fresh))
    with pytest.raises(ConflictError):
        rotate(world, host.sign(host.report())[0], change("web", other.key))
    with pytest.raises(NotAllowedError, match="signature"):
        rotate(world, host.sign(host.report(), key=fresh)[0], change("web", fresh))
    with pytest.raises(NotAllowedError, match="signed request"):
        rotate(world, reports.Bearer("web", host.session), change("web", fresh))
    world.call(agents.retire, "web")
    with pytest.raises(NotAllowedError) as refused:
        rotate(world, host.sign(host.report())[0], change("web", fresh))
    assert refused.value.reason == "retired"
