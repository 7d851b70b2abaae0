"""How a rollout begins: what may begin where, what it replaces, and the salt that shuffles its cohort."""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING

from sqlalchemy import select

from agent_core.directive import bucket, progress_for
from agent_core.errors import ConflictError
from release_server import agents, audit, cohorts, fleet
from release_server.models import Agent, Cohort, Rollout, RolloutStatus
from release_server.rollout import FINISHED, State, Status, Wanted
from release_server.stages import check_stages, wanted_count

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.stages import Stage

COUNTED_MOST, SALTS_MOST = 5_000, 8
"""Up to how many agents a first stage is held to its number, and how many salts are tried for that."""


def start_rollout(
    session: Session,
    now: datetime,
    actor: str,
    *,
    product: str,
    cohort: str,
    version: str,
    stages: Sequence[Stage],
    reason: str = "",
    supersede: bool = False,
) -> Rollout:
    """Send a release through the stages of a cohort.

    Args:
        supersede: end the rollout that is going on there; without it only one that has stopped is replaced.

    Raises:
        NotFoundError: no such product, cohort or release.
        UsageError: the stages make no sense.
        ConflictError: the cohort is pinned, frozen, on this version already, or busy with another rollout.
    """
    check_stages(tuple(stages))
    target = cohorts.find(session, product, cohort)
    release = cohorts.require_release(session, target.product, version)
    base = cohorts.status_of(session, target.id).base
    _check_free(session, now, target, version, base)
    _make_way(session, now, actor, target, version, supersede=supersede)
    rollout = Rollout(
        cohort=target,
        release_id=release.id,
        version=version,
        base=base,
        salt=_new_salt(session, target.id, stages[0]),
        created_at=now,
        created_by=actor,
    )
    session.add(rollout)
    session.flush()
    agents.make_counters(session, rollout.id)
    fresh = Status()
    session.add(
        RolloutStatus(
            rollout_id=rollout.id,
            state=str(fresh.state),
            stage_state=str(fresh.stage_state),
            opened_at=None,
            soaking_since=None,
            finished_at=None,
            updated_at=now,
        )
    )
    stored = [stage.to_json() for stage in stages]
    fleet.ask(session, now, actor, rollout.id, stages=stored, wanted=Wanted.RUN, advance_to=0, reason=reason)
    subject = f"{product}/{cohort}"
    audit.record(
        session, now, actor, "rollout.start", subject, rollout=rollout.id, version=version, reason=reason
    )
    fleet.settle(session, now, rollout.id)
    return rollout


def _new_salt(session: Session, cohort_id: int, first: Stage) -> str:
    """A salt by which the first stage takes in just the agents it asks for, where a few tries find one.

    Two agents in one basis point enter together, but whoever asks for one canary wants one. In a large cohort
    nobody counts the agents of a stage one by one.
    """
    living = (Agent.cohort_id == cohort_id, Agent.retired_at.is_(None))
    members = session.scalars(select(Agent.id).where(*living).limit(COUNTED_MOST + 1)).all()
    salt = secrets.token_hex(16)
    if len(members) > COUNTED_MOST:
        return salt
    count = wanted_count(first, len(members))
    for _ in range(SALTS_MOST):
        progress = progress_for(members, salt, count)
        if sum(bucket(member, salt) < progress for member in members) == count:
            break
        salt = secrets.token_hex(16)
    return salt


def _check_free(session: Session, now: datetime, cohort: Cohort, version: str, base: str | None) -> None:
    spec = cohorts.newest_spec(session, cohort.id)
    if spec.pin is not None:
        raise ConflictError(
            f"cohort {cohort.name} is pinned to {spec.pin}",
            why=spec.reason,
            then=f"release cohort unpin {cohort.name}",
            reason="pinned",
        )
    if cohorts.is_frozen(spec, now):
        raise ConflictError(
            f"cohort {cohort.name} is frozen",
            why=spec.reason,
            then=f"release cohort unfreeze {cohort.name}",
            reason="frozen",
        )
    if base == version:
        raise ConflictError(
            f"cohort {cohort.name} is on {version} already",
            then="to take agents back to it: release rollout abort ID --rollback",
            reason="already-there",
        )


def _make_way(
    session: Session, now: datetime, actor: str, cohort: Cohort, version: str, *, supersede: bool
) -> None:
    """End the rollout before, if it has not ended: one that moves only when the caller says so."""
    newest = cohorts.newest_rollout(session, cohort.id)
    if newest is None or State(newest[1].state) in FINISHED:
        return
    rollout, status = newest
    if status.state != State.PAUSED and not supersede:
        raise ConflictError(
            f"r-{rollout.id} takes {rollout.version} through cohort {cohort.name}",
            why=f"it is {status.state.replace('_', ' ')}",
            then=f"release rollout pause r-{rollout.id}, or supersede it",
            reason="busy",
        )
    fleet.ask(session, now, actor, rollout.id, wanted=Wanted.SUPERSEDE, reason=f"for {version}")
    fleet.settle(session, now, rollout.id)
