"""A rehearsal: the real plan and the real `reconcile`, with agents that all take the release well."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from agent_core.clock import iso
from agent_core.directive import bucket, progress_for
from agent_core.wire import AttemptState
from release_server import census, cohorts, launch, shuffle
from release_server.rollout import Counters, Spec, StageState, State, Status, reconcile
from release_server.stages import wanted_count

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.launch import Plan

NAMED = 10
"""How many of a stage's agents are named."""


@dataclass(frozen=True)
class Opening:
    """When a stage opens, and how far it reaches."""

    at: datetime
    progress: int


def rehearse(session: Session, now: datetime, **said: Any) -> dict[str, Any]:
    """Say whom each stage would reach and when at the earliest; changes nothing.

    The salt is new for each rollout, so the real one begins with other hosts.

    Args:
        said: as of `launch.plan`, whose errors this raises too.

    Returns:
        `{version, base, approval, agents, stages: [{opens_at, progress, agents, names}], done_at}`; `done_at`
        is None where the cohort has no agent to finish with.
    """
    made = launch.plan(session, now, **said)
    strata = census.strata(session, made.cohort.id)
    pace = cohorts.newest_spec(session, made.cohort.id)
    places = {agent_id: bucket(agent_id, made.salt) for agent_id in strata}
    begins = max(now, made.terms.not_before or now)
    openings, done_at = play(made, strata, begins, timedelta(seconds=2 * pace.poll_s))
    shown = []
    for opening in openings:
        names = sorted(agent_id for agent_id, place in places.items() if place < opening.progress)
        shown.append(
            {
                "opens_at": iso(opening.at),
                "progress": opening.progress,
                "agents": len(names),
                "names": names[:NAMED],
            }
        )
    return {
        "version": made.release.version,
        "base": made.base,
        "approval": made.terms.approval,
        "agents": len(places),
        "stages": shown,
        "done_at": iso(done_at) if done_at else None,
    }


def play(
    made: Plan, strata: dict[str, tuple[str, str]], begins: datetime, takes: timedelta
) -> tuple[list[Opening], datetime | None]:
    """Drive `reconcile` from the first stage to the end.

    Args:
        takes: how long an agent needs from the opening of its stage until it is healthy.
    """
    spec = Spec(made.stages, stratified=made.terms.stratified)
    candidates = [_needed(made, strata, place) for place in range(len(made.stages))]
    places = [bucket(agent_id, made.salt) for agent_id in strata]
    status, now, openings = Status(), begins, list[Opening]()
    while True:
        reached = sum(place < status.progress for place in places)
        busy = status.opened_at is not None and now < status.opened_at + takes
        fresh = Counters(
            members=len(places),
            reached=reached,
            waiting=reached if busy else 0,
            candidates=candidates,
            attempts={AttemptState.HEALTHY: 0 if busy else reached},
        )
        following = reconcile(spec, status, fresh, now).status
        if following.state is State.COMPLETED:
            return openings, now
        if following.opened_at != status.opened_at and following.progress:
            openings.append(Opening(now, following.progress))
        if following == status:
            if status.state is not State.RUNNING or status.opened_at is None or not places:
                return openings, None
            soaking = status.stage_state is StageState.SOAKING and status.soaking_since is not None
            soak = timedelta(seconds=made.stages[status.stage].soak_s)
            allowed = timedelta(seconds=made.stages[status.stage].deadline_s)
            now = (status.soaking_since or now) + soak if soaking else status.opened_at + min(takes, allowed)
        status = following


def _needed(made: Plan, strata: dict[str, tuple[str, str]], place: int) -> int:
    count = wanted_count(made.stages[place], len(strata))
    if place == 0:
        return shuffle.first_progress(strata, made.salt, count, each=made.terms.stratified)
    return progress_for(strata, made.salt, count)
