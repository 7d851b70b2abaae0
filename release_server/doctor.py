"""Looks at everything that a server needs: each check is fine, or says in a sentence what to do.

A check that cannot be done is a finding itself, so that half may be broken and the rest is still told.
"""

from __future__ import annotations

import shutil
from datetime import timedelta
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from sqlalchemy.orm import Session

from agent_core import clock
from agent_core.errors import Exit, UnreachableError
from agent_core.findings import Finding, State
from release_server import certificates, presence, repository, serve, signer
from release_server.database import current_revision, make_engine, newest_revision
from release_server.hearing import NEVER
from release_server.jobs import LEASE
from release_server.models import Lease
from release_server.retention.pruner import standing
from release_server.signing.client import over_socket

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy import Engine

    from release_server.config import Config
    from release_server.repository import Lifetime

    Check = Callable[[Config, Engine], list[Finding]]

LEAST_FREE = 512 * 2**20
CLOCKS_DIFFER = timedelta(seconds=5)
JUST_NOW = timedelta(minutes=1)
AWAY = "web"
"""The check whose failure alone is a server that is down, which trying again may mend."""


def examine(config: Config) -> list[Finding]:
    """All findings; never raises."""
    engine = make_engine(config.database_url)
    findings: list[Finding] = []
    try:
        for name, check in CHECKS.items():
            try:
                findings += check(config, engine)
            except Exception as error:  # noqa: BLE001 - whatever keeps a check from running is what it found
                said = (str(error).strip() or type(error).__name__).splitlines()[0]
                findings.append(Finding(name, State.BAD, said, "read the server's log"))
    finally:
        engine.dispose()
    return findings


def exit_code(findings: list[Finding]) -> Exit:
    """8 when the server is down and nothing else is bad, 1 when something is, 0 otherwise."""
    bad = {found.check for found in findings if found.state is State.BAD}
    if not bad:
        return Exit.DONE
    return Exit.UNREACHABLE if bad == {AWAY} else Exit.FAILED


def _examine_permissions(config: Config, _engine: Engine) -> list[Finding]:
    open_to_others = [
        place for place in (config.data, config.keys) if place.exists() and place.stat().st_mode & 0o077
    ]
    if open_to_others:
        return [
            Finding(
                "permissions",
                State.BAD,
                f"others can open {open_to_others[0]}",
                f"chmod 700 {open_to_others[0]}",
            )
        ]
    token = config.data / "admin.token"
    if token.exists():
        then = "keep the token elsewhere, then delete the file"
        return [Finding("permissions", State.NOTE, "the first admin token still lies in admin.token", then)]
    return [Finding("permissions", State.OK, "only the owner can open the data directory")]


def _examine_disk(config: Config, _engine: Engine) -> list[Finding]:
    free = shutil.disk_usage(config.data).free
    text = f"{free / 2**30:.1f} GiB free"
    if free < LEAST_FREE:
        return [Finding("disk", State.BAD, text, "make room: uploads and the database need it")]
    return [Finding("disk", State.OK, text)]


def _examine_keys(config: Config, _engine: Engine) -> list[Finding]:
    public = signer.read_public(config.trust)
    if not config.has_own_signer:
        return [Finding("keys", State.OK, "they are with a signer of its own user")]
    if lost := [role for role in signer.ONLINE if not signer.key_path(config.keys, role).exists()]:
        make = f"release-server signer --make-keys --data {config.data}, then release key rotate --online"
        then = f"restore it from a backup; without one: {make}"
        return [Finding("keys", State.BAD, f"{config.keys} has no key of {', '.join(lost)}", then)]
    halves = signer.public_halves(config.keys)
    for role in signer.ONLINE:
        if getattr(halves, role) != getattr(public, role):
            then = "restore both from one backup"
            return [Finding("keys", State.BAD, f"the {role} key is not the one in trust/online.json", then)]
    return [Finding("keys", State.OK, f"{', '.join(signer.ONLINE)}: private, and as published")]


def _examine_signer(config: Config, _engine: Engine) -> list[Finding]:
    try:
        known = over_socket(config.signer_socket).known()
    except UnreachableError as error:
        detail = f"nothing is signed: {error.why}"
        if config.has_own_signer:
            return [Finding("signer", State.NOTE, detail, "release-server run")]
        return [Finding("signer", State.BAD, detail, "start the signer")]
    if known.keys != signer.read_public(config.trust):
        return [Finding("signer", State.BAD, "its keys are not those in trust/online.json", "restore both")]
    return [Finding("signer", State.OK, f"it answers; its log has {known.entries} entries")]


def _examine_schema(_config: Config, engine: Engine) -> list[Finding]:
    found, wanted = current_revision(engine), newest_revision()
    if found != wanted:
        then = "release-server db upgrade"
        return [Finding("database", State.BAD, f"its schema is {found or 'empty'}, wanted is {wanted}", then)]
    return [Finding("database", State.OK, f"it answers; its schema is {found}")]


def _examine_expiries(_config: Config, engine: Engine) -> list[Finding]:
    with Session(engine) as session:
        found = repository.lifetimes(session, clock.now())
    if not any(lifetime.role == "root" for lifetime in found):
        then = "release key gen"
        return [
            Finding("metadata", State.NOTE, "there is no root yet, so no agent can be told anything", then)
        ]
    return [examine_lifetime(lifetime) for lifetime in found]


