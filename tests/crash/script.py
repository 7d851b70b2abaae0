"""This module says what a story of the model tier is made of: how it begins, what happens, what is promised."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from tests.crash.bundles import FLOOR, Bundle, Offer, bundle, launcher_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.crash.journal import Tree
    from tests.crash.life import Host

P, A, B, C = (bundle(version) for version in ("0.9.0", "1.0.0", "1.1.0", "0.8.0"))
OLD_LAUNCHER, NEW_LAUNCHER = launcher_file(1), launcher_file(2)


class BrokenPromise(BaseException):
    """A promise that does not hold; the words say which. Nothing of the device may take it for a failure."""


class Ledger(NamedTuple):
    """What this host has promised so far, whatever happens to its power.

    Attributes:
        goods: what the record may call good.
        tries: the candidate that may be started, or nothing.
        starts: how often it was, since it was armed.
        refunds: boots it was given back.
        skipped: bundles that are never to be started again.
        floor: the highest that was remembered.
        asked: the operator's command was carried out.
        left: what the links may show besides, until they follow a record that does not know it any more.
        launchers: the contents of `launcher.pyz` that have proved themselves.
        begun: how often the download of the delta was begun.
        applied: how often the delta was applied.
    """

    goods: frozenset[str] = frozenset()
    tries: str = ""
    starts: int = 0
    refunds: int = 0
    skipped: frozenset[str] = frozenset()
    floor: int = 0
    asked: bool = False
    left: frozenset[str] = frozenset()
    launchers: frozenset[bytes] = frozenset({NEW_LAUNCHER})
    begun: int = 0
    applied: int = 0


INSTALLED = Ledger(goods=frozenset({A.name}), floor=FLOOR)


@dataclass(frozen=True)
class Script:
    """One story: how the disk is at first, what is published, and how the versions do.

    Attributes:
        name: of the story.
        tree: the disk at first.
        goal: the version that the server wants.
        good: what the record has to call good in the end.
        trial: what the candidate does with its trial; it is told the host.
        operator: what the operator types once, while a good version runs.
        whole: versions that have to be whole whenever something is started.
        skipped: bundles that have to be skipped in the end.
        floor: of the policy.
        offer: the delta that is published with the goal.
        launcher: what `launcher.pyz` has to be in the end.
        kept_launcher: what has to be `launcher.pyz` or the one before it, whatever happens.
        share: one of so many states, and of operations that fail, is looked at, unless all are asked for.
    """

    name: str
    tree: Tree
    goal: Bundle
    good: Bundle
    trial: Callable[[Host], None] | None = None
    operator: Callable[[Host], None] | None = None
    preflight: bool = True
    whole: tuple[Bundle, ...] = (A,)
    skipped: frozenset[str] = frozenset()
    floor: int = FLOOR
    ranges: bool = True
    ledger: Ledger = INSTALLED
    offer: Offer | None = None
    launcher: bytes = NEW_LAUNCHER
    kept_launcher: bytes = NEW_LAUNCHER
    share: int = 1
