"""The gate of a trial: given what is known of the new version, wait, re-arm, commit or roll back. Pure.

Local facts decide a rollback; the network only delays a commit (design section 4). A version is committed
when it has been healthy for the whole observation time in one run, its hook is done, every check passes right
now, and this very version fetched and verified the manifest: one that could not update itself is never kept.
"""

from __future__ import annotations

from enum import StrEnum

from agent_core.late import late_dataclass
from agent_core.wire import Reason


class Step(StrEnum):
    """What the shell does next with a version on trial."""

    WAIT = "wait"
    """Nothing is proven yet; the dead-man keeps running."""
    REARM = "rearm"
    """The local checks pass: put the dead-man off, keep observing."""
    COMMIT = "commit"
    ROLL_BACK = "roll-back"


@late_dataclass(frozen=True)
class TrialFacts:
    """What is known of the version on trial, in this run of it.

    Attributes:
        started_s: when this run began, boot clock.
        observe_s: how long it must be healthy in one run.
        healthy: no check has failed more often in a row than it may.
        ready: every check passes right now.
        healthy_since_s: since when `healthy` holds after every check had passed once; None before that.
        manifest_verified: this version itself fetched and verified the manifest, in this run.
        workload_exits: how often the workload ended in this run without being asked to.
        exits_allowed: how many of these are tolerated.
        hooked_s: when the hook after the activation ended well in this run, boot clock (its beginning when
            the version has none); None before that.
        hook_failure: why that hook failed; empty when it did not.
        given_up: what the good version verified, where this one could not, that asks for another; else empty.
        boots_left: what the launcher left in the record when it began this run; below 0 is one too many.
        failures: the failing checks in words, for the reason people read.
    """

    started_s: float
    observe_s: float
    healthy: bool
    ready: bool
    healthy_since_s: float | None
    manifest_verified: bool
    workload_exits: int = 0
    exits_allowed: int = 0
    hooked_s: float | None = 0.0
    hook_failure: str = ""
    given_up: str = ""
    boots_left: int = 0
    failures: tuple[str, ...] = ()


@late_dataclass(frozen=True)
class Verdict:
    """The next step and why; `detail` is for people."""

    step: Step
    reason: Reason
    detail: str = ""


def observed_s(facts: TrialFacts, now_s: float) -> float:
    """How long this run has been healthy with its hook done; no earlier run and no future counts."""
    if facts.healthy_since_s is None or facts.hooked_s is None:
        return 0.0
    return max(0.0, now_s - max(facts.healthy_since_s, facts.hooked_s, facts.started_s))


def judge(facts: TrialFacts, now_s: float) -> Verdict:
    """Say what is to be done with the version on trial.

    Args:
        facts: of this run.
        now_s: boot clock; a sleeping host does not age its trial, the monitor moves `healthy_since_s`.

    Returns:
        `ROLL_BACK` for local faults only, and for a signed word that this version cannot read. Without the
        manifest the verdict stays `REARM` for as long as it takes: a good version is not punished for a
        network that is down, nor for a server that answers 429.
    """
    if facts.boots_left < 0:
        return Verdict(Step.ROLL_BACK, Reason.BOOTS_USED_UP, "it was started more often than allowed")
    if facts.workload_exits > facts.exits_allowed:
        detail = f"the workload ended {facts.workload_exits} time(s), {facts.exits_allowed} allowed"
        return Verdict(Step.ROLL_BACK, Reason.WORKLOAD_EXITED, _with(detail, facts))
    if not facts.healthy:
        return Verdict(
            Step.ROLL_BACK, Reason.UNHEALTHY, _with("a check failed more often than allowed", facts)
        )
    if facts.hook_failure:
        return Verdict(Step.ROLL_BACK, Reason.POST_ACTIVATE, _with(facts.hook_failure, facts))
    if facts.given_up and not facts.manifest_verified:
        detail = f"it cannot verify the manifest, the version before can, and is to run: {facts.given_up}"
        return Verdict(Step.ROLL_BACK, Reason.CANNOT_UPDATE, _with(detail, facts))
    if not facts.ready or facts.healthy_since_s is None:
        return Verdict(Step.WAIT, Reason.IN_TRIAL, _with("not every check passes yet", facts))
    if facts.hooked_s is None:
        return Verdict(Step.REARM, Reason.IN_TRIAL, "healthy; its hook after the activation is running")
    seen_s = observed_s(facts, now_s)
    if seen_s < facts.observe_s:
        return Verdict(Step.REARM, Reason.IN_TRIAL, f"healthy for {seen_s:.0f} s of {facts.observe_s:.0f} s")
    if not facts.manifest_verified:
        return Verdict(Step.REARM, Reason.OFFLINE, "healthy; the manifest could not be fetched by it yet")
    return Verdict(Step.COMMIT, Reason.OBSERVED, f"healthy for {seen_s:.0f} s")


def _with(detail: str, facts: TrialFacts) -> str:
    return "; ".join([detail, *facts.failures])[:500]
