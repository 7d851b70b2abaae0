"""The JSON both ends speak, and the typed getters that read it.

Every message is a frozen dataclass with `to_json()` and a `from_json()` that refuses, with the path of the
key, whatever does not fit. Unknown keys are ignored so that either end may be newer (design section 3).
"""

from __future__ import annotations

import json
import re
from dataclasses import field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Self, TypeVar

from agent_core.errors import MalformedError
from agent_core.late import late_dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

SCHEMA = 1

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
"""Products, cohorts, gates: lower case, safe as one path segment."""
AGENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
VERSION = re.compile(r"[0-9][A-Za-z0-9.+_-]{0,63}")
PLATFORM = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
SHA256 = re.compile(r"[0-9a-f]{64}")
SIGNATURE = re.compile(r"[0-9a-f]{128}")
LABEL_KEY = re.compile(r"[a-z0-9][a-z0-9._/-]{0,62}")
PROGRESS_FULL = 10_000
MAX_LABELS = 64
MAX_TRANSITIONS = 200
MAX_TEXT = 2_000
MAX_FIGURE = 2.0**63
UNSTORABLE = re.compile("[\0\ud800-\udfff]")
"""JSON can spell NUL and half a surrogate pair; no database takes the first, no encoder the second."""

E = TypeVar("E", bound=StrEnum)


class Phase(StrEnum):
    """Where an agent is with its own update, as its record and its last check say."""

    IDLE = "idle"
    DOWNLOADING = "downloading"
    STAGED = "staged"
    TRIAL = "trial"
    ROLLBACK = "rollback"


class AttemptState(StrEnum):
    """One agent's way through one release of one rollout (design section 5)."""

    OFFERED = "offered"
    DOWNLOADING = "downloading"
    STAGED = "staged"
    TRIAL = "trial"
    HEALTHY = "healthy"
    ROLLED_BACK = "rolled_back"
    FAILED = "failed"
    SILENT = "silent"
    SKIPPED = "skipped"


class Mode(StrEnum):
    """What a directive lets a cohort do: follow it, stay as it is, or not even look."""

    ENABLED = "enabled"
    SUSPENDED = "suspended"
    DISABLED = "disabled"


class Reason(StrEnum):
    """Why a decision fell as it did; codes of the wire, the metrics and `why`."""

    # An update will happen.
    UPDATE = "update"
    FIRST_INSTALL = "first-install"
    GO_BACK = "go-back"
    # Nothing is to be done.
    UP_TO_DATE = "up-to-date"
    NOT_YET = "not-yet"
    SUSPENDED = "suspended"
    DISABLED = "disabled"
    STOP_FILE = "stop-file"
    HELD = "held"
    OUTSIDE_WINDOW = "outside-window"
    SPLAY = "splay"
    LEASE = "lease"
    BUDGET = "budget"
    BACKOFF = "backoff"
    SKIPPED = "skipped"
    IN_TRIAL = "in-trial"
    NO_COHORT = "no-cohort"
    NO_DIRECTIVE = "no-directive"
    PENDING = "pending"
    RETIRED = "retired"
    # Refused: the release must not run here.
    WRONG_PRODUCT = "wrong-product"
    NO_BUNDLE = "no-bundle"
    WRONG_PLATFORM = "wrong-platform"
    GATE = "gate"
    BELOW_FLOOR = "below-floor"
    REVOKED = "revoked"
    OLDER = "older"
    STEPPING_STONE = "stepping-stone"
    OLD_LAUNCHER = "old-launcher"
    # Refused: what arrived cannot be trusted.
    BAD_SIGNATURE = "bad-signature"
    EXPIRED = "expired"
    REPLAYED = "replayed"
    BAD_METADATA = "bad-metadata"
    BAD_DELEGATION = "bad-delegation"
    BAD_DIRECTIVE = "bad-directive"
    DIGEST_MISMATCH = "digest-mismatch"
    LENGTH_MISMATCH = "length-mismatch"
    BAD_ARCHIVE = "bad-archive"
    BAD_INDEX = "bad-index"
    BAD_ANSWER = "bad-answer"
    BAD_CERTIFICATE = "bad-certificate"
    # Could not be done now.
    OFFLINE = "offline"
    OVERLOADED = "overloaded"
    NO_ROOM = "no-room"
    DISK = "disk"
    INTERNAL = "internal"
    # How a trial ended.
    PREFLIGHT = "preflight"
    PREFLIGHT_VERSION = "preflight-version"
    PRE_ACTIVATE = "pre-activate"
    POST_ACTIVATE = "post-activate"
    UNHEALTHY = "unhealthy"
    WORKLOAD_EXITED = "workload-exited"
    BOOTS_USED_UP = "boots-used-up"
    DEAD_MAN = "dead-man"
    CANNOT_UPDATE = "cannot-update"
    OPERATOR = "operator"
    OBSERVED = "observed"


