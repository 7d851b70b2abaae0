"""By how `agent once` ends a script knows what to do next."""

from __future__ import annotations

import pytest

from agent_core import errors
from agent_core.errors import ConflictError, DiskError, RelfleetError, TrustError, UnreachableError
from agent_core.wire import Reason
from updater.commands.common import EXITS, exit_of
from updater.commands.install import _refusal
from updater.decide import Action
from updater.device import Outcome

STAYS = {
    *(Reason.UP_TO_DATE, Reason.NOT_YET, Reason.SUSPENDED, Reason.DISABLED, Reason.STOP_FILE, Reason.HELD),
    *(Reason.OUTSIDE_WINDOW, Reason.SPLAY, Reason.LEASE, Reason.BUDGET, Reason.BACKOFF, Reason.SKIPPED),
    *(Reason.IN_TRIAL, Reason.NO_COHORT, Reason.NO_DIRECTIVE, Reason.PENDING, Reason.RETIRED),
}
INSTALLS = {Reason.FIRST_INSTALL, Reason.UPDATE, Reason.GO_BACK}
ENDS = {
    *(Reason.POST_ACTIVATE, Reason.UNHEALTHY, Reason.WORKLOAD_EXITED, Reason.BOOTS_USED_UP),
    *(Reason.DEAD_MAN, Reason.CANNOT_UPDATE, Reason.OPERATOR, Reason.OBSERVED),
}
FAULTS = {Reason.NO_ROOM, Reason.DISK, Reason.INTERNAL}
AWAY = {Reason.OFFLINE, Reason.OVERLOADED}
SAYS_NO = {Reason.PREFLIGHT, Reason.PREFLIGHT_VERSION, Reason.PRE_ACTIVATE}


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
    assert exit_of(Outcome.of_failure(error).reason) == code


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, RelfleetError)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_an_error_without_a_reason_of_its_own_ends_a_check_as_it_ends_any_command(kind):
    assert exit_of(kind.reason) == kind.exit_code


def test_every_reason_of_a_refusal_has_its_code_and_no_other_has_one():
    told = [reason for reasons in EXITS.values() for reason in reasons]
    assert len(told) == len(set(told))
    assert set(Reason) - set(told) == {*STAYS, *INSTALLS, *ENDS, *FAULTS, *SAYS_NO}


@pytest.mark.parametrize("reason", sorted(set(Reason) - STAYS - INSTALLS - ENDS - FAULTS - AWAY))
def test_a_refused_release_ends_by_the_same_code_whether_it_comes_from_a_server_or_a_file(reason):
    outcome = Outcome(Action.REFUSE, str(reason), "", "", version="1.1.0")
    assert _refusal(outcome).exit_code == exit_of(reason)
