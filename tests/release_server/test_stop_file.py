"""A stop file in the server's own repository: others hear of it once, and rollouts stand still by it."""

from __future__ import annotations

import json

import pytest
from sqlalchemy import select

from agent_core.wire import STOP_LENGTH
from release_server import explain, fleet, stop_file
from release_server.models import AuditEntry, Product, WebhookDelivery
from release_server.stages import Stage
from release_server.webhooks import subscriptions
from release_server.webhooks.vault import Vault
from tests.release_server.fleet_world import World

FIRE = b'{"reason": "a fire"}'


@pytest.fixture
def world(sessions, clock, config):
    made = World(sessions, clock)
    made.cohort()
    made.call(subscriptions.add, Vault(config.webhook_key), url="https://x.example", wanted=["fleet.*"])
    return made


def look(world, body):
    """One tick of the jobs process that finds this in the file."""
    with world.write() as session:
        stop_file.tell(session, world.clock(), body)
        fleet.tick(session, world.clock())


def told(world):
    with world.read() as session:
        rows = session.scalars(select(WebhookDelivery).order_by(WebhookDelivery.sequence)).all()
        bodies = [json.loads(row.body) for row in rows]
        lines = session.scalars(
            select(AuditEntry).where(AuditEntry.action.like("fleet.%")).order_by(AuditEntry.id)
        )
        audited = [(line.action, line.subject, line.detail["reason"]) for line in lines]
    events = [(each["type"], each["data"]["product"], each["data"]["reason"]) for each in bodies]
    assert [
        (kind.replace("stopped", "stop").replace("resumed", "resume"), *rest) for kind, *rest in events
    ] == audited
    assert all((each["data"]["by"], each["data"]["actor"]) == ("stop.json", "server") for each in bodies)
    return events


def test_a_stop_is_told_once_when_it_appears_and_once_when_it_goes_and_its_reason_when_that_changes(world):
    for body in (None, FIRE, FIRE, b"{}", b"{}", None, None, b"torn"):
        look(world, body)
    assert told(world) == [
        ("fleet.stopped", "demo", "a fire"),
        ("fleet.stopped", "demo", ""),
        ("fleet.resumed", "demo", ""),
        ("fleet.stopped", "demo", "its content cannot be read"),
    ]


def test_a_stop_that_names_products_is_told_of_those(world):
    with world.write() as session:
        session.add(Product(name="other", created_at=world.clock()))
    look(world, b'{"products": ["other"]}')
    look(world, b'{"products": ["demo"]}')
    assert told(world) == [
        ("fleet.stopped", "other", ""),
        ("fleet.stopped", "demo", ""),
        ("fleet.resumed", "other", ""),
    ]


def test_what_is_told_by_a_transaction_that_fails_is_told_by_the_next(world):
    with world.sessions.read() as session:  # rolled back at its end
        stop_file.tell(session, world.clock(), FIRE)
    look(world, FIRE)
    assert told(world) == [("fleet.stopped", "demo", "a fire")]


def test_a_rollout_stands_still_by_a_stop_and_takes_nobody_in_whose_host_waits_for_its_end(world):
    """Else hosts that wait would count as set aside, each stage would pass, and all would begin at once."""
    world.enroll_many(4)
    world.start("1.1.0", Stage(count=1, soak_s=60), Stage(share_bp=10_000))
    (done,) = world.offered("1.1.0")
    world.finish(done, 1, "healthy")
    for _ in range(8):
        look(world, FIRE)
        world.clock.step(minutes=10)
        for host in world.hosts.values():
            world.report(host, **({} if host is done else {"reason": "stop-file"}))
    status = world.status(1)
    assert (status.state, status.stage, status.reason) == ("running", 0, "frozen")
    assert world.offered("1.1.0") == [], "nobody new"
    with world.read() as session:
        answer = explain.why_of_rollout(session, world.clock(), 1)
    (link,) = [link for link in answer["chain"] if not link["ok"]]
    text = "updates are stopped by stop.json beside the metadata: a fire"
    assert (link["code"], link["text"], answer["next"]) == ("stop-file", text, None)
    waiting = next(host for host in world.hosts.values() if host is not done)
    with world.read() as session:
        said = explain.agent_why(session, world.clock(), waiting.id)["chain"][-1]
    assert (said["code"], said["then"]) == ("stop-file", link["then"])
    look(world, None)
    assert world.events(1)[-2:] == ["unfrozen", "soaking"]


def test_what_agents_would_not_be_given_is_no_stop(tmp_path):
    (tmp_path / "metadata").mkdir()
    place = tmp_path / "metadata" / "stop.json"
    assert stop_file.look(tmp_path) is None
    place.write_bytes(FIRE)
    assert stop_file.look(tmp_path) == FIRE
    place.write_bytes(b" " * (STOP_LENGTH + 1))
    assert stop_file.look(tmp_path) is None
    place.unlink()
    place.mkdir()
    assert stop_file.look(tmp_path) is None


def test_a_file_that_cannot_be_looked_at_is_not_taken_for_none(tmp_path):
    (tmp_path / "metadata").mkdir()
    place = tmp_path / "metadata" / "stop.json"
    place.symlink_to(place)
    with pytest.raises(OSError, match="symbolic links"):
        stop_file.look(tmp_path)


def test_the_jobs_process_looks_with_each_tick_and_a_file_that_it_cannot_read_changes_nothing(
    world, make_jobs, config, monkeypatch, caplog
):
    (config.repository / "metadata" / "stop.json").write_bytes(FIRE)
    jobs = make_jobs()
    jobs.tick()
    with monkeypatch.context() as patched:
        patched.setattr(stop_file, "look", unreadable)
        jobs.tick()
    (config.repository / "metadata" / "stop.json").unlink()
    jobs.tick()
    assert told(world) == [("fleet.stopped", "demo", "a fire"), ("fleet.resumed", "demo", "")]
    assert "could not be read" in caplog.text


def unreadable(_):
    raise PermissionError("no")
