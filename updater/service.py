"""The resident agent: polls, runs the workload, judges its own trial, and is the one writer of the record.

It stays small: TUF and cryptography are loaded by the checker, a child that ends. What it decides is decided
by pure modules (`decide`, `gate`, `attempt`, `backoff`); here every arm is a call.
"""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_core import clock, slots
from agent_core.bundle import INDEX_NAME, Index
from agent_core.errors import Exit, MalformedError, RelfleetError
from agent_core.health import Monitor, Subject, parse_checks
from agent_core.hooks import POST_ACTIVATE, run_hook
from agent_core.jobs import Helper
from agent_core.processes import arm_deadman, disarm_deadman
from agent_core.runtime import Runtime
from agent_core.settings import AgentSettings, Live, Watcher, load_agent
from agent_core.spool import Spool
from agent_core.telemetry import Figures, setup_logging
from agent_core.workload import BoundedLog, Place, Workload
from updater import activation, checker, control, last_good, notes, poll, report, stage
from updater import attempt as attempts
from updater import identity as identities
from updater.backoff import ceiling_s, jittered, wait_s
from updater.decide import Action
from updater.device import Device, Outcome
from updater.gate import Step, TrialFacts, judge, observed_s
from updater.second_opinion import SecondOpinion

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent_core.jobs import JobResult
    from agent_core.workload import Ended
    from updater.identity import Identity

log = logging.getLogger(__name__)

CHECK_MARGIN_S = 900.0
"""What a check may take beside its download: refresh, staging, preflight."""
REPORT_DEADLINE_S = 120.0
BACKOFF_BASE_S = 2.0
IDLE_HEALTH_S = 10.0
TRIAL_STEP_S = 0.25
WORDS_WAIT_S = 0.5
NEXT_BOOT_S = 60.0
"""When the launcher could not start the candidate and ran the good version: how soon it tries again."""


def serve(root: Path) -> int:
    """Be the agent until told to stop; the exit code for the launcher.

    Raises:
        RelfleetError: it cannot even start; the launcher counts that as a boot.
    """
    device = Device.load_running(root)
    _log_to(device.settings)
    version_dir = Path(__file__).resolve().parents[2]
    index = Index.from_bytes((version_dir / INDEX_NAME).read_bytes())
    held = stage.hold(version_dir)  # what runs is never collected
    try:
        return Service(device, version_dir, index).run()
    finally:
        os.close(held)


def _record(root: Path, name: str) -> slots.Record:
    """The record; this version alone where there is none, or where the disk will not say: it runs already."""
    try:
        held = slots.read(root)
    except OSError as error:
        log.warning("record not read", extra={"why": str(error)})
        held = None
    return held or slots.Record(good=name, previous=name)


def _log_to(settings: AgentSettings) -> None:
    setup_logging(
        level=settings.log_level,
        file=Path(settings.log_file) if settings.log_file else None,
        max_bytes=settings.log_max_bytes,
        files=settings.log_files,
    )


