"""The word to one cohort: which directive follows from its pin, its freeze and its newest rollout. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from agent_core.wire import PROGRESS_FULL, Directive, Mode
from release_server.rollout import State

if TYPE_CHECKING:
    from agent_core.wire import BudgetTerms, LeaseTerms, Window


@dataclass(frozen=True)
class Pace:
    """When and how fast a cohort's agents act; a directive says each of these under the same name."""

    window: Window | None = None
    lease: LeaseTerms | None = None
    budget: BudgetTerms | None = None
    splay_s: int = 0
    poll_s: int = 60
    report_s: int = 300
    retry_epoch: int = 0


@dataclass(frozen=True)
class CohortFacts:
    """What a directive needs of a cohort.

    Attributes:
        base: the version the cohort has settled on; None before any.
        pin_is_older, base_is_older: agents may run something newer, so they must be let back.
    """

    product: str
    name: str
    base: str | None = None
    pin: str | None = None
    pin_is_older: bool = False
    base_is_older: bool = False
    frozen: bool = False
    pace: Pace = Pace()


@dataclass(frozen=True)
class RolloutFacts:
    """What a directive needs of the cohort's newest rollout; `is_older`: it goes to an older release."""

    version: str
    salt: str
    state: State
    progress: int
    is_older: bool = False


@dataclass(frozen=True)
class _Word:
    """The part of a directive that a cohort's situation decides."""

    release: str | None
    base: str | None
    progress: int
    salt: str = ""
    rollback: bool = False
    mode: Mode = Mode.ENABLED


def directive_for(cohort: CohortFacts, rollout: RolloutFacts | None, revision: int) -> Directive:
    """The word to one cohort: a pin goes before a rollout, and a freeze before both."""
    word = _word(cohort, rollout)
    return Directive(
        product=cohort.product,
        cohort=cohort.name,
        release=word.release,
        base=word.base,
        progress=word.progress,
        salt=word.salt,
        revision=revision,
        rollback=word.rollback,
        mode=Mode.SUSPENDED if cohort.frozen else word.mode,
        **vars(cohort.pace),
    )


def _word(cohort: CohortFacts, rollout: RolloutFacts | None) -> _Word:
    base = cohort.base
    if cohort.pin is not None:
        return _Word(cohort.pin, cohort.pin, PROGRESS_FULL, rollback=cohort.pin_is_older)
    if rollout is None:
        return _Word(base, base, PROGRESS_FULL, rollback=cohort.base_is_older)
    older, salt = rollout.is_older, rollout.salt
    match rollout.state:
        case State.RUNNING:
            return _Word(rollout.version, base, rollout.progress, salt, rollback=older)
        case State.PAUSED:
            # The progress stays to be seen; nobody is offered anything while the mode is suspended.
            return _Word(rollout.version, base, rollout.progress, salt, older, Mode.SUSPENDED)
        case State.COMPLETED:
            return _Word(base, base, PROGRESS_FULL, salt, rollback=cohort.base_is_older)
        case State.ROLLING_BACK | State.ROLLED_BACK:
            # Also after the last has gone back: an agent that was away then goes back when it returns.
            return _Word(base, base, PROGRESS_FULL, salt, rollback=True)
        case State.ABORTED | State.SUPERSEDED:
            # Agents on the new version stay, others stay at base, and one with nothing at all gets the base.
            return _Word(base, base, 0, salt, mode=Mode.SUSPENDED)
        case _:
            return _Word(base, base, PROGRESS_FULL)
