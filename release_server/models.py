"""The tables: what people asked (spec) and what is so (status) stand apart (design section 5)."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Double,
    ForeignKey,
    Index,
    LargeBinary,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship


class Moment(TypeDecorator[datetime]):
    """A time in UTC; SQLite keeps no zone, so it is taken off on the way in and put back on the way out."""

    impl = DateTime
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC).replace(tzinfo=None)

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.replace(tzinfo=UTC)


class Base(DeclarativeBase):
    type_annotation_map: ClassVar[dict[Any, Any]] = {datetime: Moment, dict[str, Any]: JSON, list[Any]: JSON}
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class Product(Base):
    __tablename__ = "products"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime]
    stopped: Mapped[str | None] = mapped_column(String(200))
    """What a stop file says, as far as that was told; None where there is none (`stop_file`)."""


class Release(Base):
    """One version of a product, as the verified targets metadata lists it; immutable once there.

    Only whether it is offered may change: the server does not begin to hand out what was yanked.
    """

    __tablename__ = "releases"
    __table_args__ = (
        UniqueConstraint("product_id", "version", name="uq_releases_version"),
        UniqueConstraint("product_id", "seq", name="uq_releases_seq"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("products.id"), index=True)
    version: Mapped[str] = mapped_column(String(64))
    seq: Mapped[int] = mapped_column(BigInteger)
    notes: Mapped[str] = mapped_column(Text, default="")
    published_at: Mapped[datetime]
    published_by: Mapped[str] = mapped_column(String(128))
    yanked_at: Mapped[datetime | None]
    yanked_by: Mapped[str] = mapped_column(String(128), default="", server_default="")
    yank_reason: Mapped[str] = mapped_column(Text, default="", server_default="")
    product: Mapped[Product] = relationship()
    bundles: Mapped[list[Bundle]] = relationship(back_populates="release")


class Bundle(Base):
    """One release's archive for one platform."""

    __tablename__ = "bundles"
    __table_args__ = (UniqueConstraint("release_id", "platform", name="uq_bundles_platform"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"), index=True)
    platform: Mapped[str] = mapped_column(String(64))
    sha256: Mapped[str] = mapped_column(String(64))
    length: Mapped[int] = mapped_column(BigInteger)
    unpacked: Mapped[int] = mapped_column(BigInteger)
    facts: Mapped[dict[str, Any]]
    release: Mapped[Release] = relationship(back_populates="bundles")


class Cohort(Base):
    """A named set of agents of one product; what people want of it is its newest `CohortSpec`."""

    __tablename__ = "cohorts"
    __table_args__ = (UniqueConstraint("product_id", "name", name="uq_cohorts_name"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("products.id"), index=True)
    name: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]
    product: Mapped[Product] = relationship()


class CohortSpec(Base):
    """One immutable revision of what people want of a cohort: who, when, why.

    `because` says the same of what stands by an earlier one: the `pin` and the `freeze` by hand.
    """

    __tablename__ = "cohort_specs"
    __table_args__ = (UniqueConstraint("cohort_id", "revision", name="uq_cohort_specs_revision"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    cohort_id: Mapped[int] = mapped_column(ForeignKey("cohorts.id"), index=True)
    revision: Mapped[int]
    match: Mapped[str] = mapped_column(Text)
    priority: Mapped[int] = mapped_column(default=0)
    pin: Mapped[str | None] = mapped_column(String(64))
    frozen: Mapped[bool] = mapped_column(default=False)
    frozen_until: Mapped[datetime | None]
    window: Mapped[dict[str, Any] | None]
    splay_s: Mapped[int] = mapped_column(default=0)
    poll_s: Mapped[int] = mapped_column(default=60)
    report_s: Mapped[int] = mapped_column(default=300)
    retry_epoch: Mapped[int] = mapped_column(default=0)
    lease: Mapped[dict[str, Any] | None]
    budget: Mapped[dict[str, Any] | None]
    calendar: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
    approval: Mapped[bool] = mapped_column(default=False, server_default=false())
    because: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[datetime]


class CohortStatus(Base):
    """What is so of a cohort: the version it has settled on, and the directive last made for it.

    `frozen_by` (an entry of its calendar) and `frozen_by_hand` are the freezes that stand and were told of,
    until `frozen_until` and `frozen_by_hand_until`, or without end.
    """

    __tablename__ = "cohort_status"
    cohort_id: Mapped[int] = mapped_column(ForeignKey("cohorts.id"), primary_key=True)
    base: Mapped[str | None] = mapped_column(String(64))
    directive: Mapped[dict[str, Any] | None]
    directive_revision: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime | None] = mapped_column(index=True)
    frozen_by: Mapped[str | None] = mapped_column(String(64))
    frozen_until: Mapped[datetime | None]
    frozen_by_hand: Mapped[bool] = mapped_column(default=False, server_default=false())
    frozen_by_hand_until: Mapped[datetime | None]
    edition: Mapped[int] = mapped_column(default=0)
    updated_at: Mapped[datetime]


class Rollout(Base):
    """One release travelling through one cohort; what people want of it is its newest `RolloutSpec`.

    Since `pruned_at` its attempts and its history are gone; its counters say what they came to.
    """

    __tablename__ = "rollouts"
    id: Mapped[int] = mapped_column(primary_key=True)
    cohort_id: Mapped[int] = mapped_column(ForeignKey("cohorts.id"), index=True)
    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"))
    version: Mapped[str] = mapped_column(String(64))
    base: Mapped[str | None] = mapped_column(String(64))
    salt: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(128))
    pruned_at: Mapped[datetime | None]
    cohort: Mapped[Cohort] = relationship()
    release: Mapped[Release] = relationship()


class RolloutSpec(Base):
    """One immutable revision of what people want of a rollout.

    `approved` is the digest of the plan that a second person has approved, empty before.
    """

    __tablename__ = "rollout_specs"
    __table_args__ = (UniqueConstraint("rollout_id", "revision", name="uq_rollout_specs_revision"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.id"), index=True)
    revision: Mapped[int]
    stages: Mapped[list[Any]]
    wanted: Mapped[str] = mapped_column(String(32))
    advance_to: Mapped[int] = mapped_column(default=0)
    terms: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
    approved: Mapped[str] = mapped_column(String(64), default="", server_default="")
    actor: Mapped[str] = mapped_column(String(128))
    reason: Mapped[str] = mapped_column(Text, default="")
    created_at: Mapped[datetime]


class RolloutStatus(Base):
    """What is so of a rollout; only `reconcile` writes it, by compare-and-swap on `edition`."""

    __tablename__ = "rollout_status"
    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.id"), primary_key=True)
    state: Mapped[str] = mapped_column(String(32), index=True)
    stage: Mapped[int] = mapped_column(default=0)
    stage_state: Mapped[str] = mapped_column(String(32))
    progress: Mapped[int] = mapped_column(default=0)
    reason: Mapped[str] = mapped_column(String(64), default="")
    detail: Mapped[str] = mapped_column(Text, default="")
    opened_at: Mapped[datetime | None]
    soaking_since: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    spec_revision: Mapped[int] = mapped_column(default=0)
    tolerated: Mapped[int] = mapped_column(default=0)
    tolerated_silent: Mapped[int] = mapped_column(default=0)
    excused: Mapped[list[Any]] = mapped_column(default=list, server_default="[]")
    watch_until: Mapped[datetime | None]
    watch_at: Mapped[datetime | None] = mapped_column(index=True)
    edition: Mapped[int] = mapped_column(default=0)
    updated_at: Mapped[datetime]


class RolloutCounter(Base):
    """How many attempts of a rollout are in each state; moves with transitions only, a recount proves it."""

    __tablename__ = "rollout_counters"
    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.id"), primary_key=True)
    state: Mapped[str] = mapped_column(String(32), primary_key=True)
    count: Mapped[int] = mapped_column(default=0)


class RolloutEvent(Base):
    """One transition of a rollout, with its reason and the numbers it saw."""

    __tablename__ = "rollout_events"
    id: Mapped[int] = mapped_column(primary_key=True)
    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.id"), index=True)
    at: Mapped[datetime]
    event: Mapped[str] = mapped_column(String(64))
    stage: Mapped[int]
    reason: Mapped[str] = mapped_column(String(64), default="")
    detail: Mapped[str] = mapped_column(Text, default="")
    numbers: Mapped[dict[str, Any]]
    actor: Mapped[str] = mapped_column(String(128), default="")


class Agent(Base):
    """One enrolled agent, as it last reported.

    `pending` ones wait for an operator and belong to no cohort; `token_id` is the token that enrolled it.
    """

    __tablename__ = "agents"
    __table_args__ = (Index("ix_agents_cohort_seen", "cohort_id", "seen_at"),)
    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("products.id"), index=True)
    public_key: Mapped[str] = mapped_column(String(64), unique=True)
    platform: Mapped[str] = mapped_column(String(64))
    gate: Mapped[str] = mapped_column(String(64), default="")
    inventory: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
    labels: Mapped[dict[str, Any]]
    operator_labels: Mapped[dict[str, Any]]
    cohort_id: Mapped[int | None] = mapped_column(ForeignKey("cohorts.id"), index=True)
    cohort_fixed: Mapped[bool] = mapped_column(default=False)
    version: Mapped[str] = mapped_column(String(64), default="")
    digest: Mapped[str] = mapped_column(String(64), default="")
    phase: Mapped[str] = mapped_column(String(16), default="idle")
    reason: Mapped[str] = mapped_column(String(64), default="")
    detail: Mapped[str] = mapped_column(Text, default="")
    held: Mapped[bool] = mapped_column(default=False)
    figures: Mapped[dict[str, Any]]
    counter: Mapped[int] = mapped_column(BigInteger, default=0)
    accepted: Mapped[int] = mapped_column(BigInteger, default=0)
    session_hash: Mapped[str | None] = mapped_column(String(64))
    session_until: Mapped[datetime | None]
    enrolled_at: Mapped[datetime]
    seen_at: Mapped[datetime]
    retired_at: Mapped[datetime | None]
    pending: Mapped[bool] = mapped_column(default=False, server_default=false())
    token_id: Mapped[int | None] = mapped_column(ForeignKey("tokens.id"), index=True)
    product: Mapped[Product] = relationship()
    cohort: Mapped[Cohort | None] = relationship()


class Resettling(Base):
    """A product whose cohorts have changed: agents up to the id `cursor` stand where they belong again."""

    __tablename__ = "resettlings"
    product_id: Mapped[int] = mapped_column(ForeignKey("products.id"), primary_key=True)
    cursor: Mapped[str] = mapped_column(String(128), default="")


class Attempt(Base):
    """One agent's way through one release of one rollout, made when it is first heard of.

    `before` holds the health figures it last reported before it began.
    """

    __tablename__ = "attempts"
    __table_args__ = (UniqueConstraint("agent_id", "rollout_id", name="uq_attempts_agent_rollout"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    agent_id: Mapped[str] = mapped_column(ForeignKey("agents.id"), index=True)
    rollout_id: Mapped[int] = mapped_column(ForeignKey("rollouts.id"), index=True)
    release_id: Mapped[int] = mapped_column(ForeignKey("releases.id"))
    state: Mapped[str] = mapped_column(String(32))
    reason: Mapped[str] = mapped_column(String(64), default="")
    detail: Mapped[str] = mapped_column(Text, default="")
    before: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
    started_at: Mapped[datetime]
    updated_at: Mapped[datetime]


class AgentEvent(Base):
    """One transition as an agent reported it: the history `agents show` prints."""

    __tablename__ = "agent_events"
    __table_args__ = (UniqueConstraint("agent_id", "number", name="uq_agent_events_number"),)
    id: Mapped[int] = mapped_column(primary_key=True)
    agent_id: Mapped[str] = mapped_column(ForeignKey("agents.id"), index=True)
    number: Mapped[int] = mapped_column(BigInteger)
    at: Mapped[str] = mapped_column(String(32))
    received_at: Mapped[datetime]
    version: Mapped[str] = mapped_column(String(64))
    state: Mapped[str] = mapped_column(String(32))
    reason: Mapped[str] = mapped_column(String(64), default="")
    detail: Mapped[str] = mapped_column(Text, default="")


class ActivationLease(Base):
    """An agent that may be between two versions now, until a time, in one failure domain."""

    __tablename__ = "activation_leases"
    __table_args__ = (Index("ix_activation_leases_domain", "product_id", "scope", "domain"),)
    agent_id: Mapped[str] = mapped_column(ForeignKey("agents.id"), primary_key=True)
    product_id: Mapped[int] = mapped_column(ForeignKey("products.id"))
    scope: Mapped[str] = mapped_column(String(64))
    domain: Mapped[str] = mapped_column(String(256))
    version: Mapped[str] = mapped_column(String(64))
    granted_at: Mapped[datetime]
    until: Mapped[datetime]


class DownloadShare(Base):
    """How fast an agent may download now, until a time, of the budget of one failure domain; 0: it waits.

    Not of one product alone: a site's line is the same for all of them.
    """

    __tablename__ = "download_shares"
    __table_args__ = (Index("ix_download_shares_domain", "scope", "domain"),)
    agent_id: Mapped[str] = mapped_column(ForeignKey("agents.id"), primary_key=True)
    scope: Mapped[str] = mapped_column(String(64))
    domain: Mapped[str] = mapped_column(String(256))
    rate_bps: Mapped[int]
    budget_bps: Mapped[int]
    until: Mapped[datetime]


class Token(Base):
    """A token of a person, a pipeline or an enrolment; only its hash is kept.

    `approve`, `cohort` and `labels` are for what an enroller's token enrols.
    """

    __tablename__ = "tokens"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    role: Mapped[str] = mapped_column(String(16))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    product: Mapped[str | None] = mapped_column(String(64))
    uses_left: Mapped[int | None]
    approve: Mapped[bool] = mapped_column(default=False, server_default=false())
    cohort: Mapped[str | None] = mapped_column(String(64))
    labels: Mapped[dict[str, Any]] = mapped_column(server_default="{}")
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(128))
    expires_at: Mapped[datetime | None]
    used_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]


class PersonSession(Base):
    """A person signed in at the page with the provider; only the hash of the cookie is kept.

    `rule` is the line of `oidc.roles` that let the person in: the session is worth what that line says now.
    `attempt` is the hash of what the sign-in was held together by, so that one makes one session.
    """

    __tablename__ = "person_sessions"
    __table_args__ = ({"sqlite_autoincrement": True},)
    """Rows go, and whoever ends session 7 must not end a later one that was given its number."""
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(128))
    issuer: Mapped[str] = mapped_column(String(512))
    subject: Mapped[str] = mapped_column(String(255))
    rule: Mapped[str] = mapped_column(String(512))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    attempt: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime]
    used_at: Mapped[datetime]
    expires_at: Mapped[datetime] = mapped_column(index=True)
    ended_at: Mapped[datetime | None]
    ended_by: Mapped[str] = mapped_column(String(128), default="", server_default="")


class RateLimit(Base):
    """When one caller may again ask as if it had never asked, in seconds since 1970; see `limits`."""

    __tablename__ = "rate_limits"
    key: Mapped[str] = mapped_column(String(96), primary_key=True)
    full_at: Mapped[float] = mapped_column(Double, index=True)


class KeptAnswer(Base):
    """The answer to a request that carried an `Idempotency-Key`, written with what it did; see `api.once`.

    `digest` is of what was asked. `body` is compressed, and without the secrets that were in it.
    """

    __tablename__ = "kept_answers"
    person: Mapped[str] = mapped_column(String(128), primary_key=True)
    key: Mapped[str] = mapped_column(String(128), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))
    status: Mapped[int]
    headers: Mapped[dict[str, Any]]
    body: Mapped[bytes] = mapped_column(LargeBinary)
    at: Mapped[datetime] = mapped_column(index=True)