class Getter:
    """Reads an untrusted mapping field by field; errors name the whole key path.

    Args:
        mapping: a decoded JSON object.
        path: where the mapping came from, e.g. `report.transitions[3]`.
    """

    def __init__(self, mapping: object, path: str) -> None:
        if not isinstance(mapping, dict):
            raise MalformedError(f"{path} is not an object", why=f"it is {type(mapping).__name__}")
        self.mapping: dict[str, Any] = mapping
        self.path = path

    def refuse(self, key: str, why: str) -> MalformedError:
        return MalformedError(f"{self.path}.{key} is not acceptable", why=why)

    def _take(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        value = self.mapping.get(key, default)
        if value is ...:
            raise self.refuse(key, "it is missing")
        if value is None and default is None:
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.refuse(key, f"it is {type(value).__name__}")
        return value

    def text(self, key: str, default: Any = ..., *, form: re.Pattern[str] | None = None) -> str:
        value: str = self._take(key, str, default)
        if value is not None and value is not default:
            self._check_text(key, value, form)
        return value

    def _check_text(self, key: str, value: str, form: re.Pattern[str] | None) -> None:
        if len(value) > MAX_TEXT:
            raise self.refuse(key, f"it is longer than {MAX_TEXT} characters")
        if UNSTORABLE.search(value):
            raise self.refuse(key, "it holds NUL or half a surrogate pair")
        if form is not None and not form.fullmatch(value):
            raise self.refuse(key, f"{value[:80]!r} does not have the form {form.pattern}")

    def optional_text(self, key: str, *, form: re.Pattern[str] | None = None) -> str | None:
        return self.text(key, None, form=form)

    def integer(self, key: str, default: Any = ..., *, low: int = 0, high: int = 2**53) -> int:
        value: int = self._take(key, int, default)
        if value is not None and not low <= value <= high:
            raise self.refuse(key, f"{str(value)[:40]} is not within {low} and {high}")
        return value

    def number(self, key: str, default: Any = ..., *, low: float = 0, high: float = 2.0**53) -> float:
        value = self._take(key, (int, float), default)
        if value is None:
            return None  # type: ignore[return-value]
        if not low <= value <= high:
            raise self.refuse(key, f"{value} is not within {low} and {high}")
        return float(value)

    def boolean(self, key: str, default: Any = ...) -> bool:
        value: bool = self._take(key, bool, default)
        return value

    def choice(self, key: str, kind: type[E], default: Any = ...) -> E:
        value = self.text(key, default)
        try:
            return kind(value)
        except ValueError:
            raise self.refuse(key, f"{value[:80]!r} is not one of {', '.join(kind)}") from None

    def items(self, key: str, default: Any = ..., *, most: int = 1000) -> list[Any]:
        value: list[Any] = self._take(key, list, default)
        if len(value) > most:
            raise self.refuse(key, f"it has more than {most} entries")
        return value

    def texts(self, key: str, default: Any = ..., *, most: int = 1000) -> tuple[str, ...]:
        value = self.items(key, default, most=most)
        if not all(isinstance(entry, str) and len(entry) <= MAX_TEXT for entry in value):
            raise self.refuse(key, "an entry is not a short text")
        if any(UNSTORABLE.search(entry) for entry in value):
            raise self.refuse(key, "an entry holds NUL or half a surrogate pair")
        return tuple(value)

    def integers(self, key: str, default: Any = ..., *, most: int = 1000) -> tuple[int, ...]:
        value = self.items(key, default, most=most)
        if not all(type(entry) is int and entry >= 0 for entry in value):
            raise self.refuse(key, "an entry is not a whole number")
        return tuple(value)

    def object(self, key: str, default: Any = ...) -> dict[str, Any]:
        value: dict[str, Any] = self._take(key, dict, default)
        return value

    def labels(self, key: str) -> dict[str, str]:
        value = self.object(key, {})
        if len(value) > MAX_LABELS:
            raise self.refuse(key, f"it has more than {MAX_LABELS} labels")
        for name, text in value.items():
            if not LABEL_KEY.fullmatch(name) or not isinstance(text, str) or len(text) > 256:
                raise self.refuse(key, f"label {name[:64]!r} is not a short text under a plain name")
            if UNSTORABLE.search(text):
                raise self.refuse(key, f"label {name[:64]!r} holds NUL or half a surrogate pair")
        return value


# --- what the release keys sign -------------------------------------------------------------------------


@late_dataclass(frozen=True)
class ReleaseFacts:
    """The `custom` of `bundles/PRODUCT/VERSION/PLATFORM.tar.zst`: what the release managers say of it.

    Attributes:
        upgrade_from_seq: it installs only over a release of this seq or a later one.
        barrier: whatever comes later installs only over this one or over what came after it.
    """

    product: str
    version: str
    seq: int
    platform: str
    index_sha256: str
    index_length: int
    unpacked: int
    files: int
    gates: tuple[str, ...] = ()
    upgrade_from_seq: int = 0
    min_launcher: int = 1
    notes: str = ""
    barrier: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "product": self.product,
            "version": self.version,
            "seq": self.seq,
            "platform": self.platform,
            "index": {"sha256": self.index_sha256, "length": self.index_length},
            "unpacked": self.unpacked,
            "files": self.files,
            "gates": list(self.gates),
            "upgrade_from_seq": self.upgrade_from_seq,
            "min_launcher": self.min_launcher,
            "notes": self.notes,
            # Only where it is one: what was signed before there were barriers stays as it is.
            **({"barrier": True} if self.barrier else {}),
        }

    @classmethod
    def from_json(cls, custom: object, path: str = "release") -> Self:
        get = Getter(custom, path)
        get.integer("schema", low=1, high=SCHEMA)
        index = Getter(get.object("index"), f"{path}.index")
        return cls(
            product=get.text("product", form=NAME),
            version=get.text("version", form=VERSION),
            seq=get.integer("seq", low=1),
            platform=get.text("platform", form=PLATFORM),
            index_sha256=index.text("sha256", form=SHA256),
            index_length=index.integer("length", low=2, high=64 * 2**20),
            unpacked=get.integer("unpacked"),
            files=get.integer("files"),
            gates=get.texts("gates", [], most=32),
            upgrade_from_seq=get.integer("upgrade_from_seq", 0),
            min_launcher=get.integer("min_launcher", 1),
            notes=get.text("notes", ""),
            barrier=get.boolean("barrier", False),
        )


