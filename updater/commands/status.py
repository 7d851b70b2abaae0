"""Commands that only look: what runs on this host, and which versions are here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console, slots
from agent_core.errors import RelfleetError
from agent_core.late import late_dataclass
from agent_core.layout import Layout
from agent_core.settings import AGENT, AgentSettings, load_agent
from updater import attempt as attempts
from updater import control
from updater import identity as identities
from updater.commands.common import need_root, own_root_option, sentence
from updater.device import Device

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from updater.decide import Hold


@click.command()
@own_root_option
def status(root: Path) -> None:
    """What runs, what is on trial, how the last check went."""
    host = look(root)
    console.emit(told(host), text=lambda: console.facts(_lines(host)))


@late_dataclass(frozen=True)
class Host:
    """What the two commands show, read once, from whatever can be read of a host at three in the morning.

    Attributes:
        record: None when nothing is installed, or when it is damaged: then `lost` is what the links say.
        problem: why the settings, or the record, cannot be read; empty when they can.
        doubt: what was read from a copy, and why; it keeps nothing from going on.
    """

    device: Device
    record: slots.Record | None
    lost: slots.Record | None
    problem: str
    now: datetime
    doubt: str = ""

    @property
    def is_up(self) -> bool:
        return control.is_running(self.device.layout)

    @property
    def failing(self) -> tuple[int, str]:
        """How many polls of the agent have failed in a row, and the last one's words; 0 when none runs.

        A poll that finds nothing new, or no server, is no check: the last of those may be fine.
        """
        failures, _ = control.recall_backoff(self.device.layout, 0.0)
        words = str(control.read_status(self.device.layout).get("poll", "")).partition("\n")[0]
        # An agent that has just begun counts on from the one before it, and has no words of its own yet.
        return (failures, words) if failures and ":" in words and self.is_up else (0, "")


def look(root: Path) -> Host:
    """Read this host.

    Raises:
        NotFoundError, MalformedError, DiskError: it is not enrolled, or its identity cannot be read.
    """
    layout, problem = Layout(root), ""
    identity, doubt = identities.load(layout), identities.damage(layout)
    try:
        settings = load_agent(layout)
    except RelfleetError as error:
        settings, problem = (
            AgentSettings.of(AGENT.load([], environ={})),
            str(error).replace("\n  next: ", "; next: "),
        )
    try:
        record = slots.read(root)
        lost = None if record else slots.by_links(root)
    except OSError as error:
        record, lost, problem = None, slots.by_links(root), f"state/slots cannot be read: {error}"
    return Host(Device(layout, settings, identity), record, lost, problem, clock.now(), doubt)


def told(host: Host) -> dict[str, Any]:
    """What `agent status --json` says."""
    from agent_core.archive import launcher_number  # it knows archives, which no help needs

    device, record = host.device, host.record
    outcome, hold = device.outcome(), device.hold()
    return {
        "agent_id": device.identity.agent_id,
        "product": device.identity.product,
        "cohort": device.identity.cohort,
        "server": device.server,
        "enrolled": device.identity.enrolled,
        "standing": device.identity.standing,
        "running": host.is_up,
        "good": record.good if record else None,
        "previous": record.previous if record else None,
        "candidate": (record.candidate or None) if record else None,
        "phase": record.phase if record else None,
        "boots_left": record.boots_left if record else None,
        "reason": record.reason if record else None,
        "skipped": [
            {"digest": entry[0], "reason": entry[1], "version": _version_of(device, entry[0])}
            for entry in (record.skip if record else ())
        ],
        "hold": _held(hold) if hold and hold.holds(host.now) else None,
        "launcher": launcher_number(device.layout.launcher_file),
        "last_check": outcome.to_json() if outcome else None,
        "failed_polls": host.failing[0],
        "news": control.read_status(device.layout),
        "problem": host.problem or host.doubt,
    }


def _held(hold: Hold) -> dict[str, Any]:
    return {"until": hold.until and clock.iso(hold.until), "reason": hold.reason}


def _version_of(device: Device, digest: str) -> str | None:
    """The version that a skipped bundle was, where its facts are still here."""
    for file in device.layout.state.glob(f"facts-*-{digest}.json"):
        return slots.version_of(file.name.removeprefix("facts-").removesuffix(".json"))
    last = attempts.load(device.attempt_file)
    return last.version if last and last.digest == digest else None


def _lines(host: Host) -> list[tuple[str, Any]]:
    found, record = told(host), host.record
    who = f"{found['agent_id']}, {found['product']}, cohort {found['cohort'] or '(none)'}"
    lines: list[tuple[str, Any]] = [
        ("agent", who),
        ("server", _server_line(found)),
        ("runs", _runs(host, found)),
    ]
    if record and record.phase == slots.TRIAL:
        boots = f"{record.boots_left} of {record.boots_max} boots left"
        lines.append(("on trial", f"{record.candidate}, {boots}; goes back to {record.good} if it fails"))
    elif record and record.phase == slots.ROLLBACK:
        lines.append(("going back", f"from {record.candidate} to {record.good}: {record.reason}"))
    if record and record.previous not in ("", record.good):
        lines.append(("before", record.previous))
    if record and record.phase == slots.IDLE and record.tried not in ("", record.good):
        lines.append(("left", f"{record.tried}: {record.reason}{_words_of(host, record.tried)}"))
    lines += [("skipped", _skipped(entry)) for entry in found["skipped"]]
    if found["hold"]:
        until = found["hold"]["until"] or "somebody types agent unhold"
        lines.append(("held", f"until {until}: {found['hold']['reason']}"))
    outcome = host.device.outcome()
    good = record.good if record else ""
    said = f"{ago(outcome.at, host.now)}  {sentence(outcome, good)}" if outcome else "never: agent once"
    lines.append(("last check", said))
    failures, words = host.failing
    if failures:
        rest = "" if outcome and outcome.failed else f"; {words}"
        lines.append(("polls", f"the last {failures} failed{rest}"))
    elif host.is_up and found["news"].get("poll") == control.NOTHING_NEW:
        lines.append(("polls", f"{control.NOTHING_NEW} since then"))
    lines.append(("launcher", found["launcher"] or "missing: agent upgrade-launcher"))
    news = found["news"] if host.is_up else {}
    lines += [(key, news[key]) for key in ("trial", "settings", "identity") if news.get(key)]
    lines += [("identity", host.doubt)] if host.doubt else []
    return [*lines, ("problem", host.problem)] if host.problem else lines


def _skipped(entry: dict[str, Any]) -> str:
    return f"{entry['version'] or '(unknown)'}-{entry['digest']}: {entry['reason']}; agent retry forgets it"


def _server_line(found: dict[str, Any]) -> str:
    known = "" if found["enrolled"] else "  (this host is unknown to it: agent enroll)"
    if found["standing"]:
        known = f"  ({found['standing']}: agent why)"
    return f"{found['server']}{known}"


def _runs(host: Host, found: dict[str, Any]) -> str:
    if host.lost is not None:
        return f"{host.lost.good}, by its link: the record is damaged, and written anew at the next start"
    if host.record is None:
        return "nothing yet: agent once, or agent install FILE"
    name = (host.record.candidate if found["news"].get("version") == host.record.candidate else "") or found[
        "good"
    ]
    if not slots.is_complete(host.device.layout.root, found["good"]):
        name += "  (it is damaged: agent doctor)"
    return name if found["running"] else f"{name}  (no agent runs: agent run, or the unit)"


def _words_of(host: Host, name: str) -> str:
    """What was said about the end of an attempt, beside its code."""
    last = attempts.load(host.device.attempt_file)
    return f" ({last.detail})" if last and last.name == name and last.detail else ""


def ago(moment: str, now: datetime) -> str:
    try:
        age_s = (now - clock.parse_iso(moment)).total_seconds()
    except ValueError:
        return moment
    if age_s < 0:
        return f"{moment} (ahead of this clock)"
    for unit_s, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if age_s >= 2 * unit_s:
            return f"{moment} ({age_s // unit_s:.0f} {unit} ago)"
    return f"{moment} ({age_s:.0f} s ago)"


@click.command()
@own_root_option
def versions(root: Path) -> None:
    """Versions on this host."""
    layout = need_root(root)
    record = slots.read(root)
    found = []
    for directory in sorted(layout.versions.iterdir()) if layout.versions.is_dir() else []:
        name = directory.name
        found.append(
            {
                "version": slots.version_of(name),
                "digest": slots.digest_of(name),
                "role": _role(record, name),
                "whole": slots.is_complete(root, name),
            }
        )
    console.emit(found, text=lambda: console.as_text(found) if found else "no version is installed")


def _role(record: slots.Record | None, name: str) -> str:
    if record is None:
        return ""
    roles = {record.candidate: "on trial", record.previous: "before", record.good: "good"}
    return roles.get(name, "skipped" if slots.skips(record, slots.digest_of(name)) else "")
