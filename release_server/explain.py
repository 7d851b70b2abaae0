"""Collects what the server knows of one agent or rollout for `why` and `rollout_why`, which explain it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sqlalchemy import func, select

from agent_core.errors import ConflictError
from agent_core.wire import AttemptState, BudgetTerms, Directive, LeaseTerms, Reason, Window
from release_server import (
    agents,
    census,
    cohorts,
    fleet,
    leases,
    policies,
    presence,
    rollout_view,
    rollout_why,
    shares,
    specs,
    standing,
    ways,
    why,
)
from release_server.foresight import Allowance
from release_server.hearing import NEVER
from release_server.models import Agent, Attempt, Bundle, CohortSpec, Release, Rollout, RolloutEvent
from release_server.rollout import State

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.models import RolloutStatus

POLLS_A_STAGE = 2
"""How many polls an agent needs for a stage, where none has told by doing it."""


def agent_why(session: Session, now: datetime, agent_id: str) -> dict[str, Any]:
    """Explain why an agent runs what it runs, as `why.explain`.

    Raises:
        NotFoundError: none of that id is enrolled.
    """
    return why.explain(collect(session, now, agents.find(session, agent_id)), now)


def collect(session: Session, now: datetime, agent: Agent) -> why.Facts:
    """What is known of one agent and of all that speaks to it."""
    known: dict[str, Any] = {
        "agent_id": agent.id,
        "running": agent.version,
        "seen_at": agent.seen_at,
        "quiet": agents.USUAL,
        "platform": agent.platform,
        "gate": agent.gate,
        "phase": agent.phase,
        "held": agent.held,
        "reason": agent.reason,
        "detail": agent.detail,
        "retired": agent.retired_at is not None,
        "pending": agent.pending,
    }
    if agent.cohort is None or agent.pending:
        return why.Facts(**known)
    spec, status = cohorts.newest_spec(session, agent.cohort.id), cohorts.status_of(session, agent.cohort.id)
    directive = Directive.from_json(status.directive) if status.directive is not None else None
    known |= {
        "quiet": _quiet(session, now, agent, spec),
        "cohort": agent.cohort.name,
        "wants": _held(now, spec),
        "course": _course(session, spec),
        "directive": directive,
        "told_at": status.updated_at,
        "room": _room(session, now, agent, spec),
        "line": _line(session, now, agent, spec),
    }
    return why.Facts(**known, **_releases(session, agent, directive))


def _quiet(session: Session, now: datetime, agent: Agent, spec: CohortSpec) -> timedelta:
    """How long it may be quiet before it is silent; longer where the server could not hear it meanwhile."""
    period = agents.period_in(spec)
    silent = standing.silent_after(period)
    ends = presence.Ear(session, now).of(period).ends(agent.seen_at, silent)
    return silent + max(timedelta(), now - agent.seen_at) if ends == NEVER else ends - agent.seen_at


def _held(now: datetime, spec: CohortSpec) -> why.Held:
    reasons = {f"{act}_reason": cohorts.reason_of(spec, act) for act in ("pin", "freeze")}
    return why.Held(spec.pin, cohorts.freeze_of(spec, now), **reasons)


def _course(session: Session, spec: CohortSpec) -> why.Course | None:
    newest = cohorts.newest_rollout(session, spec.cohort_id)
    if newest is None:
        return None
    rollout, status = newest
    members = select(func.count(Agent.id)).where(
        Agent.cohort_id == spec.cohort_id, Agent.retired_at.is_(None)
    )
    return why.Course(
        name=f"r-{rollout.id}",
        salt=rollout.salt,
        state=State(status.state),
        reason=status.reason,
        detail=status.detail,
        stages=fleet.spec_of(specs.newest_spec(session, rollout.id)).stages,
        stage=status.stage,
        soaking_since=status.soaking_since,
        members=session.scalar(members) or 0,
        takes=_takes(spec, status),
    )


def _takes(spec: CohortSpec, status: RolloutStatus) -> timedelta:
    """How long the present stage took until all its agents were healthy, or how long one usually takes."""
    if status.opened_at is not None and status.soaking_since is not None:
        return max(timedelta(0), status.soaking_since - status.opened_at)
    return timedelta(seconds=POLLS_A_STAGE * spec.poll_s)


def _releases(session: Session, agent: Agent, directive: Directive | None) -> dict[str, Any]:
    """What is signed of the versions the agent runs and may be sent to."""
    if directive is None:
        return {}
    named = {directive.release, directive.base} - {None}
    query = select(Release).where(
        Release.product_id == agent.product_id, Release.version.in_([*named, agent.version])
    )
    found = {release.version: release for release in session.scalars(query)}
    here = found.get(agent.version)
    return {
        "running_seq": here.seq if here else 0,
        "policy": policies.policy_of(session, agent.product.name),
        "bundles": {version: _best(found.get(str(version)), agent.platform) for version in named},
        "failed": _failed(session, agent, directive.salt),
    }


def _best(release: Release | None, platform: str) -> why.Bundle | None:
    """The bundle that a host would choose: the one that says most of its platform."""
    if release is None:
        return None
    fitting = [bundle for bundle in release.bundles if agents.runs_on(bundle.platform, platform)]
    if not fitting:
        return None
    best = max(fitting, key=_exactness)
    facts = best.facts
    return why.Bundle(
        seq=release.seq,
        gates=tuple(facts.get("gates") or ()),
        upgrade_from_seq=int(facts.get("upgrade_from_seq") or 0),
        min_launcher=int(facts.get("min_launcher") or 1),
    )


def _exactness(bundle: Bundle) -> int:
    return 0 if bundle.platform == "any" else len(bundle.platform)


def _failed(session: Session, agent: Agent, salt: str) -> tuple[str, str, str] | None:
    query = select(Attempt).join(Rollout, Rollout.id == Attempt.rollout_id)
    states = [str(state) for state in (AttemptState.ROLLED_BACK, AttemptState.FAILED)]
    attempt = session.scalar(
        query.where(
            Attempt.agent_id == agent.id,
            Rollout.salt == salt,
            Attempt.state.in_(states),
            Attempt.reason != str(Reason.GO_BACK),
        )
    )
    return (attempt.state, attempt.reason, attempt.detail) if attempt else None


def _room(session: Session, now: datetime, agent: Agent, spec: CohortSpec) -> why.Room | None:
    if spec.lease is None:
        return None
    return leases.room(session, now, agent, LeaseTerms.from_json(spec.lease))


def _line(session: Session, now: datetime, agent: Agent, spec: CohortSpec) -> why.Line | None:
    if spec.budget is None:
        return None
    return shares.line(session, now, agent, BudgetTerms.from_json(spec.budget))


# --- rollouts --------------------------------------------------------------------------------------------


def why_of_rollout(session: Session, now: datetime, rollout_id: int) -> dict[str, Any]:
    """Explain why a rollout is where it is, as `rollout_why.explain`; counts its agents and writes nothing.

    Raises:
        NotFoundError: there is none of that number.
    """
    view = rollout_view.show(session, rollout_id)
    rollout, asked = view.rollout, view.spec
    spec, status = fleet.spec_now(session, now, rollout, asked), fleet.status_of(view.status)
    wants = cohorts.newest_spec(session, rollout.cohort_id)
    ahead = census.outlook(session, now, rollout, spec, status)
    facts = rollout_why.Facts(
        name=f"r-{rollout.id}",
        version=rollout.version,
        cohort=view.cohort,
        spec=spec,
        status=status,
        counters=ahead.at(spec, status, now),
        fleet=ahead,
        allowance=_allowance(wants, rollout.cohort.product.stopped),
        by=asked.actor,
        reason=asked.reason,
        askers=tuple(sorted(fleet.askers(session, rollout))),
        digest=fleet.digest_of(rollout, asked),
        pin=wants.pin,
        pin_reason=cohorts.reason_of(wants, "pin"),
        freeze_reason=cohorts.reason_of(wants, "freeze"),
        yanked=rollout.release.yanked_at is not None,
        past=_past(session, rollout) if status.state is State.PAUSED else "",
        halt=_halt(session, rollout_id),
    )
    return rollout_why.explain(facts, now)


def _past(session: Session, rollout: Rollout) -> str:
    """Why a paused rollout is not resumed, since its cohort has gone on without it."""
    base = cohorts.status_of(session, rollout.cohort_id).base
    if base == rollout.base:
        return ""
    try:
        ways.check_again(session, rollout, base)
    except ConflictError as refusal:
        return refusal.what
    return ""


def _allowance(spec: CohortSpec, stopped: str | None) -> Allowance:
    window = None if spec.window is None else Window.from_json(spec.window, "window")
    return Allowance(spec.frozen, spec.frozen_until, spec.calendar, window, stopped)


def _halt(session: Session, rollout_id: int) -> dict[str, Any]:
    """The numbers that the newest halt saw, none where there was none."""
    of = select(RolloutEvent.numbers).where(
        RolloutEvent.rollout_id == rollout_id, RolloutEvent.event == "halted"
    )
    return session.scalar(of.order_by(RolloutEvent.id.desc()).limit(1)) or {}
