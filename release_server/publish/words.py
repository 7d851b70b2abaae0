"""How what operators write is read, in a call and in a file: amounts, steps, labels, times, windows, limits.

Each reader takes a text and raises a ValueError that says what is wrong with it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import timedelta
from decimal import Decimal
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from agent_core import clock, console
from agent_core.errors import MalformedError, UsageError
from agent_core.wire import LABEL_KEY, PROGRESS_FULL, BudgetTerms, Window
from release_server import freezes, queries
from release_server.freezes import days

if TYPE_CHECKING:
    from collections.abc import Callable


def given(**values: Any) -> dict[str, Any]:
    """What was said; what was left out is not sent, so that the server's defaults hold."""
    return {name: value for name, value in values.items() if value is not None}


# --- amounts and steps -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Amount:
    """A share of a cohort in basis points, or a number of agents; exactly one of them."""

    share_bp: int | None = None
    count: int | None = None

    def as_reach(self) -> dict[str, int]:
        """How a stage says how far it reaches."""
        return given(share_bp=self.share_bp, count=self.count)

    def as_limit(self) -> dict[str, int]:
        """How a stage says what may fail."""
        return given(max_failed_bp=self.share_bp, max_failed=self.count)


def amount(text: str) -> Amount:
    """Read `10%`, `0.5%` or `20`.

    Raises:
        ValueError: anything else, more than all, or finer than a hundredth of a percent.
    """
    found = re.fullmatch(r"(\d{1,9})(?:\.(\d{1,9}))?\s*(%)?", text.strip())
    if found is None or (found[2] and not found[3]):
        raise ValueError(f"{text.strip()!r} is neither a share such as 10% nor a number of agents such as 20")
    if not found[3]:
        return Amount(count=int(found[1]))
    hundredths = (found[2] or "").rstrip("0")
    if len(hundredths) > 2:
        raise ValueError(f"{text.strip()!r} is finer than a hundredth of a percent")
    share_bp = int(found[1]) * 100 + int(hundredths.ljust(2, "0"))
    if share_bp > PROGRESS_FULL:
        raise ValueError(f"{text.strip()!r} is more than all")
    return Amount(share_bp=share_bp)


@dataclass(frozen=True)
class Step(Amount):
    """How far one step of a rollout reaches, and what is special about its gate."""

    gate: tuple[tuple[str, int], ...] = ()


def _seconds(key: str) -> Callable[[str], dict[str, int]]:
    return lambda text: {key: int(console.duration_s(text))}


def _count(key: str) -> Callable[[str], dict[str, int]]:
    return lambda text: {key: int(text)}


GATES: dict[str, Callable[[str], dict[str, int]]] = {
    "soak": _seconds("soak_s"),
    "deadline": _seconds("deadline_s"),
    "max-failed": lambda text: amount(text).as_limit(),
    "max-silent": _count("max_silent"),
    "min-sample": _count("min_sample"),
}


def step(text: str) -> Step:
    """Read `10%`, or `10%:soak=2h:max-failed=3`: a step with a gate of its own.

    Raises:
        ValueError: it cannot be read, or names something that a gate does not have.
    """
    reach, *said = text.split(":")
    size, gate = amount(reach), dict[str, int]()
    for part in said:
        name, equals, value = part.strip().partition("=")
        if not equals or name not in GATES:
            raise ValueError(f"{part.strip()!r} is not one of {', '.join(GATES)} with =VALUE")
        gate |= GATES[name](value)
    return Step(size.share_bp, size.count, tuple(gate.items()))


def steps(text: str) -> tuple[Step, ...]:
    """Read `1%,10%,100%` or `1,5,20:soak=1h`; shares grow, and so do counts.

    Raises:
        ValueError: a step that cannot be read, reaches nobody, or does not reach further than the one before.
    """
    found = tuple(step(part) for part in text.split(",") if part.strip())
    if not found:
        raise ValueError("there is no step")
    for kind in ("share_bp", "count"):
        sizes = [size for step in found if (size := getattr(step, kind)) is not None]
        if 0 in sizes:
            raise ValueError("a step of 0 reaches nobody")
        if any(late <= early for early, late in pairwise(sizes)):
            raise ValueError("each step must reach further than the one before")
    return found


# --- names, times, windows -------------------------------------------------------------------------------


