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
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from agent_core import disk, launcher, slots
from agent_core.delta import apply
from agent_core.errors import RelfleetError
from agent_core.layout import Layout, clear_left_overs
from agent_core.settings import AGENT, AgentSettings
from tests.crash.bundles import BOOTS, Bundle, Origin
from tests.crash.journal import Journal, Link
from tests.crash.script import NEW_LAUNCHER, A, B, BrokenPromise, C, Ledger, P, Script
from tests.crash.watch import UMASK, Fault, Watch, harvest
from updater import delta, poll
from updater.decide import Action
from updater.delta import take
from updater.device import Device, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from agent_core.slots import Record
    from updater.catalog import Delta, Release

AT = "2026-01-01T00:00:00Z"
DEADMAN_S = 60
ROUNDS_MOST = 60
REFUNDS_MOST = 2
BLOCK = 512
"""Of `st_blocks`, whatever the file system."""


class Became(BaseException):
    """The launcher became this version; nothing in between may take it for a failure."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


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
        self.origin = Origin(P, A, B, ranges=script.ranges, offer=script.offer, began=self._begin_delta)
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
        self.promise(goods=frozenset({self.script.good.name}))
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

    def record(self) -> Record:
        """What the record says, for this story's own eyes."""
        with disk.watched_by(None):
            record = slots.read(self.root)
        assert record is not None
        return record

    def _run(self, record: Record) -> bool:
        """A good version at work: operator, update, clean-up; true when nothing is left to do."""
        if self.script.operator and not self.ledger.asked:
            self.script.operator(self)
            self.promise(asked=True)
            return False
        if self.script.floor > self.ledger.floor:
            slots.raise_floor(self.root, self.script.floor)
            self.promise(floor=self.script.floor)
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
            self.promise(skipped=self.ledger.skipped | {goal.digest})
            return
        outcome = Outcome(
            Action.INSTALL, "newer", "", AT, verified=True, candidate=name, boots=BOOTS, deadman_s=DEADMAN_S
        )
        self.device.remember_outcome(outcome)
        self.promise(tries=name, starts=0, refunds=0)
        slots.begin_trial(self.root, name, BOOTS, DEADMAN_S, floor=self.script.floor)

    def fetch(self, goal: Bundle) -> str:
        """The poll's own download and staging."""
        catalog = SimpleNamespace(delta=self._delta)
        check = poll._Check(self.device, catalog, self.origin, None, None)  # type: ignore[arg-type]
        with (
            patch("updater.delta.take", self._take_delta),
            patch("agent_core.delta.apply", self._apply_delta),
        ):
            name, _ = check._stage(goal.release)
        return name

    def _delta(self, _release: Release, base: str) -> Delta | None:
        """What the catalog would find that leads from the version with this index."""
        offer = self.script.offer
        return offer.delta if offer and base == offer.base else None

    def _take_delta(self, *words: Any) -> str:
        why = take(*words)
        if not why:
            self.promise(begun=0, applied=0)  # it served; should its version give way to others, it may again
        return why

    def _begin_delta(self) -> None:
        self.promise(begun=self.ledger.begun + 1)
        if self.ledger.begun > delta.MOST_TRIES:
            raise BrokenPromise(f"the delta was begun {self.ledger.begun} times")

    def _apply_delta(self, *words: Any) -> str:
        self.promise(applied=self.ledger.applied + 1)
        if self.ledger.applied > 1:
            raise BrokenPromise(f"the delta was applied {self.ledger.applied} times")
        return apply(*words)

    def promise(self, **what: object) -> None:
        self.ledger = self.ledger._replace(**what)
        if self.watch.step:
            self.watch.step(self.watch.journal)

    # --- promises -------------------------------------------------------------------------------------

    def _check_what_the_cut_left(self) -> None:
        """Before anything is recovered: the links and notes show what the record has said, and a launcher stands."""
        if not self.script.ledger.goods:
            return
        self._check_launcher()
        links = {slots.link(self.root, name) for name in (slots.CURRENT, slots.PREVIOUS)}
        if "" in links:
            raise BrokenPromise("a link is gone")
        record = slots.read(self.root)
        if record is not None and not links <= slots.kept(record) | {record.tried} | self.ledger.left:
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
        self._check_launcher()
        if stumbled and (self.watch.is_blind or not self.watch.stays_bad):
            self._check_whole(name)
            shown = (slots.CURRENT, slots.PREVIOUS) if self.watch.is_blind else (slots.PREVIOUS,)
            last_resort = ledger.goods | {slots.link(self.root, name) for name in shown}
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
            self.promise(starts=ledger.starts + 1)
            most = BOOTS + min(ledger.refunds, REFUNDS_MOST) + min(LIFE.number, slots.REBOOTS_MOST)
            if self.ledger.starts > most:
                raise BrokenPromise(f"{name} was started {self.ledger.starts} times, {most} were allowed")
        self._check_record()

    def _check_launcher(self) -> None:
        """There is always one that proved itself, and what may be wanted back is not lost."""
        found = [
            file.read_bytes() if file.exists() else b""
            for file in (self.layout.launcher_file, self.layout.launcher_previous)
        ]
        if found[0] not in self.ledger.launchers:
            raise BrokenPromise("launcher.pyz is none that proved itself")
        if self.script.kept_launcher not in found:
            raise BrokenPromise("the launcher before is lost")

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
        left = frozenset() if slots.links_follow(self.root, record) else self.ledger.left
        self.ledger = self.ledger._replace(skipped=skipped, floor=record.floor, left=left)

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
        if self.layout.launcher_file.read_bytes() != self.script.launcher:
            raise BrokenPromise("in the end launcher.pyz is another one")
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
            patch("agent_core.archive.launcher_archive", lambda: NEW_LAUNCHER),
            patch("updater.launchers.launcher_archive", lambda: NEW_LAUNCHER),
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
