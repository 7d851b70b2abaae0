"""This module holds the stories that the model tier tells: what a host may be doing when its power goes."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from functools import cache, partial
from typing import TYPE_CHECKING

from agent_core import slots
from agent_core.layout import Layout
from agent_core.slots import Record, Slots
from tests.crash import deeds
from tests.crash.bundles import FLOOR, Bundle, offer
from tests.crash.journal import Entry, File, Link, Tree
from tests.crash.life import fast_motion
from tests.crash.script import INSTALLED, NEW_LAUNCHER, OLD_LAUNCHER, A, B, C, Ledger, P, Script
from tests.crash.watch import harvest

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.crash.life import Host

DEFAULT_SHARE = 3
"""Of stories that differ little from others; `RELFLEET_CRASH=all` goes on from every state."""


@cache
def _bare() -> Tree:
    """A root as `Layout.make` leaves it."""
    with tempfile.TemporaryDirectory() as place, fast_motion():
        Layout(f"{place}/root").make()  # type: ignore[arg-type]
        return harvest(f"{place}/root")


def _installed(record: Record, *bundles: Bundle, more: dict[str, Entry] | None = None) -> Tree:
    """A root with these versions, this record, and links that follow it."""
    tree = {**_bare(), **_version(*bundles), **(more or {})}
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(f"{root}/state")
        handle = os.open(f"{root}/state/slots", os.O_WRONLY | os.O_CREAT)
        os.write(handle, bytes(slots.SLOTS_LENGTH))
        os.close(handle)
        for _ in range(3):
            Slots(root).write(record)
        with open(f"{root}/state/slots", "rb") as stream:
            tree["state/slots"] = File(stream.read(), 0o600)
    current, previous = slots._shown(record)
    return {**tree, "current": Link(f"versions/{current}"), "previous": Link(f"versions/{previous}")}


def _version(*bundles: Bundle, where: str = "versions", cut: bool = False) -> Tree:
    return {
        (f"{where}/{each.name}/{path}" if path else f"{where}/{each.name}"): entry
        for each in bundles
        for path, entry in each.tree.items()
        if not (cut and path == "agent.py")
    }


def _record(good: Bundle, previous: Bundle, **more: object) -> Record:
    return Record(
        good=good.name, previous=previous.name, tried=good.name, reason="observed", floor=FLOOR, **more
    )  # type: ignore[arg-type]


def _part(content: bytes, etag: str = "", digest: str = B.release.sha256) -> Tree:
    part = f"download/{digest}.part"
    return {part: File(content, 0o600), **({f"{part}.etag": File(etag.encode(), 0o600)} if etag else {})}


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()}"'


def stories() -> dict[str, Script]:
    """Each by its name."""
    settled = _installed(_record(A, P), A, P)
    ledger = Ledger(goods=frozenset({A.name}), floor=FLOOR)
    half = B.archive[: len(B.archive) // 2]
    skips_b = frozenset({B.digest})
    told = [
        Script("first install", {}, A, A, ledger=Ledger(), whole=()),
        Script("upgrade", settled, B, B, deeds.commit, floor=FLOOR + 1, ledger=ledger),
        Script("upgrade without a previous", _installed(_record(A, A), A), B, B, deeds.commit, ledger=ledger),
        Script("agent goes back", settled, B, A, deeds.roll_back, skipped=skips_b, ledger=ledger),
        Script("launcher goes back", settled, B, A, deeds.crash, skipped=skips_b, ledger=ledger),
        Script("trial stopped for ever", settled, B, A, deeds.stop_cleanly, skipped=skips_b, ledger=ledger),
        Script(
            "operator goes back", settled, A, P, operator=deeds.go_back, whole=(A, P),
            skipped=frozenset({A.digest}), ledger=ledger,
        ),
        Script(
            "operator goes back by name", _installed(_record(A, P), A, P, C), A, C,
            operator=partial(deeds.go_back, to=C.name), whole=(A, C),
            skipped=frozenset({A.digest}), ledger=ledger,
        ),
        Script(
            "operator names a damaged version",
            _installed(_record(A, P), A, P, more=_version(C, cut=True)), A, A,
            operator=partial(deeds.choose_damaged, to=C.name), whole=(A, P), ledger=ledger,
        ),
        Script(
            "operator ends a trial by name", settled, B, A, partial(deeds.go_back, to=A.name),
            skipped=skips_b, ledger=ledger, share=DEFAULT_SHARE,
        ),
        Script("operator ends a trial", settled, B, A, deeds.go_back, skipped=skips_b, ledger=ledger),
        Script("preflight refuses", settled, B, A, preflight=False, skipped=skips_b, ledger=ledger),
        Script(
            "clean-up",
            _installed(
                _record(A, P), A, P, C,
                more={
                    **_version(B, where="staging", cut=True),
                    **_version(C, where="trash"),
                    "trash/file.0": File(b"x", 0o600),
                    "launcher/.launcher.pyz.0.new": File(NEW_LAUNCHER[:9], 0o600),
                    ".current.new": Link("versions/nowhere"),
                },
            ),
            A, A, whole=(A, P), ledger=ledger,
        ),
        Script(
            "resumed download",
            _installed(_record(A, P), A, P, more=_part(half, _etag(B.archive))),
            B, B, deeds.commit, ledger=ledger,
        ),
        Script(
            "part of another file",
            _installed(_record(A, P), A, P, more=_part(half[::-1], _etag(B.archive))),
            B, B, deeds.commit, ledger=ledger,
        ),
        Script(
            "server without ranges",
            _installed(_record(A, P), A, P, more=_part(half)),
            B, B, deeds.commit, ranges=False, ledger=ledger,
        ),
        Script(
            "damaged version in the way",
            _installed(_record(A, P), A, P, more=_version(B, cut=True)),
            B, B, deeds.commit, ledger=ledger,
        ),
        *_deltas(settled, ledger),
        *_launchers(),
    ]  # fmt: skip
    return {script.name: script for script in told}


def _deltas(settled: Tree, ledger: Ledger) -> list[Script]:
    """Upgrades that come by a delta from the good version, or that one is published for in vain."""
    good, spoilt = (
        offer(A.index.version, B.index.version),
        offer(A.index.version, B.index.version, spoilt=True),
    )
    half = _part(good.content[: len(good.content) // 2], _etag(good.content), good.delta.sha256)
    twice = {"state/deltas.json": File(json.dumps({good.delta.sha256: 2}).encode(), 0o644)}
    told = [
        ("upgrade by a delta", settled, good, ledger),
        ("resumed delta", {**settled, **half}, good, ledger),
        ("delta of other bytes", settled, spoilt, ledger),
        ("last try of a delta", {**settled, **twice}, good, ledger._replace(begun=2)),
    ]
    return [
        Script(name, tree, B, B, deeds.commit, offer=delta, ledger=ledger, share=DEFAULT_SHARE)
        for name, tree, delta, ledger in told
    ]


def _launchers() -> list[Script]:
    """Another launcher takes its place, or does not."""

    def standing(content: bytes, before: bytes = b"") -> Tree:
        files: Tree = {"launcher/launcher.pyz": File(content, 0o755)}
        return files | ({"launcher/launcher.prev.pyz": File(before, 0o755)} if before else {})

    def script(name: str, deed: Callable[[Host], None], tree: Tree, last: bytes) -> Script:
        first = tree["launcher/launcher.pyz"]
        assert isinstance(first, File)
        ledger = INSTALLED._replace(launchers=frozenset({first.content}))
        root = _installed(_record(A, P), A, P, more=tree)
        return Script(
            name, root, A, A, operator=deed, launcher=last, kept_launcher=OLD_LAUNCHER, ledger=ledger
        )  # fmt: skip

    return [
        script("upgrade of the launcher", deeds.upgrade_launcher, standing(OLD_LAUNCHER), NEW_LAUNCHER),
        script("launcher that proves nothing", deeds.refuse_launcher, standing(OLD_LAUNCHER), OLD_LAUNCHER),
        script(
            "launcher brought back", deeds.bring_launcher_back, standing(NEW_LAUNCHER, OLD_LAUNCHER), OLD_LAUNCHER
        ),
    ]  # fmt: skip
