"""`/metrics`: who may read it, what it says, and what it costs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import event

from agent_core.errors import SettingsError
from agent_core.wire import AttemptState
from release_server import repository
from release_server.config import Config
from release_server.jobs import Jobs
from tests.release_server.fleet_world import World

HOUSE = Path(__file__).parents[2]
ROLES = {"root", "targets", "cohorts", "snapshot", "timestamp"}


def samples(text):
    """Every sample as its name and its labels' values, by the labels' names → value."""
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def scrape(client, token, clock):
    text = token("reader")

    def look(**by):
        clock.step(**(by or {"seconds": 6}))
        answer = client.get("/metrics", headers={"Authorization": f"Bearer {text}"})
        assert answer.status_code == 200, answer.data
        assert answer.content_type.startswith("text/plain; version=0.0.4")
        return samples(answer.text)

    return look


@pytest.fixture
def jobs(config, clock, online_signer, trusted, accept):
    accept(trusted.targets())
    made = Jobs(config, clock=clock, shared_now=lambda _: None, signer=online_signer)
    assert made.tick()
    yield made
    made.close()


# --- what it says ----------------------------------------------------------------------------------------


def test_each_role_says_how_long_it_lives_as_it_is_published(scrape, jobs, sessions, clock, config):
    found = scrape()
    with sessions.read() as session:
        so = {life.role: life for life in repository.lifetimes(session, clock())}
    assert so.keys() == ROLES
    for role, life in so.items():
        assert found["relfleet_role_expires_in_seconds", role] == life.left.total_seconds()
        assert found["relfleet_role_version", role] == life.version
    later = scrape(days=2)
    assert later["relfleet_role_expires_in_seconds", "timestamp"] < 0, "and nothing was signed meanwhile"
    (config.repository / "metadata" / "timestamp.json").unlink()  # it is in the database still
    assert not any(name == "relfleet_role_version" for name, *_ in scrape())


def test_before_the_first_root_there_is_no_role_and_the_rest_is_said(scrape):
    found = scrape()
    assert not any(name.startswith("relfleet_role") for name, *_ in found)
    assert (found["relfleet_database_up",], found["relfleet_signer_up",]) == (1, 0)
    assert found["relfleet_disk_free_bytes",] > 0
    assert ("relfleet_jobs_lease_age_seconds",) not in found


def test_a_jobs_process_that_is_gone_is_seen_by_its_lease(scrape, jobs):
    assert scrape()["relfleet_jobs_lease_age_seconds",] == 6
    assert scrape(minutes=5)["relfleet_jobs_lease_age_seconds",] == 306
    jobs.tick()
    assert scrape()["relfleet_jobs_lease_age_seconds",] == 6


def test_a_signer_that_answers_is_up(scrape, desk, config):
    import threading

    from release_server.signing.process import Service, listen

    service = Service(desk, frozenset({os.geteuid()}))
    with listen(config.signer_socket, shared=False) as listening:
        at_work = threading.Thread(target=service.run, args=(listening,))
        at_work.start()
        try:
            assert scrape()["relfleet_signer_up",] == 1
        finally:
            service.stop.set()
            at_work.join()
    assert scrape()["relfleet_signer_up",] == 0


def test_agents_and_rollouts_by_state_come_from_counters(scrape, sessions, clock):
    world = World(sessions, clock)
    world.cohort("all")
    first, *_ = world.enroll_many(3)
    rollout = world.start("1.1.0")
    world.tick()
    world.finish(first, rollout, AttemptState.TRIAL)
    found = scrape()
    assert found["relfleet_rollout_agents", "all", "demo", "trial"] == 1
    assert found["relfleet_rollouts", "running"] == 1
    assert found["relfleet_rollouts", "paused"] == 0
    assert ("relfleet_rollouts", "completed") not in found


def test_requests_are_counted_by_route_and_no_word_of_a_stranger_becomes_a_label(client, scrape):
    for number in range(20):
        client.get(f"/api/v1/agents/web-{number}")
        client.get(f"/made-up/{number}")
        client.open("/metadata/x.json", method=f"MADEUP{number}")
    found = {name: value for name, value in scrape().items() if name[0] == "relfleet_http_requests_total"}
    assert found["relfleet_http_requests_total", "GET", "/api/v1/agents/<id>", "4xx"] == 20
    assert found["relfleet_http_requests_total", "GET", "other", "4xx"] == 20
    assert found["relfleet_http_requests_total", "other", "/metadata/", "4xx"] == 20
    assert len(found) == 3


# --- what it costs ---------------------------------------------------------------------------------------


def test_a_scrape_costs_as_much_for_many_agents_as_for_few_and_is_kept(scrape, sessions, clock, app, jobs):
    world = World(sessions, clock)
    world.cohort("all")
    asked = []
    engine = app.extensions["relfleet"].sessions.engine
    event.listen(engine, "before_cursor_execute", lambda *call: asked.append(call[2]))

    def spent():
        return [said for said in asked if said != "BEGIN" and "tokens" not in said]

    def statements():
        asked.clear()
        scrape(minutes=2)
        return spent()

    few = statements()
    world.enroll_many(60)
    assert statements() == few
    assert not any(re.search(r"\b(agents|attempts|agent_events)\b", said) for said in few)
    first = scrape()
    asked.clear()
    assert scrape(seconds=1)["relfleet_jobs_lease_age_seconds",] == first["relfleet_jobs_lease_age_seconds",]
    assert spent() == []


def test_what_does_not_change_is_read_once(scrape, jobs, config):
    scrape()
    (found,) = (config.repository / "metadata").glob("*.targets.json")
    found.write_text("a file of a version that was read is not opened again")
    assert ("relfleet_role_version", "targets") in scrape()


# --- who may ---------------------------------------------------------------------------------------------


def test_it_wants_a_readers_token(client, token):
    assert client.get("/metrics").status_code == 401
    for role, status in {"reader": 200, "operator": 200, "admin": 200, "enroller": 403}.items():
        headers = {"Authorization": f"Bearer {token(role)}"}
        assert client.get("/metrics", headers=headers).status_code == status, role


@pytest.mark.parametrize(
    ("settings", "asker", "headers", "status"),
    [
        ("10.1.0.0/16", "10.1.2.3", {}, 200),
        ("10.1.0.0/16,::1", "10.2.2.3", {}, 401),
        ("10.1.0.0/16", "10.1.2.3", {"X-Forwarded-For": "10.1.2.3"}, 401),
        ("10.1.0.0/16", "10.1.2.3", {"Via": "1.1 proxy"}, 401),
    ],
    ids=["listed", "not listed", "by a proxy that is not believed", "by another one"],
)
def test_a_listed_network_needs_none(config, clock, settings, asker, headers, status):
    from release_server.app import create_app

    listed = Config.load(config.data, environ={"RELFLEET_METRICS_NETWORKS": settings})
    app = create_app(listed, clock=clock)
    answer = app.test_client().get("/metrics", headers=headers, environ_base={"REMOTE_ADDR": asker})
    app.extensions["relfleet"].sessions.close()
    assert answer.status_code == status


def test_a_network_that_is_none_is_refused_at_start(config):
    with pytest.raises(SettingsError, match=r"metrics\.networks"):
        Config.load(config.data, environ={"RELFLEET_METRICS_NETWORKS": "10.1.0.1/16"})


# --- several processes -----------------------------------------------------------------------------------

WORKER = """
import sys
from pathlib import Path
from release_server.config import Config
from release_server.app import create_app, share_counters
config = Config.load(Path(sys.argv[1]))
share_counters(config)
client = create_app(config).test_client()
for _ in range(int(sys.argv[2])):
    client.get("/api/v1/health")
if sys.argv[3:]:
    print(client.get("/metrics", environ_base={"REMOTE_ADDR": "10.1.2.3"}).text)
"""


def test_any_process_says_what_all_of_them_have_counted(config):
    environ = {**os.environ, "RELFLEET_METRICS_NETWORKS": "10.1.0.0/16", "PYTHONPATH": str(HOUSE)}

    def worker(*words):
        argv = [sys.executable, "-c", WORKER, config.data, *words]
        return subprocess.run(argv, env=environ, capture_output=True, text=True, check=True).stdout

    worker("3")
    found = samples(worker("4", "and tell"))
    assert found["relfleet_http_requests_total", "GET", "/api/v1/health", "2xx"] == 7
