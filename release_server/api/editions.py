"""ETags of what several people change, and `If-Match`: nobody overwrites what they have not seen."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from flask import request

from agent_core.errors import ConflictError

if TYPE_CHECKING:
    from release_server import agents, cohort_view, rollout_view

STALE = "stale"
"""The reason that the API answers with 412."""


def of_cohort(view: cohort_view.View) -> str:
    """Grows with everything that people ask of a cohort."""
    return str(view.spec.revision)


def of_rollout(view: rollout_view.View) -> str:
    """Changes with everything that people ask of a rollout, and with every step that it takes."""
    return f"{view.spec.revision}.{view.status.edition}"


def of_agent(view: agents.View) -> str:
    """Changes with everything that people ask of an agent; what it reports itself is no edit.

    Nor is a cohort that it came into by its labels, which it reports.
    """
    agent = view.agent
    cohort = view.cohort if agent.cohort_fixed else None
    asked = [cohort, agent.cohort_fixed, agent.operator_labels, agent.pending, agent.retired_at is None]
    return sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


LOOK = "look at it and ask again"


def refuse_stale(what: str, edition: str, then: str = LOOK) -> None:
    """Refuse a request that was meant for another edition; one without `If-Match` is meant for any.

    Call it in the write transaction that changes, of which there is one at a time (decision 0019): of two
    that are meant for one edition the second finds the next.

    Args:
        then: what to do about it.

    Raises:
        ConflictError: `stale`.
    """
    if "If-Match" in request.headers and not request.if_match.contains(edition):
        raise _stale(what, edition, then)


def refuse_other(what: str, edition: str, seen: str) -> None:
    """The same for what a body says to have seen, where one request is about several things."""
    if seen != edition:
        raise _stale(what, edition)


def _stale(what: str, edition: str, then: str = LOOK) -> ConflictError:
    return ConflictError(
        f"{what} was changed meanwhile",
        why=f"its edition is {edition} by now, not the one that was looked at",
        then=then,
        reason=STALE,
    )


def tagged(
    body: dict[str, Any], edition: str, status: int = 200
) -> tuple[dict[str, Any], int, dict[str, str]]:
    """An answer with its ETag."""
    return body, status, {"ETag": f'"{edition}"'}
