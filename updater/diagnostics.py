"""Collects what helps to find a fault into one zip, without secrets, however broken the host is.

Each part is made by itself; one that cannot be made says why in its place. Everything passes the `Redactor`
last, so that no part has to think of it: secrets that this host has are taken out by their value wherever
they stand, and what looks like one by its form. Nothing under the root is changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import platform
import re
import sys
import zipfile
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from agent_core import clock, console, disk, slots
from agent_core.archive import launcher_number
from agent_core.bundle import INDEX_NAME, Index, host_platforms
from agent_core.errors import RelfleetError
from agent_core.layout import Layout, read_json, write_durable
from agent_core.settings import load_agent
from updater import doctor, known, last_good, wholeness
from updater.commands.status import look, told
from updater.commands.why import explained

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MOST_PART = 2**20
MOST_TAIL = 256 * 1024
MOST_LISTED = 3000
HIDDEN = "***"
SHORTEST_SECRET = 6
NOTES = ("attempt", "backoff", "directive", "identity", "outcome", "poll", "request", "status")
"""Files under `state/` that hold no secret; the key and the session are not among them."""

_SECRET_NAME = re.compile(
    r"token|secret|passw|passphrase|credential|authori[sz]ation|cookie|session|private", re.IGNORECASE
)
_FORMS = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"\b(?:rf[a-z]?|rlf)_[A-Za-z0-9_-]{16,}"),
    re.compile(r"(?<=://)[^\s/@\"']+(?=@)"),
    re.compile(r"(?i)(?<=\bbearer )[A-Za-z0-9._~+/=-]{6,}|(?<=\bbasic )[A-Za-z0-9+/=]{6,}"),
    re.compile(
        r"(?i)(?<![A-Za-z])(?P<name>[A-Za-z0-9_.-]*(?:token|secret|passw(?:or)?d|passphrase|api[_-]?key)[A-Za-z0-9_.-]*)"
        r"(?P<sign>[\"']?\s*[:=]\s*)(?P<value>\"[^\"\n]*\"|'[^'\n]*'|[^\s\"',;}]+)"
    ),
)


class Redactor:
    """Takes secrets out of text.

    Args:
        secrets: values that must not appear anywhere; those under six characters are left, for they would
            take whole words out.
    """

    def __init__(self, secrets: set[str]) -> None:
        long = {secret for secret in secrets if len(secret) >= SHORTEST_SECRET}
        spelt = long | {json.dumps(secret)[1:-1] for secret in long}
        self._known = re.compile("|".join(sorted(map(re.escape, spelt), key=len, reverse=True)) or r"(?!)")

    def __call__(self, text: str) -> str:
        text = self.known(text)
        for form in _FORMS:
            text = form.sub(_hide, text)
        return text

    def known(self, text: str) -> str:
        """Take out the host's own secrets only: this may be done to what has a syntax."""
        return self._known.sub(HIDDEN, text)

    def inside(self, value: Any) -> Any:
        """The same value with every text in it redacted, and hidden where its key is named like a secret."""
        if isinstance(value, dict):
            return {
                self(str(key)): HIDDEN if _is_secret(key, entry) else self.inside(entry)
                for key, entry in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.inside(entry) for entry in value]
        return self(value) if isinstance(value, str) else value


def _hide(match: re.Match[str]) -> str:
    named = match.groupdict()
    if not named:
        return HIDDEN
    mark = named["value"][0] if named["value"][0] in ('"', "'") else ""
    return f"{named['name']}{named['sign']}{mark}{HIDDEN}{mark}"


def secrets_of(layout: Layout) -> set[str]:
    """Every secret this host has, as far as it can be read: key, session, proxies, the environment's."""
    found: set[str] = set()
    keys = (layout.key, layout.next_key)
    notes = (layout.state / "session.json", last_good.note(layout))
    for path in (*keys, *notes, layout.settings, *_pieces(layout)):
        try:
            text = disk.read_file(path).decode("utf-8", "replace")
        except OSError:
            continue
        if path in keys:
            found.add(text.strip())
        found |= {match["value"].strip("\"'") for match in _FORMS[-1].finditer(text)}
        found |= {part for url in re.findall(r"\w+://[^\s\"']+", text) for part in _userinfo(url)}
    try:
        session = read_json(layout.state / "session.json", {})
        found.add(str(session.get("session", "")))
    except (RelfleetError, AttributeError):
        pass
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and not name.upper().endswith("_FILE"):
            found.add(value)
        found |= set(_userinfo(value))
    return found


def _pieces(layout: Layout) -> list[Path]:
    try:
        return [layout.settings_dir / name for name in disk.listdir(layout.settings_dir)]
    except OSError:
        return []


def _userinfo(url: str) -> list[str]:
    try:
        parts = urlsplit(url)
        quoted = parts.password or ""
    except ValueError:
        return []
    return [quoted, unquote(quoted)]


# --- the parts ------------------------------------------------------------------------------------------


def collect(root: Path) -> dict[str, bytes]:
    """Every part by its name in the zip, without secrets, each of bounded size."""
    layout = Layout(root)
    redact = Redactor(secrets_of(layout))
    parts = dict(PARTS)
    parts |= {f"notes/{name}.json": partial(_note, name=name) for name in NOTES}
    parts |= {f"logs/{path.name}": partial(_tail, path=path) for path in _logs(layout)}
    return {
        name: _made(part, layout, redact).encode("utf-8", "replace")[:MOST_PART]
        for name, part in parts.items()
    }


