"""Agents as the server knows them: enrolment, reports that prove who sent them, and attempts."""

from __future__ import annotations

import hmac
import secrets
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from sqlalchemy import and_, func, literal, or_, select, update

from agent_core.errors import ConflictError, NotAllowedError, NotFoundError
from agent_core.wire import (
    AttemptState,
    Reason,
    Report,
    ReportAnswer,
    Transition,
    signed_text,
)
from release_server import audit, auth, cohorts, leases, membership, releases, standing
from release_server.models import (
    Agent,
    AgentEvent,
    Attempt,
    Cohort,
    CohortSpec,
    Rollout,
    RolloutCounter,
    RolloutStatus,
)
from release_server.rollout import StageState, State

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session

    from agent_core.wire import LeaseRequest

SESSION = timedelta(hours=1)
RENEW = timedelta(minutes=15)
"""A session this near its end is followed by a new one, so that agents rarely meet an ended one."""
COALESCE = timedelta(seconds=5)
"""Heartbeats that say nothing new are written down at most so often."""
PLACING = frozenset({"labels", "inventory", "version", "platform"})
"""What cohorts can ask of an agent: when it changes, the agent may belong elsewhere."""
HISTORY = 50
UNPROVEN = frozenset(
    {"unknown-agent", str(Reason.BAD_SIGNATURE), str(Reason.REPLAYED), "session-over", "not-signed-in"}
)
"""Reasons that say who sent a report is not proven: the API answers 401."""


# --- reports ---------------------------------------------------------------------------------------------


def cohort_name(session: Session, agent: Agent) -> str | None:
    """The cohort that agents are told they belong to."""
    return session.scalar(select(Cohort.name).where(Cohort.id == agent.cohort_id))


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
        cohort=cohort_name(session, agent),
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
    refuse_retired(agent)
    return leases.ask(session, now, agent, wanted, _quiet_for(session, agent)).to_json()


def _quiet_for(session: Session, agent: Agent) -> timedelta:
    """How long this agent may be quiet by the pace of its cohort."""
    if agent.cohort_id is None:
        return silent_after(60, 300)
    pace = cohorts.newest_spec(session, agent.cohort_id)
    return silent_after(pace.poll_s, pace.report_s)


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
    digest = auth.hash_token(token)
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


def refuse_retired(agent: Agent) -> None:
    """An agent that was retired, or not accepted, is told so and not listened to."""
    if agent.retired_at is not None:
        raise NotAllowedError(
            f"agent {agent.id} is retired",
            why="the server takes no more reports of it; what it runs keeps running",
            then="agent enroll --new-key makes this host a new agent",
            reason=str(Reason.RETIRED),
        )


def _check_subject(agent: Agent, proof: Signed | Bearer, report: Report) -> None:
    refuse_retired(agent)
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
    token = secrets.token_urlsafe(32)
    agent.session_hash = auth.hash_token(token)
    agent.session_until = now + SESSION
    return token


# --- attempts and their counters -------------------------------------------------------------------------

_AFTER_HEALTHY = frozenset({AttemptState.ROLLED_BACK, AttemptState.FAILED, AttemptState.SILENT})
FAILED = (AttemptState.ROLLED_BACK, AttemptState.FAILED, AttemptState.SILENT)
ENDED = frozenset({AttemptState.HEALTHY, *FAILED, AttemptState.SKIPPED})


def may_follow(state: AttemptState, after: AttemptState) -> bool:
    """Whether an attempt may go from `after` to `state`.

    Agents number their transitions, so what arrives is in order, and a retry begins again from any end but
    one: an agent that is healthy has nothing left to download, it can only fall.
    """
    return after is not AttemptState.HEALTHY or state in _AFTER_HEALTHY


