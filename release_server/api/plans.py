"""A plan: several changes of cohorts that happen together or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from flask import g
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import Field

from release_server import cohort_view, plans
from release_server.api import PREFIX, editions, services
from release_server.api.access import requires
from release_server.api.fleet_schemas import (
    NAME_FORM,
    VERSION_FORM,
    Because,
    CohortChange,
    Freeze,
    Pin,
    Shape,
    moment,
    render_cohort,
)
from release_server.api.people import SECURITY

if TYPE_CHECKING:
    from datetime import datetime

    from sqlalchemy.orm import Session

blueprint = APIBlueprint(
    "plans", __name__, url_prefix=PREFIX, abp_tags=[Tag(name="cohorts")], abp_security=SECURITY
)
MOST_SEEN, MOST_STEPS = 2000, 500
"""A step takes some 13 ms in which nobody else writes; who has waited for ten seconds is refused."""
Name = Annotated[str, Field(pattern=NAME_FORM)]
Revision = Annotated[int, Field(ge=0, lt=2**31)]


class CreateStep(CohortChange):
    verb: Literal["create"]
    cohort: Name
    release: str | None = Field(None, pattern=VERSION_FORM)


class EditStep(CohortChange):
    verb: Literal["edit"]
    cohort: Name


class PinStep(Pin):
    verb: Literal["pin"]
    cohort: Name


class FreezeStep(Freeze):
    verb: Literal["freeze"]
    cohort: Name


class OpenStep(Because):
    verb: Literal["unpin", "unfreeze", "delete"]
    cohort: Name


AnyStep = Annotated[
    CreateStep | EditStep | PinStep | FreezeStep | OpenStep,
    Field(discriminator="verb"),
]


class Plan(Shape):
    """What to do, and `seen`: the revision of each cohort that it was made for, 0 for one not there yet."""

    product: str = Field(pattern=NAME_FORM)
    seen: dict[Name, Revision] = Field(default_factory=dict, max_length=MOST_SEEN)
    steps: list[AnyStep] = Field(max_length=MOST_STEPS)


@blueprint.post("/plan")
@requires("operator")
def carry_out(body: Plan) -> dict[str, Any]:
    """Change several cohorts in one transaction; refused as a whole when one of them was changed since."""
    hub = services()
    now = hub.clock()
    steps = [_step(said) for said in body.steps]
    with hub.sessions.write() as session:
        _refuse_stale(session, now, body)
        changed = plans.carry_out(session, now, g.person.name, body.product, steps)
        return {"items": [render_cohort(view) for view in changed]}


def _step(said: Any) -> plans.Step:
    spoken = said.model_dump(exclude_unset=True, exclude={"verb", "cohort"})
    if said.verb == "freeze":
        spoken["until"] = moment(said.until, "until")
    return plans.Step(said.verb, said.cohort, spoken)


def _refuse_stale(session: Session, now: datetime, plan: Plan) -> None:
    there = {view.cohort.name: view for view in cohort_view.list_cohorts(session, now, plan.product)}
    for name, revision in plan.seen.items():
        edition = editions.of_cohort(there[name]) if name in there else "0"
        editions.refuse_other(f"cohort {name}", edition, str(revision))
