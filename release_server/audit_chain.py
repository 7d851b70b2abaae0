"""What ties each entry of the audit log to the one before it; pure, for the server and for a checker.

The hash of an entry covers what it says and the hash before it. Who changes, drops, inserts or reorders
entries has to write every later hash anew, and the newest one is what people keep elsewhere (`Head`).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Self

from agent_core.errors import TrustError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

FIRST = "0" * 64
"""What the first entry of all names as the hash before it."""
SAID = ("id", "at", "actor", "action", "subject", "detail")
"""The fields that a hash covers, as the API shows them."""


@dataclass(frozen=True)
class Head:
    """The newest entry's number and hash: enough to tell later that nothing up to it was changed."""

    id: int = 0
    hash: str = FIRST

    def __str__(self) -> str:
        return f"{self.id}:{self.hash}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` wrote.

        Raises:
            ValueError: any other form.
        """
        found = re.fullmatch(r"(\d{1,18}):([0-9a-f]{64})", text.strip())
        if found is None:
            raise ValueError("a head looks like 142:9f86d0…, with 64 hexadecimal digits")
        return cls(int(found[1]), found[2])


NONE = Head()


def link(previous: str, entry: Mapping[str, Any]) -> str:
    """The hash of an entry: sha256 over its canonical JSON (sorted keys, no spaces, ASCII) and `previous`."""
    said = {name: entry[name] for name in SAID} | {"previous": previous}
    return sha256(json.dumps(said, separators=(",", ":"), sort_keys=True).encode()).hexdigest()


def follow(entries: Iterable[Mapping[str, Any]], *, start: Head = NONE, known: Head | None = None) -> Head:
    """Walk the log, the oldest entry first.

    Args:
        start: the entry before, when it is not walked from its beginning.
        known: a head that was noted earlier and must be found again.

    Returns:
        The head, to be compared with the one that the server names.

    Raises:
        TrustError: `audit-broken`, naming the first entry that does not follow from the one before.
    """
    head, met = start, known in (None, start)
    for entry in entries:
        head = _step(head, entry)
        if known is not None and head.id == known.id:
            if head != known:
                raise broken(f"entry {head.id} is not the one that was noted as {known}")
            met = True
    if not met:
        raise broken(f"entry {known.id if known else 0}, which was noted, is not in it")
    return head


def _step(head: Head, entry: Mapping[str, Any]) -> Head:
    try:
        number = int(entry["id"])
        follows = number > head.id and entry["previous"] == head.hash
        same = entry["hash"] == link(head.hash, entry)
    except (KeyError, TypeError, ValueError):
        raise broken(f"what follows entry {head.id} is no entry") from None
    if not follows:
        raise broken(f"entry {number} does not follow from entry {head.id}")
    if not same:
        raise broken(f"entry {number} was changed")
    return Head(number, str(entry["hash"]))


def check_end(found: Head, named: Head) -> None:
    """Refuse a log whose last entry is not the one that the server wrote last."""
    if found.id != named.id:
        raise broken(f"it ends with entry {found.id}, and {named.id} was written last")
    if found != named:
        raise broken(f"entry {found.id} is not the one that was written")


def broken(why: str) -> TrustError:
    return TrustError(
        "the audit log is broken",
        why=why,
        then="compare it with an earlier `release audit export` to see what was changed",
        reason="audit-broken",
    )