@late_dataclass(frozen=True)
class DeltaFacts:
    """The `custom` of a delta: between which two bundles, by the digests of their indexes."""

    from_version: str
    from_sha256: str
    to_sha256: str

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **vars(self)}

    @classmethod
    def from_json(cls, custom: object, path: str = "delta") -> Self:
        get = Getter(custom, path)
        get.integer("schema", low=1, high=SCHEMA)
        return cls(
            from_version=get.text("from_version", form=VERSION),
            from_sha256=get.text("from_sha256", form=SHA256),
            to_sha256=get.text("to_sha256", form=SHA256),
        )


@late_dataclass(frozen=True)
class Policy:
    """The `custom` of `policy/PRODUCT.json`: below the floor, and revoked, nothing is installed."""

    floor_seq: int = 0
    revoked_seq: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "floor_seq": self.floor_seq, "revoked_seq": list(self.revoked_seq)}

    @classmethod
    def from_json(cls, custom: object, path: str = "policy") -> Self:
        get = Getter(custom, path)
        get.integer("schema", low=1, high=SCHEMA)
        return cls(get.integer("floor_seq", 0), get.integers("revoked_seq", []))


def bundle_path(product: str, version: str, platform: str) -> str:
    """The one place a bundle may stand in top-level targets; the agent builds it itself."""
    return f"bundles/{product}/{version}/{platform}.tar.zst"


def index_path(product: str, version: str, platform: str) -> str:
    """The bundle's index, beside it in top-level targets."""
    return f"bundles/{product}/{version}/{platform}.index.json"


def delta_path(product: str, version: str, platform: str, from_sha256: str) -> str:
    """What makes this bundle of the one with that index, in top-level targets."""
    return f"deltas/{product}/{version}/{platform}/{from_sha256}.delta"


def policy_path(product: str) -> str:
    return f"policy/{product}.json"


