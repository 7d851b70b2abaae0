"""Agents as people see them: who is silent, lists and one by one, and what operators ask of them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, func, literal, or_, select

from agent_core.errors import ConflictError, NotAllowedError, NotFoundError
from agent_core.wire import AttemptState, Reason
from release_server import audit, cohorts, leases, membership, presence, releases, shares, standing
from release_server.models import Agent, AgentEvent, Attempt, Cohort, CohortSpec, Rollout, RolloutStatus
from release_server.rollout import StageState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session

HISTORY = 50


# --- silence ---------------------------------------------------------------------------------------------


def period_of(poll_s: int, report_s: int) -> timedelta:
    """How often an agent is heard of that polls and reports so."""
    return timedelta(seconds=max(poll_s, report_s))


def silent_after(poll_s: int, report_s: int) -> timedelta:
    """How long an agent may be quiet before it is silent."""
    return standing.silent_after(period_of(poll_s, report_s))


USUAL_PERIOD = period_of(60, 300)
"""Of agents without a cohort, which nobody has told how often to report."""
USUAL = standing.silent_after(USUAL_PERIOD)


def period_in(spec: CohortSpec | None) -> timedelta:
    """How often an agent of this cohort is heard of; None: of no cohort."""
    return period_of(spec.poll_s, spec.report_s) if spec else USUAL_PERIOD


def silent_before(now: datetime, spec: CohortSpec | None, ear: presence.Ear) -> datetime:
    """Who was heard of before this moment last is silent."""
    period = period_in(spec)
    return ear.of(period).up_before(now, standing.silent_after(period))


# --- looking at agents -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """An agent as people see it; `state` is one of `standing.Standing`."""

    agent: Agent
    product: str
    cohort: str | None
    state: str


@dataclass(frozen=True)
class Filter:
    """Which agents to list; what is None or empty does not matter."""

    product: str | None = None
    cohort: str | None = None
    version: str | None = None
    state: str | None = None
    labels: tuple[tuple[str, str], ...] = ()


def find(session: Session, agent_id: str) -> Agent:
    """The agent of that id.

    Raises:
        NotFoundError: none is enrolled.
    """
    agent = session.get(Agent, agent_id)
    if agent is None:
        raise NotFoundError(f"there is no agent {agent_id[:128]}", then="release agents list")
    return agent


def list_agents(
    session: Session, now: datetime, wanted: Filter, *, limit: int, after: str | None = None
) -> list[View]:
    """Agents by id, at most `limit`, beginning after the id `after`. Retired ones only when asked for."""
    specs, ear = _specs(session), presence.Ear(session, now)
    conditions = _conditions(session, wanted, specs, now, ear)
    query = select(Agent).order_by(Agent.id).limit(limit).where(*conditions)
    if after is not None:
        query = query.where(Agent.id > after)
    found = session.scalars(query).all()
    failed = _failed_ids(session, [agent.id for agent in found])
    return [_view(agent, specs, failed, now, ear) for agent in found]


def show(session: Session, now: datetime, agent_id: str) -> View:
    agent = find(session, agent_id)
    failed, ear = _failed_ids(session, [agent.id]), presence.Ear(session, now)
    return _view(agent, _specs(session), failed, now, ear)


def events(session: Session, agent_id: str, limit: int = HISTORY) -> Sequence[AgentEvent]:
    """The last things an agent reported, newest first."""
    query = select(AgentEvent).where(AgentEvent.agent_id == agent_id)
    return session.scalars(query.order_by(AgentEvent.number.desc()).limit(limit)).all()


def _specs(session: Session) -> dict[int, CohortSpec]:
    query = select(CohortSpec).join(Cohort, Cohort.id == CohortSpec.cohort_id).where(membership.is_newest())
    return {spec.cohort_id: spec for spec in session.scalars(query)}


def _view(
    agent: Agent, specs: Mapping[int, CohortSpec], failed: set[str], now: datetime, ear: presence.Ear
) -> View:
    spec = specs.get(agent.cohort_id or 0)
    period = period_in(spec)
    facts = standing.Facts(
        seen_at=agent.seen_at,
        period=period,
        hearing=ear.of(period),
        retired=agent.retired_at is not None,
        pending=agent.pending,
        failed=agent.id in failed,
        held=agent.held,
    )
    state = str(standing.standing(facts, now))
    return View(agent, agent.product.name, agent.cohort.name if agent.cohort else None, state)


def _newest_rollout_of(cohort_id: ColumnElement[Any]) -> ColumnElement[int]:
    """The newest that has begun: a draft says nothing yet of how an agent is."""
    begun = select(func.max(Rollout.id)).join(RolloutStatus, RolloutStatus.rollout_id == Rollout.id)
    begun = begun.where(RolloutStatus.stage_state != str(StageState.PENDING))
    return begun.where(Rollout.cohort_id == cohort_id).scalar_subquery()


def _is_failed() -> ColumnElement[bool]:
    """The condition that an agent failed in the newest rollout of its cohort."""
    newest = _newest_rollout_of(Agent.cohort_id.expression).correlate(Agent)
    states = [str(AttemptState.ROLLED_BACK), str(AttemptState.FAILED)]
    return (
        select(literal(1))
        .where(
            Attempt.agent_id == Agent.id,
            Attempt.rollout_id == newest,
            Attempt.state.in_(states),
            Attempt.reason != str(Reason.GO_BACK),
        )
        .correlate(Agent)
        .exists()
    )


def _failed_ids(session: Session, agent_ids: Sequence[str]) -> set[str]:
    found: set[str] = set()
    for start in range(0, len(agent_ids), 500):
        some = agent_ids[start : start + 500]
        found |= set(session.scalars(select(Agent.id).where(Agent.id.in_(some), _is_failed())))
    return found


def _conditions(
    session: Session, wanted: Filter, specs: Mapping[int, CohortSpec], now: datetime, ear: presence.Ear
) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if wanted.product is not None:
        conditions.append(Agent.product_id == releases.find_product(session, wanted.product).id)
    if wanted.cohort is not None:
        named = select(Cohort.id).where(Cohort.name == wanted.cohort, Cohort.deleted_at.is_(None))
        conditions.append(Agent.cohort_id.in_(named))
    if wanted.version is not None:
        conditions.append(Agent.version == wanted.version)
    for key, value in wanted.labels:
        own, said = Agent.operator_labels[key].as_string(), Agent.labels[key].as_string()
        conditions.append(func.coalesce(own, said) == value)
    return [*conditions, *_state_conditions(wanted.state, specs, now, ear)]


def _state_conditions(
    state: str | None, specs: Mapping[int, CohortSpec], now: datetime, ear: presence.Ear
) -> list[ColumnElement[bool]]:
    """`standing.standing` as SQL: what a state means, and that nothing weightier holds."""
    if state is None:
        return [Agent.retired_at.is_(None)]
    ladder: dict[str, ColumnElement[bool]] = {
        "retired": Agent.retired_at.is_not(None),
        "pending": Agent.pending.is_(True),
        "gone": Agent.seen_at < now - standing.GONE,
        "silent": _is_quiet(specs, now, ear, standing.silent_after),
        "failed": _is_failed(),
        "held": Agent.held.is_(True),
        "late": _is_quiet(specs, now, ear, standing.late_after),
    }
    conditions: list[ColumnElement[bool]] = []
    for name, meant in ladder.items():
        if name == state:
            return [*conditions, meant]
        conditions.append(~meant)
    return conditions


def _is_quiet(
    specs: Mapping[int, CohortSpec],
    now: datetime,
    ear: presence.Ear,
    after: Callable[[timedelta], timedelta],
) -> ColumnElement[bool]:
    """Longer than `after` its period; cohorts with the same pace share a term, so the query stays short."""

    def is_quiet(period: timedelta) -> ColumnElement[bool]:
        return Agent.seen_at < ear.of(period).up_before(now, after(period))

    paces: dict[timedelta, list[int]] = {}
    for cohort_id, spec in specs.items():
        paces.setdefault(period_in(spec), []).append(cohort_id)
    # Zero, not NULL, for agents without a cohort: what is unknown in SQL is not true when it is negated.
    cohort = func.coalesce(Agent.cohort_id, 0)
    terms = [and_(cohort.in_(cohort_ids), is_quiet(period)) for period, cohort_ids in paces.items()]
    return or_(*terms, and_(cohort.not_in(list(specs)), is_quiet(USUAL_PERIOD)))


def cohort_name(session: Session, agent: Agent) -> str | None:
    """The cohort that agents are told they belong to."""
    return session.scalar(select(Cohort.name).where(Cohort.id == agent.cohort_id))


def refuse_retired(agent: Agent) -> None:
    """An agent that was retired, or not accepted, is told so and not listened to."""
    if agent.retired_at is not None:
        raise NotAllowedError(
            f"agent {agent.id} is retired",
            why="the server takes no more reports of it; what it runs keeps running",
            then="agent enroll --new-key makes this host a new agent",
            reason=str(Reason.RETIRED),
        )


# --- what operators ask ----------------------------------------------------------------------------------


def move(
    session: Session, now: datetime, actor: str, agent_id: str, *, cohort: str | None, reason: str = ""
) -> None:
    """Put an agent into a cohort whatever its labels say; None lets the labels decide again."""
    agent = active(session, agent_id)
    if agent.pending:
        raise ConflictError(
            f"agent {agent.id} waits to be accepted",
            then=f"release agents accept {agent.id}",
            reason=str(Reason.PENDING),
        )
    if cohort is None:
        agent.cohort_fixed = False
        membership.place(session, agent)
    else:
        agent.cohort_id = cohorts.find(session, agent.product.name, cohort).id
        agent.cohort_fixed = True
    session.flush()
    session.refresh(agent, ["cohort"])
    audit.record(session, now, actor, "agent.move", agent.id, cohort=cohort, reason=reason)


def label(
    session: Session,
    now: datetime,
    actor: str,
    agent_id: str,
    *,
    labels: Mapping[str, str],
    reason: str = "",
) -> None:
    """Replace the operators' labels of an agent; they override its own."""
    agent = active(session, agent_id)
    agent.operator_labels = dict(labels)
    membership.place(session, agent)
    session.flush()
    session.refresh(agent, ["cohort"])
    audit.record(session, now, actor, "agent.label", agent.id, labels=dict(labels), reason=reason)


def retire(session: Session, now: datetime, actor: str, agent_id: str, *, reason: str = "") -> None:
    """Take an agent out of the fleet for good: it is counted no longer and its key is refused."""
    agent = find(session, agent_id)
    if agent.retired_at is None:
        agent.retired_at = now
        leases.give_back(session, agent.id)
        shares.give_back(session, agent.id)
        agent.session_hash = None
        session.flush()
        audit.record(session, now, actor, "agent.retire", agent.id, reason=reason)


def active(session: Session, agent_id: str) -> Agent:
    """The agent of that id, unless it is retired."""
    agent = find(session, agent_id)
    if agent.retired_at is not None:
        raise ConflictError(f"agent {agent.id} is retired", reason="retired")
    return agent


def runs_on(bundle: str, host: str) -> bool:
    return bundle in ("any", host) or host.startswith(f"{bundle}-")
