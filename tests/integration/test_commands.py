"""The edges of the commands against a real server: exit codes, cut and doubled pushes, tokens, settings."""

from __future__ import annotations

import json
import os
import signal
import socket
import socketserver
import threading
from contextlib import contextmanager, suppress

import pytest

from agent_core.layout import Layout
from tests.integration.world import Host, index_of, until

# --- push ------------------------------------------------------------------------------------------------


def push(world, version):
    code, printed, said = world.exit_of("release", "push", "--json", "--wait", str(world.archive(version)))
    return code, json.loads(printed) if code == 0 else said


def test_a_version_pushed_again_is_published_already_and_with_other_bytes_a_conflict(world):
    world.derive("3.0.0", {"app/notes.txt": "one\n"})
    code, outcome = push(world, "3.0.0")
    assert (code, outcome["state"]) == (0, "published")
    code, printed, said = world.exit_of("release", "push", str(world.archive("3.0.0")))
    assert (code, "published" in printed + said) == (0, True)
    world.derive("3.0.0", {"app/notes.txt": "other\n"})
    code, said = push(world, "3.0.0")
    assert (code, "version exists" in said) == (6, True)


def test_of_two_pushes_at_once_at_most_one_has_to_be_repeated_and_both_are_published(world):
    for version in ("3.1.0", "3.2.0"):
        world.derive(version, {})
    begun = {
        version: world.processes.begin("release", "push", str(world.archive(version)), cwd=world.project)
        for version in ("3.1.0", "3.2.0")
    }
    for child in begun.values():
        world.processes.finish(child, codes=(0, 6))
    refused = [version for version, child in begun.items() if child.returncode == 6]
    assert len(refused) < 2
    for version in refused:
        assert push(world, version)[0] == 0
    seqs = {world.client.get(f"/releases/probe/{version}")["seq"] for version in begun}
    assert len(seqs) == 2


@contextmanager
def a_line_that_stalls(port, after):
    """A port before the server's own that hands on so many bytes and no more; and whether it has."""
    left, stalled, gone = after, threading.Event(), threading.Event()

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            nonlocal left
            with socket.create_connection(("127.0.0.1", port)) as server:
                back = threading.Thread(target=hand_on, args=(server, self.request))
                back.start()
                while left > 0 and (piece := self.request.recv(min(left, 65_536))):
                    server.sendall(piece)
                    left -= len(piece)
                if left == 0:
                    stalled.set()
                    gone.wait()
                server.shutdown(socket.SHUT_RDWR)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as line:
        serving = threading.Thread(target=line.serve_forever, kwargs={"poll_interval": 0.02})
        serving.start()
        try:
            yield line.server_address[1], stalled
        finally:
            gone.set()
            line.shutdown()
            serving.join()


def hand_on(source, sink):
    with suppress(OSError):
        while piece := source.recv(65_536):
            sink.sendall(piece)


def test_a_push_killed_in_the_middle_of_its_upload_is_finished_by_the_same_command(world):
    archive = world.derive("3.3.0", {"app/noise.bin": os.urandom(40 * 2**20)})
    words = ("release", "push", str(archive), "--server")
    with a_line_that_stalls(int(world.port), 20 * 2**20) as (port, stalled):
        child = world.processes.begin(*words, f"http://127.0.0.1:{port}", cwd=world.project)
        until("half of the upload", stalled.is_set)
        child.send_signal(signal.SIGKILL)
        assert world.processes.finish(child, codes=(-signal.SIGKILL,)) == ""
    assert world.exit_of("release", "show", "3.3.0")[0] == 7
    code, outcome = push(world, "3.3.0")
    assert (code, outcome["state"]) == (0, "published")
    assert outcome["uploaded"] < archive.stat().st_size + index_of(archive).stat().st_size


# --- who may ---------------------------------------------------------------------------------------------


def as_one(world, token_file, *words):
    return world.exit_of("release", *words, environ={"RELFLEET_TOKEN_FILE": str(token_file)})


def test_a_token_that_is_wrong_past_its_date_or_of_another_scope_is_not_allowed(world):
    wrong = world.home / "wrong.token"
    wrong.write_text("rf_" + "0" * 43 + "\n")
    wrong.chmod(0o600)
    assert as_one(world, wrong, "whoami")[0] == 4
    reader, short = world.make_token("reader"), world.make_token("reader", "--expires", "1s")
    assert as_one(world, reader, "whoami")[0] == 0
    cohort = world.cohort()
    assert as_one(world, reader, "cohort", "freeze", cohort, "--reason", "mine")[0] == 4
    assert as_one(world, reader, "token", "create", "--role", "admin")[0] == 4
    assert world.client.get(f"/cohorts/probe/{cohort}")["frozen"] is False
    until("the token to expire", lambda: as_one(world, short, "whoami")[0] == 4)


@pytest.mark.parametrize("kind", ["wrong", "expired", "used up", "of another scope"])
def test_no_host_is_enrolled_with_a_token_that_does_not_hold(world, kind):
    host = Host(world, f"stranger-{next(world.numbers)}", "nowhere")
    if kind == "wrong":
        file = world.home / "wrong-enroller.token"
        file.write_text("rf_" + "1" * 43 + "\n")
    elif kind == "expired":
        file = world.make_token("enroller", "--expires", "1s")
        until("the token to expire", lambda: as_one(world, file, "whoami")[0] == 4)
    elif kind == "used up":
        file = world.make_token("enroller", "--uses", "1")
        first = Host(world, f"guest-{next(world.numbers)}", "nowhere")
        world.processes.finish(first.begin_enrolment("--no-install", token=file))
    else:
        file = world.make_token("reader")
    child = host.begin_enrolment(token=file)
    world.processes.finish(child, codes=(4,))
    assert not Layout(host.root).identity.exists()


# --- what is not there -----------------------------------------------------------------------------------


def test_a_server_that_is_away_is_8_and_what_it_has_not_is_7(world):
    away = ("--server", "http://127.0.0.1:9", "--timeout", "1s")
    assert world.exit_of("release", "list", *away)[0] == 8
    assert world.exit_of("release", "show", "9.9.9")[0] == 7
    assert world.exit_of("release", "cohort", "show", "nothing")[0] == 7
    assert world.exit_of("release", "agents", "why", "nobody")[0] == 7


# --- settings --------------------------------------------------------------------------------------------

MISSPELT = "[poll]\nmin_sec = 1.0\n"


def test_settings_that_break_under_a_running_agent_are_named_and_the_old_ones_stay_in_force(world):
    host = world.host(world.cohort())
    agent = host.await_agent()
    right = host.layout.settings.read_text()
    host.layout.settings.write_text(MISSPELT)
    code, _, said = host.agent("config", "check")
    assert (code, "poll.min_s?" in said) == (2, True)
    until("the status to name it", lambda: "poll.min_sec" in host.news.get("settings", ""))
    world.pin(host.cohort, "1.1.0")
    # What would be started now could not read its settings: nothing is updated until they are mended.
    until("a poll to name it", lambda: "poll.min_sec" in host.news.get("poll", ""))
    assert (host.pid(), host.good, host.skipped) == (agent, "1.0.0", {})
    host.layout.settings.write_text(right)
    until("the status to forget it", lambda: not host.news["settings"])
    host.await_good("1.1.0")
