"""This module looks at a server from outside, as agents do, and says what they will trip over.

It is a TUF client with a memory of its own and no other knowledge: not the server's database, nor its keys.
So it may run anywhere, best where nobody who holds the server can write. It compares bytes because no client
sees by itself that there are two files of one version: both are signed, and a host takes the first it sees.
"""

from __future__ import annotations

import json
import os
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from tuf.api import exceptions
from tuf.api.metadata import Metadata

from agent_core import clock, console
from agent_core.errors import Exit, NotFoundError, RelfleetError, TrustError, UnreachableError
from agent_core.wire import Reason
from keys.roles import ROLES, ROOT, TARGETS, TIMESTAMP
from release_server.publish import profile, sign
from release_server.publish.client import Client

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime
    from pathlib import Path

NOBODYS_DIRECTIVE = "cohorts/-/-.json"
"""Asked for so that the delegated role is loaded and verified; no product has this name."""
EXPIRES, STALLED, DIFFERS, MISSING = "expires", "stalled", "differs", "missing"
ASK_RELEASE, ASK_ROOT, ASK_SERVER = (
    "release renew, where the release keys are",
    "release key rotate, where the root keys are",
    "release-server doctor, on the server: it signs this by itself",
)
ASK_LINE = "is the server running, and the way to it open? hosts keep what they run meanwhile"
ASK_PEOPLE = "publish nothing; look at the server, then at docs/security.md: online keys stolen"


class State(StrEnum):
    """How bad a finding is; each has its exit code."""

    OK = "ok"
    ALARM = "alarm"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"


CODES = {
    State.REFUSED: Exit.TRUST,
    State.UNREACHABLE: Exit.UNREACHABLE,
    State.ALARM: Exit.FAILED,
    State.OK: Exit.DONE,
}
"""Worst first."""


@dataclass(frozen=True)
class Finding:
    """What was found of one role, or of the server.

    Attributes:
        reason: a stable code: `ok`, `expires`, `stalled`, `differs`, `missing`, or that of the refusal.
    """

    check: str
    state: State
    reason: str
    what: str
    why: str = ""
    then: str = ""

    @property
    def is_alarm(self) -> bool:
        return self.state is not State.OK

    def line(self) -> str:
        """One line: what, why, what to type next."""
        parts = [
            f"{self.state} {self.check}: {self.what}",
            self.why,
            f"next: {self.then}" if self.then else "",
        ]
        return " ".join("; ".join(part for part in parts if part).split())


def watch(url: str, trust: Path, state: Path | None) -> list[Finding]:
    """Look once, with the trust and the memory that the files hold.

    Raises:
        NotFoundError, TrustError, UsageError: the root file or the address cannot be used.
    """
    root = sign.read_trust(trust)
    timeout_s = console.options().timeout_s
    with closing(Client(url, timeout_s=timeout_s)) as client:
        memory = state or profile.state_dir(os.environ) / "monitor"
        return look(client, root, sign.cache_dir(memory, client.url, root), clock.now())


def exit_code(findings: list[Finding]) -> Exit:
    """Of the worst finding."""
    return CODES[min(findings, key=_badness).state]


def look(client: Client, root: bytes, cache: Path, now: datetime) -> list[Finding]:
    """Verify what the server serves, then compare it with what was seen before under the same versions.

    Args:
        client: of the server, without a token.
        root: the bytes of the first root.
        cache: what this monitor remembers; of one server and one root.
        now: wall clock, for how long each role still holds; TUF's own refusals go by the host's.

    Returns:
        A finding for each role, alarms first; one for the server where it is refused or silent.
    """
    try:
        before = _remembered(cache)
        with sign.refreshed(client, root, cache) as updater:
            updater.get_targetinfo(NOBODYS_DIRECTIVE)
            found = list(_differing(client, _remembered(cache), before))
        kept = _remembered(cache)
        found += [_lifetime(role, kept[role], now) for role in ROLES if role in kept]
    except TrustError as error:
        found = [_failure(State.REFUSED, error), *_differing_if_served(client, before)]
    except (UnreachableError, NotFoundError) as error:
        found = [_failure(State.UNREACHABLE, error)]
    return sorted(found, key=_badness)


