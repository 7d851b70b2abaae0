"""What nobody needs any more goes, in short batches; what anybody can need stays; a kill changes nothing."""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from functools import partial
from hashlib import sha256
from io import BytesIO
from itertools import cycle, pairwise, takewhile

import pytest
from sqlalchemy import event, func, null, select, update
from tuf.api.metadata import Metadata, Timestamp

from agent_core.errors import NotAllowedError
from agent_core.wire import LeaseRequest, ShareRequest
from release_server import (
    agents,
    attempts,
    audit,
    auth,
    enrolment,
    explain,
    fleet,
    leases,
    repository,
    shares,
)
from release_server import blobs as rooms_of_blobs
from release_server.blobs import Blobs, UploadConflictError, open_locked
from release_server.config import Config
from release_server.database import Sessions, make_engine
from release_server.jobs import LostLeaseError
from release_server.models import (
    ActivationLease,
    Agent,
    AgentEvent,
    Attempt,
    AuditEntry,
    CohortStatus,
    DownloadShare,
    Lease,
    MetadataFile,
    PersonSession,
    Proposal,
    Pruning,
    RolloutEvent,
    Token,
)
from release_server.retention import pruner as room
from release_server.retention import sweeps
from release_server.retention.pruner import Pruner
from release_server.retention.settings import KINDS, Retention
from release_server.retention.sweeps import SWEEPS
from release_server.stages import Stage
from tests.release_server.fleet_world import World


@pytest.fixture
def world(sessions, clock):
    return World(sessions, clock)


def allow(_session):
    """This process may write."""


@pytest.fixture
def make_pruner(sessions, blobs, config):
    def make(**days):
        keep = config.retention
        kept = {kind: length for kind, length in keep.kept.items() if days.get(kind) != 0}
        kept |= {kind: timedelta(days=count) for kind, count in days.items() if kind in kept}
        return Pruner(sessions, blobs, config.repository, Retention(kept, days.get("events_kept", 50)))

    return make


@pytest.fixture
def prune(make_pruner, clock):
    """Take steps until none is due; how many there were."""

    def go(**days):
        made, steps = make_pruner(**days), 0
        clock.step(hours=2)
        while made.step(clock(), allow):
            steps += 1
            assert steps < 200, "it ends"
        return steps

    return go


def count(sessions, model, *where):
    with sessions.read() as session:
        return session.scalar(select(func.count()).select_from(model).where(*where))


def removed(sessions, kind):
    with sessions.read() as session:
        return session.get_one(Pruning, kind).removed


def tell(world, host, amount, version="1.0.0"):
    """The host reports `amount` transitions, of no rollout."""
    world.report(host, *(host.step(world.clock(), "downloading", version) for _ in range(amount)))


def numbers(sessions, host):
    with sessions.read() as session:
        query = select(AgentEvent.number).where(AgentEvent.agent_id == host.id).order_by(AgentEvent.number)
        return session.scalars(query).all()


# --- agents ----------------------------------------------------------------------------------------------


def test_old_events_go_but_for_the_newest_of_each_agent(world, sessions, clock, prune, monkeypatch):
    monkeypatch.setattr(sweeps, "AGENTS", 1)
    loud, quiet = world.enroll("loud"), world.enroll("quiet")
    tell(world, loud, 8)
    tell(world, quiet, 2)
    clock.step(days=91)
    tell(world, loud, 1)
    prune(events_kept=3)
    assert numbers(sessions, loud) == [7, 8, 9]
    assert numbers(sessions, quiet) == [1, 2]
    assert removed(sessions, "events") == 6


def test_young_events_stay_however_many_there_are(world, sessions, clock, prune):
    host = world.enroll("loud")
    clock.step(days=1)
    tell(world, host, 8)
    clock.step(days=89)
    prune(events_kept=3)
    assert len(numbers(sessions, host)) == 8


def test_a_report_that_is_sent_again_brings_no_removed_event_back(world, sessions, clock, prune):
    host = world.enroll("loud")
    steps = [host.step(clock(), "downloading", "1.0.0") for _ in range(5)]
    world.report(host, *steps)
    clock.step(days=91)
    prune(events_kept=2)
    world.report(host, *steps)
    assert numbers(sessions, host) == [4, 5]


