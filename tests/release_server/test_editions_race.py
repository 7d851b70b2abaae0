"""Processes that change one thing at the same moment, each as it saw it: one does, the others are told."""

from __future__ import annotations

import multiprocessing

import pytest

from release_server.app import create_app
from release_server.stages import Stage
from tests.release_server.fleet_world import World

PROCESSES, ROUNDS = 3, 5


def serve(config, now, token, wire):
    """A replica in a process of its own: it asks itself what comes over the wire."""
    ask = create_app(config, clock=lambda: now).test_client().open
    signed_in = {"Authorization": f"Bearer {token}"}
    while (said := wire.recv()) is not None:
        method, path, seen, body = said
        headers = signed_in | ({"If-Match": seen} if seen else {})
        answer = ask(f"/api/v1{path}", method=method, json=body, headers=headers)
        wire.send((answer.status_code, answer.json.get("reason")))


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    made.enroll_many(6)
    return made


@pytest.fixture
def ask_at_once(config, sessions, world, clock, token):
    """Each process sends its own body to one path, all beginning together; what each was answered."""
    text, fork = token("admin", name="racer"), multiprocessing.get_context("fork")
    sessions.close()  # no connection is shared with a child
    wires, processes = [], []
    for _ in range(PROCESSES):
        here, there = fork.Pipe()
        processes.append(fork.Process(target=serve, args=(config, clock(), text, there)))
        processes[-1].start()
        wires.append(here)

    def ask(method, path, seen):
        for number, wire in enumerate(wires):
            wire.send((method, path, seen, {"reason": f"of process {number}"}))
        return [wire.recv() for wire in wires]

    yield ask
    for wire in wires:
        wire.send(None)
    for process in processes:
        process.join(timeout=60)


ONE_DID = sorted([(200, None), *[(412, "stale")] * (PROCESSES - 1)], key=str)


def told(answers):
    """Answers without what a rollout or a cohort says as its own reason."""
    return sorted(((status, reason if status != 200 else None) for status, reason in answers), key=str)


def test_of_processes_that_edit_the_cohort_they_saw_one_does(world, ask_at_once, sign_in):
    look = sign_in("reader")
    for _ in range(ROUNDS):
        before = look("GET", "/cohorts/demo/all")
        answers = ask_at_once("PATCH", "/cohorts/demo/all", before.headers["ETag"])
        assert told(answers) == ONE_DID
        after = look("GET", "/cohorts/demo/all").json
        assert after["revision"] == before.json["revision"] + 1
        winner = next(number for number, (status, _) in enumerate(answers) if status == 200)
        assert after["reason"] == f"of process {winner}", "and it is the one that was told so"


def test_of_processes_that_advance_the_rollout_they_saw_one_does(world, ask_at_once, sign_in):
    rollout, look = world.start("1.1.0", *[Stage(count=number) for number in range(1, 7)]), sign_in("reader")
    for number in range(1, ROUNDS + 1):
        seen = look("GET", f"/rollouts/{rollout}").headers["ETag"]
        answers = ask_at_once("POST", f"/rollouts/{rollout}/advance", seen)
        assert told(answers) == ONE_DID
        assert look("GET", f"/rollouts/{rollout}").json["stage"] == number, "not a stage was skipped"


def test_without_if_match_each_of_them_does(world, ask_at_once, sign_in):
    before = sign_in("reader")("GET", "/cohorts/demo/all").json["revision"]
    answers = ask_at_once("PATCH", "/cohorts/demo/all", None)
    assert [status for status, _ in answers] == [200] * PROCESSES
    assert sign_in("reader")("GET", "/cohorts/demo/all").json["revision"] == before + PROCESSES
