"""This module says in Prometheus's words how the server is: what lives how long, who is away, what was asked.

What is counted is counted by each web process into a file of its own and added up when it is scraped, so that
any process may answer. What is measured is read when it is scraped, from files and from the database's own
counters, and kept for `FRESH`: a scrape costs the same for ten agents and for a hundred thousand, and ten
scrapers cost as much as one.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, generate_latest, multiprocess
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from agent_core.clock import parse_iso
from agent_core.errors import RelfleetError
from keys.roles import COHORTS, ROOT, SNAPSHOT, TARGETS, TIMESTAMP
from release_server import attempts
from release_server.config import COUNTERS_VARIABLE
from release_server.jobs import LEASE
from release_server.models import Cohort, Lease, Product, Pruning, Rollout, RolloutCounter, RolloutStatus
from release_server.rollout import FINISHED, State
from release_server.signing.client import over_socket
from release_server.webhooks import outbox, subscriptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from prometheus_client.metrics_core import Metric
    from sqlalchemy.orm import Session

    from release_server.config import Config
    from release_server.database import Sessions

    Start = Callable[..., Any]
    Application = Callable[[dict[str, Any], Start], Iterable[bytes]]

FRESH = timedelta(seconds=5)
"""How long one reading is given out again."""
ROUTE = "relfleet.route"
"""In a request's environment: the template of the route that answered."""
FILES = ("/metadata/", "/targets/")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
OTHER = "other"
"""What no route answers, and methods that are none: a stranger's words never become labels."""
UNFINISHED = [str(state) for state in State if state not in FINISHED]


# --- what was asked --------------------------------------------------------------------------------------


class Traffic:
    """Counts the answers of `app` by route, method and class of status.

    Attributes:
        registry: holds the counter of this process alone.
    """

    def __init__(self, app: Application) -> None:
        self.app = app
        self.registry = CollectorRegistry()
        self._answers = Counter(
            "relfleet_http_requests",
            "Requests answered.",
            ("route", "method", "status"),
            registry=self.registry,
        )

    def __call__(self, environ: dict[str, Any], start: Start) -> Iterable[bytes]:
        def start_counted(status: str, *rest: Any) -> Any:
            method = environ["REQUEST_METHOD"]
            said = method if method in METHODS else OTHER
            self._answers.labels(_route(environ), said, f"{status[0]}xx").inc()
            return start(status, *rest)

        return self.app(environ, start_counted)


def _route(environ: dict[str, Any]) -> str:
    path: str = environ.get("PATH_INFO", "")
    return environ.get(ROUTE) or next((place for place in FILES if path.startswith(place)), OTHER)


# --- what is so ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Role:
    """One role as its newest published file says.

    Attributes:
        names: the versions of other files that it names.
    """

    version: int
    expires_at: datetime
    names: dict[str, int]


