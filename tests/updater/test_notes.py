"""Whatever lies in the place of a file under `state/`: readers have a default, or an error they expect."""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from agent_core import clock, slots
from agent_core.errors import DiskError, MalformedError, NotFoundError, RelfleetError
from agent_core.layout import Layout
from agent_core.settings import AGENT, AgentSettings
from agent_core.spool import Spool
from agent_core.wire import AttemptState, Directive, ReleaseFacts
from updater import attempt as attempts
from updater import control, freshness, install, known, last_good, notes, offline, poll, report, service
from updater import identity as identities
from updater.attempt import Attempt
from updater.commands import status, why
from updater.control import Request
from updater.decide import Action
from updater.delta import _Tries
from updater.device import Device, Outcome, Seen
from updater.identity import Identity

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
LATER = datetime(2026, 3, 9, 12, 0, tzinfo=UTC)
NAME = "1.0.0-" + "1" * 12
MOST_S = 3600.0
DIRECTIVE = Directive("shop", "main", "1.0.0", "1.0.0", 10_000, "salt", 1)
IDENTITY = Identity("http://127.0.0.1:9", "shop", "web-1", "any", "main")
FACTS = ReleaseFacts("shop", "1.0.0", 1, "any", "1" * 64, 10, 10, 1)
OUTCOME = Outcome(Action.STAY, "splay", "", clock.iso(NOON), again=clock.iso(NOON))


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """A record's bytes, waited for once."""
    held = slots.Slots(tmp_path_factory.mktemp("record"))
    held.write(slots.Record(good=NAME, previous=NAME))
    return Layout(held.root).slots.read_bytes()


@pytest.fixture
def device(tmp_path, record):
    layout = Layout(tmp_path / "root")
    for directory in (layout.tuf, layout.versions / NAME, layout.download):
        directory.mkdir(parents=True)
    layout.identity.write_text(json.dumps(IDENTITY.to_json()))
    layout.slots.write_bytes(record)
    return Device(layout, AgentSettings.of(AGENT.load(environ={}, flags={})), IDENTITY)


# --- what may lie there -----------------------------------------------------------------------------------


def _loop(file):
    file.symlink_to(file.name)


def _huge(file):
    file.write_text('{"at": "')
    os.truncate(file, 10 << 20)


def _unreadable(file):
    file.write_text("{}")
    file.chmod(0)


KINDS = {
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(4096)),
    "garbage": lambda file: file.write_bytes(b"\xff\xfe\x00garbage"),
    "digits": lambda file: file.write_text("9" * 6000),
    "number": lambda file: file.write_text("99999999999999999999"),
    "list": lambda file: file.write_text("[1, 2]"),
    "null": lambda file: file.write_text("null"),
    "text": lambda file: file.write_text('"text"'),
    "no field": lambda file: file.write_text("{}"),
    "brackets": lambda file: file.write_bytes(b"[" * 100_000),
    "surrogates": lambda file: file.write_text('{"\\ud800": "\\udfff", "reason": "\\ud800"}'),
    "nan": lambda file: file.write_text("NaN"),
    "huge": _huge,
    "loop": _loop,
    "directory": lambda file: (file / "inside").mkdir(parents=True),
    "pipe": os.mkfifo,
    "socket": lambda file: os.mknod(file, stat.S_IFSOCK | 0o600),
    "unreadable": _unreadable,
}
ODD_VALUES = (
    *(None, True, -1, 7, 2**53, 10**300, 1e308, math.nan, math.inf, -math.inf),
    *("", "\ud800", "x" * 9000, "9999-12-31T23:59:59Z", "0001-01-01T00:00:00Z", "../.."),
    *([], [None], {}, {"signed": 1}),
)


# --- who reads it -----------------------------------------------------------------------------------------


def _read_outcome(device):
    poll.is_due(device.outcome(), NAME, clock.now())
    _look(device)


def _read_directive(device):
    assert 0 < poll.poll_s(device) <= 864_000
    assert 0 < poll.report_s(device) <= 86_400
    offline.directive(device, "1.0.0", older=False)


def _read_attempt(device):
    attempts.settled(attempts.load(device.attempt_file), slots.read(device.layout.root))
    status._version_of(device, "1" * 12)


