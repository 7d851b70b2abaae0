"""Terms of a rollout: what holds for all its stages, and the digest that names the whole plan. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Self

from agent_core.clock import iso, parse_iso
from agent_core.wire import Getter

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from release_server.stages import Stage


@dataclass(frozen=True)
class Terms:
    """What was agreed for a rollout as a whole.

    Attributes:
        not_before: it starts then, or as soon after as the cohort allows.
        approval: a second person has to approve it, by the digest of the plan.
        downgrade: it may lead to an older release than the cohort has settled on.
        stratified: the first stage takes in an agent of each site and platform.
    """

    not_before: datetime | None = None
    approval: bool = False
    downgrade: bool = False
    stratified: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "not_before": iso(self.not_before) if self.not_before else None,
            "approval": self.approval,
            "downgrade": self.downgrade,
            "stratified": self.stratified,
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
