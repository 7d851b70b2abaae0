"""The shapes of what people say about agents, cohorts and rollouts, and of what they are told."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from agent_core.clock import iso, parse_iso
from agent_core.errors import MalformedError
from agent_core.wire import NAME, PROGRESS_FULL, VERSION
from release_server import fleet, freezes, membership
from release_server.api.shapes import when
from release_server.sequential import FALSE_HALT_BP
from release_server.stages import DEADLINE_S, LONGEST_S, MAX_STAGES, Stage
from release_server.terms import WATCH_S, Terms

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from release_server import agents, cohort_view, preview, rollout_view
    from release_server.models import AgentEvent, CohortSpec, RolloutEvent

NAME_FORM = f"^{NAME.pattern}$"
VERSION_FORM = f"^{VERSION.pattern}$"
DAY_S = 86_400
MOST_AGENTS = 10**9
Label = Annotated[str, StringConstraints(max_length=256)]
LabelPair = Annotated[str, StringConstraints(max_length=320)]


class Shape(BaseModel):
    """A body or query; an unknown key is refused, since it is most often a misspelt one."""

    model_config = ConfigDict(extra="forbid")


class Because(Shape):
    """Why something is done; kept in the audit log."""

    reason: str = Field("", max_length=2000)


# --- cohorts ---------------------------------------------------------------------------------------------


class CohortChange(Because):
    match: str = Field("", max_length=4000)
    priority: int = Field(0, ge=-(10**6), le=10**6)
    poll_s: int = Field(60, ge=1, le=DAY_S)
    report_s: int = Field(300, ge=1, le=DAY_S)
    splay_s: int = Field(0, ge=0, le=7 * DAY_S)
    window: dict[str, Any] | None = Field(None, max_length=8)
    approval: bool = False
    lease: dict[str, Any] | None = Field(None, max_length=8)
    budget: dict[str, Any] | None = Field(None, max_length=8)
    calendar: dict[Label, Label] = Field(default_factory=dict, max_length=freezes.MOST_ENTRIES)


class NewCohort(CohortChange):
    product: str = Field(pattern=NAME_FORM)
    name: str = Field(pattern=NAME_FORM)
    release: str | None = Field(None, pattern=VERSION_FORM)


class Pin(Because):
    version: str = Field(pattern=VERSION_FORM)


class Freeze(Because):
    until: str | None = Field(None, max_length=32)


class CohortPath(Shape):
    product: str = Field(max_length=64)
    name: str = Field(max_length=64)


class PreviewQuery(Shape):
    match: str | None = Field(None, max_length=4000)
    priority: int | None = Field(None, ge=-(10**6), le=10**6)
    version: str | None = Field(None, pattern=VERSION_FORM)


def moment(text: str | None, key: str) -> datetime | None:
    """A time of a body.

    Raises:
        MalformedError: it has another form.
    """
    if text is None:
        return None
    try:
        return parse_iso(text)
    except ValueError:
        raise MalformedError(f"{key} is not a time", why="it must look like 2026-01-31T12:00:00Z") from None


def render_cohort(view: cohort_view.View) -> dict[str, Any]:
    """A cohort: its newest spec and what is so of it."""
    cohort, spec, status = view.cohort, view.spec, view.status
    return {
        "id": cohort.id,
        "product": cohort.product.name,
        "name": cohort.name,
        "match": spec.match,
        "priority": spec.priority,
        "pin": spec.pin,
        "pinned": spec.because.get("pin") if spec.pin else None,
        "frozen": view.freeze is not None,
        "frozen_until": when(view.freeze.until if view.freeze else None),
        "frozen_by": view.freeze.by if view.freeze else "",
        "freeze": _freeze(spec) if view.by_hand else None,
        "calendar": spec.calendar,
        "window": spec.window,
        "splay_s": spec.splay_s,
        "poll_s": spec.poll_s,
        "report_s": spec.report_s,
        "retry_epoch": spec.retry_epoch,
        "approval": spec.approval,
        "lease": spec.lease,
        "budget": spec.budget,
        "revision": spec.revision,
        "actor": spec.actor,
        "reason": spec.reason,
        "base": status.base,
        "directive": status.directive,
        "directive_revision": status.directive_revision,
        "agents": view.agents,
        "created_at": iso(cohort.created_at),
        "changed_at": iso(spec.created_at),
    }


def _freeze(spec: CohortSpec) -> dict[str, Any]:
    """A freeze by hand: until when, and who made it and why."""
    return {"until": when(spec.frozen_until), **spec.because.get("freeze", {})}


def render_preview(name: str, found: preview.Preview) -> dict[str, Any]:
    """A preview; each list names the first agents of its kind, `counts` counts them all."""
    lists = {"agents": found.inside, "joins": found.joins, "leaves": found.leaves}
    stand = {"ready": found.ready, "held": found.held, "silent": found.silent, "no_bundle": found.no_bundle}
    return {
        "cohort": name,
        "match": found.match,
        "version": found.version,
        **{key: group.names for key, group in (lists | stand).items()},
        "counts": {key: group.count for key, group in (lists | stand).items()},
    }


# --- rollouts --------------------------------------------------------------------------------------------


class StageShape(Shape):
    share_bp: int | None = Field(None, ge=1, le=PROGRESS_FULL)
    count: int | None = Field(None, ge=1, le=MOST_AGENTS)
    soak_s: int = Field(0, ge=0, le=LONGEST_S)
    min_sample: int = Field(1, ge=0, le=MOST_AGENTS)
    max_failed: int | None = Field(None, ge=0, le=MOST_AGENTS)
    max_failed_bp: int | None = Field(None, ge=0, le=PROGRESS_FULL)
    max_silent: int | None = Field(None, ge=0, le=MOST_AGENTS)
    deadline_s: int = Field(DEADLINE_S, ge=1, le=LONGEST_S)

    def stage(self, place: int) -> Stage:
        return Stage.from_json(self.model_dump(), f"stages[{place}]")


class TermsShape(Shape):
    not_before: str | None = Field(default=None, max_length=40)
    approval: bool = False
    downgrade: bool = False
    stratified: bool = False
    watch_s: int = Field(default=WATCH_S, ge=0, le=LONGEST_S)
    false_halt_bp: int = Field(default=FALSE_HALT_BP, ge=0, le=PROGRESS_FULL)
    figures: bool = True

    def terms(self) -> Terms:
        moment(self.not_before, "terms.not_before")
        return Terms.from_json(self.model_dump())


class Rehearsal(Shape):
    product: str = Field(pattern=NAME_FORM)
    cohort: str = Field(pattern=NAME_FORM)
    version: str = Field(pattern=VERSION_FORM)
    stages: list[StageShape] = Field(min_length=1, max_length=MAX_STAGES)
    terms: TermsShape = TermsShape()

    def said(self) -> dict[str, Any]:
        """What the services take of it."""
        stages = [stage.stage(place) for place, stage in enumerate(self.stages)]
        return {
            "product": self.product,
            "cohort": self.cohort,
            "version": self.version,
            "stages": stages,
            "terms": self.terms.terms(),
        }


class NewRollout(Rehearsal, Because):
    supersede: bool = False
    draft: bool = False


class Approve(Because):
    digest: str = Field(pattern="^[0-9a-f]{64}$")


class Abort(Because):
    rollback: bool = False


class RolloutPath(Shape):
    id: int = Field(ge=1, lt=2**31)


def render_rollout(view: rollout_view.View, events: Iterable[RolloutEvent] | None = None) -> dict[str, Any]:
    """A rollout: what is wanted, what is so, and its history when that is given."""
    rollout, status = view.rollout, view.status
    shown: dict[str, Any] = {
        "id": rollout.id,
        "name": f"r-{rollout.id}",
        "product": view.product,
        "cohort": view.cohort,
        "version": rollout.version,
        "base": rollout.base,
        "salt": rollout.salt,
        "terms": view.spec.terms,
        "digest": fleet.digest_of(rollout, view.spec),
        "wanted": view.spec.wanted,
        "state": status.state,
        "stage": status.stage,
        "stage_state": status.stage_state,
        "progress": status.progress,
        "reason": status.reason,
        "detail": status.detail,
        "stages": view.spec.stages,
        "members": view.members,
        "counters": view.counters,
        "tolerated": status.tolerated,
        "created_at": iso(rollout.created_at),
        "created_by": rollout.created_by,
        "opened_at": when(status.opened_at),
        "soaking_since": when(status.soaking_since),
        "finished_at": when(status.finished_at),
        "watch_until": when(status.watch_until),
        "pruned_at": when(rollout.pruned_at),
    }
    if events is not None:
        shown["events"] = [_render_event(event) for event in events]
    return shown


def _render_event(event: RolloutEvent) -> dict[str, Any]:
    return {
        "at": iso(event.at),
        "event": event.event,
        "stage": event.stage,
        "reason": event.reason,
        "detail": event.detail,
        "numbers": event.numbers,
        "actor": event.actor,
    }


# --- agents ----------------------------------------------------------------------------------------------


class AgentPath(Shape):
    id: str = Field(max_length=128)


class AgentQuery(Shape):
    product: str | None = Field(None, max_length=64)
    cohort: str | None = Field(None, max_length=64)
    version: str | None = Field(None, max_length=64)
    state: str | None = Field(None, pattern="^(ok|late|held|failed|silent|gone|pending|retired)$")
    label: list[LabelPair] = Field(default_factory=list, max_length=32)
    match: str = Field("", max_length=4000)
    limit: int = Field(10_000, ge=1, le=10_000)
    after: str | None = Field(None, max_length=128)


class Move(Because):
    cohort: str | None = Field(pattern=NAME_FORM)


class Labels(Because):
    labels: dict[Label, Label] = Field(max_length=64)


def render_agent(view: agents.View, events: Iterable[AgentEvent] | None = None) -> dict[str, Any]:
    """An agent as it last reported, with what it did lately when that is given."""
    agent = view.agent
    shown: dict[str, Any] = {
        "id": agent.id,
        "product": view.product,
        "platform": agent.platform,
        "gate": agent.gate,
        "labels": agent.labels,
        "operator_labels": agent.operator_labels,
        "inventory": agent.inventory,
        "facts": membership.origins_of(agent),
        "cohort": view.cohort,
        "cohort_fixed": agent.cohort_fixed,
        "version": agent.version,
        "digest": agent.digest,
        "phase": agent.phase,
        "reason": agent.reason,
        "detail": agent.detail,
        "held": agent.held,
        "figures": agent.figures,
        "enrolled_at": iso(agent.enrolled_at),
        "seen_at": iso(agent.seen_at),
        "retired_at": when(agent.retired_at),
        "state": view.state,
    }
    if events is not None:
        shown["events"] = [_render_step(event) for event in events]
    return shown


def _render_step(event: AgentEvent) -> dict[str, Any]:
    return {
        "number": event.number,
        "at": event.at,
        "received_at": iso(event.received_at),
        "version": event.version,
        "state": event.state,
        "reason": event.reason,
        "detail": event.detail,
    }