def test_of_a_retired_agent_only_a_tombstone_stays(world, sessions, clock, prune):
    world.cohort()
    gone, here = world.enroll("gone", labels={"site": "eu"}), world.enroll("here", labels={"site": "eu"})
    for host in (gone, here):
        tell(world, host, 2)
    world.call(agents.retire, gone.id)
    clock.step(days=91)
    prune()
    with sessions.read() as session:
        tombstone, other = session.get_one(Agent, gone.id), session.get_one(Agent, here.id)
        assert (tombstone.labels, tombstone.inventory, tombstone.figures) == ({}, {}, {})
        assert (tombstone.cohort_id, tombstone.token_id, tombstone.session_hash) == (None, None, None)
        assert tombstone.retired_at is not None
        assert other.labels == {"site": "eu"}
        assert other.cohort_id is not None
    assert (numbers(sessions, gone), numbers(sessions, here)) == ([], [1, 2])


def test_a_retired_agent_is_refused_after_years_and_its_name_is_not_given_again(world, clock, prune):
    gone = world.enroll("gone")
    world.call(agents.retire, gone.id)
    clock.step(days=3650)
    prune()
    with world.write() as session, pytest.raises(NotAllowedError) as refused:
        enrolment.enroll(session, clock(), world.token, world.request("gone", gone.key))
    assert refused.value.reason == "retired"
    with pytest.raises(NotAllowedError) as refused:
        world.report(gone)
    assert refused.value.reason == "retired"
    assert world.enroll("gone").id != gone.id


def test_a_lease_goes_with_its_time(world, sessions, clock, prune):
    world.cohort(lease={"scope": "site", "limit": 9})
    host, other = world.enroll("web-1"), world.enroll("web-2")
    for one in (host, other):
        with world.write() as session:
            agent = session.get_one(Agent, one.id)
            leases.ask(session, clock(), agent, LeaseRequest("1.1.0"), timedelta(minutes=9))
    with world.write() as session:
        session.get_one(ActivationLease, other.id).until = clock() + timedelta(days=1)
    prune()
    with sessions.read() as session:
        assert session.scalars(select(ActivationLease.agent_id)).all() == [other.id]


def test_a_share_of_a_budget_goes_with_its_time(world, sessions, clock, prune):
    world.cohort(budget={"scope": "site", "bytes_per_s": 100_000, "at_once": 2})
    host, other = world.enroll("web-1"), world.enroll("web-2")
    for one in (host, other):
        with world.write() as session:
            shares.ask(session, clock(), session.get_one(Agent, one.id), ShareRequest("1.1.0"))
    with world.write() as session:
        session.get_one(DownloadShare, other.id).until = clock() + timedelta(days=1)
    prune()
    with sessions.read() as session:
        assert session.scalars(select(DownloadShare.agent_id)).all() == [other.id]


# --- rollouts --------------------------------------------------------------------------------------------


@pytest.fixture
def two_rollouts(world, clock):
    """One that was completed, with one failure, and one that followed it a year later."""
    world.cohort()
    hosts = world.enroll_many(3)
    made = []
    for version in ("1.1.0", "1.2.0"):
        rollout = world.start(version, Stage(share_bp=10_000, max_failed_bp=5_000))
        world.tick(seconds=1)
        for place, host in enumerate(hosts):
            world.finish(host, rollout, "failed" if place == 0 else "healthy", reason="disk")
        world.tick(seconds=1)
        world.tick(minutes=5)
        assert world.status(rollout).state == "completed"
        made.append(rollout)
        world.tick(days=366)  # the watch over it is over too
        world.heartbeats()
    return made


