"""The command that says why this host does, or does not, update, and what would change that."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console, slots
from agent_core.wire import Reason
from updater.commands.common import own_root_option, sentence
from updater.commands.status import Host, ago, look
from updater.decide import Action

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from updater.device import Outcome

CHANGED_BY = {
    Reason.NOT_YET: "the rollout going on: release rollout status; to move it now: release agents move",
    Reason.SUSPENDED: "the end of a pause or a halt: release rollout status",
    Reason.DISABLED: "an operator: release cohort show",
    Reason.HELD: "agent unhold",
    Reason.STOP_FILE: "whoever stopped updates takes the file away",
    Reason.OUTSIDE_WINDOW: "the window, which opens by itself; agent install FILE does not wait for it",
    Reason.SPLAY: "nothing to do: its turn comes by itself",
    Reason.LEASE: "nothing to do: it asks again by itself; release cohort show says how many may at once",
    Reason.BUDGET: "nothing to do: it asks again by itself; release cohort show has its site's budget",
    Reason.BACKOFF: "nothing to do: it tries again by itself; agent once tries now",
    Reason.SKIPPED: "agent retry here, or release rollout retry for all",
    Reason.IN_TRIAL: "the end of the trial: agent status",
    Reason.NO_COHORT: "labels that a cohort matches (agent.toml), or release agents move",
    Reason.PENDING: "an operator: release agents accept",
    Reason.RETIRED: "a new identity: agent enroll --new-key; then an operator may let it in",
    Reason.NO_DIRECTIVE: "a release for the cohort: release cohort show, release rollout start",
    Reason.WRONG_PRODUCT: "whoever runs the server: its directive is for another product",
    Reason.WRONG_PLATFORM: "a bundle for this platform: release push, on such a machine",
    Reason.NO_BUNDLE: "a bundle for this platform: release push, on such a machine",
    Reason.GATE: "a release that is signed for this host's gate",
    Reason.BELOW_FLOOR: "a release at or above the floor: release push",
    Reason.REVOKED: "another release: this one must never run again",
    Reason.OLDER: "release cohort pin, which allows to go back; here agent rollback",
    Reason.STEPPING_STONE: "a release in between first, by a cohort on it: release agents why",
    Reason.OLD_LAUNCHER: "agent upgrade-launcher, then a restart",
    Reason.EXPIRED: "the server signing anew (release-server doctor), or this host's clock (agent doctor)",
    Reason.BAD_CERTIFICATE: "server.ca_file, the server's address, or this host's clock: agent doctor",
    Reason.OFFLINE: "the way to the server: agent doctor; without one: agent install FILE",
    Reason.OVERLOADED: "nothing to do: it comes back later by itself",
    Reason.NO_ROOM: "room on the disk: agent doctor",
    Reason.DISK: "the disk: agent doctor",
    Reason.INTERNAL: "whoever makes relfleet: agent diagnostics -o FILE",
    Reason.PREFLIGHT: "another release; agent retry if the fault was this host's",
    Reason.PREFLIGHT_VERSION: "another release: this one says another version than its manifest",
    Reason.PRE_ACTIVATE: "what the release's own hook asks for; then agent retry",
}
"""For each reason to stay, what would change it."""
STANDINGS = {
    str(Reason.PENDING): "it is enrolled, and waits for an operator to accept it",
    str(Reason.RETIRED): "the server has retired it and takes no reports; what runs keeps running",
}
DISTRUST = "whoever runs the server: what it serves is not what the release keys signed; agent doctor"


def explained(host: Host) -> dict[str, Any]:
    """What `agent why --json` says: a summary, and a chain whose last link is the decision."""
    device, record = host.device, host.record or host.lost
    runs = slots.version_of(record.good) if record else "nothing yet"
    outcome = device.outcome()
    chain = list(_chain(host, outcome))
    wanted = outcome.version if outcome and outcome.version not in ("", runs) else ""
    summary = f"{device.identity.agent_id} runs {runs}"
    if wanted:
        summary += f"; {wanted} is what it is asked to run"
    if record and record.phase == slots.TRIAL:
        summary += f"; {slots.version_of(record.candidate)} is on trial"
    if not all(link["ok"] for link in chain):
        summary += ". It is not updating because:"
    return {"summary": summary, "chain": chain}


def _chain(host: Host, outcome: Outcome | None) -> Iterator[dict[str, Any]]:
    """What has to be so for an update, in order."""
    device, hold = host.device, host.device.hold()
    if host.problem:
        yield _link(ok=False, code="bad-settings", text=host.problem, then="agent config check; agent doctor")
    if not host.is_up:
        yield _link(ok=False, code="stopped", text="no agent runs here", then="agent run, or start the unit")
    if host.doubt:
        yield _link(ok=True, code="identity", text=host.doubt, then="")
    cohort = device.identity.cohort
    if device.identity.standing:
        text = STANDINGS.get(device.identity.standing, device.identity.standing)
        yield _link(
            ok=False, code=device.identity.standing, text=text, then=_changed_by(device.identity.standing)
        )
        return
    then = CHANGED_BY[Reason.NO_COHORT] if device.identity.enrolled else "agent enroll --token-file FILE"
    yield _link(ok=cohort is not None, code="cohort", text=f"cohort {cohort or 'none'}", then=then)
    if hold is not None and hold.holds(host.now):
        until = clock.iso(hold.until) if hold.until else "somebody ends it"
        yield _link(ok=False, code="held", text=f"held until {until}: {hold.reason}", then="agent unhold")
    if outcome is None:
        yield _link(ok=False, code="unchecked", text="no check was done yet", then="agent once")
        return
    at = ago(outcome.at, host.now)
    text = f"manifest verified, {at}" if outcome.verified else f"the manifest could not be verified, {at}"
    yield _link(ok=outcome.verified, code="verified", text=text, then=_changed_by(outcome.reason))
    moves = outcome.action is Action.INSTALL or outcome.reason == Reason.UP_TO_DATE
    said = sentence(outcome, host.record.good if host.record else "")
    yield _link(ok=moves, code=outcome.reason, text=said, then=_changed_by(outcome.reason))
    failures, words = host.failing
    if failures and not outcome.failed:
        code = words.partition(":")[0]
        text = f"the last {failures} polls failed; {words}"
        yield _link(ok=False, code=code, text=text, then=_changed_by(code))


def _changed_by(reason: str) -> str:
    with suppress(ValueError):
        return CHANGED_BY.get(Reason(reason), DISTRUST)
    return "agent doctor"


def _link(*, ok: bool, code: str, text: str, then: str) -> dict[str, Any]:
    return {"ok": ok, "code": code, "text": text.partition("\n")[0], "then": "" if ok else then}


def _shown(found: dict[str, Any]) -> str:
    lines = [found["summary"]]
    for place, link in enumerate(found["chain"]):
        lines.append(f"  {'ok' if link['ok'] else 'no'}  {link['text']}")
        following = found["chain"][place + 1 : place + 2]
        if link["then"] and not (following and following[0]["then"] == link["then"]):
            lines.append(f"      it would change by:  {link['then']}")
    return "\n".join(lines)


@click.command()
@own_root_option
def why(root: Path) -> None:
    """Why this host does, or does not, update; and what would change that."""
    found = explained(look(root))
    console.emit(found, text=lambda: _shown(found))
