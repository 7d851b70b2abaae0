"""When a check is due; downloading and staging on a real directory from a server on loopback; room for it."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from types import SimpleNamespace

import pytest

from agent_core import clock, disk, slots
from agent_core.bundle import INDEX_NAME, Index, pack
from agent_core.errors import ConflictError, DiskError, Exit
from agent_core.layout import Layout
from agent_core.settings import AGENT, AgentSettings
from agent_core.spool import Spool
from agent_core.wire import AttemptState, Directive, Phase, Policy, ReleaseFacts
from tests.http_origin import Origin
from updater import activation, control, offline, poll, report, service
from updater import attempt as attempts
from updater import identity as identities
from updater.catalog import Release, alone
from updater.decide import Action, Running
from updater.device import Device, Outcome
from updater.identity import Identity
from updater.service import Service

PREFLIGHT = {"ok": True, "product": "shop", "version": "2.0.0"}
GOOD, BEFORE, SPARE = (f"1.{number}.0-{str(number) * 12}" for number in range(3))


@pytest.fixture
def origin(tmp_path):
    (tmp_path / "www" / "targets" / "bundles").mkdir(parents=True)
    with Origin(tmp_path / "www") as origin:
        yield origin


@pytest.fixture
def release(tmp_path, origin):
    """A bundle as the server gives it out, and what the release keys say of it."""
    tree, archive = tmp_path / "tree", tmp_path / "archive"
    (tree / "app").mkdir(parents=True)
    (tree / "agent.py").write_text(f"print({json.dumps(json.dumps(PREFLIGHT))})")
    (tree / "app" / "main.py").write_text("")
    index = Index("shop", "2.0.0", "any", ("{python}", "app/main.py"), pack(tree, archive))
    raw, packed = index.to_bytes(), archive.read_bytes()
    digests = [sha256(content).hexdigest() for content in (packed, raw)]
    bundles = origin.directory / "targets" / "bundles"
    (bundles / f"{digests[0]}.any.tar.zst").write_bytes(packed)
    (bundles / f"{digests[1]}.any.index.json").write_bytes(raw)
    facts = ReleaseFacts(
        product="shop",
        version="2.0.0",
        seq=7,
        platform="any",
        index_sha256=digests[1],
        index_length=len(raw),
        unpacked=index.unpacked,
        files=len(index.files),
    )
    paths = ("bundles/any.tar.zst", "bundles/any.index.json")
    return Release(facts, "any", paths[0], digests[0], len(packed), paths[1], digests[1], len(raw))


@pytest.fixture
def layout(tmp_path):
    layout = Layout(tmp_path / "root")
    layout.make()
    for name in (GOOD, BEFORE, SPARE):
        (layout.versions / name).mkdir()
        for part in ("agent.py", ".bundle.json"):
            (layout.versions / name / part).write_text("")
    slots.Slots(layout.root).write(slots.Record(good=GOOD, previous=BEFORE))
    return layout


def device_of(layout, origin, **settings):
    flags = {name.replace("__", "."): value for name, value in settings.items()}
    set_here = AgentSettings.of(AGENT.load(environ={}, flags={"versions.keep": 3, **flags}))
    identity = Identity(origin.url, "shop", "web-1", "any", "main")
    return Device(layout, set_here, identity)


def stage(layout, origin, release, **settings):
    device = device_of(layout, origin, **settings)
    catalog = SimpleNamespace(delta=lambda *_: None)
    check = poll._Check(device, catalog, device.transport(), clock.now(), None)
    return check._stage(release)[0]


def versions(layout):
    return {path.name for path in layout.versions.iterdir()}


class NoRoom:
    """A disk on which one operation finds no room, so often; `after` is where it is met."""

    def __init__(self, name, times):
        self.name, self.left = name, times

    def before(self, name, words, options):
        if name == self.name and self.left:
            self.left -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def after(self, name, words, options, result):
        """Nothing: only what has not happened yet can fail."""


# --- when a check is due, and what a clock does to it ------------------------------------------------------

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)


def outcome(**changes):
    plain = Outcome(Action.STAY, "splay", "", clock.iso(NOON), again=clock.iso(NOON + HOUR))
    return replace(plain, **changes)


@pytest.mark.parametrize(
    ("last", "now", "due"),
    [
        pytest.param(None, NOON, True, id="never done"),
        pytest.param(outcome(failed=True), NOON, True, id="not finished"),
        pytest.param(outcome(), NOON, False, id="its time is to come"),
        pytest.param(outcome(), NOON + HOUR, True, id="its time has come"),
        pytest.param(outcome(), NOON - HOUR, True, id="the clock was set back"),
        pytest.param(outcome(again=None), NOON - HOUR, False, id="no time was set"),
        pytest.param(outcome(action=Action.INSTALL, candidate=GOOD), NOON, False, id="installed since"),
        pytest.param(outcome(action=Action.INSTALL, candidate=SPARE), NOON, True, id="not installed"),
    ],
)
def test_a_check_is_due(last, now, due):
    assert poll.is_due(last, GOOD, now) is due


def test_a_directive_seen_under_a_clock_that_ran_ahead_begins_its_splay_anew(layout, origin):
    device = device_of(layout, origin)
    word = Directive("shop", "main", "2.0.0", None, 10_000, "salt", 1, splay_s=600)
    assert device.see(word, NOON + 12 * HOUR).since == NOON + 12 * HOUR
    assert device.see(word, NOON).since == NOON
    assert device.see(word, NOON + HOUR).since == NOON


# --- room ------------------------------------------------------------------------------------------------


def test_a_release_is_downloaded_and_staged(layout, origin, release):
    name = stage(layout, origin, release)
    assert slots.is_complete(layout.root, name)
    assert versions(layout) == {GOOD, BEFORE, SPARE, name}
    assert list(layout.download.iterdir()) == []


@pytest.mark.parametrize("operation", ["reserve", "mkdir", "write", "fsync"])
def test_a_version_that_is_kept_without_need_gives_way_when_there_is_no_room(
    layout, origin, release, operation
):
    with disk.watched_by(NoRoom(operation, 1)):
        name = stage(layout, origin, release)
    assert versions(layout) == {GOOD, BEFORE, name}


def test_what_is_needed_never_gives_way(layout, origin, release):
    with disk.watched_by(NoRoom("reserve", 9)), pytest.raises(DiskError) as caught:
        stage(layout, origin, release)
    assert caught.value.reason == "no-room"
    assert versions(layout) == {GOOD, BEFORE}
    assert list(layout.staging.iterdir()) == []


def test_a_bundle_that_could_never_be_unpacked_is_not_downloaded(layout, origin, release):
    with pytest.raises(DiskError) as caught:
        stage(layout, origin, release, disk__reserve=2**50)
    assert caught.value.reason == "no-room"
    assert "are missing" in caught.value.why
    assert not any(path.endswith(".tar.zst") for path in origin.paths())
    assert list(layout.download.iterdir()) == []


# --- when to check ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("outcome", "unverified", "due"),
    [
        (None, False, True),
        (Outcome(Action.STAY, "up-to-date", "", "", verified=True), False, False),
        (Outcome(Action.STAY, "up-to-date", "", "", verified=True), True, True),
        (Outcome(Action.REFUSE, "offline", "", "", failed=True), False, True),
        (Outcome(Action.INSTALL, "update", "", "", candidate=GOOD), False, False),
        (Outcome(Action.INSTALL, "update", "", "", candidate=SPARE), False, True),
    ],
    ids=["never", "done", "done, but not told to the trial", "failed", "installed", "staged"],
)
def test_a_check_is_due_until_it_came_to_its_end_and_its_trial_heard_of_it(outcome, unverified, due):
    assert poll.is_due(outcome, GOOD, clock.now(), unverified=unverified) is due


def test_what_another_check_is_staging_is_not_cleared_away(layout, origin):
    half = layout.staging / "2.0.0-222222222222"
    half.mkdir()
    device = device_of(layout, origin)
    with alone(layout.tuf):
        poll.clear(device)
        assert half.exists()
    poll.clear(device)
    assert not half.exists()


# --- an attempt that was cut off before its trial ---------------------------------------------------------


@pytest.mark.parametrize("state", sorted(attempts.BEFORE_TRIAL))
@pytest.mark.parametrize(
    ("mode", "said"),
    [
        pytest.param({"release": "2.0.0", "mode": "suspended"}, "as it was", id="halted"),
        pytest.param({"release": "1.0.0", "rollback": True}, "idle", id="undone"),
        pytest.param({"release": "2.0.0", "mode": "suspended", "salt": "later"}, "idle", id="another"),
        pytest.param({"release": None, "base": None}, "idle", id="nothing wanted"),
    ],
)
def test_an_attempt_is_named_no_longer_than_it_is_wanted(layout, origin, release, state, mode, said):
    device = device_of(layout, origin)
    begun = attempts.Attempt("2.0.0", release.facts.index_sha256[:12], "salt", state)
    attempts.save(device.attempt_file, begun)
    word = Directive(**{"product": "shop", "cohort": "main", "release": "2.0.0", "base": "1.0.0",
                        "progress": 10_000, "salt": "salt", "revision": 2, **mode})  # fmt: skip
    here = replace(release.facts, version="1.0.0", seq=1, index_sha256="0" * 64)
    known = {"2.0.0": release, "1.0.0": replace(release, facts=here)}
    catalog = SimpleNamespace(policy=lambda _: Policy(), release=lambda version, _: known[version])
    check = poll._Check(device, catalog, device.transport(), clock.now(), None)
    assert check.follow(word, clock.now()).action is not Action.INSTALL
    assert report.build(device).phase == (Phase(str(state)) if said == "as it was" else Phase.IDLE)


def test_an_attempt_ends_with_its_wish_also_where_a_stop_file_holds_the_next_one_back(
    layout, origin, release
):
    device = device_of(layout, origin, stop__file=str(layout.root / "stop"))
    (layout.root / "stop").write_text("")
    attempts.save(device.attempt_file, attempts.Attempt("1.5.0", "5" * 12, "before", AttemptState.STAGED))
    catalog = SimpleNamespace(policy=lambda _: Policy(), release=lambda *_: release)
    check = poll._Check(device, catalog, device.transport(), NOON, None)
    word = Directive("shop", "main", "2.0.0", None, 10_000, "salt", 2, splay_s=0)
    assert check.follow(word, NOON).reason == "stop-file"
    assert report.build(device).phase == Phase.IDLE


def test_a_trial_keeps_its_attempt_whatever_is_said_meanwhile(layout, origin, release):
    device, digest = device_of(layout, origin), release.facts.index_sha256[:12]
    attempts.save(device.attempt_file, attempts.Attempt("2.0.0", digest, "salt", AttemptState.STAGED))
    slots.Slots(layout.root).write(slots.Record(good=GOOD, phase=slots.TRIAL, candidate=f"2.0.0-{digest}"))
    catalog = SimpleNamespace(policy=lambda _: Policy(), release=lambda *_: None)
    check = poll._Check(device, catalog, device.transport(), clock.now(), None)
    check.follow(Directive("shop", "main", None, None, 0, "other", 3), clock.now())
    assert attempts.load(device.attempt_file) is not None


@pytest.mark.parametrize("noted", [2**52, None], ids=["absurd", "lost"])
def test_the_number_of_what_runs_is_the_signed_one_wherever_that_is(layout, origin, release, noted):
    """By a note of it that is far too high every release is older, for ever."""
    device, digest = device_of(layout, origin), slots.digest_of(GOOD)
    facts = replace(release.facts, version="1.0.0", seq=7, index_sha256=digest + "0" * 52)
    signed = {"1.0.0": replace(release, facts=facts)}
    catalog = SimpleNamespace(release=lambda version, _: signed.get(version))
    check = poll._Check(device, catalog, device.transport(), clock.now(), None)
    if noted is not None:
        device.keep_facts(GOOD, replace(facts, seq=noted))
    assert check._running() == Running("1.0.0", digest, 7)
    signed["1.0.0"] = replace(release, facts=replace(facts, index_sha256="f" * 64))
    assert check._running() == Running("1.0.0", digest, noted or 0), "another bundle under that version"
    signed.clear()
    assert check._running() == Running("1.0.0", digest, noted or 0), "no longer signed"


# --- a check beside another one, between what that staged and its trial -----------------------------------

WANTED = Directive("shop", "main", "2.0.0", None, 10_000, "salt", 2, splay_s=0)


class Beside:
    """A check that looks while the agent puts on trial what an earlier one staged.

    Args:
        when: what of the catalog is asked last before that happens.
    """

    def __init__(self, layout, origin, release, when=""):
        self.device, self.release, self.when = device_of(layout, origin), release, when
        digest = release.facts.index_sha256[:12]
        self.staged = attempts.Attempt("2.0.0", digest, "salt", AttemptState.STAGED)
        self.outcome = replace(
            outcome(action=Action.INSTALL), candidate=self.staged.name, boots=2, deadman_s=9
        )

    def begin_trial(self):
        """As the resident does it, and then the version on trial."""
        record = activation.activate(self.device, self.outcome)
        if self.when != "policy":  # that early it has not been started yet
            attempts.save(self.device.attempt_file, attempts.settled(self.note(), record))

    def follow(self, directive):
        catalog = SimpleNamespace(
            policy=lambda _: self._asked("policy", Policy()),
            release=lambda version, _: self._asked("release" if version == "2.0.0" else "good", self.release),
            delta=lambda *_: self._asked("delta", None),
        )
        check = poll._Check(self.device, catalog, self.device.transport(), clock.now(), None)
        return check.follow(directive, clock.now() - HOUR)

    def _asked(self, name, answer):
        if name == self.when:
            self.begin_trial()
        return answer

    def note(self):
        return attempts.load(self.device.attempt_file)

    def told(self):
        with Spool(self.device.layout.spool) as spool:
            return [str(transition.state) for transition in spool.pending(9)]


@pytest.fixture
def beside(layout, origin, release):
    name = stage(layout, origin, release)
    world = Beside(layout, origin, release)
    assert name == world.staged.name
    attempts.save(world.device.attempt_file, world.staged)
    return world


def resident(beside, name=GOOD):
    """The agent of this host as far as it notes attempts; its loop and its workload are not needed for it."""
    service = object.__new__(Service)
    service.device, service.name, service.root = beside.device, name, beside.device.layout.root
    service.record, service._numbered = slots.read(service.root), None
    return service


def test_a_trial_begun_beside_a_check_keeps_its_note_whatever_that_check_wants(beside):
    beside.when = "policy"
    assert beside.follow(replace(WANTED, release=None)).action is Action.STAY
    assert beside.note() == beside.staged


def test_a_trial_begun_beside_a_check_is_not_called_staged_or_failed_by_it(beside):
    beside.when = "release"
    attempts.save(beside.device.attempt_file, beside.staged.to(AttemptState.DOWNLOADING))
    with pytest.raises(ConflictError, match="overtaken"):
        beside.follow(WANTED)
    assert (beside.note().state, beside.told()) == (AttemptState.TRIAL, [])


def test_a_trial_that_has_ended_beside_a_check_keeps_its_end(beside, layout):
    beside.when = "release"
    ended = beside.staged.to(AttemptState.ROLLED_BACK, "unhealthy")
    begin = beside.begin_trial

    def begin_and_end():
        begin()
        slots.roll_back(layout.root, "unhealthy")
        attempts.save(beside.device.attempt_file, ended)

    beside.begin_trial = begin_and_end
    with pytest.raises(ConflictError, match="overtaken"):
        beside.follow(replace(WANTED, salt="later"))
    assert (beside.note(), beside.told()) == (ended, [])


def test_what_a_later_check_has_let_go_of_is_not_put_on_trial(beside, layout):
    beside.follow(replace(WANTED, release=None))
    with pytest.raises(ConflictError, match="later check"):
        beside.begin_trial()
    assert slots.read(layout.root).phase == slots.IDLE


def test_a_version_brought_by_hand_goes_on_trial_with_a_note_of_its_own_whatever_a_check_said(beside):
    beside.follow(replace(WANTED, release=None))
    assert beside.note() is None
    control.carry_out(beside.device, control.Request(control.ACTIVATE, beside.staged.name))
    assert beside.note() == replace(beside.staged, salt=offline.SALT)
    assert beside.told() == ["staged"]


class NoRecord:
    """A disk that does not give out the record."""

    def before(self, name, *_):
        if name == "pread":
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def after(self, *_):
        pass


class NoState:
    """A disk that does not open the directory of the notes."""

    def __init__(self, state):
        self.state = str(state)

    def before(self, name, words, options):
        if name == "open" and str(words[0]) == self.state:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def after(self, *_):
        pass


@pytest.fixture
def somebody(beside, monkeypatch):
    """Another process has the attempt for longer than anybody waits."""
    monkeypatch.setattr(attempts, "_PATIENCE_S", 0.05)
    with attempts.alone(beside.device.layout):
        yield


def activate_spare(beside):
    versions = beside.device.layout.versions
    index = (versions / beside.staged.name / INDEX_NAME).read_bytes()
    (versions / SPARE / INDEX_NAME).write_bytes(index)
    control.carry_out(beside.device, control.Request(control.ACTIVATE, SPARE))


def _note_in_a_check(beside):
    check = poll._Check(beside.device, None, None, clock.now(), None)
    check.record = slots.read(beside.device.layout.root)
    check._note(beside.staged)


@pytest.mark.parametrize(
    "change",
    [Beside.begin_trial, _note_in_a_check, activate_spare],
    ids=["activate", "note", "by hand"],
)
def test_nobody_changes_the_attempt_beside_somebody_else(beside, layout, somebody, change):
    record, note = slots.read(layout.root), beside.note()
    with pytest.raises(ConflictError, match="another process has the attempt"):
        change(beside)
    assert (slots.read(layout.root), beside.note(), beside.told()) == (record, note, [])


def test_an_end_is_not_noted_beside_somebody_else_but_with_a_later_report(beside, layout, monkeypatch):
    slots.refuse(layout.root, beside.staged.name, "unhealthy")
    agent = resident(beside)
    monkeypatch.setattr(attempts, "_PATIENCE_S", 0.05)
    with attempts.alone(layout):
        assert not agent._settle()
        assert (beside.note(), beside.told()) == (beside.staged, [])
    assert agent._settle()
    assert beside.told() == ["rolled_back"]


def test_a_record_that_could_not_be_read_ends_no_attempt(beside, layout):
    """A version on trial that cannot read so runs on; that it was good by then nobody has said."""
    beside.begin_trial()
    agent, note = resident(beside, beside.staged.name), beside.note()
    with disk.watched_by(NoRecord()):
        agent.record = service._record(layout.root, agent.name)
    assert not agent._settle()
    assert (beside.note(), beside.told()) == (note, [])
    slots.roll_back(layout.root, "dead-man")
    assert resident(beside)._settle()
    assert beside.told() == ["rolled_back"]


def test_a_trial_of_which_a_failing_disk_said_nothing_goes_on_once_it_does(beside, layout):
    slots.begin_trial(layout.root, beside.staged.name, 2, 9)
    agent, stopped = resident(beside, beside.staged.name), []
    agent.runtime, agent._report_now = SimpleNamespace(stop=stopped.append), lambda: None
    with disk.watched_by(NoRecord()):
        agent.record = service._record(layout.root, agent.name)
        agent._heartbeat()
    assert (agent.record.seq, stopped) == (0, [])
    agent._heartbeat()
    assert (agent.record.phase, stopped) == (slots.TRIAL, [Exit.RESTART])


def test_a_disk_without_room_for_a_copy_keeps_no_agent_from_hearing_of_its_cohort(beside, layout):
    identities.save(layout, replace(beside.device.identity, cohort="other"))
    layout.identity_copy.unlink()
    agent = resident(beside)
    agent._look_now = lambda: None
    with disk.watched_by(NoRoom("write", 1)):
        agent._reload_identity()
    assert agent.device.identity.cohort == "other"
    assert not layout.identity_copy.exists()
    agent._reload_identity()
    assert layout.identity_copy.read_bytes() == layout.identity.read_bytes()


def test_a_rollback_does_not_wait_for_ever_and_writes_no_note_beside_somebody_else(beside, layout, somebody):
    slots.begin_trial(layout.root, beside.staged.name, 2, 9)
    agent, stopped = resident(beside, beside.staged.name), []
    agent.runtime = SimpleNamespace(stop=stopped.append)
    agent._roll_back("unhealthy", "it is ill")
    assert (slots.read(layout.root).phase, stopped) == (slots.IDLE, [Exit.RESTART])
    assert (beside.note(), beside.told()) == (beside.staged, [])


def test_a_rollback_is_done_where_even_its_note_cannot_be_locked(beside, layout):
    slots.begin_trial(layout.root, beside.staged.name, 2, 9)
    agent = resident(beside, beside.staged.name)
    agent.runtime = SimpleNamespace(stop=lambda _: None)
    with disk.watched_by(NoState(layout.state)):
        agent._roll_back("unhealthy", "it is ill")
    assert slots.read(layout.root).phase == slots.IDLE


def test_what_the_launcher_rolled_back_is_not_let_go_of_before_it_was_told(beside, layout):
    beside.begin_trial()
    attempts.save(beside.device.attempt_file, beside.staged)
    slots.roll_back(layout.root, "boots-used-up")
    beside.follow(replace(WANTED, release=None))
    assert beside.note() == beside.staged
    assert resident(beside)._settle()
    assert beside.told() == ["rolled_back"]


def test_a_version_that_may_not_be_tried_by_hand_leaves_the_note_of_the_trial_that_runs(beside, layout):
    """A request that was left over is heeded by whatever version starts next, so by one on trial."""
    beside.begin_trial()
    running = beside.note()
    with pytest.raises(slots.IllegalTransitionError, match="not idle"):
        activate_spare(beside)
    assert (beside.note(), beside.told()) == (running, [])
    slots.commit(layout.root, beside.staged.name)
    assert resident(beside)._settle()
    assert beside.told() == ["healthy"]


def test_a_version_tried_by_hand_takes_no_end_from_the_attempt_before_it(beside, layout):
    beside.begin_trial()
    slots.roll_back(layout.root, "boots-used-up")
    activate_spare(beside)
    assert beside.told() == ["rolled_back", "staged"]
    assert beside.note().name == slots.read(layout.root).candidate == SPARE


def test_a_retry_is_not_called_rolled_back_by_what_the_try_before_left(beside, layout):
    """The resident settles between what a check staged and its trial: at a heartbeat, or after a restart."""
    slots.refuse(layout.root, beside.staged.name, "unhealthy", 0)
    attempts.save(beside.device.attempt_file, beside.staged.to(AttemptState.ROLLED_BACK, "unhealthy"))
    beside.outcome = beside.follow(replace(WANTED, retry_epoch=1))
    assert not resident(beside)._settle()
    beside.begin_trial()
    assert beside.told() == ["staged"]
    assert slots.roll_back(layout.root, "boots-used-up").phase == slots.IDLE
    assert resident(beside)._settle()
    assert beside.told() == ["staged", "rolled_back"]
    assert beside.note().reason == "boots-used-up"


def test_what_is_staged_is_told_once_however_often_it_is_looked_at(beside):
    attempts.save(beside.device.attempt_file, beside.staged.to(AttemptState.DOWNLOADING))
    for _ in range(3):
        assert beside.follow(WANTED).candidate == beside.staged.name
    assert beside.told() == ["staged"]
