"""Looks at everything that `release` needs on this machine: server, clock, token, trust and keys.

Each check returns findings; one that cannot be done is a finding itself, so that half may be broken and the
rest is still told. Nothing is changed but what this machine remembers of metadata that it verified.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from agent_core import clock, findings
from agent_core.errors import Exit, NotFoundError, RelfleetError
from agent_core.findings import State
from keys import signers
from keys.roles import ROLES, ROOT, TARGETS
from release_server.publish import sign

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from release_server.publish.client import Client
    from release_server.publish.profile import Profile
    from release_server.publish.sign import Trusted

CLOCK_OFF = timedelta(minutes=2)
NEAR = timedelta(days=7)
RESIGN = {ROOT: "release key rotate", TARGETS: "release renew"}
WORST_FIRST = (Exit.TRUST, Exit.NOT_ALLOWED, Exit.UNREACHABLE, Exit.FAILED, Exit.DONE)


@dataclass(frozen=True)
class Finding(findings.Finding):
    """A finding, and what a script makes of it."""

    exit_code: Exit = Exit.DONE

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {"exit_code": int(self.exit_code)}


@dataclass
class Desk:
    """What the checks start from; `trusted` is what this machine has verified, once it has."""

    profile: Profile
    client: Client
    now: datetime
    trusted: Trusted | None = None


def examine(profile: Profile, client: Client, now: datetime) -> list[Finding]:
    """Do every check; never raises."""
    desk, found = Desk(profile, client, now), list[Finding]()
    for name, check in CHECKS.items():
        try:
            found += check(desk)
        except RelfleetError as error:
            code = error.exit_code if error.exit_code in WORST_FIRST else Exit.FAILED
            why = f"{error.what}: {error.why}" if error.why else error.what
            found.append(Finding(name, State.BAD, why, error.then, code))
        except OSError as error:
            found.append(Finding(name, State.BAD, str(error), "mend that, then try again", Exit.FAILED))
        except Exception as error:  # noqa: BLE001 - an answer of a shape that nobody foresaw is a finding too
            said = f"this cannot be made sense of: {type(error).__name__}: {error}"
            then = "check that the URL is that of a release server, and its version near this one's"
            found.append(Finding(name, State.BAD, said, then, Exit.FAILED))
    return found


def exit_code(found: list[Finding]) -> Exit:
    """Of the worst finding: what to distrust before what is not allowed, and that before what is away."""
    return min((finding.exit_code for finding in found), key=WORST_FIRST.index)


# --- the server ------------------------------------------------------------------------------------------


def _server(desk: Desk) -> Iterator[Finding]:
    url, origin = desk.client.url, urlsplit(desk.client.url)
    answer = desk.client.call("GET", "/health")
    if origin.scheme == "https":
        yield Finding("server", State.OK, f"{url} answers, and its certificate is one this machine trusts")
    elif origin.hostname in {"localhost", "127.0.0.1", "::1"}:
        yield Finding("server", State.OK, f"{url} answers, on this machine")
    else:
        detail = f"{url} answers, but the token crosses the network in the clear"
        yield Finding("server", State.NOTE, detail, "use https")
    yield from _clock(answer.headers.get("Date"), desk.now)


def _clock(date: str | None, now: datetime) -> Iterator[Finding]:
    try:
        theirs = parsedate_to_datetime(date or "")
    except ValueError:
        return
    off = now - theirs
    if abs(off) <= CLOCK_OFF:
        yield Finding("clock", State.OK, "this machine and the server agree about the time")
        return
    word = "ahead of" if off > timedelta(0) else "behind"
    detail = f"this machine is {int(abs(off).total_seconds())} s {word} the server"
    then = "set the clock of whichever is wrong: expiry goes by it"
    yield Finding("clock", State.BAD, detail, then, Exit.FAILED)


def _token(desk: Desk) -> Iterator[Finding]:
    if desk.profile.token is None:
        yield Finding(
            "token", State.BAD, "there is no token", f"release login {desk.client.url}", Exit.NOT_ALLOWED
        )
        return
    who = desk.client.get("/whoami")
    detail = f"{who['name']}, {who['role']}"
    if who.get("product"):
        detail += f", for {who['product']} only"
    if not who.get("expires_at"):
        yield Finding("token", State.OK, f"{detail}; holds until it is revoked")
        return
    left = clock.parse_iso(who["expires_at"]) - desk.now
    near = left < NEAR
    then = "release token create, then release login" if near else ""
    detail += f"; holds until {who['expires_at']}"
    yield Finding("token", State.NOTE if near else State.OK, detail, then)


def _product(desk: Desk) -> Iterator[Finding]:
    name = desk.profile.product
    if name is None:
        then = "--product NAME, or release init, in the product's directory"
        yield Finding("product", State.NOTE, "no product is named here", then)
    elif desk.profile.token is not None:
        desk.client.items("/cohorts", product=name)
        yield Finding("product", State.OK, f"the server knows {name}")


# --- what is believed ------------------------------------------------------------------------------------


def _trust(desk: Desk) -> Iterator[Finding]:
    """The root this machine starts from, and what the server serves under it."""
    try:
        root = sign.read_trust(desk.profile.trust)
    except NotFoundError as error:
        yield Finding(
            "trust", State.NOTE, f"{error.what}: nothing can be verified or signed here", error.then
        )
        return
    cache = sign.cache_dir(desk.profile.state, desk.client.url, root)
    desk.trusted = sign.fetch(desk.client, root, cache)
    for role, expires in (
        (ROOT, desk.trusted.root.signed.expires),
        (TARGETS, desk.trusted.targets.signed.expires),
    ):
        late = ROLES[role].is_late(expires, desk.now)
        detail = f"{role} is what the keys signed, and holds until {clock.iso(expires)}"
        yield Finding("trust", State.NOTE if late else State.OK, detail, RESIGN[role] if late else "")


def _keys(desk: Desk) -> Iterator[Finding]:
    """Each key file: that it can be read and by nobody else, and what its key signs by the newest root."""
    paths = sorted(desk.profile.keys_dir.glob(f"*{signers.SUFFIX}"))
    if not paths:
        detail = f"no key files in {desk.profile.keys_dir}; whoever only operates needs none"
        yield Finding("keys", State.OK, detail)
    for path in paths:
        try:
            yield _key(signers.read(path), desk.trusted)
        except RelfleetError as error:
            detail = f"{error.what}: {error.why}" if error.why else error.what
            yield Finding("keys", State.BAD, detail, error.then, Exit.TRUST)


def _key(found: signers.KeyFile, trusted: Trusted | None) -> Finding:
    said = f"{found.name}, {found.protection}"
    if trusted is None:
        return Finding("keys", State.OK, said)
    signs = [name for name, role in trusted.root.signed.roles.items() if found.keyid in role.keyids]
    if not signs:
        then = "release key rotate brings it in; if it was taken out, delete its file"
        return Finding("keys", State.NOTE, f"{said}: the newest root does not name it", then)
    return Finding("keys", State.OK, f"{said}: signs {' and '.join(signs)}")


CHECKS: dict[str, Callable[[Desk], Iterator[Finding]]] = {
    "server": _server,
    "token": _token,
    "product": _product,
    "trust": _trust,
    "keys": _keys,
}
