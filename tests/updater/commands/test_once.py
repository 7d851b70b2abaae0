"""By how `agent once` ends a script knows what to do next."""

from __future__ import annotations

import pytest

from agent_core.errors import ConflictError, DiskError, RelfleetError, TrustError, UnreachableError
from updater.commands.once import _exit_of
from updater.device import Outcome


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConflictError("another check is running"), 6),
        (UnreachableError("away", reason="offline"), 8),
        (TrustError("refused", reason="bad-signature"), 3),
        (DiskError("full", reason="no-room"), 1),
        (RelfleetError("odd"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_a_check_that_failed_ends_by_the_table_of_exit_codes(error, code):
    assert _exit_of(Outcome.of_failure(error)) == code