def test_attempts_and_history_of_a_rollout_long_over_go_and_a_late_word_moves_no_counter(
    world, sessions, two_rollouts, prune, sign_in
):
    old, newest = two_rollouts
    with sessions.read() as session:
        before = attempts.counters(session, old)
    prune()
    world.finish(next(iter(world.hosts.values())), old, "healthy")
    for model in (Attempt, RolloutEvent):
        assert count(sessions, model, model.rollout_id == old) == 0
    with sessions.read() as session:
        assert attempts.counters(session, old) == before
    assert count(sessions, Attempt, Attempt.rollout_id == newest) == 3
    assert removed(sessions, "rollouts") > 3
    ask = sign_in("reader")
    seen = [ask("GET", f"/rollouts/{number}").json for number in (old, newest)]
    assert [bool(rollout["events"]) for rollout in seen] == [False, True]
    assert [bool(rollout["pruned_at"]) for rollout in seen] == [True, False]


def test_the_newest_rollout_of_a_cohort_stays_however_old_it_is(world, clock, two_rollouts, prune):
    clock.step(days=3650)
    prune()
    newest = two_rollouts[1]
    assert world.counters(newest) == {"failed": 1, "healthy": 2}  # proven by a recount
    host = next(iter(world.hosts))
    with world.read() as session:
        assert "disk" in str(explain.agent_why(session, clock(), host))


def test_a_rollout_that_waits_or_is_watched_stays(world, sessions, clock, prune):
    world.cohort()
    world.enroll("web-1")
    paused = world.start("1.1.0")
    world.call(fleet.pause, paused)
    clock.step(days=800)
    world.start("1.2.0", draft=True)
    before = world.events(paused)
    prune()
    assert world.events(paused) == before
    assert world.rollout(paused).pruned_at is None


# --- signed metadata -------------------------------------------------------------------------------------


@pytest.fixture
def published(sessions, blobs, clock, config, online_signer, trusted, accept):
    """Sixty days of publications, with targets of three days."""

    def publish():
        with sessions.write() as session:
            repository.publish(session, online_signer, clock())
        repository.export(sessions, blobs, config.repository)

    metadata = trusted.targets()
    for day in (0, 20, 40):
        metadata = metadata if day == 0 else trusted.next_targets(metadata)
        trusted.add(metadata, blobs, f"1.{day}", 10 + day)
        accept(metadata)
        for _ in range(2):
            publish()
            clock.step(days=10)
    for _ in range(2):
        publish()
        clock.step(hours=8)
    publish.metadata = metadata
    return publish


def stored(sessions, role):
    with sessions.read() as session:
        query = select(MetadataFile.version).where(MetadataFile.role == role).order_by(MetadataFile.version)
        return session.scalars(query).all()


def files(config, role):
    found = (config.repository / "metadata").glob(f"*.{role}.json")
    return sorted(int(place.name.partition(".")[0]) for place in found)


def test_superseded_online_metadata_go_with_their_files_and_what_is_given_out_stays(
    published, sessions, config, clock, prune
):
    before = {role: stored(sessions, role) for role in ("timestamp", "snapshot", "cohorts", "targets")}
    with sessions.read() as session:
        named = repository.named_by_newest(session)
    prune()
    for role in ("timestamp", "snapshot", "cohorts"):
        left = stored(sessions, role)
        assert 1 < len(left) < len(before[role])
        assert left == before[role][-len(left) :], "the oldest go"
        assert named[role] in left
    assert stored(sessions, "targets") == files(config, "targets") == before["targets"]
    assert stored(sessions, "root") == files(config, "root") == [1]
    for role in ("snapshot", "cohorts"):
        assert files(config, role) == stored(sessions, role)


def test_whoever_holds_a_timestamp_that_has_not_expired_finds_all_that_it_names_and_the_next_follow(
    published, sessions, config, clock, prune, blobs, accept, trusted
):
    newest = stored(sessions, "timestamp")[-1]
    prune(metadata=1, targets=1)
    assert len(stored(sessions, "targets")) == 1
    held = []
    for number in stored(sessions, "timestamp"):
        with sessions.read() as session:
            row = session.get_one(MetadataFile, ("timestamp", number))
        if row.expires_at > clock():
            held.append(repository.read(row, Timestamp).signed.snapshot_meta.version)
    metadata = config.repository / "metadata"
    for number in held:
        snapshot = Metadata.from_bytes((metadata / f"{number}.snapshot.json").read_bytes())
        assert all(
            (metadata / f"{meta.version}.{name}").exists() for name, meta in snapshot.signed.meta.items()
        )
    assert len(held) == 2
    following = trusted.next_targets(published.metadata)
    following.signed.expires = clock() + timedelta(days=60)
    trusted.add(following, blobs, "2.0", 1000)
    accept(following)
    published()
    assert stored(sessions, "timestamp")[-1] == newest + 1
    assert files(config, "targets")[-1] == following.signed.version


