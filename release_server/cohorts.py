"""Cohorts: what people want of each, and the word the server has for it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sqlalchemy import func, or_, select, update

from agent_core.clock import iso
from agent_core.errors import ConflictError, NotFoundError, UsageError
from agent_core.wire import NAME, BudgetTerms, LeaseTerms, Window
from release_server import audit, freezes, releases, ways
from release_server.database import stir
from release_server.directives import CohortFacts, Pace, RolloutFacts, directive_for
from release_server.membership import resettle
from release_server.models import (
    Agent,
    Cohort,
    CohortSpec,
    CohortStatus,
    Product,
    Release,
    Rollout,
    RolloutStatus,
)
from release_server.queries import parse
from release_server.rollout import FINISHED, StageState, State
from release_server.webhooks import standstill
from release_server.webhooks.standstill import Stand

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.freezes import Freeze

MOST_MISSED = 400
"""Of so many beginnings and ends of freezes of cohorts, which nobody was there to see, each is told; of more,
how it is now. Nobody else writes meanwhile."""

# --- finding ---------------------------------------------------------------------------------------------


def find(session: Session, product: str, name: str) -> Cohort:
    """The cohort of that name.

    Raises:
        NotFoundError: no such product, or no such cohort (any more).
    """
    owner = releases.find_product(session, product)
    cohort = session.scalar(
        select(Cohort).where(Cohort.product_id == owner.id, Cohort.name == name, Cohort.deleted_at.is_(None))
    )
    if cohort is None:
        raise NotFoundError(f"{product} has no cohort {name}", then="release cohort list")
    return cohort


def require_release(session: Session, product: Product, version: str) -> Release:
    """The release of that version, to be given to a cohort.

    Raises:
        NotFoundError: it was never published.
        ConflictError: it was yanked.
    """
    release = releases.find_release(session, product, version)
    if release is None:
        raise NotFoundError(
            f"{product.name} has no release {version}", then=f"release list --product {product.name}"
        )
    releases.refuse_yanked(release)
    return release


def newest_spec(session: Session, cohort_id: int) -> CohortSpec:
    query = select(CohortSpec).where(CohortSpec.cohort_id == cohort_id)
    return session.scalars(query.order_by(CohortSpec.revision.desc()).limit(1)).one()


def status_of(session: Session, cohort_id: int) -> CohortStatus:
    return session.get_one(CohortStatus, cohort_id, populate_existing=True)


def freeze_of(spec: CohortSpec, now: datetime) -> Freeze | None:
    """What freezes a cohort now: a person, or the calendar; and until when all of it does."""
    return freezes.standing(spec.calendar, now, by_hand=spec.frozen, until=spec.frozen_until)


def is_frozen(spec: CohortSpec, now: datetime) -> bool:
    return freeze_of(spec, now) is not None


def reason_of(spec: CohortSpec, act: str) -> str:
    """Why somebody pinned (`pin`) or froze (`freeze`) a cohort, as it is now; empty where nobody did."""
    return str(spec.because.get(act, {}).get("reason", ""))


def is_frozen_by_hand(spec: CohortSpec, now: datetime) -> bool:
    """Whether a person's freeze stands; `frozen` alone outlives the time that it was set for."""
    return spec.frozen and (spec.frozen_until is None or now < spec.frozen_until)


# --- what people ask -------------------------------------------------------------------------------------


def create(
    session: Session,
    now: datetime,
    actor: str,
    *,
    product: str,
    name: str,
    match: str = "",
    priority: int = 0,
    release: str | None = None,
    poll_s: int = 60,
    report_s: int = 300,
    splay_s: int = 0,
    window: dict[str, Any] | None = None,
    approval: bool = False,
    lease: dict[str, Any] | None = None,
    budget: dict[str, Any] | None = None,
    calendar: dict[str, str] | None = None,
    reason: str = "",
) -> Cohort:
    """Make a cohort; agents whose labels match move into it.

    Args:
        release: the version its agents start from; without one they stay as they are until a rollout.
        approval: each rollout here needs a second person.

    Raises:
        ConflictError: the name is taken.
        UsageError: name, match, window or calendar cannot be used.
    """
    owner = releases.find_product(session, product)
    if not NAME.fullmatch(name):
        raise UsageError(f"{name[:80]!r} cannot name a cohort", why=f"a name has the form {NAME.pattern}")
    if release is not None:
        require_release(session, owner, release)
    cohort = _make_or_revive(session, now, owner, name, release)
    spec = CohortSpec(
        match=_checked_match(match),
        priority=priority,
        pin=None,
        frozen=False,
        frozen_until=None,
        window=_checked_window(window),
        splay_s=splay_s,
        poll_s=poll_s,
        report_s=report_s,
        retry_epoch=0,
        approval=approval,
        lease=_checked_lease(lease),
        budget=_checked_budget(budget),
        calendar=_checked_calendar(calendar),
    )
    spec.actor, spec.reason = actor, reason
    _revise(session, now, cohort, spec)
    resettle(session, owner.id)
    refresh_directive(session, now, cohort)
    _note(session, now, actor, "cohort.create", cohort, match=match, priority=priority, release=release)
    return cohort


