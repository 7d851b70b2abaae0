"""Ways from the release that a cohort is on to another, by what is signed of both; and who has to take them.

A rollout is asked for one day and begins another. Meanwhile a pin, or another rollout, may have taken its
cohort elsewhere: it then begins from there, by the same rules as if it were asked for now.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select, update

from agent_core.errors import ConflictError
from keys import changes
from release_server import audit, policies, routes, specs
from release_server.models import Release, Rollout, RolloutStatus
from release_server.rollout import FINISHED, StageState, Wanted
from release_server.terms import Terms

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.models import Cohort


def check(session: Session, cohort: Cohort, release: Release, base: str | None, *, downgrade: bool) -> None:
    """Refuse what agents would refuse: an older release unasked, or one that no signed way leads to.

    Raises:
        ConflictError: `already-there`, `older`, `stepping-stone` or `dead-end`.
    """
    query = select(Release).where(Release.product_id == cohort.product_id)
    known = {each.version: each for each in session.scalars(query)}
    here = known.get(base or "")
    if here is None:
        return
    if here.id == release.id:
        raise ConflictError(
            f"cohort {cohort.name} is on {base} already",
            then="to take agents back to it: release rollout abort ID --rollback",
            reason="already-there",
        )
    if release.seq < here.seq:
        if not downgrade:
            raise ConflictError(
                f"{release.version} is older than {base}, which cohort {cohort.name} is on",
                why="a downgrade happens only when somebody asks for one",
                then="release rollout undo ID, or start it with --downgrade",
                reason="older",
            )
        return
    offered = [each for each in known.values() if each.yanked_at is None]
    way = _way(offered, here, release)
    if way is None or len(way) > 1:  # only then: reading the policy costs more than all the rest
        policy = policies.policy_of(session, cohort.product.name)
        free = [each for each in offered if each.id == release.id or not changes.forbids(policy, each.seq)]
        way = _way(free, here, release)
    if way is not None and len(way) <= 1:
        return
    via = ", then ".join(stop.version for stop in way[:-1]) if way else ""
    raise ConflictError(
        f"{release.version} does not install over {base}",
        why=f"it is reached by way of {via}" if way else "by its signed facts no release leads there",
        then=f"release rollout start {way[0].version} first" if way else "publish a stepping stone",
        reason="stepping-stone" if way else "dead-end",
    )


def _way(offered: Iterable[Release], here: Release, there: Release) -> tuple[routes.Stop, ...] | None:
    return routes.route(map(_stop, offered), here.seq, there.seq)


def _stop(release: Release) -> routes.Stop:
    """A release of several bundles is as strict as the strictest of them."""
    facts = [bundle.facts for bundle in release.bundles]
    return routes.Stop(
        release.version,
        release.seq,
        max((int(each.get("upgrade_from_seq") or 0) for each in facts), default=0),
        any(each.get("barrier") for each in facts),
    )


def rebase(session: Session, now: datetime, cohort: Cohort, base: str) -> None:
    """Have what waits in a cohort begin from the release that it is on from now on, and lead back to it.

    An approval is bound to that release too, so what was approved waits for a second person again. What would
    be refused if it were asked for now is superseded with the next look.
    """
    query = (
        select(Rollout)
        .join(RolloutStatus, RolloutStatus.rollout_id == Rollout.id)
        .where(
            Rollout.cohort_id == cohort.id,
            RolloutStatus.stage_state == str(StageState.PENDING),
            RolloutStatus.state.not_in(map(str, FINISHED)),
        )
    )
    for rollout in session.scalars(query).all():
        if rollout.base == base:
            continue
        rollout.base = base
        seen = update(RolloutStatus).where(RolloutStatus.rollout_id == rollout.id)
        session.execute(
            seen.values(edition=RolloutStatus.edition + 1).execution_options(synchronize_session=False)
        )
        _end_what_leads_nowhere(session, now, rollout)


def _end_what_leads_nowhere(session: Session, now: datetime, rollout: Rollout) -> None:
    try:
        check_again(session, rollout, rollout.base)
    except ConflictError as refusal:
        specs.ask(session, now, audit.SERVER, rollout.id, wanted=Wanted.SUPERSEDE, reason=refusal.what)


def check_again(session: Session, rollout: Rollout, base: str | None) -> None:
    """As `check`, for a rollout that was asked for before.

    Raises:
        ConflictError: as `check`.
    """
    if base == rollout.version:
        raise ConflictError(
            f"cohort {rollout.cohort.name} is on {base} already",
            then=f"release rollout abort r-{rollout.id}",
            reason="already-there",
        )
    asked = specs.newest_spec(session, rollout.id)
    check(session, rollout.cohort, rollout.release, base, downgrade=Terms.from_json(asked.terms).downgrade)
    if asked.approved and base != rollout.base:  # it has begun, so nobody would be asked again
        raise ConflictError(
            f"r-{rollout.id} was approved from {rollout.base}, and cohort {rollout.cohort.name} is on {base}",
            then=f"release rollout abort r-{rollout.id}, then start it anew",
            reason="changed",
        )
