"""Processes that change one thing at the same moment, each as it saw it: one does, the others are told."""

from __future__ import annotations

import subprocess
import sys
from threading import Barrier

import pytest
from flask import request

from agent_core.errors import Exit
from release_server.models import Agent
from release_server.stages import Stage
from tests.release_server.fleet_world import World
from tests.release_server.operator_desk import desk
from tests.release_server.racers import racing

PROCESSES, ROUNDS = 3, 5
KEY = "0f8fad5b-d9cb-469f-a165-70867728950e"


@pytest.fixture
def world(sessions, clock):
    made = World(sessions, clock)
    made.cohort()
    made.enroll_many(6)
    return made


@pytest.fixture
def ask_at_once(config, sessions, world, clock, token):
    """Each process sends its request, all beginning together; what each was answered."""
    signed_in = {"Authorization": f"Bearer {token('admin', name='racer')}"}
    sessions.close()
    with racing(config, clock(), PROCESSES) as ask:

        def ask_each(method, paths, bodies, **headers):
            requests = [
                [(method, path, {"json": body, "headers": signed_in | headers})]
                for path, body in zip(paths, bodies, strict=True)
            ]
            return [answer for (answer,) in ask(*requests)]

        yield ask_each


@pytest.fixture
def change_at_once(ask_at_once):
    """Each asks the same for a reason of its own, as it saw the edition, or as any where it saw none."""

    def change(method, path, seen):
        bodies = [{"reason": f"of process {number}"} for number in range(PROCESSES)]
        return ask_at_once(method, [path] * PROCESSES, bodies, **({"If-Match": seen} if seen else {}))

    return change


ONE_DID = sorted([(200, None), *[(412, "stale")] * (PROCESSES - 1)], key=str)


def told(answers):
    """Answers without what a rollout or a cohort says as its own reason."""
    return sorted(((status, said["reason"] if status != 200 else None) for status, said in answers), key=str)


def winner_of(answers):
    return next(number for number, (status, _) in enumerate(answers) if status == 200)


def test_of_processes_that_edit_the_cohort_they_saw_one_does(world, change_at_once, sign_in):
    look = sign_in("reader")
    for _ in range(ROUNDS):
        before = look("GET", "/cohorts/demo/all")
        answers = change_at_once("PATCH", "/cohorts/demo/all", before.headers["ETag"])
        assert told(answers) == ONE_DID
        after = look("GET", "/cohorts/demo/all").json
        assert after["revision"] == before.json["revision"] + 1
        assert after["reason"] == f"of process {winner_of(answers)}", "and it is the one that was told so"


def test_of_processes_that_advance_the_rollout_they_saw_one_does(world, change_at_once, sign_in):
    rollout, look = world.start("1.1.0", *[Stage(count=number) for number in range(1, 7)]), sign_in("reader")
    for number in range(1, ROUNDS + 1):
        seen = look("GET", f"/rollouts/{rollout}").headers["ETag"]
        answers = change_at_once("POST", f"/rollouts/{rollout}/advance", seen)
        assert told(answers) == ONE_DID
        assert look("GET", f"/rollouts/{rollout}").json["stage"] == number, "not a stage was skipped"


def test_without_if_match_each_of_them_does(world, change_at_once, sign_in):
    before = sign_in("reader")("GET", "/cohorts/demo/all").json["revision"]
    answers = change_at_once("PATCH", "/cohorts/demo/all", None)
    assert [status for status, _ in answers] == [200] * PROCESSES
    assert sign_in("reader")("GET", "/cohorts/demo/all").json["revision"] == before + PROCESSES


# --- agents ----------------------------------------------------------------------------------------------


def test_of_processes_that_label_the_agent_they_saw_one_does(world, ask_at_once, sign_in):
    look = sign_in("reader")
    for turn in range(ROUNDS):
        seen = look("GET", "/agents/web-00").headers["ETag"]
        bodies = [{"labels": {"rack": f"{turn}-{number}"}} for number in range(PROCESSES)]
        answers = ask_at_once("POST", ["/agents/web-00/label"] * PROCESSES, bodies, **{"If-Match": seen})
        assert told(answers) == ONE_DID
        assert look("GET", "/agents/web-00").json["operator_labels"] == bodies[winner_of(answers)]["labels"]


