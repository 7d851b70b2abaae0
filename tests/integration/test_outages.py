"""The server goes away and comes back: agents keep running, wait longer each time, and then update."""

from __future__ import annotations

from agent_core import slots
from tests.integration.world import until
from updater import control


def test_agents_go_on_and_back_off_while_the_server_is_away_and_update_when_it_is_back(world):
    world.publish("1.1.0")
    host = world.host(world.cohort())
    host.await_look("up-to-date")
    agent, workload = host.pid(), host.news["workload_pid"]
    world.stop_server()
    until("polls to fail", lambda: control.recall_backoff(host.layout, 3600.0)[0] >= 3)
    assert (host.pid(), host.news["workload_pid"]) == (agent, workload)
    assert host.record.phase == slots.IDLE
    assert host.agent("once")[0] == 8
    world.start_server()
    world.pin(host.cohort, "1.1.0")
    host.await_good("1.1.0")
    assert control.recall_backoff(host.layout, 3600.0) == (0, 0.0)
    host.await_seen(version="1.1.0", phase="idle")
