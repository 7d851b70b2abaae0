"""Commands that show and check the settings of this host."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent_core import console
from agent_core.layout import Layout
from agent_core.settings import AGENT, fragments, load_agent
from updater.commands.common import root_option

if TYPE_CHECKING:
    from pathlib import Path


@click.group()
def config() -> None:
    """Check or show the settings of this host."""


@config.command("show")
@root_option
def config_show(root: Path) -> None:
    """Each setting, its value and where it came from."""
    settings = load_agent(Layout(root)).settings
    rows = [{"setting": name, "value": value, "from": origin} for name, value, origin in settings.show()]
    console.emit(rows)


@config.command("check")
@root_option
def config_check(root: Path) -> None:
    """Say whether the settings can be used."""
    layout = Layout(root)
    load_agent(layout)
    files = [str(file) for file in (layout.settings, *fragments(layout.settings_dir)) if file.exists()]
    said = f"can be used ({len(list(AGENT))} known)" if files else "are the defaults: no file sets any"
    console.emit({"ok": True, "files": files}, text=f"the settings of {root} {said}")
