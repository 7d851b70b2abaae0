"""Why an agent runs what it runs, as a chain of reasons over plain facts. Pure.

The order is that in which the device decides, and `Link.says` is the word that the device has for it: the
first link that says one and is not ok is what `updater.decide` answers there, which a property test holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from agent_core.clock import iso
from agent_core.directive import Assignment, assign, bucket, splay
from agent_core.window import is_open, next_opening
from agent_core.wire import PROGRESS_FULL, AttemptState, Mode, Phase, Policy, Reason
from release_server.rollout import State
from release_server.stages import wanted_count

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import datetime

    from agent_core.wire import Directive
    from release_server.freezes import Freeze
    from release_server.stages import Stage

THEN = {str(Reason.STOP_FILE): "whoever stopped updates takes the file away"}
"""What would change what an agent says of itself, where the server can know it."""
UNREMARKABLE = frozenset(
    {
        "",
        *map(
            str,
            (
                Reason.UPDATE,
                Reason.FIRST_INSTALL,
                Reason.GO_BACK,
                Reason.UP_TO_DATE,
                Reason.NOT_YET,
                Reason.SUSPENDED,
                Reason.OBSERVED,
            ),
        ),
    }
)
"""What an agent may report without being in its own way."""

HELD = "held on the host"
"""How a device begins the detail of that decision."""


@dataclass(frozen=True)
class Link:
    """One fact of the explanation.

    Attributes:
        ok: whether it lets the agent update.
        code: what it is, for scripts; finer than the device's word where the server knows more.
        then: what to type where something can be done.
        until: when it will change, where that can be known.
        says: what the device itself calls it; None for what it does not go by.
        seen: the numbers and names behind the text.
    """

    ok: bool
    code: str
    text: str
    then: str = ""
    until: datetime | None = None
    says: Reason | None = None
    seen: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        said = {
            "then": self.then,
            "until": iso(self.until) if self.until else "",
            "says": str(self.says or ""),
            "seen": dict(self.seen),
        }
        return {"ok": self.ok, "code": self.code, "text": self.text} | {
            name: value for name, value in said.items() if value
        }


@dataclass(frozen=True)
class Held:
    """What people want of the agent's cohort, and why each."""

    pin: str | None = None
    freeze: Freeze | None = None
    pin_reason: str = ""
    freeze_reason: str = ""


@dataclass(frozen=True)
class Course:
    """The rollout that speaks for the cohort; `takes` is how long its agents need in one stage."""

    name: str
    salt: str
    state: State
    reason: str = ""
    detail: str = ""
    stages: tuple[Stage, ...] = ()
    stage: int = 0
    soaking_since: datetime | None = None
    members: int = 0
    takes: timedelta = timedelta(minutes=2)


@dataclass(frozen=True)
class Bundle:
    """The best bundle that the agent's host can run."""

    seq: int
    gates: tuple[str, ...] = ()
    upgrade_from_seq: int = 0
    min_launcher: int = 1


@dataclass(frozen=True)
class Room:
    """How many of the agent's failure domain are between two versions; `mine`: it is one of them."""

    domain: str
    taken: int
    most: int
    mine: bool = False
    until: datetime | None = None


class Line(NamedTuple):
    """How much of its failure domain's download budget others use.

    Attributes:
        mine_bps: what it may use itself.
        by_another: it is not its own cohort's budget, but a smaller one of who downloads or waits there.
    """

    domain: str
    budget_bps: int
    taken_bps: int
    downloads: int
    full: bool
    mine_bps: int = 0
    until: datetime | None = None
    by_another: bool = False

    @property
    def text(self) -> str:
        taken, budget = f"{self.taken_bps / 1000:g} kB/s", f"{self.budget_bps / 1000:g} kB/s"
        whose = ", another cohort's budget" if self.by_another else ""
        return f"{self.domain} downloads with {taken} of {budget}{whose} ({self.downloads} at it)"


