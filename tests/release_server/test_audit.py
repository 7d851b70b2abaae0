"""The audit log's chain: kept by every writer, and broken by every change."""

from __future__ import annotations

import json
import threading

import pytest
from sqlalchemy import text

from agent_core.errors import TrustError
from release_server import audit, audit_chain
from release_server.audit_chain import FIRST, Head
from release_server.database import Sessions, make_engine, upgrade


@pytest.fixture
def note(sessions, clock):
    def write(*subjects, actor="ada", **detail):
        with sessions.write() as session:
            for subject in subjects:
                audit.record(session, clock(), actor, "cohort.pin", subject, **detail)

    return write


@pytest.fixture
def verify(sessions):
    def check():
        with sessions.read() as session:
            return audit.verify(session)

    return check


@pytest.fixture
def log(sessions):
    def read():
        with sessions.read() as session:
            return [audit.said(entry) for entry in audit.stretch(session)[0]]

    return read


def execute(sessions, statement, **values):
    with sessions.write() as session:
        session.execute(text(statement), values)


def test_an_empty_log_is_whole(verify):
    assert verify() == Head(0, FIRST)


def test_each_entry_carries_the_hash_of_the_one_before(note, log, verify):
    note("a", "b", version="1.0", at_once=True)
    note("c")
    first, second, third = log()
    assert (first["id"], first["previous"]) == (1, FIRST)
    assert (second["previous"], third["previous"]) == (first["hash"], second["hash"])
    assert verify() == Head(3, third["hash"])


def test_the_form_that_is_hashed_never_changes():
    entry = {"id": 7, "at": "2026-01-31T12:00:00Z", "actor": "ada", "action": "cohort.pin"}
    entry |= {"subject": "demo/größe", "detail": {"b": [1, None], "a": 0.5}}
    golden = "c06419207cc7f6bbb9f9f5daca0616558f9a0048e6073a6265af0fdeb9eecf59"
    assert audit_chain.link(FIRST, entry) == golden


def test_what_is_rolled_back_leaves_no_entry_and_no_gap(sessions, clock, note, log, verify):
    def fail():
        with sessions.write() as session:
            audit.record(session, clock(), "ada", "cohort.pin", "never")
            session.flush()
            raise RuntimeError

    note("a")
    with pytest.raises(RuntimeError):
        fail()
    note("b")
    assert [entry["subject"] for entry in log()] == ["a", "b"]
    verify()


def test_of_a_transaction_in_a_transaction_only_what_was_kept_is_noted(sessions, clock, log, verify):
    with sessions.write() as session:
        audit.record(session, clock(), "ada", "cohort.pin", "before")
        with session.begin_nested() as inner:
            audit.record(session, clock(), "ada", "cohort.pin", "never")
            inner.rollback()
        with session.begin_nested():
            audit.record(session, clock(), "ada", "cohort.pin", "inside")
        audit.record(session, clock(), "ada", "cohort.pin", "after")
    assert [entry["subject"] for entry in log()] == ["before", "inside", "after"]
    verify()


def test_writers_at_once_leave_one_chain(note, log, verify):
    threads = [
        threading.Thread(target=lambda name=name: [note(f"{name}-{turn}") for turn in range(10)])
        for name in "abcd"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(log()) == 40
    verify()


TAMPERED = {
    "a changed actor": ("UPDATE audit SET actor = 'eve' WHERE id = 3", "entry 3 was changed"),
    "a changed time": ("UPDATE audit SET at = '2020-01-01 00:00:00' WHERE id = 3", "entry 3 was changed"),
    "a changed detail": ("UPDATE audit SET detail = '{\"x\": 1}' WHERE id = 3", "entry 3 was changed"),
    "a changed hash": (f"UPDATE audit SET hash = '{FIRST}' WHERE id = 3", "entry 3 was changed"),
    "a dropped entry": ("DELETE FROM audit WHERE id = 3", "entry 4 does not follow from entry 2"),
    "the first ones dropped": ("DELETE FROM audit WHERE id < 3", "entry 3 does not follow from entry 0"),
    "the last one dropped": (
        "DELETE FROM audit WHERE id = 5",
        "it ends with entry 4, and 5 was written last",
    ),
    "all dropped": ("DELETE FROM audit", "it ends with entry 0, and 5 was written last"),
    "one put in at the end": (
        "INSERT INTO audit SELECT 6, at, actor, action, subject, detail, hash, hash FROM audit WHERE id = 5",
        "entry 6 was changed",
    ),
    "two exchanged": (
        "UPDATE audit SET id = CASE id WHEN 2 THEN 30 ELSE 2 END WHERE id IN (2, 3)",
        "entry 2 does not follow from entry 1",
    ),
}


@pytest.mark.parametrize(("statement", "why"), TAMPERED.values(), ids=TAMPERED)
def test_whatever_is_changed_the_first_broken_entry_is_named(sessions, note, verify, statement, why):
    note("a", "b", "c", "d", "e")
    execute(sessions, statement)
    with pytest.raises(TrustError) as caught:
        verify()
    assert (caught.value.reason, caught.value.why) == ("audit-broken", why)


def test_a_log_written_anew_from_some_entry_on_does_not_hold_a_head_noted_before(sessions, note, log, verify):
    note("a", "b", "c")
    noted = verify()
    forged, head = [], Head()
    for entry in log():
        entry |= {"actor": "eve", "previous": head.hash}
        entry["hash"] = audit_chain.link(head.hash, entry)
        head = Head(entry["id"], entry["hash"])
        forged.append(entry)
    assert audit_chain.follow(forged) == head
    with pytest.raises(TrustError, match="broken"):
        audit_chain.follow(forged, known=noted)
    with pytest.raises(TrustError, match="broken"):
        audit_chain.follow(log()[:2], known=noted)
    assert audit_chain.follow(log(), known=noted) == noted


def test_entries_of_an_older_schema_are_chained_by_the_upgrade(empty_url, clock):
    upgrade(empty_url, "0002")
    old = Sessions(make_engine(empty_url))
    for number in (1, 2, 5):  # a sequence of PostgreSQL leaves gaps
        execute(
            old,
            "INSERT INTO audit (id, at, actor, action, subject, detail) "
            "VALUES (:id, :at, 'ada', 'x', 'y', :detail)",
            id=number,
            at="2026-05-01 12:00:00.123456",
            detail=json.dumps({"ä": number}),
        )
    upgrade(empty_url)
    with old.write() as session:
        audit.record(session, clock(), "ada", "cohort.pin", "new")
    with old.read() as session:
        assert audit.verify(session).id == 6
    old.close()


# --- over HTTP -------------------------------------------------------------------------------------------


def test_the_chain_is_read_in_pages_and_checked_on_the_server(note, sign_in, log):
    ask = sign_in("reader")
    note("a", "b")
    everything = log()
    head = f"{len(everything)}:{everything[-1]['hash']}"
    page = ask("GET", "/audit/chain?limit=2").json
    assert (page["items"], page["next"], page["head"]) == (everything[:2], 2, head)
    page = ask("GET", "/audit/chain?after=2").json
    assert (page["items"], page["next"]) == (everything[2:], None)
    assert ask("GET", "/audit/verify").json == {"head": head}


def test_a_broken_chain_is_422_with_its_reason(note, sign_in, sessions):
    ask = sign_in("reader")
    note("a")
    execute(sessions, "UPDATE audit SET actor = 'eve' WHERE id = 2")
    answer = ask("GET", "/audit/verify")
    assert (answer.status_code, answer.json["reason"]) == (422, "audit-broken")
    assert "entry 2" in answer.json["detail"]