RENEWAL = {
    "root": "release key rotate, where the root keys are",
    "targets": "release renew, where the release keys are",
}
"""What people type to make a role last longer; the others the jobs process signs."""


def examine_lifetime(lifetime: Lifetime) -> Finding:
    """How long a role still lives, and who signs it anew."""
    then = RENEWAL.get(lifetime.role, "look at the jobs process: it signs this by itself")
    until = clock.iso(lifetime.expires_at)
    left = _in_words(lifetime.left)
    if lifetime.is_expired:
        return Finding(lifetime.role, State.BAD, f"expired at {until}: agents take nothing new", then)
    if lifetime.is_due:
        return Finding(lifetime.role, State.NOTE, f"expires in {left}, at {until}", then)
    return Finding(lifetime.role, State.OK, f"good for {left}, until {until}")


def _in_words(left: timedelta) -> str:
    return f"{left.days} days" if left.days > 1 else f"{int(left.total_seconds()) // 3600} h"


def _examine_lease(_config: Config, engine: Engine) -> list[Finding]:
    with Session(engine) as session:
        lease = session.get(Lease, LEASE)
    if lease is None or lease.until <= clock.now():
        then = "release-server run, or release-server worker"
        return [Finding("jobs", State.NOTE, "no jobs process is running", then)]
    return [Finding("jobs", State.OK, f"{lease.holder} works, its lease ends {clock.iso(lease.until)}")]


def _examine_presence(_config: Config, engine: Engine) -> list[Finding]:
    """Whether the census takes agents to be heard, by the clock of this machine."""
    now = clock.now()
    with Session(engine) as session:
        since, ahead = presence.heard_since(session, now), presence.ahead_of(session, now)
    then = "hold the clocks of replicas together (NTP)"
    if ahead >= CLOCKS_DIFFER:
        text = f"the clock of a web process is {ahead.total_seconds():.0f} s ahead of this machine's"
        return [Finding("listening", State.NOTE, text, then)]
    if since == NEVER:
        text = "no web process notes that it listens: nobody is silent, and no deadline, soak or watch ends"
        return [Finding("listening", State.NOTE, text, f"release-server run; {then}")]
    told = "agents can be heard" + (f", again since {clock.iso(since)}" if since else "")
    if since and since > now - JUST_NOW:
        return [Finding("listening", State.NOTE, told, f"look again; where that moment moves on, {then}")]
    return [Finding("listening", State.OK, told)]


def _examine_retention(config: Config, engine: Engine) -> list[Finding]:
    with Session(engine) as session:
        found = standing(session, config.retention, clock.now())
    then = "look at the log of the jobs process: old records stay" if found.behind else ""
    return [Finding("retention", State.NOTE if found.behind else State.OK, str(found), then)]


# --- as others see it ------------------------------------------------------------------------------------


def _examine_web(config: Config, _engine: Engine) -> list[Finding]:
    """Whether a web server answers: where the last one said, where the settings say, or at the public URL."""
    known = config.run / "url"
    asked = [known.read_text().strip()] if known.exists() else []
    if config.port:
        asked.append(f"{config.scheme}://{_netloc(config.host)}:{config.port}")
    asked.append(config.url)
    for url in asked:
        if serve.is_answering(*_place(url), urlsplit(url).scheme):
            return [Finding(AWAY, State.OK, f"{url} answers")]
    return [Finding(AWAY, State.BAD, f"no web server answers at {asked[0]}", "release-server run")]


def _netloc(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _place(url: str) -> tuple[str, int]:
    split = urlsplit(url)
    return split.hostname or "", split.port or (443 if split.scheme == "https" else 80)


def _examine_certificate(config: Config, _engine: Engine) -> list[Finding]:
    """The server's own certificate, or the proxy's, which is what the public URL shows; none without TLS."""
    if config.tls:
        whose, found = str(config.tls.certificate), certificates.of_file(config.tls.certificate)
    elif config.url.startswith("https://"):
        try:
            whose, found = config.url, certificates.shown_at(*_place(config.url))
        except OSError as error:
            detail = f"what {config.url} shows cannot be seen from here: {error}"
            return [Finding("certificate", State.NOTE, detail, "look at it from where agents are")]
    else:
        return []
    now, until = clock.now(), found.not_valid_after_utc
    if until <= now:
        detail = f"{whose} expired at {clock.iso(until)}: agents and people are refused"
        return [Finding("certificate", State.BAD, detail, RENEW_CERTIFICATE)]
    detail = f"{whose} holds for {_in_words(until - now)}, until {clock.iso(until)}"
    near = certificates.is_near_its_end(found, now)
    return [
        Finding("certificate", State.NOTE if near else State.OK, detail, RENEW_CERTIFICATE if near else "")
    ]


RENEW_CERTIFICATE = "renew it, then restart what shows it: a certificate is read at the start"

CHECKS: dict[str, Check] = {
    "permissions": _examine_permissions,
    "disk": _examine_disk,
    "keys": _examine_keys,
    "signer": _examine_signer,
    "database": _examine_schema,
    "metadata": _examine_expiries,
    "jobs": _examine_lease,
    "listening": _examine_presence,
    "retention": _examine_retention,
    AWAY: _examine_web,
    "certificate": _examine_certificate,
}
