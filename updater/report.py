"""What this agent tells the server, and what it learns from the answer: its cohort and a session."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agent_core import clock, slots
from agent_core import layout as durable
from agent_core.errors import NotAllowedError, NotFoundError, RelfleetError
from agent_core.spool import Spool
from agent_core.wire import (
    MAX_TRANSITIONS,
    Getter,
    Phase,
    Reason,
    Report,
    ReportAnswer,
    Transition,
)
from updater import attempt as attempts
from updater import identity as identities
from updater import notes, server
from updater.inventory import inventory

if TYPE_CHECKING:
    from collections.abc import Mapping

    from updater.attempt import Attempt
    from updater.device import Device

SESSION_MARGIN_S = 60


def build(
    device: Device, *, figures: Mapping[str, float] | None = None, transitions: tuple[Transition, ...] = ()
) -> Report:
    """How this agent is now, by its record, its last check and its attempt in progress.

    Raises:
        NotFoundError: it does not know who it is, so nobody would be told anything by it.
    """
    if device.identity == identities.NOBODY:
        raise NotFoundError("nothing is reported", why="this host cannot tell who it is", then="agent doctor")
    record = slots.read(device.layout.root)
    good = record.good if record else ""
    outcome = device.outcome()
    return Report(
        agent_id=device.identity.agent_id,
        product=device.identity.product,
        version=slots.version_of(good),
        digest=slots.digest_of(good),
        phase=_phase(record, attempts.load(device.attempt_file)),
        platform=device.identity.platform,
        reason=outcome.reason if outcome else "",
        detail=outcome.detail[:500] if outcome else "",
        held=bool((hold := device.hold()) and hold.holds(clock.now())),
        labels=device.labels,
        inventory=inventory(),
        figures=dict(figures or {}),
        transitions=transitions,
    )


def _phase(record: slots.Record | None, attempt: Attempt | None) -> Phase:
    if record is not None and record.phase != slots.IDLE:
        return Phase(record.phase)
    if attempt is not None and attempt.state in attempts.BEFORE_TRIAL:
        return Phase(str(attempt.state))
    return Phase.IDLE


def send_signed(device: Device, *, figures: Mapping[str, float] | None = None) -> tuple[Device, ReportAnswer]:
    """Report under the host's key, transitions included, until the spool is empty.

    Returns:
        The device with the cohort that the server said, and its last answer.

    Raises:
        RelfleetError: as of `server.report_signed`; what was accepted before stays accepted.
    """
    transport = device.transport()
    with Spool(device.layout.spool) as spool:
        while True:
            pending = tuple(spool.pending(MAX_TRANSITIONS))
            report = build(device, figures=figures, transitions=pending)
            try:
                answer = server.report_signed(transport, device.identity, device.layout, report)
            except NotAllowedError as error:
                if (
                    error.reason == Reason.RETIRED
                ):  # kept, so that people here are told, and nothing new comes
                    _become(device, None, str(Reason.RETIRED))
                raise
            spool.accepted(answer.accepted)
            device = learn(device, answer)
            if not pending or not spool.pending(1):
                return device, answer


def send_heartbeat(device: Device, session: str, figures: Mapping[str, float]) -> tuple[Device, ReportAnswer]:
    """Report without transitions under a session; standard library only. Errors as of `report_session`."""
    answer = server.report_session(device.transport(), session, build(device, figures=figures))
    return learn(device, answer), answer


def learn(device: Device, answer: ReportAnswer) -> Device:
    """Keep what the answer says: the cohort, and a session when there is a new one."""
    if answer.session:
        until_s = clock.now().timestamp() + answer.session_s - SESSION_MARGIN_S
        note = {"session": answer.session, "until_s": int(until_s)}
        notes.write(device.session_file, note, 0o600)
    return _become(device, answer.cohort, str(Reason.PENDING) if answer.pending else "")


def _become(device: Device, cohort: str | None, standing: str) -> Device:
    if (cohort, standing) == (device.identity.cohort, device.identity.standing):
        return device
    identity = replace(device.identity, cohort=cohort, standing=standing)
    identities.save(device.layout, identity)
    return replace(device, identity=identity)


def has_news(device: Device) -> bool:
    """Whether the server has something to hear that only a signed report may carry, or may answer."""
    with Spool(device.layout.spool) as spool:
        return bool(spool.pending(1)) or session(device) is None


def session(device: Device) -> str | None:
    """The session token while it lasts; None when a signed report has to buy one."""
    try:
        note: Any = durable.read_json(device.session_file)
        if note is None:
            return None
        get = Getter(note, "session")
        return get.text("session") if get.integer("until_s") > clock.now().timestamp() else None
    except RelfleetError:
        return None


def record_transition(device: Device, spool: Spool, attempt: Attempt) -> None:
    """Make one step of the attempt durable: first its number in the spool, then the note of it."""
    spool.add_transition(
        clock.now(),
        version=attempt.version,
        digest=attempt.digest,
        salt=attempt.salt,
        state=attempt.state,
        reason=attempt.reason,
        detail=attempt.detail,
    )
    attempts.save(device.attempt_file, attempt)
