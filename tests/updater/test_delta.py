"""A device that has a version gets the next by a delta; when anything is wrong, by the full bundle."""

from __future__ import annotations

import errno
import json
import os
import random
from contextlib import contextmanager, suppress
from hashlib import sha256

import pytest

from agent_core import delta, disk, slots
from agent_core.bundle import Index, pack
from agent_core.errors import DiskError
from agent_core.layout import Layout
from agent_core.settings import AGENT, AgentSettings
from agent_core.wire import DeltaFacts, ReportAnswer, delta_path
from tests.http_origin import Origin, Status, Truncated
from tests.repository_simulator import PRODUCT, RepositorySimulator
from updater import identity as identities
from updater import install, poll, stage
from updater.decide import Action
from updater.device import Device

NOISE = random.Random(2).randbytes(80_000)
AGENT_PY = 'import json\nprint(json.dumps({{"version": "{version}", "product": "{product}", "ok": True}}))\n'
ONE, TWO = "1.0.0", "1.1.0"


class Fleet:
    """A server with two releases and a delta between them, and one device that runs the first."""

    def __init__(self, home, origin):
        self.home, self.origin = home, origin
        origin.answer("POST", "/api/v1/report", accept)
        self.repository = RepositorySimulator(origin.directory)
        self.trees, self.indexes = {}, {}
        for seq, version in enumerate((ONE, TWO), 1):
            self.add(version, seq)
        self.content = self.make_delta()
        self.put_delta(self.content)
        self.layout = Layout(home / "root")
        self.layout.make()
        self.lead_to(ONE)
        self.layout.trust_root.write_bytes(self.repository.trusted_root)
        identities.make_key(self.layout)
        identities.save(self.layout, identities.Identity(origin.url, PRODUCT, "web-1", "any", "stable"))
        install.first_version(self.device)
        self.lead_to(TWO)
        origin.requests.clear()

    def add(self, version, seq):
        tree = self.trees[version] = self.home / version
        (tree / "app").mkdir(parents=True)
        (tree / "agent.py").write_text(AGENT_PY.format(version=version, product=PRODUCT))
        (tree / "app" / "data").write_bytes(NOISE + version.encode())
        (tree / "app" / "same").write_bytes(NOISE[::-1])
        archive = self.home / f"{version}.tar.zst"
        index = Index(PRODUCT, version, "any", ("{python}", "app/main.py"), pack(tree, archive))
        self.indexes[version] = index
        facts = {"unpacked": index.unpacked, "files": len(index.files)}
        self.repository.add_release(version, seq, archive.read_bytes(), index.to_bytes(), **facts)

    def digest(self, version):
        return sha256(self.indexes[version].to_bytes()).hexdigest()

    def make_delta(self):
        out = self.home / "delta"
        delta.make(self.trees[ONE], self.indexes[ONE], self.trees[TWO], self.indexes[TWO], out)
        return out.read_bytes()

    @property
    def path(self):
        return delta_path(PRODUCT, TWO, "any", self.digest(ONE))

    def put_delta(self, content, to=None):
        facts = DeltaFacts(ONE, self.digest(ONE), to or self.digest(TWO))
        self.repository.add_target(self.path, content, facts.to_json())

    @property
    def delta_file(self):
        target = self.repository.targets.targets[self.path]
        return self.repository.target_file(self.path, target.hashes["sha256"])

    def lead_to(self, version):
        self.repository.set_directive(release=version, base=version, revision=int(version == TWO) + 1)
        self.repository.publish()

    @property
    def device(self):
        values = AGENT.load(environ={}, flags={"disk.reserve": 0})
        return Device(self.layout, AgentSettings.of(values), identities.load(self.layout))

    @property
    def installed(self):
        return self.layout.versions / f"{ONE}-{self.digest(ONE)[:12]}"

    def check(self):
        outcome = poll.check(self.device)
        assert (outcome.action, outcome.candidate[:5]) == (Action.INSTALL, TWO), outcome
        directory = self.layout.version_dir(outcome.candidate)
        for file in self.indexes[TWO].files:
            assert sha256((directory / file.path).read_bytes()).hexdigest() == file.sha256
            assert oct((directory / file.path).stat().st_mode & 0o777) == "0o444"
        return outcome

    def fetched(self):
        """The deltas and archives that were asked for since this was asked last."""
        paths = [path.rpartition(".")[2] for path in self.origin.paths() if "/targets/" in path]
        self.origin.requests.clear()
        return [path for path in paths if path != "json"]

    def forget_two(self):
        """As if the second release had never been staged."""
        for directory in self.layout.versions.glob(f"{TWO}-*"):
            stage.discard(self.layout, directory)
        self.layout.poll.unlink()


