"""A small fleet for tests: agents with real keys that enrol and report through the services."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import event, select
from tuf.api.metadata import Metadata, TargetFile, Targets

from agent_core.clock import iso
from agent_core.directive import assign
from agent_core.wire import (
    AttemptState,
    Directive,
    EnrollRequest,
    Phase,
    Policy,
    Report,
    Transition,
    policy_path,
    signed_text,
)
from release_server import (
    agents,
    attempts,
    auth,
    cohort_view,
    cohorts,
    enrolment,
    fleet,
    launch,
    reports,
    rollout_view,
)
from release_server.models import Attempt, Bundle, CohortStatus, MetadataFile, Product, Release, Rollout
from release_server.stages import Stage

PLATFORM = "linux-x86_64-cp311"
PATH = "/api/v1/report"


@dataclass
class Host:
    """One agent's own side: its key, its counters, and what it says of itself."""

    id: str
    key: Ed25519PrivateKey
    version: str = "1.0.0"
    labels: dict = field(default_factory=dict)
    counter: int = 0
    number: int = 0
    session: str | None = None

    def step(self, at, state, version, salt="", reason="", detail=""):
        self.number += 1
        return Transition(self.number, iso(at), version, "d" * 12, salt, AttemptState(state), reason, detail)

    def report(self, *transitions, phase=Phase.IDLE, **said):
        fields = {"agent_id": self.id, "product": "demo", "version": self.version, "platform": PLATFORM}
        fields |= {"digest": "", "phase": phase, "labels": self.labels, "transitions": tuple(transitions)}
        return Report(**fields | said)

    def sign(self, report, counter=None, key=None):
        """The proof of a report, as the device makes it, and its body."""
        if counter is None:
            self.counter += 1
            counter = self.counter
        body = json.dumps(report.to_json()).encode()
        text = signed_text("POST", PATH, sha256(body).hexdigest(), counter)
        signature = (key or self.key).sign(text).hex()
        return reports.Signed(self.id, "POST", PATH, sha256(body).hexdigest(), counter, signature), body


def _hurry(connection):
    connection.execute("PRAGMA synchronous=OFF").close()


