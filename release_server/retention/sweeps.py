"""What goes, kind by kind: each sweep takes one batch, and says where the next one begins.

A sweep removes what is over and nothing that anybody can still need; each says beside its query why that is
so. Whatever it does may be done again: a batch that was cut is a batch that was not there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy import and_, delete, exists, func, or_, select, update
from sqlalchemy.orm import aliased

from keys.roles import COHORTS, SNAPSHOT, TARGETS, TIMESTAMP
from release_server import attempts, repository
from release_server.models import (
    ActivationLease,
    Agent,
    AgentEvent,
    Attempt,
    DownloadShare,
    KeptAnswer,
    MetadataFile,
    PersonSession,
    Proposal,
    Rollout,
    RolloutEvent,
    RolloutStatus,
    Token,
    WebhookDelivery,
    WebhookSecret,
)
from release_server.proposals import OPEN
from release_server.retention.settings import ANSWERS
from release_server.rollout import FINISHED, StageState
from release_server.signing.policy import MOST_FIRST
from release_server.webhooks.outbox import Kept

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy import ColumnElement, Select
    from sqlalchemy.orm import InstrumentedAttribute, Session

    from release_server.blobs import Blobs
    from release_server.retention.settings import Retention

AGENTS = 100
"""How many agents one batch looks at."""
FILES = 100
LARGE = 20
"""How many rows one batch takes that may be megabytes each."""


@dataclass(frozen=True)
class Turn:
    """One batch of one sweep.

    Attributes:
        before: what was over before this time goes.
        cursor: where the batch before ended; empty at the beginning.
        most: how many rows may go.
        metadata: the directory of the exported files.
    """

    now: datetime
    before: datetime
    cursor: str
    most: int
    keep: Retention
    blobs: Blobs
    metadata: Path


@dataclass(frozen=True)
class Step:
    """What one batch did: how much went, and where the next begins; None when the sweep is through."""

    removed: int
    cursor: str | None = None


@dataclass(frozen=True)
class Sweep:
    """How one kind goes.

    Attributes:
        rows: one batch, in a transaction that writes.
        files: one batch outside of any.
        timed: whether a setting says how long it is kept; otherwise it goes when its own time has come.
    """

    rows: Callable[[Session, Turn], Step] | None = None
    files: Callable[[Turn], Step] | None = None
    timed: bool = True


def _remove(session: Session, key: InstrumentedAttribute[Any], doomed: Select[Any], most: int) -> int:
    """Delete at most `most` rows whose keys `doomed` selects."""
    keys = session.scalars(doomed.limit(most)).all()
    if keys:
        session.execute(delete(key.class_).where(key.in_(keys)).execution_options(synchronize_session=False))
    return len(keys)


def _all_of(session: Session, key: InstrumentedAttribute[Any], turn: Turn, most: int, *over: Any) -> Step:
    """One batch of a table small enough to be looked through from its beginning."""
    most = min(most, turn.most)
    removed = _remove(session, key, select(key).where(*over).order_by(key), most)
    return Step(removed, "" if removed == most else None)


# --- agents ----------------------------------------------------------------------------------------------


def events(session: Session, turn: Turn) -> Step:
    """What agents reported, but for the newest of each: those are the history that people look at.

    A report that is sent again brings nothing back: `Agent.accepted` stands above what was taken in.
    """
    page = session.scalars(
        select(Agent.id).where(Agent.id > turn.cursor).order_by(Agent.id).limit(AGENTS)
    ).all()
    if not page:
        return Step(0)
    newer = aliased(AgentEvent)
    oldest_kept = (
        select(newer.number)
        .where(newer.agent_id == AgentEvent.agent_id)
        .order_by(newer.number.desc())
        .offset(turn.keep.events_kept - 1)
        .limit(1)
        .scalar_subquery()
    )
    doomed = (
        select(AgentEvent.id)
        .where(AgentEvent.agent_id > turn.cursor, AgentEvent.agent_id <= page[-1])
        .where(AgentEvent.received_at < turn.before, AgentEvent.number < oldest_kept)
    )
    removed = _remove(session, AgentEvent.id, doomed, turn.most)
    if removed == turn.most:
        return Step(removed, turn.cursor)
    return Step(removed, page[-1] if len(page) == AGENTS else None)


def retired_agents(session: Session, turn: Turn) -> Step:
    """What a retired agent was and did. Its id, its key and when it was retired stay as a tombstone.

    Without that its host could enrol again with the key that was refused, or another under its name.
    """
    retired = select(Agent).where(Agent.retired_at < turn.before, Agent.id > turn.cursor)
    page = session.scalars(retired.order_by(Agent.id).limit(AGENTS)).all()
    told = select(AgentEvent.id).where(AgentEvent.agent_id.in_([agent.id for agent in page]))
    removed = _remove(session, AgentEvent.id, told, turn.most)
    if removed == turn.most:
        return Step(removed, turn.cursor)
    for agent in page:
        _bury(agent)
    return Step(removed, page[-1].id if len(page) == AGENTS else None)


def _bury(agent: Agent) -> None:
    agent.inventory, agent.labels, agent.operator_labels, agent.figures = {}, {}, {}, {}
    agent.reason = agent.detail = ""
    agent.session_hash = agent.session_until = None
    agent.cohort_id = agent.token_id = None


# --- rollouts --------------------------------------------------------------------------------------------


def rollouts(session: Session, turn: Turn) -> Step:
    """Attempts and history of a rollout that is over and was followed by another of its cohort.

    Its counters stay: they are the baseline that later rollouts are held against. It is marked first, so that
    a report that comes late begins no attempt anew, which the counters hold already (`Rollout.pruned_at`).
    """
    rollout_id = session.scalar(_prunable(turn).order_by(Rollout.id).limit(1))
    if rollout_id is None:
        return Step(0)
    marked = session.execute(
        update(Rollout)
        .where(Rollout.id == rollout_id, Rollout.pruned_at.is_(None))
        .values(pruned_at=turn.now)
        .returning(Rollout.id)
        .execution_options(synchronize_session=False)
    ).first()
    if marked is not None:
        attempts.keep_sent_back(session, rollout_id)
    removed = 0
    for key, owner in ((Attempt.id, Attempt.rollout_id), (RolloutEvent.id, RolloutEvent.rollout_id)):
        if removed < turn.most:
            removed += _remove(session, key, select(key).where(owner == rollout_id), turn.most - removed)
    return Step(removed, turn.cursor if removed == turn.most else str(rollout_id))


def _prunable(turn: Turn) -> Select[int]:
    later, began = aliased(Rollout), aliased(RolloutStatus)
    followed = exists().where(
        later.cohort_id == Rollout.cohort_id,
        later.id > Rollout.id,
        began.rollout_id == later.id,
        began.stage_state != str(StageState.PENDING),
    )
    left = or_(
        Rollout.pruned_at.is_(None),
        exists().where(Attempt.rollout_id == Rollout.id),
        exists().where(RolloutEvent.rollout_id == Rollout.id),
    )
    return (
        select(Rollout.id)
        .join(RolloutStatus, RolloutStatus.rollout_id == Rollout.id)
        .where(Rollout.id > int(turn.cursor or 0), followed, left)
        .where(RolloutStatus.state.in_([str(state) for state in FINISHED]))
        .where(RolloutStatus.finished_at < turn.before, RolloutStatus.watch_at.is_(None))
    )


# --- signed metadata -------------------------------------------------------------------------------------


def online_metadata(session: Session, turn: Turn) -> Step:
    """Superseded cohorts, snapshots and timestamps; whoever still holds a timestamp that has not expired
    finds all that it names, since a day is the shortest time that can be set, and a timestamp's life.
    """
    return _prune_roles(session, turn, COHORTS, SNAPSHOT, TIMESTAMP)


def targets(session: Session, turn: Turn) -> Step:
    """Superseded targets. A server that was restored from a backup follows them one by one."""
    return _prune_roles(session, turn, TARGETS)


def _prune_roles(session: Session, turn: Turn, *roles: str) -> Step:
    named = repository.named_by_newest(session)
    for role in roles:
        doomed = _superseded(role, turn.before).where(MetadataFile.version < named.get(role, 0))
        versions = session.scalars(doomed.order_by(MetadataFile.version).limit(LARGE)).all()
        if versions:
            _unlink(turn.metadata, role, versions)
            session.execute(
                delete(MetadataFile)
                .where(MetadataFile.role == role, MetadataFile.version.in_(versions))
                .execution_options(synchronize_session=False)
            )
            return Step(len(versions), "")
    return Step(0)


def _superseded(role: str, before: datetime) -> Select[int]:
    """Versions of a role that were not the newest at any time since `before`.

    The newest that was not run forward by a thief stays too: versions go on from there once his keys count
    no more (`repository.forget_run_forward`).
    """
    of_role = MetadataFile.role == role
    newest = select(func.max(MetadataFile.version))
    then = newest.where(of_role, MetadataFile.created_at < before).scalar_subquery()
    honest = newest.where(of_role, MetadataFile.version <= MOST_FIRST).scalar_subquery()
    return select(MetadataFile.version).where(
        of_role, MetadataFile.version < then, MetadataFile.version != honest
    )


def _unlink(directory: Path, role: str, versions: Iterable[int]) -> None:
    """Files go before their rows: what is cut in between is found again by the rows."""
    for version in versions:
        (directory / f"{version}.{role}.json").unlink(missing_ok=True)


# --- people ----------------------------------------------------------------------------------------------


def _not_the_last(key: InstrumentedAttribute[int]) -> ColumnElement[bool]:
    """The highest number stays: it would be given again, and the audit log speaks of it."""
    return key < select(func.max(key)).scalar_subquery()


def dead_tokens(session: Session, turn: Turn) -> Step:
    """Tokens that nobody can use any more, and that no agent names as its own."""
    used_up = and_(Token.uses_left <= 0, Token.used_at < turn.before)
    over = or_(Token.revoked_at < turn.before, Token.expires_at < turn.before, used_up)
    named = exists().where(Agent.token_id == Token.id)
    return _all_of(session, Token.id, turn, turn.most, over, ~named, _not_the_last(Token.id))


def closed_proposals(session: Session, turn: Turn) -> Step:
    """Proposals that nobody can sign any more; what was published of them is in the targets."""
    expired = and_(Proposal.state == OPEN, Proposal.expires_at < turn.before)
    over = or_(Proposal.closed_at < turn.before, expired)
    return _all_of(session, Proposal.id, turn, LARGE, over, _not_the_last(Proposal.id))


def ended_sessions(session: Session, turn: Turn) -> Step:
    """Sessions past their date: they are refused whether they are known or not."""
    return _all_of(session, PersonSession.id, turn, turn.most, PersonSession.expires_at <= turn.now)


def ended_leases(session: Session, turn: Turn) -> Step:
    """Leases whose time is over; whoever asks for one counts them no more either."""
    return _all_of(session, ActivationLease.agent_id, turn, turn.most, ActivationLease.until <= turn.now)


def ended_shares(session: Session, turn: Turn) -> Step:
    """Shares of a budget whose time is over; whoever asks for one counts them no more either."""
    return _all_of(session, DownloadShare.agent_id, turn, turn.most, DownloadShare.until <= turn.now)


def kept_answers(session: Session, turn: Turn) -> Step:
    """Answers whose `Idempotency-Key` is a new one by now."""
    over = select(KeptAnswer.person, KeptAnswer.key).where(KeptAnswer.at <= turn.now - ANSWERS)
    keys = session.execute(over.limit(turn.most)).all()
    for person, key in keys:
        session.execute(delete(KeptAnswer).where(KeptAnswer.person == person, KeptAnswer.key == key))
    return Step(len(keys), "" if len(keys) == turn.most else None)


# --- webhooks --------------------------------------------------------------------------------------------


def ended_deliveries(session: Session, turn: Turn) -> Step:
    """What a webhook has taken, or what was given up; its number goes on by the webhook's own count."""
    ended = WebhookDelivery.state.in_([Kept.SENT, Kept.DEAD])
    over = and_(ended, WebhookDelivery.created_at < turn.before)
    return _all_of(session, WebhookDelivery.id, turn, turn.most, over)