def accept(request):
    told = json.loads(request.body)
    accepted = max([step["number"] for step in told.get("transitions", [])], default=0)
    answer = ReportAnswer("stable", accepted, "session", 86_400)
    return Status(200, {"Content-Type": "application/json"}, json.dumps(answer.to_json()).encode())


@contextmanager
def led_to_two(home, **directive):
    """Devices on 1 whose directive wants 2, under these terms."""
    (home / "www").mkdir()
    with Origin(home / "www") as origin:
        fleet = Fleet(home, origin)
        fleet.repository.set_directive(release=TWO, base=TWO, revision=3, **directive)
        fleet.repository.publish()
        yield fleet


@pytest.fixture
def fleet(tmp_path):
    (tmp_path / "www").mkdir()
    with Origin(tmp_path / "www") as origin:
        yield Fleet(tmp_path, origin)


def test_a_device_goes_on_by_a_delta_and_fetches_no_bundle(fleet):
    outcome = fleet.check()
    assert fleet.fetched() == ["delta"]
    assert len(fleet.content) < 1_000 < 160_000 < fleet.indexes[TWO].unpacked
    assert outcome.detail == f"to {TWO}"
    assert list(fleet.layout.download.iterdir()) == list(fleet.layout.staging.iterdir()) == []
    assert json.loads((fleet.layout.state / "deltas.json").read_text()) == {}


def test_a_delta_may_start_from_a_version_that_is_only_kept(fleet):
    record = slots.read(fleet.layout.root)
    other = fleet.layout.version_dir(f"0.9.0-{'0' * 12}")
    other.mkdir()
    slots.Slots(fleet.layout.root).write(slots.Record(seq=record.seq + 1, good=other.name))
    fleet.check()
    assert fleet.fetched() == ["delta"]


def changed(fleet):
    fleet.delta_file.write_bytes(b"?" + fleet.content[1:])


def too_short(fleet):
    fleet.delta_file.write_bytes(fleet.content[:-1])


def signed(content):
    def spoil(fleet):
        fleet.put_delta(content(fleet.content))
        fleet.repository.publish()

    return spoil


def damaged(path):
    def spoil(fleet):
        file = fleet.installed / path
        file.chmod(0o644)
        file.write_bytes(b"?" + file.read_bytes()[1:])

    return spoil


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        pytest.param(changed, "digest-mismatch", id="changed on the server"),
        pytest.param(too_short, "length-mismatch", id="shorter than signed"),
        pytest.param(signed(lambda right: right[:-1]), "bad-archive", id="signed, but cut"),
        pytest.param(signed(lambda right: right + b"?"), "bad-archive", id="signed, but longer"),
        pytest.param(signed(lambda right: b"../../x" + right), "bad-archive", id="signed, but a path"),
        pytest.param(damaged("app/same"), "digest-mismatch", id="an old file to be copied is damaged"),
        pytest.param(damaged("app/data"), "digest-mismatch", id="an old file to be the prefix is damaged"),
    ],
)
def test_a_delta_that_fails_is_not_tried_again_and_the_full_bundle_is_taken_at_once(fleet, spoil, reason):
    """Case 30."""
    spoil(fleet)
    outcome = fleet.check()
    assert fleet.fetched()[0] == "delta"
    assert outcome.detail.startswith(f"to {TWO}; the delta from {ONE} did not serve ({reason}), the full")
    assert list(fleet.layout.download.iterdir()) == list(fleet.layout.staging.iterdir()) == []
    fleet.forget_two()
    assert fleet.check().detail == f"to {TWO}"
    assert fleet.fetched() == ["zst"]


def test_a_delta_that_is_absent_is_asked_for_three_times_and_the_full_bundle_taken_each_time(fleet):
    """It may still be on its way to the server."""
    fleet.delta_file.unlink()
    for asked in (["delta", "zst"], ["delta", "zst"], ["delta", "zst"], ["zst"]):
        fleet.check()
        assert fleet.fetched() == asked
        fleet.forget_two()


def test_a_delta_without_memory_is_given_up_for_the_full_bundle(fleet, monkeypatch):
    def apply(*_):
        raise MemoryError

    monkeypatch.setattr(delta, "apply", apply)
    assert "did not serve (internal)" in fleet.check().detail
    assert fleet.fetched() == ["delta", "zst"]


class Killed(BaseException):
    """What no code can catch, nearly."""


def test_a_delta_whose_making_killed_the_checker_is_not_tried_again(fleet, monkeypatch):
    def apply(*_):
        raise Killed

    monkeypatch.setattr(delta, "apply", apply)
    with pytest.raises(Killed):
        poll.check(fleet.device)
    assert fleet.fetched() == ["delta"]
    fleet.check()
    assert fleet.fetched() == ["zst"]


