"""Cohorts: who belongs where, what people want of each, and the word the server has for it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sqlalchemy import func, or_, select, update

from agent_core.errors import ConflictError, NotFoundError, UsageError
from agent_core.wire import LABEL_KEY, NAME, LeaseTerms, Window
from release_server import audit, releases
from release_server.directives import CohortFacts, RolloutFacts, directive_for
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
from release_server.rollout import FINISHED, StageState, State

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy import ColumnElement
    from sqlalchemy.orm import Session

LABEL_VALUE = re.compile(r"[^\s,=!]{0,256}")


# --- the match language ----------------------------------------------------------------------------------


class Operator(StrEnum):
    EQUALS = "="
    DIFFERS = "!="
    EXISTS = "exists"
    MISSING = "!"


@dataclass(frozen=True)
class Term:
    """One condition on one label; `key!=value` also holds where the label is missing."""

    key: str
    operator: Operator
    value: str = ""

    def holds(self, labels: Mapping[str, str]) -> bool:
        match self.operator:
            case Operator.EQUALS:
                return labels.get(self.key) == self.value
            case Operator.DIFFERS:
                return labels.get(self.key) != self.value
            case Operator.EXISTS:
                return self.key in labels
            case Operator.MISSING:
                return self.key not in labels


@dataclass(frozen=True)
class Match:
    """Terms that must all hold; none at all matches every agent."""

    terms: tuple[Term, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        return all(term.holds(labels) for term in self.terms)


def parse(text: str) -> Match:
    """Read `key=value`, `key!=value`, `key` and `!key`, separated by commas; empty matches every agent.

    Raises:
        UsageError: reason `bad-match`, naming the term that cannot be read.
    """
    if not text.strip():
        return Match()
    return Match(tuple(_term(part.strip()) for part in text.split(",")))


def _term(text: str) -> Term:
    if "!=" in text:
        key, _, value = text.partition("!=")
        term = Term(key.strip(), Operator.DIFFERS, value.strip())
    elif "=" in text:
        key, _, value = text.partition("=")
        term = Term(key.strip(), Operator.EQUALS, value.strip())
    elif text.startswith("!"):
        term = Term(text[1:].strip(), Operator.MISSING)
    else:
        term = Term(text, Operator.EXISTS)
    if not LABEL_KEY.fullmatch(term.key) or not LABEL_VALUE.fullmatch(term.value):
        raise UsageError(
            f"the match cannot be read at {text!r}",
            why="a term is key=value, key!=value, key or !key; keys are lower case, values have no spaces",
            then="for example: region=eu,tier!=db",
            reason="bad-match",
        )
    return term


@dataclass(frozen=True)
class Candidate:
    """A cohort as far as choosing needs it."""

    cohort_id: int
    name: str
    priority: int
    match: Match


def choose(candidates: Iterable[Candidate], labels: Mapping[str, str]) -> int | None:
    """The one cohort for these labels: highest priority, then most terms, then first by name.

    Returns:
        Its id, or None when none matches.
    """
    fitting = [candidate for candidate in candidates if candidate.match.matches(labels)]
    best = min(fitting, key=lambda fit: (-fit.priority, -len(fit.match.terms), fit.name), default=None)
    return best.cohort_id if best else None


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


def is_newest() -> ColumnElement[bool]:
    """The condition that a joined `CohortSpec` is its cohort's newest revision."""
    newer = select(func.max(CohortSpec.revision).label("revision")).where(CohortSpec.cohort_id == Cohort.id)
    return CohortSpec.revision == newer.correlate(Cohort).scalar_subquery()


def newest_spec(session: Session, cohort_id: int) -> CohortSpec:
    query = select(CohortSpec).where(CohortSpec.cohort_id == cohort_id)
    return session.scalars(query.order_by(CohortSpec.revision.desc()).limit(1)).one()


def status_of(session: Session, cohort_id: int) -> CohortStatus:
    return session.get_one(CohortStatus, cohort_id, populate_existing=True)


def is_frozen(spec: CohortSpec, now: datetime) -> bool:
    return spec.frozen and (spec.frozen_until is None or now < spec.frozen_until)


@dataclass(frozen=True)
class View:
    """A cohort as people see it."""

    cohort: Cohort
    spec: CohortSpec
    status: CohortStatus
    agents: int
    frozen: bool


def list_cohorts(session: Session, now: datetime, product: str | None = None) -> list[View]:
    """All cohorts, or those of one product, by name."""
    query = _views()
    if product is not None:
        query = query.where(Cohort.product_id == releases.find_product(session, product).id)
    return [_view(row, now) for row in session.execute(query.order_by(Cohort.product_id, Cohort.name))]


def show(session: Session, now: datetime, product: str, name: str) -> View:
    cohort = find(session, product, name)
    return _view(session.execute(_views().where(Cohort.id == cohort.id)).one(), now)


