"""This module is what a candidate does with its trial, and what an operator types, in the stories that are told."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from unittest.mock import patch

from agent_core import slots
from agent_core.errors import RelfleetError
from tests.crash.script import OLD_LAUNCHER, BrokenPromise
from updater import launchers

if TYPE_CHECKING:
    from agent_core.layout import Layout
    from tests.crash.life import Host


# --- a candidate ------------------------------------------------------------------------------------------


def commit(host: Host) -> None:
    record = host.record()
    host.promise(goods=host.ledger.goods | {record.candidate})
    slots.commit(host.root, record.candidate)
    host.promise(goods=frozenset({record.candidate}), tries="")


def roll_back(host: Host) -> None:
    record = host.record()
    slots.roll_back(host.root, "unhealthy")
    host.promise(skipped=host.ledger.skipped | {slots.digest_of(record.candidate)}, tries="")


def crash(_host: Host) -> None:
    """It ends at once; its boot stays counted."""


def stop_cleanly(host: Host) -> None:
    host.promise(refunds=host.ledger.refunds + 1)
    slots.refund(host.root)


# --- an operator ------------------------------------------------------------------------------------------


def go_back(host: Host, to: str = "") -> None:
    """`agent rollback`, to the version before or to one by name."""
    record = host.record()
    if record.phase == slots.IDLE:
        goods = host.ledger.goods | {to or record.previous}
        host.promise(goods=goods, left=host.ledger.left | slots.kept(record))
    after = slots.go_back(host.root, to=to)
    skipped = host.ledger.skipped | {slots.digest_of(after.tried)}
    host.promise(goods=frozenset({after.good}), skipped=skipped, tries="", asked=True)


def choose_damaged(host: Host, to: str) -> None:
    """`agent rollback --to` a version that has lost a file; typed again when the disk did not say so."""
    try:
        slots.go_back(host.root, to=to)
    except slots.IllegalTransitionError as error:
        if error.reason != "not-found":
            raise
    else:
        raise BrokenPromise(f"{to} was gone back to, which is damaged")


def upgrade_launcher(host: Host) -> None:
    """`agent upgrade-launcher`. That the new one proves itself is another test's matter; here it says so."""
    with patch.object(launchers, "prove", lambda _layout, file: _proved(host, file)):
        launchers.upgrade(host.layout)


def refuse_launcher(host: Host) -> None:
    """The same, and the new one does not prove itself."""

    def prove(_layout: Layout, _file: Path) -> None:
        raise RelfleetError("it decides otherwise", reason="self-test")

    with patch.object(launchers, "prove", prove):
        try:
            launchers.upgrade(host.layout)
        except RelfleetError as error:
            if error.reason != "self-test":
                raise


def bring_launcher_back(host: Host) -> None:
    """`agent upgrade-launcher --back`, typed by somebody who looks first."""
    if host.layout.launcher_file.read_bytes() == OLD_LAUNCHER:
        return
    with patch.object(launchers, "prove", lambda _layout, file: _proved(host, file)):
        launchers.go_back(host.layout)


def _proved(host: Host, file: Path) -> None:
    host.promise(launchers=host.ledger.launchers | {file.read_bytes()})
