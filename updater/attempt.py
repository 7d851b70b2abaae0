"""The attempt in progress: which release this host is trying, and what became of it.

The record says how a trial ended, whoever ended it (the agent, the launcher, the dead-man, a power cut).
So the end of an attempt is read off the record at every start, by `settled`, and reported once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Self

from agent_core.errors import RelfleetError
from agent_core.late import late_dataclass
from agent_core.layout import read_json, write_json
from agent_core.wire import AttemptState, Getter, Reason

if TYPE_CHECKING:
    from pathlib import Path

    from agent_core.slots import Record

ENDED = frozenset({AttemptState.HEALTHY, AttemptState.ROLLED_BACK, AttemptState.FAILED, AttemptState.SKIPPED})
BEFORE_TRIAL = frozenset({AttemptState.DOWNLOADING, AttemptState.STAGED})


@late_dataclass(frozen=True)
class Attempt:
    """One release being tried here; `salt` names the rollout that asked, `digest` is DIGEST12."""

    version: str
    digest: str
    salt: str
    state: AttemptState
    reason: str = ""
    detail: str = ""

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
    reason = next((entry[1] for entry in record.skip if entry[0] == attempt.digest), None)
    if reason is not None and attempt.state in (AttemptState.STAGED, AttemptState.TRIAL):
        return attempt.to(AttemptState.ROLLED_BACK, reason, record.reason if record.reason != reason else "")
    return None


def load(file: Path) -> Attempt | None:
    """The attempt as last written; None when there is none or it cannot be read."""
    try:
        body = read_json(file)
        return None if body is None else Attempt.from_json(body)
    except RelfleetError:
        return None


def save(file: Path, attempt: Attempt) -> None:
    write_json(file, attempt.to_json())