def directive_path(product: str, cohort: str) -> str:
    return f"cohorts/{product}/{cohort}.json"


# --- what the cohorts key signs --------------------------------------------------------------------------

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
CLOCK_TIME = re.compile(r"([01][0-9]|2[0-3]):[0-5][0-9]")


@late_dataclass(frozen=True)
class Window:
    """When a cohort may begin an update, in its own local time; `end` before `start` passes midnight."""

    days: tuple[str, ...]
    start: str
    end: str
    zone: str

    def to_json(self) -> dict[str, Any]:
        return {"days": list(self.days), "from": self.start, "to": self.end, "zone": self.zone}

    @classmethod
    def from_json(cls, window: object, path: str) -> Self:
        get = Getter(window, path)
        days = get.texts("days", most=7)
        if not days or not set(days) <= set(DAYS):
            raise get.refuse("days", f"days are of {', '.join(DAYS)}")
        return cls(days, get.text("from", form=CLOCK_TIME), get.text("to", form=CLOCK_TIME), get.text("zone"))


@late_dataclass(frozen=True)
class LeaseTerms:
    """How many agents of one failure domain may be between two versions at once.

    Attributes:
        scope: the label whose value names an agent's domain, such as `site`.
        limit: so many, or
        share_bp: so much of the domain's agents in basis points, one at least; of both the smaller counts.
    """

    scope: str
    limit: int | None = None
    share_bp: int | None = None

    def to_json(self) -> dict[str, Any]:
        said = {"scope": self.scope, "limit": self.limit, "share_bp": self.share_bp}
        return {name: value for name, value in said.items() if value is not None}

    @classmethod
    def from_json(cls, lease: object, path: str = "lease") -> Self:
        get = Getter(lease, path)
        limit = get.integer("limit", None, low=1)
        share_bp = get.integer("share_bp", None, low=1, high=PROGRESS_FULL)
        if all(get.mapping.get(name) is None for name in ("limit", "share_bp")):
            raise get.refuse("limit", "a lease has a limit or a share")
        return cls(get.text("scope", form=LABEL_KEY), limit, share_bp)


LEAST_SHARE_BPS = 4096
"""No share is smaller, but of a host that wants less: four times what device and server call too slow."""
MOST_BPS = 2**31 - 1
MOST_AT_ONCE = 1000


@late_dataclass(frozen=True)
class BudgetTerms:
    """How many bytes a second may go into one failure domain for updates.

    Attributes:
        scope: the label whose value names an agent's domain, such as `site`.
        at_once: among how many agents it is divided: each gets no more than its part of the whole, so that
            as many can download at one time.
    """

    scope: str
    bytes_per_s: int
    at_once: int = 1

    @property
    def part_bps(self) -> int:
        """The most that one agent is given."""
        return self.bytes_per_s // self.at_once

    def to_json(self) -> dict[str, Any]:
        return {"scope": self.scope, "bytes_per_s": self.bytes_per_s, "at_once": self.at_once}

    @classmethod
    def from_json(cls, budget: object, path: str = "budget") -> Self:
        get = Getter(budget, path)
        made = cls(
            get.text("scope", form=LABEL_KEY),
            get.integer("bytes_per_s", low=LEAST_SHARE_BPS, high=MOST_BPS),
            get.integer("at_once", 1, low=1, high=MOST_AT_ONCE),
        )
        if made.part_bps < LEAST_SHARE_BPS:
            raise get.refuse("at_once", f"fewer than {LEAST_SHARE_BPS} bytes a second would be left for each")
        return made


@late_dataclass(frozen=True)
class ShareRequest:
    """`POST /api/v1/share`, signed: how much of its domain's budget may this agent download with?

    Attributes:
        wants_bps: the host's own ceiling, 0 for none: more would be given in vain.
        done: nothing more is downloaded; the share is given back.
    """

    version: str
    wants_bps: int = 0
    done: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "version": self.version, "wants_bps": self.wants_bps, "done": self.done}

    @classmethod
    def from_json(cls, body: object, path: str = "share") -> Self:
        get = Getter(body, path)
        get.integer("schema", low=1, high=SCHEMA)
        return cls(get.text("version", form=VERSION), get.integer("wants_bps", 0), get.boolean("done", False))