@dataclass(frozen=True)
class Facts:
    """All that the explanation may know.

    Attributes:
        running: the version that is good there, empty for none; `running_seq` is 0 where it is not known.
        quiet: how long it may be quiet before it is silent.
        told_at: since when the agent may know this directive.
        bundles: of a version the best one that this host can run; None where there is none.
        launcher: what the launcher of the host can do, None where the server was not told.
        failed: how the release went here under this directive: state, reason, detail.
    """

    agent_id: str
    running: str
    seen_at: datetime
    quiet: timedelta
    running_seq: int = 0
    platform: str = ""
    gate: str = ""
    phase: str = "idle"
    held: bool = False
    reason: str = ""
    detail: str = ""
    retired: bool = False
    pending: bool = False
    cohort: str | None = None
    wants: Held = Held()
    course: Course | None = None
    directive: Directive | None = None
    told_at: datetime | None = None
    policy: Policy = field(default_factory=Policy)
    bundles: Mapping[str, Bundle | None] = field(default_factory=dict)
    launcher: int | None = None
    failed: tuple[str, str, str] | None = None
    room: Room | None = None
    line: Line | None = None


def target(directive: Directive | None) -> str | None:
    """Where a cohort goes, or is."""
    return (directive.release or directive.base) if directive else None


def assignment(facts: Facts) -> Assignment | None:
    return assign(facts.directive, facts.agent_id, facts.running or None) if facts.directive else None


def subject(facts: Facts) -> str | None:
    """The version that the chain is about: what the agent is told to run, else where its cohort goes."""
    told = assignment(facts)
    wanted = target(facts.directive)
    if told is not None and told.version is not None:
        return told.version
    return wanted if wanted != facts.running else None


def explain(facts: Facts, now: datetime) -> dict[str, Any]:
    """Explain why an agent runs what it runs: `{agent, version, wanted, summary, chain}`.

    `chain` holds links as of `Link.to_json`; the first that is not ok is the answer.
    """
    links = chain(facts, now)
    wanted = target(facts.directive)
    return {
        "agent": facts.agent_id,
        "version": facts.running,
        "wanted": wanted,
        "summary": _summary(facts, wanted, [link for link in links if not link.ok]),
        "chain": [link.to_json() for link in links],
    }


def _summary(facts: Facts, wanted: str | None, blocked: Sequence[Link]) -> str:
    runs = f"{facts.agent_id} runs {facts.running or 'nothing yet'}"
    if wanted is None or wanted == facts.running:
        settled = "it is up to date" if wanted and not blocked else "there is nothing for it to update to"
        return f"{runs}; {settled}{':' if blocked else '.'}"
    moving = f"{runs}; its cohort {facts.cohort} is moving to {wanted}."
    if all(link.says is Reason.IN_TRIAL for link in blocked):
        return f"{moving} It is updating."
    return f"{moving} It is not updating because:"


def chain(facts: Facts, now: datetime) -> list[Link]:
    """The reasons in the order in which the device asks them."""
    if facts.retired:
        then = "agent enroll --new-key (there)"
        return [Link(False, "retired", "it is retired: its reports are refused", then, says=Reason.RETIRED)]
    links = [_heard(facts, now), *_membership(facts)]
    told = assignment(facts)
    if told is None:
        return links
    links += _word(facts, told, now)
    version = subject(facts)
    if version is not None:
        links += _release(facts, version)
        links += _postponed(facts, version, now)
    elif facts.held:
        links.append(Link(True, str(Reason.HELD), _hold(facts)))
    return [*links, *_reported(facts, links)]


def _heard(facts: Facts, now: datetime) -> Link:
    ago_s = int((now - facts.seen_at).total_seconds())
    seen = {"seen_at": iso(facts.seen_at), "silent_after_s": int(facts.quiet.total_seconds())}
    if facts.seen_at < now - facts.quiet:
        then = "look whether the host is up"
        return Link(False, "silent", f"silent: last reported {ago_s} s ago", then, seen=seen)
    return Link(True, "reported", f"reported {ago_s} s ago", until=facts.seen_at + facts.quiet, seen=seen)


