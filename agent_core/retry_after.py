"""`Retry-After`: for how long a server asks to be left alone."""

from __future__ import annotations

from email.utils import parsedate_to_datetime

from agent_core import clock

MOST_S = 86_400.0


def retry_after_s(text: str | None) -> float | None:
    """Read the header, seconds or a date (RFC 9110, 10.2.3).

    Returns:
        Seconds from now, at most a day; None when it is absent or no such thing.
    """
    text = (text or "").strip(" \t")
    if text.isascii() and text.isdigit():
        return min(float(text), MOST_S)
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    if moment.tzinfo is None:
        return None
    return min(max((moment - clock.now()).total_seconds(), 0.0), MOST_S)
