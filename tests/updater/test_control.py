"""Requests, status and backoff: what people and the resident agent leave for each other."""

from __future__ import annotations

import os

import pytest

from agent_core.layout import Layout
from updater import control
from updater.control import Request


@pytest.fixture
def layout(tmp_path):
    layout = Layout(tmp_path / "root")
    layout.make()
    return layout


def test_a_request_waits_until_it_is_done(layout):
    control.leave_request(layout, Request("rollback"))
    assert control.read_request(layout) == Request("rollback")
    control.forget_request(layout)
    assert control.read_request(layout) is None


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{}",
        '{"verb": "format-disk"}',
        "[]",
        '{"verb": "rollback", "name": "../../etc"}',
        '{"verb": "activate", "name": "1.0.0-111111111111/../x"}',
        '{"verb": "activate", "name": "1.0.0"}',
    ],
)
def test_a_request_that_makes_no_sense_is_taken_away(layout, damage):
    file = layout.state / "request.json"
    file.write_text(damage)
    assert control.read_request(layout) is None
    assert not file.exists()


def test_one_holder_of_the_lock_at_a_time(layout):
    with control.alone(layout) as first, control.alone(layout) as second:
        assert (first, second) == (True, False)
    with control.alone(layout) as again:
        assert again


def test_another_program_with_the_agents_old_number_is_not_signalled(layout):
    control.show(layout, "1.0.0-x", None)
    assert control.read_status(layout)["pid"] == os.getpid()
    assert not control.is_running(layout)
    assert not control.wake(layout)


def test_the_status_of_an_earlier_process_is_not_mixed_with_ours(layout):
    (layout.state / "status.json").write_text('{"pid": 1, "trial": "wait", "version": "old"}')
    control.show(layout, "new", 7, poll="up-to-date")
    status = control.read_status(layout)
    assert (status["version"], status["workload_pid"], status["poll"]) == ("new", 7, "up-to-date")
    assert "trial" not in status


def test_backoff_is_kept_across_a_restart_and_ends_with_success(layout):
    control.remember_backoff(layout, 3, 40.0)
    failures, left = control.recall_backoff(layout, 60.0)
    assert failures == 3
    assert 38 < left <= 40
    control.remember_backoff(layout, 0, 0)
    assert control.recall_backoff(layout, 60.0) == (0, 0.0)


def test_a_clock_set_back_does_not_make_the_wait_longer(layout):
    (layout.state / "backoff.json").write_text('{"failures": 2, "until_s": 99999999999, "wait_s": 8.0}')
    assert control.recall_backoff(layout, 60.0) == (2, 8.0)


@pytest.mark.parametrize("until_s", [0, 2**53, "NaN", "true", "-1", "1e308", "Infinity"])
@pytest.mark.parametrize("wait_s", [10**15, "1e308", "Infinity", "NaN", "true", -1])
def test_no_note_of_a_backoff_makes_anybody_wait_for_ever(layout, until_s, wait_s):
    body = f'{{"failures": {2**53}, "until_s": {until_s}, "wait_s": {wait_s}}}'
    (layout.state / "backoff.json").write_text(body)
    assert 0 <= control.recall_backoff(layout, 90.0)[1] <= 90.0
