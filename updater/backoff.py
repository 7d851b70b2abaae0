"""How long to wait after failures: exponential with full jitter, kept across restarts by whoever calls.

Full jitter (a random point between nothing and the bound) spreads a fleet that lost its server in the same
second over the whole bound, so it does not come back in step (case 38).
"""

from __future__ import annotations


def bound_s(failures: int, base_s: float, most_s: float) -> float:
    """The longest wait after so many failures in a row; 0 without a failure."""
    if failures <= 0:
        return 0.0
    return min(most_s, base_s * 2.0 ** min(failures - 1, 40))


def wait_s(
    failures: int, *, base_s: float, most_s: float, chance: float, retry_after_s: float | None = None
) -> float:
    """Seconds until the next try.

    Args:
        failures: in a row, this one included.
        base_s, most_s: the bound after the first failure, and the highest bound ever.
        chance: a random number in [0, 1), the caller's.
        retry_after_s: what the server asked for; never less than that, spread over half as much again.
    """
    wait = bound_s(failures, base_s, most_s) * chance
    if retry_after_s is not None:
        wait = max(wait, min(retry_after_s, most_s) * (1 + chance / 2))
    return wait


def ceiling_s(most_s: float) -> float:
    """What no wait passes, whatever the server asked for; a longer one was not computed here."""
    return most_s * 1.5


def jittered(period_s: float, chance: float) -> float:
    """A period spread by a tenth to either side, so that polls of a fleet drift apart."""
    return period_s * (0.9 + 0.2 * chance)
