"""`release-server db`: the schema, and backups."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from agent_core import console
from agent_core.errors import UsageError
from release_server.config import Config
from release_server.options import data_option

if TYPE_CHECKING:
    from release_server.published import Fetch

directory = click.Path(path_type=Path, file_okay=False)


@click.group(cls=console.Group)
def db() -> None:
    """The database's schema, and backups."""


@db.command("upgrade")
@data_option
def db_upgrade(data: Path) -> None:
    """Bring the schema to what this program wants."""
    from release_server.database import failures_named, upgrade

    config = Config.load(data)
    with failures_named():
        upgrade(config.database_url)
    _show_revision(config)


@db.command("current")
@data_option
def db_current(data: Path) -> None:
    """Show the schema's revision, and the one this program wants."""
    _show_revision(Config.load(data))


def _show_revision(config: Config) -> None:
    from release_server.database import current_revision, failures_named, make_engine, newest_revision

    engine = make_engine(config.database_url)
    try:
        with failures_named():
            found = current_revision(engine)
    finally:
        engine.dispose()
    console.emit({"current": found, "wanted": newest_revision()})


@db.command("backup")
@click.argument("target", type=directory)
@data_option
def db_backup(target: Path, data: Path) -> None:
    """Copy the server, which may be running, into the new directory TARGET: it then holds private keys."""
    from agent_core.clock import now
    from release_server import backup
    from release_server.database import failures_named

    with failures_named():
        said = backup.back_up(Config.load(data), target.absolute(), now())
    told = {"backup": str(target), "made_at": said["made_at"], "files": len(said["files"])}
    console.emit(told, f"{target} has {len(said['files'])} files; it holds private keys, keep it as such")


@db.command("restore")
@click.argument("source", type=directory)
@data_option
@click.option("--published", metavar="PLACE", help="Where what agents have seen still is: URL or directory.")
@click.option("--nothing-published", is_flag=True, help="No agent has seen anything newer than the backup.")
def db_restore(source: Path, data: Path, published: str | None, nothing_published: bool) -> None:
    """Make the new data directory of the backup SOURCE, and go on above what was published since.

    Agents refuse versions that run backwards. So PLACE is read: the old repository/, a mirror, the file
    server in front, or an agent's state/tuf.
    """
    from release_server import backup
    from release_server import published as since
    from release_server.database import failures_named

    if (published is None) is not nothing_published:
        raise UsageError(
            "it is not known what agents have seen",
            why="they refuse a server whose versions run backwards",
            then="--published URL-OR-DIRECTORY, or --nothing-published",
        )
    fetch = since.origin(published) if published is not None else None
    taken: dict[str, int] = {}
    with failures_named():
        config = backup.restore(source, data.absolute(), lambda made: taken.update(_follow(made, fetch)))
    newer = ", ".join(f"{role} {version}" for role, version in taken.items()) or "nothing newer"
    console.emit(
        {"data": str(config.data), "taken_over": taken},
        f"{config.data} is restored; published since and taken over: {newer}\n"
        f"next: release-server doctor --data {data}, then release-server run --data {data}",
    )


def _follow(config: Config, fetch: Fetch | None) -> dict[str, int]:
    from agent_core.clock import now
    from release_server import published, signer
    from release_server.blobs import Blobs
    from release_server.database import Sessions, make_engine

    if fetch is None:
        return {}
    sessions = Sessions(make_engine(config.database_url))
    try:
        with sessions.write() as session:
            blobs, online = Blobs(config.blobs, config.uploads), signer.read_public(config.trust)
            return published.follow(session, blobs, fetch, now=now(), online=online)
    finally:
        sessions.close()
