"""Errors sort by what the caller should do next."""

from __future__ import annotations

import inspect

import pytest

from agent_core import errors
from agent_core.errors import Exit, RelfleetError, UnreachableError

TREE = [
    (errors.RelfleetError, "failed", Exit.FAILED, False),
    (errors.UsageError, "usage", Exit.USAGE, False),
    (errors.SettingsError, "bad-settings", Exit.USAGE, False),
    (errors.MalformedError, "malformed", Exit.USAGE, False),
    (errors.TrustError, "untrusted", Exit.TRUST, False),
    (errors.NotAllowedError, "not-allowed", Exit.NOT_ALLOWED, False),
    (errors.ConflictError, "conflict", Exit.CONFLICT, False),
    (errors.NotFoundError, "not-found", Exit.NOT_FOUND, False),
    (errors.UnreachableError, "unreachable", Exit.UNREACHABLE, True),
    (errors.DiskError, "disk", Exit.FAILED, True),
]


@pytest.mark.parametrize(("kind", "reason", "code", "retry"), TREE, ids=[row[0].__name__ for row in TREE])
def test_each_error_has_its_reason_exit_code_and_retry(
    kind: type[RelfleetError], reason: str, code: Exit, retry: bool
) -> None:
    error = kind("it broke")
    assert (error.reason, error.exit_code, error.retry) == (reason, code, retry)
    assert isinstance(error, RelfleetError)


def test_the_table_above_holds_every_error_of_the_module() -> None:
    defined = {
        kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, RelfleetError)
    }
    assert defined == {row[0] for row in TREE}


def test_a_trust_error_is_never_retried() -> None:
    assert not errors.TrustError("the signature does not fit", reason="bad-signature").retry


def test_exit_codes_are_the_ones_scripts_rely_on() -> None:
    assert {code.name: int(code) for code in Exit} == {
        "DONE": 0,
        "FAILED": 1,
        "USAGE": 2,
        "TRUST": 3,
        "NOT_ALLOWED": 4,
        "HALTED": 5,
        "CONFLICT": 6,
        "NOT_FOUND": 7,
        "UNREACHABLE": 8,
        "UPDATED": 10,
        "ROLLED_BACK": 11,
        "RESTART": 75,
        "INTERRUPTED": 130,
    }


@pytest.mark.parametrize(
    ("why", "then", "text"),
    [
        ("", "", "the push failed"),
        ("the disk is full", "", "the push failed: the disk is full"),
        ("", "free some room", "the push failed\n  next: free some room"),
        ("the disk is full", "free some room", "the push failed: the disk is full\n  next: free some room"),
    ],
    ids=["what", "what and why", "what and next", "all three"],
)
def test_a_message_says_what_then_why_then_what_to_type(why: str, then: str, text: str) -> None:
    assert str(RelfleetError("the push failed", why=why, then=then)) == text


def test_a_reason_of_its_own_replaces_the_class_default_for_that_error_only() -> None:
    assert errors.TrustError("no", reason="expired").reason == "expired"
    assert errors.TrustError("no").reason == "untrusted"


@pytest.mark.parametrize("wait_s", [None, 0.0, 30.0])
def test_unreachable_keeps_how_long_the_other_end_asked_us_to_wait(wait_s: float | None) -> None:
    error = UnreachableError("the server is busy", why="503", reason="overloaded", retry_after_s=wait_s)
    assert (error.retry_after_s, error.reason, str(error)) == (
        wait_s,
        "overloaded",
        "the server is busy: 503",
    )
