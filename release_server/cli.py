"""`release-server`: makes a server's data directory, runs it, and says how it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent_core import console
from agent_core.errors import ConflictError, NotFoundError
from release_server.config import FILE, TABLE, Config, first_file
from release_server.database_commands import db
from release_server.options import data_option
from release_server.signing.cli import signer as signer_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from datetime import datetime


def listen_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for name, help_text in (("workers", "Web processes."), ("port", "Port; 0 for any free one.")):
        command = click.option(f"--{name}", type=int, default=None, help=help_text)(command)
    return click.option("--host", default=None, help="Address to listen on.")(command)


@click.group(cls=console.Group, params=[console.version_option("release-server")])
def cli() -> None:
    """The server of a fleet: keeps releases, steers cohorts, signs directives."""


def main(argv: Sequence[str] | None = None) -> int:
    return console.run(cli, "release-server", argv)


# --- init ------------------------------------------------------------------------------------------------

OURS = frozenset(
    {"relfleet.db", "relfleet.db-wal", "relfleet.db-shm", "keys", "trust", "blobs", "uploads", "repository"}
    | {"signer"}
)


@cli.command()
@data_option
@click.option("--url", default="", help="How agents and people will reach the server.")
@click.option(
    "--signer-socket", default=None, help="Where a signer of its own user listens already; it has the keys."
)
@listen_options
def init(
    data: Path, url: str, signer_socket: str | None, host: str | None, port: int | None, workers: int | None
) -> None:
    """Make a data directory: settings, database, online keys, and the first admin token."""
    flags = {"server.url": url or None, "server.host": host, "server.port": port, "server.workers": workers}
    flags["signer.socket"] = signer_socket
    config = Config(data.absolute(), TABLE.load(flags=flags))
    _refuse_foreign(config.data)
    token = _make(config, first_file(flags))
    console.emit(
        {"data": str(config.data), "url": config.url, "admin_token": str(token)},
        f"{config.data} is ready; the first admin token is in {token} (keep it, then delete the file)\n"
        f"next: release-server run --data {data}",
    )


def _refuse_foreign(data: Path) -> None:
    if (data / FILE).exists():
        raise ConflictError(
            f"{data} is a server's data directory already",
            why="it is never made anew, its keys would be lost",
            then=f"release-server run --data {data}",
            reason="exists",
        )
    strange = (
        sorted({entry.name for entry in data.iterdir()} - OURS - {"admin.token"}) if data.is_dir() else []
    )
    if strange:
        raise ConflictError(
            f"{data} is not empty",
            why=f"it holds {strange[0]}",
            then="choose a new directory",
            reason="exists",
        )


def _make(config: Config, settings: str) -> Path:
    """Everything of a data directory; the settings file comes last and says that all of it is there."""
    from agent_core.clock import now
    from release_server import signer
    from release_server.blobs import write_file
    from release_server.database import upgrade
    from release_server.signing.client import over_socket

    config.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    config.data.chmod(0o700)
    for directory in (config.blobs, config.uploads, config.trust.parent):
        directory.mkdir(mode=0o700, exist_ok=True)
    for directory in (config.repository / "metadata", config.repository / "targets"):
        directory.mkdir(parents=True, exist_ok=True)
    upgrade(config.database_url)
    for file in config.data.glob("relfleet.db*"):
        file.chmod(0o600)
    if config.has_own_signer:
        signer.make_keys(config.keys, now())
        signer.write_public(config.trust, signer.public_halves(config.keys))
    else:
        signer.write_public(config.trust, over_socket(config.signer_socket).known().keys)
    token = config.data / "admin.token"
    if not token.exists():
        write_file(token, _admin_token(config, now()).encode() + b"\n", mode=0o600)
    write_file(config.data / FILE, settings.encode(), mode=0o600)
    return token


def _admin_token(config: Config, now: datetime) -> str:
    from release_server import auth
    from release_server.database import Sessions, make_engine

    sessions = Sessions(make_engine(config.database_url))
    try:
        with sessions.write() as session:
            return auth.add_token(session, now, name="admin", role=auth.Role.ADMIN, actor="init")[1]
    finally:
        sessions.close()


# --- run -------------------------------------------------------------------------------------------------


@cli.command()
@data_option
@listen_options
def run(data: Path, host: str | None, port: int | None, workers: int | None) -> int:
    """Run signer, web server and jobs process until SIGTERM or Ctrl-C."""
    from release_server import serve

    flags = {"server.host": host, "server.port": port, "server.workers": workers}
    config = Config.load(data, flags=flags)
    _check_schema(config)
    serve.show_logs(config.log_level)
    return serve.Server(config, lambda url: print(f"listening on {url}", flush=True)).run()  # noqa: T201 - the one line scripts wait for


@cli.command(hidden=True)
@data_option
def web(data: Path) -> int:
    """The web server alone; `run` starts it."""
    return _child(data, "run_web")


@cli.command()
@data_option
def worker(data: Path) -> int:
    """Run a jobs process alone, beside web processes of gunicorn or another host."""
    return _child(data, "run_jobs")


def _child(data: Path, what: str) -> int:
    from release_server import serve

    serve.die_with_parent()
    config = Config.load(data)
    serve.show_logs(config.log_level)
    work: Callable[[Config], int] = getattr(serve, what)
    return work(config)


def _check_schema(config: Config) -> None:
    from release_server.database import current_revision, make_engine, newest_revision

    engine = make_engine(config.database_url)
    try:
        found, wanted = current_revision(engine), newest_revision()
    finally:
        engine.dispose()
    if found != wanted:
        raise ConflictError(
            "the database is of another version",
            why=f"its schema is {found or 'empty'}, this program wants {wanted}",
            then=f"release-server db upgrade --data {config.data}",
            reason="schema",
        )


cli.add_command(signer_command)


# --- monitor ---------------------------------------------------------------------------------------------


@cli.command()
@click.argument("url")
@click.option(
    "--trust",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The root to begin from, brought by a way of its own.",
)
@click.option(
    "--state",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where it remembers what it has seen; below ~/.local/state/relfleet without.",
)
def monitor(url: str, trust: Path, state: Path | None) -> int:
    """Look at a server from outside, as agents do: what expires, stalls, is refused or says two things."""
    from release_server import monitor as outside

    findings = outside.watch(url, trust, state)
    alarms = [finding for finding in findings if finding.is_alarm]
    if alarms or console.options().json:
        console.emit(findings, lambda: "\n".join(finding.line() for finding in alarms))
    else:
        console.say("\n".join(finding.line() for finding in findings))
    return outside.exit_code(findings)


# --- db, config, export ----------------------------------------------------------------------------------


cli.add_command(db)


@cli.group("config", cls=console.Group)
def config_group() -> None:
    """The settings."""


@config_group.command("show")
@data_option
def config_show(data: Path) -> None:
    """Show every setting, its value, and where that came from."""
    settings = Config.load(data).settings
    rows = [{"name": name, "value": value, "from": origin} for name, value, origin in settings.show()]
    console.emit(rows)


@config_group.command("check")
@data_option
def config_check(data: Path) -> None:
    """Read the settings and say whether they can be used."""
    config = Config.load(data)
    console.emit({"ok": True, "file": str(config.data / FILE)}, f"{config.data / FILE} is fine")


@cli.group(cls=console.Group)
def export() -> None:
    """Write out what other tools need."""


@export.command("trust")
@data_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="A file; stdout without."
)
def export_trust(data: Path, output: Path | None) -> None:
    """Write the newest root: what agents are installed with."""
    from keys.roles import ROOT
    from release_server import repository
    from release_server.blobs import write_file
    from release_server.database import Sessions, make_engine

    sessions = Sessions(make_engine(Config.load(data).database_url))
    try:
        with sessions.read() as session:
            row = repository.newest(session, ROOT)
    finally:
        sessions.close()
    if row is None:
        raise NotFoundError(
            "the server trusts no root yet", then="release key gen, then PUT /api/v1/trust/root"
        )
    if output is None:
        sys.stdout.buffer.write(row.body)
    else:
        write_file(output, row.body)
        console.say(f"root {row.version} is in {output}")


# --- doctor ----------------------------------------------------------------------------------------------


@cli.command()
@data_option
def doctor(data: Path) -> int:
    """Look at everything the server needs; each check is fine, or says what to do."""
    from release_server import doctor as examiner

    findings = examiner.examine(Config.load(data))
    console.emit(findings, lambda: "\n".join(finding.line() for finding in findings))
    return examiner.exit_code(findings)


if __name__ == "__main__":
    raise SystemExit(main())
