"""Agents: what they say themselves (`enroll`, `report`), and what people see and ask of them."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING, Any

from flask import Response, g, json, request
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag

from agent_core.errors import MalformedError, NotAllowedError
from agent_core.wire import (
    HEADER_AGENT,
    HEADER_COUNTER,
    HEADER_SIGNATURE,
    EnrollRequest,
    Getter,
    KeyChange,
    LeaseRequest,
    Problem,
    Report,
    ShareRequest,
)
from release_server import agents, auth, enrolment, explain, membership, queries, reports
from release_server.api import PREFIX, access, editions, problems, services
from release_server.api.access import requires
from release_server.api.fleet_schemas import AgentPath, AgentQuery, Because, Labels, Move, render_agent
from release_server.api.people import SECURITY

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from sqlalchemy.orm import Session

Answer = tuple[dict[str, Any], int, dict[str, str]]

blueprint = APIBlueprint("agents", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="agents")])
MOST_COUNTER = 2**53


# --- what agents say -------------------------------------------------------------------------------------


@blueprint.post("/enroll", security=[{"bearer": []}])
def enroll() -> dict[str, Any]:
    """Trade an enrolment token for an agent id; the host keeps the private half of its key."""
    hub = services()
    now = hub.clock()
    with hub.limits.counting_strangers(request.remote_addr, now):
        token = access.bearer()
        wanted = EnrollRequest.from_json(_body(request.get_data()))
        with hub.sessions.read() as session:  # who has no token makes no row, not even one that counts
            known = auth.check_token(session, token, now)
        hub.limits.take(
            hub.sessions,
            now,
            (hub.limits.hosts, wanted.public_key),
            (hub.limits.enrolments, str(known.token_id)),
        )
        with hub.sessions.write() as session:
            return enrolment.enroll(session, now, token, wanted).to_json()


@blueprint.post("/report")
def report() -> dict[str, Any] | Response:
    """Take in how an agent is; signed, or a heartbeat under a session."""
    return _from_agent(
        lambda session, now, proof, body: reports.take_report(session, now, proof, body).to_json(),
        Report.from_json,
    )


@blueprint.post("/lease")
def lease() -> dict[str, Any] | Response:
    """Say whether an agent may leave its version now, by how many of its failure domain do."""
    return _from_agent(reports.take_lease_request, LeaseRequest.from_json)


@blueprint.post("/share")
def share() -> dict[str, Any] | Response:
    """Give an agent its share of what may go into its failure domain, or take it back."""
    return _from_agent(reports.take_share_request, ShareRequest.from_json)


@blueprint.post("/rotate-key")
def rotate_key() -> dict[str, Any] | Response:
    """Give an agent another key; signed by the one it has."""
    return _from_agent(enrolment.rotate_key, KeyChange.from_json)


def _from_agent(
    service: Callable[..., dict[str, Any]], parse: Callable[[object], Any]
) -> dict[str, Any] | Response:
    """One request of an agent as one transaction; 401 where its sender is not proven."""
    hub = services()
    body = request.get_data()
    try:
        proof, said = _proof(body), parse(_body(body))
        with hub.sessions.write() as session:
            return service(session, hub.clock(), proof, said)
    except NotAllowedError as error:
        if error.reason not in reports.UNPROVEN:
            raise
        return problems.answer(Problem(401, error.what, error.why, error.reason, error.then))


def _body(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise MalformedError("the body is not JSON") from None


def _proof(body: bytes) -> reports.Signed | reports.Bearer:
    agent_id = request.headers.get(HEADER_AGENT, "")
    signature = request.headers.get(HEADER_SIGNATURE)
    if signature is None:
        return reports.Bearer(agent_id, access.bearer())
    return reports.Signed(
        agent_id=agent_id,
        method=request.method,
        path=request.path,
        body_sha256=sha256(body).hexdigest(),
        counter=_counter(),
        signature=signature,
    )


def _counter() -> int:
    text = request.headers.get(HEADER_COUNTER, "")
    if not text.isascii() or not text.isdigit() or len(text) > 16 or int(text) > MOST_COUNTER:
        raise MalformedError(f"{HEADER_COUNTER} is not a counter")
    return int(text)


# --- what people see and ask -----------------------------------------------------------------------------


def _show(session: Session, now: datetime, agent_id: str) -> Answer:
    view = agents.show(session, now, agent_id)
    return editions.tagged(render_agent(view, agents.events(session, agent_id)), editions.of_agent(view))


def _ask(path: AgentPath, service: Callable[..., None], **said: Any) -> Answer:
    """Ask one thing of an agent in one transaction, and show what has come of it."""
    hub = services()
    now = hub.clock()
    with hub.sessions.write() as session:
        edition = editions.of_agent(agents.show(session, now, path.id))
        then = f"release agents show {path.id}, then the same again"
        editions.refuse_stale(f"agent {path.id}", edition, then)
        service(session, now, g.person.name, path.id, **said)
        return _show(session, now, path.id)


@blueprint.get("/agents", security=SECURITY)
@requires("reader")
def list_agents(query: AgentQuery) -> dict[str, Any]:
    """Agents by id; `next` is the `after` of the following page, or null on the last.

    `match` is a query as of cohorts. A page that it thins out may be short or empty, and have a next one.
    """
    hub = services()
    wanted = agents.Filter(query.product, query.cohort, query.version, query.state, _pairs(query.label))
    match = queries.parse(query.match)
    with hub.sessions.read() as session:
        found = agents.list_agents(session, hub.clock(), wanted, limit=query.limit, after=query.after)
        following = found[-1].agent.id if len(found) == query.limit else None
        fitting = [view for view in found if match.matches(membership.facts_of(view.agent))]
        return {"items": [render_agent(view) for view in fitting], "next": following}


def _pairs(labels: list[str]) -> tuple[tuple[str, str], ...]:
    pairs = [text.partition("=") for text in labels]
    if not all(key and sign for key, sign, _ in pairs):
        raise MalformedError("a label is not key=value", why="for example label=region=eu")
    return tuple((key, value) for key, _, value in pairs)


@blueprint.get("/agents/<id>", security=SECURITY)
@requires("reader")
def show_agent(path: AgentPath) -> Answer:
    """One agent with what it did lately."""
    hub = services()
    with hub.sessions.read() as session:
        return _show(session, hub.clock(), path.id)


@blueprint.get("/agents/<id>/why", security=SECURITY)
@requires("reader")
def why(path: AgentPath) -> dict[str, Any]:
    """Why an agent runs what it runs."""
    hub = services()
    with hub.sessions.read() as session:
        return explain.agent_why(session, hub.clock(), path.id)


@blueprint.post("/agents/<id>/move", security=SECURITY)
@requires("operator")
def move(path: AgentPath, body: Move) -> Answer:
    """Put an agent into a cohort whatever its labels say; null lets them decide again."""
    return _ask(path, agents.move, cohort=body.cohort, reason=body.reason)


@blueprint.post("/agents/<id>/label", security=SECURITY)
@requires("operator")
def label(path: AgentPath, body: Labels) -> Answer:
    """Replace the operators' labels of an agent."""
    labels = Getter({"labels": body.labels}, "body").labels("labels")
    return _ask(path, agents.label, labels=labels, reason=body.reason)


@blueprint.post("/agents/<id>/retire", security=SECURITY)
@requires("operator")
def retire(path: AgentPath, body: Because) -> Answer:
    """Take an agent out of the fleet for good."""
    return _ask(path, agents.retire, reason=body.reason)


@blueprint.post("/agents/<id>/accept", security=SECURITY)
@requires("operator")
def accept(path: AgentPath, body: Because) -> Answer:
    """Let an agent in that waits for it."""
    return _ask(path, enrolment.accept, reason=body.reason)


@blueprint.post("/agents/<id>/reject", security=SECURITY)
@requires("operator")
def reject(path: AgentPath, body: Because) -> Answer:
    """Turn an agent away that waits to be accepted."""
    return _ask(path, enrolment.reject, reason=body.reason)
