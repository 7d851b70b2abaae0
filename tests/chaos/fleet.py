"""A fleet of many agents in one process: the device's wire, catalog and decisions, without its disk.

Each agent polls, decides by `updater.decide`, asks for a lease, and reports its transitions under its own
key, as `updater.poll` and `updater.report` do. What the metadata say is verified once for all of them by the
device's own catalog. Bundles are neither fetched nor started: `Fleet.bad` names the versions that fail.
"""

from __future__ import annotations

import heapq
import json
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from agent_core import clock
from agent_core.bundle import host_platforms
from agent_core.errors import RelfleetError, TrustError, UnreachableError
from agent_core.wire import (
    HEADER_AGENT,
    HEADER_COUNTER,
    HEADER_SIGNATURE,
    MAX_TRANSITIONS,
    AttemptState,
    EnrollAnswer,
    EnrollRequest,
    LeaseAnswer,
    LeaseRequest,
    Phase,
    Report,
    ReportAnswer,
    Transition,
    signed_text,
)
from tests.integration.world import PRODUCT
from updater import decide, server
from updater.attempt import BEFORE_TRIAL
from updater.catalog import Catalog
from updater.decide import Facts, Offer, Running
from updater.transport import Transport

if TYPE_CHECKING:
    from pathlib import Path

TIMESTAMP = "/metadata/timestamp.json"
TRIAL_S = 0.4
SITES = 5
LIMIT = 25
"""How many of one site may be between two versions at once."""
PHASES = {
    AttemptState.TRIAL: Phase.TRIAL,
    AttemptState.STAGED: Phase.STAGED,
    AttemptState.DOWNLOADING: Phase.DOWNLOADING,
}
BAD_FOR = 5
"""One agent in so many goes back from a bad version."""


@dataclass(frozen=True)
class Word:
    """What one verified timestamp says to the cohort; `began` is when its refresh began."""

    version: int
    began: float
    directive: object
    policy: object
    releases: dict


@dataclass
class Agent:
    """One agent's own side, and what it remembers to be compared with what the server knows."""

    id: str
    site: str
    key: Ed25519PrivateKey
    version: str = "1.0.0"
    cohort: str | None = None
    etag: str = ""
    seen: int = 0
    seq: int = 0
    digest: str = ""
    counter: int = 0
    session: str | None = None
    pending: list[Transition] = field(default_factory=list)
    said: list[Transition] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    target: str | None = None
    salt: str = ""
    state: AttemptState | None = None
    trial_ends: float = 0.0
    reported: float = 0.0
    failures: int = 0

    def step(self, state: AttemptState, reason: str = "") -> None:
        number = len(self.said) + 1
        transition = Transition(
            number, clock.iso(clock.now()), self.target, "d" * 12, self.salt, state, reason, ""
        )
        self.said.append(transition)
        self.pending.append(transition)
        self.state = state


@dataclass(frozen=True)
class Install:
    """An agent that went on trial: with which version, by which timestamp."""

    agent: str
    version: str
    timestamp: int


