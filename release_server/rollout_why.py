"""Why a rollout is where it is, as a chain of reasons over plain facts; and what it does next. Pure.

The order is that in which `rollout.reconcile` asks, the codes and details are those that it stores, and what
comes next is asked of it (`foresight`): there is no second set of rules here that could differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from agent_core.clock import iso
from agent_core.window import next_opening
from agent_core.wire import AttemptState, Reason
from release_server.foresight import Allowance, Still, deadline, foresee, soak_end, watch_end
from release_server.hearing import NEVER, ZERO
from release_server.members import whole
from release_server.rollout import FINISHED, RETURNABLE, StageState, State, Why, numbers, too_few
from release_server.why import Link, frozen

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from release_server.foresight import Fleet, Move
    from release_server.rollout import Counters, Spec, Status

BECOMES = {
    "submitted": "it is submitted",
    "approved": "it is let begin",
    "awaiting-approval": "it waits for a second person",
    "started": "its first stage opens",
    "resumed": "it goes on",
    "paused": "it pauses",
    "frozen": "it stands still",
    "unfrozen": "its stage opens again, with a new deadline",
    "outside-window": "it stands still until the window opens",
    "window-opened": "its stage opens again, with a new deadline",
    "waiting": "it waits",
    "widened": "its stage takes in agents",
    "reopened": "its stage opens again, for an agent that is not finished",
    "soaking": "its stage soaks",
    "stage-opened": "the next stage opens",
    "completed": "it is complete",
    "watch-over": "its watch ends",
    "halted": "it halts",
    "aborted": "it ends",
    "rolling-back": "its agents go back",
    "rolled-back": "it has gone back",
    "superseded": "a newer one takes its place",
}
"""What an event means to people, by its name in the history."""


@dataclass(frozen=True)
class Facts:
    """All that the explanation may know.

    Attributes:
        fleet: how its agents look at later moments; None: as `counters` say.
        by, reason: who asked the newest thing of it, and why.
        askers: whoever had a hand in the plan, and may therefore not approve it.
        digest: what an approval is bound to.
        pin, pin_reason: on what people keep its cohort, and why.
        freeze_reason: why people froze the cohort, where they did.
        yanked: its release is no longer offered.
        past: why a resume would be refused, where its cohort is on another release by now.
        halt: the numbers that the newest halt saw, as they were stored.
    """

    name: str
    version: str
    cohort: str
    spec: Spec
    status: Status
    counters: Counters
    allowance: Allowance = field(default_factory=Allowance)
    fleet: Fleet | None = None
    by: str = ""
    reason: str = ""
    askers: tuple[str, ...] = ()
    digest: str = ""
    pin: str | None = None
    pin_reason: str = ""
    freeze_reason: str = ""
    yanked: bool = False
    past: str = ""
    halt: Mapping[str, Any] = field(default_factory=dict)


def explain(facts: Facts, now: datetime) -> dict[str, Any]:
    """Explain why a rollout is where it is: `{rollout, version, cohort, state, stage, summary, chain, next}`.

    `chain` holds links as of `Link.to_json`; the first that is not ok is the answer. `next` is what comes
    if no agent has news and nobody asks anything, or None where time alone changes nothing.
    """
    facts = replace(facts, spec=facts.allowance.at(facts.spec, now))
    fleet = facts.fleet or Still(facts.counters)
    move = foresee(facts.spec, facts.status, fleet, now, facts.allowance)
    links = chain(facts, now, move)
    return {
        "rollout": facts.name,
        "version": facts.version,
        "cohort": facts.cohort,
        "state": str(facts.status.state),
        "stage": facts.status.stage,
        "summary": _summary(facts, links),
        "chain": [link.to_json() for link in links],
        "next": None if move is None else _next(move, now),
    }


def _summary(facts: Facts, links: list[Link]) -> str:
    state, count = facts.status.state, len(facts.spec.stages)
    takes = f"{facts.name} takes {facts.version} to {facts.cohort}"
    if state in FINISHED:
        return f"{takes}; it is {state.replace('_', ' ')}."
    at = ""
    if facts.status.stage_state is not StageState.PENDING:
        at = f" in stage {facts.status.stage + 1} of {count}"
    stands = f"{takes}; it is {state.replace('_', ' ')}{at}."
    return f"{stands} It waits because:" if any(not link.ok for link in links) else f"{stands} It moves."


def _next(move: Move, now: datetime) -> dict[str, Any]:
    event = move.event
    because = ": ".join(filter(None, (event.reason, event.detail)))
    text = BECOMES[event.name] + (f" ({because})" if because else "")
    when = "at the next look" if move.at <= now else f"at {_clock(move.at, now)}"
    at = move.at if move.at <= now else whole(move.at)
    return {
        "at": iso(at),
        "event": event.name,
        "stage": event.stage,
        "reason": event.reason,
        "detail": event.detail,
        "text": f"{when} {text}, if nothing else happens",
    }


def chain(facts: Facts, now: datetime, move: Move | None) -> list[Link]:
    """The reasons, in the order in which `reconcile` asks; `facts.spec` is as the cohort allows now."""
    state = facts.status.state
    if state in FINISHED:
        return list(_ended(facts, now))
    if move is not None and move.at <= now:
        return list(_moving(facts, move, now))
    match state:
        case State.DRAFT:
            then = f"release rollout resume {facts.name}"
            return [Link(False, "draft", "it is a draft, which nobody has submitted", then)]
        case State.AWAITING_APPROVAL:
            return [_approval(facts)]
        case State.SCHEDULED:
            return list(_scheduled(facts, now))
        case State.PAUSED:
            return list(_paused(facts, now))
        case State.ROLLING_BACK:
            return list(_going_back(facts, now))
        case _:
            return [*_gate(facts, now), *_running(facts, now)]


def _going_back(facts: Facts, now: datetime) -> Iterator[Link]:
    if count := facts.counters.on_version:
        yield from _frozen(facts, now)  # nobody goes back meanwhile either
        text = f"{_agents(count)} still {'runs' if count == 1 else 'run'} {facts.version}"
        yield Link(False, "going-back", text, seen=_seen(facts, now))
    else:
        until = _known(facts.counters.hearing.ends(now, ZERO))
        when = f"until {_clock(until, now)}" if until else "again when a web process is there"
        yield Link(False, str(Why.LISTENING), f"the server was away; it listens {when}", until=until)


def _moving(facts: Facts, move: Move, now: datetime) -> Iterator[Link]:
    """It moves with the next look, by the words of the event; only a halt is in its way."""
    event = move.event
    if event.name == "halted":
        text = f"it halts: {event.detail}"
        yield Link(
            False,
            event.reason,
            text,
            _after_halt(facts, event.reason, event.numbers),
            move.at,
            seen=event.numbers,
        )
        return
    yield from _gate(facts, now)
    text = BECOMES[event.name] + (f": {event.detail}" if event.detail else "")
    yield Link(True, event.name, text, until=move.at, seen=event.numbers)


def _ended(facts: Facts, now: datetime) -> Iterator[Link]:
    status, name = facts.status, facts.name
    when = f" {_clock(status.finished_at, now)}" if status.finished_at else ""
    told = facts.by and status.reason in (Why.MANUAL, Why.SUPERSEDED)
    said = f" by {facts.by}: {facts.reason}".rstrip(": ") if told else ""
    word = str(status.state).replace("_", " ")
    then = f"release rollout undo {name}" if status.state in RETURNABLE and facts.counters.on_version else ""
    ok = status.state is State.COMPLETED
    yield Link(ok, str(status.state), f"{word}{when}{said}", "" if ok else then, seen=_seen(facts, now))
    if status.watch_until is not None:
        until = _known(watch_end(status, facts.counters))
        text = f"watched for a regression{_until(until, now)}{_away(facts, status.watch_until, now)}"
        yield Link(True, str(Why.WATCHED), text, until=until)


# --- before it begins ------------------------------------------------------------------------------------


def _approval(facts: Facts) -> Link:
    text = f"a second person has to approve plan {facts.digest[:12]}"
    if facts.askers:
        text += f"; not {', '.join(facts.askers)}, who asked for it"
    seen = {"digest": facts.digest, "askers": list(facts.askers)}
    return Link(False, str(Why.APPROVAL), text, f"release rollout approve {facts.name}", seen=seen)


def _scheduled(facts: Facts, now: datetime) -> Iterator[Link]:
    if facts.spec.approval:
        yield Link(True, "approved", "a second person has approved it", seen={"digest": facts.digest})
    yield from _frozen(facts, now)
    begins = facts.spec.not_before
    if begins is not None and now < begins:
        yield Link(False, "not-before", f"it is to begin at {_clock(begins, now)}", until=begins)


# --- while it runs ---------------------------------------------------------------------------------------


def _gate(facts: Facts, now: datetime) -> Iterator[Link]:
    """What the gate of the present stage allows and has seen; one that halts is told by the halt."""
    status, seen = facts.status, facts.counters
    if status.state is not State.RUNNING or not seen.members:
        return
    told = _seen(facts, now)
    tolerated = f", {told['tolerated']} tolerated" if told["tolerated"] else ""
    text = f"{told['failures']} of {seen.reached} failed (limit {told['limit']}{tolerated})"
    yield Link(True, str(Why.MAX_FAILED), text, seen=told)
    most = facts.spec.stages[status.stage].max_silent
    if most is not None:
        yield Link(True, str(Why.MAX_SILENT), f"{seen.silent()} of {seen.reached} silent (limit {most})")


def _running(facts: Facts, now: datetime) -> Iterator[Link]:
    """The one thing a running stage waits for; `reconcile` would take a step now if there were none."""
    spec, status, seen = facts.spec, facts.status, facts.counters
    if spec.frozen:
        yield from _frozen(facts, now)
    elif not seen.members:
        then = f"release cohort preview {facts.cohort}"
        yield Link(False, str(Why.NO_AGENTS), "no agent is in this cohort yet", then)
    elif seen.waiting:
        yield from _unfinished(facts, now)
    elif lacking := too_few(spec, status, seen, now):
        then = f"release rollout advance {facts.name}"
        until = _known(deadline(spec, status, seen))
        yield Link(False, str(Why.MIN_SAMPLE), lacking, then, until, seen=_seen(facts, now))
    else:
        until = _known(soak_end(spec, status, seen))
        text = f"it soaks{_until(until, now)}{_away(facts, status.soaking_since, now)}"
        yield Link(False, str(StageState.SOAKING), text, "", until, seen=_seen(facts, now))


def _unfinished(facts: Facts, now: datetime) -> Iterator[Link]:
    spec, status, seen = facts.spec, facts.status, facts.counters
    window = facts.allowance.window
    ends, told = _known(deadline(spec, status, seen)), _away(facts, status.opened_at, now)
    if window is not None and not spec.window_open:
        opens = next_opening(window, now)
        text = f"the window opens at {_clock(opens, now)}" if opens else "the window does not open"
        yield Link(False, str(Why.OUTSIDE_WINDOW), text, until=opens, seen=window.to_json())
        ends, told = None, ""
    has = f"; they have{_until(ends, now)}" if ends else ""
    text = f"{seen.waiting} of {seen.reached} not finished{has}{told}"
    then = f"release agents list --cohort {facts.cohort}"
    yield Link(False, str(Why.UNFINISHED), text, then, ends, seen=_seen(facts, now))


def _known(ends: datetime | None) -> datetime | None:
    """When something ends by time; None also while the server cannot hear, and nothing does."""
    return None if ends == NEVER else ends


def _away(facts: Facts, since: datetime | None, now: datetime) -> str:
    """Why something ends later than its length says."""
    hearing = facts.counters.hearing
    if hearing.is_deaf(now):
        return "; no web process is there, and until one is no time counts"
    away = since is not None and not hearing.is_whole(min(since, now), now)
    return "; the server was away meanwhile, which does not count" if away else ""


# --- what stops it ---------------------------------------------------------------------------------------


def _frozen(facts: Facts, now: datetime) -> Iterator[Link]:
    if (said := facts.allowance.stopped) is not None:
        text = f"updates are stopped by stop.json beside the metadata: {said}".rstrip(": ")
        yield Link(False, str(Reason.STOP_FILE), text, "whoever stopped updates takes the file away")
    freeze = facts.allowance.freeze(now)
    if freeze is not None:
        yield frozen(facts.cohort, freeze, facts.freeze_reason, ok=False)


def _paused(facts: Facts, now: datetime) -> Iterator[Link]:
    """Only a person's word ends a pause: what it was for, and what would refuse that word."""
    status = facts.status
    resume, seen = f"release rollout resume {facts.name}", _seen(facts, now)
    if status.stage_state is StageState.HALTED:
        text = f"halted: {status.detail}".rstrip(": ")
        numbers = facts.halt or seen
        yield Link(False, status.reason, text, _after_halt(facts, status.reason, numbers), seen=numbers)
    elif status.reason == Why.MANUAL:
        text = f"paused by {facts.by or 'a person'}: {facts.reason}".rstrip(": ")
        yield Link(False, str(Why.MANUAL), text, resume, seen=seen)
    else:
        text = "a pin paused it" if status.reason == Why.PINNED else f"it is paused: {status.reason}"
        yield Link(False, str(State.PAUSED), text, resume, seen=seen)
    if facts.spec.pinned:
        text = f"cohort {facts.cohort} is pinned to {facts.pin}: {facts.pin_reason}".rstrip(": ")
        then = f"release cohort unpin {facts.cohort}"
        yield Link(False, str(Why.PINNED), text, then, seen={"pin": facts.pin})
    if facts.yanked:
        then = f"release yank {facts.version} --undo"
        yield Link(False, "yanked", f"{facts.version} was yanked: it cannot go on", then)
    elif facts.past:
        then = f"release rollout abort {facts.name}"
        yield Link(False, "gone-past", f"{facts.past}: it cannot go on", then)


