"""`release sign`: makes and signs the next targets where there is no network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from agent_core import clock, console
from keys import cli as keys_cli
from keys.cli import passphrases
from release_server.publish import profile as profiles
from release_server.publish.commands.release import releases_of
from release_server.publish.commands.trust import changes_table, signing_options


@click.command("sign")
@click.argument("bundle", type=click.Path(path_type=Path, exists=True), nargs=-1, required=True)
@click.option(
    "--metadata",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="A copy of the server's metadata/: what these releases follow.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The file that is carried on; targets-N.json when left out. One that is there is signed as well.",
)
@click.option("--notes", type=click.File("r"), help="A text for people, signed with the release; - is stdin.")
@click.option("--gate", "gates", multiple=True, metavar="NAME", help="Only for agents behind this gate.")
@click.option("--barrier", is_flag=True, help="No agent goes past this release without having run it.")
@signing_options
def sign(
    bundle: tuple[Path, ...],
    *,
    metadata: Path,
    output: Path | None,
    notes: Any,
    gates: tuple[str, ...],
    barrier: bool,
    keys_dir: Path | None,
    trust: Path | None,
    passphrase_file: Path | None,
) -> None:
    """Sign the BUNDLEs of one version on a machine without a network.

    The file it writes is brought to the server from another machine: release push BUNDLE... --signed FILE. A
    second release manager runs the same command with the same bundles and the file of the first: it is
    verified, shown, and signed as well.
    """
    from keys import ceremony, changes
    from keys.roles import TARGETS
    from release_server.publish import offline
    from release_server.publish import sign as signing

    found, now = profiles.current(keys_dir=keys_dir, trust=trust), clock.now()
    current = offline.trusted(metadata, signing.read_trust(found.trust), now)
    releases = releases_of(bundle, None, gates, notes.read() if notes else "", barrier=barrier)
    file = output or Path(f"targets-{current.version + 1}.json")
    root = current.root.signed
    if file.exists():
        following = ceremony.parse_targets(file.read_bytes())
        offline.check(current, following, releases, now)
    else:
        following = offline.make(current, releases, now)
    changed = changes.changes(current.targets.signed, following.signed)
    console.say(changes_table(changed))
    signed = ceremony.signed_by(root, TARGETS, following)
    opened = signing.release_signers(found.keys_dir, root, passphrases(passphrase_file), signed=signed)
    console.confirm(f"This signs targets {following.signed.version}, as above.")
    missing = signing.sign_targets(following, root, opened)
    keys_cli.write_public(file, following.to_bytes())
    bundles = " ".join(str(path) for path in bundle)
    if missing:
        console.say(f"{file} needs {missing} more signature(s): there, release sign {bundles} -o {file}")
    console.say(f"next, where the server is in reach: release push {bundles} --signed {file}")
    console.emit(
        {
            "file": str(file),
            "targets_version": following.signed.version,
            "missing": missing,
            "changes": [change.to_json() for change in changed],
        },
        str(file),
    )
