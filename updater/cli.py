"""The `agent` command: what the operator types on a host."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_core import console

if TYPE_CHECKING:
    from collections.abc import Sequence

WHERE = "updater.commands."

COMMANDS = {
    "enroll": (WHERE + "enroll:enroll", "Make this host an agent: identity, trust, first version."),
    "run": (WHERE + "enroll:run", "Run the agent; installs the first version if there is none."),
    "rotate-key": (WHERE + "enroll:rotate_key", "Give this host another key."),
    "once": (WHERE + "once:once", "Look for an update now."),
    "install": (WHERE + "install:install_file", "Install a release from a file, offline."),
    "status": (WHERE + "status:status", "What runs, what is on trial, how the last check went."),
    "why": (WHERE + "why:why", "Why this host does, or does not, update."),
    "rollback": (WHERE + "steer:rollback", "Go back to the version before."),
    "retry": (WHERE + "steer:retry", "Let bundles that failed here be tried once more."),
    "hold": (WHERE + "steer:hold", "Take nothing new."),
    "unhold": (WHERE + "steer:unhold", "End a hold."),
    "versions": (WHERE + "status:versions", "Versions on this host."),
    "install-service": (WHERE + "service:install_service", "Run the agent under systemd."),
    "uninstall-service": (WHERE + "service:uninstall_service", "Take the agent's unit away."),
    "doctor": (WHERE + "doctor:doctor", "Look at everything the agent needs."),
    "diagnostics": (
        WHERE + "doctor:diagnostics",
        "Put what helps to find a fault into a file.",
    ),
    "upgrade-launcher": (WHERE + "launcher:upgrade_launcher", "Replace the launcher by this agent's own."),
    "config": (WHERE + "config:config", "Check or show the settings."),
}

cli = console.LazyGroup(
    "agent",
    lazy=COMMANDS,
    help="Keeps one host up to date by itself: pulls signed releases, tries them, goes back when they fail.",
    params=[console.version_option("agent")],
)
cli.add_command(console.completion)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (see `docs/cli.md`)."""
    return console.run(cli, "agent", argv)
