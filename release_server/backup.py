"""This module makes a backup of a running server, and a server of a backup.

A backup is a directory: the database as one moment saw it, the bundles that it names, settings, the online
keys and their public halves, and `backup.json`, which comes last and names each file's sha256. Without it a
backup is not whole. It has neither the published files nor the signer's log: the first are written anew from
the database, and a signer without memory learns from the database what its keys have signed.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import make_url

from agent_core.clock import iso
from agent_core.errors import ConflictError, MalformedError, NotFoundError, RelfleetError, TrustError
from agent_core.wire import Getter
from release_server.blobs import copy_file, digest_of, sync_directory, write_file
from release_server.config import FILE, Config
from release_server.database import current_revision, make_engine, newest_revision, upgrade

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from datetime import datetime

MANIFEST = "backup.json"
SQLITE = "relfleet.db"
DUMP = "relfleet.pgdump"
ANOTHER = "choose another one"
DIRECTORIES = ("keys", "trust", "blobs")
"""After the database: it names what lies in `blobs/`, and bundles are never changed there."""


def back_up(config: Config, target: Path, now: datetime) -> dict[str, Any]:
    """Copy a server, which may be running, into a new directory; what fails leaves nothing there.

    Returns:
        What `backup.json` says.

    Raises:
        ConflictError: `target` is there and not empty.
        NotFoundError: there is no database, or it is PostgreSQL and there is no `pg_dump`.
    """
    _refuse_full(target)
    revision = _revision(config.database_url)
    if revision is None:
        raise _no_database("it has no schema")
    with _making(target):
        _copy_database(config, target)
        write_file(target / FILE, (config.data / FILE).read_bytes(), mode=0o600)
        for name in DIRECTORIES:
            if (config.data / name).is_dir():
                _copy_directory(config.data / name, target / name)
        files = {str(place.relative_to(target)): _digest(place) for place in _files(target)}
        said = {"schema": 1, "made_at": iso(now), "revision": revision, "files": files}
        manifest = json.dumps(said, indent=1, sort_keys=True).encode() + b"\n"
        write_file(target / MANIFEST, manifest, mode=0o600)
    return said


def restore(source: Path, data: Path, finish: Callable[[Config], None]) -> Config:
    """Make a data directory of a backup; it is there whole, or it is not there.

    Args:
        finish: what is still to be done before it counts, with the database at today's schema; when it
            raises, no data directory is left.

    PostgreSQL's database is the one that the backup's settings, or the environment, name; it has to be empty.

    Raises:
        ConflictError: `data` is not empty, the database is not, or this program is of another schema.
        TrustError: a file is not the one that was backed up.
        MalformedError: `source` is no whole backup.
    """
    said = check(source)
    _refuse_full(data)
    if said["revision"] > newest_revision():
        raise ConflictError(
            "the backup is of a newer relfleet",
            why=f"its schema is {said['revision']}, this program knows {newest_revision()}",
            then="install that version first",
            reason="schema",
        )
    made = data.with_name(f".{data.name}.restoring")
    shutil.rmtree(made, ignore_errors=True)
    with _making(made):
        _fill(source, made, said["files"])
        finish(Config.load(made))
        for directory, _, _ in os.walk(made):
            sync_directory(made.joinpath(directory))
        if data.exists():
            data.rmdir()
        made.rename(data)
    sync_directory(data.parent)
    return Config.load(data)


def _fill(source: Path, made: Path, names: Iterable[str]) -> None:
    """Everything of the backup, in a data directory whose database is at today's schema."""
    for name in names:
        if name != DUMP:
            copy_file(source / name, made / name)
    for directory in ("uploads", "repository/metadata", "repository/targets"):
        (made / directory).mkdir(mode=0o700, parents=True)
    url = Config.load(made).database_url
    _refuse_another(made, url, is_dump=DUMP in names)
    if DUMP in names:
        _restore_dump(url, source / DUMP)
    upgrade(url)


def check(source: Path) -> dict[str, Any]:
    """What a backup says of itself, once every file of it is the one that was written.

    Raises:
        TrustError, MalformedError: see `restore`.
    """
    try:
        said: dict[str, Any] = json.loads((source / MANIFEST).read_bytes())
        files = dict(said["files"])
    except (OSError, ValueError, KeyError, TypeError):
        raise MalformedError(
            f"{source} is not a whole backup", why=f"its {MANIFEST} cannot be read", then=ANOTHER
        ) from None
    Getter(said, str(source / MANIFEST)).text("revision")
    for name, digest in files.items():
        place = source / name
        if not place.resolve().is_relative_to(source.resolve()) or not place.is_file():
            raise MalformedError(f"{source} is not a whole backup", why=f"it has no {name}", then=ANOTHER)
        if _digest(place) != digest:
            why = f"{name} has another sha256"
            raise TrustError("the backup was changed", why=why, then=ANOTHER, reason="digest-mismatch")
    return said


