"""A host that is enrolled, with versions on its disk and nothing running: what commands look at."""

from __future__ import annotations

import json
from dataclasses import replace
from hashlib import sha256

import pytest

from agent_core import slots
from agent_core.bundle import INDEX_NAME, File, Index
from agent_core.layout import Layout, write_durable
from agent_core.slots import Record, Slots
from agent_core.wire import ReleaseFacts
from updater import identity as identities
from updater.cli import main
from updater.device import Device
from updater.identity import Identity

PRODUCT = "warehouse-agent"
PROGRAM = b"{}"


def _index(version, *words) -> bytes:
    files = (File("agent.py", 0o644, len(PROGRAM), sha256(PROGRAM).hexdigest()),)
    return Index(PRODUCT, version, "any", ("{python}", "agent.py", *words), files).to_bytes()


def _named(raw) -> str:
    return f"{Index.from_bytes(raw).version}-{sha256(raw).hexdigest()[:12]}"


_MADE = [*map(_index, ("1.0.0", "1.1.0", "1.2.0")), _index("1.0.0", "--twin")]
INDEXES = {_named(raw): raw for raw in _MADE}
A, B, C, TWIN_OF_A = INDEXES


class Host:
    """The commands of `agent`, as typed on this host; what they print, as people and as programs see it."""

    def __init__(self, root, capsys) -> None:
        self.root, self.capsys = root, capsys
        self.layout = Layout(root)
        self.layout.make()
        identity = Identity("http://127.0.0.1:9", PRODUCT, "web-17", "any", "eu-web")
        identities.save(self.layout, identity)
        identities.make_key(self.layout)
        write_durable(self.layout.trust_root, b"{}")
        self.layout.settings.write_text("[server]\ntimeout_s = 1.0\n")

    def device(self) -> Device:
        return Device.load(self.root)

    def stage(self, *names, seq=None) -> None:
        """Whole versions, with their signed facts."""
        for name in names:
            place = self.layout.version_dir(name)
            place.mkdir()
            raw, version = INDEXES[name], slots.version_of(name)
            (place / INDEX_NAME).write_bytes(raw)
            (place / "agent.py").write_bytes(PROGRAM)
            number = seq if seq is not None else 1 + int(version.split(".")[1])
            facts = ReleaseFacts(PRODUCT, version, number, "any", sha256(raw).hexdigest(), len(raw), 2, 1)
            self.device().keep_facts(name, facts)

    def put(self, record: Record) -> None:
        Slots(self.root).write(record)
        slots.recover(self.root)

    def on(self, good, previous="", **more) -> None:
        self.put(Record(good=good, previous=previous or good, **more))

    @property
    def record(self) -> Record:
        record = slots.read(self.root)
        assert record is not None
        return record

    def enroll(self, **changes) -> None:
        identities.save(self.layout, replace(identities.load(self.layout), **changes))

    def targets(self, *, floor=0, revoked=(), version=3, expires="2026-01-01T00:00:00Z") -> None:
        """What a server's verified targets would say, in the cache."""
        custom = {"schema": 1, "floor_seq": floor, "revoked_seq": list(revoked)}
        signed = {"version": version, "expires": expires}
        signed["targets"] = {f"policy/{PRODUCT}.json": {"custom": custom}}
        (self.layout.tuf / "targets.json").write_text(json.dumps({"signed": signed}))

    def agent(self, *words):
        """Exit code, stdout, stderr."""
        self.capsys.readouterr()
        code = main([*words, "--root", str(self.root)])
        told = self.capsys.readouterr()
        return code, told.out, told.err

    def ask(self, *words):
        """What a command says with --json."""
        code, out, _ = self.agent(*words, "--json")
        return code, json.loads(out)


@pytest.fixture
def host(tmp_path, capsys):
    return Host(tmp_path / "root", capsys)
