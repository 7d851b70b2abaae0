"""The command that replaces the launcher, the one program that no release replaces."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from agent_core import console
from updater import launchers
from updater.commands.common import need_root, own_root_option

if TYPE_CHECKING:
    from pathlib import Path


@click.command("upgrade-launcher")
@own_root_option
@click.option("--back", is_flag=True, help="Return to the launcher before this one.")
def upgrade_launcher(root: Path, back: bool) -> None:
    """Replace the launcher of this host by the one that this agent brings.

    The new one proves itself first, on a copy of the record; the old one is kept. What runs is not touched:
    the new launcher works from its next start on.
    """
    layout = need_root(root)
    change = launchers.go_back(layout) if back else launchers.upgrade(layout)
    if change.changed:
        was = "none" if change.before is None else change.before
        text = f"launcher {change.after} is in place (it was {was}); it works from its next start on"
    else:
        text = f"launcher {change.after} is in place already"
    console.emit({**asdict(change), "file": str(layout.launcher_file)}, text=text)
