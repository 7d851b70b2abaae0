"""Which cohort an agent belongs to: exactly one of its product, or none.

In this order: where an operator has moved it by hand; else of the cohorts whose query it matches the one of
highest priority, then the one of most terms, then the first by name. One agent is placed when what it
reports changes. When a cohort changes the first agents are placed at once and the rest in batches by the jobs
process, so that no request and no poll costs more in a larger fleet.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sqlalchemy import func, select, update

from release_server.models import Agent, Cohort, CohortSpec, Resettling
from release_server.queries import Query, parse

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime
    from typing import Any

    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session

BATCH = 1000
"""How many agents one transaction places."""
TOGETHER = "relfleet_resettle"
OWN = ("id", "version", "platform")
"""Facts that no label takes the place of."""


@dataclass(frozen=True)
class Candidate:
    """A cohort as far as choosing needs it."""

    cohort_id: int
    name: str
    priority: int
    match: Query


def choose(candidates: Iterable[Candidate], facts: Mapping[str, str]) -> int | None:
    """The one cohort for these facts: highest priority, then most terms, then first by name.

    Returns:
        Its id, or None when none matches.
    """
    fitting = [candidate for candidate in candidates if candidate.match.matches(facts)]
    best = min(fitting, key=lambda fit: (-fit.priority, -len(fit.match.terms), fit.name), default=None)
    return best.cohort_id if best else None


# --- facts -----------------------------------------------------------------------------------------------


class Member(NamedTuple):
    """An agent as far as placing it needs it."""

    id: str
    version: str
    platform: str
    inventory: dict[str, Any]
    labels: dict[str, Any]
    operator_labels: dict[str, Any]
    cohort_id: int | None
    held: bool
    seen_at: datetime

    @property
    def facts(self) -> dict[str, str]:
        return facts_of(self)


COLUMNS = tuple(getattr(Agent, name) for name in Member._fields)


def labels_of(agent: Agent) -> dict[str, str]:
    """An agent's labels; an operator's word goes before the host's."""
    return {**agent.labels, **agent.operator_labels}


def facts_of(agent: Agent | Member) -> dict[str, str]:
    """What a query can ask of an agent: what it is, what its host says, and over both what operators say."""
    own = {name: getattr(agent, name) for name in OWN if getattr(agent, name)}
    return {**agent.inventory, **agent.labels, **agent.operator_labels, **own}


def origins_of(agent: Agent) -> dict[str, dict[str, str]]:
    """The facts of an agent, each with who says so: `agent`, `inventory`, `host` or `operator`."""
    origins: dict[str, str] = {}
    for origin, names in (
        ("inventory", agent.inventory),
        ("host", agent.labels),
        ("operator", agent.operator_labels),
        ("agent", [name for name in OWN if getattr(agent, name)]),
    ):
        origins |= dict.fromkeys(names, origin)
    return {
        name: {"value": value, "origin": origins[name]} for name, value in sorted(facts_of(agent).items())
    }


# --- placing ---------------------------------------------------------------------------------------------


def is_newest() -> ColumnElement[bool]:
    """The condition that a joined `CohortSpec` is its cohort's newest revision."""
    newer = select(func.max(CohortSpec.revision).label("revision")).where(CohortSpec.cohort_id == Cohort.id)
    return CohortSpec.revision == newer.correlate(Cohort).scalar_subquery()


def candidates(session: Session, product_id: int) -> list[Candidate]:
    """The cohorts of a product, ready for `choose`."""
    rows = session.execute(
        select(Cohort.id, Cohort.name, CohortSpec.priority, CohortSpec.match)
        .join(CohortSpec, CohortSpec.cohort_id == Cohort.id)
        .where(Cohort.product_id == product_id, Cohort.deleted_at.is_(None), is_newest())
    )
    return [Candidate(cohort_id, name, priority, parse(match)) for cohort_id, name, priority, match in rows]


def place(session: Session, agent: Agent) -> None:
    """Put one agent where its facts say, unless an operator has moved it by hand or not let it in yet."""
    if not agent.cohort_fixed and not agent.pending:
        agent.cohort_id = choose(candidates(session, agent.product_id), facts_of(agent))


def resettle(session: Session, product_id: int) -> int:
    """Begin to put all agents of a product where their facts say; called when cohorts change.

    Returns:
        How many of the first batch moved; the jobs process goes on with `resettle_some`.
    """
    if TOGETHER in session.info:
        session.info[TOGETHER].add(product_id)
        return 0
    row = session.get(Resettling, product_id, with_for_update=True)
    if row is None:
        row = Resettling(product_id=product_id)
        session.add(row)
    row.cursor = ""
    session.flush()
    return _step(session, row)


@contextmanager
def resettling_once(session: Session) -> Iterator[None]:
    """Place agents once, at the end of the block, however many cohorts change in it: all writers wait."""
    waiting: set[int] = set()
    session.info[TOGETHER] = waiting
    try:
        yield
    finally:
        del session.info[TOGETHER]
    for product_id in sorted(waiting):
        resettle(session, product_id)


def is_resettling(session: Session) -> bool:
    """Whether agents wait to be placed."""
    return session.execute(select(Resettling.product_id).limit(1)).first() is not None


def resettle_some(session: Session) -> int:
    """Place the next batch of each product that has agents to place.

    Returns:
        How many products have more.
    """
    rows = session.scalars(select(Resettling).with_for_update()).all()
    for row in rows:
        _step(session, row)
    return session.scalar(select(func.count()).select_from(Resettling)) or 0


def _step(session: Session, row: Resettling) -> int:
    """One batch; the rows are locked, so that no report that is taken in meanwhile is undone."""
    offered = candidates(session, row.product_id)
    batch = movable(row.product_id).where(Agent.id > row.cursor).order_by(Agent.id).limit(BATCH)
    members = [Member(*found) for found in session.execute(batch.with_for_update())]
    moves: dict[int | None, list[str]] = {}
    for member in members:
        chosen = choose(offered, member.facts)
        if chosen != member.cohort_id:
            moves.setdefault(chosen, []).append(member.id)
    for chosen, agent_ids in moves.items():
        session.execute(update(Agent).where(Agent.id.in_(agent_ids)).values(cohort_id=chosen))
    if len(members) < BATCH:
        session.delete(row)
    else:
        row.cursor = members[-1].id
    session.flush()
    return sum(map(len, moves.values()))


def movable(product_id: int) -> Any:
    """The agents of a product whose facts decide where they belong, as rows of `Member`."""
    return select(*COLUMNS).where(
        Agent.product_id == product_id,
        Agent.cohort_fixed.is_(False),
        Agent.pending.is_(False),
        Agent.retired_at.is_(None),
    )


def fixed(cohort_id: int) -> Any:
    """The agents that were moved into a cohort by hand, as rows of `Member`."""
    return select(*COLUMNS).where(
        Agent.cohort_id == cohort_id, Agent.cohort_fixed.is_(True), Agent.retired_at.is_(None)
    )


def in_pages(session: Session, query: Any) -> Iterable[Sequence[Member]]:
    """Members by id, a page at a time, so that a large fleet is never held in memory at once."""
    after = ""
    while True:
        page = [
            Member(*row)
            for row in session.execute(query.where(Agent.id > after).order_by(Agent.id).limit(BATCH))
        ]
        if page:
            yield page
        if len(page) < BATCH:
            return
        after = page[-1].id
