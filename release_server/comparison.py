"""Two releases, or two cohorts, side by side: how agents fared with each, and what their figures say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum
from statistics import median
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from agent_core.errors import NotFoundError, UsageError
from agent_core.wire import AttemptState
from release_server import attempts, cohorts, releases
from release_server.figures import LIMITS
from release_server.members import FAILED
from release_server.models import Agent, Attempt, Rollout, RolloutCounter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session

    from release_server.models import Product

LOOKED_AT = 1_000
"""The figures of at most so many agents, those that were heard of last."""
REASONS = 5
ENDED = (*FAILED, AttemptState.HEALTHY)


class By(StrEnum):
    """What is compared."""

    RELEASE = "release"
    COHORT = "cohort"


@dataclass(frozen=True)
class Figure:
    """One health figure over the agents that report it."""

    agents: int
    median: float
    most: float


@dataclass(frozen=True)
class Side:
    """One of the two.

    Attributes:
        agents: how many run the release, or are in the cohort.
        versions: what they run, and how many of them.
        attempts: how the attempts of its rollouts stand.
        failed_share: of those that ended; None where none has. Who was healthy and was sent back (undo)
            did not fail.
        reasons: why attempts failed, the most frequent first.
        figures: by name; of agents that are idle or not, as they last reported.
    """

    name: str
    agents: int
    versions: Mapping[str, int]
    attempts: Mapping[str, int]
    failed_share: float | None
    reasons: Mapping[str, int]
    figures: Mapping[str, Figure]


def compare(session: Session, product: str, names: tuple[str, str], by: By | None = None) -> dict[str, Any]:
    """Hold two releases or two cohorts against each other: `{by, product, sides, worse}`.

    Args:
        by: what the names mean; None: releases where both are, else cohorts.

    Returns:
        `worse` names the figures whose median is worse at the second, by the limits of the gates.

    Raises:
        NotFoundError: a name is neither.
        UsageError: both are the same.
    """
    if names[0] == names[1]:
        raise UsageError(f"{names[0]} is compared with itself", then="name two")
    owner = releases.find_product(session, product)
    kind = by or _kind(session, owner, names)
    sides = [_side(session, owner, kind, name) for name in names]
    return {
        "by": str(kind),
        "product": product,
        "sides": [asdict(side) for side in sides],
        "worse": worse(sides[0].figures, sides[1].figures),
    }


def worse(first: Mapping[str, Figure], second: Mapping[str, Figure]) -> list[str]:
    """The figures whose median is worse at the second, by the limits of the gates. Pure."""
    both = [limit for limit in LIMITS if limit.figure in first and limit.figure in second]
    return [
        limit.figure
        for limit in both
        if limit.is_worse(first[limit.figure].median, second[limit.figure].median)
    ]


def _kind(session: Session, product: Product, names: Sequence[str]) -> By:
    found = [releases.find_release(session, product, name) for name in names]
    return By.RELEASE if all(found) else By.COHORT


def _side(session: Session, product: Product, kind: By, name: str) -> Side:
    """One side: its agents, and the attempts of its rollouts."""
    if kind is By.RELEASE:
        release = releases.get_release(session, product.name, name)
        here: ColumnElement[bool] = Agent.version == name
        of: ColumnElement[bool] = Rollout.release_id == release.id
    else:
        cohort = _cohort(session, product, name)
        here, of = Agent.cohort_id == cohort, Rollout.cohort_id == cohort
    present = (Agent.product_id == product.id, Agent.retired_at.is_(None), here)
    versions = select(Agent.version, func.count()).where(*present).group_by(Agent.version)
    counted = _attempts(session, of)
    ended = sum(counted.get(str(state), 0) for state in ENDED)
    failed = sum(counted.get(str(state), 0) for state in FAILED) - attempts.sent_back(session, of)
    running = {version: int(count) for version, count in session.execute(versions)}
    return Side(
        name=name,
        agents=sum(running.values()),
        versions=dict(sorted(running.items())),
        attempts=counted,
        failed_share=round(failed / ended, 4) if ended else None,
        reasons=_reasons(session, of),
        figures=_figures(session, present),
    )


def _cohort(session: Session, product: Product, name: str) -> int:
    try:
        return cohorts.find(session, product.name, name).id
    except NotFoundError:
        raise NotFoundError(
            f"{product.name} has no cohort {name}, and no release of that name to compare",
            then=f"release list --product {product.name}; release cohort list",
        ) from None


def _attempts(session: Session, of: ColumnElement[bool]) -> dict[str, int]:
    query = (
        select(RolloutCounter.state, func.sum(RolloutCounter.count))
        .join(Rollout, Rollout.id == RolloutCounter.rollout_id)
        .where(of)
        .group_by(RolloutCounter.state)
    )
    found = {state: int(count) for state, count in session.execute(query)}
    return {str(state): found[state] for state in AttemptState if found.get(state)}


def _reasons(session: Session, of: ColumnElement[bool]) -> dict[str, int]:
    query = (
        select(Attempt.reason, func.count())
        .join(Rollout, Rollout.id == Attempt.rollout_id)
        .where(of, Attempt.state.in_([str(state) for state in FAILED]), ~attempts.IS_SENT_BACK)
        .group_by(Attempt.reason)
        .order_by(func.count().desc(), Attempt.reason)
        .limit(REASONS)
    )
    return {reason: int(count) for reason, count in session.execute(query)}


def _figures(session: Session, present: Sequence[ColumnElement[bool]]) -> dict[str, Figure]:
    query = select(Agent.figures).where(*present).order_by(Agent.seen_at.desc(), Agent.id).limit(LOOKED_AT)
    seen: dict[str, list[float]] = {}
    for figures in session.scalars(query):
        for name, value in figures.items():
            seen.setdefault(name, []).append(float(value))
    return {name: Figure(len(values), median(values), max(values)) for name, values in sorted(seen.items())}
