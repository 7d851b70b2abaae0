"""What people ask of rollouts: revisions that never change, each whole by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import select

from release_server.models import RolloutSpec

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.rollout import Wanted

KEPT = ("stages", "terms", "advance_to", "approved")
"""What the next revision says as well, unless it says otherwise."""


def ask(
    session: Session,
    now: datetime,
    actor: str,
    rollout_id: int,
    *,
    wanted: Wanted,
    reason: str,
    **changes: Any,
) -> None:
    """Write down the next revision of what is wanted; what is not said stays."""
    newest = session.scalar(_specs(rollout_id).limit(1))
    kept = {name: getattr(newest, name) for name in KEPT} if newest else {}
    session.add(
        RolloutSpec(
            rollout_id=rollout_id,
            revision=newest.revision + 1 if newest else 1,
            wanted=str(wanted),
            actor=actor,
            reason=reason,
            created_at=now,
            **(kept | changes),
        )
    )
    session.flush()


def newest_spec(session: Session, rollout_id: int) -> RolloutSpec:
    """The newest revision."""
    spec: RolloutSpec = session.scalars(_specs(rollout_id).limit(1)).one()
    return spec


def _specs(rollout_id: int) -> Any:
    return (
        select(RolloutSpec).where(RolloutSpec.rollout_id == rollout_id).order_by(RolloutSpec.revision.desc())
    )