def rollout_number(text: str) -> int:
    """Read `r-31` or `31`."""
    found = re.fullmatch(r"(?:r-)?([1-9]\d{0,17})", text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is not a rollout such as r-31")
    return int(found[1])


def label(text: str) -> tuple[str, str]:
    """Read `region=eu`."""
    name, equals, value = text.partition("=")
    if not equals or not LABEL_KEY.fullmatch(name):
        raise ValueError(f"{text!r} is not a label such as region=eu")
    return name, value


def labels(text: str) -> list[tuple[str, str]]:
    """Read `region=eu,tier=web`."""
    return [label(part.strip()) for part in text.split(",") if part.strip()]


def moment(text: str) -> str:
    """Read a time, `2026-12-27T08:00:00Z`, or how far from now it is, `36h`; the wire's form."""
    return _moment(text, 1)


def past_moment(text: str) -> str:
    """As `moment`, but a duration counts back from now."""
    return _moment(text, -1)


def _moment(text: str, sign: int) -> str:
    try:
        return clock.iso(clock.parse_iso(text))
    except ValueError:
        pass
    try:
        return clock.iso(clock.now() + sign * timedelta(seconds=console.duration_s(text)))
    except (ValueError, OverflowError):
        raise ValueError(
            f"{text!r} is neither a time such as 2026-12-27T08:00:00Z nor a duration such as 36h"
        ) from None


ALWAYS, NONE = "always", "none"


def window(text: str) -> dict[str, Any] | str:
    """Read `mon-fri 22:00-04:00 Europe/Berlin` (days, hours, time zone), or `always`."""
    if text.strip() == ALWAYS:
        return ALWAYS
    parts = text.split()
    hours = parts[1].split("-") if len(parts) == 3 else []
    if len(hours) != 2:
        raise ValueError(f"{text!r} is not a window such as 'mon-fri 22:00-04:00 Europe/Berlin'")
    _check_zone(parts[2])
    said = {"days": days(parts[0]), "from": hours[0], "to": hours[1], "zone": parts[2]}
    try:
        return Window.from_json(said, "window").to_json()
    except MalformedError as error:
        raise ValueError(f"{error.what}: {error.why}") from None


def lease(text: str) -> dict[str, Any] | str:
    """Read `site=2`, `rack=10%`, `site=2,10%` (the smaller of both), or `none`.

    It is how many of one failure domain may be at it at once.
    """
    if text.strip() == NONE:
        return NONE
    scope, equals, most = text.partition("=")
    sizes = [amount(part) for part in most.split(",")] if equals else []
    said: dict[str, int] = {}
    for size in sizes:
        said |= given(limit=size.count, share_bp=size.share_bp)
    if not LABEL_KEY.fullmatch(scope.strip()) or not said or len(said) < len(sizes) or 0 in said.values():
        raise ValueError(f"{text!r} is not a lease such as site=2, rack=10% or site=2,10%")
    return {"scope": scope.strip(), **said}


UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}


def rate(text: str) -> int:
    """Read bytes a second: `500kB`, `1.5MB` or `4096`."""
    found = re.fullmatch(r"(\d{1,10}(?:\.\d{1,3})?)\s*(k|M|G)?B?(?:/s)?", text.strip())
    if found is None:
        raise ValueError(f"{text.strip()!r} is not so many bytes a second, such as 500kB or 1.5MB")
    return int(Decimal(found[1]) * UNITS[found[2] or ""])


def budget(text: str) -> dict[str, Any] | str:
    """Read `site=500kB` (a second), `site=2MB,4` (for four at once, a quarter each), or `none`."""
    if text.strip() == NONE:
        return NONE
    scope, equals, most = text.partition("=")
    bytes_per_s, comma, at_once = most.partition(",")
    form = LABEL_KEY.fullmatch(scope.strip()) and (not comma or re.fullmatch(r"\s*\d{1,4}\s*", at_once))
    if not equals or not form:
        raise ValueError(f"{text!r} is not a budget such as site=500kB or site=2MB,4")
    said = {"scope": scope.strip(), "bytes_per_s": rate(bytes_per_s), "at_once": int(at_once or 1)}
    try:
        return BudgetTerms.from_json(said, "budget").to_json()
    except MalformedError as error:
        raise ValueError(f"{error.what}: {error.why}") from None


def match(text: str) -> str:
    """Read a query as cohorts have it, and give it back as it stands."""
    try:
        queries.parse(text)
    except UsageError as error:
        raise ValueError(f"{error.what}: {error.why}") from None
    return text.strip()


def calendar_entry(text: str) -> tuple[str, str] | str:
    """Read `year-end=12-20..01-04 Europe/Berlin`, or `none`; forms as of `freezes`."""
    if text.strip() == NONE:
        return NONE
    name, equals, entry = text.partition("=")
    if not equals:
        raise ValueError(f"{text!r} is not NAME=WHEN ZONE such as 'year-end=12-20..01-04 Europe/Berlin'")
    return next(iter(freezes.check({name.strip(): entry}).items()))


def _check_zone(zone: str) -> None:
    from zoneinfo import ZoneInfo

    try:
        ZoneInfo(zone)
    except (KeyError, OSError, ValueError):
        raise ValueError(f"{zone!r} is not a time zone this host knows, such as Europe/Berlin") from None
