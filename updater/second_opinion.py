"""Asks the good version what the server wants, where the one on trial cannot verify a word of it.

A version whose updater is broken looks like a network that is down: its trial would wait for ever, and nobody
far away could end it. The good version can still read the signed word. Only when that does not ask for the
version on trial any more does the trial end: what the network does decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_core.errors import MalformedError
from agent_core.wire import Reason
from updater import offline, stage
from updater.device import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent_core.jobs import Job, JobResult
    from agent_core.runtime import Runtime
    from updater.attempt import Attempt
    from updater.device import Device

PATIENCE = 3
"""So many checks in a row have failed before anybody else is asked: most networks are back by then."""
DEADLINE_S = 300.0
AWAY = frozenset({Reason.UP_TO_DATE, Reason.NOT_YET, Reason.REVOKED, Reason.BELOW_FLOOR, Reason.GATE})
"""Why the good version would stay as it is although the server was heard: it is the one wanted here."""


def is_given_up(said: Outcome, version: str) -> bool:
    """Whether what the good version verified asks for anything but `version`, which is on trial."""
    if not said.verified or said.failed:
        return False
    return said.reason in AWAY or said.version not in ("", version)


class SecondOpinion:
    """The good version's checker, asked while the one on trial fails; see the module.

    Args:
        runtime: whose loop the answer comes in.
        device: whose.
        good: name of the good version's directory.
        attempt: whose trial it is. What a person installed from a file was never the server's word: that it
            asks for another says nothing then.

    Attributes:
        given_up: what the good version heard that ends the trial; empty while it heard no such thing.
    """

    def __init__(self, runtime: Runtime, device: Device, good: str, attempt: Attempt | None) -> None:
        self._runtime, self._device, self._good, self._attempt = runtime, device, good, attempt
        self._failed, self.is_asking = 0, False
        self._job: Job | None = None
        self.given_up = ""

    def ask(self, then: Callable[[], object]) -> None:
        """One more check of the version on trial has failed; `then` when it is known to be given up."""
        self._failed += 1
        by_server = self._attempt is not None and self._attempt.salt != offline.SALT
        if not by_server or self.is_asking or self._failed < PATIENCE:
            return
        self.is_asking = True
        layout = self._device.layout
        place = layout.version_dir(self._good)
        words = ["-I", "-S", "-B", str(place / "agent.py"), "checker", "--root", str(layout.root)]
        self._job = self._runtime.run_job(
            [stage.interpreter(place), *words],
            lambda result: self._heard(result, then),
            deadline_s=DEADLINE_S,
            name="second opinion",
            stdin=b"check\n",
        )

    def stop(self) -> None:
        """The one on trial can tell for itself: what another writes and reports now is older news."""
        if self._job is not None:
            self._job.stop()

    def _heard(self, result: JobResult, then: Callable[[], object]) -> None:
        self.is_asking, self._job = False, None
        if result.problem == "stopped":
            return
        try:
            said = Outcome.from_json(result.answer)
        except MalformedError:
            return
        assert self._attempt is not None
        if is_given_up(said, self._attempt.version):
            self.given_up = f"{said.reason}: {said.detail or said.version}"
            then()