class Fleet:
    """Many agents, driven by a few threads; `stop` ends them.

    Attributes:
        polls: when each answered poll began and ended, and which timestamp it was answered with.
        bodies: the digests of each timestamp version that was ever served; more than one is a fork.
        strange: answers that no honest server gives an honest agent.
    """

    def __init__(self, home: Path, urls: list[str], trust: bytes, token: str, bad: set[str]) -> None:
        self.home, self.trust, self.token, self.bad = home, trust, token, bad
        self.replicas = [Transport(url, proxies={}, timeout_s=15.0) for url in urls]
        self.agents: list[Agent] = []
        self.polls: list[tuple[float, float, int]] = []
        self.bodies: dict[int, set[str]] = {}
        self.installs: list[Install] = []
        self.strange: list[str] = []
        self.troubles: Counter[str] = Counter()
        self.requests = 0
        self.most_at_work = 0
        self._at_work: dict[str, set[str]] = {}
        self._word: Word | None = None
        self._lock, self._words = threading.Lock(), threading.Lock()
        self._due: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._threads: list[threading.Thread] = []

    # --- asking --------------------------------------------------------------------------------------------

    def _replica(self) -> Transport:
        """Any of them, as behind a load balancer that knows nothing."""
        self.requests += 1
        return random.choice(self.replicas)

    def _post(self, agent: Agent, path: str, said: dict, *, signed: bool) -> object:
        body = json.dumps(said).encode()
        headers = {"Content-Type": "application/json", HEADER_AGENT: agent.id}
        if signed:
            agent.counter += 1
            text = signed_text("POST", path, sha256(body).hexdigest(), agent.counter)
            headers |= {HEADER_COUNTER: str(agent.counter), HEADER_SIGNATURE: agent.key.sign(text).hex()}
        else:
            headers["Authorization"] = f"Bearer {agent.session}"
        answer = self._replica().post(path, body, headers)
        if answer.status >= 300:
            if answer.status == 401 and not signed:
                agent.session = None  # as the device does: the next report is signed, and buys a new one
                return None
            self.strange.append(f"{agent.id}: {answer.status} to {path}: {answer.body[:200]!r}")
            raise UnreachableError("refused")
        return json.loads(answer.body)

    def enroll(self, name: str, site: str, labels: dict[str, str]) -> None:
        key = Ed25519PrivateKey.generate()
        public = key.public_key().public_bytes_raw().hex()
        wanted = EnrollRequest(PRODUCT, name, public, host_platforms()[0], labels={**labels, "site": site})
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        answer = self._replica().post(server.ENROLL_PATH, json.dumps(wanted.to_json()).encode(), headers)
        if answer.status >= 300:
            raise AssertionError(f"{name} was not enrolled: {answer.body!r}")
        told = EnrollAnswer.from_json(json.loads(answer.body))
        self.agents.append(Agent(told.agent_id, site, key, cohort=told.cohort))

    # --- the threads ---------------------------------------------------------------------------------------

    def start(self, threads: int = 12) -> None:
        now = time.monotonic()
        self._due = [(now + random.random() * 3, place) for place in range(len(self.agents))]
        heapq.heapify(self._due)
        self._threads = [threading.Thread(target=self._drive, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)

    def _drive(self) -> None:
        while not self._ended.is_set():
            with self._lock:
                due, place = heapq.heappop(self._due) if self._due else (time.monotonic() + 0.05, -1)
            self._ended.wait(max(0.0, min(due - time.monotonic(), 0.2)))
            again = due
            if place >= 0 and time.monotonic() >= due:
                again = time.monotonic() + self._turn(self.agents[place])
            if place >= 0:
                with self._lock:
                    heapq.heappush(self._due, (again, place))

    # --- one agent -----------------------------------------------------------------------------------------

    def _turn(self, agent: Agent) -> float:
        """One agent's next step; in how many seconds the following one is due."""
        try:
            word = self._poll(agent)
            self._act(agent, word)
            self._report(agent, float(word.directive.report_s))
            agent.failures = 0
        except (UnreachableError, TrustError) as error:
            agent.failures += 1
            self.troubles[error.reason] += 1
            if not isinstance(error, UnreachableError):
                self.strange.append(f"{agent.id}: {error}")
            return random.uniform(0.2, min(6.0, 0.4 * 2**agent.failures))  # full jitter, as the device
        except RelfleetError as error:
            self.strange.append(f"{agent.id}: {error}")
            return 1.0
        except Exception as error:  # a mistake in here must be seen, not be a thread that is gone
            self.strange.append(f"{agent.id}: {error!r}")
            return 1.0
        busy = agent.state in PHASES
        return 0.5 if busy else word.directive.poll_s * random.uniform(0.8, 1.2)

    def _poll(self, agent: Agent) -> Word:
        headers = {"If-None-Match": agent.etag} if agent.etag else {}
        began = time.monotonic()
        answer = self._replica().get(TIMESTAMP, headers)
        ended = time.monotonic()
        if answer.status == 200:
            agent.etag = answer.headers.get("etag", "")
            agent.seen = int(json.loads(answer.body)["signed"]["version"])
            with self._lock:
                self.bodies.setdefault(agent.seen, set()).add(sha256(answer.body).hexdigest())
        elif answer.status != 304:
            raise UnreachableError("the poll was not answered", reason=f"status-{answer.status}")
        with self._lock:
            self.polls.append((began, ended, agent.seen))
        return self._verified(agent.seen)

    def _verified(self, version: int) -> Word:
        """What the newest timestamp says, refreshed when this one has not been verified yet."""
        with self._words:
            if self._word is None or self._word.version < version:
                self._word = self._refresh()
            return self._word

    def _refresh(self) -> Word:
        began = time.monotonic()
        place = self.home / "simulated-tuf"
        place.mkdir(exist_ok=True)
        with Catalog(place, self._replica(), PRODUCT, self.trust) as catalog:
            verified = catalog.refresh(clock.now(), None)
            directive = catalog.directive(next(one.cohort for one in self.agents if one.cohort))
            named = {directive.release, directive.base} - {None}
            found = {version: catalog.release(version, host_platforms()) for version in named}
            return Word(verified.timestamp_version, began, directive, catalog.policy(), found)

    def _act(self, agent: Agent, word: Word) -> None:
        if agent.state is AttemptState.TRIAL:
            if time.monotonic() >= agent.trial_ends:
                self._end_trial(agent)
            return
        facts = self._facts(agent, word)
        decision = decide.decide(facts, clock.now())
        wanted = (facts.offer.facts.version if facts.offer else None, word.directive.salt)
        begun = agent.state in BEFORE_TRIAL and (agent.target, agent.salt) == wanted
        if not decision.installs:
            if not begun and agent.state in BEFORE_TRIAL:
                agent.state = None
                self._is_done(agent)
            return
        target = wanted[0]
        if not begun:
            agent.target, agent.salt = wanted
            agent.step(AttemptState.DOWNLOADING)
            self._report(agent, 0.0)
        if word.directive.lease is not None and not self._leased(agent, target):
            return
        agent.step(AttemptState.STAGED)
        self._report(agent, 0.0)
        agent.step(AttemptState.TRIAL)
        agent.trial_ends = time.monotonic() + TRIAL_S
        with self._lock:
            self.installs.append(Install(agent.id, target, word.version))

    def _facts(self, agent: Agent, word: Word) -> Facts:
        running = word.releases.get(agent.version)
        if running is not None:
            agent.seq, agent.digest = running.facts.seq, running.facts.index_sha256[:12]
        directive = word.directive
        facts = Facts(
            agent_id=agent.id,
            product=PRODUCT,
            gate="",
            platforms=tuple(host_platforms()),
            running=Running(agent.version, agent.digest, agent.seq),
            directive=directive,
            directive_seen=clock.now(),
            policy=word.policy,
            offer=None,
            hold=None,
            floor_seen=0,
            in_trial=False,
            launcher=99,
            skip_reason=lambda digest, _epoch: "rolled back" if digest in agent.skipped else None,
        )
        release = word.releases.get(decide.wanted(facts).version)
        return facts if release is None else replace(facts, offer=Offer(release.facts))

    def _leased(self, agent: Agent, version: str) -> bool:
        answer = self._post(agent, server.LEASE_PATH, LeaseRequest(version).to_json(), signed=True)
        granted = LeaseAnswer.from_json(answer).granted
        if granted:
            with self._lock:
                there = self._at_work.setdefault(agent.site, set())
                there.add(agent.id)
                self.most_at_work = max(self.most_at_work, len(there))
        return granted

    def _is_done(self, agent: Agent) -> None:
        with self._lock:
            self._at_work.get(agent.site, set()).discard(agent.id)

    def _end_trial(self, agent: Agent) -> None:
        """From here on it may be counted as over by the server: it has not heard of it yet."""
        fails = agent.target in self.bad and int(agent.id.rpartition("-")[2]) % BAD_FOR == 0
        self._is_done(agent)
        if fails:
            agent.skipped.add(self._word.releases[agent.target].facts.index_sha256[:12])
            agent.step(AttemptState.ROLLED_BACK, "unhealthy")
        else:
            agent.version = agent.target
            agent.step(AttemptState.HEALTHY)

    def _report(self, agent: Agent, every_s: float) -> None:
        """Signed when there is something to say or no session; else a heartbeat when it is due."""
        now = time.monotonic()
        signed = bool(agent.pending) or agent.session is None
        if not signed and now - agent.reported < every_s:
            return
        report = Report(
            agent_id=agent.id,
            product=PRODUCT,
            version=agent.version,
            digest=agent.digest,
            phase=PHASES.get(agent.state, Phase.IDLE),
            platform=host_platforms()[0],
            labels={"test": "chaos", "site": agent.site},
            transitions=tuple(agent.pending[:MAX_TRANSITIONS]) if signed else (),
        )
        said = self._post(agent, server.REPORT_PATH, report.to_json(), signed=signed)
        if said is None:
            return
        answer = ReportAnswer.from_json(said)
        agent.pending = [one for one in agent.pending if one.number > answer.accepted]
        agent.session = answer.session or agent.session
        agent.cohort, agent.reported = answer.cohort, now

    def is_quiet(self) -> bool:
        """Whether everything that was done here has been heard."""
        return all(not one.pending and one.state is not AttemptState.TRIAL for one in self.agents)

    def on(self, version: str) -> int:
        return sum(agent.version == version for agent in self.agents)
