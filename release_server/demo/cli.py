"""`relfleet`: the demo, and the three commands of the project under one name."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from agent_core import console

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMANDS = {
    "demo": (
        "release_server.demo.story:demo",
        "A real fleet here: one good release and one bad one.",
    ),
    "release": ("release_server.publish.cli:release", "Publish releases; steer cohorts and rollouts."),
    "server": ("release_server.cli:cli", "Run the release server."),
    "agent": ("updater.cli:cli", "Keep one host up to date."),
}

cli = console.LazyGroup(
    "relfleet",
    lazy=COMMANDS,
    help="Keeps fleets of agents up to date by themselves.",
    params=[console.version_option("relfleet")],
)
cli.add_command(console.completion)


@cli.command("version")
def version() -> None:
    """Show the version."""
    console.emit({"version": console.version()}, text=f"relfleet {console.version()}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code (see `docs/cli.md`)."""
    return console.run(cli, "relfleet", argv)


if __name__ == "__main__":
    sys.exit(main())
