"""`release`: the command of release managers and operators. Importing this loads click and nothing heavy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from agent_core import console
from agent_core.leaving import leave
from release_server.publish.profile import server_options

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = "release_server.publish.commands"
COMMANDS = {
    "init": (f"{HERE}.release:init", "Write relfleet.toml for a product."),
    "login": (f"{HERE}.release:login", "Sign in to a server and keep it as a profile."),
    "logout": (f"{HERE}.release:logout", "Forget a profile and its token."),
    "whoami": (f"{HERE}.release:whoami", "Say who the server takes you for."),
    "key": (f"{HERE}.key:key", "Make and show the keys that say what may run."),
    "build": (f"{HERE}.release:build", "Make a bundle of a product's source."),
    "sign": (f"{HERE}.sign:sign", "Sign a release where there is no network."),
    "verify": (f"{HERE}.release:verify", "Check a bundle as a device would; needs no server."),
    "push": (f"{HERE}.release:push", "Sign, upload and publish a release."),
    "approve": (f"{HERE}.trust:approve", "Verify what somebody else proposes, and sign it."),
    "withdraw": (f"{HERE}.trust:withdraw", "Take back what waits for signatures."),
    "renew": (f"{HERE}.trust:renew", "Sign the targets anew, without a new release."),
    "policy": (f"{HERE}.trust:policy", "Say which releases must never be installed."),
    "yank": (f"{HERE}.trust:yank", "Stop offering a release."),
    "export": (f"{HERE}.export:export", "Put a release into a file, for hosts out of reach."),
    "list": (f"{HERE}.release:list_releases", "List releases, and what waits for signatures."),
    "show": (f"{HERE}.release:show", "Show one release and its bundles."),
    "compare": (f"{HERE}.compare:compare", "Hold two releases or two cohorts against each other."),
    "promote": (f"{HERE}.promote:promote", "Take what one cohort completed to the next."),
    "cohort": (f"{HERE}.cohort:cohort", "Name sets of agents and say what holds them."),
    "rollout": (f"{HERE}.rollout:rollout", "Take a release through a cohort, step by step."),
    "agents": (f"{HERE}.agents:agents", "See what agents run, and why."),
    "diff": (f"{HERE}.fleet:diff", "Say what a fleet file would change."),
    "apply": (f"{HERE}.fleet:apply", "Make cohorts, pins and freezes as a fleet file says."),
    "token": (f"{HERE}.token:token", "Make, list and revoke tokens."),
    "session": (f"{HERE}.session:session", "See who is signed in at the page, and end it."),
    "webhook": (f"{HERE}.webhook:webhook", "Tell others of rollouts, releases and agents."),
    "audit": (f"{HERE}.audit:audit", "Who did what, and when."),
    "doctor": (f"{HERE}.here:doctor", "Look at what `release` needs on this machine."),
    "open": (f"{HERE}.here:open_page", "Open the page that shows the fleet."),
    "completion": ("agent_core.console:completion", "Print a completion script for a shell."),
}


@click.group(cls=console.LazyGroup, lazy=COMMANDS, extra=server_options)
def release() -> None:
    """Publish releases, and steer who gets them and when.

    The first steps: release login URL, release key gen, release build --version V, release push.
    """


release.params.append(console.version_option("release"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run `release` and return its exit code."""
    return console.run(release, "release", argv)


if __name__ == "__main__":
    leave(main())
