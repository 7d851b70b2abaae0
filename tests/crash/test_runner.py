from __future__ import annotations

import pytest

from tests.crash import __main__ as runner
from tests.crash.tally import Tally


class _Tier:
    """A tier whose outcome is given; the real ones are tested by being run."""

    def __init__(self, tried: int, failures: list[str], why: str = "") -> None:
        self.tried, self.failures, self.why = tried, failures, why

    def unavailable(self) -> str:
        return self.why

    def run(self, tally: Tally, *, quick: bool) -> None:
        tally.count(self.tried)
        for sentence in self.failures:
            tally.fail(sentence)


@pytest.mark.parametrize(
    ("tier", "words", "code"),
    [
        (_Tier(3, []), [], 0),
        (_Tier(3, ["state 2 of an upgrade has no complete version"]), [], 1),
        (_Tier(0, []), [], 1),
        (_Tier(0, [], "not root"), [], 0),
        (_Tier(0, [], "not root"), ["--strict"], 1),
    ],
    ids=["passed", "failed", "tried nothing", "unavailable", "unavailable and strict"],
)
def test_a_tier_passes_only_when_it_tried_something_and_nothing_failed(monkeypatch, tier, words, code):
    monkeypatch.setattr(runner.importlib, "import_module", lambda _name: tier)
    assert runner.main(["model", *words]) == code


def test_a_tier_that_does_not_exist_is_a_wrong_use():
    with pytest.raises(SystemExit) as ended:
        runner.main(["luck"])
    assert ended.value.code == 2


def test_the_line_says_how_many_were_tried_and_how_many_failed(capsys):
    tally = Tally("model")
    tally.count(12345)
    tally.fail("state 7 of a clean-up: the good version is gone")
    tally.report()
    first, second = capsys.readouterr().out.splitlines()
    assert "model" in first
    assert "12,345 states tried, 1 failed" in first
    assert second == "  failed: state 7 of a clean-up: the good version is gone"
