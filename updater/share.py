"""How fast this host may download: by its own ceiling, and by its share of its site's budget if there is one.

Asked for before the first byte, and anew while bytes come. What the server gave ends here before it ends
there: a host that cannot ask again in time stops, keeps what has come, and goes on with another check. So
does one whose share makes the transfer longer than a check may be.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Self

from agent_core import clock
from agent_core.errors import RelfleetError
from agent_core.wire import LEAST_SHARE_BPS, Reason, ShareRequest
from updater import lease, server

if TYPE_CHECKING:
    from agent_core.wire import BudgetTerms, ShareAnswer
    from updater.device import Device

LEAST_S = 20.0
"""A share of less time is none: it would be asked for with almost every piece."""
LEAVE_S = 120.0
"""How long before the end of its time a transfer ends itself: more than one piece makes it wait."""


class NoShareError(RelfleetError):
    """Nothing may be downloaded now; `wait` says why, and after how long to ask again."""

    reason = str(Reason.BUDGET)
    retry = True

    def __init__(self, wait: lease.Wait) -> None:
        super().__init__("the download waits", why=wait.detail)
        self.wait = wait


class Line:
    """The way of one release to this host; at its end the share is given back.

    Args:
        budget: of its cohort; without one only the host's own ceiling counts.
        until_s: by the boot clock, when `download.deadline_s` is over; under a budget it ends itself before.
    """

    def __init__(self, device: Device, budget: BudgetTerms | None, version: str, until_s: float) -> None:
        self._device, self._budget, self._version = device, budget, version
        self._own_bps = device.settings.download_rate_bps
        self._given_bps = 0
        self._ask_at_s = self._until_s = 0.0
        self._leave_at_s = until_s - min(LEAVE_S, device.settings.download_deadline_s / 2)

    @property
    def is_budgeted(self) -> bool:
        return self._budget is not None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Give back what it has; the next `ceiling` asks anew."""
        if not self._given_bps:
            return
        self._given_bps, self._ask_at_s, self._until_s = 0, 0.0, 0.0
        with suppress(RelfleetError):  # what is not heard ends by itself
            self._ask(done=True)

    def ceiling(self) -> float | None:
        """Bytes a second at most, from now on; None for any number.

        Raises:
            NoShareError: none, or the rest has to come with another check.
        """
        if self._budget is None:
            return self._own_bps or None
        now_s = clock.boot_s()
        if now_s >= self._leave_at_s:
            raise NoShareError(
                lease.wait("at its share it takes another check to download the rest", lease.AGAIN_S)
            )
        if now_s >= self._ask_at_s:
            self._renew(now_s)
        # Never above its own, whatever the server says.
        return min(self._given_bps, self._own_bps or self._given_bps)

    def _renew(self, now_s: float) -> None:
        try:
            answer = self._ask()
        except RelfleetError as error:
            wait = lease.untold(self._device, f"no share of the budget could be asked for: {error}", error)
            if clock.boot_s() >= self._until_s:
                raise NoShareError(wait) from error
            self._ask_at_s = min(clock.boot_s() + wait.again.total_seconds(), self._until_s)
            return
        # Less is no share but a drip: a transfer is not held open for years because the server says so.
        least_bps = min(LEAST_SHARE_BPS, self._own_bps or LEAST_SHARE_BPS)
        if answer.rate_bps < least_bps or answer.lasts_s < LEAST_S:
            detail = answer.detail or f"{answer.rate_bps} bytes a second for {answer.lasts_s} s are no share"
            raise NoShareError(lease.wait(detail, answer.again_s or lease.AGAIN_S))
        self._given_bps = answer.rate_bps
        self._until_s = now_s + answer.lasts_s  # the server counts from when it heard, which is later
        self._ask_at_s = now_s + answer.lasts_s / 2

    def _ask(self, *, done: bool = False) -> ShareAnswer:
        device, wanted = self._device, ShareRequest(self._version, self._own_bps, done)
        return server.ask_share(device.transport(), device.identity, device.layout, wanted)