def _views() -> Any:
    agents = (
        select(func.count(Agent.id))
        .where(Agent.cohort_id == Cohort.id, Agent.retired_at.is_(None))
        .correlate(Cohort)
        .scalar_subquery()
    )
    return (
        select(Cohort, CohortSpec, CohortStatus, agents)
        .join(CohortSpec, CohortSpec.cohort_id == Cohort.id)
        .join(CohortStatus, CohortStatus.cohort_id == Cohort.id)
        .where(Cohort.deleted_at.is_(None), is_newest())
        .execution_options(populate_existing=True)
    )


def _view(row: Any, now: datetime) -> View:
    cohort, spec, status, agents = row
    return View(cohort, spec, status, agents, is_frozen(spec, now))


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
    reason: str = "",
) -> Cohort:
    """Make a cohort; agents whose labels match move into it.

    Args:
        release: the version its agents start from; without one they stay as they are until a rollout.
        approval: each rollout here needs a second person.

    Raises:
        ConflictError: the name is taken.
        UsageError: name, match or window cannot be used.
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
    )
    spec.actor, spec.reason = actor, reason
    _revise(session, now, cohort, spec)
    reassign(session, owner.id)
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
        status_of(session, cohort.id).base = base
    session.flush()
    return cohort


EDITABLE = ("match", "priority", "poll_s", "report_s", "splay_s", "window", "approval", "lease")


def edit(
    session: Session, now: datetime, actor: str, product: str, name: str, *, reason: str = "", **changes: Any
) -> Cohort:
    """Write a new revision with some of `EDITABLE` changed.

    Raises:
        UsageError: the match or the window cannot be used.
    """
    cohort = find(session, product, name)
    if "match" in changes:
        changes["match"] = _checked_match(changes["match"])
    if "window" in changes:
        changes["window"] = _checked_window(changes["window"])
    if "lease" in changes:
        changes["lease"] = _checked_lease(changes["lease"])
    wanted = {key: value for key, value in changes.items() if key in EDITABLE}
    _change(session, now, actor, cohort, reason=reason, **wanted)
    if {"match", "priority"} & wanted.keys():
        reassign(session, cohort.product_id)
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
    reassign(session, cohort.product_id)
    _note(session, now, actor, "cohort.delete", cohort, reason=reason)


def pin(
    session: Session, now: datetime, actor: str, product: str, name: str, *, version: str, reason: str = ""
) -> Cohort:
    """Keep a cohort on one version, older or newer, until it is unpinned; a running rollout pauses.

    The pin becomes the cohort's base as well: taking the pin off moves nobody, only a rollout does.
    """
    cohort = find(session, product, name)
    require_release(session, cohort.product, version)
    _change(session, now, actor, cohort, reason=reason, base=version, pin=version)
    _note(session, now, actor, "cohort.pin", cohort, version=version, reason=reason)
    return cohort


def unpin(
    session: Session, now: datetime, actor: str, product: str, name: str, *, reason: str = ""
) -> Cohort:
    """Let a cohort take new releases again; a rollout that the pin paused waits to be resumed."""
    cohort = find(session, product, name)
    _change(session, now, actor, cohort, reason=reason, pin=None)
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
    _change(session, now, actor, cohort, reason=reason, frozen=True, frozen_until=until)
    _note(session, now, actor, "cohort.freeze", cohort, until=until, reason=reason)
    return cohort


def unfreeze(
    session: Session, now: datetime, actor: str, product: str, name: str, *, reason: str = ""
) -> Cohort:
    """End a freeze; what was going on goes on."""
    cohort = find(session, product, name)
    _change(session, now, actor, cohort, reason=reason, frozen=False, frozen_until=None)
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
)


def _change(
    session: Session,
    now: datetime,
    actor: str,
    cohort: Cohort,
    *,
    reason: str,
    base: str | None = None,
    **changes: Any,
) -> None:
    """Write the next revision: the newest one with `changes`; and the directive that follows from it."""
    newest = newest_spec(session, cohort.id)
    spec = CohortSpec(**{name: getattr(newest, name) for name in COPIED} | changes)
    spec.actor, spec.reason = actor, reason
    _revise(session, now, cohort, spec)
    refresh_directive(session, now, cohort, base=base)


def _revise(session: Session, now: datetime, cohort: Cohort, spec: CohortSpec) -> None:
    newest = select(func.max(CohortSpec.revision)).where(CohortSpec.cohort_id == cohort.id)
    spec.cohort_id = cohort.id
    spec.revision = (session.scalar(newest) or 0) + 1
    spec.created_at = now
    session.add(spec)
    session.flush()


def _note(session: Session, now: datetime, actor: str, action: str, cohort: Cohort, **detail: Any) -> None:
    audit.record(session, now, actor, action, f"{cohort.product.name}/{cohort.name}", **detail)


# --- who belongs where -----------------------------------------------------------------------------------


def labels_of(agent: Agent) -> dict[str, str]:
    """An agent's labels; an operator's word goes before the host's."""
    return {**agent.labels, **agent.operator_labels}


def candidates(session: Session, product_id: int) -> list[Candidate]:
    """The cohorts of a product, ready for `choose`."""
    rows = session.execute(
        select(Cohort.id, Cohort.name, CohortSpec.priority, CohortSpec.match)
        .join(CohortSpec, CohortSpec.cohort_id == Cohort.id)
        .where(Cohort.product_id == product_id, Cohort.deleted_at.is_(None), is_newest())
    )
    return [Candidate(cohort_id, name, priority, parse(match)) for cohort_id, name, priority, match in rows]


