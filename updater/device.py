"""One device as the updater sees it: where things lie, what is set, who it is; and the small notes it keeps.

Each note is one file under `state/` with one writer: the checker writes what it found out, the resident agent
what it did about it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from agent_core import disk, slots
from agent_core import layout as durable
from agent_core.clock import iso, now, parse_iso
from agent_core.errors import MalformedError, NotFoundError, RelfleetError, UnreachableError
from agent_core.late import late_dataclass
from agent_core.layout import Layout
from agent_core.settings import AgentSettings, load_agent
from agent_core.wire import Directive, Getter, Reason, ReleaseFacts
from updater import identity as identities
from updater import last_good, notes
from updater.decide import Action, Hold, Running

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from updater.identity import Identity
    from updater.transport import Transport


class Note(Protocol):
    """Something kept in a file of its own."""

    @classmethod
    def from_json(cls, body: object, path: str = ...) -> Self: ...


N = TypeVar("N", bound=Note)


@late_dataclass(frozen=True)
class Outcome:
    """What one check came to; the resident acts on it, `status` and `why` show it, the report names it.

    Attributes:
        failed: the check itself did not get to its end; it is tried again after a backoff.
        verified: this process fetched and verified the manifest.
        candidate: the staged version to activate; empty unless `action` is install.
        again: when to look again even if nothing changes on the server.
    """

    action: Action
    reason: str
    detail: str
    at: str
    verified: bool = False
    failed: bool = False
    version: str = ""
    candidate: str = ""
    boots: int = 0
    deadman_s: int = 0
    retry_epoch: int = 0
    floor: int = 0
    again: str | None = None
    retry_after_s: float | None = None

    @classmethod
    def of_failure(
        cls, error: Exception, *, reason: str = Reason.INTERNAL, detail: str = "", verified: bool = False
    ) -> Self:
        """The outcome of a check that could not be done.

        Args:
            reason: of an error that has none of its own.
            detail: in the place of the error's own words.
            verified: the metadata were, before it failed.
        """
        return cls(
            action=Action.REFUSE,
            reason=str(error.reason if isinstance(error, RelfleetError) else reason),
            detail=(detail or str(error))[:1000],
            at=iso(now()),
            verified=verified,
            failed=True,
            retry_after_s=error.retry_after_s if isinstance(error, UnreachableError) else None,
        )

    def to_json(self) -> dict[str, Any]:
        return {name: str(value) if name == "action" else value for name, value in vars(self).items()}

    @classmethod
    def from_json(cls, body: object, path: str = "outcome") -> Self:
        get = Getter(body, path)
        again = get.optional_text("again")
        return cls(
            action=get.choice("action", Action),
            reason=get.text("reason"),
            detail=get.text("detail"),
            at=_moment(get, get.text("at")),
            verified=get.boolean("verified"),
            failed=get.boolean("failed"),
            version=get.text("version"),
            candidate=get.text("candidate"),
            boots=get.integer("boots"),
            deadman_s=get.integer("deadman_s"),
            retry_epoch=get.integer("retry_epoch"),
            floor=get.integer("floor"),
            again=again if again is None else _moment(get, again),
            retry_after_s=get.number("retry_after_s", None),
        )


@late_dataclass(frozen=True)
class Seen:
    """The directive as last verified, and when this revision of it was first seen here."""

    directive: Directive
    since: datetime

    def to_json(self) -> dict[str, Any]:
        return {"directive": self.directive.to_json(), "since": iso(self.since)}

    @classmethod
    def from_json(cls, body: object, path: str = "directive") -> Self:
        get = Getter(body, path)
        return cls(Directive.from_json(get.object("directive"), path), parse_iso(get.text("since")))


@late_dataclass(frozen=True)
class Device:
    """A device that is enrolled.

    Attributes:
        settings: as of when the process began, or as reloaded.
        identity: with the cohort as the server last said.
    """

    layout: Layout
    settings: AgentSettings
    identity: Identity

    @classmethod
    def load(cls, root: Path) -> Self:
        """Read settings and identity.

        Raises:
            NotFoundError: the host is not enrolled.
            SettingsError, MalformedError, DiskError: a file cannot be used.
        """
        layout = Layout(root)
        return cls(layout, load_agent(layout), identities.load(layout))

    @classmethod
    def load_anyway(cls, root: Path) -> Self:
        """The same, whatever stands in these files: for what has to go on, and installs nothing.

        Raises:
            NotFoundError: as of `load`.
        """
        layout = Layout(root)
        return cls(layout, last_good.load(layout), identities.load_anyway(layout))

    @classmethod
    def load_running(cls, root: Path) -> Self:
        """The same for the agent itself: with a version installed, `NOBODY` also where nothing is enrolled.

        A host whose `state/` was lost runs what it has; a person still has to say who it is.

        Raises:
            NotFoundError: as of `load`, and no version is installed.
        """
        try:
            return cls.load_anyway(root)
        except NotFoundError:
            if slots.believed(root) is None:
                raise
        layout = Layout(root)
        return cls(layout, last_good.load(layout), identities.NOBODY)

    @property
    def server(self) -> str:
        return self.settings.server_url or self.identity.server

    @property
    def labels(self) -> dict[str, str]:
        return {**self.identity.labels, **self.settings.labels}

    def transport(self) -> Transport:
        return connect(self.server, self.settings)

    # --- notes -----------------------------------------------------------------------------------------

    @property
    def attempt_file(self) -> Path:
        return self.layout.state / "attempt.json"

    @property
    def outcome_file(self) -> Path:
        return self.layout.state / "outcome.json"

    @property
    def session_file(self) -> Path:
        return self.layout.state / "session.json"

    def outcome(self) -> Outcome | None:
        return _read(self.outcome_file, Outcome)

    def remember_outcome(self, outcome: Outcome) -> None:
        notes.write(self.outcome_file, outcome.to_json())

    def seen(self) -> Seen | None:
        return _read(self.layout.state / "directive.json", Seen)

    def see(self, directive: Directive, now: datetime) -> Seen:
        """Remember a verified directive; the moment it was first seen stays while it says the same.

        A moment that is still to come was another clock's, and would put a splay off until then.
        """
        before = self.seen()
        if before and before.directive == directive and before.since <= now:
            return before
        seen = Seen(directive, now)
        notes.write(self.layout.state / "directive.json", notes.sealed(seen.to_json()))
        return seen

    # --- versions --------------------------------------------------------------------------------------

    def running(self) -> Running | None:
        """What the record calls good; None before the first install."""
        record = slots.read(self.layout.root)
        if record is None or not record.good:
            return None
        facts = self.facts(record.good)
        return Running(slots.version_of(record.good), slots.digest_of(record.good), facts.seq if facts else 0)

    def facts(self, name: str) -> ReleaseFacts | None:
        """The signed facts of a version that was staged here; None when they were not kept."""
        return _read(self.facts_file(name), ReleaseFacts)

    def keep_facts(self, name: str, facts: ReleaseFacts) -> None:
        notes.write(self.facts_file(name), notes.sealed(facts.to_json()))

    def facts_file(self, name: str) -> Path:
        return self.layout.state / f"facts-{name}.json"

    def forget_facts(self) -> None:
        """Remove the facts of versions that are not there any more, also of those that a cut left behind."""
        there = {self.facts_file(name).name for name in disk.listdir(self.layout.versions)}
        for name in disk.listdir(self.layout.state):
            if name.startswith("facts-") and name not in there:
                notes.forget(self.layout.state / name)

    # --- hold ------------------------------------------------------------------------------------------

    def hold(self) -> Hold | None:
        """The operator's hold. A hold file that cannot be read holds: somebody wanted the host left alone."""
        try:
            body = durable.read_json(self.layout.hold)
            if body is None:
                return None
            get = Getter(body, "hold")
            until = get.optional_text("until")
            return Hold(parse_iso(until) if until else None, get.text("reason", ""))
        except (RelfleetError, ValueError):
            return Hold(None, f"{self.layout.hold} cannot be read")

    def set_hold(self, hold: Hold) -> None:
        until = iso(hold.until) if hold.until else None
        durable.write_json(self.layout.hold, {"until": until, "reason": hold.reason})