def _make_or_revive(session: Session, now: datetime, owner: Product, name: str, base: str | None) -> Cohort:
    """A deleted cohort's name comes back with its row, so that its directive's revisions go on growing."""
    cohort = session.scalar(select(Cohort).where(Cohort.product_id == owner.id, Cohort.name == name))
    if cohort is None:
        cohort = Cohort(product=owner, name=name, created_at=now, deleted_at=None)
        session.add(cohort)
        session.flush()
        session.add(CohortStatus(cohort_id=cohort.id, base=base, directive=None, due_at=None, updated_at=now))
    elif cohort.deleted_at is None:
        raise ConflictError(f"{owner.name} has a cohort {name} already", then=f"release cohort show {name}")
    else:
        cohort.deleted_at = None
        status = status_of(session, cohort.id)
        status.base, status.frozen_by, status.frozen_by_hand = base, None, False
        status.frozen_until = status.frozen_by_hand_until = None
    session.flush()
    return cohort


EDITABLE = (
    "match",
    "priority",
    "poll_s",
    "report_s",
    "splay_s",
    "window",
    "approval",
    "lease",
    "budget",
    "calendar",
)


def edit(
    session: Session, now: datetime, actor: str, product: str, name: str, *, reason: str = "", **changes: Any
) -> Cohort:
    """Write a new revision with some of `EDITABLE` changed.

    Raises:
        UsageError: match, window or calendar cannot be used.
    """
    cohort = find(session, product, name)
    wanted = {
        key: CHECKS[key](value) if key in CHECKS else value
        for key, value in changes.items()
        if key in EDITABLE
    }
    _change(session, now, actor, cohort, reason=reason, **wanted)
    if {"match", "priority"} & wanted.keys():
        resettle(session, cohort.product_id)
    _note(session, now, actor, "cohort.edit", cohort, reason=reason, **wanted)
    return cohort


def delete(session: Session, now: datetime, actor: str, product: str, name: str, *, reason: str = "") -> None:
    """Remove a cohort; its agents go where their labels say, also those moved there by hand.

    Raises:
        ConflictError: a rollout is going on in it.
    """
    cohort = find(session, product, name)
    for rollout, status in unfinished(session, cohort.id):
        raise ConflictError(
            f"cohort {name} has a rollout going on",
            why=f"r-{rollout.id} is {status.state}",
            then=f"release rollout abort r-{rollout.id}",
        )
    cohort.deleted_at = now
    here = update(Agent).where(Agent.cohort_id == cohort.id)
    session.execute(here.values(cohort_id=None, cohort_fixed=False))
    session.flush()
    resettle(session, cohort.product_id)
    _note(session, now, actor, "cohort.delete", cohort, reason=reason)


def pin(
    session: Session, now: datetime, actor: str, product: str, name: str, *, version: str, reason: str = ""
) -> Cohort:
    """Keep a cohort on one version, older or newer, until it is unpinned; a running rollout pauses.

    The pin becomes the cohort's base as well: taking the pin off moves nobody, only a rollout does.

    Raises:
        ConflictError: the version was yanked, or no signed way leads to it from where the cohort is.
    """
    cohort = find(session, product, name)
    release, base = require_release(session, cohort.product, version), status_of(session, cohort.id).base
    if base != version:
        ways.check(session, cohort, release, base, downgrade=True)
    _change(session, now, actor, cohort, reason=reason, begins="pin", base=version, pin=version)
    _note(session, now, actor, "cohort.pin", cohort, version=version, reason=reason)
    return cohort


def unpin(
    session: Session, now: datetime, actor: str, product: str, name: str, *, reason: str = ""
) -> Cohort:
    """Let a cohort take new releases again; a rollout that the pin paused waits to be resumed."""
    cohort = find(session, product, name)
    _change(session, now, actor, cohort, reason=reason, ends="pin", pin=None)
    _note(session, now, actor, "cohort.unpin", cohort, reason=reason)
    return cohort


