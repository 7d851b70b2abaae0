"""Whatever a device or a server reads from elsewhere, as functions of bytes; refusals in its own words.

A target is called with any bytes at all. It returns when they were taken or refused as promised, and raises
when something else came out: another exception, a value that does not survive writing, a byte outside its
place. The same targets are driven by Hypothesis in `make test` and by coverage in `make fuzz`.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from agent_core import delta, slots
from agent_core.bundle import BLOCK, File, Index, fault_of_files, header, unpack, verify, zstd
from agent_core.errors import DiskError, MalformedError, RelfleetError, SettingsError, TrustError
from agent_core.health import parse_checks
from agent_core.hooks import parse_hooks
from agent_core.release_file import END, TITLE, Title, opened
from agent_core.retry_after import retry_after_s
from agent_core.settings import AGENT, AgentSettings
from agent_core.window import is_open, next_opening
from agent_core.wire import (
    Directive,
    EnrollAnswer,
    EnrollRequest,
    KeyChange,
    Policy,
    Problem,
    ReleaseFacts,
    Report,
    ReportAnswer,
)
from release_server.reports import Signed
from tests.repository_simulator import RepositorySimulator
from updater import transport
from updater.attempt import Attempt
from updater.device import Outcome, Seen
from updater.freshness import Memory
from updater.identity import Identity

NOW = datetime.now(UTC)
GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass(frozen=True)
class Target:
    """What is called, and the inputs to begin from."""

    call: Callable[[bytes], None]
    seeds: tuple[bytes, ...]


# --- archives ---------------------------------------------------------------------------------------------

OLD_CONTENTS = {"a": b"alpha" * 8, "z": bytes(range(256))}
CONTENTS = {"a": b"alpha" * 9, "d/b": bytes(range(256)), "d/e/c": b""}


def _index(contents: dict[str, bytes]) -> Index:
    files = tuple(
        File(path, 0o644, len(content), hashlib.sha256(content).hexdigest())
        for path, content in contents.items()
    )
    return Index("shop", "1.0.0", "any", ("{python}", "a"), files)


KNOWN = _index(CONTENTS)
PLAIN = b"".join(
    header(file) + content + bytes(-len(content) % BLOCK)
    for file, content in zip(KNOWN.files, CONTENTS.values(), strict=True)
) + bytes(2 * BLOCK)


@cache
def _scratch() -> Path:
    """A directory of this process, in memory where there is one: it is used a thousand times a second."""
    memory = Path("/dev/shm")
    place = Path(tempfile.mkdtemp(prefix="fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    return place


def archive(raw: bytes) -> None:
    """Any bytes as an archive: exactly what the index lists, or a refusal; never a name or byte beside it."""
    place = _scratch() / "archive"
    place.write_bytes(raw)
    reason = _refusal(lambda: verify(place, KNOWN))
    assert reason in ("", "bad-archive", "digest-mismatch"), reason
    with tempfile.TemporaryDirectory(dir=_scratch()) as home:
        into = Path(home) / "into"
        assert _refusal(lambda: unpack(place, KNOWN, into)) == reason
        written = {str(path.relative_to(into)): path for path in into.rglob("*") if not path.is_dir()}
        assert not any(path.is_symlink() for path in into.rglob("*"))
        assert set(written) <= set(CONTENTS)
        assert reason or {path: file.read_bytes() for path, file in written.items()} == CONTENTS
        assert [path.name for path in Path(home).iterdir()] == ["into"]


def deltas(raw: bytes) -> None:
    """Any bytes as a delta: the files of the new index, or a refusal; never a name or byte beside them."""
    base, place = _scratch() / "base", _scratch() / "delta"
    if not base.exists():
        base.mkdir()
        for path, content in OLD_CONTENTS.items():
            (base / path).write_bytes(content)
    place.write_bytes(raw)
    with tempfile.TemporaryDirectory(dir=_scratch()) as home:
        into = Path(home) / "into"
        reason = _refusal(lambda: delta.apply(place, base, _index(OLD_CONTENTS), KNOWN, into))
        assert reason in ("", "bad-archive", "digest-mismatch"), reason
        written = {str(path.relative_to(into)): path for path in into.rglob("*") if not path.is_dir()}
        assert set(written) <= set(CONTENTS)
        assert reason or {path: file.read_bytes() for path, file in written.items()} == CONTENTS
        assert [path.name for path in Path(home).iterdir()] == ["into"]


def _delta() -> bytes:
    """The right one: `a` by its prefix, `d/b` copied, `d/e/c` whole."""
    prefix = zstd.ZstdDict(OLD_CONTENTS["a"], is_raw=True).as_prefix
    by_prefix = delta.PREFIX + zstd.compress(CONTENTS["a"], zstd_dict=prefix)
    return by_prefix + delta.WHOLE + zstd.compress(CONTENTS["d/e/c"])


def members(raw: bytes) -> None:
    """Any bytes as what is inside the compression."""
    archive(zstd.compress(raw))


def _refusal(call: Callable[[], Any]) -> str:
    try:
        call()
    except (TrustError, DiskError) as error:
        return str(error.reason)
    return ""


def release_file(raw: bytes) -> None:
    """Any bytes as a release file: refused, or members that lie within it."""
    place = _scratch() / "release"
    place.write_bytes(raw)
    with suppress(TrustError), opened(place) as found:
        assert all(len(found.read(name, len(raw)) or b"") == found.length(name) for name in found.names)


def index(raw: bytes) -> None:
    """Any bytes as an index: refused as one, or a tree that can stand, which survives its own bytes."""
    reason = _refusal(lambda: Index.from_bytes(raw))
    assert reason in ("", "bad-index"), reason
    if reason:
        return
    found = Index.from_bytes(raw)
    assert fault_of_files(found.files) == ""
    assert Index.from_bytes(found.to_bytes()) == found


def checks(raw: bytes) -> None:
    """Any JSON as checks or hooks."""
    body = _json(raw)
    with suppress(MalformedError):
        found = parse_checks(body)
        assert parse_checks([check.to_json() for check in found]) == found
    with suppress(MalformedError):
        hooks = parse_hooks(body)
        assert parse_hooks(hooks.to_json()) == hooks


# --- metadata as a device reads it ------------------------------------------------------------------------

LOADED = ("timestamp", "snapshot", "targets", "cohorts")


@cache
def _repository() -> RepositorySimulator:
    """Its timestamp and snapshot name no digests, so that any bytes get as far as they can."""
    made = RepositorySimulator(_scratch() / "www")
    made.names_hashes = False
    made.add_release("1.0.0", 1)
    made.set_directive(release="1.0.0")
    made.publish()
    return made


def _file(role: str) -> bytes:
    return _repository().read("timestamp.json" if role == "timestamp" else f"1.{role}.json")


def device_metadata(raw: bytes) -> None:
    """Any bytes as the role they may be, as they are and as the right keys sign them: trusted or refused."""
    said = _json(raw)
    signed = said.get("signed") if isinstance(said, dict) else None
    kind = signed.get("_type") if isinstance(signed, dict) else None
    for role in KINDS.get(kind, ("timestamp",)) if isinstance(kind, str) else ("root",):
        for body in (raw, _signed_anyway(said, role)):
            with suppress(TrustError):
                _load(role, body)


KINDS = {"root": ("root",), "targets": ("targets", "cohorts"), "snapshot": ("snapshot",)}


def _load(role: str, body: bytes) -> None:
    from updater import trusted_metadata as device

    with device.sorted_errors():
        trusted = _loaded_before(role)
        if role == "root":
            trusted.update_root(body)
        elif role == "timestamp":
            device.signed_time(trusted.update_timestamp(body))
        elif role == "snapshot":
            trusted.update_snapshot(body)
        elif role == "targets":
            device.check_delegations(trusted.update_targets(body))
        else:
            trusted.update_delegated_targets(body, role, "targets")


def _loaded_before(role: str) -> Any:
    """What a device trusts when it comes to this role: a copy, since the next one changes it."""
    made = copy(_loaded_once(role))
    made._trusted_set = dict(made._trusted_set)
    return made


@cache
def _loaded_once(role: str) -> Any:
    from updater import trusted_metadata as device

    trusted = device.TrustedSet(_file("root"), device.LIMITS.envelope_type)
    loads = (trusted.update_timestamp, trusted.update_snapshot, trusted.update_targets)
    if role != "root":
        for name, load in zip(LOADED[: LOADED.index(role)], loads, strict=False):
            load(_file(name))
    return trusted


def _signed_anyway(said: Any, role: str) -> bytes:
    """What a thief of a role's keys makes of it: their signatures under whatever can be signed."""
    from tuf.api.metadata import Metadata
    from tuf.api.serialization import DeserializationError, SerializationError

    signed = said.get("signed", said) if isinstance(said, dict) else said
    envelope = json.dumps({"signed": signed, "signatures": []}).encode()
    with suppress(DeserializationError, SerializationError):
        metadata = Metadata.from_bytes(envelope)
        for signer in _repository().signers[role]:
            metadata.sign(signer, append=True)
        return metadata.to_bytes()
    return envelope


