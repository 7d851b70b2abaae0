"""Commands that only look: what runs on this host, why, and which versions are here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from agent_core import clock, console, slots
from agent_core.layout import Layout
from updater import control
from updater.commands.common import root_option, sentence
from updater.decide import Action
from updater.device import Device

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@root_option
def status(root: Path) -> None:
    """What runs, what is on trial, how the last check went."""
    device = Device.load(root)
    console.emit(_status(device), text=lambda: console.facts(_status_lines(device)))


def _status(device: Device) -> dict[str, Any]:
    record = slots.read(device.layout.root)
    news = control.read_status(device.layout)
    outcome, hold = device.outcome(), device.hold()
    return {
        "agent_id": device.identity.agent_id,
        "product": device.identity.product,
        "cohort": device.identity.cohort,
        "server": device.server,
        "running": bool(news) and control.is_running(device.layout),
        "good": record.good if record else None,
        "previous": record.previous if record else None,
        "candidate": (record.candidate or None) if record else None,
        "phase": record.phase if record else None,
        "boots_left": record.boots_left if record else None,
        "reason": record.reason if record else None,
        "skipped": [{"digest": entry[0], "reason": entry[1]} for entry in record.skip] if record else [],
        "hold": {"until": hold.until and clock.iso(hold.until), "reason": hold.reason} if hold else None,
        "last_check": outcome.to_json() if outcome else None,
        "news": news,
    }


def _status_lines(device: Device) -> list[tuple[str, Any]]:
    found = _status(device)
    outcome, news = device.outcome(), found["news"]
    lines: list[tuple[str, Any]] = [
        ("agent", f"{found['agent_id']}, cohort {found['cohort'] or '(none)'}, {found['server']}"),
        ("runs", f"{found['good'] or 'nothing yet'}{'' if found['running'] else '  (the agent is stopped)'}"),
    ]
    if found["candidate"]:
        lines.append(("on trial", f"{found['candidate']}, {found['boots_left']} boots left"))
    if found["previous"] and found["previous"] != found["good"]:
        lines.append(("before", found["previous"]))
    lines += [("skipped", f"{entry['digest']}  {entry['reason']}") for entry in found["skipped"]]
    if found["hold"]:
        lines.append(("held", f"{found['hold']['reason']} (until {found['hold']['until'] or 'unhold'})"))
    lines.append(("last check", f"{outcome.at}  {sentence(outcome)}" if outcome else "never"))
    lines += [(key, news[key]) for key in ("trial", "settings") if news.get(key)]
    return lines


@click.command()
@root_option
def why(root: Path) -> None:
    """Why this host does, or does not, update."""
    device = Device.load(root)
    chain = _chain(device)
    record = slots.read(device.layout.root)
    running = slots.version_of(record.good) if record else "nothing yet"
    summary = f"{device.identity.agent_id} runs {running}"
    rows = "\n".join(f"  {'ok' if link['ok'] else 'no'}  {link['text']}" for link in chain)
    console.emit({"summary": summary, "chain": chain}, text=f"{summary}\n{rows}")


def _chain(device: Device) -> list[dict[str, Any]]:
    """What had to be so for an update, in order; the last link is the decision."""
    outcome, hold = device.outcome(), device.hold()
    links = [(device.identity.cohort is not None, "cohort", f"cohort {device.identity.cohort or 'none'}")]
    if outcome is None:
        return [_link(*link) for link in [*links, (False, "unchecked", "no check was done yet: agent once")]]
    links.append((outcome.verified, "verified", f"manifest checked at {outcome.at}"))
    if hold:
        links.append((not hold.holds(clock.now()), "held", f"hold: {hold.reason}"))
    moves = outcome.action is Action.INSTALL or outcome.reason == "up-to-date"
    links.append((moves, outcome.reason, sentence(outcome)))
    return [_link(*link) for link in links]


def _link(ok: bool, code: str, text: str) -> dict[str, Any]:
    return {"ok": ok, "code": code, "text": text}


@click.command()
@root_option
def versions(root: Path) -> None:
    """Versions on this host."""
    layout = Layout(root)
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