class Published:
    """The roles as agents are given them, from the exported files.

    A file with a version in its name is read once: it never changes, and targets may be large.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._known: dict[str, tuple[str, Role]] = {}

    def roles(self) -> dict[str, Role]:
        """Each role that is published; none of them before the first timestamp."""
        try:
            timestamp = self._read("timestamp.json")
            snapshot = self._load(SNAPSHOT, timestamp.names[f"{SNAPSHOT}.json"])
            found = {TIMESTAMP: timestamp, SNAPSHOT: snapshot}
            for role in (TARGETS, COHORTS):
                found[role] = self._load(role, snapshot.names[f"{role}.json"])
            return found | {ROOT: self._load(ROOT, self._newest_root())}
        except (OSError, KeyError, ValueError):
            return {}

    def _newest_root(self) -> int:
        version = self._known[ROOT][1].version if ROOT in self._known else 0
        while (self.directory / f"{version + 1}.{ROOT}.json").exists():
            version += 1
        return version

    def _load(self, role: str, version: int) -> Role:
        name = f"{version}.{role}.json"
        if role not in self._known or self._known[role][0] != name:
            self._known[role] = (name, self._read(name))
        return self._known[role][1]

    def _read(self, name: str) -> Role:
        signed = json.loads((self.directory / name).read_bytes())["signed"]
        names = {file: int(said["version"]) for file, said in signed.get("meta", {}).items()}
        return Role(int(signed["version"]), parse_iso(signed["expires"]), names)


@dataclass
class Reading:
    """One look at the server; `None` and empty where there was nothing to see."""

    roles: dict[str, Role]
    signer: bool
    free: int
    database: bool = False
    lease_age: float | None = None
    rollouts: tuple[tuple[str, int], ...] = ()
    agents: tuple[tuple[Any, ...], ...] = ()
    prunings: tuple[Pruning, ...] = ()
    deliveries: tuple[tuple[str, str, int], ...] = ()
    oldest_delivery: float = 0.0


def read(config: Config, sessions: Sessions, published: Published, now: datetime) -> Reading:
    """Look at files, signer and database; what is away is said, and keeps nothing else from being seen."""
    reading = Reading(published.roles(), _answers(config), shutil.disk_usage(config.data).free)
    try:
        with sessions.read() as session:
            reading.lease_age = _lease_age(session, config.lease, now)
            reading.rollouts = _rollouts(session)
            reading.agents = _agents(session)
            reading.prunings = tuple(session.scalars(select(Pruning).order_by(Pruning.kind)))
            reading.deliveries = _deliveries(session)
            waits_since = outbox.oldest_pending(session)
            reading.oldest_delivery = (now - waits_since).total_seconds() if waits_since else 0.0
        reading.database = True
    except SQLAlchemyError:
        reading.database = False
    return reading


def _answers(config: Config) -> bool:
    try:
        over_socket(config.signer_socket).known()
    except RelfleetError:
        return False
    return True


def _lease_age(session: Session, length: timedelta, now: datetime) -> float | None:
    """Seconds since a jobs process last said that it works; None when none ever did."""
    until = session.scalar(select(Lease.until).where(Lease.name == LEASE))
    return None if until is None else max(0.0, (now - until + length).total_seconds())


def _rollouts(session: Session) -> tuple[tuple[str, int], ...]:
    """How many are in each state that is not an end; by the state's index, so history costs nothing."""
    query = select(RolloutStatus.state, func.count()).where(RolloutStatus.state.in_(UNFINISHED))
    counted = {row[0]: int(row[1]) for row in session.execute(query.group_by(RolloutStatus.state))}
    return tuple((state, counted.get(state, 0)) for state in UNFINISHED)


def _agents(session: Session) -> tuple[tuple[Any, ...], ...]:
    """Where the agents of unfinished rollouts are, from the counters that move with each transition."""
    query = (
        select(Product.name, Cohort.name, RolloutCounter.state, func.sum(RolloutCounter.count))
        .join(RolloutStatus, RolloutStatus.rollout_id == RolloutCounter.rollout_id)
        .join(Rollout, Rollout.id == RolloutCounter.rollout_id)
        .join(Cohort, Cohort.id == Rollout.cohort_id)
        .join(Product, Product.id == Cohort.product_id)
        .where(RolloutStatus.state.in_(UNFINISHED), RolloutCounter.state != attempts.SENT_BACK)
        .group_by(Product.name, Cohort.name, RolloutCounter.state)
    )
    return tuple(
        (product, cohort, state, int(count)) for product, cohort, state, count in session.execute(query)
    )


def _deliveries(session: Session) -> tuple[tuple[str, str, int], ...]:
    """What webhooks have not taken, by webhook and state; what was sent costs nothing."""
    counted = outbox.counts(session)
    return tuple(
        (str(webhook.id), str(state), of.get(webhook.id, 0))
        for webhook in subscriptions.list_all(session)
        for state, of in counted.items()
    )