def test_a_delta_that_was_cut_goes_on_where_it_was(fleet):
    fleet.origin.misbehave(".delta", Truncated(20), times=1)
    fleet.origin.misbehave(".tar.zst", Status(503), times=1)
    assert poll.check(fleet.device).failed
    assert fleet.fetched() == ["delta", "zst"]
    assert fleet.check().detail == f"to {TWO}"
    ranges = [request.headers.get("range") for request in fleet.origin.requests if ".delta" in request.path]
    assert ranges == ["bytes=20-"]
    assert fleet.fetched() == ["delta"]


@pytest.mark.parametrize("to", ["0" * 64, "no digest"])
def test_a_delta_that_is_signed_as_something_else_is_not_fetched(fleet, to):
    fleet.put_delta(fleet.content, to=to)
    fleet.repository.publish()
    fleet.check()
    assert fleet.fetched() == ["zst"]


def test_a_delta_that_spares_nothing_is_not_fetched(fleet):
    fleet.put_delta(bytes(10**6))
    fleet.repository.publish()
    fleet.check()
    assert fleet.fetched() == ["zst"]


def test_a_delta_that_the_cohorts_key_lists_is_not_seen(fleet):
    role, path = fleet.repository.targets, fleet.path
    fleet.repository.cohorts.targets[path] = role.targets.pop(path)
    fleet.repository.publish()
    fleet.check()
    assert fleet.fetched() == ["zst"]


def test_there_must_be_room_for_a_delta_before_it_is_fetched(fleet):
    values = AGENT.load(environ={}, flags={"disk.reserve": 2**50})
    device = Device(fleet.layout, AgentSettings.of(values), identities.load(fleet.layout))
    outcome = poll.check(device)
    assert (outcome.failed, outcome.reason) == (True, "no-room")
    assert fleet.fetched() == []
    fleet.check()
    assert fleet.fetched() == ["delta"]


class Refusing:
    """A disk that refuses the n-th call of one operation, once."""

    def __init__(self, name, number):
        self.name, self.left = name, number

    def before(self, name, words, options):
        self.left -= name == self.name
        if name == self.name and not self.left:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def after(self, name, words, options, result):
        """Nothing: only what has not happened yet can fail."""


class Cut:
    """Ends the process, as far as it can be felt, before the n-th operation on the disk."""

    def __init__(self, number):
        self.left = number

    def before(self, name, words, options):
        self.left -= 1
        if self.left == 0:
            raise Killed

    def after(self, name, words, options, result):
        """Nothing: it ends before."""


def test_a_kill_at_any_step_leaves_nothing_or_the_whole_version_and_the_next_check_finishes(fleet):
    transport = fleet.device.transport()
    with poll._catalog(fleet.device, transport) as catalog:
        poll._refresh(fleet.device, catalog)
        release = catalog.release(TWO, ["any"])
        step, ended = 1, False
        while not ended:
            cut = Cut(step)
            with suppress(Killed), disk.watched_by(cut):
                poll._Check(fleet.device, catalog, transport, None, None)._stage(release)
            ended, step = cut.left > 0, step + 9  # every single one would cost ten seconds
            for directory in fleet.layout.versions.glob(f"{TWO}-*"):
                assert stage.is_complete(directory, fleet.indexes[TWO].to_bytes())
            name, _ = poll._Check(fleet.device, catalog, transport, None, None)._stage(release)
            assert stage.is_complete(fleet.layout.version_dir(name), fleet.indexes[TWO].to_bytes())
            stage.discard(fleet.layout, fleet.layout.version_dir(name))
            disk.remove(fleet.layout.state / "deltas.json")
    assert step > 100


@pytest.mark.parametrize("operation", ["mkdir", "write", "fchmod", "rename_new"])
def test_a_disk_that_refuses_in_the_middle_leaves_nothing_and_takes_the_full_bundle(fleet, operation):
    catalogue = poll._catalog(fleet.device, fleet.device.transport())
    with catalogue as catalog:
        poll._refresh(fleet.device, catalog)
        release = catalog.release(TWO, ["any"])
        check = poll._Check(fleet.device, catalog, fleet.device.transport(), None, None)
        refused = Refusing(operation, 3 if operation == "write" else 1)
        with disk.watched_by(refused):
            with suppress(DiskError):  # where the full bundle meets it
                check._stage(release)
    assert refused.left <= 0
    assert list(fleet.layout.staging.iterdir()) == []
    fleet.check()