def _badness(finding: Finding) -> int:
    return list(CODES).index(finding.state)


# --- two files under one version ----------------------------------------------------------------------------


def _remembered(cache: Path) -> dict[str, bytes]:
    """The verified file of each role, as it was when it was taken."""
    files = {role: cache / f"{role}.json" for role in ROLES}
    return {role: file.read_bytes() for role, file in files.items() if file.is_file()}


def _differing_if_served(client: Client, known: Mapping[str, bytes]) -> list[Finding]:
    """As `_differing`, where the server is refused already and may give out nothing more."""
    try:
        return list(_differing(client, known, known))
    except RelfleetError:
        return []


def _differing(client: Client, known: Mapping[str, bytes], before: Mapping[str, bytes]) -> Iterator[Finding]:
    """What is served now under the versions that are known, where it is not the same to the byte.

    A TUF client keeps its own file as long as the version is the same, so the one that it keeps is the one
    that was seen first.
    """
    for role, content in known.items():
        version = _version(content)
        served = _served(client, role, version)
        if served is None:
            yield Finding(
                role,
                State.ALARM,
                MISSING,
                f"version {version} is not given out",
                "a host that needs it now is offline",
                "look at the server's repository/metadata, and at what is in front of it",
            )
        elif served != content and _version(served) == version:
            when = "before" if before.get(role) == content else "a moment ago"
            yield Finding(
                role,
                State.REFUSED,
                DIFFERS,
                f"version {version} is served with other bytes than {when}",
                f"{_short(content)} then, {_short(served)} now: a version never changes,"
                " so hosts are told different things",
                ASK_PEOPLE,
            )


def _served(client: Client, role: str, version: int) -> bytes | None:
    name = f"{role}.json" if role == TIMESTAMP else f"{version}.{role}.json"
    with closing(sign.Fetcher(client)) as fetcher:
        try:
            return fetcher.download_bytes(f"{client.url}/metadata/{name}", sign.MAX_TARGETS)
        except exceptions.DownloadHTTPError:
            return None
        except exceptions.DownloadError as error:
            raise sign.refusal(error, client.url) from error


def _version(content: bytes) -> int:
    """The version that a file says it has; 0 where it is no metadata."""
    try:
        return int(json.loads(content)["signed"]["version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0


def _short(content: bytes) -> str:
    return f"sha256 {sha256(content).hexdigest()[:12]}"


# --- how long each role still holds ----------------------------------------------------------------------


def _lifetime(role: str, content: bytes, now: datetime) -> Finding:
    signed: Any = Metadata[Any].from_bytes(content).signed
    left = signed.expires - now
    text = f"{left.days} d" if left.days > 1 else f"{max(0, int(left.total_seconds())) // 3600} h"
    what = f"version {signed.version} is good for {text}, until {clock.iso(signed.expires)}"
    rule = ROLES[role]
    if not rule.is_late(signed.expires, now):
        return Finding(role, State.OK, "ok", what)
    if rule.online:
        why = f"it was to be signed anew {rule.resign_before.total_seconds() / 3600:g} h before that"
        return Finding(role, State.ALARM, STALLED, what, why, ASK_SERVER)
    why = "people sign it, and agents take nothing new when it has expired"
    then = {ROOT: ASK_ROOT, TARGETS: ASK_RELEASE}[role]
    return Finding(role, State.ALARM, EXPIRES, what, why, then)


def _failure(state: State, error: RelfleetError) -> Finding:
    then = ASK_LINE if state is State.UNREACHABLE else ASK_PEOPLE
    if error.reason == Reason.EXPIRED:
        then = ASK_SERVER
    return Finding("server", state, error.reason, error.what, error.why, then)
