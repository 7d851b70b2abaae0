"""The settings with which this agent could run last: a slip in a file must not keep a host from its product.

What runs goes on with them, and says so; nothing new is installed before the file is mended, for nobody knows
what it was to forbid.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from agent_core.errors import RelfleetError, SettingsError
from agent_core.layout import read_json
from agent_core.settings import AGENT, AgentSettings, load_agent
from updater import notes

if TYPE_CHECKING:
    from pathlib import Path

    from agent_core.layout import Layout

PAIR = ("server.client_cert", "server.client_key")
"""Neither is of use without the other, and refused alone."""


def load(layout: Layout) -> AgentSettings:
    """The settings as they are set; where they cannot be used those of the last time, or the defaults."""
    with suppress(SettingsError):
        return load_agent(layout)
    with suppress(RelfleetError):
        kept = read_json(note(layout), {})
        return _made_of(kept if isinstance(kept, dict) else {})
    return _made_of({})


def keep(layout: Layout, settings: AgentSettings) -> None:
    """Remember settings that can be used; nothing is written when they are kept already."""
    values = dict(settings.settings.values)
    with suppress(RelfleetError):
        try:
            kept = read_json(note(layout))
        except RelfleetError:
            kept = None
        if kept != values:
            notes.write(note(layout), values, 0o600)  # a proxy's password may be among them


def note(layout: Layout) -> Path:
    return layout.state / "settings.json"


def _made_of(values: dict[str, Any]) -> AgentSettings:
    """What another version kept, less what this one does not know or refuses: one value costs no other."""
    known: dict[str, Any] = {}
    for name in values.keys() & {setting.name for setting in AGENT}:
        with suppress(SettingsError):
            known[name] = AGENT[name].accept(values[name], "kept")
    if not all(known.get(name) for name in PAIR):
        known = {name: value for name, value in known.items() if name not in PAIR}
    return AgentSettings.of(AGENT.load([], environ={}, flags=known))