def connect(server: str, settings: AgentSettings) -> Transport:
    """The way to a server, with the authorities, certificate and proxy that the settings name."""
    from updater.transport import Transport  # TLS and HTTP: most commands ask no server

    pair = (settings.server_client_cert, settings.server_client_key)
    return Transport(
        server,
        ca_file=settings.server_ca_file or None,
        client_cert=pair if all(pair) else None,
        proxies=_proxies(settings),
        timeout_s=settings.server_timeout_s,
    )


def _proxies(settings: AgentSettings) -> dict[str, str]:
    """The proxy and the hosts reached without it: each as set, else as the environment says."""
    from updater.transport import environment

    found = environment()
    if settings.server_proxy:
        found |= {"http": settings.server_proxy, "https": settings.server_proxy}
    if settings.server_no_proxy:
        found["no_proxy"] = ",".join(settings.server_no_proxy)
    return found


def skip_reason(record: slots.Record | None, digest: str, retry_epoch: int) -> str | None:
    """Why this bundle is skipped here, or None when it is not."""
    if record is None or not slots.skips(record, digest, retry_epoch):
        return None
    return next((entry[1] for entry in record.skip if entry[0] == digest[:12]), Reason.SKIPPED)


def _moment(get: Getter, text: str) -> str:
    """The text of a time, which may be relied on to be one."""
    try:
        parse_iso(text)
    except ValueError:
        raise MalformedError(f"{get.path} is not acceptable", why=f"{text[:40]!r} is no time") from None
    return text


def _read(file: Path, kind: type[N]) -> N | None:
    """A note, or None when there is none that can be read: every note can be found out again."""
    try:
        body = durable.read_json(file)
        return kind.from_json(notes.unsealed(body, file.name), file.name) if body is not None else None
    except (RelfleetError, ValueError):
        return None
