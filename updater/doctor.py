"""Looks at everything that an agent needs on its host, and changes nothing.

Each check returns findings; one that cannot be done is a finding itself, so that half of a host may be broken
and the rest is still told. What is found carries what to type next.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import stat
import tempfile
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_core import clock, disk, slots
from agent_core.archive import launcher_number
from agent_core.errors import NotFoundError, RelfleetError, TrustError
from agent_core.findings import Finding, State
from agent_core.layout import BALLAST_LENGTH, Layout
from agent_core.settings import load_agent
from updater import control, freshness, known, launchers
from updater import identity as identities
from updater.commands.common import not_allowed
from updater.device import Device, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from agent_core.settings import AgentSettings
    from updater.identity import Identity

CLOCK_OFF = timedelta(minutes=5)
NEAR = timedelta(days=7)
LEAST_NODES = 2000
BACKLOG = 100
SERVER_S = 20.0


@dataclass(frozen=True)
class Host:
    """What the checks start from; `settings` and `identity` are None when they cannot be read."""

    layout: Layout
    now: datetime
    settings: AgentSettings | None
    identity: Identity | None

    @property
    def server(self) -> str:
        own = self.settings.server_url if self.settings else ""
        return own or (self.identity.server if self.identity else "")


def examine(root: Path, now: datetime) -> list[Finding]:
    """Do every check; never raises, and writes nothing under `root`."""
    layout = Layout(root)
    if refusal := not_allowed(layout):
        return [Finding("permissions", State.BAD, f"{refusal.what}: {refusal.why}", refusal.then)]
    settings, identity = _or_none(lambda: load_agent(layout)), _or_none(lambda: identities.load(layout))
    host = Host(layout, now, settings, identity)
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        try:
            findings += check(host)
        except RelfleetError as error:
            why = f"{error.what}: {error.why}" if error.why else error.what
            findings.append(
                Finding(
                    name, State.BAD, why, error.then or f"mend it, then agent {AGAIN.get(name, 'doctor')}"
                )
            )
        except Exception as error:  # noqa: BLE001 - whatever keeps a check from running is what it found
            detail = f"this could not be looked at: {type(error).__name__}: {error}"
            findings.append(Finding(name, State.BAD, detail, "agent diagnostics -o FILE"))
    return findings


def _or_none(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (RelfleetError, OSError):
        return None


# --- what this host is set to -----------------------------------------------------------------------------


def _settings(host: Host) -> Iterator[Finding]:
    load_agent(host.layout)
    yield Finding("settings", State.OK, f"{host.layout.settings} and {host.layout.settings_dir} can be used")


def _identity(host: Host) -> Iterator[Finding]:
    who = identities.load(host.layout)
    if damaged := identities.damage(host.layout):
        yield Finding("identity", State.BAD, damaged, "look at the disk; a running agent mends the file")
    elif mended := control.read_status(host.layout).get("identity"):
        yield Finding("identity", State.NOTE, str(mended), "look at the disk: dmesg, smartctl")
    named = f"{who.agent_id}, {who.product}"
    if not who.enrolled:
        then = "agent enroll --token-file FILE, once the server is in reach"
        yield Finding("identity", State.NOTE, f"{named}: made offline, unknown to the server", then)
    elif who.standing:
        then = "agent why"
        yield Finding("identity", State.NOTE, f"{named}: {who.standing}, so it is told nothing to run", then)
    elif who.cohort is None:
        then = "give it labels that a cohort matches, or release agents move"
        yield Finding("identity", State.NOTE, f"{named}: no cohort on the server matches it", then)
    else:
        yield Finding("identity", State.OK, f"{named}, cohort {who.cohort}")
    identities.public_key(host.layout)


def _permissions(host: Host) -> Iterator[Finding]:
    layout, wrong = host.layout, []
    _need_root(layout)
    owner = layout.root.stat().st_uid
    private = (layout.state, layout.tuf, layout.staging, layout.trash, layout.download, layout.key)
    for path in (layout.root, layout.versions, layout.launcher_file.parent, layout.launcher_file, *private):
        try:
            status = path.lstat()
        except FileNotFoundError:
            wrong.append((f"{path} is not there", "agent enroll, again, makes what is missing"))
            continue
        if stat.S_ISLNK(status.st_mode):
            wrong.append((f"{path} is a link", "put the real thing there: links are not followed"))
        elif status.st_uid != owner:
            wrong.append((f"{path} belongs to user {status.st_uid}, not {owner}", f"chown {owner} {path}"))
        elif status.st_mode & (0o077 if path in private else 0o022):
            wrong.append(
                (
                    f"others can use {path}",
                    f"chmod go-rwx {path}" if path in private else f"chmod go-w {path}",
                )
            )
    if owner not in (0, os.geteuid()) and os.geteuid() != 0:
        wrong.append((f"{layout.root} belongs to user {owner}, you are {os.geteuid()}", "ask as that user"))
    for detail, then in wrong:
        yield Finding("permissions", State.BAD, detail, then)
    if not wrong:
        yield Finding("permissions", State.OK, f"only user {owner} can change {layout.root}")


def _disk(host: Host) -> Iterator[Finding]:
    _need_root(host.layout)
    found = disk.statvfs(host.layout.root)
    free = found.f_bavail * (found.f_frsize or 4096)
    reserve = host.settings.disk_reserve if host.settings else 0
    if found.f_flag & os.ST_RDONLY:
        yield Finding(
            "disk", State.BAD, "the file system is mounted read-only", "look at dmesg, then remount it"
        )
    if free < reserve:
        detail = f"{_mib(free)} free, {_mib(reserve)} must stay free (disk.reserve): nothing can be installed"
        yield Finding("disk", State.BAD, detail, "make room; agent versions lists what is kept")
    else:
        yield Finding("disk", State.OK, f"{_mib(free)} free")
    if found.f_files and found.f_favail < LEAST_NODES:
        yield Finding("disk", State.BAD, f"{found.f_favail} files can still be made", "remove small files")
    ballast = host.layout.ballast
    if not ballast.exists() or ballast.stat().st_size < BALLAST_LENGTH:
        detail = "the ballast was given away to go back on a full disk"
        yield Finding("disk", State.NOTE, detail, "it comes back with room: agent enroll, again, makes it")


def _need_root(layout: Layout) -> None:
    if not layout.root.exists():
        raise NotFoundError(f"there is no {layout.root}", then="agent enroll; or give another --root")


def _mib(length: int) -> str:
    return f"{length / 2**20:,.0f} MiB"


# --- the server -------------------------------------------------------------------------------------------


def _server(host: Host) -> Iterator[Finding]:
    """Reachable, TLS, and its clock against ours; nothing that it says is believed for more than advice."""
    if not host.server or host.settings is None:
        yield Finding("server", State.BAD, "no server can be asked: see settings and identity")
        return
    try:
        answer = connect(host.server, host.settings).get(
            freshness.TIMESTAMP_PATH, max_length=freshness.TIMESTAMP_MAX, deadline_s=SERVER_S
        )
    except RelfleetError as error:
        lonely = host.identity is not None and not host.identity.enrolled
        state = State.NOTE if lonely else State.BAD
        then = (
            error.then or f"curl -v {host.server}{freshness.TIMESTAMP_PATH} from here shows how far it gets"
        )
        yield Finding("server", state, f"{host.server}: {error.why or error.what}", then)
        return
    if answer.status != 200:
        then = "release-server doctor, on the server"
        yield Finding("server", State.BAD, f"{host.server} has no metadata (status {answer.status})", then)
        return
    how = (
        "over TLS"
        if host.server.startswith("https://")
        else "without TLS: metadata are signed, reports are not secret"
    )
    yield Finding("server", State.OK, f"{host.server} answers, {how}")
    yield from _clock_by(host, answer.body)


def _clock_by(host: Host, timestamp: bytes) -> Iterator[Finding]:
    body = known.signed_part(timestamp) or {}
    try:
        signed_at = clock.parse_iso(body[known.SIGNED_AT])
        expires = clock.parse_iso(body["expires"])
    except (KeyError, TypeError, ValueError):
        yield Finding(
            "clock", State.NOTE, "the server's timestamp carries no signed time", "release-server doctor"
        )
        return
    here = clock.iso(host.now)
    if host.now < signed_at - CLOCK_OFF:
        detail = f"it is {here} here, and the server signed at {clock.iso(signed_at)}: this clock is behind"
        yield Finding("clock", State.BAD, detail, "set the clock: timedatectl, chronyc tracking")
    elif host.now >= expires:
        detail = f"it is {here} here, and what the server signed ended at {clock.iso(expires)}"
        then = "is this clock ahead? if not: release-server doctor, its jobs process signs nothing"
        yield Finding("clock", State.BAD, detail, then)
    else:
        yield Finding("clock", State.OK, f"{here}, and the server signed at {clock.iso(signed_at)}")


# --- trust ------------------------------------------------------------------------------------------------


def _trust(host: Host) -> Iterator[Finding]:
    from updater.trusted_metadata import follow_roots

    try:
        bootstrap = disk.read_file(host.layout.trust_root)
    except FileNotFoundError:
        raise NotFoundError(
            "this host has no trusted root", why=f"there is no {host.layout.trust_root}", then="agent enroll"
        ) from None
    history = sorted(
        (host.layout.tuf / "root_history").glob("*.root.json"), key=lambda path: (len(path.name), path.name)
    )
    try:
        newest = follow_roots(bootstrap, [disk.read_file(path) for path in history])
    except TrustError as error:
        then = "bring a newer root.json by a way that you trust, and enroll again"
        yield Finding("trust", State.BAD, f"the chain of roots is broken: {error.why}", then)
    else:
        yield Finding("trust", State.OK, f"root {newest} follows from the one that was installed")
    memory = freshness.recall(host.layout.poll, host.layout.tuf, host.now)
    now = freshness.trusted_time(memory, host.now)
    if doubt := freshness.believed(host.layout.poll, host.layout.tuf)[1]:
        then = "nothing to do: the next check writes it anew; look at the disk when it comes back"
        yield Finding("trust", State.NOTE, doubt.partition("\n")[0], then)
    for role in known.roles(host.layout):
        if role.expires <= now:
            then = "agent once fetches what is newer; else release-server doctor"
            if role.name == "file":
                then = "the next release file brings newer ones; a server asks for none of it"
            detail = f"{role.name} {role.version} expired at {clock.iso(role.expires)}"
            yield Finding("trust", State.BAD if role.name != "file" else State.NOTE, detail, then)
        elif role.name in ("root", "targets") and role.expires - now < NEAR:
            then = (
                "tell the release managers: release renew"
                if role.name == "targets"
                else "tell the holders of root"
            )
            yield Finding("trust", State.NOTE, f"{role.name} expires at {clock.iso(role.expires)}", then)


# --- what is installed ------------------------------------------------------------------------------------


def _record(host: Host) -> Iterator[Finding]:
    root = host.layout.root
    record = slots.read(root)
    if record is None:
        lost = slots.by_links(root)
        if lost is None:
            yield Finding("record", State.BAD, "nothing is installed", "agent once, or agent install FILE")
        else:
            detail = f"neither half of state/slots can be read; by its link {lost.good} is good"
            yield Finding("record", State.BAD, detail, "start the agent: its launcher writes the record anew")
        return
    whole = slots.complete(root, record)
    if record.good not in whole:
        then = (
            "start the agent, it takes the version before"
            if record.previous in whole
            else "agent install FILE"
        )
        yield Finding("record", State.BAD, f"the good version {record.good} is not whole", then)
    elif record.previous not in whole:
        yield Finding("record", State.NOTE, f"the version before, {record.previous}, is not whole", "")
    if not slots.links_follow(root, record):
        then = "start the agent: its launcher mends them"
        yield Finding("record", State.NOTE, "the links do not show what the record says", then)
    if record.phase != slots.IDLE:
        detail = f"{record.candidate} is on trial, {record.boots_left} boots left"
        yield Finding("record", State.NOTE, detail, "agent status")
    elif record.good in whole:
        yield Finding("record", State.OK, f"{record.good} is good and whole")
    if record.skip:
        detail = f"bundles that failed here and are skipped: {len(record.skip)}"
        yield Finding("record", State.NOTE, detail, "agent status lists them; agent retry forgets them")


def _launcher(host: Host) -> Iterator[Finding]:
    number = launcher_number(host.layout.launcher_file)
    if number is None:
        detail = f"{host.layout.launcher_file} is missing or no launcher: nothing could start the agent"
        yield Finding("launcher", State.BAD, detail, "agent upgrade-launcher")
    elif number < launchers.OWN:
        detail = f"launcher {number}; this agent brings {launchers.OWN}, which a release may need"
        yield Finding("launcher", State.NOTE, detail, "agent upgrade-launcher")
    else:
        yield Finding("launcher", State.OK, f"launcher {number}")


def _running(host: Host) -> Iterator[Finding]:
    news = control.read_status(host.layout)
    if control.is_running(host.layout):
        yield Finding("running", State.OK, f"{news.get('version', '?')} runs as process {news['pid']}")
        return
    then = f"systemctl status relfleet-agent, or: agent run --supervise --root {host.layout.root}"
    yield Finding("running", State.BAD, "no agent runs", then)


def _checks(host: Host) -> Iterator[Finding]:
    device = Device.load(host.layout.root)
    outcome, hold = device.outcome(), device.hold()
    if hold is not None and hold.holds(host.now):
        until = clock.iso(hold.until) if hold.until else "agent unhold"
        yield Finding("checks", State.NOTE, f"held until {until}: {hold.reason}", "agent unhold")
    if outcome is None:
        yield Finding("checks", State.NOTE, "no check was done yet", "agent once")
    elif outcome.failed:
        why = outcome.detail.partition("\n")[0]
        detail = f"the last one, {outcome.at}, failed ({outcome.reason}): {why}"
        yield Finding("checks", State.BAD, detail, "agent why")
    else:
        yield Finding("checks", State.OK, f"the last one, {outcome.at}, said {outcome.reason}")


def _spool(host: Host) -> Iterator[Finding]:
    waiting, problem = backlog(host.layout)
    if problem:
        then = "the agent moves a damaged spool aside by itself; look again when it has run"
        yield Finding("spool", State.NOTE, f"state/spool.db cannot be read: {problem}", then)
    elif waiting > BACKLOG:
        then = "see server; they are kept until it has them"
        yield Finding("spool", State.NOTE, f"{waiting} transitions wait for the server", then)
    else:
        yield Finding("spool", State.OK, f"{waiting} transitions wait for the server")


def backlog(layout: Layout) -> tuple[int, str]:
    """How many transitions wait, and why that cannot be said; a copy is read, as readers write beside it."""
    if not layout.spool.exists():
        return 0, ""
    with tempfile.TemporaryDirectory(prefix="relfleet-doctor-") as place:
        copy = Path(place, "spool.db")
        try:
            shutil.copyfile(layout.spool, copy)
            journal = layout.spool.with_name("spool.db-wal")
            if journal.exists():
                shutil.copyfile(journal, copy.with_name("spool.db-wal"))
            with closing(sqlite3.connect(copy)) as database:
                return int(database.execute("SELECT count(*) FROM transitions").fetchone()[0]), ""
        except (OSError, sqlite3.Error) as error:
            return 0, str(error)


AGAIN = {"settings": "agent config check"}
"""What to ask again with after a fault that did not say it itself."""

CHECKS: dict[str, Callable[[Host], Iterator[Finding]]] = {
    "settings": _settings,
    "identity": _identity,
    "permissions": _permissions,
    "disk": _disk,
    "server": _server,
    "trust": _trust,
    "record": _record,
    "launcher": _launcher,
    "running": _running,
    "checks": _checks,
    "spool": _spool,
}
