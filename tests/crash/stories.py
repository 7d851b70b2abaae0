"""This module holds the stories that the model tier tells: what a host may be doing when its power goes."""

from __future__ import annotations

import hashlib
import os
import tempfile
from functools import cache

from agent_core import slots
from agent_core.layout import Layout
from agent_core.slots import Record, Slots
from tests.crash.bundles import FLOOR, Bundle
from tests.crash.journal import Entry, File, Link, Tree
from tests.crash.life import A, B, C, Host, Ledger, P, Script, fast_motion
from tests.crash.watch import harvest


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


def _part(content: bytes, etag: str = "") -> Tree:
    part = f"download/{B.release.sha256}.part"
    return {part: File(content, 0o600), **({f"{part}.etag": File(etag.encode(), 0o600)} if etag else {})}


def _etag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()}"'


def stories() -> dict[str, Script]:
    """Each by its name."""
    settled = _installed(_record(A, P), A, P)
    ledger = Ledger(goods=frozenset({A.name}), floor=FLOOR)
    half = B.archive[: len(B.archive) // 2]
    skips_b = frozenset({B.digest})
    asked = ledger._replace(asked=False)
    told = [
        Script("first install", {}, A, A, ledger=Ledger(), whole=()),
        Script("upgrade", settled, B, B, Host.commit, floor=FLOOR + 1, ledger=ledger),
        Script("upgrade without a previous", _installed(_record(A, A), A), B, B, Host.commit, ledger=ledger),
        Script("agent goes back", settled, B, A, Host.roll_back, skipped=skips_b, ledger=ledger),
        Script("launcher goes back", settled, B, A, Host.crash, skipped=skips_b, ledger=ledger),
        Script("trial stopped for ever", settled, B, A, Host.stop_cleanly, skipped=skips_b, ledger=ledger),
        Script(
            "operator goes back", settled, A, P, operator=Host.go_back, whole=(A, P),
            skipped=frozenset({A.digest}), ledger=asked,
        ),
        Script("operator ends a trial", settled, B, A, Host.go_back, skipped=skips_b, ledger=ledger),
        Script("preflight refuses", settled, B, A, preflight=False, skipped=skips_b, ledger=ledger),
        Script(
            "clean-up",
            _installed(
                _record(A, P), A, P, C,
                more={
                    **_version(B, where="staging", cut=True),
                    **_version(C, where="trash"),
                    "trash/file.0": File(b"x", 0o600),
                    ".current.new": Link("versions/nowhere"),
                },
            ),
            A, A, whole=(A, P), ledger=ledger,
        ),
        Script(
            "resumed download",
            _installed(_record(A, P), A, P, more=_part(half, _etag(B.archive))),
            B, B, Host.commit, ledger=ledger,
        ),
        Script(
            "part of another file",
            _installed(_record(A, P), A, P, more=_part(half[::-1], _etag(B.archive))),
            B, B, Host.commit, ledger=ledger,
        ),
        Script(
            "server without ranges",
            _installed(_record(A, P), A, P, more=_part(half)),
            B, B, Host.commit, ranges=False, ledger=ledger,
        ),
        Script(
            "damaged version in the way",
            _installed(_record(A, P), A, P, more=_version(B, cut=True)),
            B, B, Host.commit, ledger=ledger,
        ),
    ]  # fmt: skip
    return {script.name: script for script in told}
