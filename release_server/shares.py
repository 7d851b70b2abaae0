"""Shares: never more bytes a second into one failure domain than the budget of each cohort there allows.

Granted when an agent is about to download, asked for anew while it does, given back when it has done, and by
time when it is never heard again. What is granted at one time, by whatever cohort and product, keeps within
the smallest budget that any of it was granted under.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import delete, select

from agent_core.wire import LEAST_SHARE_BPS, MOST_BPS, BudgetTerms, ShareAnswer
from release_server import cohorts, membership
from release_server.models import DownloadShare
from release_server.why import Line

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session

    from agent_core.wire import ShareRequest
    from release_server.models import Agent

AGAIN_S = 60
LASTS = timedelta(minutes=5)
"""What an agent that dies keeps from others; one that lives asks anew half way through."""


class Given(NamedTuple):
    """What somebody else downloads with now, and the budget that it was granted under."""

    rate_bps: int
    budget_bps: int


def left(terms: BudgetTerms, others: Sequence[Given]) -> int:
    """Bytes a second that nobody has of what everybody's budget allows; below zero after one was lowered."""
    allowed = min([terms.bytes_per_s, *(other.budget_bps for other in others)])
    return allowed - sum(other.rate_bps for other in others)


def portion(terms: BudgetTerms, wants_bps: int, others: Sequence[Given]) -> int:
    """What one agent is given: no more than its part, what is left, and what it can use; 0 for not now.

    Args:
        wants_bps: its own ceiling, 0 for none.
        others: whoever downloads in its domain beside it.
    """
    room = min(left(terms, others), terms.part_bps)
    if room < LEAST_SHARE_BPS:
        return 0
    return min(room, wants_bps) if wants_bps else room


def ask(session: Session, now: datetime, agent: Agent, wanted: ShareRequest) -> ShareAnswer:
    """Grant a share, size the one there is anew, take it back, or say how little is left.

    In a write transaction, of which there is one at a time (decision 0019): nothing is given out twice.

    Args:
        agent: proven.
    """
    if wanted.done:
        give_back(session, agent.id)
        return ShareAnswer(0)
    terms = terms_of(session, agent)
    if terms is None:
        return ShareAnswer(MOST_BPS, int(LASTS.total_seconds()))
    domain = membership.labels_of(agent).get(terms.scope, "")
    others = _given(_others(session, now, agent, terms.scope, domain))
    rate_bps = portion(terms, wanted.wants_bps, others)
    if rate_bps == 0:
        # A share that is there stays until its time: its holder may not hear this, and go on until then.
        return ShareAnswer(0, detail=_line(terms, domain, others).text, again_s=AGAIN_S)
    share = DownloadShare(
        agent_id=agent.id,
        scope=terms.scope,
        domain=domain,
        rate_bps=rate_bps,
        budget_bps=terms.bytes_per_s,
        until=now + LASTS,
    )
    session.merge(share)
    session.flush()
    return ShareAnswer(rate_bps, int(LASTS.total_seconds()))


def terms_of(session: Session, agent: Agent) -> BudgetTerms | None:
    """The budget of an agent's cohort."""
    cohort = None if agent.cohort_id is None else cohorts.newest_spec(session, agent.cohort_id)
    return None if cohort is None or cohort.budget is None else BudgetTerms.from_json(cohort.budget)


def _others(
    session: Session, now: datetime, agent: Agent, scope: str, domain: str
) -> Sequence[DownloadShare]:
    query = select(DownloadShare).where(
        DownloadShare.scope == scope,
        DownloadShare.domain == domain,
        DownloadShare.agent_id != agent.id,
        DownloadShare.until > now,
    )
    return session.scalars(query.execution_options(populate_existing=True)).all()


def _given(shares: Sequence[DownloadShare]) -> list[Given]:
    return [Given(share.rate_bps, share.budget_bps) for share in shares]


def _line(terms: BudgetTerms, domain: str, others: Sequence[Given]) -> Line:
    return Line(
        domain=f"{terms.scope} {domain or 'without a name'}",
        budget_bps=min([terms.bytes_per_s, *(other.budget_bps for other in others)]),
        taken_bps=sum(other.rate_bps for other in others),
        downloads=len(others),
        full=left(terms, others) < LEAST_SHARE_BPS,
    )


def line(session: Session, now: datetime, agent: Agent, terms: BudgetTerms) -> Line:
    """How it stands with the budget of an agent's failure domain; changes nothing."""
    domain = membership.labels_of(agent).get(terms.scope, "")
    others = _others(session, now, agent, terms.scope, domain)
    mine = session.get(DownloadShare, agent.id)
    found = _line(terms, domain, _given(others))
    has_one = mine is not None and mine.until > now and (mine.scope, mine.domain) == (terms.scope, domain)
    return found._replace(
        mine_bps=mine.rate_bps if mine is not None and has_one else 0,
        until=min((row.until for row in others), default=None),
    )


def give_back(session: Session, agent_id: str) -> None:
    session.execute(delete(DownloadShare).where(DownloadShare.agent_id == agent_id))
