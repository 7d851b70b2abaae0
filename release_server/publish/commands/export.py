"""The command that puts a release into a file, for hosts that reach no server."""

from __future__ import annotations

import os
from pathlib import Path

import click

from agent_core import clock, console
from release_server.publish import profile as profiles
from release_server.publish.profile import connect, trust_option


@click.command("export")
@click.argument("version")
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The file to write, for `agent install`.",
)
@click.option("--platform", "platforms", multiple=True, help="Only this one; repeatable. All when left out.")
@click.option(
    "--metadata",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Ask no server: signed metadata, as it publishes it, are in this directory.",
)
@click.option(
    "--bundle",
    "bundles",
    multiple=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take this archive instead of the server's copy; repeatable. The digests must be the signed ones.",
)
@trust_option()
def export(
    version: str,
    *,
    out: Path,
    platforms: tuple[str, ...],
    metadata: Path | None,
    bundles: tuple[Path, ...],
    trust: Path | None,
) -> None:
    """Put a signed VERSION, with the metadata that a host needs to believe it, into one file.

    A host installs it with `agent install FILE` until the signature of the release keys expires.
    """
    from release_server.publish import export as exporting
    from release_server.publish import sign

    found = profiles.current(trust=trust)
    root, product = sign.read_trust(found.trust), found.need_product()
    if metadata is not None:
        source = exporting.from_directory(metadata, root, clock.now())
        fetch = exporting.local(bundles)
    else:
        client = connect(found)
        cache = sign.cache_dir(found.state, client.url, root)
        source = exporting.from_server(client, root, cache)
        fetch = (
            exporting.local(bundles)
            if bundles
            else exporting.download(client, console.progress_line("fetch"))
        )
    title = exporting.export(
        source,
        product,
        version,
        out,
        platforms=platforms,
        fetch=fetch,
        progress=console.progress_line("write"),
    )
    said = {
        "file": str(out),
        "product": product,
        "version": version,
        "platforms": list(title.platforms),
        "length": out.stat().st_size,
        "expires": clock.iso(source.listed.expires),
    }
    console.say(f"hosts take it until {said['expires']}: agent install {os.fspath(out)}")
    console.emit(said, str(out))