class AuditEntry(Base):
    """Who did what to what, and when; written in the same transaction as the deed.

    `hash` covers the entry and `previous`, the hash of the one before (`audit_chain`).
    """

    __tablename__ = "audit"
    id: Mapped[int] = mapped_column(primary_key=True)
    at: Mapped[datetime] = mapped_column(index=True)
    actor: Mapped[str] = mapped_column(String(128))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(256))
    detail: Mapped[dict[str, Any]]
    previous: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64))


class AuditHead(Base):
    """The newest audit entry, in one row that every writer of the log locks."""

    __tablename__ = "audit_head"
    id: Mapped[int] = mapped_column(primary_key=True)
    entry: Mapped[int]
    hash: Mapped[str] = mapped_column(String(64))


class MetadataFile(Base):
    """Every version of every TUF role, in the transaction that made it; the files on disk follow."""

    __tablename__ = "tuf_metadata"
    __table_args__ = (Index("ix_tuf_metadata_created", "role", "created_at", "version"),)
    role: Mapped[str] = mapped_column(String(128), primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    expires_at: Mapped[datetime]
    created_at: Mapped[datetime]


class Proposal(Base):
    """Targets that too few have signed yet. The server publishes them when enough have, and serves no agent
    anything of them before.

    `body` is the metadata with the signatures so far; `signers` says which person brought which key's.
    """

    __tablename__ = "proposals"
    id: Mapped[int] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, index=True)
    body: Mapped[bytes] = mapped_column(LargeBinary)
    signers: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(String(16), index=True)
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(128))
    expires_at: Mapped[datetime]
    closed_at: Mapped[datetime | None]
    closed_by: Mapped[str] = mapped_column(String(128), default="")
    reason: Mapped[str] = mapped_column(Text, default="")


