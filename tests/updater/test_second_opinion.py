"""A version on trial that cannot verify a word: what ends its trial, and what does not."""

from __future__ import annotations

import json

import pytest

from agent_core.jobs import JobResult
from agent_core.layout import Layout
from agent_core.notify import Notifier
from agent_core.runtime import Runtime
from agent_core.settings import AGENT, AgentSettings
from agent_core.wire import AttemptState, Reason
from tests.agent_core.loop import run
from updater import offline
from updater.attempt import Attempt
from updater.decide import Action
from updater.device import Device, Outcome
from updater.identity import Identity
from updater.second_opinion import PATIENCE, SecondOpinion, is_given_up
from updater.service import Service

GOOD, DIGEST, TRIED = "1.0.0-aaaaaaaaaaaa", "b" * 12, "1.1.0"


def said(reason: Reason, version: str = "", *, verified: bool = True, failed: bool = False) -> Outcome:
    at = "2026-01-31T12:00:00Z"
    return Outcome(Action.STAY, str(reason), "", at, verified=verified, failed=failed, version=version)


@pytest.mark.parametrize(
    ("outcome", "given_up"),
    [
        pytest.param(said(Reason.IN_TRIAL, TRIED), False, id="it is asked for"),
        pytest.param(said(Reason.SUSPENDED), False, id="a pause says nothing"),
        pytest.param(said(Reason.DISABLED), False, id="nor does a cohort that is switched off"),
        pytest.param(said(Reason.NO_DIRECTIVE), False, id="nor one that was told nothing"),
        pytest.param(said(Reason.OFFLINE, verified=False, failed=True), False, id="the network is down"),
        pytest.param(said(Reason.UP_TO_DATE, verified=False), False, id="nothing was verified"),
        pytest.param(said(Reason.DISK, "1.2.0", failed=True), False, id="the check came to no end"),
        pytest.param(said(Reason.UP_TO_DATE), True, id="rolled back on the server"),
        pytest.param(said(Reason.NOT_YET), True, id="another rollout has not come to this host"),
        pytest.param(said(Reason.IN_TRIAL, "1.2.0"), True, id="a newer one is asked for"),
        pytest.param(said(Reason.REVOKED, TRIED), True, id="revoked"),
        pytest.param(said(Reason.BELOW_FLOOR, TRIED), True, id="below the floor"),
        pytest.param(said(Reason.GATE, TRIED), True, id="signed for this host's gate no more"),
    ],
)
def test_only_a_verified_word_that_asks_for_another_gives_a_version_up(outcome, given_up):
    assert is_given_up(outcome, TRIED) is given_up


@pytest.fixture
def device(tmp_path):
    layout = Layout(tmp_path)
    layout.make()
    settings = AgentSettings.of(AGENT.load([], environ={}))
    return Device(layout, settings, Identity("http://127.0.0.1:9", "probe", "host-1", "any", "main"))


def answered(device: Device, answer: Outcome, failures: int, salt: str = "salt") -> tuple[str, int]:
    """What is known after so many failures, and how often the good version was asked."""
    place = device.layout.version_dir(GOOD)
    place.mkdir()
    asks = "import sys; open({!r}, 'a').write(sys.argv[1] + ' ' + sys.stdin.read()); print({!r})"
    asked = device.layout.root / "asked"
    (place / "agent.py").write_text(asks.format(str(asked), json.dumps(answer.to_json())))
    attempt = Attempt(TRIED, DIGEST, salt, AttemptState.TRIAL)
    with Runtime(notifier=Notifier({}), stop_s=5.0) as runtime:
        opinion = SecondOpinion(runtime, device, GOOD, attempt)
        for _ in range(failures):
            opinion.ask(lambda: runtime.stop(3))
        if not opinion.is_asking:
            runtime.stop(3)
        assert run(runtime) == 3
    return opinion.given_up, asked.read_text().count("checker check\n") if asked.exists() else 0


def test_the_good_version_is_asked_once_at_a_time_and_only_after_some_patience(device):
    assert answered(device, said(Reason.UP_TO_DATE), PATIENCE + 2) == ("up-to-date: ", 1)


def test_a_good_version_that_is_asked_no_more_is_stopped_and_not_heard(device):
    place, spoken = device.layout.version_dir(GOOD), device.layout.root / "spoken"
    place.mkdir()
    words = json.dumps(said(Reason.UP_TO_DATE).to_json())
    (place / "agent.py").write_text(
        f"import signal; print({words!r}, flush=True); open({str(spoken)!r}, 'w'); signal.pause()"
    )
    with Runtime(notifier=Notifier({}), stop_s=5.0) as runtime:
        opinion = SecondOpinion(runtime, device, GOOD, Attempt(TRIED, DIGEST, "salt", AttemptState.TRIAL))

        def look() -> float:
            if spoken.exists():
                opinion.stop()
            if not opinion.is_asking:
                runtime.stop(4)
            return 0.02

        for _ in range(PATIENCE):
            opinion.ask(lambda: runtime.stop(3))
        runtime.repeat("look", look)
        assert run(runtime) == 4
    assert opinion.given_up == ""


class _Verified(Service):
    """What a service does with the answer of its checker, and no more of it."""

    def __init__(self, device: Device, runtime: Runtime, opinion: SecondOpinion) -> None:
        self.device, self.runtime, self.opinion, self.verified = device, runtime, opinion, False

    def _finished(self, outcome: Outcome | None) -> None:
        """Nothing is polled here."""


@pytest.mark.parametrize("verified", [True, False])
def test_a_version_that_verified_a_word_itself_asks_for_no_opinion_any_more(device, verified):
    stopped = []
    with Runtime(notifier=Notifier({}), stop_s=5.0) as runtime:
        opinion = SecondOpinion(runtime, device, GOOD, None)
        opinion.stop = lambda: stopped.append(True)
        answer = said(Reason.IN_TRIAL, TRIED, verified=verified)
        _Verified(device, runtime, opinion)._checked(JobResult(0, answer.to_json()))
    assert bool(stopped) is verified


@pytest.mark.parametrize(
    ("failures", "salt"), [(PATIENCE - 1, "salt"), (PATIENCE + 2, offline.SALT)], ids=["too early", "by hand"]
)
def test_nobody_else_is_asked_too_early_nor_about_what_a_person_installed(device, failures, salt):
    assert answered(device, said(Reason.UP_TO_DATE), failures, salt) == ("", 0)
