"""How a rollout shuffles its cohort: a salt whose first stage is as asked, and falls on other hosts. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_core.directive import bucket, progress_for
from agent_core.wire import PROGRESS_FULL

if TYPE_CHECKING:
    from collections.abc import Collection, Hashable, Iterable, Mapping


def first_progress(strata: Mapping[str, Hashable], salt: str, count: int, *, each: bool) -> int:
    """The progress that takes in `count` agents, and with `each` one of every stratum.

    Args:
        strata: for each agent of the cohort what it represents, such as its site and platform.
    """
    least = progress_for(strata, salt, count)
    if not each:
        return least
    nearest: dict[Hashable, int] = {}
    for agent_id, stratum in strata.items():
        place = bucket(agent_id, salt)
        nearest[stratum] = min(place, nearest.get(stratum, PROGRESS_FULL))
    return max([least, *(place + 1 for place in nearest.values())])


def first_agents(agent_ids: Collection[str], salt: str, count: int) -> frozenset[str]:
    """The agents that a first stage of `count` took in."""
    progress = progress_for(agent_ids, salt, count)
    return frozenset(agent_id for agent_id in agent_ids if bucket(agent_id, salt) < progress)


def choose_salt(
    salts: Iterable[str],
    strata: Mapping[str, Hashable],
    count: int,
    *,
    each: bool = False,
    veterans: Collection[str] = (),
) -> str:
    """The salt whose first stage is nearest to `count` agents; of equal ones that with the fewest veterans.

    Two agents in one basis point enter together, but whoever asks for one canary wants one. `veterans` were
    first in the rollout before: the duty of the canary goes round.
    """

    def cost(salt: str) -> tuple[int, int]:
        progress = first_progress(strata, salt, count, each=each)
        first = [agent_id for agent_id in strata if bucket(agent_id, salt) < progress]
        return abs(len(first) - count), sum(agent_id in veterans for agent_id in first)

    best, least = "", (PROGRESS_FULL * PROGRESS_FULL, 0)
    for salt in salts:
        found = cost(salt)
        if not best or found < least:
            best, least = salt, found
        if least == (0, 0):
            break
    return best
