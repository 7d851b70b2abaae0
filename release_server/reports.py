"""What agents say: reports that prove who sent them, with transitions, and requests for leases and shares."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select, update

from agent_core.errors import NotAllowedError
from agent_core.wire import AttemptState, Reason, Report, ReportAnswer, Transition, signed_text
from release_server import agents, attempts, bearer, cohorts, leases, membership, shares
from release_server.models import Agent, AgentEvent, Cohort, Rollout, RolloutStatus
from release_server.rollout import State

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

    from agent_core.wire import LeaseRequest, ShareRequest

SESSION = timedelta(hours=1)
RENEW = timedelta(minutes=15)
"""A session this near its end is followed by a new one, so that agents rarely meet an ended one."""
COALESCE = timedelta(seconds=5)
"""Heartbeats that say nothing new are written down at most so often."""
PLACING = frozenset({"labels", "inventory", "version", "platform"})
"""What cohorts can ask of an agent: when it changes, the agent may belong elsewhere."""
UNPROVEN = frozenset(
    {"unknown-agent", str(Reason.BAD_SIGNATURE), str(Reason.REPLAYED), "session-over", "not-signed-in"}
)
"""Reasons that say who sent a report is not proven: the API answers 401."""


@dataclass(frozen=True)
class Signed:
    """Proof by the agent's key, over the request as it arrived; `signature` is hexadecimal."""

    agent_id: str
    method: str
    path: str
    body_sha256: str
    counter: int
    signature: str


@dataclass(frozen=True)
class Bearer:
    """Proof by a session token; good for heartbeats only."""

    agent_id: str
    token: str


def take_report(session: Session, now: datetime, proof: Signed | Bearer, report: Report) -> ReportAnswer:
    """Take in how an agent is; its transitions are durable when this transaction is.

    Raises:
        NotAllowedError: reasons in `UNPROVEN` when the sender is not proven; `not-yourself`, `retired` or
            `unsigned` when it is, but may not say this.
    """
    agent = prove(session, now, proof)
    _check_subject(agent, proof, report)
    for transition in sorted(report.transitions, key=lambda entry: entry.number):
        if transition.number > agent.accepted:
            _take_transition(session, now, agent, transition)
            agent.accepted = transition.number
    _note(session, now, agent, report)
    leases.follow(session, now, agent.id, report, lambda: _quiet_for(session, agent))
    token = _renew(agent, now, report) if isinstance(proof, Signed) else None
    session.flush()
    return ReportAnswer(
        cohort=agents.cohort_name(session, agent),
        pending=agent.pending,
        accepted=agent.accepted,
        session=token,
        session_s=int(SESSION.total_seconds()) if token else 0,
    )


def take_lease_request(
    session: Session, now: datetime, proof: Signed | Bearer, wanted: LeaseRequest
) -> dict[str, Any]:
    """Answer an agent that asks whether it may activate a version now; errors as of `take_report`."""
    agent = prove(session, now, proof)
    agents.refuse_retired(agent)
    return leases.ask(session, now, agent, wanted, _quiet_for(session, agent)).to_json()


def take_share_request(
    session: Session, now: datetime, proof: Signed | Bearer, wanted: ShareRequest
) -> dict[str, Any]:
    """Answer an agent that asks how fast it may download now; errors as of `take_report`."""
    agent = prove(session, now, proof)
    agents.refuse_retired(agent)
    return shares.ask(session, now, agent, wanted).to_json()


def _quiet_for(session: Session, agent: Agent) -> timedelta:
    """How long this agent may be quiet by the pace of its cohort."""
    if agent.cohort_id is None:
        return agents.USUAL
    pace = cohorts.newest_spec(session, agent.cohort_id)
    return agents.silent_after(pace.poll_s, pace.report_s)


def prove(session: Session, now: datetime, proof: Signed | Bearer) -> Agent:
    """The agent that sent a request.

    Raises:
        NotAllowedError: reasons in `UNPROVEN`.
    """
    agent = session.get(Agent, proof.agent_id, populate_existing=True)
    if agent is None:
        raise NotAllowedError("no agent of this name is enrolled", reason="unknown-agent")
    if isinstance(proof, Bearer):
        _check_session(agent, proof.token, now)
    else:
        _check_signature(agent, proof)
        _raise_counter(session, agent, proof.counter)
    return agent


def _check_session(agent: Agent, token: str, now: datetime) -> None:
    digest = bearer.hash_of(token)
    known = agent.session_hash or ""
    if not hmac.compare_digest(known, digest) or agent.session_until is None or agent.session_until <= now:
        raise NotAllowedError("the session is over", then="send a signed report", reason="session-over")


