"""This module is a host under attack: a device root, its honest server, and whoever stands between them.

`victim.poll()` is the agent's own check over HTTP, with real signatures, a real bundle and its preflight.
`victim.refuses(reason)` is what every attack comes to; `victim.is_well_again()` is what must follow it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from agent_core import slots, wire
from agent_core.bundle import Index, pack
from agent_core.layout import Layout, write_durable
from agent_core.settings import AGENT, AgentSettings
from agent_core.wire import ReportAnswer
from tests.http_origin import Origin, Request, Status
from tests.repository_simulator import LIFE, PRODUCT, RepositorySimulator
from updater import identity as identities
from updater import install, poll, report
from updater.commands.status import look
from updater.commands.why import explained
from updater.decide import Action
from updater.device import Device, Outcome
from updater.identity import Identity

if TYPE_CHECKING:
    import ssl

COHORT = "stable"
OLD, GOOD, NEW = "0.9.0", "1.0.0", "1.1.0"
SEQ = {OLD: 2, GOOD: 4, NEW: 6}
FLOOR = 2
STUB = f"""\
import json, os
with open(os.path.join(os.path.dirname(os.path.realpath(__file__)), ".bundle.json")) as index:
    print(json.dumps({{"ok": True, "product": {PRODUCT!r}, "version": json.load(index)["version"]}}))
"""
"""What a bundle's agent says in its preflight; that the real one says it too is tested where it is built."""


@dataclass(frozen=True)
class Packed:
    """A bundle as it is uploaded."""

    archive: bytes
    index: bytes
    unpacked: int
    files: int


@cache
def bundle(version: str, platform: str = "any", product: str = PRODUCT) -> Packed:
    with tempfile.TemporaryDirectory() as place:
        tree, archive = Path(place) / "tree", Path(place) / "archive"
        (tree / "app").mkdir(parents=True)
        (tree / "agent.py").write_text(STUB)
        (tree / "app" / "main.py").write_text(f"print({version!r})\n" * 99)
        index = Index(product, version, platform, ("{python}", "app/main.py"), pack(tree, archive))
        return Packed(archive.read_bytes(), index.to_bytes(), index.unpacked, len(index.files))


class Server(RepositorySimulator):
    """What an honest server publishes, and the signed objects for a thief to change."""

    def release(self, version: str, seq: int, platform: str = "any", **facts: Any) -> wire.ReleaseFacts:
        """Sign a real bundle into top-level targets."""
        packed = bundle(version, platform)
        sizes = {"unpacked": packed.unpacked, "files": packed.files}
        return self.add_release(version, seq, packed.archive, packed.index, platform, **sizes, **facts)

    def archive_file(self, version: str) -> Path:
        """Where its archive lies, for tests that change the bytes."""
        path = wire.bundle_path(self.product, version, "any")
        return self.target_file(path, sha256(bundle(version).archive).hexdigest())

    def lead_to(self, version: str | None, **fields: Any) -> None:
        """Sign the directive that leads everyone to `version`, and publish it with all online keys."""
        self.set_directive(COHORT, **{"release": version, "base": version, **fields})
        self.publish()

    def forge(self, name: str, role: str, signers: list[Any] | None = None) -> None:
        """Sign a role's object as it stands, by these keys, and put it up as this file."""
        signed = getattr(self, role)
        self.write(name, self.sign(signed, self.signers[role] if signers is None else signers))