@late_dataclass(frozen=True)
class ShareAnswer:
    """How many bytes a second, and for how many seconds from the request on, before somebody else has it.

    Of 0 bytes a second: why, and after how long to ask again.
    """

    rate_bps: int
    lasts_s: int = 0
    detail: str = ""
    again_s: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **vars(self)}

    @classmethod
    def from_json(cls, body: object, path: str = "share") -> Self:
        get = Getter(body, path)
        get.integer("schema", low=1, high=SCHEMA)
        return cls(
            rate_bps=get.integer("rate_bps", high=MOST_BPS),
            lasts_s=get.integer("lasts_s", 0, high=86_400),
            detail=get.text("detail", ""),
            again_s=get.integer("again_s", 0, high=86_400),
        )


@late_dataclass(frozen=True)
class LeaseRequest:
    """`POST /api/v1/lease`, signed: may this agent leave its version for another one now?"""

    version: str

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "version": self.version}

    @classmethod
    def from_json(cls, body: object, path: str = "lease") -> Self:
        get = Getter(body, path)
        get.integer("schema", low=1, high=SCHEMA)
        return cls(get.text("version", form=VERSION))


@late_dataclass(frozen=True)
class LeaseAnswer:
    """Whether it may; if not, why, and after how long to ask again."""

    granted: bool
    detail: str = ""
    again_s: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "granted": self.granted, "detail": self.detail, "again_s": self.again_s}

    @classmethod
    def from_json(cls, body: object, path: str = "lease") -> Self:
        get = Getter(body, path)
        get.integer("schema", low=1, high=SCHEMA)
        return cls(
            granted=get.boolean("granted"),
            detail=get.text("detail", ""),
            again_s=get.integer("again_s", 0, high=86_400),
        )


@late_dataclass(frozen=True)
class Directive:
    """The server's signed word to one cohort: which release, how far, when (design section 3).

    Attributes:
        release: the version that agents in progress should run, or None before any.
        base: the version that those outside the progress should run, or None before any.
        progress: basis points of the cohort, 0 to 10,000, that `release` is for.
        salt: new for each rollout; places each agent on its line.
        rollback: an older version may be installed.
        splay_s: an update begins at a random moment within so many seconds.
        poll_s, report_s: how often to poll and to report.
        retry_epoch: a higher one than a skip was written under lets that bundle be tried once more.
    """

    product: str
    cohort: str
    release: str | None
    base: str | None
    progress: int
    salt: str
    revision: int
    rollback: bool = False
    mode: Mode = Mode.ENABLED
    window: Window | None = None
    lease: LeaseTerms | None = None
    budget: BudgetTerms | None = None
    splay_s: int = 0
    poll_s: int = 60
    report_s: int = 300
    retry_epoch: int = 0

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "product": self.product,
            "cohort": self.cohort,
            "release": self.release,
            "base": self.base,
            "progress": self.progress,
            "salt": self.salt,
            "revision": self.revision,
            "rollback": self.rollback,
            "mode": str(self.mode),
            "window": self.window.to_json() if self.window else None,
            "lease": self.lease.to_json() if self.lease else None,
            "budget": self.budget.to_json() if self.budget else None,
            "splay_s": self.splay_s,
            "poll_s": self.poll_s,
            "report_s": self.report_s,
            "retry_epoch": self.retry_epoch,
        }

    @classmethod
    def from_json(cls, custom: object, path: str = "directive") -> Self:
        get = Getter(custom, path)
        get.integer("schema", low=1, high=SCHEMA)
        window, lease = get.object("window", None), get.object("lease", None)
        budget = get.object("budget", None)
        return cls(
            product=get.text("product", form=NAME),
            cohort=get.text("cohort", form=NAME),
            release=get.optional_text("release", form=VERSION),
            base=get.optional_text("base", form=VERSION),
            progress=get.integer("progress", high=PROGRESS_FULL),
            salt=get.text("salt"),
            revision=get.integer("revision"),
            rollback=get.boolean("rollback", False),
            mode=get.choice("mode", Mode, "enabled"),
            window=Window.from_json(window, f"{path}.window") if window is not None else None,
            lease=LeaseTerms.from_json(lease, f"{path}.lease") if lease is not None else None,
            budget=BudgetTerms.from_json(budget, f"{path}.budget") if budget is not None else None,
            splay_s=get.integer("splay_s", 0, high=7 * 86_400),
            poll_s=get.integer("poll_s", 60, low=1, high=86_400),
            report_s=get.integer("report_s", 300, low=1, high=86_400),
            retry_epoch=get.integer("retry_epoch", 0),
        )