def test_versions_that_a_thief_ran_forward_leave_the_newest_honest_one(published, sessions, clock, prune):
    honest = stored(sessions, "timestamp")[-1]
    with sessions.write() as session:
        row = session.get_one(MetadataFile, ("timestamp", honest))
        for days, version in enumerate((2_000_000_000, 2_000_000_001)):
            session.add(
                MetadataFile(
                    role="timestamp",
                    version=version,
                    body=row.body,
                    expires_at=row.expires_at,
                    created_at=clock() + timedelta(days=days),
                )
            )
    clock.step(days=400)
    prune()
    assert stored(sessions, "timestamp") == [honest, 2_000_000_001]


# --- people ----------------------------------------------------------------------------------------------


def test_dead_tokens_go_unless_an_agent_came_by_them(world, sessions, clock, prune):
    def token(name, **said):
        with world.write() as session:
            return auth.add_token(session, clock(), name=name, role=auth.Role.READER, actor="test", **said)[
                0
            ].id

    expired, revoked = token("expired", expires=timedelta(hours=1)), token("revoked")
    living = [token("for-ever"), token("long", expires=timedelta(days=365))]
    with world.write() as session:
        auth.revoke_token(session, clock(), revoked, "olga")
        made, text = auth.add_token(
            session, clock(), name="once", role=auth.Role.ENROLLER, actor="test", uses=1
        )
    world.enroll("web-1", token=text)
    last = token("last", expires=timedelta(hours=1))
    clock.step(days=91)
    prune()
    with sessions.read() as session:
        left = set(session.scalars(select(Token.id)))
    assert left & {expired, revoked} == set()
    assert left >= {*living, made.id, last}, "the last keeps its number from being given again"
    world.call(agents.retire, "web-1")
    clock.step(days=91)
    prune()  # the agent
    prune()  # and what it came by
    assert count(sessions, Token, Token.id == made.id) == 0


def test_closed_proposals_and_ended_sessions_go(sessions, clock, prune):
    def proposal(state, **when):
        times = {"created_at": clock(), "expires_at": clock() + timedelta(days=7), "closed_at": None} | when
        return Proposal(version=1, body=b"{}", signers={}, state=state, created_by="ada", **times)

    def person(name, hours):
        times = {"created_at": clock(), "used_at": clock(), "expires_at": clock() + timedelta(hours=hours)}
        said = {"issuer": "https://id", "subject": name, "rule": "r", "hash": name, "attempt": name}
        return PersonSession(name=name, **said, **times)

    with sessions.write() as session:
        session.add_all([proposal("published", closed_at=clock()), proposal("open")])
        later = clock() + timedelta(days=365)
        session.add_all([proposal("open", expires_at=later), proposal("open")])
        session.add_all([person("ada", 1), person("bo", 24 * 365)])
    clock.step(days=98)
    prune()
    with sessions.read() as session:
        assert session.scalars(select(Proposal.id).order_by(Proposal.id)).all() == [3, 4]
        assert session.scalars(select(PersonSession.name)).all() == ["bo"]


def test_the_audit_log_stays_whole(world, sessions, clock, prune):
    world.cohort()
    world.call(agents.retire, world.enroll("gone").id)
    head = count(sessions, AuditEntry)
    clock.step(days=36_000)
    prune()
    with sessions.read() as session:
        assert audit.verify(session).id == head


# --- uploads ---------------------------------------------------------------------------------------------

CONTENT = b"0123456789"
DIGEST = sha256(CONTENT).hexdigest()


def begin_upload(blobs, days_ago=0.0):
    blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT[:4]))
    then = time.time() - days_ago * 86_400
    os.utime(blobs.uploads / DIGEST, (then, then))
    return blobs.uploads / DIGEST