def _membership(facts: Facts) -> Iterator[Link]:
    name = facts.agent_id
    if facts.pending:
        text = "it waits for an operator to accept it"
        yield Link(False, str(Reason.PENDING), text, f"release agents accept {name}", says=Reason.PENDING)
    elif facts.cohort is None:
        then = f"release agents move {name} --cohort NAME"
        yield Link(False, str(Reason.NO_COHORT), "no cohort matches its labels", then, says=Reason.NO_COHORT)
    else:
        yield Link(True, "cohort", f"cohort {facts.cohort}", seen={"cohort": facts.cohort})
        if facts.directive is None:
            text = "its cohort has no directive yet"
            yield Link(False, str(Reason.NO_DIRECTIVE), text, says=Reason.NO_DIRECTIVE)


# --- what the directive says -----------------------------------------------------------------------------


def _word(facts: Facts, told: Assignment, now: datetime) -> Iterator[Link]:
    if facts.wants.pin is not None:
        text = f"cohort {facts.cohort} is pinned to {facts.wants.pin}: {facts.wants.pin_reason}".rstrip(": ")
        yield Link(True, "pinned", text, seen={"pin": facts.wants.pin})
    if told.reason is Reason.DISABLED:
        text = f"updates of cohort {facts.cohort} are switched off"
        yield Link(False, str(told.reason), text, says=told.reason)
    elif facts.directive is not None and facts.directive.mode is Mode.SUSPENDED:
        yield _suspended(facts, ok=told.version is not None)
    elif told.reason is Reason.NOT_YET:
        yield _not_yet(facts, now)
    elif facts.course is not None and facts.wants.pin is None:
        yield _reached(facts, facts.course)


def _suspended(facts: Facts, *, ok: bool) -> Link:
    """Who stopped the cohort; `ok`: a host that has nothing at all still gets what the cohort is on."""
    says, course = Reason.SUSPENDED, facts.course
    if facts.wants.freeze is not None:
        return frozen(facts.cohort, facts.wants.freeze, facts.wants.freeze_reason, ok=ok, says=says)
    if course is not None and course.state is State.PAUSED:
        because = ": ".join(filter(None, (course.reason, course.detail)))
        text = f"rollout {course.name} is paused ({because})"
        then = f"release rollout resume {course.name}"
        return Link(ok, "paused", text, "" if ok else then, says=says, seen=_numbers(facts, course))
    if course is not None and course.state in (State.ABORTED, State.SUPERSEDED):
        text = f"rollout {course.name} was {course.state}"
        return Link(ok, str(course.state), text, "" if ok else "release rollout start", says=says)
    return Link(ok, str(says), f"cohort {facts.cohort} takes nothing new for now", says=says)


def frozen(cohort: str | None, freeze: Freeze, reason: str, *, ok: bool, says: Reason | None = None) -> Link:
    """What freezes a cohort, until when, and whose word ends it; `reason` is of whoever froze it by hand."""
    until = f" until {freeze.until:%Y-%m-%d %H:%M} UTC" if freeze.until else ""
    because = f"by the calendar ({freeze.by})" if freeze.by else reason
    text = f"cohort {cohort} is frozen{until}: {because}".rstrip(": ")
    then = (
        f"release cohort edit {cohort} --calendar none" if freeze.by else f"release cohort unfreeze {cohort}"
    )
    seen = {"by": freeze.by} if freeze.by else {}
    return Link(ok, "frozen", text, "" if ok else then, freeze.until, says, seen)


def _not_yet(facts: Facts, now: datetime) -> Link:
    says, course = Reason.NOT_YET, facts.course
    if target(facts.directive) is None:
        text = "its cohort has no release yet"
        return Link(False, str(Reason.NO_DIRECTIVE), text, "release rollout start", says=says)
    if course is None or facts.directive is None:
        return Link(False, str(says), f"cohort {facts.cohort} does not reach it yet", says=says)
    seen = _numbers(facts, course)
    text = (
        f"rollout {course.name} is at {facts.directive.progress / 100:g}%;"
        f" this agent's place is {seen['place'] / 100:g}%"
    )
    turn = turn_at(course, seen["place"], now)
    if turn is not None:
        day = "" if turn.date() == now.date() else f"{turn:%Y-%m-%d} "
        text += f". At this pace its turn comes about {day}{turn:%H:%M} UTC."
    then = f"release agents move {facts.agent_id} --cohort NAME"
    return Link(False, str(says), text, then, turn, says, seen)


