"""What lies between a fleet file and what is so: the steps that make the one of the other. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from release_server.publish import fleet_file, fleet_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from release_server.publish.fleet_file import FleetFile, Wanted

ORDER = ("create", "edit", "freeze", "pin", "unpin", "unfreeze", "delete")
"""A step that stops something goes before one that sets something going."""


@dataclass(frozen=True)
class Step:
    """One change of one cohort.

    Attributes:
        said: what the API is told.
        shows: for people, what changes: name, before, after.
        agents: how many it reaches: those that the cohort has now, and those that come into it.
    """

    verb: str
    cohort: str
    said: Mapping[str, Any] = field(default_factory=dict)
    shows: tuple[tuple[str, str, str], ...] = ()
    agents: int = 0

    def to_json(self) -> dict[str, Any]:
        """As `POST /plan` takes it."""
        return {"verb": self.verb, "cohort": self.cohort, **self.said}


@dataclass(frozen=True)
class Plan:
    """All that is to do, for the editions that were looked at.

    Attributes:
        seen: the revision of each cohort that a step changes, 0 for one that is not there.
        left: cohorts that are there and not in the file; nothing happens to them.
        kept: pins and freezes that the file does not speak of, in words.
    """

    product: str
    seen: Mapping[str, int]
    steps: tuple[Step, ...]
    left: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def body(self) -> dict[str, Any]:
        """What `POST /plan` takes."""
        return {
            "product": self.product,
            "seen": dict(self.seen),
            "steps": [step.to_json() for step in self.steps],
        }

    def to_json(self) -> dict[str, Any]:
        """What scripts read."""
        return {**self.body(), "left": list(self.left), "kept": list(self.kept)}


def plan(
    wanted: FleetFile, product: str, present: Sequence[Mapping[str, Any]], now: str, *, prune: bool = False
) -> Plan:
    """The steps from what is so to what the file says; none when they agree.

    Args:
        present: every cohort of the product, as the API tells it.
        now: a freeze of the file that ended before this is none any more; in the API's form.
        prune: delete what the file does not name.
    """
    there = {str(cohort["name"]): cohort for cohort in present}
    steps = [step for each in wanted.cohorts.values() for step in _steps(each, there.get(each.name), now)]
    others = [name for name in there if name not in wanted.cohorts]
    if prune:
        steps += [Step("delete", name, agents=_agents(there[name])) for name in others]
    steps.sort(key=lambda step: ORDER.index(step.verb))
    touched = sorted({step.cohort for step in steps})
    return Plan(
        product=product,
        seen={name: int(there[name]["revision"]) if name in there else 0 for name in touched},
        steps=tuple(steps),
        left=() if prune else tuple(others),
        kept=tuple(text for each in wanted.cohorts.values() for text in _kept(each, there.get(each.name))),
    )


def _steps(wanted: Wanted, there: Mapping[str, Any] | None, now: str) -> Iterator[Step]:
    """What makes one cohort as it is wanted."""
    why = {"reason": wanted.reason} if wanted.reason else {}
    if there is None:
        said = {name: value for name, value in wanted.settings.items() if value != fleet_file.DEFAULTS[name]}
        start = {"release": wanted.release} if wanted.release else {}
        shows = [(_key(name), "", _shown(name, value)) for name, value in (said | start).items()]
        yield Step("create", wanted.name, said | start | why, tuple(shows))
    else:
        said = {name: value for name, value in wanted.settings.items() if value != _is(there, name)}
        if said:
            shows = [
                (_key(name), _shown(name, _is(there, name)), _shown(name, value))
                for name, value in said.items()
            ]
            yield Step("edit", wanted.name, said | why, tuple(shows), _agents(there))
    yield from _standing(wanted, there or {}, now, why)


def _standing(wanted: Wanted, there: Mapping[str, Any], now: str, why: Mapping[str, str]) -> Iterator[Step]:
    """Its pin and its freeze, where the file speaks of them."""
    reach = _agents(there)
    pinned = there.get("pin") or ""
    if wanted.pin is not None and wanted.pin != pinned:
        said = {"version": wanted.pin, **why} if wanted.pin else dict(why)
        verb = "pin" if wanted.pin else "unpin"
        yield Step(verb, wanted.name, said, (("pin", pinned, wanted.pin),), reach)
    until = wanted.frozen_until
    over = until is not None and until <= now
    asked = None if wanted.frozen is None else wanted.frozen and not over
    held = fleet_text.freeze_by_hand(there)
    before = _freeze(held is not None, (held or {}).get("until"))
    after = _freeze(bool(asked), until)
    if asked is not None and before != after:
        said = {**({"until": until} if until else {}), **why} if asked else dict(why)
        verb = "freeze" if asked else "unfreeze"
        yield Step(verb, wanted.name, said, (("frozen", before, after),), reach)


def _freeze(frozen: bool, until: str | None) -> str:
    return (f"until {until}" if until else "yes") if frozen else "no"


def _kept(wanted: Wanted, there: Mapping[str, Any] | None) -> Iterator[str]:
    if there is None:
        return
    because = f": {there['reason']}" if there.get("reason") else ""
    if there.get("pin") and wanted.pin is None:
        yield f"{wanted.name} stays pinned to {there['pin']}{because}; in the file: pin = false"
    if fleet_text.freeze_by_hand(there) is not None and wanted.frozen is None:
        yield f"{wanted.name} stays frozen{because}; in the file: frozen = false"


def _is(there: Mapping[str, Any], name: str) -> Any:
    return there.get(name, fleet_file.DEFAULTS[name])


def _key(name: str) -> str:
    """What the file calls it."""
    return next((key for key, (known, _) in fleet_file.SETTINGS.items() if known == name), name)


def _shown(name: str, value: Any) -> str:
    return fleet_text.shown(name, value).strip('"')


def _agents(there: Mapping[str, Any]) -> int:
    return int(there.get("agents") or 0)
