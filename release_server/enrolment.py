"""How a host becomes an agent: tokens, the operator's word where a token wants it, and the host's own key."""

from __future__ import annotations

from hashlib import sha256
from typing import TYPE_CHECKING

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import select

from agent_core.errors import ConflictError, NotAllowedError
from agent_core.wire import EnrollAnswer, EnrollRequest, KeyChange, Reason, key_text
from release_server import agents, audit, auth, cohorts, membership, releases, reports
from release_server.models import Agent, Token
from release_server.webhooks import events, outbox

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session


def enroll(session: Session, now: datetime, token: str, request: EnrollRequest) -> EnrollAnswer:
    """Take a host into the fleet; the same public key again gets the same answer and costs no further use.

    A name is no identity: whoever asks for a taken one with another key becomes another agent.

    Args:
        token: text of an enroller token; one of its uses is taken in this transaction.

    Raises:
        NotAllowedError: the token is unknown, revoked, expired, used up, or not for this product; or the
            agent of this key has been retired.
        NotFoundError: no such product, or the token's cohort is gone.
        ConflictError: the key belongs to an agent of another product.
    """
    known = session.scalar(select(Agent).where(Agent.public_key == request.public_key))
    try:
        person = auth.check_token(session, token, now)
    except NotAllowedError as error:
        # The answer to a one-time enrolment may have been lost: asking again must not strand a host.
        if error.reason == "token-used-up" and known is not None:
            return _same_again(session, known, request)
        raise
    _check_scope(person, request)
    if known is not None:
        return _same_again(session, known, request)
    product = releases.find_product(session, request.product)
    auth.use_up(session, person, now)
    terms = session.get_one(Token, person.token_id)
    agent = Agent(
        id=_free_name(session, request),
        product=product,
        public_key=request.public_key,
        platform=request.platform,
        gate=request.gate,
        labels=dict(request.labels),
        operator_labels=dict(terms.labels),
        figures={},
        enrolled_at=now,
        seen_at=now,
        pending=terms.approve,
        token_id=terms.id,
    )
    session.add(agent)
    session.flush()
    _settle(session, agent, terms)
    said = {"pending": True} if agent.pending else {}
    audit.record(session, now, person.name, "agent.enroll", agent.id, product=product.name, **said)
    if agent.pending:
        waits = {"agent": agent.id, "platform": agent.platform, "actor": person.name}
        outbox.tell(session, now, events.AGENT_WAITING, product.name, **waits)
    return _answer(session, agent)


def _check_scope(person: auth.Person, request: EnrollRequest) -> None:
    if not person.may("enroller"):
        raise NotAllowedError(
            f"{person.name} may not enrol agents", why=f"the token has the role {person.role}", reason="scope"
        )
    if person.product not in (None, request.product):
        raise NotAllowedError(
            f"the token does not enrol agents of {request.product}",
            why=f"it is for {person.product}",
            reason="scope",
        )


def _same_again(session: Session, agent: Agent, request: EnrollRequest) -> EnrollAnswer:
    agents.refuse_retired(agent)
    if agent.product.name != request.product:
        raise ConflictError(
            f"this key is enrolled as {agent.id} of {agent.product.name}", then="make a key for each product"
        )
    return _answer(session, agent)


def _answer(session: Session, agent: Agent) -> EnrollAnswer:
    return EnrollAnswer(agent.id, agents.cohort_name(session, agent), pending=agent.pending)


def _free_name(session: Session, request: EnrollRequest) -> str:
    """The asked name when it is free, else with a piece of the key's digest behind it."""
    digest = sha256(request.public_key.encode()).hexdigest()
    names = [request.name, *(f"{request.name[:100]}-{digest[:size]}" for size in (4, 8, 16))]
    taken = set(session.scalars(select(Agent.id).where(Agent.id.in_(names))))
    return next((name for name in names if name not in taken), f"{request.name[:60]}-{digest}")


def _settle(session: Session, agent: Agent, terms: Token | None) -> None:
    """Give an agent its cohort: the one its token names, else by its labels; none while it is pending."""
    if terms is not None and terms.cohort is not None and not agent.pending:
        agent.cohort_id = cohorts.find(session, agent.product.name, terms.cohort).id
        agent.cohort_fixed = True
    membership.place(session, agent)
    session.flush()
    session.refresh(agent, ["cohort"])


def rotate_key(
    session: Session, now: datetime, proof: reports.Signed | reports.Bearer, change: KeyChange
) -> dict[str, str]:
    """Give an agent another key, named by the one it has; its counter goes on, its session ends.

    The same change again is taken too, signed by the new key: the answer to the first may have been lost.

    Raises:
        NotAllowedError: the sender is not proven, is retired, or does not have the new key.
        ConflictError: the key is another agent's.
    """
    if not isinstance(proof, reports.Signed):
        raise NotAllowedError("a key is changed by a signed request", reason="unsigned")
    agent = reports.prove(session, now, proof)
    agents.refuse_retired(agent)
    _check_possession(agent, change)
    answer = {"public_key": change.public_key}
    if agent.public_key == change.public_key:
        return answer
    if session.scalar(select(Agent.id).where(Agent.public_key == change.public_key)) is not None:
        raise ConflictError("the new key is another agent's", then="remove state/agent.key.next, try again")
    agent.public_key = change.public_key
    agent.session_hash = None
    session.flush()
    audit.record(session, now, f"agent:{agent.id}", "agent.rotate-key", agent.id, key=change.public_key[:16])
    return answer


def _check_possession(agent: Agent, change: KeyChange) -> None:
    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(change.public_key))
        key.verify(bytes.fromhex(change.proof), key_text(agent.id, change.public_key))
    except (InvalidSignature, ValueError):
        why = "the new key has not signed for this agent"
        raise NotAllowedError("the new key is refused", why=why, reason="key-proof") from None


# --- what operators say ----------------------------------------------------------------------------------


def accept(session: Session, now: datetime, actor: str, agent_id: str, *, reason: str = "") -> None:
    """Let a pending agent in; it learns of it with its next report. One that is in already stays as it is.

    Raises:
        NotFoundError: there is no such agent, or the cohort that its token names is gone.
        ConflictError: it is retired, or was rejected.
    """
    agent = agents.active(session, agent_id)
    if agent.pending:
        agent.pending = False
        _settle(session, agent, session.get(Token, agent.token_id) if agent.token_id else None)
        audit.record(session, now, actor, "agent.accept", agent.id, reason=reason)


def reject(session: Session, now: datetime, actor: str, agent_id: str, *, reason: str = "") -> None:
    """Turn a pending agent away for good: its key is refused from now on.

    Raises:
        NotFoundError: there is no such agent.
        ConflictError: it was accepted already.
    """
    agent = agents.find(session, agent_id)
    if not agent.pending:
        raise ConflictError(
            f"agent {agent.id} does not wait to be accepted", then=f"release agents retire {agent.id}"
        )
    agents.retire(session, now, actor, agent_id, reason=reason or str(Reason.PENDING))
