"""What a hostile answer costs the process that asked: its peak of memory, as the kernel saw it (row 35).

`agent once` runs as it does on a host, in a process of its own; nothing is traced and nothing is timed.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from functools import partial
from hashlib import sha256

import pytest
from tuf.api.metadata import MetaFile

from agent_core.bundle import zstd
from tests.attacks.test_answers import BUNDLE, METADATA, offers_news
from tests.attacks.victim import GOOD, NEW, bundle
from tests.http_origin import Endless, Raw, Slow, Status
from updater.decide import Action
from updater.device import Outcome
from updater.trusted_metadata import METADATA_MAX

MIB = 2**20
MOST = 64 * MIB
"""Of a whole check, whatever is answered by anybody without keys; an honest one took 40 MiB of it."""
MORE = 4 * MIB
"""Over an honest check of the same host."""
MUCH = 512 * MIB
LESS_PATIENT = {"RELFLEET_SERVER_TIMEOUT_S": "1", "RELFLEET_DOWNLOAD_DEADLINE_S": "1"}

ONCE = """
import sys
from updater import trusted_metadata
from updater.__main__ import main
trusted_metadata.METADATA_DEADLINE_S = float(sys.argv[1])
main(["once", "--json", "--root", sys.argv[2]])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def once(victim, environ=None, deadline_s=120.0):
    """One check by the agent's own command: what came of it, and the most bytes its process had."""
    own = {name: text for name, text in os.environ.items() if not name.startswith("RELFLEET_")}
    argv = [sys.executable, "-c", ONCE, str(deadline_s), str(victim.layout.root)]
    done = subprocess.run(
        argv,
        env=own | {"RELFLEET_DISK_RESERVE": "0"} | (environ or {}),
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    said, _, peak = done.stdout.strip().rpartition("\n")
    return Outcome.from_json(json.loads(said)), int(peak) * 1024


HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SMALL = gzip.compress(gzip.compress(bytes(MUCH), 1))  # a body of some kilobytes
HEADS = {
    "headers without end": Raw(HEAD + b"X: y\r\n" * (8 * MIB)),
    "one header without end": Raw(HEAD + b"X: " + b"y" * (32 * MIB)),
    "a status line without end": Raw(b"HTTP/1.1 200 " + b"y" * (32 * MIB)),
    "a length of half a gigabyte": Raw(HEAD + b"Content-Length: %d\r\n\r\n" % MUCH + b"y" * (32 * MIB)),
    "a chunk of half a gigabyte": Raw(CHUNKED + b"%x\r\n" % MUCH + b"y" * (32 * MIB)),
    "the length of a chunk without end": Raw(CHUNKED + b"0" * (32 * MIB)),
    "trailers without end": Raw(CHUNKED + b"0\r\n" + b"X: y\r\n" * (8 * MIB)),
    "a body that is half a gigabyte unpacked": Status(200, {"Content-Encoding": "gzip"}, SMALL),
}
LIES = [(name, "timestamp.json", lie) for name, lie in HEADS.items()]
LIES += [("a body without end", ending, Endless()) for ending in (*METADATA, *BUNDLE)]
LIES += [(name, BUNDLE[1], HEADS[name]) for name in ("a chunk of half a gigabyte", "headers without end")]
DRIPS = [
    ("headers", "timestamp.json", Slow(piece=1, pause_s=0.05, headers=True)),
    ("metadata", "2.targets.json", Slow(piece=1, pause_s=0.005)),
    ("a bundle", BUNDLE[1], Slow(piece=1, pause_s=0.01)),
]


@pytest.mark.parametrize(
    ("ending", "lie", "patience"),
    [pytest.param(ending, lie, {}, id=f"{name}, {ending}") for name, ending, lie in LIES]
    + [pytest.param(ending, drip, LESS_PATIENT, id=f"a drip in {name}") for name, ending, drip in DRIPS],
)
def test_what_is_answered_costs_the_process_that_asked_no_memory(victim, ending, lie, patience):
    outcome, honest = once(victim)
    assert outcome.reason == "up-to-date"
    assert honest < MOST
    offers_news(victim)
    victim.between.misbehave(ending, lie)
    outcome, peak = once(victim, patience, 1.0 if patience else 120.0)
    victim.kept(outcome.reason, outcome)
    assert outcome.reason in (("offline",) if patience else ("bad-answer", "length-mismatch"))
    assert peak < min(MOST, honest + MORE)
    victim.is_well_again()


def far_window():
    """A frame whose first bytes ask for a window of a gigabyte to unpack it with."""
    options = {zstd.CompressionParameter.window_log: 30, zstd.CompressionParameter.content_size_flag: 0}
    press = zstd.ZstdCompressor(options=options)
    return press.compress(bytes(MIB)) + press.flush()


BOMBS = {
    "half a gigabyte of nothing": partial(zstd.compress, bytes(MUCH)),
    "in a bundle's place": partial(zstd.compress, bundle(NEW).archive + bytes(MUCH)),
    "a window of a gigabyte": far_window,
}


@pytest.mark.parametrize("make", BOMBS.values(), ids=BOMBS.keys())
def test_a_signed_bundle_that_unpacks_to_half_a_gigabyte_costs_no_memory_and_no_disk(victim, make):
    """The worst case: release keys signed it, carelessly or in other hands."""
    sizes = {"unpacked": bundle("1.0.1").unpacked, "files": bundle("1.0.1").files}
    victim.server.add_release("1.0.1", 5, make(), bundle("1.0.1").index, **sizes)
    victim.server.lead_to("1.0.1")
    outcome, peak = once(victim)
    victim.kept("bad-archive", outcome)
    assert peak < MOST
    victim.is_well_again()


def test_what_the_online_keys_can_have_a_host_parse_has_a_bound(victim):
    """A thief of snapshot and timestamp names a body of the greatest length, made to grow when it is read.

    It is the one bound that is not small, half a gigabyte: so docs/security.md says so.
    """
    body = b'{"signed":[' + b"{}," * ((METADATA_MAX - 64) // 3) + b'{}],"signatures":[]}'
    assert len(body) <= METADATA_MAX
    server = victim.server
    server.lead_to(GOOD, revision=2)
    server.targets.version += 1
    name = f"{server.targets.version}.targets.json"
    server.write(name, body)
    server.snapshot.meta["targets.json"] = MetaFile(
        server.targets.version, len(body), {"sha256": sha256(body).hexdigest()}
    )
    server.snapshot.version += 1
    server.write_snapshot()
    server.bump_timestamp()
    outcome, peak = once(victim)
    victim.kept("bad-metadata", outcome)
    assert outcome.action is Action.REFUSE
    assert peak < 40 * METADATA_MAX
    victim.is_well_again()