def write(root: Path, out: Path) -> list[str]:
    """Write the zip, readable by its owner only, whole or not at all; the names of its parts.

    Raises:
        DiskError: it cannot be written.
    """
    parts = collect(root)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    write_durable(out, buffer.getvalue(), 0o600)
    return list(parts)


def _made(part: Callable[[Layout], Any], layout: Layout, redact: Redactor) -> str:
    try:
        found = part(layout)
    except Exception as error:  # noqa: BLE001 - a broken host is the reason why this is made
        found = {"could not be collected": f"{type(error).__name__}: {error}"}
    if isinstance(found, str):
        return redact(found)
    return redact.known(json.dumps(redact.inside(found), indent=1, default=str))


def _is_secret(key: Any, entry: Any) -> bool:
    return isinstance(entry, str) and bool(entry) and bool(_SECRET_NAME.search(str(key)))


def _record(layout: Layout) -> Any:
    record, links = slots.read(layout.root), (slots.CURRENT, slots.PREVIOUS)
    return {
        "record": asdict(record) if record else None,
        "links": {name: slots.link(layout.root, name) for name in links},
        "by the links": _asdict(slots.by_links(layout.root)),
        "launcher": launcher_number(layout.launcher_file),
        "launcher before": launcher_number(layout.launcher_previous),
    }


def _asdict(record: slots.Record | None) -> Any:
    return asdict(record) if record else None


def _settings(layout: Layout) -> Any:
    rows = load_agent(layout).settings.show()
    return [{"setting": name, "value": value, "from": origin} for name, value, origin in rows]


def _environment(_layout: Layout) -> Any:
    wanted = re.compile(r"RELFLEET_|.*_proxy$|LANG$|LC_|TZ$|PATH$|PYTHON|NOTIFY_|SSL_", re.IGNORECASE)
    return {name: value for name, value in sorted(os.environ.items()) if wanted.match(name)}


def _versions(layout: Layout) -> Any:
    return {name: _checked(layout.version_dir(name)) for name in sorted(disk.listdir(layout.versions))}


def _checked(directory: Path) -> Any:
    """Whether each file is what the version's own index lists."""
    try:
        index = Index.from_bytes(disk.read_file(directory / INDEX_NAME))
    except (OSError, RelfleetError) as error:
        return {"index": str(error)}
    wrong = [file.path for file in index.files if not _is_signed(directory / file.path, file.sha256)]
    return {"files": len(index.files), "bytes": index.unpacked, "wrong or missing": wrong[:100]}


def _is_signed(path: Path, digest: str) -> bool:
    with contextlib.suppress(OSError):
        return wholeness.is_signed(path, digest)
    return False


def _metadata(layout: Layout) -> Any:
    product = str((read_json(layout.identity, {}) or {}).get("product", ""))
    roles = [{**asdict(role), "expires": clock.iso(role.expires)} for role in known.roles(layout)]
    policy = known.policy(layout, product)
    return {"roles": roles, "floor": policy.floor_seq, "revoked": list(policy.revoked_seq)}


def _system(layout: Layout) -> Any:
    room = disk.statvfs(layout.root)
    return {
        "made at": clock.iso(clock.now()),
        "since boot": clock.boot_s(),
        "relfleet": console.version(),
        "python": sys.version,
        "host": platform.platform(),
        "platforms": host_platforms(),
        "user": os.geteuid(),
        "free bytes": room.f_bavail * room.f_frsize,
        "free files": room.f_favail,
        "load": os.getloadavg(),
        "spool": dict(zip(("waiting", "problem"), doctor.backlog(layout), strict=True)),
    }


def _files(layout: Layout) -> str:
    """What lies under the root, but for what is inside the versions."""
    lines: list[str] = []
    for directory, names, files in os.walk(layout.root):
        if os.path.dirname(directory) == str(layout.versions):  # noqa: PTH120 - text, not a place
            names.clear()
        for name in sorted([*names, *files]):
            path = os.path.join(directory, name)  # noqa: PTH118 - text, not a place
            status = disk.stat(path, follow=False)
            lines.append(
                f"{status.st_mode:06o} {status.st_uid:5} {status.st_size:10} {status.st_mtime:.0f} {path}"
            )
        if len(lines) > MOST_LISTED:
            return "\n".join([*lines[:MOST_LISTED], "… and more"])
    return "\n".join(lines)


def _note(layout: Layout, name: str) -> Any:
    return read_json(layout.state / f"{name}.json")


def _logs(layout: Layout) -> list[Path]:
    found = [layout.logs / "workload.log", layout.logs / "workload.log.1"]
    with contextlib.suppress(RelfleetError):
        found.append(type(layout.root)(load_agent(layout).log_file or layout.logs / "agent.log"))
    return [path for path in found if disk.is_file(path)]


def _tail(_layout: Layout, path: Path) -> str:
    handle = disk.open(path, os.O_RDONLY)
    try:
        length = disk.fstat(handle).st_size
        begins = max(0, length - MOST_TAIL)
        content = disk.pread(handle, MOST_TAIL, begins)
    finally:
        disk.close(handle)
    text = content.decode("utf-8", "replace")
    # A line that is cut in front could have lost what its secret is known by.
    return text.partition("\n")[2] if begins else text


PARTS: dict[str, Callable[[Layout], Any]] = {
    "status.json": lambda layout: told(look(layout.root)),
    "why.json": lambda layout: explained(look(layout.root)),
    "doctor.json": lambda layout: [one.to_json() for one in doctor.examine(layout.root, clock.now())],
    "record.json": _record,
    "settings.json": _settings,
    "environment.json": _environment,
    "versions.json": _versions,
    "metadata.json": _metadata,
    "system.json": _system,
    "files.txt": _files,
}
