"""The attempt in progress: which release this host is trying, and what became of it.

The record says how a trial ended, whoever ended it (the agent, the launcher, the dead-man, a power cut).
So the end of an attempt is read off the record at every start, by `settled`, and reported once.
"""

from __future__ import annotations

import fcntl
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from agent_core import disk, slots
from agent_core.errors import ConflictError, RelfleetError
from agent_core.late import late_dataclass
from agent_core.layout import read_json
from agent_core.wire import AttemptState, Getter, Reason
from updater import notes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from agent_core.layout import Layout
    from agent_core.slots import Record

ENDED = frozenset({AttemptState.HEALTHY, AttemptState.ROLLED_BACK, AttemptState.FAILED, AttemptState.SKIPPED})
BEFORE_TRIAL = frozenset({AttemptState.DOWNLOADING, AttemptState.STAGED})
_PATIENCE_S = 10.0
"""More than a step of the record waits for its own lock; who is stopped in between must not stop an agent."""


@late_dataclass(frozen=True)
class Attempt:
    """One release being tried here; `salt` names the rollout that asked, `digest` is DIGEST12.

    `retry_epoch` is the directive's by which this try began: an earlier one's skip is not this one's end.
    """

    version: str
    digest: str
    salt: str
    state: AttemptState
    reason: str = ""
    detail: str = ""
    retry_epoch: int = 0

    @property
    def name(self) -> str:
        """Its directory under `versions/`."""
        return f"{self.version}-{self.digest}"

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED

    def is_for(self, version: str, digest: str, salt: str) -> bool:
        return (self.version, self.digest, self.salt) == (version, digest, salt)

    def to(self, state: AttemptState, reason: str = "", detail: str = "") -> Attempt:
        return replace(self, state=state, reason=reason, detail=detail[:500])

    def to_json(self) -> dict[str, Any]:
        return {
            "version": self.version,
            "digest": self.digest,
            "salt": self.salt,
            "state": str(self.state),
            "reason": self.reason,
            "detail": self.detail,
            "retry_epoch": self.retry_epoch,
        }

    @classmethod
    def from_json(cls, body: object, path: str = "attempt") -> Self:
        get = Getter(body, path)
        return cls(
            version=get.text("version"),
            digest=get.text("digest"),
            salt=get.text("salt"),
            state=get.choice("state", AttemptState),
            reason=get.text("reason", ""),
            detail=get.text("detail", ""),
            retry_epoch=get.integer("retry_epoch", 0),
        )


def settled(attempt: Attempt | None, record: Record) -> Attempt | None:
    """What the record adds to the attempt, or None when it adds nothing.

    Args:
        attempt: as last written.
        record: as it is now.

    Returns:
        The attempt on trial, healthy or rolled back, with the reason the record gives.
    """
    if attempt is None or attempt.has_ended:
        return None
    if record.phase == "trial" and record.candidate == attempt.name:
        return attempt.to(AttemptState.TRIAL) if attempt.state is not AttemptState.TRIAL else None
    if record.phase != "idle":
        return None
    if record.good == attempt.name:
        return attempt.to(AttemptState.HEALTHY, Reason.OBSERVED)
    # A trial has ended with this skip, whatever its epoch; what is only staged, if the skip is of this try.
    since = {AttemptState.STAGED: attempt.retry_epoch, AttemptState.TRIAL: 0}.get(attempt.state)
    if since is None or not slots.skips(record, attempt.digest, since):
        return None
    reason = next(entry[1] for entry in record.skip if entry[0] == attempt.digest)
    words = attempt.detail or (record.reason if record.reason != reason else "")
    return attempt.to(AttemptState.ROLLED_BACK, reason, words)


@contextmanager
def alone(layout: Layout, patience_s: float | None = None) -> Iterator[None]:
    """Be the only one who changes the note of the attempt, or begins the trial that it tells of.

    The lock is on the directory, so it needs no file and works on a full disk.

    Args:
        layout: of this host.
        patience_s: how long to wait for somebody else who is at it; by default for a step of the record.

    Raises:
        ConflictError: somebody else has been at it for too long.
    """
    handle = disk.open_dir(layout.state)
    try:
        gives_up = time.monotonic() + (_PATIENCE_S if patience_s is None else patience_s)
        while True:
            try:
                disk.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > gives_up:
                    raise ConflictError("another process has the attempt", then="try again") from error
            time.sleep(0.02)
        yield
    finally:
        disk.close(handle)


def load(file: Path) -> Attempt | None:
    """The attempt as last written; None when there is none or it cannot be read."""
    try:
        body = read_json(file)
        return None if body is None else Attempt.from_json(body)
    except RelfleetError:
        return None


def save(file: Path, attempt: Attempt) -> None:
    notes.write(file, attempt.to_json())