def _read_poll(device):
    now = clock.now()
    memory = freshness.recall(device.layout.poll, device.layout.tuf, now)
    freshness.trusted_time(memory, now)
    freshness.raise_high_water(memory.high_water, now, now)
    freshness.is_fresh(memory, timestamp_sha256="", now=now, boot_s=clock.boot_s(), boot_id="")


def _read_backoff(device):
    failures, wait_s = control.recall_backoff(device.layout, MOST_S)
    assert failures >= 0
    assert 0 <= wait_s <= MOST_S


def _read_request(device):
    request = control.read_request(device.layout)
    assert request is None or "/" not in request.name


def _read_status(device):
    control.read_status(device.layout)
    assert not control.wake(device.layout)
    _look(device)


def _read_settings(device):
    device.layout.settings.write_text("[broken")
    assert 1 <= last_good.load(device.layout).poll_max_backoff_s <= 86_400


def _read_facts(device):
    device.running()


def _read_metadata(device):
    known.roles(device.layout)
    known.policy(device.layout, "shop")
    offline.kept(device.layout)
    known.contents(device.layout)
    freshness.cached_timestamp_sha256(device.layout.tuf)
    _read_poll(device)


def _clear(file):
    if file.is_dir() and not file.is_symlink():
        file.rename(file.with_name("away"))
    file.unlink(missing_ok=True)


def _look(device):
    host = status.look(device.layout.root)
    json.dumps([status.told(host), why.explained(host)])
    str([status._lines(host), why._shown(why.explained(host))])


NOTES = {
    "outcome.json": (_read_outcome, OUTCOME.to_json()),
    "directive.json": (_read_directive, Seen(DIRECTIVE, NOON).to_json()),
    "attempt.json": (_read_attempt, Attempt("1.0.0", "1" * 12, "salt", AttemptState.STAGED).to_json()),
    "session.json": (report.session, {"session": "token", "until_s": 2**33}),
    "poll.json": (_read_poll, freshness.Memory("e", "0" * 64, LATER, NOON, 1.0, "b", NOON, ("k",)).to_json()),
    "backoff.json": (_read_backoff, {"failures": 2, "until_s": 99_999_999_999, "wait_s": 8.0}),
    "request.json": (_read_request, Request("rollback", NAME).to_json()),
    "status.json": (_read_status, {"pid": 1, "version": NAME, "workload_pid": 1, "at": "", "trial": ""}),
    "settings.json": (
        _read_settings,
        {"poll.max_backoff_s": 60.0, "poll.min_s": 1.0, "labels": {}, "server.no_proxy": []},
    ),
    "deltas.json": (lambda device: _Tries(device.layout)._all(), {"0" * 64: 1}),
    f"facts-{NAME}.json": (_read_facts, FACTS.to_json()),
    "file-targets.json": (_read_metadata, {"signed": {"version": 1, "expires": "", "targets": {}}}),
    "tuf/timestamp.json": (_read_metadata, {"signed": {"version": 1, "expires": "", "targets": {}}}),
    "tuf/targets.json": (_read_metadata, {"signed": {"version": 1, "expires": "", "targets": {}}}),
}


@pytest.mark.parametrize("name", NOTES)
def test_nonsense_in_the_place_of_a_note_is_as_good_as_none(device, name):
    file = device.layout.state / name
    for put in KINDS.values():
        put(file)
        NOTES[name][0](device)
        _clear(file)


@pytest.mark.parametrize("name", NOTES)
def test_a_field_of_a_note_with_any_value_is_read_within_its_bounds(device, name):
    read, good = NOTES[name]
    file = device.layout.state / name
    file.write_text(json.dumps(good))
    read(device)
    within = good.get("directive") or good.get("signed")
    fields = [(body, key) for body in filter(None, (good, within)) for key in list(body)]
    for body, key in fields:
        for value in ODD_VALUES:
            before, body[key] = body[key], value
            try:
                file.unlink(missing_ok=True)
                file.write_text(json.dumps(good))
                read(device)
            finally:
                body[key] = before


