"""Leases: never more agents of one failure domain between two versions than its cohort allows.

Granted when an agent asks, renewed by its reports while it is at work, given back when its attempt ends, and
by time when it is never heard again.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import delete, func, select

from agent_core.wire import PROGRESS_FULL, AttemptState, LeaseAnswer, LeaseRequest, LeaseTerms, Phase
from release_server import cohorts, membership
from release_server.models import ActivationLease, Agent
from release_server.why import Room

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from sqlalchemy.orm import Session

    from agent_core.wire import Report

AGAIN_S = 30
HEAD_START = timedelta(minutes=5)
"""What an agent may take between its lease and its first report at work, beside three of its reports."""
OVER = frozenset({AttemptState.HEALTHY, AttemptState.ROLLED_BACK, AttemptState.FAILED, AttemptState.SKIPPED})


def most(terms: LeaseTerms, members: int) -> int:
    """How many of a domain's `members` agents may hold a lease at once; one at least."""
    limits = [terms.limit] if terms.limit is not None else []
    if terms.share_bp is not None:
        limits.append(max(1, terms.share_bp * members // PROGRESS_FULL))
    return min(limits)


def ask(session: Session, now: datetime, agent: Agent, wanted: LeaseRequest, lasts: timedelta) -> LeaseAnswer:
    """Grant a lease, renew the one there is, or say how many others have theirs.

    In a write transaction, of which there is one at a time (decision 0019): two that counted at once would
    both find room for the last one.

    Args:
        agent: proven.
        lasts: how long this agent may be quiet.
    """
    cohort = None if agent.cohort_id is None else cohorts.newest_spec(session, agent.cohort_id)
    if cohort is None or cohort.lease is None:
        return LeaseAnswer(granted=True)
    terms = LeaseTerms.from_json(cohort.lease)
    session.execute(delete(ActivationLease).where(ActivationLease.until <= now))
    held = session.get(ActivationLease, agent.id, populate_existing=True)
    domain = membership.labels_of(agent).get(terms.scope, "")
    if held is not None and (held.scope, held.domain) == (terms.scope, domain):
        held.until, held.version = now + lasts + HEAD_START, wanted.version
        return LeaseAnswer(granted=True)
    give_back(session, agent.id)
    taken, allowed = _taken(session, agent, terms.scope, domain), most(terms, _members(session, agent, terms))
    if taken >= allowed:
        where = f"{terms.scope} {domain or 'without a name'}"
        return LeaseAnswer(False, f"{taken} of {where} are at it, {allowed} may be", AGAIN_S)
    session.add(
        ActivationLease(
            agent_id=agent.id,
            product_id=agent.product_id,
            scope=terms.scope,
            domain=domain,
            version=wanted.version,
            granted_at=now,
            until=now + lasts + HEAD_START,
        )
    )
    session.flush()
    return LeaseAnswer(granted=True)


def _taken(session: Session, agent: Agent, scope: str, domain: str) -> int:
    here = (
        ActivationLease.product_id == agent.product_id,
        ActivationLease.scope == scope,
        ActivationLease.domain == domain,
    )
    return session.scalar(select(func.count()).select_from(ActivationLease).where(*here)) or 0


def _members(session: Session, agent: Agent, terms: LeaseTerms) -> int:
    """How many agents stand in the domain of this one; counted only where a share is asked for."""
    if terms.share_bp is None:
        return 0
    own, said = Agent.operator_labels[terms.scope].as_string(), Agent.labels[terms.scope].as_string()
    domain = membership.labels_of(agent).get(terms.scope, "")
    living = (Agent.product_id == agent.product_id, Agent.retired_at.is_(None))
    here = func.coalesce(own, said, "") == domain
    return session.scalar(select(func.count(Agent.id)).where(*living, here)) or 0


def room(session: Session, now: datetime, agent: Agent, terms: LeaseTerms) -> Room:
    """How it stands in the failure domain of an agent; changes nothing."""
    domain = membership.labels_of(agent).get(terms.scope, "")
    query = select(ActivationLease).where(
        ActivationLease.product_id == agent.product_id,
        ActivationLease.scope == terms.scope,
        ActivationLease.domain == domain,
        ActivationLease.until > now,
    )
    held = session.scalars(query).all()
    return Room(
        domain=f"{terms.scope} {domain or 'without a name'}",
        taken=len(held),
        most=most(terms, _members(session, agent, terms)),
        mine=agent.id in {lease.agent_id for lease in held},
        until=min((lease.until for lease in held), default=None),
    )


def follow(
    session: Session, now: datetime, agent_id: str, report: Report, lasts: Callable[[], timedelta]
) -> None:
    """Give a lease back with the end of its attempt, and renew it while the agent is at work.

    Args:
        lasts: how long this agent may be quiet; only asked where there is a lease.
    """
    held = session.get(ActivationLease, agent_id)
    if held is None:
        return
    ended = any(transition.state in OVER for transition in report.transitions)
    if ended or (report.phase is Phase.IDLE and now >= held.granted_at + HEAD_START):
        session.delete(held)
    elif report.phase is not Phase.IDLE:
        held.until = now + lasts() + HEAD_START


def give_back(session: Session, agent_id: str) -> None:
    session.execute(delete(ActivationLease).where(ActivationLease.agent_id == agent_id))
