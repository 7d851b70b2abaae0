"""Whether this agent takes a release, and why: the check's last steps as one pure function.

What reads the disk and the network has collected `Facts` before; what acts on the `Decision` comes after, in
`updater.poll`. The order of the rules is that of design section 2, so `why` names the first that speaks.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING

from agent_core.directive import Assignment, assign, splay
from agent_core.late import late_dataclass
from agent_core.window import is_open, next_opening, zone_of
from agent_core.wire import Directive, Policy, Reason, ReleaseFacts

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent_core.wire import Window

UNKNOWN_ZONE_AGAIN = timedelta(hours=1)
"""How soon a host that lacked its window's time zone looks whether somebody installed it."""


class Action(StrEnum):
    """What the shell is to do."""

    INSTALL = "install"
    STAY = "stay"
    REFUSE = "refuse"


@late_dataclass(frozen=True)
class Running:
    """What is good on this host; `seq` is 0 where it was not recorded."""

    version: str
    digest: str
    seq: int


@late_dataclass(frozen=True)
class Hold:
    """The operator's word on the host: take nothing new, until a moment or until told otherwise."""

    until: datetime | None
    reason: str

    def holds(self, now: datetime) -> bool:
        return self.until is None or now < self.until


@late_dataclass(frozen=True)
class Offer:
    """The release the directive leads to, as top-level targets describe it here."""

    facts: ReleaseFacts

    @property
    def digest(self) -> str:
        """What names the bundle here: of its index, which names every file, the version and the checks."""
        return self.facts.index_sha256[:12]


@late_dataclass(frozen=True)
class Facts:
    """All that the decision may know.

    Attributes:
        platforms: what this host can run, best first.
        floor_seen: the highest floor ever seen here; it never falls.
        directive_seen: when this revision of the directive was first seen here, for the splay.
        launcher: what the launcher of this host can do; a release may ask for more by `min_launcher`.
        skip_reason: tells why a digest is skipped under a retry epoch, or None when it is not.
    """

    agent_id: str
    product: str
    gate: str
    platforms: tuple[str, ...]
    running: Running | None
    directive: Directive
    directive_seen: datetime
    policy: Policy
    offer: Offer | None
    hold: Hold | None
    floor_seen: int
    in_trial: bool
    launcher: int
    skip_reason: Callable[[str, int], str | None]


@late_dataclass(frozen=True)
class Decision:
    """What to do, the reason, words for a person, and when to look again (None: at the next poll)."""

    action: Action
    reason: Reason
    detail: str = ""
    again: datetime | None = None

    @property
    def installs(self) -> bool:
        return self.action is Action.INSTALL


def wanted(facts: Facts) -> Assignment:
    """The version that the directive assigns to this agent."""
    return assign(facts.directive, facts.agent_id, facts.running.version if facts.running else None)


def decide(facts: Facts, now: datetime) -> Decision:
    """Say whether to install the offered release.

    Args:
        facts: collected by the shell; `offer` belongs to the version of `wanted(facts)`.
        now: trusted time, UTC.

    Returns:
        INSTALL with update, first-install or go-back; STAY when nothing is to be done now; REFUSE when the
        server asks for what the release managers, or this host, do not allow.
    """
    directive = facts.directive
    if directive.product != facts.product:
        return _refuse(Reason.WRONG_PRODUCT, f"the directive is for {directive.product}")
    assignment = wanted(facts)
    if assignment.version is None:
        return Decision(Action.STAY, assignment.reason, _why_stay(facts, assignment))
    refusal = _refusal(facts, assignment.version)
    if refusal:
        return refusal
    return _postponed(facts, now) or Decision(Action.INSTALL, _kind(facts), f"to {assignment.version}")


def _refuse(reason: Reason, detail: str) -> Decision:
    return Decision(Action.REFUSE, reason, detail)


def _kind(facts: Facts) -> Reason:
    if facts.running is None:
        return Reason.FIRST_INSTALL
    offer = facts.offer
    return Reason.GO_BACK if offer and offer.facts.seq < facts.running.seq else Reason.UPDATE


