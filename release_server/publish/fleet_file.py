"""`fleet.toml`: what the cohorts of one product should be, as a file that lives under version control. Pure.

    product = "warehouse-agent"

    [cohorts.eu-web]
    match = "region=eu,tier=web"
    window = "mon-fri 22:00-04:00 Europe/Berlin"
    lease = "site=2"

A setting that is not there has its default. A pin or a freeze of which a cohort says nothing stays as it is:
what somebody stopped by hand in the night is not set going by the next commit.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from agent_core import console
from agent_core.clock import iso
from agent_core.errors import SettingsError
from agent_core.wire import NAME, VERSION
from release_server import freezes
from release_server.publish import words

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

DEFAULTS: dict[str, Any] = {
    "match": "",
    "priority": 0,
    "window": None,
    "lease": None,
    "budget": None,
    "poll_s": 60,
    "report_s": 300,
    "splay_s": 0,
    "approval": False,
    "calendar": {},
}
"""What a cohort is when its table says nothing."""


@dataclass(frozen=True)
class Wanted:
    """What one cohort should be.

    Attributes:
        settings: every key of `DEFAULTS`, as the API takes it.
        release: what its agents run from the start, where the cohort is made.
        pin: a version, "" for none, None where the file does not speak of it.
        frozen: likewise; `frozen_until` is None for a freeze without end.
        line: where its table is.
    """

    name: str
    settings: Mapping[str, Any]
    release: str | None = None
    pin: str | None = None
    frozen: bool | None = None
    frozen_until: str | None = None
    reason: str = ""
    line: int = 0


@dataclass(frozen=True)
class WantedPolicy:
    """What release keys should have signed: the oldest version that may be installed, and what is revoked."""

    floor: str | None = None
    revoked: tuple[str, ...] = ()


@dataclass(frozen=True)
class FleetFile:
    """One product's cohorts; `product` is None where the file leaves it to the call."""

    product: str | None = None
    cohorts: Mapping[str, Wanted] = field(default_factory=dict)
    policy: WantedPolicy | None = None