# --- what agents and the API say -------------------------------------------------------------------------


@late_dataclass(frozen=True)
class EnrollRequest:
    """`POST /api/v1/enroll`, with an enrolment token as bearer.

    Attributes:
        name: what the host calls itself; becomes the agent id when it is free.
        public_key: raw ed25519, 64 hex digits; the private half never leaves the host.
    """

    product: str
    name: str
    public_key: str
    platform: str
    gate: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "product": self.product,
            "name": self.name,
            "public_key": self.public_key,
            "platform": self.platform,
            "gate": self.gate,
            "labels": dict(self.labels),
        }

    @classmethod
    def from_json(cls, body: object, path: str = "enroll") -> Self:
        get = Getter(body, path)
        get.integer("schema", low=1, high=SCHEMA)
        return cls(
            product=get.text("product", form=NAME),
            name=get.text("name", form=AGENT_ID),
            public_key=get.text("public_key", form=SHA256),
            platform=get.text("platform", form=PLATFORM),
            gate=get.text("gate", ""),
            labels=get.labels("labels"),
        )


@late_dataclass(frozen=True)
class EnrollAnswer:
    """Who the agent is from now on, and the cohort it starts in (None: no cohort matches yet).

    Attributes:
        pending: an operator has to accept it first; until then it has no cohort.
    """

    agent_id: str
    cohort: str | None
    pending: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "agent_id": self.agent_id,
            "cohort": self.cohort,
            "pending": self.pending,
        }

    @classmethod
    def from_json(cls, body: object, path: str = "enroll answer") -> Self:
        get = Getter(body, path)
        return cls(
            agent_id=get.text("agent_id", form=AGENT_ID),
            cohort=get.optional_text("cohort", form=NAME),
            pending=get.boolean("pending", False),
        )


@late_dataclass(frozen=True)
class Transition:
    """One step of one attempt, as the agent saw it.

    Attributes:
        number: the agent's own counter of transitions; the server takes each number once.
        at: when, as `clock.iso`; the agent's wall clock, for people.
        salt: the directive's, which names the rollout; empty when no rollout asked (operator, first install).
    """

    number: int
    at: str
    version: str
    digest: str
    salt: str
    state: AttemptState
    reason: str = ""
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "at": self.at,
            "version": self.version,
            "digest": self.digest,
            "salt": self.salt,
            "state": str(self.state),
            "reason": self.reason,
            "detail": self.detail,
        }

    @classmethod
    def from_json(cls, body: object, path: str = "transition") -> Self:
        get = Getter(body, path)
        return cls(
            number=get.integer("number", low=1),
            at=get.text("at"),
            version=get.text("version", form=VERSION),
            digest=get.text("digest", ""),
            salt=get.text("salt", ""),
            state=get.choice("state", AttemptState),
            reason=get.text("reason", ""),
            detail=get.text("detail", ""),
        )


def is_figure(value: object) -> bool:
    """A number that any store and any chart can take: Python's JSON also reads NaN and Infinity."""
    return type(value) in (int, float) and -MAX_FIGURE <= value <= MAX_FIGURE  # type: ignore[operator]


@late_dataclass(frozen=True)
class Report:
    """`POST /api/v1/report`: how an agent is, and what happened since the last one.

    Attributes:
        reason: of the agent's last decision, with `detail` in words.
        inventory: what the host is: `os`, `distro`, `arch`, `python`, `kernel`.
        figures: small numbers of the agent and its workload: `rss`, `cpu`, `uptime_s`, `restarts`, …
        transitions: oldest first; only a signed report may carry any.
    """

    agent_id: str
    product: str
    version: str
    digest: str
    phase: Phase
    platform: str
    reason: str = ""
    detail: str = ""
    held: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    inventory: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    transitions: tuple[Transition, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "agent_id": self.agent_id,
            "product": self.product,
            "version": self.version,
            "digest": self.digest,
            "phase": str(self.phase),
            "platform": self.platform,
            "reason": self.reason,
            "detail": self.detail,
            "held": self.held,
            "labels": dict(self.labels),
            "inventory": dict(self.inventory),
            "figures": dict(self.figures),
            "transitions": [transition.to_json() for transition in self.transitions],
        }

    @classmethod
    def from_json(cls, body: object, path: str = "report") -> Self:
        get = Getter(body, path)
        get.integer("schema", low=1, high=SCHEMA)
        figures = get.object("figures", {})
        if len(figures) > 64 or not all(is_figure(value) for value in figures.values()):
            raise get.refuse("figures", "it holds more than 64 entries or something that is no number")
        return cls(
            agent_id=get.text("agent_id", form=AGENT_ID),
            product=get.text("product", form=NAME),
            version=get.text("version", ""),
            digest=get.text("digest", ""),
            phase=get.choice("phase", Phase),
            platform=get.text("platform", form=PLATFORM),
            reason=get.text("reason", ""),
            detail=get.text("detail", ""),
            held=get.boolean("held", False),
            labels=get.labels("labels"),
            inventory=get.labels("inventory"),
            figures=figures,
            transitions=tuple(
                Transition.from_json(entry, f"{path}.transitions[{place}]")
                for place, entry in enumerate(get.items("transitions", [], most=MAX_TRANSITIONS))
            ),
        )


