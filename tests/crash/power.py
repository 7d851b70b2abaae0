"""This module is the power tier: real file systems, cut before each change of a device's files.

A first install, an upgrade, a way back, an operator's way back: the real functions that download, stage,
switch, record and clear up run on ext4 and xfs in memory. Before their N-th change the file system is shut
down by its own ioctl, with its journal written out and without. Mounted again, it is checked and recovered
(that is cut as well), and the flow is done again. A sample of whole agents is cut in the same way.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from agent_core import disk, slots
from agent_core.layout import Layout, write_json
from agent_core.wire import ReleaseFacts
from tests.crash import tracer, volumes
from tests.crash.host import Host, environment
from tests.crash.rig import BAD, BOOTS, FLOOR, GOOD, NEW, Rig
from tests.crash.tally import Tally
from updater import download, stage
from updater.transport import Transport

KINDS = ("ext4", "xfs")
ENDS = {volumes.WITH_LOG: "journal written", volumes.WITHOUT_LOG: "journal lost"}
AGENTS_EVERY = 24
CUT, DONE, WRONG = 77, 0, 78
CHANGES = frozenset(
    [
        "write",
        "pwrite",
        "ftruncate",
        "allocate",
        "reserve",
        "fsync",
        "fdatasync",
        "syncfs",
        "fchmod",
        "rename",
        "rename_exchange",
        "rename_new",
        "symlink",
        "unlink",
        "mkdir",
        "rmdir",
        "chmod",
    ]
)


def unavailable() -> str:
    return volumes.unavailable() or tracer.unavailable()


# --- the flows: each can be begun again after any cut ---------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """A release as the origin offers it."""

    facts: ReleaseFacts
    url: str
    path: str
    sha256: str
    length: int
    index: bytes

    def stage(self, root: Path) -> str:
        """Download and stage, as a check does."""
        layout = Layout(root)
        part = layout.download / f"{self.sha256}.part"
        name = stage.version_name(self.facts)
        if not stage.is_complete(layout.versions / name, self.index):
            download.fetch(Transport(self.url), self.path, self.sha256, self.length, part)
        write_json(layout.state / f"facts-{name}.json", self.facts.to_json())
        stage.stage(layout, part, self.index, self.facts, self.sha256, reserve=0)
        disk.remove(part)
        return name


def _first(root: Path, bundles: dict[str, Bundle]) -> None:
    Layout(root).make()
    slots.install_first(root, bundles[GOOD].stage(root))
    slots.raise_floor(root, FLOOR)


def _upgrade(root: Path, bundles: dict[str, Bundle]) -> None:
    name = bundles[NEW].stage(root)
    record = _needed(root)
    if record.good != name:
        slots.begin_trial(root, name, BOOTS, 20)
        slots.boot(root, "a boot")
        slots.refund(root)
        slots.boot(root, "a boot")
        slots.commit(root, name)
    stage.collect(Layout(root), _needed(root))


def _way_back(root: Path, bundles: dict[str, Bundle]) -> None:
    name = stage.version_name(bundles[BAD].facts)
    if not slots.skips(_needed(root), slots.digest_of(name)):
        bundles[BAD].stage(root)
        slots.begin_trial(root, name, BOOTS, 20)
        slots.boot(root, "a boot")
        slots.roll_back(root, "unhealthy")
    stage.collect(Layout(root), _needed(root))


def _operator(root: Path, _: dict[str, Bundle]) -> None:
    slots.go_back(root)
    stage.collect(Layout(root), _needed(root))


def _needed(root: Path) -> slots.Record:
    record = slots.read(root)
    assert record is not None
    return record


@dataclass(frozen=True)
class Flow:
    """`start` is the host it begins with, `rests` what is good in the end, `skipped` what is skipped then."""

    name: str
    start: str
    do: Callable[[Path, dict[str, Bundle]], None]
    rests: str
    skipped: str = ""


FLOWS = (
    Flow("first install", "empty", _first, GOOD),
    Flow("upgrade", "installed", _upgrade, NEW),
    Flow("way back", "installed", _way_back, GOOD, BAD),
    Flow("operator's way back", "upgraded", _operator, GOOD, NEW),
)


# --- the cases ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A flow on a kind of file system, cut before its `cut`-th change; `again` cuts the recovery as well."""

    flow: Flow
    kind: str
    cut: int
    how: int = volumes.WITHOUT_LOG
    again: int = 0

    @property
    def name(self) -> str:
        after = f", its recovery before change {self.again}" if self.again else ""
        return f"{self.flow.name} on {self.kind} cut before change {self.cut}, {ENDS[self.how]}{after}"


