"""Several changes of a product's cohorts as one: all of them happen, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from release_server import cohort_view, cohorts, membership

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    from sqlalchemy.orm import Session

VERBS: dict[str, Callable[..., Any]] = {
    "create": cohorts.create,
    "edit": cohorts.edit,
    "pin": cohorts.pin,
    "unpin": cohorts.unpin,
    "freeze": cohorts.freeze,
    "unfreeze": cohorts.unfreeze,
    "delete": cohorts.delete,
}


@dataclass(frozen=True)
class Step:
    """One change of one cohort; `said` is what its service takes besides names."""

    verb: str
    cohort: str
    said: Mapping[str, Any]


def carry_out(
    session: Session, now: datetime, actor: str, product: str, steps: Sequence[Step]
) -> list[cohort_view.View]:
    """Do every step in its order; whatever is raised ends the transaction, and nothing was done.

    Returns:
        The cohorts that were changed and are still there, as they are now.

    Raises:
        RelfleetError: what the service of a step refuses.
    """
    with membership.resettling_once(session):
        for step in steps:
            VERBS[step.verb](session, now, actor, product=product, name=step.cohort, **step.said)
    gone = {step.cohort for step in steps if step.verb == "delete"}
    left = dict.fromkeys(step.cohort for step in steps if step.cohort not in gone)
    return [cohort_view.show(session, now, product, name) for name in left]
