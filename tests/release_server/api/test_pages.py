"""Every list comes in pages by the same words, none of which is lost or told twice, and takes filters."""

from __future__ import annotations

from datetime import timedelta

import pytest

from release_server import agents, auth, yanks
from release_server.models import PersonSession, Product, Proposal
from tests.release_server.fleet_world import World


@pytest.fixture
def call(sign_in):
    return sign_in("admin")


@pytest.fixture
def world(sessions, clock, call):
    """Some of everything: of two products, so that lists of both go over from one to the other."""
    made = World(sessions, clock)
    with made.write() as session:
        session.add(Product(name="other", created_at=clock()))
        session.flush()
        for name in ("ada", "bo"):
            auth.add_token(session, clock(), name=name, role=auth.Role.READER, actor="test")
        _, gone = auth.add_token(session, clock(), name="ada", role=auth.Role.RELEASER, actor="test"), 3
        auth.revoke_token(session, clock(), gone, "test")
        for number in range(5):
            times = {"created_at": clock(), "used_at": clock(), "expires_at": clock() + timedelta(days=1)}
            said = {"issuer": "https://id", "subject": str(number), "rule": "r", "name": f"p{number % 2}"}
            session.add(PersonSession(hash=str(number), attempt=str(number), **said, **times))
    for product, name in (("other", "b"), ("demo", "c"), ("demo", "a"), ("other", "a"), ("demo", "b")):
        assert call("POST", "/cohorts", json={"product": product, "name": name}).status_code == 201
    made.call(lambda session, now, actor: yanks.yank(session, now, actor, "demo", "0.9.0", "broken"))
    for number, cohort in enumerate("abc"):
        body = {"product": "demo", "cohort": cohort, "version": f"1.{number}.0", "stages": [{"count": 1}]}
        assert call("POST", "/rollouts", json=body).status_code == 201
    for host in ("a", "b", "c"):
        hook = {"url": f"https://{host}.example.org/hook", "events": ["rollout.paused"]}
        assert call("POST", "/webhooks", json=hook).status_code == 201
    made.enroll_many(3)
    return made


LISTS = {
    "/products": "name",
    "/releases": "version",
    "/cohorts": "id",
    "/rollouts": "id",
    "/tokens": "id",
    "/sessions": "id",
    "/audit": "id",
    "/agents": "id",
    "/proposals?state=all": "id",
    "/webhooks": "id",
}


@pytest.fixture
def some_proposals(sessions, trusted, accept, clock):
    metadata = trusted.targets()
    accept(metadata)
    body = trusted.signed(trusted.next_targets(metadata), trusted.release_keys[0]).to_bytes()
    with sessions.write() as session:
        for state in ("open", "withdrawn", "published", "open"):
            times = {"created_at": clock(), "expires_at": clock() + timedelta(days=1), "closed_at": None}
            session.add(Proposal(version=2, body=body, signers={}, state=state, created_by="ada", **times))


def identity(item, key):
    return (item.get("product"), item.get("name"), item.get(key))


def walk(call, path, limit):
    """All pages; no page is longer than asked."""
    joined, after, found = "&" if "?" in path else "?", None, []
    for _ in range(100):
        cursor = "" if after is None else f"&after={after}"
        page = call("GET", f"{path}{joined}limit={limit}{cursor}").json
        assert set(page) == {"items", "next"}
        assert len(page["items"]) <= limit
        found += page["items"]
        after = page["next"]
        if after is None:
            return found
        assert isinstance(after, str)
    raise AssertionError("there is no last page")


def test_pages_of_any_length_are_the_whole_list_in_its_order(world, some_proposals, call):
    for path, key in LISTS.items():
        whole = [identity(item, key) for item in call("GET", path).json["items"]]
        assert len(whole) == len(set(whole)) > 1, path
        for limit in (2, len(whole)):
            assert [identity(item, key) for item in walk(call, path, limit)] == whole, (path, limit)