def next_root(raw: bytes) -> None:
    """Any bytes as the file of a next root that somebody carries: refused, or one that survives writing."""
    from keys import rotation

    with suppress(RelfleetError):
        found = rotation.NextRoot.from_bytes(raw)
        assert rotation.NextRoot.from_bytes(found.to_bytes()).to_bytes() == found.to_bytes()
        rotation.check(found, found.chain[0], NOW)
        rotation.missing(found)


def _next_root() -> bytes:
    from keys import ceremony, rotation

    root, targets = ceremony.parse_root(_file("root")), ceremony.parse_targets(_file("targets"))
    return rotation.make_next([root], targets, rotation.Wanted(), NOW).to_bytes()


# --- messages and notes ----------------------------------------------------------------------------------

MESSAGES: tuple[Any, ...] = (Directive, ReleaseFacts, Policy, EnrollAnswer, ReportAnswer, Problem)
SAID: tuple[Any, ...] = (EnrollRequest, Report, KeyChange)
NOTES: tuple[Any, ...] = (Outcome, Seen, Memory, Identity, Attempt)


def wire(raw: bytes) -> None:
    """Any JSON as what a server says: malformed, or a value that survives writing."""
    body = _json(raw)
    for kind in MESSAGES:
        with suppress(MalformedError):
            found = kind.from_json(body, "body")
            assert kind.from_json(json.loads(json.dumps(found.to_json())), "body") == found


