"""Stops offering a release: without a key, and for this server alone; the offline word is *revoked*."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_core.errors import ConflictError
from release_server import audit, fleet, releases
from release_server.models import RolloutStatus
from release_server.rollout import State

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.models import Release


def yank(session: Session, now: datetime, actor: str, product: str, version: str, reason: str) -> Release:
    """Stop offering a release: what rolls it out pauses, and no cohort is given it anew.

    Agents that run it go on; a cohort whose base it is keeps it until it is given another. To have every
    agent refuse it, whatever the server says, release managers revoke it.

    Raises:
        NotFoundError: no such release.
        ConflictError: it was yanked already.
    """
    release = releases.get_release(session, product, version)
    releases.refuse_yanked(release)
    release.yanked_at, release.yanked_by, release.yank_reason = now, actor, reason
    session.flush()
    for rollout_id in releases.reach(session, release).rollouts:
        if session.get_one(RolloutStatus, rollout_id).state in (State.SCHEDULED, State.RUNNING):
            fleet.pause(session, now, actor, rollout_id, f"{version} was yanked: {reason}")
    audit.record(session, now, actor, "release.yank", f"{product}/{version}", reason=reason)
    return release


def unyank(session: Session, now: datetime, actor: str, product: str, version: str, reason: str) -> Release:
    """Let a release be offered again; what was paused waits to be resumed.

    Raises:
        NotFoundError: no such release.
        ConflictError: it was not yanked.
    """
    release = releases.get_release(session, product, version)
    if release.yanked_at is None:
        raise ConflictError(f"{version} was not yanked", then=f"release show {version}")
    release.yanked_at, release.yanked_by, release.yank_reason = None, "", ""
    audit.record(session, now, actor, "release.unyank", f"{product}/{version}", reason=reason)
    return release
