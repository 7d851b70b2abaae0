"""What is so, written as a fleet file. Pure."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from release_server.publish.fleet_file import DEFAULTS, SETTINGS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence


def write(product: str, cohorts: Sequence[Mapping[str, Any]]) -> str:
    """The cohorts of a product, as the API tells them; read again the file changes nothing."""
    lines = [f"product = {_quoted(product)}", *(line for each in cohorts for line in _lines(each))]
    return "\n".join(lines) + "\n"


def _lines(cohort: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    yield f"[cohorts.{_key(cohort['name'])}]"
    for key, name in [(key, name) for key, (name, _) in SETTINGS.items()] + [("calendar", "calendar")]:
        value = cohort.get(name, DEFAULTS[name])
        if key == "match" or value != DEFAULTS[name]:
            yield f"{key} = {shown(name, value)}"
    freeze = freeze_by_hand(cohort)
    if cohort.get("pin"):
        yield f"pin = {_quoted(cohort['pin'])}"
    if freeze is not None:
        yield f"frozen_until = {freeze['until']}" if freeze.get("until") else "frozen = true"
    if cohort.get("pin") or freeze is not None:
        yield f"reason = {_quoted(cohort.get('reason') or 'as it was found')}"


def freeze_by_hand(cohort: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a person froze, `{until}`, whatever the calendar says; also by a server without calendars."""
    if "freeze" in cohort:
        freeze: Mapping[str, Any] | None = cohort["freeze"]
        return freeze
    return {"until": cohort.get("frozen_until")} if cohort.get("frozen") else None


def shown(name: str, value: Any) -> str:
    """A setting as the file has it, by the API's name for it."""
    match name, value:
        case _, bool():
            return "true" if value else "false"
        case "window", None:
            return '"always"'
        case "lease" | "budget", None:
            return '"none"'
        case "window", _:
            return _quoted(f"{','.join(value['days'])} {value['from']}-{value['to']} {value['zone']}")
        case "lease", _:
            return _quoted(f"{value['scope']}={_most(value)}")
        case "budget", _:
            return _quoted(f"{value['scope']}={value['bytes_per_s']},{value['at_once']}")
        case "calendar", _:
            return (
                "{ " + ", ".join(f"{_key(entry)} = {_quoted(text)}" for entry, text in value.items()) + " }"
            )
        case _, int() if name.endswith("_s"):
            return _quoted(f"{value}s")
        case _, int():
            return str(value)
        case _:
            return _quoted(str(value))


def _most(lease: Mapping[str, Any]) -> str:
    limit, share = lease.get("limit"), lease.get("share_bp")
    said = [None if limit is None else str(limit), None if share is None else f"{share / 100:g}%"]
    return ",".join(filter(None, said))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _quoted(name)
