"""Which version one agent should run, by the signed directive of its cohort: pure arithmetic.

Agent, server and simulator share this module: the place the server shows is the place the agent takes.
"""

from __future__ import annotations

from datetime import timedelta
from hashlib import sha256
from typing import TYPE_CHECKING

from agent_core.late import late_dataclass
from agent_core.wire import PROGRESS_FULL, Directive, Mode, Reason

if TYPE_CHECKING:
    from collections.abc import Iterable


@late_dataclass(frozen=True)
class Assignment:
    """The version an agent should run by its directive (None: nothing to install), and why.

    `version` is None whenever `reason` says that the agent stays as it is.
    """

    version: str | None
    reason: Reason
    in_progress: bool


def bucket(agent_id: str, salt: str) -> int:
    """Place an agent on a rollout's line; each rollout shuffles anew, so no host is always first.

    Args:
        agent_id: stable identity, any text.
        salt: the rollout's own, from the signed directive.

    Returns:
        Basis points in [0, 10_000); the agent is in when this is below `Directive.progress`.

    Source: design section 3; hash bucketing as Fedora CoreOS's rollout wariness, salted.
    """
    head = sha256((salt + agent_id).encode()).digest()[:8]
    return int.from_bytes(head, "big") * PROGRESS_FULL >> 64


def is_in_progress(directive: Directive, agent_id: str) -> bool:
    return bucket(agent_id, directive.salt) < directive.progress


def assign(directive: Directive, agent_id: str, running: str | None) -> Assignment:
    """Say which version `agent_id` should run.

    Args:
        directive: the cohort's, verified.
        agent_id: who asks.
        running: the version that is good there now; None before the first install.

    Returns:
        The version to move to with `UPDATE` or `FIRST_INSTALL`, or None with the reason to stay. A suspended
        cohort takes nothing new, but an agent that has nothing at all still gets the base.
    """
    inside = is_in_progress(directive, agent_id)
    if directive.mode is Mode.DISABLED:
        return Assignment(None, Reason.DISABLED, inside)
    if directive.mode is Mode.SUSPENDED:
        if running is None and directive.base is not None:
            return Assignment(directive.base, Reason.FIRST_INSTALL, in_progress=False)
        return Assignment(None, Reason.SUSPENDED, inside)
    wanted = directive.release if inside else directive.base
    if wanted is None:
        return Assignment(None, Reason.NOT_YET, inside)
    if wanted == running:
        at_base = not inside and directive.release not in (None, running)
        return Assignment(None, Reason.NOT_YET if at_base else Reason.UP_TO_DATE, inside)
    return Assignment(wanted, Reason.UPDATE if running else Reason.FIRST_INSTALL, inside)


def progress_for(agent_ids: Iterable[str], salt: str, count: int) -> int:
    """The least progress that takes in at least `count` of these agents.

    Args:
        agent_ids: all agents of the cohort.
        salt: the rollout's.
        count: how many should be in; all of them, or more, gives 10,000 so that newcomers are in as well.

    Returns:
        Basis points for `Directive.progress`; two agents in one basis point enter together.
    """
    places = sorted(bucket(agent_id, salt) for agent_id in agent_ids)
    if count <= 0:
        return 0
    if count >= len(places):
        return PROGRESS_FULL
    return places[count - 1] + 1


def splay(agent_id: str, directive: Directive) -> timedelta:
    """How long after first seeing a directive this agent begins: spread evenly, the same on every look."""
    if not directive.splay_s:
        return timedelta(0)
    head = sha256(f"splay:{directive.salt}:{agent_id}".encode()).digest()[:8]
    return timedelta(seconds=int.from_bytes(head, "big") * directive.splay_s / 2**64)