class Pruning(Base):
    """How far the removal of one kind of old records is, and how many have gone; see `retention`.

    `cursor` is where the next batch of a sweep that is `under_way` begins.
    """

    __tablename__ = "prunings"
    kind: Mapped[str] = mapped_column(String(32), primary_key=True)
    cursor: Mapped[str] = mapped_column(String(128), default="", server_default="")
    under_way: Mapped[bool] = mapped_column(default=False, server_default=false())
    removed: Mapped[int] = mapped_column(BigInteger, default=0, server_default="0")
    finished_at: Mapped[datetime | None]


class Lease(Base):
    """A lock that its holder renews: one process reconciles and re-signs at a time (`JOBS`).

    `WEB` is nobody's: web processes renew it together, to say that one of them listens (`presence`).

    `fence` grows with every change of hands; a process whose fence is no longer the row's writes nothing.
    `since` is when a process was there again after none had been; None while there always was one. `gaps` are
    the times in which there was none, from and until, as `presence` reads them.
    """

    __tablename__ = "locks"
    JOBS: ClassVar[str] = "jobs"
    WEB: ClassVar[str] = "web"
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    holder: Mapped[str] = mapped_column(String(128))
    fence: Mapped[int] = mapped_column(default=0)
    until: Mapped[datetime]
    since: Mapped[datetime | None]
    gaps: Mapped[list[Any]] = mapped_column(default=list, server_default="[]")