def test_of_people_that_label_move_and_retire_one_agent_as_they_saw_it_one_does(world, ask_at_once, sign_in):
    world.cohort("spare", match="kind=spare", priority=1)
    asked = {"label": {"labels": {"rack": "7"}}, "move": {"cohort": "spare"}, "retire": {}}
    for name in world.hosts:
        before = sign_in("reader")("GET", f"/agents/{name}")
        paths = [f"/agents/{name}/{verb}" for verb in asked]
        answers = ask_at_once("POST", paths, asked.values(), **{"If-Match": before.headers["ETag"]})
        assert told(answers) == ONE_DID
        after = sign_in("reader")("GET", f"/agents/{name}").json
        done = [
            after["operator_labels"] != before.json["operator_labels"],
            after["cohort"] == "spare",
            after["state"] == "retired",
        ]
        assert done == [number == winner_of(answers) for number in range(PROCESSES)]


def test_of_two_commands_that_saw_the_same_labels_one_sets_its_own_and_the_other_ends_with_6(
    world, app, token, tmp_path, monkeypatch, capsys, sign_in
):
    both_have_looked = Barrier(2)

    @app.after_request
    def let_both_look_first(answer):
        if request.method == "GET":
            both_have_looked.wait(60)
        return answer

    with desk(app, token, tmp_path, monkeypatch, capsys):
        argv = [sys.executable, "-m", "release_server.publish.cli", "agents", "label", "web-00"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        commands = [subprocess.Popen([*argv, f"rack={number}"], **pipes) for number in range(2)]
        said = [command.communicate(timeout=60)[1] for command in commands]
    codes = [command.returncode for command in commands]
    assert sorted(codes) == [Exit.DONE, Exit.CONFLICT], said
    assert "agent web-00 was changed meanwhile" in said[codes.index(Exit.CONFLICT)]
    with world.read() as session:
        labels = session.get_one(Agent, "web-00").operator_labels
    assert labels == {"rack": str(codes.index(Exit.DONE))}


# --- several cohorts, and one deed -----------------------------------------------------------------------


def test_of_processes_that_carry_out_a_plan_for_what_they_saw_one_does_all_of_its_own(
    world, ask_at_once, sign_in
):
    world.cohort("spare", priority=1)
    look = sign_in("reader")
    for turn in range(ROUNDS):
        seen = {name: look("GET", f"/cohorts/demo/{name}").json["revision"] for name in ("all", "spare")}
        plans = [
            {
                "product": "demo",
                "seen": seen,
                "steps": [
                    {"verb": "edit", "cohort": name, "poll_s": 10 + turn * PROCESSES + n} for name in seen
                ],
            }
            for n in range(PROCESSES)
        ]
        answers = ask_at_once("POST", ["/plan"] * PROCESSES, plans)
        assert told(answers) == ONE_DID
        wanted = plans[winner_of(answers)]["steps"][0]["poll_s"]
        for name, revision in seen.items():
            after = look("GET", f"/cohorts/demo/{name}").json
            assert (after["poll_s"], after["revision"]) == (wanted, revision + 1)


def test_of_processes_that_send_one_request_under_one_key_one_does_it_and_all_are_answered_alike(
    world, ask_at_once, sign_in
):
    look = sign_in("reader")
    for turn in range(ROUNDS):
        before = look("GET", "/cohorts/demo/all").json["revision"]
        key = {"Idempotency-Key": f"{KEY}-{turn}"}
        body = {"version": "1.1.0", "reason": f"turn {turn}"}
        answers = ask_at_once("POST", ["/cohorts/demo/all/pin"] * PROCESSES, [body] * PROCESSES, **key)
        assert [status for status, _ in answers] == [200] * PROCESSES
        assert [said for _, said in answers] == [answers[0][1]] * PROCESSES
        assert look("GET", "/cohorts/demo/all").json["revision"] == before + 1


def test_of_processes_that_send_different_requests_under_one_key_one_does_it_and_the_others_are_refused(
    world, ask_at_once, sign_in
):
    before = sign_in("reader")("GET", "/cohorts/demo/all").json["revision"]
    bodies = [{"version": version} for version in ("0.9.0", "1.0.0", "1.1.0")]
    answers = ask_at_once("POST", ["/cohorts/demo/all/pin"] * PROCESSES, bodies, **{"Idempotency-Key": KEY})
    refused = [(422, "key-reused")] * (PROCESSES - 1)
    assert told(answers) == sorted([(200, None), *refused], key=str)
    after = sign_in("reader")("GET", "/cohorts/demo/all").json
    assert (after["revision"], after["pin"]) == (before + 1, bodies[winner_of(answers)]["version"])