def _numbers(facts: Facts, course: Course) -> dict[str, Any]:
    progress = facts.directive.progress if facts.directive else 0
    place = bucket(facts.agent_id, course.salt)
    return {"rollout": course.name, "progress": progress, "place": place, "stage": course.stage}


def turn_at(course: Course, place: int, now: datetime) -> datetime | None:
    """When a place on the line is reached if every stage goes as those before; None when none reaches it."""
    if course.members == 0:
        return None
    here = course.stages[course.stage : course.stage + 1]
    soak = timedelta(seconds=sum(stage.soak_s for stage in here))
    turn = max(now, (course.soaking_since or now + course.takes) + soak)
    for stage in course.stages[course.stage + 1 :]:
        if place * course.members < wanted_count(stage, course.members) * PROGRESS_FULL:
            return turn
        turn += course.takes + timedelta(seconds=stage.soak_s)
    return None


def _reached(facts: Facts, course: Course) -> Link:
    seen = _numbers(facts, course)
    if facts.running == target(facts.directive):
        text = f"rollout {course.name} is {course.state.replace('_', ' ')}"
        return Link(True, str(course.state), text, seen=seen)
    return Link(True, "in-progress", f"rollout {course.name} has reached it", seen=seen)


# --- what the release and the host say -------------------------------------------------------------------


def _release(facts: Facts, version: str) -> Iterator[Link]:
    """What no waiting mends, as `updater.decide` asks it."""
    bundle = facts.bundles.get(version)
    if bundle is None:
        text = f"{version} has no bundle for {facts.platform}"
        then = f"release build --platform {facts.platform}, then push"
        yield Link(False, str(Reason.NO_BUNDLE), text, then, says=Reason.NO_BUNDLE)
        return
    yield Link(True, "platform", f"platform {facts.platform} has a bundle", seen={"version": version})
    for reason, text, then in _refusals(facts, version, bundle):
        yield Link(False, str(reason), text, then, says=reason)


def _refusals(facts: Facts, version: str, bundle: Bundle) -> Iterator[tuple[Reason, str, str]]:
    floor, here = facts.policy.floor_seq, facts.running_seq
    if bundle.gates and facts.gate not in bundle.gates:
        gates = ", ".join(sorted(bundle.gates))
        yield Reason.GATE, f"{version} is signed for the gates {gates}; this agent has {facts.gate!r}", ""
    if bundle.seq < floor:
        text = f"{version} has seq {bundle.seq}, the floor is {floor}"
        yield Reason.BELOW_FLOOR, text, "release rollout start with a newer one"
    if bundle.seq in facts.policy.revoked_seq:
        text = f"{version} (seq {bundle.seq}) is revoked"
        yield Reason.REVOKED, text, "release rollout start with another one"
    if facts.launcher is not None and bundle.min_launcher > facts.launcher:
        text = f"{version} needs launcher {bundle.min_launcher}, this host has {facts.launcher}"
        yield Reason.OLD_LAUNCHER, text, "agent upgrade-launcher (there)"
    if not facts.running:
        return
    if bundle.seq < here and facts.directive is not None and not facts.directive.rollback:
        text = f"{version} is older than {facts.running} and no rollback was asked"
        yield Reason.OLDER, text, f"release cohort pin {facts.cohort} {version}"
    if bundle.seq > here and here < bundle.upgrade_from_seq:
        text = f"{version} installs only over seq {bundle.upgrade_from_seq}; {facts.running} is {here}"
        then = "release cohort create NAME --match 'version<BETWEEN' --release BETWEEN --priority N"
        yield Reason.STEPPING_STONE, text, then