def read(text: str, name: str) -> FleetFile:
    """Read a fleet file.

    Args:
        name: how the file is called where it is spoken of.

    Raises:
        SettingsError: it cannot be used; the error names file, line and key.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"at line (\d+)", str(error))
        where = f"{name}:{place[1]}" if place else name
        raise SettingsError(f"{where} cannot be read", why=str(error)) from None
    return _Reader(text, name).fleet(document)


# --- values ----------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("it must be a text")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError("it must be a whole number")
    return value


def _yes_or_no(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError("it must be true or false")
    return value


def _seconds(value: Any) -> int:
    seconds = console.duration_s(_text(value))
    if seconds != int(seconds):
        raise ValueError(f"{value!r} is not a whole number of seconds")
    return int(seconds)


def _window(value: Any) -> dict[str, Any] | None:
    said = words.window(_text(value))
    return None if isinstance(said, str) else said


def _lease(value: Any) -> dict[str, Any] | None:
    said = words.lease(_text(value))
    return None if isinstance(said, str) else said


def _budget(value: Any) -> dict[str, Any] | None:
    said = words.budget(_text(value))
    return None if isinstance(said, str) else said


def _match(value: Any) -> str:
    return words.match(_text(value))


def _version(value: Any) -> str:
    if not VERSION.fullmatch(_text(value)):
        raise ValueError(f"{value!r} is not a version")
    return str(value)


def _pin(value: Any) -> str:
    return "" if value is False else _version(value)


def _moment(value: Any) -> str:
    if hasattr(value, "utcoffset"):
        if value.utcoffset() is None:
            raise ValueError("a time needs its zone: 2026-12-27T08:00:00Z")
        return iso(value)
    if not re.match(r"\d{4}-", _text(value)):  # a duration would end later with each look at the file
        raise ValueError(f"{value!r} is not a time such as 2026-12-27T08:00:00Z")
    return words.moment(value)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise TypeError("it must be a list")
    return tuple(map(_text, value))


def _versions(value: Any) -> tuple[str, ...]:
    return tuple(map(_version, _texts(value)))


def _entry(name: str) -> Callable[[Any], dict[str, str]]:
    return lambda value: freezes.check({name: _text(value)})


SETTINGS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "match": ("match", _match),
    "priority": ("priority", _whole),
    "window": ("window", _window),
    "lease": ("lease", _lease),
    "budget": ("budget", _budget),
    "poll": ("poll_s", _seconds),
    "report": ("report_s", _seconds),
    "splay": ("splay_s", _seconds),
    "approval": ("approval", _yes_or_no),
}
"""Keys of a cohort, what the API calls each, and how it is read."""
STANDING: dict[str, Callable[[Any], Any]] = {
    "release": _version,
    "pin": _pin,
    "frozen": _yes_or_no,
    "frozen_until": _moment,
    "reason": _text,
}
POLICY: dict[str, Callable[[Any], Any]] = {"floor": _version, "revoked": _versions}


# --- the file --------------------------------------------------------------------------------------------


class _Reader:
    """One file; every refusal names the line that it is about."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.lines = _places(text)
        self.calendars: dict[str, str] = {}

    def fleet(self, document: Mapping[str, Any]) -> FleetFile:
        self._check_keys((), document, ("product", "cohorts", "calendars", "policy"))
        product = self._value((), document, "product", _text)
        for name in self._table((), document, "calendars"):
            self.calendars |= self._value(("calendars",), document["calendars"], name, _entry(name))
        tables = self._table((), document, "cohorts")
        cohorts = {name: self._cohort(name, table) for name, table in tables.items()}
        policy = None
        if "policy" in document:
            table = self._table((), document, "policy")
            self._check_keys(("policy",), table, tuple(POLICY))
            policy = WantedPolicy(**{key: self._value(("policy",), table, key, POLICY[key]) for key in table})
        return FleetFile(product, cohorts, policy)

    def _cohort(self, name: str, table: Any) -> Wanted:
        path = ("cohorts", name)
        if not isinstance(table, dict):
            raise self._refusal(path, "it is not a table", f"write [cohorts.{name}]")
        if not NAME.fullmatch(name):
            raise self._refusal(path, f"a cohort's name has the form {NAME.pattern}")
        self._check_keys(path, table, (*SETTINGS, "calendar", *STANDING))
        readers = SETTINGS | {"calendar": ("calendar", self._calendar)}
        said = {to: self._value(path, table, key, how) for key, (to, how) in readers.items() if key in table}
        standing = {key: self._value(path, table, key, STANDING[key]) for key in STANDING if key in table}
        if "frozen_until" in standing and standing.setdefault("frozen", True) is False:
            raise self._refusal((*path, "frozen_until"), "the cohort is not frozen", "say frozen = true")
        if standing.get("reason", "") == "" and (standing.get("pin") or standing.get("frozen")):
            raise self._refusal(path, "a pin or a freeze needs a reason", 'say reason = "…"')
        return Wanted(name, DEFAULTS | said, **standing, line=self.lines.get(path, 0))

    def _calendar(self, value: Any) -> dict[str, str]:
        """A cohort's own entries, or those of `[calendars]` that it names."""
        if isinstance(value, dict):
            return freezes.check({name: _text(entry) for name, entry in value.items()})
        names = _texts(value)
        if unknown := [name for name in names if name not in self.calendars]:
            raise ValueError(f"[calendars] has no {unknown[0]}")
        return {name: self.calendars[name] for name in names}

    def _table(self, path: tuple[str, ...], document: Mapping[str, Any], key: str) -> Mapping[str, Any]:
        table = document.get(key, {})
        if not isinstance(table, dict):
            raise self._refusal((*path, key), "it is not a table", f"write [{key}]")
        return table

    def _value(
        self, path: tuple[str, ...], table: Mapping[str, Any], key: str, how: Callable[[Any], Any]
    ) -> Any:
        if key not in table:
            return None
        try:
            return how(table[key])
        except (ValueError, TypeError) as error:
            raise self._refusal((*path, key), str(error)) from None

    def _check_keys(self, path: tuple[str, ...], table: Mapping[str, Any], known: Sequence[str]) -> None:
        for key in table:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
                raise self._refusal((*path, key), "there is no such key", hint, "unknown-setting")

    def _refusal(
        self, path: tuple[str, ...], why: str, then: str = "", reason: str = SettingsError.reason
    ) -> SettingsError:
        line = next(
            (self.lines[path[:end]] for end in range(len(path), 0, -1) if path[:end] in self.lines), 0
        )
        where = f"{self.name}:{line}" if line else self.name
        return SettingsError(f"{where}: {'.'.join(path)} cannot be used", why=why, then=then, reason=reason)


def _places(text: str) -> dict[tuple[str, ...], int]:
    """In which line each table and each key of a readable file begins, as far as a line tells."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            said = tomllib.loads(line)
        except tomllib.TOMLDecodeError:  # a value of several lines begins here, or goes on
            key = re.match(r"\s*([\w-]+)\s*=", line)
            said = {key[1]: None} if key else {}
        path = _only_path(said)
        if line.lstrip().startswith("["):
            table = path
            found.setdefault(table, number)
        else:
            for end in range(1, len(path) + 1):
                found.setdefault((*table, *path[:end]), number)
    return found


def _only_path(said: Any) -> tuple[str, ...]:
    path: list[str] = []
    while isinstance(said, dict) and len(said) == 1:
        ((key, said),) = said.items()
        path.append(key)
    return tuple(path)