def freeze(
    session: Session,
    now: datetime,
    actor: str,
    product: str,
    name: str,
    *,
    until: datetime | None = None,
    reason: str = "",
) -> Cohort:
    """Let a cohort take nothing new, until a moment or until unfrozen; a rollout's deadlines stand still.

    Raises:
        UsageError: `until` has passed.
    """
    if until is not None and until <= now:
        raise UsageError("the freeze would be over already", then="give a time in the future")
    cohort = find(session, product, name)
    _change(session, now, actor, cohort, reason=reason, begins="freeze", frozen=True, frozen_until=until)
    _note(session, now, actor, "cohort.freeze", cohort, until=until, reason=reason)
    return cohort


def unfreeze(
    session: Session, now: datetime, actor: str, product: str, name: str, *, reason: str = ""
) -> Cohort:
    """End a freeze; what was going on goes on."""
    cohort = find(session, product, name)
    _change(session, now, actor, cohort, reason=reason, ends="freeze", frozen=False, frozen_until=None)
    _note(session, now, actor, "cohort.unfreeze", cohort, reason=reason)
    return cohort


def bump_retry(session: Session, now: datetime, actor: str, cohort: Cohort, reason: str = "") -> None:
    """Let agents try bundles once more that failed on them."""
    epoch = newest_spec(session, cohort.id).retry_epoch + 1
    _change(session, now, actor, cohort, reason=reason, retry_epoch=epoch)


def _checked_match(match: str) -> str:
    parse(match)
    return match.strip()


def _checked_window(window: dict[str, Any] | None) -> dict[str, Any] | None:
    if window is None:
        return None
    checked = Window.from_json(window, "window")
    try:
        ZoneInfo(checked.zone)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        raise UsageError(
            f"window.zone {checked.zone[:64]!r} is not a time zone", then="for example: Europe/Berlin"
        ) from None
    return checked.to_json()