def _postponed(facts: Facts, version: str, now: datetime) -> Iterator[Link]:
    """What waiting mends, as `updater.decide` asks it; last what is asked when the bundle is there."""
    if facts.phase == Phase.TRIAL:
        yield Link(False, str(Reason.IN_TRIAL), "a version is on trial there", says=Reason.IN_TRIAL)
    elif facts.phase != Phase.IDLE:
        yield Link(True, facts.phase, f"it is at work: {facts.phase}")
    if facts.held:
        yield Link(False, str(Reason.HELD), _hold(facts), "agent unhold (there)", says=Reason.HELD)
    if facts.failed is not None:
        state, reason, detail = facts.failed
        text = f"{version} {state.replace('_', ' ')} here: {reason} {detail}".strip(": ")
        # What failed before a trial is tried again by itself; the device says so when it does not.
        skips = state == AttemptState.ROLLED_BACK or facts.reason == Reason.SKIPPED
        yield Link(False, state, text, _again(facts), says=Reason.SKIPPED if skips else None)
    if facts.running and facts.directive is not None:
        yield from _by_the_clock(facts, facts.directive, now)
    if facts.line is not None:
        yield _line(facts.line, has_all=facts.reason == Reason.LEASE)
    if facts.room is not None:
        yield _room(facts.room)


def _again(facts: Facts) -> str:
    """How a bundle that failed there is tried once more: for all of a rollout, or there alone."""
    course = facts.course if facts.wants.pin is None else None
    if course is not None and course.state in (State.RUNNING, State.PAUSED, State.COMPLETED):
        return f"release rollout retry {course.name}"
    return "agent retry (there)"


def _hold(facts: Facts) -> str:
    """That it is held, and why where its last decision was about that."""
    said = facts.detail if facts.reason == Reason.HELD else ""
    return said if said.startswith(HELD) else f"{HELD}: {said}".rstrip(": ")


def _by_the_clock(facts: Facts, directive: Directive, now: datetime) -> Iterator[Link]:
    window = directive.window
    if window is not None and is_open(window, now):
        yield Link(True, "window", "its window is open", seen=window.to_json())
    elif window is not None:
        opens = next_opening(window, now)
        text = f"the window opens {opens:%a %H:%M} UTC" if opens else "the window does not open"
        code = Reason.OUTSIDE_WINDOW
        yield Link(False, str(code), text, until=opens, says=code, seen=window.to_json())
    begins = (facts.told_at or now) + splay(facts.agent_id, directive)
    if now < begins:
        text = f"its turn in the splay comes {begins:%H:%M:%S} UTC"
        yield Link(False, str(Reason.SPLAY), text, until=begins, says=Reason.SPLAY)


def _line(line: Line, *, has_all: bool) -> Link:
    """Whether it may download; `has_all`: it has the bundle, and waits for what comes after that."""
    seen = {"domain": line.domain, "budget_bps": line.budget_bps, "taken_bps": line.taken_bps}
    if line.mine_bps:
        return Link(True, "budget", f"it may download with {line.mine_bps / 1000:g} kB/s", seen=seen)
    if has_all or not line.full:
        return Link(True, "budget", line.text, seen=seen)
    return Link(False, str(Reason.BUDGET), line.text, until=line.until, says=Reason.BUDGET, seen=seen)


def _room(room: Room) -> Link:
    seen = {"domain": room.domain, "taken": room.taken, "most": room.most}
    if room.mine or room.taken < room.most:
        text = "it has the lease" if room.mine else f"{room.domain} has room: {room.taken} of {room.most}"
        return Link(True, "lease", text, seen=seen)
    text = f"{room.taken} of {room.domain} are at it, {room.most} may be"
    return Link(False, str(Reason.LEASE), text, until=room.until, says=Reason.LEASE, seen=seen)


def _reported(facts: Facts, links: Sequence[Link]) -> Iterator[Link]:
    """What the agent says of itself and nothing above explains, such as a stop file or a full disk."""
    explained = {str(link.says) for link in links if not link.ok}
    if facts.held or facts.phase != Phase.IDLE or facts.reason in UNREMARKABLE | explained:
        return
    then = _again(facts) if facts.reason == Reason.SKIPPED else THEN.get(facts.reason, "")
    says = Reason(facts.reason) if facts.reason in set(Reason) else None
    text = f"it says {facts.reason}: {facts.detail}".rstrip(": ")
    yield Link(False, facts.reason, text, then, says=says)