@pytest.fixture
def today(clock):
    """Files have the real time."""
    from agent_core import clock as wall

    clock.now = wall.now()


def test_an_upload_that_stopped_goes_and_can_be_begun_anew(today, blobs, sessions, prune):
    begin_upload(blobs, days_ago=8)
    prune()
    assert list(blobs.uploads.iterdir()) == []
    assert removed(sessions, "uploads") == 1
    assert blobs.append(DIGEST, 0, len(CONTENT), BytesIO(CONTENT)) == len(CONTENT)


def test_an_upload_that_cannot_be_opened_keeps_no_other(today, blobs, sessions, prune, monkeypatch, caplog):
    """Hundreds of another user's; root opens any file, so the refusal is made."""
    begin_upload(blobs, days_ago=8)
    assert DIGEST > "0" * 62 + "99", "it comes behind them"
    then = time.time() - 8 * 86_400
    for number in range(250):
        part = blobs.uploads / f"{number:064}"
        part.touch()
        os.utime(part, (then, then))
    really = rooms_of_blobs.open_locked
    monkeypatch.setattr(rooms_of_blobs, "open_locked", lambda path: refuse_others(path, really))
    prune()
    assert removed(sessions, "uploads") == 1
    assert not (blobs.uploads / DIGEST).exists()
    told = [record.count for record in caplog.records if "cannot be removed" in record.message]
    assert told == [100, 100, 50], "each is tried once a sweep, and a batch says so once"


def refuse_others(path, really):
    if path.name != DIGEST:
        raise PermissionError(13, "Permission denied", str(path))
    return really(path)


def test_an_upload_that_goes_on_or_is_young_stays(today, blobs, prune):
    part = begin_upload(blobs, days_ago=6)
    prune()
    assert part.exists()
    begin_upload_old = time.time() - 30 * 86_400
    os.utime(part, (begin_upload_old, begin_upload_old))
    with open_locked(part):
        prune()
    assert part.exists()


def test_what_is_no_file_among_uploads_is_left_alone(today, blobs, sessions, prune):
    part = begin_upload(blobs, days_ago=8)
    (blobs.uploads / "lost+found").mkdir()
    (blobs.uploads / "link").symlink_to(part)
    for other in blobs.uploads.iterdir():
        os.utime(other, (0, 0), follow_symlinks=False)
    prune()
    assert sorted(other.name for other in blobs.uploads.iterdir()) == ["link", "lost+found"]
    assert removed(sessions, "uploads") == 1


def test_a_sender_that_opened_an_upload_as_it_was_removed_is_told_to_begin_anew(blobs, monkeypatch):
    part = begin_upload(blobs)
    lock = __import__("fcntl").flock

    def remove_first(file, how):
        part.unlink(missing_ok=True)
        lock(file, how)

    monkeypatch.setattr("release_server.blobs.fcntl.flock", remove_first)
    with pytest.raises(UploadConflictError) as refused:
        blobs.append(DIGEST, 4, len(CONTENT), BytesIO(CONTENT[4:]))
    assert refused.value.offset == 0


# --- how it goes -----------------------------------------------------------------------------------------


def backlog(world, sessions, clock, amount):
    """An agent with so many old events beyond those that stay."""
    host = world.enroll("loud")
    with sessions.write() as session:
        session.add_all(
            AgentEvent(
                agent_id=host.id,
                number=number,
                at="2026-01-01T00:00:00Z",
                received_at=clock(),
                version="1.0.0",
                state="downloading",
            )
            for number in range(1, amount + 51)
        )
    clock.step(days=91)
    return host


def test_a_long_backlog_goes_in_short_transactions_one_a_step(
    world, sessions, clock, make_pruner, monkeypatch
):
    monkeypatch.setattr(room, "BATCH", 20)
    host = backlog(world, sessions, clock, 47)
    made, left = make_pruner(), [len(numbers(sessions, host))]
    while made.step(clock(), allow):
        left.append(len(numbers(sessions, host)))
        world.report(host)  # a report between two of them waits for none
    steps = [before - after for before, after in pairwise(left) if before != after]
    assert steps == [20, 20, 7]
    assert left[-1] == 50


