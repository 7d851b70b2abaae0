"""What the commands of `agent` share: the root, a bar, and one line for an outcome."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent_core import console
from updater.decide import Action

if TYPE_CHECKING:
    from collections.abc import Callable

    from updater.device import Outcome

DEFAULT_ROOT = "/var/lib/relfleet"

root_option = click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, resolve_path=True),
    envvar="RELFLEET_ROOT",
    default=DEFAULT_ROOT,
    show_default=True,
    help="The device's directory.",
)


def progress_bar() -> Callable[[int, int], None] | None:
    """A progress line on a terminal; nothing elsewhere."""
    if not sys.stderr.isatty() or console.options().quiet:
        return None
    last = [-1]

    def show(received: int, length: int) -> None:
        percent = received * 100 // max(length, 1)
        if percent != last[0]:
            last[0] = percent
            filled = "#" * (percent * 30 // 100)
            ending = "\n" if received >= length else ""
            click.echo(f"\rdownload [{filled:<30}] {percent:3d} %{ending}", err=True, nl=False)

    return show


def sentence(outcome: Outcome) -> str:
    """One line that says what a check came to."""
    if outcome.candidate:
        return f"{outcome.version} is verified and staged ({outcome.reason})"
    word = {Action.STAY: "nothing to do", Action.REFUSE: "refused", Action.INSTALL: "to be installed"}
    verb = "failed" if outcome.failed and not outcome.verified else word[outcome.action]
    return f"{verb} ({outcome.reason}): {outcome.detail}".rstrip(": ")
