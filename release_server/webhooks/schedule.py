"""This module decides when a delivery is tried again, and when it is given up; pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

LEAST, MOST = timedelta(seconds=5), timedelta(hours=1)
LONGEST = timedelta(days=3)
"""What a receiver has not taken by then, since it was put into the outbox, is dead."""
REFUSALS = 12
"""So often a receiver may refuse one body (about three hours) before it no longer holds up the next ones."""
PASSING = frozenset({408, 409, 425, 429})
"""Statuses of the fours that say `later` rather than `never`."""


@dataclass(frozen=True)
class Answer:
    """What has come of one try.

    Attributes:
        took: whether the receiver answered 2xx.
        says: for people; never a word of the receiver's, nor of its URL.
        refused: it understood, and does not want it.
        later: how long it asks to be left alone.
    """

    took: bool
    says: str
    refused: bool = False
    later: timedelta | None = None


def answer_of(status: int, retry_after: str | None) -> Answer:
    """Read a status; everything but 2xx is a failure, a redirect too."""
    if 200 <= status < 300:
        return Answer(True, str(status))
    later = timedelta(seconds=int(retry_after[:9])) if retry_after and retry_after.isdecimal() else None
    refused = 400 <= status < 500 and status not in PASSING
    return Answer(False, str(status), refused, later)


def pause(failures: int, spread: float, later: timedelta | None = None) -> timedelta:
    """How long a receiver is left alone after so many failures in a row, the last one included.

    Args:
        spread: a random number in [0, 1), so that what failed together is not tried together.
        later: what the receiver asked for; it may lengthen a pause, up to `MOST`.
    """
    doubled: timedelta = min(LEAST * 2 ** min(failures - 1, 20), MOST)
    return max(doubled * (0.5 + spread / 2), min(later or timedelta(0), MOST))


def is_dead(age: timedelta, tries: int, answer: Answer) -> bool:
    """Whether a delivery that failed again is given up.

    Args:
        age: since it was put into the outbox.
        tries: so far, this one included.
    """
    return age >= LONGEST or (answer.refused and tries >= REFUSALS)