def test_every_note_is_written_again_whatever_lies_in_its_place(device):
    layout = device.layout
    attempt = Attempt("1.0.0", "1" * 12, "salt", AttemptState.STAGED)
    writers = {
        "outcome.json": (lambda: device.remember_outcome(OUTCOME), lambda: device.outcome() == OUTCOME),
        "directive.json": (
            lambda: device.see(DIRECTIVE, NOON),
            lambda: device.seen() == Seen(DIRECTIVE, NOON),
        ),
        "attempt.json": (
            lambda: attempts.save(device.attempt_file, attempt),
            lambda: attempts.load(device.attempt_file) == attempt,
        ),
        "poll.json": (
            lambda: freshness.remember(layout.poll, freshness.Memory("e")),
            lambda: freshness.believed(layout.poll, layout.tuf)[0].etag == "e",
        ),
        "backoff.json": (
            lambda: control.remember_backoff(layout, 3, 40.0),
            lambda: control.recall_backoff(layout, MOST_S)[0] == 3,
        ),
        "request.json": (
            lambda: control.leave_request(layout, Request("retry")),
            lambda: control.read_request(layout) == Request("retry"),
        ),
        "status.json": (
            lambda: control.show(layout, NAME, None),
            lambda: control.read_status(layout)["version"] == NAME,
        ),
        "settings.json": (
            lambda: last_good.keep(layout, device.settings),
            lambda: last_good.note(layout).is_file(),
        ),
        f"facts-{NAME}.json": (lambda: device.keep_facts(NAME, FACTS), lambda: device.facts(NAME) == FACTS),
        "file-targets.json": (
            lambda: offline.keep(layout, b"{}"),
            lambda: offline.kept(layout) == b"{}",
        ),
        "counter": (lambda: None, lambda: identities.next_counter(layout) < 2**52),
    }
    for kind in ("garbage", "directory", "pipe", "socket", "loop"):
        for name, (write, is_written) in writers.items():
            if name == "counter" and kind == "loop":
                continue  # a link is no slip: it is refused, see the next test
            file = layout.state / name
            KINDS[kind](file)
            write()
            assert is_written(), (name, kind)
            notes.forget(file)
            assert not os.path.lexists(file)


def test_a_note_that_is_a_directory_is_taken_away_and_kept_in_the_trash(device):
    layout = device.layout
    for forget in (control.forget_request, lambda layout: control.remember_backoff(layout, 0, 0.0)):
        for name in ("request.json", "backoff.json"):
            KINDS["directory"](layout.state / name)
        forget(layout)
        for name in ("request.json", "backoff.json"):
            notes.forget(layout.state / name)
    assert len([path for path in layout.trash.iterdir() if (path / "inside").is_dir()]) == 4
    KINDS["directory"](layout.state / "facts-gone.json")
    device.forget_facts()
    assert not (layout.state / "facts-gone.json").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_what_decides_is_refused_or_read_and_stays_as_it_lies(device, kind):
    layout = device.layout
    layout.identity.unlink()
    layout.slots.unlink()
    for file in (layout.identity, layout.slots, layout.key, layout.next_key, layout.state / "counter"):
        KINDS[kind](file)
    before = {path: path.lstat().st_ino for path in layout.state.iterdir() if path.name != "counter"}
    with pytest.raises((MalformedError, DiskError, NotFoundError)):
        identities.load(layout)
    for key in (layout.key, layout.next_key):
        with pytest.raises(RelfleetError):
            identities.sign(layout, b"", key)
    try:
        assert identities.next_counter(layout) < 2**52
    except DiskError:
        assert kind == "loop"
    try:
        assert slots.read(layout.root) is None
    except OSError:
        assert kind == "unreadable"
    assert before == {path: path.lstat().st_ino for path in layout.state.iterdir() if path.name != "counter"}


def test_a_record_that_the_disk_does_not_give_out_keeps_what_was_started_running(device):
    assert service._record(device.layout.root, NAME).seq == 1
    device.layout.slots.unlink()
    device.layout.slots.symlink_to("/proc/self/mem")  # a read at its beginning is an error of the device
    assert service._record(device.layout.root, NAME) == slots.Record(good=NAME, previous=NAME)


@pytest.mark.parametrize("kind", KINDS)
def test_an_identity_in_whose_place_anything_lies_is_mended_from_its_copy_and_the_other_way(device, kind):
    layout = device.layout
    for spoilt in (layout.identity, layout.identity_copy):
        identities.save(layout, IDENTITY)
        spoilt.unlink()
        KINDS[kind](spoilt)
        assert identities.load(layout) == IDENTITY
        told = spoilt == layout.identity
        assert bool(identities.damage(layout)) is told
        _look(device)
        assert bool(identities.mend(layout)) is told
        assert [spoilt.lstat().st_mode, spoilt.read_text()] == [
            stat.S_IFREG | 0o600,
            layout.identity.read_text(),
        ]
        assert identities.mend(layout) == ""
        assert identities.load(layout) == IDENTITY


