"""Commands that find out what is wrong on this host: a list of findings, and a file to send."""

from __future__ import annotations

from pathlib import Path

import click

from agent_core import clock, console
from agent_core.errors import Exit
from updater.commands.common import root_option


@click.command()
@root_option
def doctor(root: Path) -> int:
    """Look at everything the agent needs; each check is fine, or says what to do. Changes nothing."""
    from agent_core.findings import State
    from updater.doctor import examine

    findings = examine(root, clock.now())
    console.emit(findings, text=lambda: "\n".join(finding.line() for finding in findings))
    return Exit.FAILED if any(finding.state is State.BAD for finding in findings) else Exit.DONE


@click.command()
@root_option
@click.option(
    "-o", "--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The zip to write."
)
def diagnostics(root: Path, out: Path) -> None:
    """Put what helps to find a fault into one zip: states, findings, settings, the ends of logs.

    Secrets are taken out: keys, tokens, sessions, passwords of proxies. Look through it before you send it.
    """
    from updater.diagnostics import write

    parts = write(root, out.absolute())
    console.emit({"file": str(out), "parts": parts, "length": out.stat().st_size}, text=str(out))