@late_dataclass(frozen=True)
class ReportAnswer:
    """What the server says to a report.

    Attributes:
        cohort: the agent's cohort, or None when none matches it.
        accepted: the highest transition number that is durable at the server.
        session: a new token for unsigned heartbeats, or None when the old one holds.
        session_s: seconds the session lasts.
        pending: an operator has not accepted this agent yet.
    """

    cohort: str | None
    accepted: int
    session: str | None = None
    session_s: int = 0
    pending: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "cohort": self.cohort,
            "accepted": self.accepted,
            "session": self.session,
            "session_s": self.session_s,
            "pending": self.pending,
        }

    @classmethod
    def from_json(cls, body: object, path: str = "report answer") -> Self:
        get = Getter(body, path)
        return cls(
            cohort=get.optional_text("cohort", form=NAME),
            accepted=get.integer("accepted"),
            session=get.optional_text("session"),
            session_s=get.integer("session_s", 0),
            pending=get.boolean("pending", False),
        )


def signed_text(method: str, path: str, body_sha256: str, counter: int) -> bytes:
    """What an agent's key signs of a request; the counter makes each signature good once."""
    return f"relfleet-1\n{method}\n{path}\n{body_sha256}\n{counter}\n".encode()


@late_dataclass(frozen=True)
class KeyChange:
    """`POST /api/v1/rotate-key`, signed like a report by the key that the server knows.

    Attributes:
        public_key: the new one, raw ed25519, 64 hex digits.
        proof: the new key's signature over `key_text`, 128 hex digits: nobody can name another's key.
    """

    public_key: str
    proof: str

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, "public_key": self.public_key, "proof": self.proof}

    @classmethod
    def from_json(cls, body: object, path: str = "key change") -> Self:
        get = Getter(body, path)
        get.integer("schema", low=1, high=SCHEMA)
        return cls(get.text("public_key", form=SHA256), get.text("proof", form=SIGNATURE))


def key_text(agent_id: str, public_key: str) -> bytes:
    """What the new key of a change signs."""
    return f"relfleet-key-1\n{agent_id}\n{public_key}\n".encode()


HEADER_AGENT = "Relfleet-Agent"
HEADER_COUNTER = "Relfleet-Counter"
HEADER_SIGNATURE = "Relfleet-Signature"


@late_dataclass(frozen=True)
class Problem:
    """An API error, RFC 9457 `application/problem+json`: `reason` is the code, `then` the next step."""

    status: int
    title: str
    detail: str = ""
    reason: str = "failed"
    then: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "type": f"urn:relfleet:problem:{self.reason}",
            "status": self.status,
            "title": self.title,
            "detail": self.detail,
            "reason": self.reason,
            "then": self.then,
        }

    @classmethod
    def from_json(cls, body: object, path: str = "problem") -> Self:
        get = Getter(body, path)
        return cls(
            status=get.integer("status", low=400, high=599),
            title=get.text("title"),
            detail=get.text("detail", ""),
            reason=get.text("reason", "failed"),
            then=get.text("then", ""),
        )


STOP_LENGTH = 16 * 1024
"""Bytes of a stop file that are read."""


def stop_for(product: str, body: bytes) -> str | None:
    """What a served stop file says to agents of a product, its reason; None where it is for others.

    One that cannot be read stops everybody.
    """
    try:
        get = Getter(json.loads(body or b"{}"), "stop")
        products, why = get.texts("products", []), get.text("reason", "")
    except (ValueError, RecursionError, MalformedError):
        return "its content cannot be read"
    return why[:200] if not products or product in products else None