def window(raw: bytes) -> None:
    """A directive's window, whatever it says, can be asked."""
    from agent_core.clock import parse_iso

    with suppress(MalformedError):
        directive = Directive.from_json(_json(raw), "body")
        if directive.window is not None:
            now = parse_iso("2026-03-28T23:59:59Z")
            opens = next_opening(directive.window, now)
            assert opens is None or (opens > now and is_open(directive.window, opens))


def notes(raw: bytes) -> None:
    """Any JSON as a note that this device keeps for itself."""
    body = _json(raw)
    for kind in NOTES:
        with suppress(RelfleetError, ValueError):
            kind.from_json(body, "note")


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


# --- what lies on the disk -------------------------------------------------------------------------------


def record(raw: bytes) -> None:
    """Any bytes as a slot, and as the body of a slot whose checksum is right: a record, or none."""
    body = raw[: slots.SLOT_LENGTH - slots._HEAD.size]
    right = slots._HEAD.pack(slots._MAGIC, len(body), hashlib.sha256(body).digest()) + body
    for block in (raw, right):
        found = slots._decoded(block)
        assert found is None or found.phase in (slots.IDLE, slots.TRIAL, slots.ROLLBACK)


def settings(raw: bytes) -> None:
    """Any bytes as `agent.toml`: settings, or why not."""
    place = _scratch() / "agent.toml"
    place.write_bytes(raw)
    with suppress(SettingsError):
        AgentSettings.of(AGENT.load([place], environ={}))


def words(raw: bytes) -> None:
    """Any text in the places where the network or an environment says one."""
    text = raw.decode("latin-1")
    retry_after_s(text)
    assert transport._is_direct("releases.example.org", 443, text) in (True, False)
    assert transport._is_direct("10.1.2.3", 443, text) in (True, False)
    with suppress(SettingsError):
        transport.Transport(text)


# --- what a server reads --------------------------------------------------------------------------------


def metadata(raw: bytes) -> None:
    """Any bytes as a root, as targets and as both: metadata that can have been signed, or a refusal."""
    from keys import ceremony

    for parse in (ceremony.parse_root, ceremony.parse_targets):
        with suppress(TrustError):
            found = parse(raw)
            ceremony.signed_bytes(found)
            assert found.to_bytes() == parse(found.to_bytes()).to_bytes()


def reports(raw: bytes) -> None:
    """Any JSON as what an agent says: malformed, or a value that survives writing."""
    body = _json(raw)
    for kind in SAID:
        with suppress(MalformedError):
            found = kind.from_json(body)
            assert kind.from_json(json.loads(json.dumps(found.to_json()))) == found