def test_every_list_of_the_document_takes_limit_and_after(app):
    document = app.test_client().get("/api/v1/openapi.json").json
    lists = {path.partition("?")[0] for path in LISTS}
    for path in lists:
        said = {
            parameter["name"]: parameter["schema"]
            for parameter in document["paths"][f"/api/v1{path}"]["get"]["parameters"]
        }
        assert said["limit"]["maximum"] <= 10_000
        assert {"limit", "after"} <= set(said)
    bare = {
        path
        for path, operations in document["paths"].items()
        if "get" in operations and "{" not in path and path.removeprefix("/api/v1").lstrip("/").isalpha()
    }
    alone = {"whoami", "health", "signin", "trust", "compare"}
    assert {path.removeprefix("/api/v1") for path in bare} - {f"/{name}" for name in alone} == lists


@pytest.mark.parametrize("path", [*LISTS])
def test_what_is_no_cursor_and_no_limit_is_refused(call, path):
    joined = "&" if "?" in path else "?"
    for said in ("limit=0", "limit=10001", "limit=x", f"after={'9' * 300}", "before=1"):
        assert call("GET", f"{path}{joined}{said}").status_code == 422, said
    if path not in ("/products", "/agents"):  # whose cursor is a name
        for said in ("after=x", "after=-1", f"after={'9' * 19}", "after=%C2%B2", f"after={2**31}"):
            assert call("GET", f"{path}{joined}{said}").status_code == 400, said


def test_a_cursor_may_be_as_large_as_what_it_stands_for(world, call):
    assert call("GET", f"/audit?after={2**31 - 1}").json["items"]
    assert call("GET", f"/releases?after=1.{2**63 - 1}").status_code == 200
    for said in (f"1.{2**63}", f"{2**31}.1"):
        assert call("GET", f"/releases?after={said}").status_code == 400, said


def test_what_comes_and_goes_between_two_pages_shifts_nothing(world, call):
    first = call("GET", "/rollouts?limit=2").json
    body = {"product": "other", "cohort": "a", "version": "1.0.0", "stages": [{"count": 1}]}
    assert call("POST", "/rollouts", json=body).status_code == 404  # that product has no release
    call("POST", "/rollouts", json=body | {"product": "demo", "cohort": "a", "supersede": True})
    second = call("GET", f"/rollouts?limit=2&after={first['next']}").json
    assert [item["id"] for item in first["items"] + second["items"]] == [3, 2, 1]
    world.call(agents.retire, "web-01")
    page = call("GET", "/agents?limit=1&after=web-00").json
    assert [item["id"] for item in page["items"]] == ["web-02"]


FILTERS = [
    ("/rollouts?state=running", 3),
    ("/rollouts?state=completed", 0),
    ("/rollouts?version=1.1.0", 1),
    ("/rollouts?product=demo&cohort=b", 1),
    ("/releases?yanked=true", 1),
    ("/releases?yanked=false&product=demo", 3),
    ("/cohorts?product=other", 2),
    ("/cohorts?pinned=true", 1),
    ("/cohorts?frozen=true", 1),
    ("/cohorts?frozen=false&product=demo", 2),
    ("/tokens?name=ada", 2),
    ("/tokens?name=ada&works=true", 1),
    ("/tokens?works=false", 1),
    ("/tokens?role=reader", 2),
    ("/sessions?name=p0", 3),
    ("/audit?action=cohort.create", 5),
    ("/audit?actor=olga&action=release.yank", 1),
    ("/audit?subject=demo/a&action=cohort.create", 1),
    ("/audit?until=2026-05-01T12:00:00Z", 0),
    ("/audit?since=2026-05-01T12:00:01Z", 2),
    ("/agents?state=pending", 0),
]


def test_each_filter_lets_through_what_it_says(world, call, clock):
    clock.step(seconds=1)
    call("POST", "/cohorts/demo/b/freeze", json={})
    call("POST", "/cohorts/demo/c/pin", json={"version": "1.0.0"})
    found = {path: len(call("GET", path).json["items"]) for path, _ in FILTERS}
    assert found == dict(FILTERS)


def test_an_open_proposal_that_expired_is_not_among_the_open_ones(some_proposals, call, clock):
    assert [item["id"] for item in call("GET", "/proposals").json["items"]] == [4, 1]
    clock.step(days=2)
    assert call("GET", "/proposals").json == {"items": [], "next": None}
    states = [item["state"] for item in call("GET", "/proposals?state=all").json["items"]]
    assert states == ["expired", "published", "withdrawn", "expired"]
