"""Options that several of the server's commands take."""

from __future__ import annotations

from pathlib import Path

import click

from release_server.config import DATA_VARIABLE

data_option = click.option(
    "--data",
    envvar=DATA_VARIABLE,
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("relfleet-server"),
    show_default=True,
    help=f"The data directory; {DATA_VARIABLE} does the same.",
)
