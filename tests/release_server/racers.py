"""Replicas in processes of their own, with connections of their own, that are asked at the same moment."""

from __future__ import annotations

import multiprocessing
from contextlib import contextmanager

from release_server.app import create_app


def _serve(config, now, start, wire):
    """One replica: asks itself what comes over the wire, one request after the other, with the others."""
    ask = create_app(config, clock=lambda: now).test_client().open
    while (requests := wire.recv()) is not None:
        start.wait()
        answers = [ask(f"/api/v1{path}", method=method, **said) for method, path, said in requests]
        wire.send([(answer.status_code, answer.json) for answer in answers])


@contextmanager
def racing(config, now, count):
    """`ask(...)` takes the requests of each replica, (method, path, what else), and has its answers.

    No connection may be open here: none is shared with a child.
    """
    fork = multiprocessing.get_context("fork")
    start, wires, processes = fork.Barrier(count), [], []
    for _ in range(count):
        here, there = fork.Pipe()
        processes.append(fork.Process(target=_serve, args=(config, now, start, there)))
        processes[-1].start()
        wires.append(here)

    def ask(*requests):
        for wire, own in zip(wires, requests, strict=True):
            wire.send(own)
        return [wire.recv() for wire in wires]

    try:
        yield ask
    finally:
        for wire in wires:
            wire.send(None)
        for process in processes:
            process.join(timeout=60)
