"""What the resident agent runs of itself, each a process that prints one JSON object and ends."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import click

from agent_core.bundle import INDEX_NAME, Index
from agent_core.errors import Exit, TrustError
from agent_core.telemetry import setup_logging
from updater import poll, report
from updater.device import Device

ROOT = click.option("--root", type=click.Path(path_type=Path, file_okay=False), required=True)


@click.command("check", hidden=True)
@ROOT
def check(root: Path) -> None:
    """Find out what this host should run and stage it; prints the outcome."""
    device = _begin(root)
    _answer(poll.check(device).to_json())


@click.command("report", hidden=True)
@ROOT
def report_now(root: Path) -> None:
    """Report under the host's key; the figures come on stdin."""
    device = _begin(root)
    figures = json.loads(sys.stdin.buffer.read(65_536) or b"{}")
    _, answer = report.send_signed(device, figures=figures)
    _answer({"cohort": answer.cohort, "accepted": answer.accepted})


@click.command("preflight", hidden=True)
@ROOT
def preflight(root: Path) -> int:
    """Show, before anything is switched, that this version imports itself and reads what it will find."""
    from tuf.api.metadata import Metadata

    from agent_core import slots

    logging.disable(logging.CRITICAL)
    version_dir = Path(__file__).resolve().parents[2]
    index = Index.from_bytes((version_dir / INDEX_NAME).read_bytes())
    device = Device.load(root)
    record = slots.read(root)
    for file in device.layout.tuf.glob("*.json"):
        Metadata.from_bytes(file.read_bytes())
    if record is not None and record.good and not slots.is_complete(root, record.good):
        raise TrustError("the version to go back to is not whole", why=record.good)
    _answer({"ok": True, "version": index.version, "product": index.product})
    return Exit.DONE


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")


def _begin(root: Path) -> Device:
    device = Device.load(root)
    setup_logging(level=device.settings.log_level)
    return device
