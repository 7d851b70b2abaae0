"""The `agent` command: what the operator types on a host, and what the agent runs of itself."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from agent_core import console

if TYPE_CHECKING:
    from collections.abc import Sequence

    import click

WHERE = "updater.commands:"

COMMANDS = {
    "enroll": (WHERE + "enroll", "Make this host an agent: identity, trust, first version."),
    "run": (WHERE + "run", "Run the agent; installs the first version if there is none."),
    "once": (WHERE + "once", "Look for an update now."),
    "status": (WHERE + "status", "What runs, what is on trial, how the last check went."),
    "why": (WHERE + "why", "Why this host does, or does not, update."),
    "rollback": (WHERE + "rollback", "Go back to the version before."),
    "retry": (WHERE + "retry", "Let bundles that failed here be tried once more."),
    "hold": (WHERE + "hold", "Take nothing new."),
    "unhold": (WHERE + "unhold", "End a hold."),
    "versions": (WHERE + "versions", "Versions on this host."),
    "config": (WHERE + "config", "Check or show the settings."),
}

# What the agent runs of itself; the JSON they print is for it, not for people.
INTERNAL = {
    "check": "updater.internal:check",
    "report": "updater.internal:report_now",
    "preflight": "updater.internal:preflight",
}


class _Agent(console.LazyGroup):
    """The command group, with the internal commands that no help shows."""

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in INTERNAL and cmd_name not in self.commands:
            self.lazy[cmd_name] = console.Lazy(INTERNAL[cmd_name], "")
            command = super().get_command(ctx, cmd_name)
            del self.lazy[cmd_name]
            return command
        return super().get_command(ctx, cmd_name)


cli = _Agent(
    "agent",
    lazy=COMMANDS,
    help="Keeps one host up to date by itself: pulls signed releases, tries them, goes back when they fail.",
    params=[console.version_option("agent")],
)
cli.add_command(console.completion)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (see `docs/cli.md`)."""
    return console.run(cli, "agent", argv)


if __name__ == "__main__":
    sys.exit(main())