def tokens(raw: bytes) -> None:
    """Any bytes as the headers that say who asks: a token, a signature, or a refusal."""
    from flask import Flask

    from release_server import bearer
    from release_server.api import access, agents

    text = raw.decode("latin-1")
    names = ("HTTP_AUTHORIZATION", "HTTP_RELFLEET_AGENT", "HTTP_RELFLEET_SIGNATURE", "HTTP_RELFLEET_COUNTER")
    said = dict(zip(names, text.split("\n"), strict=False))
    with Flask("fuzz").test_request_context("/", environ_overrides=said), suppress(RelfleetError):
        proof = agents._proof(b"")
        assert not isinstance(proof, Signed) or 0 <= proof.counter <= agents.MOST_COUNTER
        assert len(bearer.hash_of(access.bearer())) == 64


def server_settings(raw: bytes) -> None:
    """Any bytes as `server.toml`: settings, or why not."""
    from release_server.config import Config

    place = _scratch() / "server.toml"
    place.write_bytes(raw)
    with suppress(SettingsError):
        found = Config.load(place.parent, environ={})
        assert found.url
        assert found.lease


# --- seeds ------------------------------------------------------------------------------------------------


def _golden() -> tuple[bytes, ...]:
    return tuple(file.read_bytes() for file in sorted(GOLDEN.glob("*.json")) if file.stem != "buckets")


RECORD = slots.Record(7, slots.TRIAL, "1.0.0-aaaaaaaaaaaa", skip=(("bbbbbbbbbbbb", "unhealthy", 1),))
CHECKS = b'[{"kind":"http","url":"http://127.0.0.1:1/","status":[200]},{"kind":"cpu","max_percent":50}]'
HOOKS = b'{"pre_activate":{"argv":["app/x"],"timeout_s":5},"post_activate":{"argv":["{python}","app/y"]}}'
TOML = b'labels = {a = "b"}\n[server]\nno_proxy = ["10.0.0.0/8"]\ntimeout_s = 3\n[log]\nlevel = "debug"\n'


def _metadata() -> tuple[bytes, ...]:
    from tuf.api.metadata import Metadata, Root, Targets

    return tuple(Metadata(kind()).to_bytes() for kind in (Root, Targets))


def _release_file() -> bytes:
    title = Title("shop", "1.0.0", ("any",)).to_bytes()
    members = {TITLE: title, "metadata/2.root.json": b"{}", "metadata/targets.json": b"{}" * 300}
    return (
        b"".join(
            header(File(name, 0o644, len(content), "")) + content + bytes(-len(content) % BLOCK)
            for name, content in members.items()
        )
        + END
    )


TARGETS = {
    "release-file": Target(release_file, (_release_file(), END)),
    "archive": Target(archive, (zstd.compress(PLAIN), zstd.compress(PLAIN[:512]), b"")),
    "delta": Target(deltas, (_delta(), _delta()[:-1], b"")),
    "members": Target(members, (PLAIN, PLAIN[:1024], b"")),
    "index": Target(index, (KNOWN.to_bytes(), b"{}")),
    "checks": Target(checks, (CHECKS, HOOKS)),
    "wire": Target(wire, _golden()),
    "window": Target(window, (GOLDEN.joinpath("directive.json").read_bytes(),)),
    "notes": Target(notes, _golden()),
    "record": Target(record, (slots._encoded(RECORD) or b"", b"[" * 2000, b'{"skip":[["a","b",Infinity]]}')),
    "settings": Target(settings, (TOML, b"[[[")),
    "metadata": Target(metadata, _metadata()),
    "device-metadata": Target(device_metadata, tuple(map(_file, ("root", *LOADED)))),
    "next-root": Target(next_root, (_next_root(),)),
    "reports": Target(reports, _golden()),
    "tokens": Target(tokens, (b"Bearer rft_abc", b"\na-1\n" + b"0" * 128 + b"\n7", b"Basic YTpi")),
    "server-settings": Target(
        server_settings, (b'[server]\nport = 1\nurl = "http://a"\n[jobs]\ntick_s = 1\n',)
    ),
    "words": Target(
        words, (b"120", b"Wed, 21 Oct 2026 07:28:00 GMT", b"*.example.org:443,[::1]:80", b"http://a:1")
    ),
}