@dataclass(frozen=True)
class AgentCase:
    """A whole agent, cut before its `cut`-th call that changes its directory."""

    version: str
    kind: str
    cut: int
    how: int

    @property
    def name(self) -> str:
        return f"an agent led to {self.version} on {self.kind} cut before call {self.cut}, {ENDS[self.how]}"


def run(tally: Tally, *, quick: bool) -> None:
    """Every change of every flow on every file system; with `quick` a handful of them."""
    with Rig() as rig:
        bundles = {version: _bundle(rig, version) for version in (GOOD, NEW, BAD)}
        with ProcessPoolExecutor(os.cpu_count(), get_context("fork"), _begin, (rig, bundles)) as pool:
            pool.submit(_prepare).result()
            flows = [(flow, kind) for flow in FLOWS for kind in KINDS]
            lengths = {one: pool.submit(_length, *one) for one in flows}
            cases: list[Any] = [
                case for flow, kind in flows for case in _cases(flow, kind, lengths[flow, kind].result())
            ]
            calls = {version: pool.submit(_calls, version) for version in (NEW, BAD)}
            cases += [case for version in (NEW, BAD) for case in _agents(version, calls[version].result())]
            if quick:
                cases = cases[:: max(1, len(cases) // 24)]
            for case, found in tally.answers(pool, _try, cases):
                tally.fail_each(case.name, found)


def _cases(flow: Flow, kind: str, length: int) -> Iterator[Case]:
    for cut in range(1, length + 2):
        for how in ENDS:
            yield Case(flow, kind, cut, how)
        yield Case(flow, kind, cut, again=1 + cut % 7)


def _agents(version: str, calls: int) -> Iterator[AgentCase]:
    for place, cut in enumerate(range(1, calls + 1, AGENTS_EVERY)):
        for kind in KINDS:
            yield AgentCase(version, kind, cut, volumes.WITHOUT_LOG if place % 3 else volumes.WITH_LOG)


def _bundle(rig: Rig, version: str) -> Bundle:
    """What a check would learn of it from verified metadata."""
    offer = rig.releases[version]
    path = download.hashed_path(offer.path, offer.sha256)
    return Bundle(offer.facts, rig.url(version), path, offer.sha256, offer.length, offer.index)


# --- what the workers do --------------------------------------------------------------------------------

_rig: Rig
_bundles: dict[str, Bundle]


def _begin(rig: Rig, bundles: dict[str, Bundle]) -> None:
    global _rig, _bundles
    _rig, _bundles = rig, bundles
    volumes.alone()


def _try(case: Case | AgentCase) -> list[str]:
    return _cut_agent(case) if isinstance(case, AgentCase) else _cut(case)


def _image(name: str, kind: str) -> Path:
    return _rig.home / f"{name}.{kind}"


def _prepare() -> None:
    """An image of each kind for each host that a flow or an agent begins with."""
    starts = _rig.home / "starts"
    starts.mkdir()
    (starts / "empty").mkdir()
    host = _rig.installed(starts / "installed")
    slots.refuse(host.root, "0.2.0-" + "1" * 12, "unhealthy")
    for name, version in (("upgraded", NEW), ("agent-1.1.0", NEW), ("agent-1.2.0", BAD)):
        _rig.copy(starts / "installed", starts / name).lead_to(version)
    _upgrade(starts / "upgraded", _bundles)
    for start in starts.iterdir():
        (start / "log").is_dir() and shutil.rmtree(start / "log")
        for kind in KINDS:
            image = volumes.make(kind, _image(start.name, kind))
            with volumes.mounted(kind, image, _rig.home / "mnt") as place:
                subprocess.run(["cp", "-a", start, place / "root"], check=True)


class _Counter:
    """Counts changes, and has the power cut before the one that is to be the last."""

    def __init__(self, cut: int = 0, at_cut: Callable[[], None] = lambda: None) -> None:
        self.count, self.cut, self.at_cut = 0, cut, at_cut

    def before(self, name: str, words: tuple[Any, ...], options: dict[str, Any]) -> None:
        if name in CHANGES or (name == "open" and words[1] & (os.O_CREAT | os.O_TRUNC)):
            self.count += 1
            if self.count == self.cut:
                self.at_cut()
                os._exit(CUT)

    def after(self, name: str, words: tuple[Any, ...], options: dict[str, Any], result: Any) -> None:
        """Nothing to see."""


def _in_child(work: Callable[[], object]) -> tuple[int, Any]:
    """Do it in a process that may be ended in its middle: its exit code and what it returned."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = WRONG
        try:
            signal.alarm(60)
            said = work()
            os.write(writing, json.dumps(said).encode()[:60_000])
            code = DONE
        except BaseException as error:
            os.write(writing, json.dumps(f"{type(error).__name__}: {error}").encode()[:60_000])
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(said or b"null")


def _length(flow: Flow, kind: str) -> int:
    """How many changes the flow makes when nothing is cut."""

    def count() -> int:
        counter = _Counter()
        with disk.watched_by(counter):
            flow.do(place / "root", _bundles)
        return counter.count

    image = _copied(flow.start, kind)
    with volumes.mounted(kind, image, image.with_suffix(".mnt")) as place:
        code, said = _in_child(count)
    assert code == DONE, said
    return int(said)


def _copied(start: str, kind: str) -> Path:
    """A file system of this worker's own."""
    image = _rig.home / f"worker-{os.getpid()}.{kind}"
    image.unlink(missing_ok=True)  # a loop device may not have let go of the last one yet
    subprocess.run(["cp", "--sparse=always", _image(start, kind), image], check=True)
    return image


def _cut(case: Case) -> list[str]:
    """What is wrong after the power went once or twice, and what after the flow was done again."""
    image = _copied(case.flow.start, case.kind)
    place = image.with_suffix(".mnt")
    root = place / "root"

    def until_cut(work: Callable[[], object], cut: int, how: int) -> int:
        def watched() -> None:
            with disk.watched_by(_Counter(cut, lambda: volumes.cut_power(place, how))):
                work()
            volumes.cut_power(place, how)  # done before the cut came: the power goes right after it

        with volumes.mounted(case.kind, image, place):
            code, said = _in_child(watched)
        assert code in (CUT, DONE), said
        return code

    def again() -> list[str]:
        slots.recover(root)
        found = host.faults(before)
        case.flow.do(root, _bundles)
        return [*found, *_end(host, case.flow)]

    host = Host(_rig, root)
    with volumes.mounted(case.kind, image, place):
        before = slots.read(root)
    until_cut(lambda: case.flow.do(root, _bundles), case.cut, case.how)
    if case.again:
        until_cut(
            lambda: (slots.recover(root), case.flow.do(root, _bundles)), case.again, volumes.WITHOUT_LOG
        )
    with volumes.mounted(case.kind, image, place):
        found = host.faults(before)
        code, said = _in_child(again)
    return [*found, *(said if code == DONE else [f"it cannot be done again: {said}"])]


def _end(host: Host, flow: Flow) -> list[str]:
    record, good = _needed(host.root), _rig.names[flow.rests]
    found = []
    if (record.phase, record.good) != (slots.IDLE, good):
        found.append(f"it ends as {record}, not on {good}")
    if not slots.links_follow(host.root, record):
        found.append("the links do not follow the record")
    if flow.skipped and not slots.skips(record, slots.digest_of(_rig.names[flow.skipped])):
        found.append(f"{flow.skipped} is not skipped")
    if record.floor < FLOOR:
        found.append(f"the floor is {record.floor}")
    if good not in slots.complete(host.root, record):
        found.append(f"{good} is not whole")
    left = [name for name in host.garbage() if not name.endswith(".new")]  # those are the checks' to clear
    return [*found, *([f"left behind: {left}"] if left else [])]


# --- whole agents ---------------------------------------------------------------------------------------


def _calls(version: str) -> int:
    """How many calls a whole agent makes until it rests."""
    image = _copied(f"agent-{version}", "ext4")
    with volumes.mounted("ext4", image, image.with_suffix(".mnt")) as place:
        return len(_agent(version, place, 0, 0).calls)


def _agent(version: str, place: Path, cut: int, how: int) -> tracer.Trace:
    host = Host(_rig, place / "root")
    rests, skipped = (NEW, "") if version == NEW else (GOOD, BAD)
    return tracer.run(
        host.supervised(),
        host.root,
        cut=cut,
        environ=environment(),
        until=lambda: host.rests_on(rests, skipped),
        at_cut=lambda: volumes.cut_power(place, how),
    )


def _cut_agent(case: AgentCase) -> list[str]:
    image = _copied(f"agent-{case.version}", case.kind)
    place = image.with_suffix(".mnt")
    host = Host(_rig, place / "root")
    with volumes.mounted(case.kind, image, place):
        before = host.record
        _agent(case.version, place, case.cut, case.how)
    with volumes.mounted(case.kind, image, place):
        found = host.faults(before)
        rests, skipped = (NEW, "") if case.version == NEW else (GOOD, BAD)
        wrong = host.settle(rests, skipped=skipped)
        return [*found, *host.faults(before), *([wrong] if wrong else [])]
