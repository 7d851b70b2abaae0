"""Shares: never more bytes a second into one failure domain than the budget of each cohort there allows.

Granted when an agent is about to download, asked for anew while it does, given back when it has done, and by
time when it is never heard again. What is granted at one time, by whatever cohort and product, keeps within
the smallest budget that any of it was granted under; and nothing is granted or renewed beyond the smallest
that somebody waits under, else those of a larger budget would relieve each other on the line for ever.
Nor does one of a larger budget keep its share meanwhile: it gives back, and asks anew as an equal.
"""

from __future__ import annotations

import random
from datetime import timedelta
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import case, delete, func, select

from agent_core.wire import LEAST_SHARE_BPS, MOST_BPS, BudgetTerms, ShareAnswer
from release_server import cohorts, membership
from release_server.models import DownloadShare
from release_server.why import Line

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

    from agent_core.wire import ShareRequest
    from release_server.models import Agent

LASTS = timedelta(minutes=5)
"""What an agent that dies keeps from others; one that lives asks anew half way through."""
AGAIN_S, MOST_AGAIN_S = 60, 1800
EACH_S = 20
"""Those who wait in one domain ask once in so long, all together: each time is a durable transaction."""


class Beside(NamedTuple):
    """What everybody else in a failure domain has and waits for.

    Attributes:
        least_bps: the smallest budget of those that download and those that wait, None without any.
        waits_bps: the smallest of those that wait.
        ends: when the first share ends, unless its holder asks anew.
    """

    taken_bps: int = 0
    least_bps: int | None = None
    downloads: int = 0
    waiting: int = 0
    ends: datetime | None = None
    waits_bps: int | None = None

    def allowed(self, terms: BudgetTerms) -> int:
        return terms.bytes_per_s if self.least_bps is None else min(terms.bytes_per_s, self.least_bps)

    def left(self, terms: BudgetTerms) -> int:
        """Bytes a second that nobody has of what all budgets allow; below zero after one was lowered."""
        return self.allowed(terms) - self.taken_bps


def portion(terms: BudgetTerms, wants_bps: int, beside: Beside, has_bps: int = 0) -> int:
    """What one agent is given: no more than its part, what is left, and what it can use; 0 for not now.

    Never less than it has, but by its own wish: it may not hear that, and go on as before. It stops instead,
    gives back, and asks anew. So it does where somebody with a smaller budget waits.

    Args:
        wants_bps: its own ceiling, 0 for none.
        has_bps: of the share that it holds, 0 without one.
    """
    if has_bps and beside.waits_bps is not None and beside.waits_bps < terms.bytes_per_s:
        return 0
    room = min(beside.left(terms), terms.part_bps)
    if room < max(LEAST_SHARE_BPS, min(has_bps, wants_bps or has_bps)):
        return 0
    return min(room, wants_bps) if wants_bps else room


def again_s(beside: Beside, now: datetime, chance: float) -> int:
    """After how long to ask once more: the longer, the more wait, and not before a share can end by itself.

    Args:
        chance: in [0, 1); those who were told at one time spread over a third to either side.
    """
    ends_s = 0.0 if beside.ends is None else (beside.ends - now).total_seconds()
    wanted_s = max(AGAIN_S, ends_s, EACH_S * (beside.waiting + 1))
    return round(min(MOST_AGAIN_S, wanted_s) * (2 + 2 * chance) / 3)


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
    beside = _beside(session, now, agent, terms.scope, domain)
    has_bps = _has_bps(session, now, agent)
    share = DownloadShare(
        agent_id=agent.id,
        scope=terms.scope,
        domain=domain,
        rate_bps=portion(terms, wanted.wants_bps, beside, has_bps),
        budget_bps=terms.bytes_per_s,
        until=now + LASTS,
    )
    if share.rate_bps == 0:
        return _later(session, now, share, has_bps, beside, _line(terms, domain, beside).text)
    session.merge(share)
    session.flush()
    return ShareAnswer(share.rate_bps, int(LASTS.total_seconds()))


def _later(
    session: Session, now: datetime, wait: DownloadShare, has_bps: int, beside: Beside, detail: str
) -> ShareAnswer:
    """Nothing now: who has nothing is kept as somebody who waits, until it should have asked again."""
    after_s = again_s(beside, now, random.random())  # noqa: S311 - jitter is no secret
    if has_bps:
        # A share that is there stays until its time: its holder may not hear this, and go on until then.
        had = f"{detail}; its own {has_bps / 1000:g} kB/s are not renewed"
        return ShareAnswer(0, detail=had, again_s=after_s)
    wait.until = now + timedelta(seconds=1.5 * after_s) + LASTS
    session.merge(wait)
    session.flush()
    return ShareAnswer(0, detail=detail, again_s=after_s)


def terms_of(session: Session, agent: Agent) -> BudgetTerms | None:
    """The budget of an agent's cohort."""
    cohort = None if agent.cohort_id is None else cohorts.newest_spec(session, agent.cohort_id)
    return None if cohort is None or cohort.budget is None else BudgetTerms.from_json(cohort.budget)


def _beside(session: Session, now: datetime, agent: Agent, scope: str, domain: str) -> Beside:
    """Summed where the rows are: however many download and wait, one row comes back."""
    downloads = DownloadShare.rate_bps > 0
    query = select(
        func.coalesce(func.sum(DownloadShare.rate_bps), 0),
        func.min(DownloadShare.budget_bps),
        func.count(case((downloads, 1))),
        func.count(case((~downloads, 1))),
        func.min(case((downloads, DownloadShare.until))),
        func.min(case((~downloads, DownloadShare.budget_bps))),
    ).where(
        DownloadShare.scope == scope,
        DownloadShare.domain == domain,
        DownloadShare.agent_id != agent.id,
        DownloadShare.until > now,
    )
    taken_bps, *rest = session.execute(query).one()
    return Beside(int(taken_bps), *rest)


def _has_bps(session: Session, now: datetime, agent: Agent) -> int:
    mine = session.get(DownloadShare, agent.id, populate_existing=True)
    return mine.rate_bps if mine is not None and mine.until > now else 0


def _line(terms: BudgetTerms, domain: str, beside: Beside) -> Line:
    return Line(
        domain=f"{terms.scope} {domain or 'without a name'}",
        budget_bps=beside.allowed(terms),
        taken_bps=beside.taken_bps,
        downloads=beside.downloads,
        full=beside.left(terms) < LEAST_SHARE_BPS,
        by_another=beside.allowed(terms) < terms.bytes_per_s,
    )


def line(session: Session, now: datetime, agent: Agent, terms: BudgetTerms) -> Line:
    """How it stands with the budget of an agent's failure domain; changes nothing."""
    domain = membership.labels_of(agent).get(terms.scope, "")
    beside = _beside(session, now, agent, terms.scope, domain)
    mine = session.get(DownloadShare, agent.id)
    found = _line(terms, domain, beside)
    has_one = mine is not None and mine.until > now and (mine.scope, mine.domain) == (terms.scope, domain)
    return found._replace(mine_bps=mine.rate_bps if mine is not None and has_one else 0, until=beside.ends)


def give_back(session: Session, agent_id: str) -> None:
    session.execute(delete(DownloadShare).where(DownloadShare.agent_id == agent_id))