def test_where_nothing_is_due_nothing_is_asked_for_a_minute(world, sessions, clock, prune, make_pruner):
    prune()
    asked = []
    event.listen(sessions.engine, "before_cursor_execute", lambda *said: asked.append(said[2]))
    made = make_pruner()
    assert made.step(clock(), allow) is False
    first = len(asked)
    clock.step(seconds=59)
    assert made.step(clock(), allow) is False
    assert len(asked) == first
    clock.step(hours=1)
    assert made.step(clock(), allow) is True


def test_zero_keeps_a_kind_for_ever(sessions, prune):
    kinds = [setting.name.removesuffix("_days").partition(".")[2] for setting in KINDS]
    prune(**dict.fromkeys(kinds, 0))
    with sessions.read() as session:
        assert (
            set(session.scalars(select(Pruning.kind)))
            == set(SWEEPS) - set(kinds)
            == {"leases", "shares", "sessions", "answers", "secrets"}
        )


def test_settings_say_how_long_each_kind_is_kept(data):
    (data / "server.toml").write_text("[retention]\nevents_days = 0\nuploads_days = 2\nevents_kept = 9\n")
    keep = Config.load(data, environ={"RELFLEET_RETENTION_TOKENS_DAYS": "0"}).retention
    assert keep.events_kept == 9
    assert keep.kept["uploads"] == timedelta(days=2)
    assert {"events", "tokens"} & keep.kept.keys() == set()
    assert keep.kept["metadata"] == timedelta(days=30), "on by default"


def test_the_jobs_process_prunes_by_default(world, sessions, clock, make_jobs):
    host = backlog(world, sessions, clock, 3)
    one = make_jobs()
    for _ in SWEEPS:
        one.tick()
    assert len(numbers(sessions, host)) == 50


def test_a_process_that_lost_its_lease_removes_nothing(
    world, sessions, clock, config, make_jobs, make_pruner, monkeypatch
):
    host = backlog(world, sessions, clock, 3)
    first, second = make_jobs(), make_jobs()
    pruned = first.pruner.step

    def pause(now, check):
        clock.now += config.lease
        assert second.tick()
        return pruned(now, check)

    monkeypatch.setattr(first.pruner, "step", pause)
    with pytest.raises(LostLeaseError):
        first.tick()
    with sessions.read() as session:
        assert [row.kind for row in session.scalars(select(Pruning))] == ["leases"], "the second's step"
    assert len(numbers(sessions, host)) == 53


def test_that_pruning_fails_stops_nothing_else(world, make_jobs, monkeypatch, caplog):
    one = make_jobs()
    monkeypatch.setitem(
        room.SWEEPS, "leases", room.SWEEPS["leases"].__class__(rows=None, files=fail, timed=False)
    )
    assert one.tick() is True
    assert one.tick() is True
    assert [record.message for record in caplog.records].count("old records were not removed") == 1


def test_a_sweep_that_fails_keeps_none_behind_it_waiting(world, sessions, clock, make_pruner, monkeypatch):
    host = backlog(world, sessions, clock, 3)
    monkeypatch.setitem(room.SWEEPS, "leases", sweeps.Sweep(files=fail, timed=False))
    pruner = make_pruner()
    with pytest.raises(OSError, match="the disk is gone") as failed:
        pruner.step(clock(), allow)
    assert failed.value.__notes__ == ["It was the sweep of leases."]
    while pruner.step(clock(), allow):
        pass
    assert len(numbers(sessions, host)) == 50
    assert count(sessions, Pruning) == len(SWEEPS) - 1
    clock.step(minutes=1)
    with pytest.raises(OSError, match="the disk is gone"):
        pruner.step(clock(), allow)


def fail(_turn):
    raise OSError("the disk is gone")


# --- a kill at any statement -----------------------------------------------------------------------------


def prune_and_die(config, now, statement):
    """In a child: take every step that is due, and be killed at the given statement."""
    sessions = Sessions(make_engine(config.database_url))
    left = [statement]

    def count_down(*_):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    event.listen(sessions.engine, "before_cursor_execute", count_down)
    one = Pruner(sessions, Blobs(config.blobs, config.uploads), config.repository, config.retention)
    while one.step(now, allow):
        pass