def _checked_lease(lease: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if lease is None else LeaseTerms.from_json(lease, "lease").to_json()


def _checked_budget(budget: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if budget is None else BudgetTerms.from_json(budget, "budget").to_json()


def _checked_calendar(calendar: dict[str, str] | None) -> dict[str, str]:
    try:
        return freezes.check(calendar or {})
    except ValueError as error:
        raise UsageError(
            "the calendar cannot be used",
            why=str(error),
            then="for example: year-end=12-20..01-04 Europe/Berlin",
            reason="bad-calendar",
        ) from None


CHECKS: dict[str, Callable[[Any], Any]] = {
    "match": _checked_match,
    "window": _checked_window,
    "lease": _checked_lease,
    "budget": _checked_budget,
    "calendar": _checked_calendar,
}
"""How each of `EDITABLE` that can be wrong is looked at before it is written."""
COPIED = (
    "match",
    "priority",
    "pin",
    "frozen",
    "frozen_until",
    "window",
    "splay_s",
    "poll_s",
    "report_s",
    "retry_epoch",
    "approval",
    "lease",
    "budget",
    "calendar",
    "because",
)


def _change(
    session: Session,
    now: datetime,
    actor: str,
    cohort: Cohort,
    *,
    reason: str,
    begins: str = "",
    ends: str = "",
    base: str | None = None,
    **changes: Any,
) -> None:
    """Write the next revision: the newest one with `changes`; and the directive that follows from it.

    Args:
        begins, ends: `pin` or `freeze`, for which this actor and reason stand from now on, or none any more.
    """
    due_at = status_of(session, cohort.id).due_at
    if due_at is not None and due_at <= now:
        refresh_due(session, now)  # what time has brought is told before what a person does
    newest = newest_spec(session, cohort.id)
    spec = CohortSpec(**{name: getattr(newest, name) for name in COPIED} | changes)
    spec.because = {act: said for act, said in newest.because.items() if act not in (begins, ends)}
    if begins:
        spec.because[begins] = {"actor": actor, "reason": reason, "at": iso(now)}
    spec.actor, spec.reason = actor, reason
    _revise(session, now, cohort, spec)
    refresh_directive(session, now, cohort, base=base, act=standstill.Act(actor, reason))


def _revise(session: Session, now: datetime, cohort: Cohort, spec: CohortSpec) -> None:
    newest = select(func.max(CohortSpec.revision)).where(CohortSpec.cohort_id == cohort.id)
    spec.cohort_id = cohort.id
    spec.revision = (session.scalar(newest) or 0) + 1
    spec.created_at = now
    session.add(spec)
    session.flush()


def _note(session: Session, now: datetime, actor: str, action: str, cohort: Cohort, **detail: Any) -> None:
    audit.record(session, now, actor, action, f"{cohort.product.name}/{cohort.name}", **detail)


# --- the word --------------------------------------------------------------------------------------------


def _newest_rollout(session: Session, cohort_id: int) -> tuple[Rollout, RolloutStatus, Release] | None:
    row = session.execute(
        select(Rollout, RolloutStatus, Release)
        .join(RolloutStatus, RolloutStatus.rollout_id == Rollout.id)
        .join(Release, Release.id == Rollout.release_id)
        .where(Rollout.cohort_id == cohort_id, RolloutStatus.stage_state != str(StageState.PENDING))
        .order_by(Rollout.id.desc())
        .limit(1)
        .execution_options(populate_existing=True)
    ).first()
    return None if row is None else (row[0], row[1], row[2])


def newest_rollout(session: Session, cohort_id: int) -> tuple[Rollout, RolloutStatus] | None:
    """The rollout that speaks for a cohort: the newest that has begun, whatever its state."""
    newest = _newest_rollout(session, cohort_id)
    return newest and newest[:2]


def unfinished(session: Session, cohort_id: int) -> list[tuple[Rollout, RolloutStatus]]:
    """The rollouts of a cohort that have not ended, begun or not, the newest first."""
    query = (
        select(Rollout, RolloutStatus)
        .join(RolloutStatus, RolloutStatus.rollout_id == Rollout.id)
        .where(Rollout.cohort_id == cohort_id, RolloutStatus.state.not_in(map(str, FINISHED)))
        .order_by(Rollout.id.desc())
        .execution_options(populate_existing=True)
    )
    return [(rollout, status) for rollout, status in session.execute(query)]


def refresh_directive(
    session: Session,
    now: datetime,
    cohort: Cohort,
    base: str | None = None,
    act: standstill.Act = standstill.BY_TIME,
    as_of: datetime | None = None,
) -> bool:
    """Make the cohort's directive anew; its revision grows only when its content changes.

    Args:
        base: the version the cohort has settled on from now on, when that changes.
        act: who led to it; the server where time did.
        as_of: when time did, where nobody was there to see it.

    Returns:
        Whether there is a new one to sign.

    Raises:
        ConflictError: another transaction changed the cohort meanwhile.
    """
    session.flush()
    status, spec = status_of(session, cohort.id), newest_spec(session, cohort.id)
    settled, moment = base or status.base, as_of or now
    facts = _facts(session, moment, cohort, spec, settled)
    rollout = _rollout_facts(session, cohort)
    made = directive_for(facts, rollout, status.directive_revision).to_json()
    changed = made != status.directive
    if changed:
        stir(session)
        made["revision"] = status.directive_revision + 1
    due_at, before = _changes_at(spec, moment), _told(status)
    stand = _stand(spec, moment, before)
    if not changed and (settled, due_at, stand) == (status.base, status.due_at, before):
        return False
    moved = settled != status.base
    _store(session, now, cohort, status, base=settled, made=made, due_at=due_at, stand=stand)
    if settled is not None and moved:
        ways.rebase(session, now, cohort, settled)
    standstill.tell(session, now, cohort, before, stand, replace(act, at=moment))
    return changed


def _told(status: CohortStatus) -> Stand:
    return Stand(status.frozen_by, status.frozen_until, status.frozen_by_hand, status.frozen_by_hand_until)


def _stand(spec: CohortSpec, now: datetime, before: Stand) -> Stand:
    """What freezes a cohort now; entries of its calendar without a gap between them are one freeze."""
    by_hand = is_frozen_by_hand(spec, now)
    freeze = freezes.standing(spec.calendar, now)
    hand_until = spec.frozen_until if by_hand else None
    if freeze is None:
        return Stand(by_hand=by_hand, hand_until=hand_until)
    goes_on = before.by in spec.calendar and before.until == freeze.until
    return Stand(before.by if goes_on else freeze.by, freeze.until, by_hand, hand_until)


def _changes_at(spec: CohortSpec, now: datetime) -> datetime | None:
    """When a freeze ends, or begins by the calendar; one by the calendar without end is looked at daily."""
    freeze = freezes.standing(spec.calendar, now)
    by_calendar = (
        (freeze.until or now + freezes.DAY) if freeze else freezes.next_beginning(spec.calendar, now)
    )
    by_hand = spec.frozen_until if is_frozen_by_hand(spec, now) else None
    return min(filter(None, (by_calendar, by_hand)), default=None)


def _store(
    session: Session,
    now: datetime,
    cohort: Cohort,
    seen: CohortStatus,
    *,
    base: str | None,
    made: dict[str, Any],
    due_at: datetime | None,
    stand: Stand,
) -> None:
    """Compare-and-swap on `edition`: of two that saw the same status one stores."""
    stored = session.execute(
        update(CohortStatus)
        .where(CohortStatus.cohort_id == cohort.id, CohortStatus.edition == seen.edition)
        .values(
            base=base,
            directive=made,
            directive_revision=made["revision"],
            due_at=due_at,
            frozen_by=stand.by,
            frozen_until=stand.until,
            frozen_by_hand=stand.by_hand,
            frozen_by_hand_until=stand.hand_until,
            edition=seen.edition + 1,
            updated_at=now,
        )
        .returning(CohortStatus.cohort_id)
        .execution_options(synchronize_session=False)
    ).first()
    if stored is None:
        raise ConflictError(f"cohort {cohort.name} was changed meanwhile", then="try again")


def refresh_due(session: Session, now: datetime) -> bool:
    """Make directives anew whose freeze has ended or begun by itself; says whether any changed.

    What began and ended while no jobs process was there is gone through in its order, so that it is told.
    """
    changed, seen = False, 0
    for _ in range(MOST_MISSED + 1):
        due = _due(session, now)
        if not due:
            break
        moment = due[0][1] if seen < MOST_MISSED else now
        for cohort, due_at in due:
            if due_at <= moment:
                changed = refresh_directive(session, now, cohort, as_of=moment) or changed
                seen += 1
    return changed


def _due(session: Session, now: datetime) -> list[tuple[Cohort, datetime]]:
    """Cohorts of which something changes by time by now, and when; the first first."""
    query = select(Cohort, CohortStatus.due_at).join(CohortStatus, CohortStatus.cohort_id == Cohort.id)
    due = query.where(CohortStatus.due_at <= now, Cohort.deleted_at.is_(None))
    found = session.execute(due.order_by(CohortStatus.due_at, Cohort.id))
    return [(cohort, due_at) for cohort, due_at in found if due_at is not None]


def _facts(
    session: Session, now: datetime, cohort: Cohort, spec: CohortSpec, base: str | None
) -> CohortFacts:
    return CohortFacts(
        product=cohort.product.name,
        name=cohort.name,
        base=base,
        pin=spec.pin,
        pin_is_older=spec.pin is not None and _is_older(session, cohort, spec.pin, also_agents=True),
        base_is_older=base is not None and _is_older(session, cohort, base),
        frozen=is_frozen(spec, now),
        pace=pace_of(spec),
    )


def pace_of(spec: CohortSpec) -> Pace:
    """When and how fast its agents act, by one revision of what people want of a cohort."""
    return Pace(
        window=None if spec.window is None else Window.from_json(spec.window, "window"),
        lease=None if spec.lease is None else LeaseTerms.from_json(spec.lease, "lease"),
        budget=None if spec.budget is None else BudgetTerms.from_json(spec.budget, "budget"),
        splay_s=spec.splay_s,
        poll_s=spec.poll_s,
        report_s=spec.report_s,
        retry_epoch=spec.retry_epoch,
    )


def _rollout_facts(session: Session, cohort: Cohort) -> RolloutFacts | None:
    newest = _newest_rollout(session, cohort.id)
    if newest is None:
        return None
    rollout, status, _ = newest
    older = _is_older(session, cohort, rollout.version)
    return RolloutFacts(rollout.version, rollout.salt, State(status.state), status.progress, older)


def _is_older(session: Session, cohort: Cohort, version: str, *, also_agents: bool = False) -> bool:
    """Whether agents of the cohort may run something newer: what it was ever led to, or what they report.

    The cohort's last word is part of that: where it led agents back to `version`, one may still be away.
    """
    last = status_of(session, cohort.id).directive or {}
    if last.get("rollback") and last.get("release") == last.get("base") == version:
        return True
    led_to = [
        select(Rollout.version).where(Rollout.cohort_id == cohort.id),
        select(CohortSpec.pin).where(CohortSpec.cohort_id == cohort.id),
        select(CohortStatus.base).where(CohortStatus.cohort_id == cohort.id),
    ]
    if also_agents:
        led_to.append(select(Agent.version).where(Agent.cohort_id == cohort.id))
    here = select(Release.seq).where(Release.product_id == cohort.product_id)
    own = here.where(Release.version == version).scalar_subquery()
    newer = here.where(or_(*(Release.version.in_(query) for query in led_to)), Release.seq > own)
    return session.execute(newer.limit(1)).first() is not None