def gauges(reading: Reading, now: datetime) -> Iterator[Metric]:
    """A reading in Prometheus's words."""
    expiry = GaugeMetricFamily(
        "relfleet_role_expires_in_seconds", "Until the published role expires.", labels=["role"]
    )
    version = GaugeMetricFamily("relfleet_role_version", "Of the published role.", labels=["role"])
    for name, role in reading.roles.items():
        expiry.add_metric([name], (role.expires_at - now).total_seconds())
        version.add_metric([name], role.version)
    yield expiry
    yield version
    yield GaugeMetricFamily("relfleet_signer_up", "Whether the signer answers.", value=reading.signer)
    yield GaugeMetricFamily("relfleet_database_up", "Whether the database answers.", value=reading.database)
    yield GaugeMetricFamily("relfleet_disk_free_bytes", "Where the data directory is.", value=reading.free)
    if reading.lease_age is not None:
        age, said = reading.lease_age, "Since a jobs process last renewed its lease."
        yield GaugeMetricFamily("relfleet_jobs_lease_age_seconds", said, value=age)
    rollouts = GaugeMetricFamily("relfleet_rollouts", "Rollouts that are not at an end.", labels=["state"])
    for state, count in reading.rollouts:
        rollouts.add_metric([state], count)
    yield rollouts
    agents = GaugeMetricFamily(
        "relfleet_rollout_agents",
        "Agents that unfinished rollouts have reached.",
        labels=["product", "cohort", "state"],
    )
    for *labels, count in reading.agents:
        agents.add_metric(labels, count)
    yield agents
    yield from _retention(reading.prunings, now)
    yield from _outbox(reading)


def _retention(prunings: Iterable[Pruning], now: datetime) -> Iterator[Metric]:
    removed = CounterMetricFamily(
        "relfleet_retention_removed", "Old records and files that were removed.", labels=["kind"]
    )
    age = GaugeMetricFamily(
        "relfleet_retention_age_seconds", "Since all that was old of a kind had gone.", labels=["kind"]
    )
    for row in prunings:
        removed.add_metric([row.kind], row.removed)
        if row.finished_at is not None:
            age.add_metric([row.kind], max(0.0, (now - row.finished_at).total_seconds()))
    yield removed
    yield age


def _outbox(reading: Reading) -> Iterator[GaugeMetricFamily]:
    deliveries = GaugeMetricFamily(
        "relfleet_webhook_deliveries",
        "Deliveries that a webhook has not taken yet, and those given up.",
        labels=["webhook", "state"],
    )
    for *labels, count in reading.deliveries:
        deliveries.add_metric(labels, count)
    yield deliveries
    yield GaugeMetricFamily(
        "relfleet_webhook_oldest_pending_seconds",
        "Since the delivery happened that has waited longest.",
        value=reading.oldest_delivery,
    )


# --- the answer ------------------------------------------------------------------------------------------


class Metrics:
    """What `/metrics` answers, made at most once in `FRESH`.

    Args:
        traffic: of this process; other processes' files are added where there are some.
    """

    def __init__(self, config: Config, sessions: Sessions, traffic: Traffic) -> None:
        self._config, self._sessions, self._traffic = config, sessions, traffic
        self._published = Published(config.repository / "metadata")
        self._alone = threading.Lock()
        self._made: tuple[datetime, bytes] | None = None

    def text(self, now: datetime) -> bytes:
        """The whole answer; whoever asks meanwhile waits for the one that is being made."""
        with self._alone:
            if self._made is None or not self._made[0] <= now < self._made[0] + FRESH:
                self._made = (now, self._make(now))
            return self._made[1]

    def _make(self, now: datetime) -> bytes:
        reading = read(self._config, self._sessions, self._published, now)
        measured = CollectorRegistry()
        measured.register(_Measured(tuple(gauges(reading, now))))
        return generate_latest(measured) + generate_latest(self._counted())

    def _counted(self) -> CollectorRegistry:
        directory = os.environ.get(COUNTERS_VARIABLE)
        if not directory:
            return self._traffic.registry
        together = CollectorRegistry()
        multiprocess.MultiProcessCollector(together, path=directory)  # type: ignore[no-untyped-call]
        return together


@dataclass(frozen=True, eq=False)  # the registry keeps collectors by identity
class _Measured(Collector):
    families: tuple[Metric, ...]

    def collect(self) -> Iterable[Metric]:
        return self.families