class Service:
    """One run of one version as the agent of its host.

    Args:
        device: enrolled.
        version_dir: resolved; its name is the version's name in the record.
        index: of that directory, verified when it was staged.
    """

    def __init__(self, device: Device, version_dir: Path, index: Index) -> None:
        self.device = device
        self.name = version_dir.name
        self.index = index
        self.root = device.layout.root
        self.record = _record(self.root, self.name)
        self.runtime = Runtime(on_stop=self._on_stop, on_poll=self._on_signal)
        self.started_s = self.runtime.now_s()
        self.verified = False
        self.opinion = self._second_opinion()
        self._numbered: attempts.Attempt | None = None
        self.failures, self._wait_s = control.recall_backoff(
            device.layout, ceiling_s(device.settings.poll_max_backoff_s)
        )
        self.figures = Figures()
        self._checking = False
        self._poll_shown = ""
        self._shown_pid: int | None = None
        self._checker = Helper(self.runtime, self._argv("checker"), "checker")
        self._checker.start_as_copy(lambda: checker.serve(self.root))
        self._start_workload(version_dir)
        news = self._settle()
        self._forced = self.in_trial or news
        self._polls = self.runtime.repeat("poll", self._poll, first_s=self._first_poll_s(news=news))
        self._reports = self.runtime.repeat("report", self._heartbeat, first_s=poll.report_s(device))
        self._live = Live(lambda: load_agent(device.layout), self._apply, device.settings)
        self._read_settings()
        self._forced |= bool(self._live.problem) or device.identity == identities.NOBODY
        self._watcher = Watcher(
            [device.layout.settings, device.layout.settings_dir],
            lambda: self.runtime.call_soon(self._reload_settings),
        )

    def run(self) -> int:
        log.info("agent started", extra={"version": self.name, "phase": self.record.phase})
        if self.in_trial:
            self.runtime.repeat("trial", self._judge)
        elif self.record.phase != slots.IDLE:
            self.runtime.call_later(NEXT_BOOT_S, lambda: self.runtime.stop(Exit.RESTART))
        self._watcher.start()
        self.runtime.call_soon(self._begin)
        try:
            return self.runtime.run()
        finally:
            self._watcher.stop()

    def _begin(self) -> None:
        """In the loop, where signals are heard: whoever finds this process in the status may wake it."""
        self._show_poll("not yet")
        self._reload_identity()
        self._heed_request()

    @property
    def in_trial(self) -> bool:
        return self.record.phase == slots.TRIAL and self.record.candidate == self.name

    # --- workload and health ---------------------------------------------------------------------------

    def _start_workload(self, version_dir: Path) -> None:
        settings = self.device.settings
        place = Place(self.root, version_dir, self.index.version)
        output = BoundedLog(
            self.device.layout.logs / "workload.log",
            max_bytes=settings.workload_log_bytes,
            files=settings.workload_log_files,
        )
        self.workload = Workload(
            self.runtime,
            place,
            self.index.entry,
            output,
            stop_s=settings.workload_stop_s,
            max_backoff_s=settings.workload_max_backoff_s,
            exits_allowed=0 if self.in_trial else None,
            on_end=self._workload_ended,
        )
        checks = parse_checks(list(self.index.health))
        subject = Subject(place, self.workload)
        self.monitor = Monitor(checks, subject, self.started_s, launch=self._run_check)
        self.workload.start()
        self._health = self.runtime.repeat("health", self._step_health)
        self._post_activate(place)

    def _post_activate(self, place: Place) -> None:
        """On trial, run the version's hook; its end is one of the facts of the trial.

        That moment is kept without the time the host slept until then, and given to the gate with all of it:
        as with the checks, a sleep after the hook is no observation of what it did.
        """
        hook = self.index.hooks.post_activate
        self.hooked_s: float | None = self.started_s
        self.hook_failure = ""
        if hook is not None and self.in_trial:
            self.hooked_s = None
            before = slots.version_of(self.record.good)
            self._in_thread(lambda: run_hook(POST_ACTIVATE, hook, place, before), self._hooked)

    def _hooked(self, failure: str | None, error: Exception | None) -> None:
        self.hook_failure = str(error or failure or "")
        self.hooked_s = None if self.hook_failure else self.runtime.now_s() - self.monitor.slept_s
        log.info("hook ended", extra={"hook": POST_ACTIVATE, "failure": self.hook_failure})
        self._judge()

    def _run_check(self, run: Callable[[], None]) -> None:
        """Run a check beside the loop, which hears of its end at once: each step it waited would be idle."""
        self._in_thread(run, lambda *_: self._health.wake())

    def _step_health(self) -> float:
        """Often on trial and until all is well; a good version is looked at for the reports only."""
        verdict = self.monitor.step(self.runtime.now_s())
        if self.workload.pid not in (None, self._shown_pid):
            self._show()  # a number that was the workload's may soon be another program's
        step_s = self.device.settings.health_step_s
        if self.in_trial:
            return min(step_s, TRIAL_STEP_S)
        return IDLE_HEALTH_S if verdict.ready else step_s

    def _workload_ended(self, _ended: Ended) -> None:
        if self.in_trial:
            self._judge()

    # --- the trial -------------------------------------------------------------------------------------

    def _judge(self) -> float:
        """One look at the trial of this version; what the gate says is one call."""
        if not self.in_trial or self.runtime.is_stopping:
            return 3600.0
        health = self.monitor.verdict()
        facts = TrialFacts(
            started_s=self.started_s,
            observe_s=self.index.observe_s,
            healthy=health.healthy,
            ready=health.ready,
            healthy_since_s=health.healthy_since_s,
            manifest_verified=self.verified,
            workload_exits=self.workload.exits,
            hooked_s=None if self.hooked_s is None else self.hooked_s + self.monitor.slept_s,
            hook_failure=self.hook_failure,
            given_up=self.opinion.given_up,
            boots_left=self.record.boots_left,
            failures=tuple(str(failure) for failure in health.failures),
        )
        now_s = self.runtime.now_s()
        verdict, left_s = judge(facts, now_s), facts.observe_s - observed_s(facts, now_s)
        self._show(trial=f"{verdict.step}: {verdict.detail}")
        match verdict.step:
            case Step.REARM:
                arm_deadman(self.record.deadman_s)
            case Step.COMMIT:
                self._commit(verdict.detail)
            case Step.ROLL_BACK:
                self._roll_back(str(verdict.reason), verdict.detail)
        return left_s if 0 < left_s < TRIAL_STEP_S else TRIAL_STEP_S

    def _second_opinion(self) -> SecondOpinion:
        attempt = attempts.load(self.device.attempt_file)
        tried = attempt if attempt is not None and attempt.name == self.name else None
        return SecondOpinion(self.runtime, self.device, self.record.good, tried)

    def _commit(self, detail: str) -> None:
        disarm_deadman()
        self.record = slots.commit(self.root, self.name)
        self.workload.exits_allowed = None
        log.info("trial committed", extra={"version": self.name, "why": detail})
        self._show(trial="")
        self._settle()
        self._look_now()

    def _roll_back(self, reason: str, detail: str) -> None:
        log.warning("trial rolled back", extra={"version": self.name, "reason": reason, "why": detail})
        # The record keeps the code of the reason; the words for people are kept here, if the disk can.
        # A version that failed does not run on for them: who has the attempt now may have it for long.
        with suppress(RelfleetError, OSError), attempts.alone(self.device.layout, WORDS_WAIT_S):
            attempt = attempts.load(self.device.attempt_file)
            if attempt and attempt.name == self.name:
                attempts.save(self.device.attempt_file, replace(attempt, detail=detail))
        self.record = slots.roll_back(self.root, reason)
        self.runtime.stop(Exit.RESTART)

    def _read_again(self) -> None:
        """The record that could not be read before; a trial of which nobody knew goes on in a new run."""
        self.record = _record(self.root, self.name)
        if self.record.phase != slots.IDLE:
            self.runtime.stop(Exit.RESTART)

    def _settle(self) -> bool:
        """Put into the spool how the attempt in progress stands by the record; whether that is news.

        A full disk must not keep a version from running: what cannot be noted now is, with a later report.
        """
        if not self.record.seq:
            return False  # it was not read from the disk: the trial that this run may be is not over by it
        attempt = None
        try:
            with attempts.alone(self.device.layout):
                attempt = attempts.settled(attempts.load(self.device.attempt_file), self.record)
                if attempt is not None:
                    self._note(attempt)
        except (RelfleetError, OSError) as error:
            state = str(attempt.state) if attempt else ""
            log.warning("attempt not noted", extra={"state": state, "why": str(error)})
            return False
        return attempt is not None

    def _note(self, attempt: attempts.Attempt) -> None:
        """A transition is numbered once, also when the note of it has to be tried again."""
        with Spool(self.device.layout.spool) as spool:
            if attempt == self._numbered:
                attempts.save(self.device.attempt_file, attempt)
                return
            try:
                report.record_transition(self.device, spool, attempt)
            finally:
                self._numbered = None if spool.problem else attempt

    # --- polling ---------------------------------------------------------------------------------------

    def _first_poll_s(self, *, news: bool) -> float:
        """At once with news or on trial, which must fetch the manifest; else restarted fleets spread out."""
        if self.in_trial or news:
            return 0.0
        spread_s = random.random() * min(poll.poll_s(self.device), 30.0)  # noqa: S311 - jitter is no secret
        return max(spread_s, self._wait_s)

    def _poll(self) -> float:
        """One tick: a check when one is due, else the conditional GET; the answer sets the next tick."""
        if self._checking:
            return poll.poll_s(self.device)
        self._checking = True
        unverified = self.in_trial and not self.verified
        outcome, good = self.device.outcome(), self.record.good
        if self._forced or poll.is_due(outcome, good, clock.now(), unverified=unverified):
            self._forced = False
            self._check()
        else:
            self._in_thread(lambda: poll.is_unchanged(self.device), self._looked)
        return 2 * self._check_deadline_s()  # the end of the check, or of the look, wakes the next tick

    def _looked(self, unchanged: bool | None, error: Exception | None) -> None:
        if error is None and unchanged:
            self._finished(None)
        elif error is None:
            self._check()
        else:
            self._finished(Outcome.of_failure(error))

    def _check_deadline_s(self) -> float:
        return self.device.settings.download_deadline_s + CHECK_MARGIN_S

    def _check(self) -> None:
        self._checker.ask("check", self._checked, deadline_s=self._check_deadline_s())

    def _checked(self, result: JobResult) -> None:
        try:
            outcome = Outcome.from_json(result.answer)
        except MalformedError:
            problem = (result.answer or {}).get("problem") or result.problem
            detail = f"the checker gave no outcome ({problem}): {result.errors[-300:]}"
            outcome = Outcome.of_failure(RelfleetError(detail, reason="internal"))
        self.verified = self.verified or outcome.verified
        if self.verified:
            self.opinion.stop()
        self._reload_identity()
        self._finished(outcome)
        if outcome.action is Action.INSTALL and outcome.candidate and not self.runtime.is_stopping:
            self._activate(outcome)

    def _show_poll(self, words: str) -> None:
        """Once for polls that end alike: an idle host writes nothing."""
        if words != self._poll_shown:
            self._show(poll=words)
            self._poll_shown = words

    def _finished(self, outcome: Outcome | None) -> None:
        """A poll ended; None says that nothing changed. The next is a period away, or a backoff."""
        self._checking = False
        if outcome is None or not outcome.failed:
            self.failures = 0
            delay_s = jittered(poll.poll_s(self.device), random.random())  # noqa: S311 - jitter is no secret
        else:
            self.failures += 1
            delay_s = self._backoff_s(outcome)
            log.warning("poll failed", extra={"reason": outcome.reason, "why": outcome.detail})
            if self.in_trial and not self.verified:
                self.opinion.ask(self._judge)
        self._show_poll(f"{outcome.reason}: {outcome.detail}".strip(": ") if outcome else control.NOTHING_NEW)
        if self._forced:
            delay_s = 0.0
        control.remember_backoff(self.device.layout, self.failures, delay_s if self.failures else 0.0)
        self._polls.wake(delay_s)

    def _backoff_s(self, outcome: Outcome) -> float:
        return wait_s(
            self.failures,
            base_s=max(BACKOFF_BASE_S, poll.poll_s(self.device)),
            most_s=self.device.settings.poll_max_backoff_s,
            chance=random.random(),  # noqa: S311 - jitter is no secret
            retry_after_s=outcome.retry_after_s,
        )

    def _activate(self, outcome: Outcome) -> None:
        """The staged version goes on trial; the launcher starts it when this process has ended."""
        try:
            self.record = activation.activate(self.device, outcome)
        except (slots.IllegalTransitionError, RelfleetError, OSError) as error:
            log.warning("trial not begun", extra={"candidate": outcome.candidate, "why": str(error)})
            return
        told = {"candidate": outcome.candidate, "good": self.record.good, "why": outcome.detail}
        log.info("trial begun", extra=told)
        self.runtime.stop(Exit.RESTART)

    # --- reports ---------------------------------------------------------------------------------------

    def _heartbeat(self) -> float:
        """Tell the server that we live; a signed report when there is news or the session is over."""
        if not self.record.seq:
            self._read_again()
        self._settle()
        period_s = jittered(poll.report_s(self.device), random.random())  # noqa: S311 - jitter is no secret
        session = report.session(self.device)
        with Spool(self.device.layout.spool) as spool:
            news = bool(spool.pending(1))
        if news or session is None:
            self._report_now()
        else:
            figures = self._take_figures()
            self._in_thread(
                lambda: report.send_heartbeat(self.device, session, figures), self._heartbeat_sent
            )
        return period_s

    def _heartbeat_sent(self, sent: Any, error: Exception | None) -> None:
        if error is None:
            self._belong(sent[0].identity)
        elif isinstance(error, RelfleetError) and error.reason not in ("offline", "overloaded"):
            notes.forget(self.device.session_file)
            self._report_now()

    def _report_now(self) -> None:
        """Report under the host's key; beside a check that may take hours, in a process of its own."""
        figures = json.dumps(self._take_figures())
        if self._checker.is_busy:
            self.runtime.run_job(
                self._argv("report"), self._reported, deadline_s=REPORT_DEADLINE_S, stdin=figures.encode()
            )
        else:
            self._checker.ask(f"report {figures}", self._reported, deadline_s=REPORT_DEADLINE_S)

    def _reported(self, result: JobResult) -> None:
        if result.answer is None or "problem" in result.answer:
            why = (result.answer or {}).get("problem") or result.errors[-300:] or result.problem
            log.warning("report not sent", extra={"why": why})
        self._reload_identity()

    def _take_figures(self) -> dict[str, float]:
        figures = self.figures.take(
            self.runtime.now_s(),
            workload_pid=self.workload.pid,
            started_s=self.workload.started_s,
            restarts=self.workload.restarts,
        )
        return figures | {"healthy": float(self.monitor.verdict().ready)}

    def _reload_identity(self) -> None:
        """The checker may have learned of another cohort. A note that cannot be read changes nothing."""
        try:
            self._belong(identities.load(self.device.layout))
            if damaged := identities.mend(self.device.layout):
                log.warning("identity mended", extra={"why": damaged})
                self._show(identity=f"{damaged}, and was written over it at {clock.iso(clock.now())}")
        except RelfleetError as error:
            log.warning("identity kept", extra={"why": str(error)})

    def _belong(self, identity: Identity) -> None:
        """Another cohort has another directive, in metadata that the next poll would call unchanged."""
        is_moved = identity.cohort != self.device.identity.cohort
        self.device = replace(self.device, identity=identity)
        if is_moved:
            self._look_now()

    # --- the operator ----------------------------------------------------------------------------------

    def _on_signal(self) -> None:
        self._heed_request()
        self._look_now()

    def _look_now(self) -> None:
        self._forced = True
        self._polls.wake()

    def _heed_request(self) -> None:
        """Do what a person asked for on the host; the request is gone when it is done."""
        request = control.read_request(self.device.layout)
        if request is None:
            return
        log.info("operator asks", extra={"verb": request.verb})
        try:
            self.record = control.carry_out(self.device, request)
        except (slots.IllegalTransitionError, RelfleetError, OSError) as error:
            log.warning("request refused", extra={"verb": request.verb, "why": str(error)})
        control.forget_request(self.device.layout)
        if self.name != (self.record.candidate or self.record.good):
            self.runtime.stop(Exit.RESTART)

    def _on_stop(self) -> None:
        """Asked to stop by a person or a shutdown: that is no failure of the version on trial (case 9)."""
        if self.in_trial:
            try:
                self.record = slots.refund(self.root)
            except (slots.IllegalTransitionError, OSError) as error:
                log.warning("boot not given back", extra={"why": str(error)})

    def _read_settings(self) -> None:
        self._live.reload()
        if not self._live.problem:
            last_good.keep(self.device.layout, self._live.current)

    def _reload_settings(self) -> None:
        had = self._live.problem
        self._read_settings()
        if had != self._live.problem:
            # A slip is told to the server now and not with the next heartbeat; that it is mended ends the
            # backoff which the checks that failed for it have left.
            self._look_now()
        self._show()  # a file that cannot be used shows at once, not with the next poll that finds something

    def _apply(self, settings: AgentSettings) -> None:
        self.device = replace(self.device, settings=settings)
        self.workload.max_backoff_s = settings.workload_max_backoff_s
        _log_to(settings)
        self._polls.wake()

    # --- helpers ---------------------------------------------------------------------------------------

    def _show(self, **what: str) -> None:
        """Keep what `agent status` shows; a disk that refuses costs a status, nothing more."""
        self._shown_pid = self.workload.pid
        control.show(self.device.layout, self.name, self.workload.pid, settings=self._live.problem, **what)
        self.runtime.status("; ".join(text for text in what.values() if text) or self.name)

    def _argv(self, verb: str) -> list[str]:
        """A process of this very version, whatever the links show."""
        agent = str(Path(__file__).resolve().parents[2] / "agent.py")
        return [sys.executable, "-I", "-S", "-B", agent, verb, "--root", str(self.root)]

    def _in_thread(self, call: Callable[[], Any], done: Callable[[Any, Exception | None], None]) -> None:
        """Run what waits for the network beside the loop; `done` runs in the loop."""

        def work() -> None:
            try:
                answer, error = call(), None
            except Exception as raised:  # noqa: BLE001 - it is handed to the loop, which decides
                answer, error = None, raised
            self.runtime.call_soon(lambda: done(answer, error))

        threading.Thread(target=work, daemon=True, name="network").start()