def _check_signature(agent: Agent, proof: Signed) -> None:
    text = signed_text(proof.method, proof.path, proof.body_sha256, proof.counter)
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(agent.public_key))
        key.verify(bytes.fromhex(proof.signature), text)
    except (InvalidSignature, ValueError):
        raise NotAllowedError("the signature is not this agent's", reason=str(Reason.BAD_SIGNATURE)) from None


def _raise_counter(session: Session, agent: Agent, counter: int) -> None:
    """The counter only grows, in the database itself, so of two equal requests one is taken."""
    raised = session.execute(
        update(Agent)
        .where(Agent.id == agent.id, Agent.counter < counter)
        .values(counter=counter)
        .returning(Agent.id)
        .execution_options(synchronize_session=False)
    ).first()
    if raised is None:
        raise NotAllowedError(
            "this report was sent before",
            why=f"its counter {counter} is not above the last one",
            reason=str(Reason.REPLAYED),
        )
    session.refresh(agent)  # another report of this agent may have been taken in while this one waited


def _check_subject(agent: Agent, proof: Signed | Bearer, report: Report) -> None:
    agents.refuse_retired(agent)
    if report.agent_id != agent.id or report.product != agent.product.name:
        raise NotAllowedError(
            f"{agent.id} speaks for itself only",
            why=f"the report is of {report.agent_id} of {report.product}",
            reason="not-yourself",
        )
    if report.transitions and isinstance(proof, Bearer):
        raise NotAllowedError("transitions are reported signed", reason="unsigned")


def _note(session: Session, now: datetime, agent: Agent, report: Report) -> None:
    """Write down how the agent is. A heartbeat that says nothing new costs at most one small UPDATE."""
    said = {
        "version": report.version[:64],
        "digest": report.digest[:64],
        "phase": str(report.phase),
        "platform": report.platform,
        "reason": report.reason[:64],
        "detail": report.detail,
        "held": report.held,
        "labels": dict(report.labels),
        "inventory": dict(report.inventory),
    }
    news = {name: value for name, value in said.items() if getattr(agent, name) != value}
    for name, value in news.items():
        setattr(agent, name, value)
    if PLACING & news.keys():
        membership.place(session, agent)
    # Below zero the server's clock was set back: what it wrote ahead of time would hide a silence until then.
    if news or not timedelta(0) <= now - agent.seen_at < COALESCE:
        agent.seen_at = now
        agent.figures = dict(report.figures)


def _renew(agent: Agent, now: datetime, report: Report) -> str | None:
    """A new session when the old one is nearly over, or lost: only an agent without one signs a heartbeat."""
    holds = agent.session_until is not None and agent.session_until - now > RENEW
    if holds and report.transitions:
        return None
    token = bearer.make()
    agent.session_hash = bearer.hash_of(token)
    agent.session_until = now + SESSION
    return token


# --- transitions ----------------------------------------------------------------------------------------


def _take_transition(session: Session, now: datetime, agent: Agent, transition: Transition) -> None:
    session.add(
        AgentEvent(
            agent_id=agent.id,
            number=transition.number,
            at=transition.at[:32],
            received_at=now,
            version=transition.version,
            state=str(transition.state),
            reason=transition.reason[:64],
            detail=transition.detail,
        )
    )
    rollout = _rollout_of(session, agent, transition.salt)
    if rollout is None:
        return
    if transition.version == rollout.version:
        said = {"reason": transition.reason, "detail": transition.detail}
        attempts.move(session, now, agent.id, rollout, transition.state, **said)
    elif transition.state is AttemptState.HEALTHY and _is_going_back(session, rollout):
        # Its salt names the rollout that sent it back, its version the one it went back to.
        attempts.move(session, now, agent.id, rollout, AttemptState.ROLLED_BACK, reason=str(Reason.GO_BACK))


def _rollout_of(session: Session, agent: Agent, salt: str) -> Rollout | None:
    """The rollout a salt names, if it is one of the agent's product, and its attempts are still there."""
    if not salt:
        return None
    owned = select(Rollout).join(Cohort, Cohort.id == Rollout.cohort_id).where(Rollout.pruned_at.is_(None))
    return session.scalar(owned.where(Rollout.salt == salt, Cohort.product_id == agent.product_id))


def _is_going_back(session: Session, rollout: Rollout) -> bool:
    state = session.scalar(select(RolloutStatus.state).where(RolloutStatus.rollout_id == rollout.id))
    return state in (State.ROLLING_BACK, State.ROLLED_BACK)
