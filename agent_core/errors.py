"""The errors people and programs meet, sorted by what the caller should do next."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Exit codes of every command; scripts rely on them (see `docs/cli.md`)."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    TRUST = 3
    NOT_ALLOWED = 4
    HALTED = 5
    CONFLICT = 6
    NOT_FOUND = 7
    UNREACHABLE = 8
    UPDATED = 10
    ROLLED_BACK = 11
    RESTART = 75
    INTERRUPTED = 130


class RelfleetError(Exception):
    """Something a caller can act on: what happened, why, and what to do next.

    Args:
        what: one clause naming what failed.
        why: the cause, as far as it is known.
        then: what to type or check next.
        reason: stable code for the wire, metrics and tests; the class default otherwise.
    """

    reason = "failed"
    exit_code = Exit.FAILED
    retry = False

    def __init__(self, what: str, *, why: str = "", then: str = "", reason: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.why = why
        self.then = then
        if reason is not None:
            self.reason = reason

    def __str__(self) -> str:
        text = self.what
        if self.why:
            text += f": {self.why}"
        if self.then:
            text += f"\n  next: {self.then}"
        return text


class UsageError(RelfleetError):
    """The words of the call or of a file are off; nothing was done."""

    reason = "usage"
    exit_code = Exit.USAGE


class SettingsError(UsageError):
    """A settings file or variable cannot be used."""

    reason = "bad-settings"


class MalformedError(RelfleetError):
    """Bytes from outside do not have the agreed shape."""

    reason = "malformed"
    exit_code = Exit.USAGE


class TrustError(RelfleetError):
    """A signature, digest, version or path is not what the keys allow. Never retry unchanged."""

    reason = "untrusted"
    exit_code = Exit.TRUST


class NotAllowedError(RelfleetError):
    """Not signed in, or the token lacks the scope."""

    reason = "not-allowed"
    exit_code = Exit.NOT_ALLOWED


class ConflictError(RelfleetError):
    """The thing changed meanwhile, is frozen, or exists already."""

    reason = "conflict"
    exit_code = Exit.CONFLICT


class NotFoundError(RelfleetError):
    """There is no such thing."""

    reason = "not-found"
    exit_code = Exit.NOT_FOUND


class UnreachableError(RelfleetError):
    """The other end is away or overloaded; the same call may work later.

    Args:
        retry_after_s: seconds the other end asked us to wait, or None when it did not say.
    """

    reason = "unreachable"
    exit_code = Exit.UNREACHABLE
    retry = True

    def __init__(
        self,
        what: str,
        *,
        why: str = "",
        then: str = "",
        reason: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(what, why=why, then=then, reason=reason)
        self.retry_after_s = retry_after_s


class DiskError(RelfleetError):
    """The disk is full, read-only or failing."""

    reason = "disk"
    retry = True
