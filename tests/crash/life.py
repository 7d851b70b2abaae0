"""This module is one host in fast motion: the real launcher, record, staging and cleaning, from any disk to rest.

What the network, the workload and the health checks would say is given by a `Script`. After each start and at
the end the promises are checked; a `Ledger` carries over a power cut what was promised before it.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple
from unittest.mock import patch

from agent_core import disk, launcher, slots
from agent_core.errors import RelfleetError
from agent_core.layout import Layout, clear_left_overs
from agent_core.settings import AGENT, AgentSettings
from tests.crash.bundles import BOOTS, FLOOR, Bundle, Origin, bundle
from tests.crash.journal import Journal, Link, Tree
from tests.crash.watch import UMASK, Fault, Watch, harvest
from updater import poll
from updater.decide import Action
from updater.device import Device, Outcome

if TYPE_CHECKING:
    from collections.abc import Iterator

    from agent_core.slots import Record

AT = "2026-01-01T00:00:00Z"
DEADMAN_S = 60
ROUNDS_MOST = 60
REFUNDS_MOST = 2
BLOCK = 512
"""Of `st_blocks`, whatever the file system."""
P, A, B, C = (bundle(version) for version in ("0.9.0", "1.0.0", "1.1.0", "0.8.0"))


class BrokenPromise(Exception):
    """A promise that does not hold; the words say which."""


class Became(BaseException):
    """The launcher became this version; nothing in between may take it for a failure."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


class Ledger(NamedTuple):
    """What this host has promised so far, whatever happens to its power.

    Attributes:
        goods: what the record may call good.
        tries: the candidate that may be started, or nothing.
        starts: how often it was, since it was armed.
        refunds: boots it was given back.
        skipped: bundles that are never to be started again.
        floor: the highest that was remembered.
        asked: the operator's command was carried out.
    """

    goods: frozenset[str] = frozenset()
    tries: str = ""
    starts: int = 0
    refunds: int = 0
    skipped: frozenset[str] = frozenset()
    floor: int = 0
    asked: bool = False


INSTALLED = Ledger(goods=frozenset({A.name}), floor=FLOOR)


@dataclass(frozen=True)
class Script:
    """One story: how the disk is at first, what is published, and how the versions do.

    Attributes:
        name: of the story.
        tree: the disk at first.
        goal: the version that the server wants.
        good: what the record has to call good in the end.
        trial: what the candidate does with its trial; it is told the host.
        operator: what the operator types once, while a good version runs.
        whole: versions that have to be whole whenever something is started.
        skipped: bundles that have to be skipped in the end.
        floor: of the policy.
    """

    name: str
    tree: Tree
    goal: Bundle
    good: Bundle
    trial: Callable[[Host], None] | None = None
    operator: Callable[[Host], None] | None = None
    preflight: bool = True
    whole: tuple[Bundle, ...] = (A,)
    skipped: frozenset[str] = frozenset()
    floor: int = FLOOR
    ranges: bool = True
    ledger: Ledger = INSTALLED