@dataclass
class World:
    """One product, its releases, cohorts and hosts."""

    sessions: object
    clock: object
    hosts: dict = field(default_factory=dict)
    token: str = ""

    def __post_init__(self):
        # No power is cut in these tests, and waiting for the disk is most of their time.
        if self.sessions.engine.dialect.name == "sqlite":
            event.listen(self.sessions.engine, "connect", lambda connection, _: _hurry(connection))
        with self.write() as session:
            session.add(Product(name="demo", created_at=self.clock()))
            self.token = auth.add_token(
                session, self.clock(), name="enrol", role=auth.Role.ENROLLER, actor="test"
            )[1]
            for seq, version in enumerate(("0.9.0", "1.0.0", "1.1.0", "1.2.0"), 1):
                self._add(session, version, seq)

    @contextmanager
    def write(self):
        with self.sessions.write() as session:
            yield session

    @contextmanager
    def read(self):
        with self.sessions.read() as session:
            yield session

    def call(self, service, *args, **said):
        """One service as one transaction, by the operator `olga`."""
        with self.write() as session:
            return service(session, self.clock(), "olga", *args, **said)

    def add_release(self, version, seq, platform="any", **facts):
        with self.write() as session:
            self._add(session, version, seq, platform, **facts)

    def _add(self, session, version, seq, platform="any", **facts):
        product = session.scalar(select(Product))
        release = Release(
            product=product, version=version, seq=seq, published_at=self.clock(), published_by="rita"
        )
        release.bundles = [
            Bundle(platform=platform, sha256="a" * 64, length=1, unpacked=1, facts={"gates": [], **facts})
        ]
        session.add(release)

    def sign_policy(self, **said):
        """The newest targets with this policy, as they lie in the table."""
        targets = Targets(expires=self.clock() + timedelta(days=9))
        held = TargetFile.from_data(policy_path("demo"), b"", ["sha256"])
        held.unrecognized_fields["custom"] = Policy(**said).to_json()
        targets.targets[held.path] = held
        row = {"role": Targets.type, "version": 1, "expires_at": targets.expires, "created_at": self.clock()}
        with self.write() as session:
            session.add(MetadataFile(**row, body=Metadata(targets).to_bytes()))

    # --- hosts ---------------------------------------------------------------------------------------------

    def request(self, name, key, **said):
        public = key.public_key().public_bytes_raw().hex()
        return EnrollRequest(
            **{"product": "demo", "name": name, "public_key": public, "platform": PLATFORM} | said
        )

    def enroll(self, name, *, version="1.0.0", labels=None, gate="", token=None):
        """A new host that has reported once."""
        key = Ed25519PrivateKey.generate()
        wanted = self.request(name, key, labels=labels or {}, gate=gate)
        with self.write() as session:
            answer = enrolment.enroll(session, self.clock(), token or self.token, wanted)
        host = self.hosts[answer.agent_id] = Host(answer.agent_id, key, version, labels or {})
        self.report(host)
        return host

    def enroll_many(self, count, **said):
        return [self.enroll(f"web-{number:02}", **said) for number in range(count)]

    def report(self, host, *transitions, **said):
        """A signed report, taken in."""
        report = host.report(*transitions, **said)
        proof, _ = host.sign(report)
        with self.write() as session:
            answer = reports.take_report(session, self.clock(), proof, report)
        host.session = answer.session or host.session
        return answer

    def heartbeat(self, *hosts, **said):
        """A report under the session, as most are."""
        for host in hosts:
            with self.write() as session:
                reports.take_report(
                    session, self.clock(), reports.Bearer(host.id, host.session), host.report(**said)
                )

    def heartbeats(self):
        for host in self.hosts.values():
            self.report(host)

    def finish(self, host, rollout, state, reason="", detail=""):
        """The host has tried the rollout's release, and says how it ended."""
        told = self.rollout(rollout)
        steps = [
            host.step(self.clock(), between, told.version, told.salt)
            for between in ("downloading", "staged", "trial")
        ]
        steps.append(host.step(self.clock(), state, told.version, told.salt, reason, detail))
        if state == "healthy":
            host.version = told.version
        self.report(host, *steps)

    # --- the server ----------------------------------------------------------------------------------------

    def cohort(self, name="all", *, release="1.0.0", **said):
        said = {"report_s": 60, "poll_s": 60} | said
        self.call(cohorts.create, product="demo", name=name, release=release, **said)
        return name

    def start(self, version="1.1.0", *stages, cohort="all", **said):
        stages = stages or (Stage(count=1), Stage(share_bp=10_000))
        rollout = self.call(
            launch.start_rollout, product="demo", cohort=cohort, version=version, stages=stages, **said
        )
        return rollout.id

    def tick(self, **by):
        self.clock.step(**by)
        with self.write() as session:
            return fleet.tick(session, self.clock())

    def rollout(self, rollout_id):
        with self.read() as session:
            return session.get_one(Rollout, rollout_id)

    def status(self, rollout_id):
        with self.read() as session:
            return rollout_view.show(session, rollout_id).status

    def events(self, rollout_id):
        with self.read() as session:
            return [event.event for event in rollout_view.events(session, rollout_id)]

    def counters(self, rollout_id):
        """The counters that are not zero, proven by a recount."""
        with self.read() as session:
            counted = attempts.counters(session, rollout_id)
            assert counted == attempts.recount(session, rollout_id)
            return {str(state): count for state, count in counted.items() if count}

    def attempt(self, host, rollout_id):
        with self.read() as session:
            return session.scalar(
                select(Attempt).where(Attempt.agent_id == host.id, Attempt.rollout_id == rollout_id)
            )

    def agent(self, agent_id):
        with self.read() as session:
            return agents.show(session, self.clock(), agent_id)

    def view(self, name="all"):
        with self.read() as session:
            return cohort_view.show(session, self.clock(), "demo", name)

    def directive(self, name="all"):
        return Directive.from_json(self.view(name).status.directive)

    def settled(self, name="all"):
        with self.read() as session:
            cohort = cohorts.find(session, "demo", name)
            return session.get_one(CohortStatus, cohort.id)

    def offered(self, version, name="all"):
        """The hosts whose directive leads them to `version`, and that do not run it."""
        told = self.directive(name)
        return [
            host
            for host in self.hosts.values()
            if assign(told, host.id, host.version or None).version == version
        ]
