"""How a rollout begins: what may begin where, what it replaces, and the salt that shuffles its cohort."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from agent_core.errors import ConflictError
from release_server import attempts, audit, census, cohorts, fleet, shuffle, specs, ways
from release_server.models import Cohort, Release, Rollout, RolloutStatus
from release_server.rollout import MOVING, State, Status, Wanted
from release_server.stages import check_stages, wanted_count
from release_server.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.stages import Stage

COUNTED_MOST, SALTS_MOST = 5_000, 8
"""Up to how many agents a first stage is held to its number, and how many salts are tried for that."""


@dataclass(frozen=True)
class Plan:
    """A rollout that may begin: nothing speaks against it, and its cohort is shuffled."""

    cohort: Cohort
    release: Release
    base: str | None
    stages: tuple[Stage, ...]
    terms: Terms
    salt: str


def plan(
    session: Session,
    now: datetime,
    *,
    product: str,
    cohort: str,
    version: str,
    stages: Sequence[Stage],
    terms: Terms | None = None,
) -> Plan:
    """Look whether a rollout may begin, and how; changes nothing.

    Raises:
        NotFoundError: no such product, cohort or release.
        UsageError: the stages make no sense.
        ConflictError: the cohort is pinned, frozen, on this version already or on a newer one, or no signed
            way leads from there to this release.
    """
    check_stages(tuple(stages))
    target = cohorts.find(session, product, cohort)
    release = cohorts.require_release(session, target.product, version)
    base = cohorts.status_of(session, target.id).base
    wanted = terms or Terms()
    _check_free(session, now, target)
    ways.check(session, target, release, base, downgrade=wanted.downgrade)
    approval = wanted.approval or cohorts.newest_spec(session, target.id).approval
    salt = _new_salt(session, target.id, stages[0], stratified=wanted.stratified)
    return Plan(target, release, base, tuple(stages), replace(wanted, approval=approval), salt)


def start_rollout(
    session: Session,
    now: datetime,
    actor: str,
    *,
    product: str,
    cohort: str,
    version: str,
    stages: Sequence[Stage],
    terms: Terms | None = None,
    reason: str = "",
    supersede: bool = False,
    draft: bool = False,
) -> Rollout:
    """Send a release through the stages of a cohort, or have that ready.

    Args:
        supersede: end the rollout that is going on there; without it only one that has stopped is replaced.
        draft: keep it until somebody resumes it.

    Raises:
        ConflictError: the cohort is busy with another rollout; else as `plan`.
    """
    made = plan(session, now, product=product, cohort=cohort, version=version, stages=stages, terms=terms)
    _make_way(session, now, actor, made.cohort, version, supersede=supersede)
    rollout = _store(session, now, actor, made, draft=draft)
    specs.ask(
        session,
        now,
        actor,
        rollout.id,
        stages=[stage.to_json() for stage in made.stages],
        terms=made.terms.to_json(),
        wanted=Wanted.RUN,
        advance_to=0,
        reason=reason,
    )
    audit.record(
        session,
        now,
        actor,
        "rollout.start",
        f"{product}/{cohort}",
        rollout=rollout.id,
        version=version,
        reason=reason,
        **({"downgrade": True} if made.terms.downgrade else {}),
    )
    fleet.settle(session, now, rollout.id)
    return rollout


def _store(session: Session, now: datetime, actor: str, made: Plan, *, draft: bool) -> Rollout:
    rollout = Rollout(
        cohort=made.cohort,
        release_id=made.release.id,
        version=made.release.version,
        base=made.base,
        salt=made.salt,
        created_at=now,
        created_by=actor,
    )
    session.add(rollout)
    session.flush()
    attempts.make_counters(session, rollout.id)
    fresh = Status(State.DRAFT if draft else State.SCHEDULED)
    session.add(
        RolloutStatus(
            rollout_id=rollout.id,
            state=str(fresh.state),
            stage_state=str(fresh.stage_state),
            opened_at=None,
            soaking_since=None,
            finished_at=None,
            watch_until=None,
            watch_at=None,
            updated_at=now,
        )
    )
    return rollout


def _new_salt(session: Session, cohort_id: int, first: Stage, *, stratified: bool) -> str:
    """A salt for the first stage as asked for. In a large cohort nobody counts its agents one by one."""
    strata = census.strata(session, cohort_id, COUNTED_MOST + 1)
    if len(strata) > COUNTED_MOST:
        return secrets.token_hex(16)
    salts = (secrets.token_hex(16) for _ in range(SALTS_MOST))
    count = wanted_count(first, len(strata))
    veterans = _veterans(session, cohort_id, strata)
    return shuffle.choose_salt(salts, strata, count, each=stratified, veterans=veterans)


def _veterans(session: Session, cohort_id: int, strata: Mapping[str, object]) -> frozenset[str]:
    """The agents that the first stage of the rollout before took in, as far as they are known by its salt."""
    newest = cohorts.newest_rollout(session, cohort_id)
    if newest is None or not strata:
        return frozenset()
    first = fleet.spec_of(specs.newest_spec(session, newest[0].id)).stages[0]
    return shuffle.first_agents(strata, newest[0].salt, wanted_count(first, len(strata)))


def _check_free(session: Session, now: datetime, cohort: Cohort) -> None:
    spec = cohorts.newest_spec(session, cohort.id)
    if spec.pin is not None:
        raise ConflictError(
            f"cohort {cohort.name} is pinned to {spec.pin}",
            why=cohorts.reason_of(spec, "pin"),
            then=f"release cohort unpin {cohort.name}",
            reason="pinned",
        )
    freeze = cohorts.freeze_of(spec, now)
    if freeze is not None:
        unfreeze = f"release cohort unfreeze {cohort.name}"
        raise ConflictError(
            f"cohort {cohort.name} is frozen",
            why=f"by its calendar: {freeze.by}" if freeze.by else cohorts.reason_of(spec, "freeze"),
            then=f"release cohort edit {cohort.name} --calendar none" if freeze.by else unfreeze,
            reason="frozen",
        )


def _make_way(
    session: Session, now: datetime, actor: str, cohort: Cohort, version: str, *, supersede: bool
) -> None:
    """Refuse to begin beside a rollout that moves, unless the caller says so.

    What has begun goes on until the new one begins as well (`fleet`); what has not is replaced at once.
    """
    for rollout, status in cohorts.unfinished(session, cohort.id):
        if status.state != State.PAUSED and not supersede:
            raise ConflictError(
                f"r-{rollout.id} takes {rollout.version} through cohort {cohort.name}",
                why=f"it is {status.state.replace('_', ' ')}",
                then=f"release rollout {_ends(State(status.state))} r-{rollout.id}, or --supersede",
                reason="busy",
            )
        if not fleet.has_begun(status):
            fleet.supersede(session, now, actor, rollout.id, version)


def _ends(state: State) -> str:
    """What somebody types so that a rollout in this state no longer stands in the way of another one."""
    if state is State.ROLLING_BACK:
        return "status --watch"
    return "pause" if state in MOVING else "abort"