class Webhook(Base):
    """Who elsewhere is told of what; `sequence` counts what it was told, and `failures` those in a row.

    Nothing is sent to it before `due_at`. Its secret is not here: see `WebhookSecret`.
    """

    __tablename__ = "webhooks"
    __table_args__ = ({"sqlite_autoincrement": True},)
    id: Mapped[int] = mapped_column(primary_key=True)
    url: Mapped[str] = mapped_column(String(2048))
    events: Mapped[list[Any]]
    product: Mapped[str | None] = mapped_column(String(64))
    created_at: Mapped[datetime]
    created_by: Mapped[str] = mapped_column(String(128))
    sequence: Mapped[int] = mapped_column(default=0)
    failures: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime]


class WebhookSecret(Base):
    """What a webhook's secret is made of, together with a key that is not in the database.

    `mark` tells whether it still is the secret that was shown; the newest one has no `until`.
    """

    __tablename__ = "webhook_secrets"
    id: Mapped[int] = mapped_column(primary_key=True)
    webhook_id: Mapped[int] = mapped_column(ForeignKey("webhooks.id"), index=True)
    salt: Mapped[str] = mapped_column(String(64))
    mark: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime]
    until: Mapped[datetime | None]


class WebhookDelivery(Base):
    """One event for one webhook, written in the transaction in which it happened; sent after its commit."""

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        UniqueConstraint("webhook_id", "sequence", name="uq_webhook_deliveries_sequence"),
        Index("ix_webhook_deliveries_state", "state", "webhook_id", "sequence"),
    )
    id: Mapped[int] = mapped_column(primary_key=True)
    webhook_id: Mapped[int] = mapped_column(ForeignKey("webhooks.id"))
    event_id: Mapped[str] = mapped_column(String(64), unique=True)
    sequence: Mapped[int]
    type: Mapped[str] = mapped_column(String(64))
    body: Mapped[str] = mapped_column(Text)
    created_at: Mapped[datetime]
    state: Mapped[str] = mapped_column(String(16))
    tries: Mapped[int] = mapped_column(default=0)
    tried_at: Mapped[datetime | None]
    answer: Mapped[str] = mapped_column(String(128), default="")
