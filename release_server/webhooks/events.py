"""This module knows what a webhook may be told, and in which words; pure.

Types and payloads follow the Standard Webhooks specification (1.0.0): a type is hierarchical, and says the
form of `data`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from agent_core.clock import iso
from agent_core.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from datetime import datetime

OF_ROLLOUTS = {
    "started": "rollout.stage_opened",
    "stage-opened": "rollout.stage_opened",
    "stage-passed": "rollout.stage_passed",
    "awaiting-approval": "rollout.awaiting_approval",
    "paused": "rollout.paused",
    "halted": "rollout.halted",
    "resumed": "rollout.resumed",
    "completed": "rollout.completed",
    "aborted": "rollout.aborted",
    "superseded": "rollout.superseded",
    "rolling-back": "rollout.rolling_back",
    "rolled-back": "rollout.rolled_back",
}
"""What each transition of `rollout.reconcile` is called elsewhere; the others are told to nobody."""
RELEASE_PUBLISHED = "release.published"
AGENT_WAITING = "agent.waiting"
COHORT_FROZEN, COHORT_UNFROZEN = "cohort.frozen", "cohort.unfrozen"
FLEET_STOPPED, FLEET_RESUMED = "fleet.stopped", "fleet.resumed"
TEST = "webhook.test"
TYPES: tuple[str, ...] = (
    *dict.fromkeys(OF_ROLLOUTS.values()),
    RELEASE_PUBLISHED,
    AGENT_WAITING,
    COHORT_FROZEN,
    COHORT_UNFROZEN,
    FLEET_STOPPED,
    FLEET_RESUMED,
)
ALL = "*"
LONGEST = 2000
"""So much of a text is told, so that a body stays far below the specification's 20 kB."""


def check_wanted(wanted: Sequence[str]) -> list[str]:
    """The types somebody asks for: names, all of one noun by `rollout.*`, or everything by `*`.

    Raises:
        UsageError: there are none, or one that nothing is ever called.
    """
    for said in wanted:
        if not any(is_wanted(known, [said]) for known in TYPES):
            raise UsageError(
                f"there is no event {said[:64]!r}",
                why=f"these are told: {', '.join(TYPES)}",
                then="`rollout.*` stands for all of rollouts, `*` for everything",
                reason="bad-event",
            )
    if not wanted:
        raise UsageError("no event is asked for", then="`*` stands for everything", reason="bad-event")
    return sorted(set(wanted))


def is_wanted(kind: str, wanted: Collection[str]) -> bool:
    return bool({kind, f"{kind.partition('.')[0]}.*", ALL} & set(wanted))


def body(kind: str, at: datetime, sequence: int, data: Mapping[str, Any]) -> str:
    """The text that is signed and sent, the same at every try.

    Args:
        sequence: counts what one webhook is told, without gaps.
    """
    said = {"type": kind, "timestamp": iso(at), "sequence": sequence, "data": bounded(data)}
    return json.dumps(said, ensure_ascii=True, separators=(",", ":"))


def bounded(data: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value[:LONGEST] if isinstance(value, str) else value for name, value in data.items()}
