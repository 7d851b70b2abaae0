"""Each agent's way through each rollout, and how many are where: counted along the way, never per poll."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import func, select, update

from agent_core.wire import AttemptState
from release_server.database import stir
from release_server.members import ENDED
from release_server.models import Agent, Attempt, Rollout, RolloutCounter

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

_AFTER_HEALTHY = frozenset({AttemptState.ROLLED_BACK, AttemptState.FAILED, AttemptState.SILENT})


def may_follow(state: AttemptState, after: AttemptState) -> bool:
    """Whether an attempt may go from `after` to `state`.

    Agents number their transitions, so what arrives is in order, and a retry begins again from any end but
    one: an agent that is healthy has nothing left to download, it can only fall.
    """
    return after is not AttemptState.HEALTHY or state in _AFTER_HEALTHY


def move(
    session: Session,
    now: datetime,
    agent_id: str,
    rollout: Rollout,
    state: AttemptState,
    *,
    reason: str = "",
    detail: str = "",
) -> bool:
    """Bring an agent's attempt to `state`, made when it is first heard of; its counters move with it.

    Returns:
        Whether it moved; one that may not is left as it is.
    """
    attempt = session.scalar(
        select(Attempt).where(Attempt.agent_id == agent_id, Attempt.rollout_id == rollout.id)
    )
    if attempt is None:
        attempt = Attempt(
            agent_id=agent_id,
            rollout_id=rollout.id,
            release_id=rollout.release_id,
            state=str(state),
            before=_figures_before(session, agent_id, rollout),
            started_at=now,
            updated_at=now,
        )
        session.add(attempt)
        _count(session, rollout.id, state, 1)
    elif attempt.state != state:
        if not may_follow(state, AttemptState(attempt.state)):
            return False
        _count(session, rollout.id, AttemptState(attempt.state), -1)
        _count(session, rollout.id, state, 1)
        attempt.state = str(state)
    attempt.reason, attempt.detail, attempt.updated_at = reason[:64], detail, now
    session.flush()
    if state in ENDED:
        stir(session)  # its stage may be over
    return True


def _figures_before(session: Session, agent_id: str, rollout: Rollout) -> dict[str, float]:
    """What an agent last reported under the version before; nothing when it runs the release already."""
    agent = session.get(Agent, agent_id)
    return dict(agent.figures) if agent is not None and agent.version != rollout.version else {}


def _count(session: Session, rollout_id: int, state: AttemptState, change: int) -> None:
    session.execute(
        update(RolloutCounter)
        .where(RolloutCounter.rollout_id == rollout_id, RolloutCounter.state == str(state))
        .values(count=RolloutCounter.count + change)
        .execution_options(synchronize_session=False)
    )


def make_counters(session: Session, rollout_id: int) -> None:
    """The counters of a new rollout, all zero."""
    session.add_all(
        RolloutCounter(rollout_id=rollout_id, state=str(state), count=0) for state in AttemptState
    )
    session.flush()


def counters(session: Session, rollout_id: int) -> dict[AttemptState, int]:
    """How many attempts are in each state, as counted along the way."""
    query = select(RolloutCounter.state, RolloutCounter.count).where(RolloutCounter.rollout_id == rollout_id)
    kept = {state: count for state, count in session.execute(query)}  # noqa: C416 - rows are no pairs to mypy
    return {state: kept.get(str(state), 0) for state in AttemptState}


def recount(session: Session, rollout_id: int) -> dict[AttemptState, int]:
    """The same from the attempts themselves; it differs from `counters` only if this file is wrong."""
    query = (
        select(Attempt.state, func.count()).where(Attempt.rollout_id == rollout_id).group_by(Attempt.state)
    )
    found = {state: count for state, count in session.execute(query)}  # noqa: C416 - rows are no pairs to mypy
    return {state: found.get(str(state), 0) for state in AttemptState}