def run_child(work):
    """Fork, work and leave without a trace in this process; whether the child was killed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            sys.stderr.write(f"{error!r}\n")
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_any_statement_it_ends_where_it_would_have_ended(
    world, sessions, clock, config, blobs, two_rollouts, trusted, accept, online_signer, monkeypatch
):
    with sessions.write() as session:  # nobody signed what they name
        session.execute(update(CohortStatus).values(directive=null()))
    accept(trusted.targets())
    for _ in range(3):
        with sessions.write() as session:
            repository.publish(session, online_signer, clock())
        repository.export(sessions, blobs, config.repository)
        clock.step(days=8)
    backlog(world, sessions, clock, 3)
    monkeypatch.setattr(room, "BATCH", 2)
    sessions.close()  # no connection is shared with a child
    deaths = (run_child(partial(prune_and_die, config, clock(), at)) for at in cycle(range(2, 14, 2)))
    kills = sum(1 for _ in takewhile(bool, deaths))
    assert kills > 6
    old, newest = two_rollouts
    assert count(sessions, Attempt, Attempt.rollout_id == old) == 0
    assert count(sessions, Attempt, Attempt.rollout_id == newest) == 3
    assert count(sessions, AgentEvent) == removed_never(sessions)
    assert files(config, "snapshot") == stored(sessions, "snapshot")
    with sessions.read() as session:
        said = {row.kind: row.removed for row in session.scalars(select(Pruning)) if row.removed}
        audit.verify(session)
    assert said["events"] == 3, "each row is counted once"
    assert said["metadata"] > 0


def removed_never(sessions):
    """All events but the three beyond the fifty of one agent."""
    with sessions.read() as session:
        return sum(
            min(50, amount)
            for amount in session.scalars(
                select(func.count()).select_from(AgentEvent).group_by(AgentEvent.agent_id)
            )
        )


# --- what people see -------------------------------------------------------------------------------------


def test_doctor_says_how_much_has_gone_and_what_is_behind(world, sessions, clock, config, prune):
    backlog(world, sessions, clock, 3)
    prune()
    with sessions.read() as session:
        found = room.standing(session, config.retention, clock())
        assert (str(found), found.behind) == ("3 old records have gone", ())
        later = room.standing(session, config.retention, clock() + timedelta(days=2))
    assert set(later.behind) == set(SWEEPS)
    assert "no whole sweep of" in str(later)


def test_what_was_never_gone_through_is_behind_once_the_server_is_there_for_a_day(sessions, clock, config):
    with sessions.write() as session:
        up = Lease(name=Lease.JOBS, holder="", fence=1, until=clock(), since=clock())
        session.add_all((up, Pruning(kind="events", removed=3, under_way=True, cursor="x")))
        session.flush()
        for hours, behind in ((24, set()), (25, set(SWEEPS))):
            found = room.standing(session, config.retention, clock() + timedelta(hours=hours))
            assert set(found.behind) == behind
        kept = Retention({"events": timedelta(days=1)}, 50)
        found = room.standing(session, kept, clock() + timedelta(hours=25))
        assert set(found.behind) == {"events"} | {kind for kind in SWEEPS if not SWEEPS[kind].timed}


def test_where_jobs_never_paused_a_kind_counts_from_when_the_server_was_made(world, clock, config):
    """`Lease.since` is set by a pause alone."""
    world.cohort()
    with world.read() as session:
        for hours, behind in ((24, set()), (25, set(SWEEPS))):
            found = room.standing(session, config.retention, clock() + timedelta(hours=hours))
            assert set(found.behind) == behind


def test_metrics_count_what_has_gone_and_say_how_long_ago(world, sessions, clock, prune, client, token):
    backlog(world, sessions, clock, 3)
    prune()
    clock.step(minutes=5)
    text = client.get("/metrics", headers={"Authorization": f"Bearer {token('reader')}"}).text
    assert 'relfleet_retention_removed_total{kind="events"} 3.0' in text
    assert 'relfleet_retention_age_seconds{kind="events"} 300.0' in text