class Victim:
    """One host with 1.0.0, and the ways to attack and to heal it.

    Args:
        home: gets the server's files and the device's root.
        thresholds: of the repository's roles.
        proxied: whether the host reaches its server through a proxy, which `between` then is.
        tls: how the server shows its certificate, and the authority that the host believes.
    """

    def __init__(
        self,
        home: Path,
        thresholds: dict[str, int] | None = None,
        *,
        proxied: bool = False,
        gate: str = "",
        tls: tuple[ssl.SSLContext, Path] | None = None,
    ) -> None:
        self.server = Server(home / "www", thresholds=thresholds)
        for version in (OLD, GOOD):
            self.server.release(version, SEQ[version])
        self.server.set_policy(FLOOR)
        self.server.lead_to(GOOD)
        self.layout = Layout(home / "root")
        self.between = Origin(home / "www", tls[0] if tls else None)
        self.reports: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {"disk__reserve": 0}
        if tls:
            self.settings["server_ca_file"] = str(tls[1])
        self._home, self._gate, self._proxied = home, gate, proxied

    def __enter__(self) -> Self:
        self.between.__enter__()
        self.between.answer("POST", "/api/v1/report", self._take_report)
        self.layout.make()
        write_durable(self.layout.trust_root, self.server.trusted_root)
        identities.make_key(self.layout)
        url = "http://releases.example.org" if self._proxied else self.between.url
        identities.save(self.layout, Identity(url, PRODUCT, "web-1", "any", COHORT, gate=self._gate))
        assert install.first_version(self.device).candidate == self.name_of(GOOD)
        assert self.poll().reason == "up-to-date"
        assert self.between.paths()  # not by another way
        self._honest = self._kept()
        self.before = self.state()
        return self

    def __exit__(self, *_: object) -> None:
        self.between.__exit__()
        for directory in self.layout.versions.rglob("*"):
            if directory.is_dir() and not directory.is_symlink():
                directory.chmod(0o755)

    # --- the host ----------------------------------------------------------------------------------------

    @property
    def device(self) -> Device:
        """As the next check loads it, with what the test set."""
        flags = {"server.proxy": self.between.url} if self._proxied else {}
        loaded = AgentSettings.of(AGENT.load(environ={}, flags=flags))
        changed = {name.replace("__", "_"): value for name, value in self.settings.items()}
        return Device(self.layout, replace(loaded, **changed), identities.load(self.layout))

    def poll(self) -> Outcome:
        return poll.check(self.device)

    def name_of(self, version: str) -> str:
        return f"{version}-{sha256(bundle(version).index).hexdigest()[:12]}"

    def state(self) -> tuple[Any, ...]:
        """All that says what runs here, and every byte of it."""
        record, root = slots.read(self.layout.root), self.layout.root
        links = [(root / link).readlink() for link in ("current", "previous")]
        files = {
            str(file.relative_to(root)): (file.stat().st_mode, sha256(file.read_bytes()).hexdigest())
            for file in sorted(self.layout.versions.rglob("*"))
            if file.is_file()
        }
        return record, links, files

    def trusted(self) -> dict[str, bytes]:
        """The metadata this host has verified."""
        return {file.name: file.read_bytes() for file in self.layout.tuf.glob("*.json")}

    # --- what it comes to --------------------------------------------------------------------------------

    def refuses(self, reason: str, *, on_the_line: bool = False) -> None:
        """The next check changes nothing that runs, says `reason`, and has server and `agent why` hear it.

        Args:
            on_the_line: the line itself is refused, so nothing is said over it; the next report names it.
        """
        heard = len(self.reports)
        self.kept(reason, self.poll())
        if on_the_line:
            assert self.reports[heard:] == []
        else:
            # A download that was cut goes on at the next poll, so that is what the host is still doing.
            self._is_told(heard, reason, wire.Phase.IDLE, wire.Phase.DOWNLOADING)

    def tells(self, reason: str) -> None:
        """The report before the next check, over a line that is free again, names the refusal."""
        heard = len(self.reports)
        report.send_signed(self.device)
        self._is_told(heard, reason, wire.Phase.IDLE)

    def kept(self, reason: str, outcome: Outcome) -> None:
        """This check came to a refusal, `agent why` shows it, and nothing that runs has changed."""
        assert (outcome.action, outcome.reason) == (Action.REFUSE, reason), outcome
        assert outcome.candidate == ""
        assert self.state() == self.before
        assert list(self.layout.staging.iterdir()) == []
        *_, last = explained(look(self.layout.root))["chain"]
        assert (last["code"], last["ok"]) == (reason, False)
        assert last["then"], "nobody on the host is told what would change it"

    def says_otherwise(self) -> None:
        """Forget the last outcome: what stays the same is told once, and the next is to be told again."""
        self.device.outcome_file.unlink(missing_ok=True)

    def _is_told(self, heard: int, reason: str, *phases: wire.Phase) -> None:
        told = self.reports[heard:]
        assert told, "no report followed"
        last = wire.Report.from_json(told[-1])
        assert (last.reason, last.version) == (reason, GOOD), told
        assert last.phase in phases, told

    def is_well_again(self, *, told: bool = False) -> None:
        """With an honest server and a free way to it, the next check stages the next release whole.

        Args:
            told: it was staged before this, so the server has heard of it and does not hear it twice.
        """
        self.mend()
        heard, outcome = 0 if told else len(self.reports), self.poll()
        assert (outcome.action, outcome.reason, outcome.verified) == (Action.INSTALL, "update", True), outcome
        assert outcome.candidate == self.name_of(NEW)
        assert slots.is_complete(self.layout.root, outcome.candidate)
        self._is_told(heard, "update", wire.Phase.STAGED)

    def mend(self) -> None:
        """The honest server again: what people signed, in files of their own, under numbers that go on."""
        self.between.behave()
        self.between.directory = self.server.directory
        shutil.rmtree(self.server.directory)
        for below in ("metadata", "targets"):
            (self.server.directory / below).mkdir(parents=True)
        self.server.replay(self._honest.tree)
        self._put_back()
        for version in (OLD, GOOD, NEW):
            self.server.release(version, SEQ[version])
        self.server.set_policy(FLOOR)
        self.server.lead_to(NEW)

    def _kept(self) -> _Honest:
        server = self.server
        objects = {name: deepcopy(getattr(server, name)) for name in ("root", "targets", "cohorts")}
        return _Honest(server.tree(), objects, {role: list(keys) for role, keys in server.signers.items()})

    def _put_back(self) -> None:
        """What was signed before the attack, above every version that the attack used up."""
        server, used = self.server, {}
        for name, signed in self._honest.objects.items():
            used[name] = getattr(server, name).version
            setattr(server, name, deepcopy(signed))
        server.targets.version, server.cohorts.version = used["targets"], used["cohorts"]
        server.signers = {role: list(keys) for role, keys in self._honest.signers.items()}
        server.extra.clear()
        server.snapshot.expires = server.now + LIFE["snapshot"]
        server.timestamp.expires = server.now + LIFE["timestamp"]

    def _take_report(self, request: Request) -> Status:
        """Take what this host signed, as the server does, and nothing else."""
        told = json.loads(request.body)
        digest, counter = sha256(request.body).hexdigest(), int(request.headers[wire.HEADER_COUNTER.lower()])
        signature = bytes.fromhex(request.headers[wire.HEADER_SIGNATURE.lower()])
        public = Ed25519PublicKey.from_public_bytes(bytes.fromhex(identities.public_key(self.layout)))
        try:
            public.verify(signature, wire.signed_text("POST", "/api/v1/report", digest, counter))
        except InvalidSignature:
            return Status(401)
        self.reports.append(told)
        accepted = max([step["number"] for step in told.get("transitions", [])], default=0)
        answer = ReportAnswer(COHORT, accepted, "session", 86_400)
        return Status(200, {"Content-Type": "application/json"}, json.dumps(answer.to_json()).encode())


@dataclass(frozen=True)
class _Honest:
    """The server before the attack."""

    tree: dict[str, bytes]
    objects: dict[str, Any]
    signers: dict[str, list[Any]]
