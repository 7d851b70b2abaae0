"""Whether this host may leave its version now: never too many of one failure domain at once.

Asked when the version is staged and before its `pre_activate` runs, which may take the host out of service. A
server that cannot be asked is a reason to wait, and never one to fail (design section 3).
"""

from __future__ import annotations

import random
from datetime import timedelta
from typing import TYPE_CHECKING

from agent_core.errors import RelfleetError, UnreachableError
from agent_core.late import late_dataclass
from agent_core.wire import LeaseRequest
from updater import server
from updater.backoff import jittered, wait_s

if TYPE_CHECKING:
    from agent_core.wire import Directive
    from updater.device import Device

AGAIN_S = 60.0
"""How soon it asks once more when it was not told."""


@late_dataclass(frozen=True)
class Wait:
    """Not now: why, and after how long to ask again."""

    detail: str
    again: timedelta


def ask(device: Device, directive: Directive, version: str) -> Wait | None:
    """Ask for a lease where the directive wants one; None when the version may be activated.

    The first version of a host needs none: nothing goes out of service by it.
    """
    if directive.lease is None or device.running() is None:
        return None
    try:
        answer = server.ask_lease(device.transport(), device.identity, device.layout, LeaseRequest(version))
    except RelfleetError as error:
        return untold(device, f"no lease for its {directive.lease.scope} could be asked for: {error}", error)
    return None if answer.granted else wait(answer.detail, answer.again_s or AGAIN_S)


def wait(detail: str, again_s: float) -> Wait:
    """Not now, for about so long: hosts that were told the same do not come back in step."""
    chance = random.random()  # noqa: S311 - jitter is no secret
    return Wait(detail[:500], timedelta(seconds=jittered(again_s, chance)))


def untold(device: Device, detail: str, error: RelfleetError) -> Wait:
    """Not now, since it could not be asked; never sooner than a server that is overloaded asks for."""
    asked_s = error.retry_after_s if isinstance(error, UnreachableError) else None
    chance = random.random()  # noqa: S311 - jitter is no secret
    most_s = device.settings.poll_max_backoff_s
    least_s = wait_s(0, base_s=0.0, most_s=most_s, chance=chance, retry_after_s=asked_s)
    return Wait(detail[:500], timedelta(seconds=max(jittered(AGAIN_S, chance), least_s)))