def place(session: Session, agent: Agent) -> None:
    """Put one agent where its labels say, unless an operator has moved it by hand or not let it in yet."""
    if not agent.cohort_fixed and not agent.pending:
        agent.cohort_id = choose(candidates(session, agent.product_id), labels_of(agent))


def reassign(session: Session, product_id: int) -> int:
    """Put all agents of a product where their labels say; called when cohorts change, never per poll.

    Returns:
        How many moved.
    """
    offered = candidates(session, product_id)
    moves: dict[int | None, list[str]] = {}
    for agent_id, labels, own, cohort_id in session.execute(_movable(product_id)):
        chosen = choose(offered, {**labels, **own})
        if chosen != cohort_id:
            moves.setdefault(chosen, []).append(agent_id)
    for chosen, agent_ids in moves.items():
        for some in _chunks(agent_ids):
            session.execute(update(Agent).where(Agent.id.in_(some)).values(cohort_id=chosen))
    return sum(map(len, moves.values()))


def _movable(product_id: int) -> Any:
    return select(Agent.id, Agent.labels, Agent.operator_labels, Agent.cohort_id).where(
        Agent.product_id == product_id,
        Agent.cohort_fixed.is_(False),
        Agent.pending.is_(False),
        Agent.retired_at.is_(None),
    )


def _chunks(names: Sequence[str], size: int = 500) -> Iterable[Sequence[str]]:
    return (names[start : start + size] for start in range(0, len(names), size))


@dataclass(frozen=True)
class Preview:
    """Whom a match would put into a cohort, and who would come and go for it; names in order."""

    match: str
    inside: list[str]
    joins: list[str]
    leaves: list[str]


def preview(session: Session, product: str, name: str, match: str | None = None) -> Preview:
    """Say who would be in the cohort if it matched `match` (None: as it does now); changes nothing.

    Raises:
        UsageError: the match cannot be read.
    """
    cohort = find(session, product, name)
    tried = newest_spec(session, cohort.id).match if match is None else match.strip()
    wanted = parse(tried)
    offered = [
        replace(entry, match=wanted) if entry.cohort_id == cohort.id else entry
        for entry in candidates(session, cohort.product_id)
    ]
    fixed = select(Agent.id).where(
        Agent.cohort_id == cohort.id, Agent.cohort_fixed.is_(True), Agent.retired_at.is_(None)
    )
    inside, joins, leaves = list(session.scalars(fixed)), [], []
    for agent_id, labels, own, cohort_id in session.execute(_movable(cohort.product_id)):
        fits, was = choose(offered, {**labels, **own}) == cohort.id, cohort_id == cohort.id
        if fits:
            inside.append(agent_id)
        if fits and not was:
            joins.append(agent_id)
        if was and not fits:
            leaves.append(agent_id)
    return Preview(tried, sorted(inside), sorted(joins), sorted(leaves))


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


def refresh_directive(session: Session, now: datetime, cohort: Cohort, base: str | None = None) -> bool:
    """Make the cohort's directive anew; its revision grows only when its content changes.

    Args:
        base: the version the cohort has settled on from now on, when that changes.

    Returns:
        Whether there is a new one to sign.

    Raises:
        ConflictError: another transaction changed the cohort meanwhile.
    """
    session.flush()
    status, spec = status_of(session, cohort.id), newest_spec(session, cohort.id)
    settled = base or status.base
    facts = _facts(session, now, cohort, spec, settled)
    rollout = _rollout_facts(session, cohort)
    made = directive_for(facts, rollout, status.directive_revision).to_json()
    changed = made != status.directive
    if changed:
        made["revision"] = status.directive_revision + 1
    due_at = spec.frozen_until if facts.frozen else None
    if not changed and (settled, due_at) == (status.base, status.due_at):
        return False
    _store(session, now, cohort, status, base=settled, made=made, due_at=due_at)
    return changed


def _store(
    session: Session,
    now: datetime,
    cohort: Cohort,
    seen: CohortStatus,
    *,
    base: str | None,
    made: dict[str, Any],
    due_at: datetime | None,
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
            edition=seen.edition + 1,
            updated_at=now,
        )
        .returning(CohortStatus.cohort_id)
        .execution_options(synchronize_session=False)
    ).first()
    if stored is None:
        raise ConflictError(f"cohort {cohort.name} was changed meanwhile", then="try again")


def refresh_due(session: Session, now: datetime) -> bool:
    """Make directives anew whose freeze has ended by itself; says whether any changed."""
    due = select(Cohort).join(CohortStatus, CohortStatus.cohort_id == Cohort.id)
    ended = session.scalars(due.where(CohortStatus.due_at <= now, Cohort.deleted_at.is_(None))).all()
    changed = [cohort.id for cohort in ended if refresh_directive(session, now, cohort)]
    return bool(changed)


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
        window=None if spec.window is None else Window.from_json(spec.window, "window"),
        lease=None if spec.lease is None else LeaseTerms.from_json(spec.lease, "lease"),
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
