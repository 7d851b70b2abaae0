"""The settings of retention: how long each kind of thing is kept that nobody needs any more."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Self

from agent_core.settings import Setting

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from agent_core.settings import Settings

SECTION = "retention"
ANSWERS = timedelta(hours=24)
"""How long the answer to an `Idempotency-Key` is known; the same key is a new one afterwards."""


def _days(kind: str, default: int, said: str) -> Setting:
    name = f"{SECTION}.{kind}_days"
    return Setting(name, int, default, f"{said}; 0: for ever", "days", low=0, high=36_500)


KINDS = [
    _days("events", 90, "how long what an agent reported is kept, but for its newest"),
    _days("rollouts", 365, "how long the attempts and the history of a rollout that is over are kept"),
    _days("agents", 90, "how long it is known what a retired agent was; its id and its refused key stay"),
    _days("metadata", 30, "how long superseded cohorts, snapshot and timestamp are kept"),
    _days("targets", 365, "the same of targets; an older backup cannot follow what was published since"),
    _days("proposals", 90, "how long a proposal is kept that was published, withdrawn or has expired"),
    _days("tokens", 90, "how long a token is kept that is revoked, expired or used up, and enrolled nobody"),
    _days("deliveries", 30, "how long it is kept what a webhook has taken, and what was given up"),
    _days("uploads", 7, "how long an upload that did not arrive whole is kept"),
]
TABLE = [
    *KINDS,
    Setting(
        f"{SECTION}.events_kept",
        int,
        50,
        "how many of each agent's newest events stay, however old they are",
        low=1,
        high=10_000,
    ),
]


@dataclass(frozen=True)
class Retention:
    """How long each kind is kept.

    Attributes:
        kept: kind → for how long; what has no entry here is kept for ever.
        events_kept: how many events of each agent stay in any case.
    """

    kept: Mapping[str, timedelta]
    events_kept: int = 50

    @classmethod
    def of(cls, settings: Settings) -> Self:
        days = {setting.name: int(settings[setting.name]) for setting in KINDS}
        kept = {
            name.removeprefix(f"{SECTION}.").removesuffix("_days"): timedelta(days=count)
            for name, count in days.items()
            if count
        }
        return cls(kept, int(settings[f"{SECTION}.events_kept"]))

    def before(self, kind: str, now: datetime) -> datetime | None:
        """What was over before this time goes; None: nothing does."""
        length = self.kept.get(kind)
        return None if length is None else now - length