def ended_secrets(session: Session, turn: Turn) -> Step:
    """What secrets of webhooks were made of that have ended; nothing is signed with them any more."""
    return _all_of(session, WebhookSecret.id, turn, turn.most, WebhookSecret.until <= turn.now)


# --- files -----------------------------------------------------------------------------------------------


def abandoned_uploads(turn: Turn) -> Step:
    """Pieces of uploads that stopped; whoever sends one now holds it."""
    return Step(*turn.blobs.drop_abandoned(turn.before.timestamp(), FILES, turn.cursor))


SWEEPS = {
    "leases": Sweep(ended_leases, timed=False),
    "shares": Sweep(ended_shares, timed=False),
    "sessions": Sweep(ended_sessions, timed=False),
    "answers": Sweep(kept_answers, timed=False),
    "secrets": Sweep(ended_secrets, timed=False),
    "tokens": Sweep(dead_tokens),
    "deliveries": Sweep(ended_deliveries),
    "proposals": Sweep(closed_proposals),
    "uploads": Sweep(files=abandoned_uploads),
    "metadata": Sweep(online_metadata),
    "targets": Sweep(targets),
    "agents": Sweep(retired_agents),
    "rollouts": Sweep(rollouts),
    "events": Sweep(events),
}
"""Kind → how it goes, in this order. What has no line here is kept for ever: the audit log, roots, what
people wanted (specs), releases and blobs; see docs/decisions/0023."""
