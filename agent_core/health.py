"""Health: the checks that come signed in a bundle, how they are run, and what they say of the version.

A check that cannot run is a failure: a check whose program is missing proves nothing. Time is an argument of
`Monitor.step`; when the steps themselves stop for a while (the host slept, or was too busy to look), nothing
of that while counts against the version. Timeouts inside one run count waking time only, for the same reason.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import queue
import socket
import subprocess
import threading
import time
from dataclasses import field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from agent_core.errors import MalformedError
from agent_core.late import late_dataclass
from agent_core.processes import finish_one
from agent_core.wire import Getter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from agent_core.workload import Place

log = logging.getLogger(__name__)

MAX_CHECKS = 32
MAX_ANSWER = 65_536
LONGEST_DETAIL = 200
EAGER_S = 0.25
"""A version that comes up is asked so often whether it is ready yet, not a whole interval later."""
OVERDUE_S = 10.0
"""A run so much later than its timeout hangs where no timeout reaches, in a name lookup for example."""


class Kind(StrEnum):
    """What is looked at."""

    PROCESS = "process"
    """The workload lives."""
    EXEC = "exec"
    """A program exits with 0."""
    HTTP = "http"
    """A GET is answered with an expected status."""
    TCP = "tcp"
    """A connection is accepted."""
    MEMORY = "memory"
    """The workload and its children hold less than a ceiling."""
    CPU = "cpu"
    """The workload and its children use less than a ceiling."""


KEYS = {
    Kind.PROCESS: set[str](),
    Kind.EXEC: {"argv"},
    Kind.HTTP: {"url", "status"},
    Kind.TCP: {"host", "port"},
    Kind.MEMORY: {"max_bytes"},
    Kind.CPU: {"max_percent", "window_s"},
}
COMMON = {"kind", "name", "interval_s", "timeout_s", "failures_allowed", "grace_s"}


@late_dataclass(frozen=True)
class Check:
    """One signed check.

    Attributes:
        interval_s: from the end of one run to the next.
        timeout_s: a run that takes longer has failed.
        failures_allowed: so many failures in a row are tolerated.
        grace_s: failures so early count only after the check has passed once (a slow start).
        argv: `exec`, with the placeholders of `Place.argv`.
        url, status: `http`; no status given means any 2xx.
        max_percent: `cpu`, 100 for one whole core, over `window_s`.
    """

    kind: Kind
    name: str
    interval_s: float = 5.0
    timeout_s: float = 5.0
    failures_allowed: int = 0
    grace_s: float = 30.0
    argv: tuple[str, ...] = ()
    url: str = ""
    status: tuple[int, ...] = ()
    host: str = "127.0.0.1"
    port: int = 0
    max_bytes: int = 0
    max_percent: float = 0.0
    window_s: float = 1.0

    @property
    def detect_s(self) -> float:
        """The longest time from a fault to the failure that is one too many."""
        return (self.failures_allowed + 1) * (self.interval_s + self.timeout_s)

    def to_json(self) -> dict[str, Any]:
        shared: dict[str, Any] = {
            "kind": str(self.kind),
            "name": self.name,
            "interval_s": self.interval_s,
            "timeout_s": self.timeout_s,
            "failures_allowed": self.failures_allowed,
            "grace_s": self.grace_s,
        }
        for key in sorted(KEYS[self.kind]):
            value = getattr(self, key)
            shared[key] = list(value) if isinstance(value, tuple) else value
        return shared


def parse_checks(checks: object, path: str = "index.health") -> tuple[Check, ...]:
    """Read the `health` list of an index.

    Unlike a message, a signed check is read strictly: a key that is not known is a misspelt one, and a check
    that silently does less than was meant is worse than none.

    Raises:
        MalformedError: with the path of the key.
    """
    if not isinstance(checks, list):
        raise MalformedError(f"{path} is not a list", why=f"it is {type(checks).__name__}")
    if len(checks) > MAX_CHECKS:
        raise MalformedError(f"{path} is not acceptable", why=f"it has more than {MAX_CHECKS} checks")
    parsed = tuple(_parse(entry, f"{path}[{place}]") for place, entry in enumerate(checks))
    names = [check.name for check in parsed]
    for place, name in enumerate(names):
        if name in names[:place]:
            raise MalformedError(
                f"{path}[{place}].name is not acceptable", why=f"{name!r} stands there twice"
            )
    return parsed


def _parse(entry: object, path: str) -> Check:
    get = Getter(entry, path)
    kind = get.choice("kind", Kind)
    for key in get.mapping:
        if key not in COMMON | KEYS[kind]:
            known = ", ".join(sorted(COMMON | KEYS[kind]))
            raise get.refuse(str(key)[:80], f"a check of kind {kind} knows {known}")
    check = Check(
        kind=kind,
        name=get.text("name", "") or path.rpartition(".")[2] + f" {kind}",
        interval_s=get.number("interval_s", 5.0, low=0.05, high=3600),
        timeout_s=get.number("timeout_s", 5.0, low=0.05, high=600),
        failures_allowed=get.integer("failures_allowed", 0, high=1000),
        grace_s=get.number("grace_s", 30.0, high=86_400),
        argv=get.texts("argv", [], most=100),
        url=get.text("url", ""),
        status=get.integers("status", [], most=50),
        host=get.text("host", "127.0.0.1"),
        port=get.integer("port", 0, high=65_535),
        max_bytes=get.integer("max_bytes", 0),
        max_percent=get.number("max_percent", 0, high=100_000),
        window_s=get.number("window_s", 1.0, low=0.05, high=60),
    )
    lack = _lack(check)
    if lack is not None:
        raise get.refuse(*lack)
    return check


def _lack(check: Check) -> tuple[str, str] | None:
    """The key that only this kind needs and that is missing or makes no sense, and why."""
    match check.kind:
        case Kind.EXEC if not (check.argv and check.argv[0]):
            return "argv", "a program is needed"
        case Kind.HTTP if not _is_complete(check.url):
            return "url", "it needs the form http://host:port/path"
        case Kind.HTTP if not all(100 <= status <= 599 for status in check.status):
            return "status", "a status is within 100 and 599"
        case Kind.TCP if not (check.port and check.host):
            return "port", "a port within 1 and 65535 is needed, and a host"
        case Kind.MEMORY if not check.max_bytes:
            return "max_bytes", "a ceiling is needed"
        case Kind.CPU if not check.max_percent:
            return "max_percent", "a ceiling is needed"
        case Kind.CPU if check.window_s >= check.timeout_s:
            return "window_s", f"the look takes {check.window_s:g} s and must fit into timeout_s"
    return None


def _is_complete(address: str) -> bool:
    try:
        url = urlsplit(address)
        return url.scheme in ("http", "https") and bool(url.hostname) and (url.port is None or url.port > 0)
    except ValueError:
        return False


def weakness(
    checks: Sequence[Check], observe_s: float, boots: int, deadman_s: float | None = None
) -> str | None:
    """Say why a trial with these settings could never detect a fault, or would kill a good version.

    Args:
        observe_s: how long a version must be healthy before it is committed.
        boots: how many starts a trial may take.
        deadman_s: when given, the time after which a trial that shows no health is killed.

    Returns:
        The first reason found, for the person who builds the bundle; None when there is none.
    """
    if not checks:
        return "there is no health check, so every version would pass its trial"
    if boots < 1:
        return "boots is below 1, so no trial would ever start"
    if observe_s <= 0:
        return "observe_s is 0, so a version would be committed before it was looked at"
    for check in checks:
        if check.detect_s > observe_s:
            return (
                f"check {check.name!r} needs up to {check.detect_s:g} s to show a fault"
                f" ((failures_allowed + 1) x (interval_s + timeout_s)), but observe_s is {observe_s:g}"
            )
        slowest_s = check.grace_s + check.detect_s
        if deadman_s is not None and slowest_s > deadman_s:
            return (
                f"check {check.name!r} may need {slowest_s:g} s until it passes or fails"
                f" (grace_s included), but deadman_s is {deadman_s:g}, so a slow start would be killed"
            )
    return None


# --- running one check ----------------------------------------------------------------------------------


class Workload(Protocol):
    """What of the workload the checks look at; `workload.Workload` is one."""

    @property
    def pid(self) -> int | None: ...
    @property
    def restarts(self) -> int: ...


@late_dataclass(frozen=True)
class Subject:
    """Whose health it is: where the version lives, and its workload."""

    place: Place
    workload: Workload


@late_dataclass(frozen=True)
class Outcome:
    passed: bool
    detail: str = ""


def run_check(check: Check, subject: Subject) -> Outcome:
    """Run one check now; may block for `timeout_s` and a little. Whatever goes wrong is a failure."""
    try:
        return _RUNNERS[check.kind](check, subject)
    except Exception as error:  # noqa: BLE001 - a check that cannot run is a failed one, whatever the cause
        said = str(error) or type(error).__name__
        return Outcome(False, f"cannot run: {said}"[:LONGEST_DETAIL])


def _run_process(_check: Check, subject: Subject) -> Outcome:
    if subject.workload.pid is None:
        return Outcome(False, f"the workload does not run (restarted {subject.workload.restarts} times)")
    return Outcome(True)


def _run_exec(check: Check, subject: Subject) -> Outcome:
    # Not `spawn`: its start-up costs more than most checks, every second. What a killed agent leaves behind
    # of a check is ended by the launcher or the service manager.
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            subject.place.argv(check.argv),
            cwd=subject.place.version_dir,
            env=subject.place.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    why = finish_one(start, check.timeout_s)
    return Outcome(not why, why)


def _run_http(check: Check, _subject: Subject) -> Outcome:
    url = urlsplit(check.url)
    assert url.hostname is not None
    deadline_s = time.monotonic() + check.timeout_s
    secure = url.scheme == "https"
    kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
    connection = kind(url.hostname, url.port, timeout=check.timeout_s)
    path = (url.path or "/") + (f"?{url.query}" if url.query else "")
    with contextlib.closing(connection):
        # A socket's timeout is one of each read; the whole run is ended by cutting it off under the reader.
        watchdog = threading.Timer(check.timeout_s, _cut)
        watchdog.daemon = True
        try:
            connection.connect()
            watchdog.args = [connection.sock]  # the answer takes the socket over
            watchdog.start()
            connection.request("GET", path, headers={"User-Agent": "relfleet-health", "Connection": "close"})
            answer = connection.getresponse()
            answer.read(MAX_ANSWER)
        except (OSError, http.client.HTTPException) as error:
            if time.monotonic() >= deadline_s:
                return Outcome(False, f"took longer than {check.timeout_s:g} s")
            return Outcome(False, f"no answer: {str(error) or type(error).__name__}"[:LONGEST_DETAIL])
        finally:
            watchdog.cancel()
    if time.monotonic() >= deadline_s:
        return Outcome(False, f"took longer than {check.timeout_s:g} s")
    expected = answer.status in check.status if check.status else 200 <= answer.status < 300
    return Outcome(expected, "" if expected else f"status {answer.status}")


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _run_tcp(check: Check, _subject: Subject) -> Outcome:
    try:
        socket.create_connection((check.host, check.port), check.timeout_s).close()
    except OSError as error:
        return Outcome(False, f"port {check.port}: {error.strerror or error}")
    return Outcome(True)


def _run_memory(check: Check, subject: Subject) -> Outcome:
    from agent_core.telemetry import tree_rss

    pid = subject.workload.pid
    held = tree_rss(pid) if pid is not None else None
    if held is None:
        return Outcome(False, "the workload does not run")
    if held > check.max_bytes:
        return Outcome(False, f"{held} bytes of memory, {check.max_bytes} allowed")
    return Outcome(True)


def _run_cpu(check: Check, subject: Subject) -> Outcome:
    from agent_core.telemetry import tree_cpu_s

    pid = subject.workload.pid
    before_s = tree_cpu_s(pid) if pid is not None else None
    began_s = time.monotonic()
    time.sleep(check.window_s)
    after_s = tree_cpu_s(pid) if pid is not None else None
    if before_s is None or after_s is None:
        return Outcome(False, "the workload does not run")
    percent = 100.0 * max(0.0, after_s - before_s) / (time.monotonic() - began_s)
    if percent > check.max_percent:
        return Outcome(False, f"{percent:.0f} % of a core, {check.max_percent:g} % allowed")
    return Outcome(True)


_RUNNERS: dict[Kind, Callable[[Check, Subject], Outcome]] = {
    Kind.PROCESS: _run_process,
    Kind.EXEC: _run_exec,
    Kind.HTTP: _run_http,
    Kind.TCP: _run_tcp,
    Kind.MEMORY: _run_memory,
    Kind.CPU: _run_cpu,
}


# --- watching over time ---------------------------------------------------------------------------------


@late_dataclass(frozen=True)
class Failure:
    """A check that does not pass at the moment; `in_a_row` leaves out what fell into its grace."""

    check: str
    detail: str
    in_a_row: int
    allowed: int

    def __str__(self) -> str:
        return f"{self.check}: {self.detail} ({self.in_a_row} in a row, {self.allowed} allowed)"


@late_dataclass(frozen=True)
class Verdict:
    """What all checks together say.

    Attributes:
        healthy: no check failed more often in a row than it may. Once False it stays False.
        ready: every check passed when it was last run.
        healthy_since_s: when the last of the checks had passed for the first time; moved on when the host
            slept, because nobody observed anything then. None before that, and when unhealthy.
    """

    healthy: bool
    ready: bool
    healthy_since_s: float | None
    failures: tuple[Failure, ...] = ()


@late_dataclass()
class _Watch:
    """What is known of one check."""

    check: Check
    due_s: float
    grace_until_s: float
    overdue_s: float = 0.0
    running: bool = False
    passed_once: bool = False
    passes: bool = False
    in_a_row: int = 0
    detail: str = "not run yet"


def _in_thread(run: Callable[[], None]) -> None:
    threading.Thread(target=run, name="health-check", daemon=True).start()


@late_dataclass()
class Monitor:
    """Runs checks when they are due and judges what they say; `step` never waits for a check.

    Args:
        checks: from the bundle; none at all means always ready.
        subject: whose health it is.
        started_s: boot clock at the start of the workload; the checks' grace begins here.
        gap_s: steps further apart than this mean that nobody was watching.
        launch: carries out a run; the default starts a thread for each.

    Attributes:
        gaps, slept_s: how often nobody was watching, and for how long in all.
    """

    checks: Sequence[Check]
    subject: Subject
    started_s: float
    gap_s: float = 15.0
    launch: Callable[[Callable[[], None]], None] = field(default=_in_thread)
    gaps: int = 0
    slept_s: float = 0.0
    _watches: list[_Watch] = field(init=False)
    _answers: queue.SimpleQueue[tuple[int, _Watch, Outcome]] = field(
        init=False, default_factory=queue.SimpleQueue
    )
    _last_s: float | None = field(init=False, default=None)
    _healthy: bool = field(init=False, default=True)
    _since_s: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._watches = [
            _Watch(check, self.started_s, self.started_s + check.grace_s) for check in self.checks
        ]

    def step(self, now_s: float) -> Verdict:
        """Take in what ended, start what is due, and judge."""
        if self._last_s is not None and now_s - self._last_s > self.gap_s:
            self._skip(now_s - self._last_s, now_s)
        self._last_s = now_s
        self._take_answers(now_s)
        for watch in self._watches:
            if not watch.running and now_s >= watch.due_s:
                self._start(watch, now_s)
            elif watch.running and now_s >= watch.overdue_s:
                self._count(watch, Outcome(False, "the check itself does not end"), now_s)
                watch.overdue_s = now_s + watch.check.timeout_s + OVERDUE_S
        self._take_answers(now_s)
        return self.verdict()

    def verdict(self) -> Verdict:
        """What was known at the last step."""
        failing = [watch for watch in self._watches if not watch.passes]
        failures = tuple(
            Failure(watch.check.name, watch.detail, watch.in_a_row, watch.check.failures_allowed)
            for watch in failing
        )
        since_s = self._since_s if self._healthy else None
        return Verdict(self._healthy, self._healthy and not failing, since_s, failures)

    @property
    def is_running(self) -> bool:
        """Whether a check is being run at the moment."""
        return any(watch.running for watch in self._watches)

    def _start(self, watch: _Watch, now_s: float) -> None:
        watch.running = True
        watch.overdue_s = now_s + watch.check.timeout_s + OVERDUE_S
        run_number = self.gaps
        answers, check, subject = self._answers, watch.check, self.subject
        self.launch(lambda: answers.put((run_number, watch, run_check(check, subject))))

    def _take_answers(self, now_s: float) -> None:
        while True:
            try:
                run_number, watch, outcome = self._answers.get_nowait()
            except queue.Empty:
                break
            watch.running = False
            watch.due_s = now_s + self._interval_s(watch, outcome.passed, now_s)
            if run_number == self.gaps or outcome.passed:
                self._count(watch, outcome, now_s)
            else:
                watch.due_s = now_s  # it ran into the sleep of the host: ask again
        if self._healthy and self._since_s is None and all(watch.passed_once for watch in self._watches):
            self._since_s = now_s

    def _interval_s(self, watch: _Watch, passed: bool, now_s: float) -> float:
        """As signed; sooner while a version comes up, in its grace, where a failure does not count."""
        is_coming_up = not (passed or watch.passed_once) and now_s < watch.grace_until_s
        return min(watch.check.interval_s, EAGER_S) if is_coming_up else watch.check.interval_s

    def _count(self, watch: _Watch, outcome: Outcome, now_s: float) -> None:
        watch.passes = outcome.passed
        watch.detail = outcome.detail
        if outcome.passed:
            watch.passed_once = True
            watch.in_a_row = 0
        elif watch.passed_once or now_s >= watch.grace_until_s:
            watch.in_a_row += 1
            if watch.in_a_row > watch.check.failures_allowed and self._healthy:
                self._healthy = False
                log.warning("version is unhealthy", extra={"check": watch.check.name, "why": outcome.detail})

    def _skip(self, slept_s: float, now_s: float) -> None:
        """Nobody watched for `slept_s`: move every deadline on, and run every check anew."""
        self.gaps += 1
        self.slept_s += slept_s
        log.info("checks were not run for a while, nothing of it counts", extra={"for_s": round(slept_s, 1)})
        if self._since_s is not None:
            self._since_s += slept_s
        for watch in self._watches:
            watch.grace_until_s += slept_s
            watch.due_s = now_s
            watch.overdue_s = now_s + watch.check.timeout_s + OVERDUE_S
            watch.passes = False  # what was true before the sleep is to be shown again