def _after_halt(facts: Facts, reason: str, seen: Mapping[str, Any]) -> str:
    """Whom to look at first, by what it halted for, and what ends a halt."""
    broken = seen.get(str(AttemptState.ROLLED_BACK), 0) + seen.get(str(AttemptState.FAILED), 0)
    if reason == Why.FIGURES:
        whom = f" --version {facts.version}"
    elif reason in (Why.MAX_FAILED, Why.UNUSUAL) and broken:
        whom = " --state failed"
    elif seen.get(str(AttemptState.SILENT)):
        whom = " --state silent"
    else:
        whom = ""
    return (
        f"release agents list --cohort {facts.cohort}{whom}\n"
        f"release rollout abort {facts.name} --rollback, or retry, or resume"
    )


# --- words -----------------------------------------------------------------------------------------------


def _seen(facts: Facts, now: datetime) -> Mapping[str, Any]:
    return numbers(facts.spec, facts.status, facts.counters, now)


def _until(moment: datetime | None, now: datetime) -> str:
    return f" until {_clock(moment, now)}" if moment else ""


def _agents(count: int) -> str:
    return f"{count} agent" if count == 1 else f"{count} agents"


def _clock(moment: datetime, now: datetime) -> str:
    day = "" if moment.date() == now.date() else f"{moment:%Y-%m-%d} "
    return f"{day}{moment:%H:%M} UTC"