def move_attempt(
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
        move_attempt(session, now, agent.id, rollout, transition.state, **said)
    elif transition.state is AttemptState.HEALTHY and _is_going_back(session, rollout):
        # Its salt names the rollout that sent it back, its version the one it went back to.
        move_attempt(session, now, agent.id, rollout, AttemptState.ROLLED_BACK, reason=str(Reason.GO_BACK))


def _rollout_of(session: Session, agent: Agent, salt: str) -> Rollout | None:
    """The rollout a salt names, if it is one of the agent's product."""
    if not salt:
        return None
    owned = select(Rollout).join(Cohort, Cohort.id == Rollout.cohort_id)
    return session.scalar(owned.where(Rollout.salt == salt, Cohort.product_id == agent.product_id))


def _is_going_back(session: Session, rollout: Rollout) -> bool:
    state = session.scalar(select(RolloutStatus.state).where(RolloutStatus.rollout_id == rollout.id))
    return state in (State.ROLLING_BACK, State.ROLLED_BACK)


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


def is_silent(agent: Agent, spec: CohortSpec | None, now: datetime) -> bool:
    return agent.seen_at < now - (silent_after(spec.poll_s, spec.report_s) if spec else USUAL)


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
    specs = _specs(session)
    query = select(Agent).order_by(Agent.id).limit(limit).where(*_conditions(session, wanted, specs, now))
    if after is not None:
        query = query.where(Agent.id > after)
    found = session.scalars(query).all()
    failed = _failed_ids(session, [agent.id for agent in found])
    return [_view(agent, specs, failed, now) for agent in found]


def show(session: Session, now: datetime, agent_id: str) -> View:
    agent = find(session, agent_id)
    return _view(agent, _specs(session), _failed_ids(session, [agent.id]), now)


def events(session: Session, agent_id: str, limit: int = HISTORY) -> Sequence[AgentEvent]:
    """The last things an agent reported, newest first."""
    query = select(AgentEvent).where(AgentEvent.agent_id == agent_id)
    return session.scalars(query.order_by(AgentEvent.number.desc()).limit(limit)).all()


def _specs(session: Session) -> dict[int, CohortSpec]:
    query = select(CohortSpec).join(Cohort, Cohort.id == CohortSpec.cohort_id).where(membership.is_newest())
    return {spec.cohort_id: spec for spec in session.scalars(query)}


def _view(agent: Agent, specs: Mapping[int, CohortSpec], failed: set[str], now: datetime) -> View:
    spec = specs.get(agent.cohort_id or 0)
    facts = standing.Facts(
        seen_at=agent.seen_at,
        period=period_of(spec.poll_s, spec.report_s) if spec else USUAL_PERIOD,
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
    session: Session, wanted: Filter, specs: Mapping[int, CohortSpec], now: datetime
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
    return [*conditions, *_state_conditions(wanted.state, specs, now)]


def _state_conditions(
    state: str | None, specs: Mapping[int, CohortSpec], now: datetime
) -> list[ColumnElement[bool]]:
    """`standing.standing` as SQL: what a state means, and that nothing weightier holds."""
    if state is None:
        return [Agent.retired_at.is_(None)]
    ladder: dict[str, ColumnElement[bool]] = {
        "retired": Agent.retired_at.is_not(None),
        "pending": Agent.pending.is_(True),
        "gone": Agent.seen_at < now - standing.GONE,
        "silent": _is_quiet(specs, now, standing.silent_after),
        "failed": _is_failed(),
        "held": Agent.held.is_(True),
        "late": _is_quiet(specs, now, standing.late_after),
    }
    conditions: list[ColumnElement[bool]] = []
    for name, meant in ladder.items():
        if name == state:
            return [*conditions, meant]
        conditions.append(~meant)
    return conditions


def _is_quiet(
    specs: Mapping[int, CohortSpec], now: datetime, after: Callable[[timedelta], timedelta]
) -> ColumnElement[bool]:
    """Longer than `after` its period; cohorts with the same pace share a term, so the query stays short."""
    paces: dict[timedelta, list[int]] = {}
    for cohort_id, spec in specs.items():
        paces.setdefault(after(period_of(spec.poll_s, spec.report_s)), []).append(cohort_id)
    # Zero, not NULL, for agents without a cohort: what is unknown in SQL is not true when it is negated.
    cohort = func.coalesce(Agent.cohort_id, 0)
    terms = [and_(cohort.in_(cohort_ids), Agent.seen_at < now - pace) for pace, cohort_ids in paces.items()]
    return or_(*terms, and_(cohort.not_in(list(specs)), Agent.seen_at < now - after(USUAL_PERIOD)))


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
