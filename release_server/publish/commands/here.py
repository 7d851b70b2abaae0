"""`release doctor` and `release open`: what this machine needs, and the page."""

from __future__ import annotations

import sys

import click

from agent_core import clock, console
from agent_core.errors import Exit
from release_server.publish import profile as profiles
from release_server.publish.profile import connect


@click.command("doctor")
def doctor() -> int:
    """Look at everything `release` needs here: server, certificate, clock, token, trust and keys.

    Each check is fine, or says what to do. The exit code is that of the worst: 3 what must not be trusted,
    4 the token, 8 a server that does not answer, 1 anything else.
    """
    found = profiles.current()
    client = connect(found)
    client.attempts = 1  # whoever asks what is wrong wants to hear it, and not after a minute of trying
    from release_server.publish.doctor import examine, exit_code

    findings = examine(found, client, clock.now())
    console.emit(findings, lambda: "\n".join(finding.line(9) for finding in findings))
    return exit_code(findings)


@click.command("open")
@click.option("--print", "only_print", is_flag=True, help="Print the address and start nothing.")
def open_page(*, only_print: bool) -> int:
    """Open the page that shows the fleet in a browser; print its address where there is no terminal.

    The token is not part of the address: the page asks for it, or for a sign-in with the provider.
    """
    import webbrowser

    url = f"{profiles.current().need_server()}/"
    may = not only_print and not console.options().json and is_watched()
    opened = may and webbrowser.open(url)
    console.emit({"url": url, "opened": opened}, url)
    return Exit.DONE


def is_watched() -> bool:
    """Whether somebody looks at a terminal."""
    return sys.stdout.isatty()
