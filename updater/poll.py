"""One poll, top to bottom: look, refresh, decide, download, stage, preflight. The only orchestrator.

The resident agent calls `is_due` and `is_unchanged`, which need the standard library only. When there is
something to find out it runs `check` in a short-lived process, which loads TUF and cryptography, prints one
`Outcome`, and ends. Nothing that goes wrong leaves `check`: it becomes an outcome with a reason.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING

from agent_core import clock, disk, slots
from agent_core.bundle import Index, host_platforms
from agent_core.errors import ConflictError, DiskError, RelfleetError, TrustError, UnreachableError
from agent_core.hooks import PRE_ACTIVATE, run_hook
from agent_core.late import late_dataclass
from agent_core.layout import clear_left_overs
from agent_core.spool import Spool
from agent_core.wire import AttemptState, Directive, Mode, Reason
from updater import attempt as attempts
from updater import freshness, lease, notes, offline, report, stop
from updater import identity as identities
from updater.attempt import Attempt
from updater.decide import Action, Decision, Facts, Offer, decide, wanted
from updater.device import Outcome, skip_reason
from updater.share import Line, NoShareError

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime
    from pathlib import Path

    from agent_core.layout import Layout
    from agent_core.release_file import ReleaseFile
    from updater.catalog import Catalog, Release
    from updater.decide import Running
    from updater.device import Device
    from updater.stage import Retention
    from updater.transport import Origin

log = logging.getLogger(__name__)


# --- the resident's half --------------------------------------------------------------------------------


def is_due(last: Outcome | None, good: str, now: datetime, *, unverified: bool = False) -> bool:
    """Whether a check is due whatever the server says: never done, not finished, or its time has come.

    A clock that was set back since the last check makes one due as well: the time it was to come at was
    another clock's.

    Args:
        last: what the last check came to.
        good: the version that the record calls good; what was to be installed may be that by now.
        now: wall clock.
        unverified: this version is on trial and has not verified the manifest itself. No 304 stands for that:
            a checker that was killed after its last note had told nobody.
    """
    if unverified or last is None or last.failed:
        return True
    if last.action is Action.INSTALL:
        return last.candidate != good
    if last.again is None:
        return False
    return clock.parse_iso(last.again) <= now or now < clock.parse_iso(last.at)


def is_unchanged(device: Device) -> bool:
    """The poll itself: one conditional GET; False when a check has something to find out.

    Raises:
        UnreachableError, TrustError: as of `freshness.is_unchanged`.
    """
    return freshness.is_unchanged(
        device.transport(),
        freshness.recall(device.layout.poll, device.layout.tuf, clock.now()),
        device.layout.tuf,
        now=clock.now(),
        boot_s=clock.boot_s(),
        boot_id=freshness.boot_id(),
    )


# --- the checker's half ---------------------------------------------------------------------------------


def check(device: Device, *, progress: Callable[[int, int], None] | None = None) -> Outcome:
    """Find out what this agent should run, and stage it.

    Args:
        device: this one; the server may name another cohort for it on the way.
        progress: told bytes received and in all, for people who watch.

    Returns:
        What came of it; also kept for the resident agent, `status` and the reports.
    """
    if device.identity.cohort is None or report.has_news(device):
        device = tell(device)
    before = device.outcome()
    outcome, memory = _guarded(device, progress)
    try:
        device.remember_outcome(outcome)
        if memory is not None:
            # Last: a check that is cut short must be done again, so no 304 may stand for it before its end.
            freshness.remember(device.layout.poll, memory)
    except (RelfleetError, OSError) as error:
        log.warning("the outcome could not be kept", extra={"why": str(error)})
    clear(device)
    if before is None or before.reason != outcome.reason or report.has_news(device):
        tell(device)
    return outcome


def tell(device: Device) -> Device:
    """Tell the server; that it does not hear us is no reason not to update (case 18)."""
    try:
        device, _ = report.send_signed(device)
    except (RelfleetError, OSError) as error:
        log.warning("report not sent", extra={"why": str(error)})
        with suppress(RelfleetError):  # the refusal may have said that this agent is retired
            return replace(device, identity=identities.load(device.layout))
    return device


def _guarded(
    device: Device, progress: Callable[[int, int], None] | None
) -> tuple[Outcome, freshness.Memory | None]:
    """The outcome, and what is to be remembered of the refresh if it was verified."""
    memory = None
    try:
        origin = device.transport()
        with _catalog(device, origin) as catalog:
            memory = _refresh(device, catalog)
            now = freshness.trusted_time(memory, clock.now())
            return _Check(device, catalog, origin, now, progress).run(), memory
    except RelfleetError as error:
        verified = memory is not None or _is_vouched_for(device, error)
        return Outcome.of_failure(error, verified=verified), memory
    except OSError as error:
        return Outcome.of_failure(error, reason=Reason.DISK, verified=memory is not None), memory
    except Exception as error:
        log.exception("check failed")
        detail = f"{type(error).__name__}: {error}"
        return Outcome.of_failure(error, detail=detail, verified=memory is not None), memory


def _catalog(device: Device, origin: Origin) -> Catalog:
    from updater.catalog import Catalog

    bootstrap = disk.read_file(device.layout.trust_root)
    return Catalog(device.layout.tuf, origin, device.identity.product, bootstrap)


def _is_vouched_for(device: Device, error: RelfleetError) -> bool:
    """Whether this version came by a file, and finds itself signed in what that file brought.

    Where no server can be asked, or its signers have been away for too long, this stands for having fetched
    the manifest: the same code ran over the same keys. An answer that is wrong is never made up for.
    """
    if error.reason not in (Reason.OFFLINE, Reason.OVERLOADED, Reason.EXPIRED):
        return False
    attempt, targets = attempts.load(device.attempt_file), offline.kept(device.layout)
    record = slots.read(device.layout.root)
    if attempt is None or targets is None or record is None:
        return False
    if attempt.salt != offline.SALT or record.candidate != attempt.name:
        return False
    try:
        with _catalog(device, offline.KeptOrigin(targets)) as catalog:
            memory = freshness.recall(device.layout.poll, device.layout.tuf, clock.now())
            catalog.take(clock.now(), memory.high_water, time_keys=memory.time_keys)
            release = catalog.release(attempt.version, list(host_platforms()))
    except (RelfleetError, OSError) as problem:
        log.warning("the kept metadata does not vouch for this version", extra={"why": str(problem)})
        return False
    return release is not None and release.facts.index_sha256.startswith(attempt.digest)


def check_file(
    device: Device,
    file: ReleaseFile,
    *,
    older: bool = False,
    progress: Callable[[int, int], None] | None = None,
    staged: Callable[[str], object] = lambda _: None,
) -> Outcome:
    """As `check`, with a release file in the place of the server, because a person said so.

    Args:
        device: this one.
        file: what the person brought; not trusted at all.
        older: a version older than the one that runs may be installed.
        progress: told bytes read and in all.
        staged: given the candidate's name while no other check can clear it away.

    Returns:
        What came of it; a refusal is one too. It is not kept: the next poll asks the server as ever.

    Raises:
        RelfleetError: the file cannot be believed, or the version could not be staged.
    """
    origin, title = offline.FileOrigin(file), file.title
    if title.product != device.identity.product:
        detail = f"the file holds {title.product}, this host runs {device.identity.product}"
        return Outcome(Action.REFUSE, str(Reason.WRONG_PRODUCT), detail, clock.iso(clock.now()))
    with _catalog(device, origin) as catalog:
        memory = freshness.recall(device.layout.poll, device.layout.tuf, clock.now())
        kept = offline.kept(device.layout)
        targets = catalog.take(clock.now(), memory.high_water, kept, memory.time_keys)
        offline.keep(device.layout, targets)
        now = freshness.trusted_time(memory, clock.now())
        wish = offline.directive(device, title.version, older=older)
        outcome = _Check(device, catalog, origin, now, progress, by_hand=True).follow(wish, now)
        if outcome.candidate:
            staged(outcome.candidate)
        return outcome


def _refresh(device: Device, catalog: Catalog) -> freshness.Memory:
    """Full TUF refresh; what is to be remembered of it."""
    known = freshness.recall(device.layout.poll, device.layout.tuf, clock.now())
    verified = catalog.refresh(clock.now(), known.high_water, known.time_keys)
    return verified.memory(clock.boot_s(), freshness.boot_id())


_NO_COHORT = (Reason.NO_COHORT, "no cohort on the server matches this agent")
_OUTSIDE = {
    str(Reason.PENDING): (Reason.PENDING, "it waits for an operator to accept it"),
    str(Reason.RETIRED): (Reason.RETIRED, "the server has retired this agent; what it runs keeps running"),
}
"""Why an agent that is enrolled is told nothing to run, by its standing."""


@late_dataclass()
class _Check:
    """The rest of one check, under the lock of the verified catalog."""

    device: Device
    catalog: Catalog
    origin: Origin
    now: datetime
    progress: Callable[[int, int], None] | None
    by_hand: bool = False  # from a file: no bandwidth to save, and no server to tell on the way
    fallback: str = ""  # why a delta did not serve
    record: slots.Record | None = None  # by which it decides
    line: Line | None = None  # by which a bundle comes

    def run(self) -> Outcome:
        cohort = self.device.identity.cohort
        if cohort is None:
            return self._stay(*_OUTSIDE.get(self.device.identity.standing, _NO_COHORT))
        directive = self.catalog.directive(cohort)
        if directive is None:
            return self._stay(Reason.NO_DIRECTIVE, f"cohort {cohort} has no directive yet")
        return self.follow(directive, self.device.see(directive, self.now).since)

    def follow(self, directive: Directive, since: datetime) -> Outcome:
        """Decide by a directive that was first seen at `since`, and stage what it asks for."""
        facts, release = self._facts(directive, since)
        decision = decide(facts, self.now)
        outcome = self._outcome(decision, facts)
        self._let_go(facts)
        if not decision.installs or release is None:
            self._note_skip(decision, facts)
            return outcome
        if halt := self._stop():
            return self._wait_for_stop(outcome, halt)
        return self._install(outcome, release, directive)

    def _facts(self, directive: Directive, since: datetime) -> tuple[Facts, Release | None]:
        device = self.device
        record = slots.read(device.layout.root)
        policy = self.catalog.policy(offline.kept(device.layout))
        if record is not None and policy.floor_seq > record.floor:
            record = slots.raise_floor(device.layout.root, policy.floor_seq)
        self.record = record
        facts = Facts(
            agent_id=device.identity.agent_id,
            product=device.identity.product,
            gate=device.identity.gate,
            platforms=tuple(host_platforms()),
            running=self._running(),
            directive=directive,
            directive_seen=since,
            policy=policy,
            offer=None,
            hold=device.hold(),
            floor_seen=record.floor if record else 0,
            in_trial=record is not None and record.phase != slots.IDLE,
            launcher=_launcher(device.layout),
            skip_reason=lambda digest, epoch: skip_reason(record, digest, epoch),
        )
        version = wanted(facts).version
        release = self.catalog.release(version, list(facts.platforms)) if version else None
        return replace(facts, offer=Offer(release.facts) if release else None), release

    def _running(self) -> Running | None:
        """What is good here, with its number as it is signed: a note of it is read where it no longer is."""
        running = self.device.running()
        with suppress(TrustError):
            release = self.catalog.release(running.version, list(host_platforms())) if running else None
            if running and release and release.facts.index_sha256.startswith(running.digest):
                return replace(running, seq=release.facts.seq)
        return running

    def _outcome(self, decision: Decision, facts: Facts) -> Outcome:
        return Outcome(
            action=decision.action,
            reason=str(decision.reason),
            detail=decision.detail,
            at=clock.iso(clock.now()),
            verified=True,
            version=wanted(facts).version or "",
            again=clock.iso(decision.again) if decision.again else None,
            retry_epoch=facts.directive.retry_epoch,
            floor=facts.policy.floor_seq,
        )

    def _stay(self, reason: Reason, detail: str) -> Outcome:
        return Outcome(Action.STAY, str(reason), detail, clock.iso(clock.now()), verified=True)

    def _note_skip(self, decision: Decision, facts: Facts) -> None:
        """A rollout counts an agent that skips its release; tell it once."""
        if decision.reason is not Reason.SKIPPED or facts.offer is None:
            return
        version, digest, salt = facts.offer.facts.version, facts.offer.digest, facts.directive.salt
        last = attempts.load(self.device.attempt_file)
        if last and last.is_for(version, digest, salt):
            return
        self._note(
            Attempt(version, digest, salt, AttemptState.SKIPPED, str(decision.reason), decision.detail)
        )

    def _let_go(self, facts: Facts) -> None:
        """An attempt before its trial ends with the wish for it, or reports would name it for ever."""
        if facts.in_trial or self.by_hand:
            return
        with attempts.alone(self.device.layout):
            last = attempts.load(self.device.attempt_file)
            if last is None or last.state not in attempts.BEFORE_TRIAL or self._is_overtaken():
                return
            if self.record is not None and attempts.settled(last, self.record) is not None:
                return
            offer, salt = facts.offer, facts.directive.salt
            if offer is None or not last.is_for(offer.facts.version, offer.digest, salt):
                notes.forget(self.device.attempt_file)

    def _note(self, attempt: Attempt, *, refuse_until: int | None = None) -> None:
        """Make a step of the attempt durable, if the record is still the one that was decided by.

        Args:
            attempt: as it stands now.
            refuse_until: of a version that is remembered like one that failed its trial: the retry epoch.

        Raises:
            ConflictError: it is not, and what is known of this attempt may have another end by now.
        """
        with attempts.alone(self.device.layout):
            if self._is_overtaken():
                raise ConflictError(
                    "the check has been overtaken", why="the record has changed meanwhile", then="agent once"
                )
            if refuse_until is not None and self.record is not None:
                root = self.device.layout.root
                self.record = slots.refuse(root, attempt.name, attempt.reason, refuse_until)
            with Spool(self.device.layout.spool) as spool:
                report.record_transition(self.device, spool, attempt)

    def _is_overtaken(self) -> bool:
        """Whether a trial has begun, or anything else become of the record, since this check read it."""
        return slots.read(self.device.layout.root) != self.record

    # --- install ---------------------------------------------------------------------------------------

    def _install(self, outcome: Outcome, release: Release, directive: Directive) -> Outcome:
        """Download, stage, preflight; each step is a transition that the server will hear of."""
        digest = release.facts.index_sha256[:12]
        last = attempts.load(self.device.attempt_file)
        again = last is not None and last.is_for(release.facts.version, digest, directive.salt)
        attempt = Attempt(
            release.facts.version,
            digest,
            directive.salt,
            AttemptState.DOWNLOADING,
            retry_epoch=directive.retry_epoch,
        )
        if not again:
            self._note(attempt)
            if not self.by_hand:
                tell(self.device)  # a download may take hours
        try:
            until_s = clock.boot_s() + self.device.settings.download_deadline_s
            with Line(self.device, directive.budget, release.facts.version, until_s) as self.line:
                name, index = self._stage(release)
        except NoShareError as error:
            return self._wait(outcome, Reason.BUDGET, error.wait)
        except (RelfleetError, OSError) as error:
            # Said once an attempt: a disk that stays full must not fill the spool as well.
            retried = isinstance(error, UnreachableError)
            if not retried and not (again and last and last.state is AttemptState.FAILED):
                reason = error.reason if isinstance(error, RelfleetError) else Reason.DISK
                self._note(attempt.to(AttemptState.FAILED, str(reason), str(error)))
            raise
        if halt := self._stop():  # a download may have taken hours
            return self._wait_for_stop(outcome, halt)
        if not self.by_hand and (wait := lease.ask(self.device, directive, release.facts.version)):
            return self._wait(outcome, Reason.LEASE, wait)
        refused = self._preflight(name, release) or self._pre_activate(name, index, release)
        if refused is not None:
            # A version that cannot even import, or says no, is remembered like one that failed its trial.
            failed = attempt.to(AttemptState.FAILED, refused.reason, refused.detail)
            self._note(failed, refuse_until=directive.retry_epoch)
            return refused
        if not (again and last and last.state is AttemptState.STAGED):
            self._note(attempt.to(AttemptState.STAGED))
        detail = "; ".join(filter(None, (outcome.detail, self.fallback)))
        return replace(outcome, detail=detail, candidate=name, boots=index.boots, deadman_s=index.deadman_s)

    def _stop(self) -> stop.Stop | None:
        """Asked only by who is about to install: an idle poll stays one request."""
        here = stop.on_host(self.device.settings.stop_file)
        return here or (None if self.by_hand else stop.served(self.origin, self.device.identity.product))

    def _wait_for_stop(self, outcome: Outcome, halt: stop.Stop) -> Outcome:
        again = clock.iso(clock.now() + max(stop.AGAIN, timedelta(seconds=poll_s(self.device))))
        return replace(
            outcome, action=Action.STAY, reason=str(Reason.STOP_FILE), detail=str(halt), again=again
        )

    def _wait(self, outcome: Outcome, reason: Reason, wait: lease.Wait) -> Outcome:
        """What is here stays; the whole decision is made anew, for the rollout may have stopped by then."""
        again = clock.iso(clock.now() + wait.again)
        return replace(outcome, action=Action.STAY, reason=str(reason), detail=wait.detail, again=again)

    def _stage(self, release: Release) -> tuple[str, Index]:
        """Download and unpack; versions that are kept without need give way when there is no room."""
        try:
            return self._fetch(release)
        except DiskError as error:
            if error.reason != Reason.NO_ROOM or not _make_room(self.device):
                raise
        return self._fetch(release)

    def _fetch(self, release: Release) -> tuple[str, Index]:
        from updater.download import fetch_small
        from updater.stage import believe, check_room, is_complete, stage, version_name

        layout, reserve = self.device.layout, self.device.settings.disk_reserve
        until_s = clock.boot_s() + self.device.settings.download_deadline_s
        index_bytes = fetch_small(self.origin, release.index_url, release.index_sha256, release.index_length)
        name = version_name(release.facts)
        part = layout.download / f"{release.sha256}.part"
        index = believe(index_bytes, release.facts)
        is_here = is_complete(layout.version_dir(name), index_bytes)
        if not is_here:
            self._ceiling()  # before anything is begun: whoever has to wait has not tried
        by_delta = not is_here and self._by_delta(release, index_bytes)
        if not is_here and not by_delta:
            # Before the download: what could never be unpacked is not worth an hour of somebody's line.
            check_room(layout, index, reserve, part, release.length)
            left_s = max(1.0, until_s - clock.boot_s())  # of which a delta may have taken some
            self._download(release.archive_url, release.sha256, release.length, part, left_s)
        self.device.keep_facts(name, release.facts)
        if not by_delta:
            stage(layout, part, index_bytes, release.facts, release.sha256, reserve=reserve)
        disk.remove(part)
        return name, index

    def _by_delta(self, release: Release, index_bytes: bytes) -> bool:
        """Stage what a delta makes of a version that is here; False when it takes the full bundle."""
        from updater import delta

        device = self.device
        way = None if self.by_hand else delta.find(device.layout, self.catalog, release)
        if not self.by_hand:
            _keep_only(device.layout, {release.sha256, way.delta.sha256 if way else ""})
        if way is None:
            return False
        deadline_s = device.settings.download_deadline_s
        if not (self.line and self.line.is_budgeted):  # which ends itself in time, and goes on with the delta
            deadline_s /= 2  # the full bundle may have to come after it

        def fetch(url: str, sha256: str, length: int, part: Path) -> None:
            self._download(url, sha256, length, part, deadline_s)

        reserve = device.settings.disk_reserve
        self.fallback = delta.take(device.layout, way, release, index_bytes, reserve, fetch)
        return not self.fallback

    def _ceiling(self) -> float | None:
        return None if self.by_hand or self.line is None else self.line.ceiling()

    def _download(self, url: str, sha256: str, length: int, part: Path, deadline_s: float) -> None:
        from updater.download import fetch

        settings = self.device.settings
        fetch(
            self.origin,
            url,
            sha256,
            length,
            part,
            progress=self.progress,
            ceiling=self._ceiling,
            min_rate_bps=settings.download_min_rate_bps,
            deadline_s=deadline_s,
        )
        if self.line is not None:
            self.line.leave()  # what comes next, such as unpacking, keeps nobody waiting

    def _preflight(self, name: str, release: Release) -> Outcome | None:
        """The refusal of a version that does not start, or None when it says what the manifest says."""
        from updater.stage import preflight

        verdict = preflight(self.device.layout, name, release.facts)
        if verdict.ok:
            return None
        detail = f"{release.facts.version} did not pass its preflight: {verdict.detail}"
        return self._refusal(release, verdict.reason or Reason.PREFLIGHT, detail)

    def _pre_activate(self, name: str, index: Index, release: Release) -> Outcome | None:
        """The refusal of a version whose own hook says no; a version without one does not."""
        from agent_core.workload import Place

        hook = index.hooks.pre_activate
        if hook is None:
            return None
        layout, running = self.device.layout, self.device.running()
        place = Place(layout.root, layout.version_dir(name), index.version)
        failure = run_hook(PRE_ACTIVATE, hook, place, running.version if running else "")
        if not failure:
            return None
        detail = f"{release.facts.version} says no: {failure}"
        return self._refusal(release, Reason.PRE_ACTIVATE, detail)

    def _refusal(self, release: Release, reason: Reason, detail: str) -> Outcome:
        return Outcome(
            action=Action.REFUSE,
            reason=str(reason),
            detail=detail[:1000],
            at=clock.iso(clock.now()),
            verified=True,
            version=release.facts.version,
        )


def clear(device: Device) -> None:
    """Clear away what nothing needs; not beside another check, whose staging would look like litter."""
    from updater.catalog import alone

    try:
        with alone(device.layout.tuf):
            clear_left_overs(device.layout)
            _collect(device)
    except ConflictError:
        return  # whoever holds the lock clears up after itself
    except (RelfleetError, OSError) as error:
        log.warning("not cleared up", extra={"why": str(error)})


def _collect(device: Device) -> None:
    """Never while a version is on trial (case 7)."""
    from updater.stage import Retention

    record = slots.read(device.layout.root)
    outcome = device.outcome()
    staged = outcome is not None and outcome.candidate != ""
    if record is None or record.phase != slots.IDLE or staged:
        return
    _discard(device, record, Retention(device.settings.versions_keep, device.settings.versions_keep_bytes))
    if outcome is not None and outcome.reason in _NOTHING_TO_COME:
        _keep_only(device.layout, set())


_NOTHING_TO_COME = frozenset(
    {Reason.UP_TO_DATE, Reason.NOT_YET, Reason.SKIPPED, Reason.RETIRED, Reason.NO_COHORT}
)
"""Who only waits, for a window or an operator, goes on later with what has come: a night may be too short."""


def _keep_only(layout: Layout, digests: set[str]) -> None:
    """Clear away what has come of any other file."""
    for name in disk.listdir(layout.download):
        if name.partition(".")[0] not in digests:
            disk.remove(layout.download / name)


def _make_room(device: Device) -> bool:
    """Discard every version that is not needed; whether there was one."""
    from updater.stage import NEEDED_ONLY

    record = slots.read(device.layout.root)
    return record is not None and record.phase == slots.IDLE and _discard(device, record, NEEDED_ONLY)


def _discard(device: Device, record: slots.Record, retention: Retention) -> bool:
    from updater.stage import collect

    names = collect(device.layout, record, retention)
    device.forget_facts()
    return bool(names)


def poll_s(device: Device) -> float:
    """The period of polls: the directive's, never below what this host is set to."""
    seen = device.seen()
    asked = seen.directive.poll_s if seen else 60
    disabled = seen is not None and seen.directive.mode is Mode.DISABLED
    return max(device.settings.poll_min_s, asked * (10 if disabled else 1))


def report_s(device: Device) -> float:
    """The period of reports, as the directive says."""
    seen = device.seen()
    return max(device.settings.poll_min_s, seen.directive.report_s if seen else 300)


def _launcher(layout: Layout) -> int:
    """What the launcher can do that started this agent, or else the one that will."""
    told = os.environ.get("RELFLEET_LAUNCHER", "")
    if told.isdecimal():
        return int(told)
    from updater.launchers import in_force  # reads the file, which an agent need not

    return in_force(layout)