class Host:
    """One life of the host, from one start of the power to rest or to the next cut.

    Args:
        root: its disk, a real directory.
        script: its story.
        ledger: what was promised before.
        step: told about each change of the disk, with the journal and the promises as they stand then.
        fault: what its disk refuses.
    """

    def __init__(
        self,
        root: str,
        script: Script,
        ledger: Ledger,
        step: Callable[[Journal, Ledger], None] | None = None,
        fault: Fault | None = None,
    ) -> None:
        self.root, self.script, self.ledger = root, script, ledger
        self.layout = Layout(root)  # type: ignore[arg-type]
        self.device = Device(self.layout, SETTINGS, None)  # type: ignore[arg-type]
        self.origin = Origin(P, A, B, ranges=script.ranges)
        tell = (lambda journal: step(journal, self.ledger)) if step else None
        self.watch = Watch(root, harvest(root) if step else {}, tell, fault)
        self.troubles: list[Exception] = []

    # --- a life ---------------------------------------------------------------------------------------

    def live(self, rounds: int = ROUNDS_MOST, *, tidy: bool = True) -> bool:
        """Start, run and restart until everything rests; false when it does not within `rounds`.

        Args:
            rounds: starts at most.
            tidy: whether the disk has to be clean then, which one that refused a step needs not be.

        Raises:
            BrokenPromise: a start, or the disk at rest, is not as promised.
        """
        self._check_what_the_cut_left()
        with disk.watched_by(self.watch):
            if self.watch.step:
                self.watch.step(self.watch.journal)
            for _ in range(rounds):
                try:
                    if self._turn():
                        if tidy:
                            self._check_rest()
                        return True
                except (OSError, RelfleetError, slots.IllegalTransitionError) as error:
                    self.troubles.append(error)
        return False

    def _turn(self) -> bool:
        if not self._installed():
            return False
        name = self._start()
        record = slots.read(self.root)
        if record is None:
            raise OSError("the record cannot be read")
        if record.phase == slots.TRIAL:
            if record.candidate == name and self.script.trial:
                self.script.trial(self)
            return False
        return record.phase == slots.IDLE and self._run(record)

    def _installed(self) -> bool:
        """`agent enroll` and the wait for a first version, done again if they were cut."""
        if self.script.ledger.goods:
            return True
        self.layout.make()
        if slots.recover(self.root) is not None:
            return True
        self._promise(goods=frozenset({self.script.good.name}))
        slots.install_first(self.root, self.fetch(self.script.good))
        return True

    def _start(self) -> str:
        """The launcher's part, with `execve` as its last word."""
        failed = self.watch.failed
        try:
            code = launcher.start(self.root, "exec")
        except Became as became:
            with disk.watched_by(None):
                self._check_start(became.name, stumbled=self.watch.failed > failed)
            return became.name
        finally:
            signal.alarm(0)
        if self.watch.failed > failed and not self.watch.stays_bad:
            raise OSError("the supervisor starts the launcher again")
        raise BrokenPromise(f"the launcher found nothing to start (exit {code})")

    def _record(self) -> Record:
        """What the record says, for this story's own eyes."""
        with disk.watched_by(None):
            record = slots.read(self.root)
        assert record is not None
        return record

    def _run(self, record: Record) -> bool:
        """A good version at work: operator, update, clean-up; true when nothing is left to do."""
        if self.script.operator and not self.ledger.asked:
            self.script.operator(self)
            self._promise(asked=True)
            return False
        if self.script.floor > self.ledger.floor:
            slots.raise_floor(self.root, self.script.floor)
            self._promise(floor=self.script.floor)
        goal = self.script.goal
        if record.good != goal.name and not slots.skips(record, goal.digest):
            self._upgrade(goal)
            return False
        self.device.remember_outcome(Outcome(Action.STAY, "up-to-date", "", AT, verified=True))
        clear_left_overs(self.layout)
        poll._collect(self.device)
        return True

    def _upgrade(self, goal: Bundle) -> None:
        name = self.fetch(goal)
        if not self.script.preflight:
            slots.refuse(self.root, name, "preflight")
            self._promise(skipped=self.ledger.skipped | {goal.digest})
            return
        outcome = Outcome(
            Action.INSTALL, "newer", "", AT, verified=True, candidate=name, boots=BOOTS, deadman_s=DEADMAN_S
        )
        self.device.remember_outcome(outcome)
        self._promise(tries=name, starts=0, refunds=0)
        slots.begin_trial(self.root, name, BOOTS, DEADMAN_S, floor=self.script.floor)

    def fetch(self, goal: Bundle) -> str:
        """The poll's own download and staging."""
        catalog = SimpleNamespace(delta=lambda *_: None)
        check = poll._Check(self.device, catalog, self.origin, None, None)  # type: ignore[arg-type]
        name, _ = check._stage(goal.release)
        return name

    # --- what a candidate, or an operator, may do -----------------------------------------------------

    def commit(self) -> None:
        record = self._record()
        self._promise(goods=self.ledger.goods | {record.candidate})
        slots.commit(self.root, record.candidate)
        self._promise(goods=frozenset({record.candidate}), tries="")

    def roll_back(self) -> None:
        record = self._record()
        slots.roll_back(self.root, "unhealthy")
        self._promise(skipped=self.ledger.skipped | {slots.digest_of(record.candidate)}, tries="")

    def crash(self) -> None:
        """It ends at once; its boot stays counted."""

    def stop_cleanly(self) -> None:
        self._promise(refunds=self.ledger.refunds + 1)
        slots.refund(self.root)

    def go_back(self) -> None:
        record = self._record()
        if record.phase == slots.IDLE:
            self._promise(goods=self.ledger.goods | {record.previous})
        after = slots.go_back(self.root)
        skipped = self.ledger.skipped | {slots.digest_of(after.tried)}
        self._promise(goods=frozenset({after.good}), skipped=skipped, tries="", asked=True)

    def _promise(self, **what: object) -> None:
        self.ledger = self.ledger._replace(**what)
        if self.watch.step:
            self.watch.step(self.watch.journal)

    # --- promises -------------------------------------------------------------------------------------

    def _check_what_the_cut_left(self) -> None:
        """Before anything is recovered: both links are there, and show only what the record has said."""
        if not self.script.ledger.goods:
            return
        links = {slots.link(self.root, name) for name in (slots.CURRENT, slots.PREVIOUS)}
        if "" in links:
            raise BrokenPromise("a link is gone")
        record = slots.read(self.root)
        if record is not None and not links <= slots.kept(record) | {record.tried}:
            raise BrokenPromise(f"the links show {sorted(links)}, which the record does not say")
        for note in Path(self.root, "state").glob("*.json"):
            try:
                json.loads(note.read_bytes())
            except ValueError:
                raise BrokenPromise(f"{note.name} holds some of two notes, or of none") from None

    def _check_start(self, name: str, *, stumbled: bool) -> None:
        """What was started, by what is promised.

        Args:
            stumbled: the disk refused something on the way. Refused once, the version before may run this once;
                when no file can be opened at all, the links are all that the launcher has to go by.
        """
        ledger = self.ledger
        if stumbled and (self.watch.is_blind or not self.watch.stays_bad):
            self._check_whole(name)
            last_resort = ledger.goods | {slots.link(self.root, slots.PREVIOUS)}
            if slots.digest_of(name) in ledger.skipped - {slots.digest_of(each) for each in last_resort}:
                raise BrokenPromise(f"{name} was started, which is skipped")
            if name not in last_resort | {ledger.tries}:
                raise BrokenPromise(f"{name} was started, which is a third version")
            if name == ledger.tries and not self.watch.is_blind:
                self.ledger = ledger._replace(starts=ledger.starts + 1)
            return
        on_trial = bool(ledger.tries) and name == ledger.tries
        if name not in ledger.goods and not on_trial:
            raise BrokenPromise(f"{name} was started, which is neither good nor on trial")
        if slots.digest_of(name) in ledger.skipped:
            raise BrokenPromise(f"{name} was started, which is skipped")
        for version in {name, *(each.name for each in self.script.whole)}:
            self._check_whole(version)
        if on_trial and name not in ledger.goods:
            self._promise(starts=ledger.starts + 1)
            most = BOOTS + min(ledger.refunds, REFUNDS_MOST) + min(LIFE.number, slots.REBOOTS_MOST)
            if self.ledger.starts > most:
                raise BrokenPromise(f"{name} was started {self.ledger.starts} times, {most} were allowed")
        self._check_record()

    def _check_whole(self, name: str) -> None:
        wanted = BY_NAME[name].tree
        if harvest(f"{self.root}/versions/{name}") != wanted:
            raise BrokenPromise(f"{name} is not whole")

    def _check_record(self) -> None:
        record = slots.read(self.root)
        if record is None:
            return
        if record.good not in self.ledger.goods:
            raise BrokenPromise(f"the record calls {record.good} good")
        if record.floor < self.ledger.floor:
            raise BrokenPromise(f"the floor fell from {self.ledger.floor} to {record.floor}")
        if not self.watch.failed and not slots.links_follow(self.root, record):
            raise BrokenPromise("something was started, and the links do not follow the record")
        skipped = frozenset(entry[0] for entry in record.skip)
        if missing := self.ledger.skipped - skipped:
            raise BrokenPromise(f"{sorted(missing)} are not skipped any more")
        self.ledger = self.ledger._replace(skipped=skipped, floor=record.floor)

    def _check_rest(self) -> None:
        record = slots.read(self.root)
        if record is None or (record.phase, record.good) != (slots.IDLE, self.script.good.name):
            raise BrokenPromise(f"in the end {record and record.good} is good, not {self.script.good.name}")
        if not slots.links_follow(self.root, record):
            raise BrokenPromise("in the end the links do not follow the record")
        if missing := self.script.skipped - {entry[0] for entry in record.skip}:
            raise BrokenPromise(f"in the end {sorted(missing)} are not skipped")
        changed = self.watch.changed
        slots.recover(self.root)
        if self.watch.changed != changed:
            raise BrokenPromise("recovering once more changed the disk")
        self._check_nothing_left(record)
        for kept in (self.layout.slots, self.layout.ballast):
            if kept.exists() and (found := kept.stat()).st_blocks * BLOCK < found.st_size:
                raise BrokenPromise(f"in the end the room of {kept.name} is not taken")

    def _check_nothing_left(self, record: Record) -> None:
        kept = slots.kept(record)
        for path, entry in harvest(self.root).items():
            parts = path.split("/")
            garbage = (
                (len(parts) > 1 and parts[0] in ("staging", "trash", "download"))
                or (len(parts) == 2 and parts[0] == "versions" and parts[1] not in kept)
                or parts[-1].endswith(".new")
                or (isinstance(entry, Link) and path not in ("current", "previous"))
                or (parts[-1].startswith("facts-") and parts[-1][6:-5] not in kept)
            )
            if garbage:
                raise BrokenPromise(f"in the end {path} is left")