def test_a_host_that_lost_both_runs_as_nobody_says_so_and_reports_nothing(device):
    layout = device.layout
    identities.save(layout, IDENTITY)
    for file in (layout.identity, layout.identity_copy):
        file.write_bytes(b"{")
    anyway = Device.load_anyway(layout.root)
    assert anyway.identity == identities.NOBODY
    with pytest.raises(NotFoundError, match="nothing is reported"):
        report.build(anyway)
    with pytest.raises(MalformedError, match="cannot tell who it is") as refused:
        identities.mend(layout)
    assert "with its gate and labels as before" in refused.value.then
    assert [file.read_bytes() for file in (layout.identity, layout.identity_copy)] == [b"{", b"{"]


def _fails_to_read(file):
    file.symlink_to("/proc/self/mem")  # a read at its beginning is an error of the device


@pytest.mark.parametrize("other", ["nothing", *sorted(KINDS.keys() - {"unreadable"})])
def test_only_an_identity_that_is_no_more_is_made_anew_for_whom_one_likes(device, other):
    layout, files = device.layout, (device.layout.identity, device.layout.identity_copy)
    kinds = {**KINDS, "nothing": lambda file: None}
    layout.identity.unlink()
    kinds[other](layout.identity)
    kinds[other](layout.identity_copy)
    assert install._check_same(layout, "https://elsewhere", "other") is None
    for spoilt, bad in (files, files[::-1]):
        for file in files:
            notes.forget(file)
        kinds[other](spoilt)
        _fails_to_read(bad)
        with pytest.raises(DiskError, match="cannot tell who it is"):
            install._check_same(layout, "https://elsewhere", "other")


def test_a_save_that_is_cut_leaves_one_whole_identity(device, monkeypatch):
    layout, written, write = device.layout, [], notes.write

    def cut(file, value, mode):
        if written:
            raise DiskError("cut")
        written.append(file)
        write(file, value, mode)

    identities.save(layout, IDENTITY)
    with monkeypatch.context() as cutting:
        cutting.setattr(notes, "write", cut)
        with pytest.raises(DiskError):
            identities.save(layout, replace(IDENTITY, cohort="other"))
    assert identities.load(layout) == IDENTITY
    assert identities.mend(layout) == ""
    layout.identity.write_bytes(b"")
    assert identities.load(layout) == IDENTITY


@pytest.mark.parametrize("name", ["directive.json", f"facts-{NAME}.json"])
def test_a_digit_that_rots_in_a_note_is_not_believed(device, name):
    device.see(replace(DIRECTIVE, retry_epoch=1), NOON)
    device.keep_facts(NAME, FACTS)
    read = {"directive.json": device.seen, f"facts-{NAME}.json": lambda: device.facts(NAME)}[name]
    assert read() is not None
    file = device.layout.state / name
    for field in ("retry_epoch", "seq"):
        file.write_text(file.read_text().replace(f'"{field}": 1', f'"{field}": 9007199254740992'))
    assert read() is None


def test_metadata_that_nobody_knows_or_that_are_damaged_are_not_what_a_version_is_tried_by(device):
    tuf = device.layout.tuf
    (tuf / "targets.json").write_text('{"signed": {"version": 1}}')
    (tuf / "snapshot.json").write_text('{"signed": {"ver')
    (tuf / "stray.json").write_text("{}")
    (tuf / "cohorts.json").mkdir()
    assert known.contents(device.layout) == [b'{"signed": {"version": 1}}']


@pytest.mark.parametrize("kind", KINDS)
def test_a_spool_in_whose_place_anything_lies_takes_transitions(device, kind):
    layout = device.layout
    for file in (layout.spool, layout.spool.with_suffix(".high")):
        KINDS[kind](file)
    (layout.state / "spool.db.damaged-by-hand").write_text("")
    attempt = Attempt("1.0.0", "1" * 12, "salt", AttemptState.STAGED)
    with Spool(layout.spool) as spool:
        report.record_transition(device, spool, attempt)
        assert [transition.version for transition in spool.pending()] == ["1.0.0"]
    with Spool(layout.spool) as spool:
        kept = len(spool.pending())
    assert kept == (0 if kind == "loop" else 1)
