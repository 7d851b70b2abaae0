"""Editions at the edge: whatever the API's document says to take `If-Match` refuses one that is of nobody."""

from __future__ import annotations

from sqlalchemy import func, select

from release_server.models import AuditEntry
from tests.release_server.fleet_world import World

PLACES = {
    "/agents/{id}": "/agents/web-1",
    "/cohorts/{product}/{name}": "/cohorts/demo/all",
    "/rollouts/{id}": "/rollouts/1",
}
BODIES = {
    "approve": {"digest": "d" * 64},
    "label": {"labels": {"tier": "db"}},
    "move": {"cohort": "all"},
    "pin": {"version": "1.0.0"},
}


def conditional(document):
    """Method and path of each route that takes `If-Match`, with something that is there in its path."""
    for path, operations in document["paths"].items():
        place = path.removeprefix("/api/v1")
        for template, there in PLACES.items():
            place = place.replace(template, there)
        for method, said in operations.items():
            if any(one.get("name") == "If-Match" for one in said.get("parameters", ())):
                yield method.upper(), place


def test_every_route_that_takes_an_edition_refuses_another_one_and_does_nothing(
    client, sessions, clock, sign_in
):
    world, call = World(sessions, clock), sign_in("admin")
    world.cohort()
    world.enroll("web-1")
    world.start("1.1.0")

    def deeds():
        with sessions.read() as session:
            return session.scalar(select(func.count()).select_from(AuditEntry))

    before = deeds()
    routes = list(conditional(client.get("/api/v1/openapi.json").json))
    assert {path.split("/")[1] for _, path in routes} == {"agents", "cohorts", "rollouts"}
    for method, path in routes:
        body = BODIES.get(path.rpartition("/")[2], {})
        answer = call(method, path, json=body, headers={"If-Match": '"of-nobody"'})
        assert (answer.status_code, answer.json["reason"]) == (412, "stale"), (method, path, answer.json)
    assert deeds() == before