def _refuse_full(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConflictError(
            f"{directory} is not empty",
            why="nothing is overwritten",
            then="name a directory that is not there yet",
            reason="exists",
        )


@contextmanager
def _making(directory: Path) -> Iterator[None]:
    """A new directory that nobody else reads; when what fills it fails, nothing of it is left."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory.chmod(0o700)
    try:
        yield
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _revision(url: str) -> str | None:
    made = make_url(url)
    if made.get_backend_name() == "sqlite" and not Path(str(made.database)).exists():
        raise _no_database(f"{made.database} is not there")  # asking would make an empty one
    engine = make_engine(url)
    try:
        return current_revision(engine)
    finally:
        engine.dispose()


def _no_database(why: str) -> NotFoundError:
    return NotFoundError("there is no database to back up", why=why, then="name the server's own --data")


# --- the database ----------------------------------------------------------------------------------------


def _copy_database(config: Config, target: Path) -> None:
    url = make_url(config.database_url)
    if url.get_backend_name() == "sqlite":
        _copy_sqlite(str(url.database), target / SQLITE)
    else:
        _run_postgres(
            config.database_url, "pg_dump", "--format=custom", "--no-owner", f"--file={target / DUMP}"
        )
        (target / DUMP).chmod(0o600)


def _copy_sqlite(source: str, target: Path) -> None:
    """SQLite's own online copy, of one moment.

    All in one step: between two it would begin anew whenever somebody has written, and under a fleet that
    reports all the time never end. Writers do not wait for it, for the log of WAL is theirs meanwhile.
    """
    write_file(target, b"", mode=0o600)
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)
        found = copy.execute("PRAGMA integrity_check").fetchone()[0]
        copy.execute("PRAGMA journal_mode=DELETE")
    if found != "ok":
        raise RelfleetError("the database is damaged", why=str(found), then="restore an earlier backup")


def _refuse_another(made: Path, url: str, *, is_dump: bool) -> None:
    """The settings name the database that the backup is of, or what was restored would never be looked at."""
    named = make_url(url)
    is_file = named.get_backend_name() == "sqlite"
    if is_dump and not is_file:
        return
    if not is_dump and is_file and Path(str(named.database)) == made / SQLITE:
        return
    raise ConflictError(
        f"the backup holds {'a dump of PostgreSQL' if is_dump else SQLITE}",
        why=f"the settings name {named.render_as_string(hide_password=True)}",
        then="name an empty database of PostgreSQL in RELFLEET_DATABASE_URL"
        if is_dump
        else "put RELFLEET_DATABASE_URL= in front, and take database.url out of the restored server.toml",
        reason="another-database",
    )


def _restore_dump(url: str, dump: Path) -> None:
    if _revision(url) is not None:
        raise ConflictError(
            "the database is not empty",
            why="nothing is overwritten",
            then="createdb another one and name it in RELFLEET_DATABASE_URL",
            reason="exists",
        )
    words = ("--no-owner", "--exit-on-error", "--single-transaction", str(dump))
    _run_postgres(url, "pg_restore", *words)


def _run_postgres(url: str, program: str, *words: str) -> None:
    """One of PostgreSQL's own programs; a password goes by the environment, which no list shows."""
    place = shutil.which(program)
    if place is None:
        raise NotFoundError(f"there is no {program}", then="install PostgreSQL's client programs")
    made = make_url(url)
    environ = os.environ | ({"PGPASSWORD": str(made.password)} if made.password else {})
    address = made.set(drivername="postgresql", password=None).render_as_string()
    done = subprocess.run(
        [place, f"--dbname={address}", *words], env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        why = (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[0]
        raise RelfleetError(f"{program} failed", why=why, then="read the database's log")


# --- files -----------------------------------------------------------------------------------------------


def _copy_directory(source: Path, target: Path) -> None:
    """Each file whole; one that is being written beside its place, by a dot in front, is left out."""
    for place in _files(source):
        if not place.name.startswith("."):
            copy_file(place, target / place.relative_to(source))


def _files(directory: Path) -> Iterable[Path]:
    return sorted(place for place in directory.rglob("*") if place.is_file())


def _digest(place: Path) -> str:
    with place.open("rb") as file:
        return digest_of(file)