SETTINGS = replace(AgentSettings.of(AGENT.load([], environ={})), disk_reserve=0)
BY_NAME = {each.name: each for each in (P, A, B, C)}


@contextmanager
def fast_motion() -> Iterator[None]:
    """What a process of its own would have: an exec that ends it, and names that nobody else uses."""

    def become(_program: str, words: list[str], _environment: dict[str, str]) -> None:
        raise Became(os.path.basename(os.path.dirname(words[4])))

    kept = {number: signal.getsignal(number) for number in USED}
    umask = os.umask(UMASK)
    try:
        with (
            patch.object(os, "execve", become),
            patch("updater.stage.secrets.token_hex", lambda _length: f"{LIFE.number}-{next(LIFE.names)}"),
            patch("agent_core.layout._chance", lambda: f"{LIFE.number}-{next(LIFE.names)}"),
            patch("agent_core.archive.launcher_archive", lambda: b"a launcher"),
            patch("agent_core.layout.BALLAST_LENGTH", 4096),
            patch("agent_core.launcher.say", lambda _message: None),
            patch("agent_core.slots.REFUNDS_MOST", REFUNDS_MOST),
            patch("agent_core.slots.host_boot_id", lambda: f"boot {LIFE.number}"),
        ):
            logging.disable()
            yield
    finally:
        logging.disable(logging.NOTSET)
        os.umask(umask)
        for number, handler in kept.items():
            signal.signal(number, handler)


class _Life:
    """Which life this is: threads and random names of two lives are never the same."""

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, number: int) -> None:
        self.number, self.names = number, itertools.count()


LIFE = _Life()
USED = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGPIPE)
