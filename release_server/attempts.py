"""Each agent's way through each rollout, and how many are where: counted along the way, never per poll."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import and_, func, select, update

from agent_core.wire import AttemptState, Reason
from release_server.database import stir
from release_server.members import ENDED
from release_server.models import Agent, Attempt, Rollout, RolloutCounter

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy import ColumnElement
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


SENT_BACK = "sent-back"
"""The counter that stays when attempts go: of those rolled back, how many a person had sent back."""
IS_SENT_BACK = and_(Attempt.state == str(AttemptState.ROLLED_BACK), Attempt.reason == str(Reason.GO_BACK))


def keep_sent_back(session: Session, rollout_id: int) -> None:
    """Keep of a rollout how many were sent back, before its attempts go."""
    found = select(func.count()).where(Attempt.rollout_id == rollout_id, IS_SENT_BACK)
    if count := session.scalar(found):
        session.add(RolloutCounter(rollout_id=rollout_id, state=SENT_BACK, count=count))
        session.flush()


def sent_back(session: Session, of: ColumnElement[bool]) -> int:
    """How many agents people sent back in the rollouts that `of` selects, whatever is left of these."""
    here = select(func.count()).select_from(Attempt).join(Rollout, Rollout.id == Attempt.rollout_id)
    kept = select(func.sum(RolloutCounter.count)).join(Rollout, Rollout.id == RolloutCounter.rollout_id)
    there = session.scalar(here.where(of, IS_SENT_BACK, Rollout.pruned_at.is_(None))) or 0
    return there + int(session.scalar(kept.where(of, RolloutCounter.state == SENT_BACK)) or 0)


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