def _refusal(facts: Facts, version: str) -> Decision | None:
    """What no waiting mends: product, platform, gate, floor, revoked, older, stepping stone."""
    if facts.offer is None:
        listed = ", ".join(facts.platforms)
        return _refuse(Reason.NO_BUNDLE, f"{version} has no signed bundle for this host ({listed})")
    release = facts.offer.facts
    if release.product != facts.product:
        return _refuse(Reason.WRONG_PRODUCT, f"{version} belongs to {release.product}")
    if release.platform not in facts.platforms:
        return _refuse(Reason.WRONG_PLATFORM, f"{version} is for {release.platform}")
    if release.gates and facts.gate not in release.gates:
        return _refuse(
            Reason.GATE, f"{version} is signed for {', '.join(release.gates)}; this host is {facts.gate!r}"
        )
    floor = max(facts.policy.floor_seq, facts.floor_seen)
    if release.seq < floor:
        return _refuse(Reason.BELOW_FLOOR, f"{version} has seq {release.seq}, the floor is {floor}")
    if release.seq in facts.policy.revoked_seq:
        return _refuse(Reason.REVOKED, f"{version} (seq {release.seq}) is revoked")
    if release.min_launcher > facts.launcher:
        here = f"this host has {facts.launcher}: agent upgrade-launcher"
        return _refuse(Reason.OLD_LAUNCHER, f"{version} needs launcher {release.min_launcher}, {here}")
    return _wrong_step(facts, release)


def _wrong_step(facts: Facts, release: ReleaseFacts) -> Decision | None:
    running = facts.running
    if running is None:
        return None
    if release.seq < running.seq and not facts.directive.rollback:
        return _refuse(
            Reason.OLDER, f"{release.version} is older than {running.version} and no rollback was asked"
        )
    if release.seq > running.seq and running.seq < release.upgrade_from_seq:
        return _refuse(
            Reason.STEPPING_STONE, f"{release.version} installs only over seq {release.upgrade_from_seq}"
        )
    return None


def _postponed(facts: Facts, now: datetime) -> Decision | None:
    """What waiting mends: a running trial, hold, skip memory, window, splay."""
    directive, offer = facts.directive, facts.offer
    if facts.in_trial:
        return Decision(Action.STAY, Reason.IN_TRIAL, "the present version is still on trial")
    if facts.hold and facts.hold.holds(now):
        until = f" until {facts.hold.until:%Y-%m-%d %H:%M} UTC" if facts.hold.until else ""
        return Decision(
            Action.STAY, Reason.HELD, f"held on the host{until}: {facts.hold.reason}", facts.hold.until
        )
    skip = facts.skip_reason(offer.digest, directive.retry_epoch) if offer else None
    if skip:
        return Decision(Action.STAY, Reason.SKIPPED, f"this bundle failed here before ({skip})")
    if facts.running is None:
        return None
    if directive.window and not is_open(directive.window, now):
        return _outside(directive.window, now)
    begins = facts.directive_seen + splay(facts.agent_id, directive)
    if now < begins:
        return Decision(
            Action.STAY, Reason.SPLAY, f"its turn in the splay comes {begins:%H:%M:%S} UTC", begins
        )
    return None


def _outside(window: Window, now: datetime) -> Decision:
    opens = next_opening(window, now)
    if zone_of(window) is None:
        detail = (
            f"this host does not know the time zone {window.zone[:64]!r} of its window, which is closed"
            " until it does: install the host's tzdata"
        )
        return Decision(Action.STAY, Reason.OUTSIDE_WINDOW, detail, now + UNKNOWN_ZONE_AGAIN)
    detail = f"the window opens {opens:%a %H:%M} UTC" if opens else "the window does not open"
    return Decision(Action.STAY, Reason.OUTSIDE_WINDOW, detail, opens)


def _why_stay(facts: Facts, assignment: Assignment) -> str:
    directive = facts.directive
    if assignment.reason is Reason.NOT_YET:
        return f"{directive.release} is at {directive.progress / 100:g}% of {directive.cohort}"
    if assignment.reason is Reason.SUSPENDED:
        return f"cohort {directive.cohort} takes nothing new for now"
    if assignment.reason is Reason.DISABLED:
        return f"updates of cohort {directive.cohort} are switched off"
    return f"{directive.cohort} is on {facts.running.version}" if facts.running else ""
