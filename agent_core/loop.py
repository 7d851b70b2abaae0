"""What the children of the agent's loop see of it, and it of them; `runtime` is the one that runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable


class Timer:
    """One call in the future; `cancel` may come at any time."""

    def __init__(self, when_s: float, action: Callable[[], None]) -> None:
        self.when_s = when_s
        self.action: Callable[[], None] | None = action

    def cancel(self) -> None:
        self.action = None


class Child(Protocol):
    """A process that the loop watches from `adopt` to `disown`."""

    def reap(self) -> None:
        """Notice that it has ended; called in each turn, and does nothing while it runs."""

    def stop(self) -> None:
        """Ask it to end; must be idempotent."""

    def kill(self) -> None:
        """End it without asking."""


class Loop(Protocol):
    """The promises are those of `runtime.Runtime`."""

    @property
    def now_s(self) -> Callable[[], float]: ...
    @property
    def is_stopping(self) -> bool: ...
    def call_later(self, delay_s: float, action: Callable[[], None]) -> Timer: ...
    def call_soon(self, action: Callable[[], None]) -> None: ...
    def adopt(self, child: Child) -> None: ...
    def disown(self, child: Child) -> None: ...
    def read_from(self, fd: int, take: Callable[[bytes], None]) -> None: ...
    def drain(self, fd: int, take: Callable[[bytes], None]) -> None: ...
