"""Terms of a rollout: what holds for all its stages, and the digest that names the whole plan. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Self

from agent_core.clock import iso, parse_iso
from agent_core.wire import PROGRESS_FULL, Getter
from release_server.sequential import FALSE_HALT_BP
from release_server.stages import LONGEST_S

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from release_server.stages import Stage

WATCH_S = 3_600


@dataclass(frozen=True)
class Terms:
    """What was agreed for a rollout as a whole.

    Attributes:
        not_before: it starts then, or as soon after as the cohort allows.
        approval: a second person has to approve it, by the digest of the plan.
        downgrade: it may lead to an older release than the cohort has settled on.
        stratified: the first stage takes in an agent of each site and platform.
        watch_s: how long the completed rollout is still watched for a regression.
        false_halt_bp: the sequential test's chance to halt a good release, in basis points; 0: no test.
        figures: health figures are compared with those of the release before.
    """

    not_before: datetime | None = None
    approval: bool = False
    downgrade: bool = False
    stratified: bool = False
    watch_s: int = WATCH_S
    false_halt_bp: int = FALSE_HALT_BP
    figures: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "not_before": iso(self.not_before) if self.not_before else None,
            "approval": self.approval,
            "downgrade": self.downgrade,
            "stratified": self.stratified,
            "watch_s": self.watch_s,
            "false_halt_bp": self.false_halt_bp,
            "figures": self.figures,
        }

    @classmethod
    def from_json(cls, terms: object, path: str = "terms") -> Self:
        get = Getter(terms, path)
        begins = get.optional_text("not_before") if "not_before" in get.mapping else None
        return cls(
            not_before=parse_iso(begins) if begins else None,
            approval=get.boolean("approval", False),
            downgrade=get.boolean("downgrade", False),
            stratified=get.boolean("stratified", False),
            watch_s=get.integer("watch_s", WATCH_S, high=LONGEST_S),
            false_halt_bp=get.integer("false_halt_bp", FALSE_HALT_BP, high=PROGRESS_FULL),
            figures=get.boolean("figures", True),
        )


def plan_digest(
    product: str, cohort: str, version: str, stages: Sequence[Stage], terms: Terms, base: str | None
) -> str:
    """Name all that an approval is about; who approves one plan has not approved another."""
    plan = {
        "product": product,
        "cohort": cohort,
        "version": version,
        "base": base,
        "stages": [stage.to_json() for stage in stages],
        "terms": terms.to_json(),
    }
    return sha256(json.dumps(plan, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
