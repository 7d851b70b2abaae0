"""What the commands of `agent` share: the root, one line for an outcome, and asking the agent."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent_core import console, disk, slots
from agent_core.errors import (
    ConflictError,
    DiskError,
    Exit,
    MalformedError,
    NotAllowedError,
    NotFoundError,
    SettingsError,
    TrustError,
    UnreachableError,
    UsageError,
)
from agent_core.layout import Layout
from agent_core.wire import Reason
from updater import control
from updater.decide import Action

if TYPE_CHECKING:
    from collections.abc import Callable

    from updater.control import Request
    from updater.device import Device, Outcome

DEFAULT_ROOT = "/var/lib/relfleet"

EXITS: dict[Exit, frozenset[str]] = {
    Exit.TRUST: frozenset(
        {
            *(TrustError.reason, Reason.BAD_SIGNATURE, Reason.EXPIRED, Reason.REPLAYED, Reason.BAD_METADATA),
            *(Reason.BAD_DELEGATION, Reason.BAD_DIRECTIVE, Reason.DIGEST_MISMATCH, Reason.LENGTH_MISMATCH),
            *(Reason.BAD_ARCHIVE, Reason.BAD_INDEX, Reason.BAD_ANSWER, Reason.BAD_CERTIFICATE),
            *(Reason.WRONG_PRODUCT, Reason.WRONG_PLATFORM, Reason.GATE, Reason.BELOW_FLOOR, Reason.REVOKED),
        }
    ),
    Exit.CONFLICT: frozenset(
        {ConflictError.reason, Reason.OLDER, Reason.STEPPING_STONE, Reason.OLD_LAUNCHER}
    ),
    Exit.NOT_FOUND: frozenset({NotFoundError.reason, Reason.NO_BUNDLE}),
    Exit.UNREACHABLE: frozenset({UnreachableError.reason, "timeout", Reason.OFFLINE, Reason.OVERLOADED}),
    Exit.NOT_ALLOWED: frozenset({NotAllowedError.reason}),
    Exit.USAGE: frozenset({UsageError.reason, SettingsError.reason, MalformedError.reason}),
}
"""By which code a refusal ends; those that are not here, such as a full disk, end with 1."""

_ROOT = ("--root",)
_ROOT_IS: dict[str, Any] = {
    "type": click.Path(path_type=Path, file_okay=False, resolve_path=True),
    "envvar": "RELFLEET_ROOT",
    "default": DEFAULT_ROOT,
    "show_default": True,
    "help": "The device's directory.",
}
root_option = click.option(*_ROOT, **_ROOT_IS)


def not_allowed(layout: Layout) -> NotAllowedError | None:
    """The refusal of who may not look into a root: a forgotten `sudo` must not look like a lost host."""
    if not disk.exists(layout.state) or os.access(layout.state, os.R_OK | os.X_OK, effective_ids=True):
        return None
    owner = layout.state.stat().st_uid
    return NotAllowedError(
        f"this user may not look into {layout.state}",
        why=f"it is user {owner}'s alone, and this is user {os.geteuid()}",
        then="the same with sudo, or as that user",
    )


def _may_look(_ctx: click.Context, _param: click.Parameter, root: Path) -> Path:
    if refusal := not_allowed(Layout(root)):
        raise refusal
    return root


own_root_option = click.option(*_ROOT, **_ROOT_IS, callback=_may_look)
"""The same, for what is of no use to who may not look into it."""


def sentence(outcome: Outcome, good: str = "") -> str:
    """One line that says what a check came to, by what is `good` since."""
    if outcome.candidate and outcome.candidate == good:
        return f"{outcome.version} was staged, and is good ({outcome.reason})"
    if outcome.candidate:
        return f"{outcome.version} is verified and staged ({outcome.reason})"
    word = {Action.STAY: "nothing to do", Action.REFUSE: "refused", Action.INSTALL: "to be installed"}
    verb = "failed" if outcome.failed and not outcome.verified else word[outcome.action]
    return f"{verb} ({outcome.reason}): {outcome.detail}".rstrip(": ")


def exit_of(reason: str) -> Exit:
    """The code by which a check ends that refused, or that could not be done (`docs/cli.md`)."""
    return next((code for code, reasons in EXITS.items() if reason in reasons), Exit.FAILED)


def need_root(root: Path) -> Layout:
    """The layout of a root that is there; a slip in `--root` is no host without versions.

    Raises:
        NotFoundError: nobody has enrolled this host there.
    """
    layout = Layout(root)
    if not disk.exists(layout.state):
        why = f"there is no {layout.state}"
        raise NotFoundError("this host is not enrolled", why=why, then="agent enroll; or give another --root")
    return layout


def unreadable(what: str, why: str) -> DiskError:
    """The disk does not say whether a version is whole, and nobody chooses one unseen; nothing was done."""
    then = "the same again, a read may fail once; agent doctor when it goes on"
    return DiskError(what, why=why, then=then, reason=slots.UNREADABLE)


def ask(device: Device, request: Request, done: Callable[[slots.Record], bool]) -> slots.Record:
    """Have the request carried out: here where no agent runs, else by the agent.

    Raises:
        ConflictError: the record does not allow it.
        DiskError: whether the version to go back to is whole could not be read.
        UnreachableError: the agent has not answered yet; it will when it looks.
    """
    with control.alone(device.layout) as is_alone:
        if is_alone:
            try:
                return control.carry_out(device, request)
            except slots.IllegalTransitionError as error:
                if error.reason == slots.UNREADABLE:
                    raise unreadable(f"cannot {request.verb}", str(error)) from error
                raise ConflictError(f"cannot {request.verb}", why=str(error), reason=error.reason) from error
    control.leave_request(device.layout, request)
    control.wake(device.layout)
    deadline = time.monotonic() + (console.options().timeout_s or 30.0)
    while time.monotonic() < deadline:
        is_answered = control.read_request(device.layout) is None
        record = slots.read(device.layout.root)
        if is_answered and record is not None:
            if done(record):
                return record
            raise ConflictError(
                f"the running agent did not {request.verb}",
                why="the record did not allow it any more, or could not be written; its log says which",
                then="agent status",
            )
        time.sleep(0.05)
    raise UnreachableError(
        "the running agent did not answer yet",
        why="the request is kept and will be carried out when it looks",
        then="agent status",
        reason="timeout",
    )
