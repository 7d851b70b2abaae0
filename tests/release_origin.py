"""A release server on loopback with real TUF files, for the release manager's half.

It does what the API promises to a release manager and nothing else, and can be told to fail: to answer with
an error, to cut a connection in the middle of an upload, to take metadata without publishing it.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Targets, Timestamp

from agent_core.errors import ConflictError
from agent_core.wire import Problem
from keys import ceremony
from keys.ceremony import OnlineKeys

if TYPE_CHECKING:
    from collections.abc import Iterator

    from keys.cli import Ceremony

TOKEN = "rlf_the-token-of-the-test"
PASSPHRASE = "correct horse battery"
PRODUCT = "warehouse-agent"
API = "/api/v1"


@dataclass
class Answer:
    """What the origin answers instead of doing what it is asked."""

    status: int
    body: bytes = b"{}"
    headers: dict[str, str] = field(default_factory=dict)
    path: str = ""
    method: str = ""


@dataclass
class Seen:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes


class Origin:
    """The state of the server; `files` are what `/metadata/` serves."""

    def __init__(self) -> None:
        self.online = {name: CryptoSigner.generate_ed25519() for name in ("snapshot", "timestamp", "cohorts")}
        self.files: dict[str, bytes] = {}
        self.root: Metadata[Any] | None = None
        self.targets: Metadata[Any] | None = None
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, bytes] = {}
        self.products: list[str] = []
        self.releases: list[dict[str, Any]] = []
        self.rollouts: list[dict[str, Any]] = []
        self.role = "admin"
        self.edition = 0
        self.publishing = True
        self.seen: list[Seen] = []
        self.instead: deque[Answer] = deque()
        self.cut_after: int | None = None
        self.before_targets: Any = None
        self.lose_answer_to: str | None = None
        self.kept: dict[str, tuple[int, bytes, dict[str, str]]] = {}
        self.lock = threading.RLock()
        self.url = ""

    @property
    def online_keys(self) -> OnlineKeys:
        return OnlineKeys(**{name: signer.public_key for name, signer in self.online.items()})

    def calls(self, method: str, path: str = "") -> list[Seen]:
        return [seen for seen in self.seen if seen.method == method and path in seen.path]

    def accept_targets(self, body: bytes) -> int:
        with self.lock:
            metadata = ceremony.parse_targets(body)
            assert self.root is not None
            assert ceremony.missing_signatures(self.root.signed, "targets", metadata) == 0
            current = self.targets.signed.version if self.targets else 0
            if metadata.signed.version != current + 1:
                raise ConflictError("the targets are not the next version")
            for path, target in metadata.signed.targets.items():
                if path.startswith("bundles/"):
                    assert sha256(self.blobs[target.hashes["sha256"]]).hexdigest() == target.hashes["sha256"]
            self.targets = metadata
            self.files[f"{metadata.signed.version}.targets.json"] = body
            if self.publishing:
                self.publish()
            return metadata.signed.version

    def publish(self, *, now: datetime | None = None) -> None:
        """Sign a snapshot and a timestamp over the newest targets."""
        assert self.root is not None
        assert self.targets is not None
        self.edition += 1
        expires = (now or datetime.now(UTC)).replace(microsecond=0) + timedelta(days=1)
        cohorts = self._signed("cohorts", Targets(version=1, expires=expires))
        self.files["1.cohorts.json"] = cohorts
        targets = self.files[f"{self.targets.signed.version}.targets.json"]
        meta = {
            "targets.json": self._meta(self.targets.signed.version, targets),
            "cohorts.json": self._meta(1, cohorts),
        }
        snapshot = self._signed("snapshot", Snapshot(version=self.edition, expires=expires, meta=meta))
        self.files[f"{self.edition}.snapshot.json"] = snapshot
        self.files["timestamp.json"] = self._signed(
            "timestamp",
            Timestamp(
                version=self.edition, expires=expires, snapshot_meta=self._meta(self.edition, snapshot)
            ),
        )

    @staticmethod
    def _meta(version: int, body: bytes) -> MetaFile:
        return MetaFile(version, len(body), {"sha256": sha256(body).hexdigest()})

    def _signed(self, role: str, signed: Any) -> bytes:
        metadata = Metadata(signed)
        metadata.sign(self.online[role])
        return metadata.to_bytes()

    def begin(self, held: Ceremony) -> None:
        """Start from a ceremony, as after `release key gen`."""
        self.root = held.root
        self.files["1.root.json"] = held.root.to_bytes()
        self.accept_targets(held.targets.to_bytes())


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    origin: Origin

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self.serve()

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

    def serve(self) -> None:
        parts = urlsplit(self.path)
        origin = self.origin
        body = self.body()
        if body is None:
            return
        with origin.lock:
            seen = Seen(self.command, parts.path, parse_qs(parts.query), dict(self.headers), body)
            origin.seen.append(seen)
            for answer in list(origin.instead):
                if answer.path in parts.path and answer.method in ("", self.command):
                    origin.instead.remove(answer)
                    self.reply(answer.status, answer.body, answer.headers)
                    return
        if parts.path.startswith("/metadata/"):
            found = origin.files.get(parts.path.removeprefix("/metadata/"))
            self.reply(404 if found is None else 200, found or b"", {})
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.problem(401, "not signed in", "not-signed-in")
            return
        if (kept := origin.kept.get(self.headers.get("Idempotency-Key", ""))) is not None:
            self.reply(*kept)
            return
        try:
            self.route(parts.path.removeprefix(API), body, seen.query)
        except ConflictError as error:
            self.problem(409, error.what, error.reason)

    def body(self) -> bytes | None:
        """The request's body; None when the connection is cut inside an upload, which keeps a part."""
        length = int(self.headers.get("Content-Length") or 0)
        cut = self.origin.cut_after
        if self.command != "PATCH" or cut is None or cut >= length:
            return self.rfile.read(length)
        self.origin.cut_after = None
        digest = self.path.rpartition("/")[2]
        self.origin.parts[digest] = self.origin.parts.get(digest, b"") + self.rfile.read(cut)
        self.close_connection = True
        self.connection.close()
        return None

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        if status < 300 and (key := self.headers.get("Idempotency-Key")):
            self.origin.kept[key] = (status, body, headers)
        if self.origin.lose_answer_to == f"{self.command} {urlsplit(self.path).path}":
            self.origin.lose_answer_to = None
            self.close_connection = True
            self.connection.close()
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def problem(self, status: int, title: str, reason: str) -> None:
        body = json.dumps(Problem(status, title, reason=reason).to_json()).encode()
        self.reply(status, body, {"Content-Type": "application/problem+json"})

    def route(self, path: str, body: bytes, query: dict[str, list[str]]) -> None:
        origin = self.origin
        match (self.command, path):
            case ("GET", "/whoami"):
                self.json({"name": "ada", "role": origin.role})
            case ("GET", "/trust"):
                versions = {
                    f"{name}_version": metadata.signed.version if metadata else 0
                    for name, metadata in (("root", origin.root), ("targets", origin.targets))
                }
                self.json({"online": origin.online_keys.to_json(), **versions})
            case ("PUT", "/trust/root"):
                origin.root = ceremony.parse_root(body)
                origin.files["1.root.json"] = body
                self.json({"version": 1}, 202)
            case ("POST", "/metadata/targets"):
                if origin.before_targets is not None:
                    hook, origin.before_targets = origin.before_targets, None
                    hook()
                self.json({"version": origin.accept_targets(body)}, 202)
            case ("GET", "/products"):
                self.json({"items": [{"name": name} for name in origin.products]})
            case ("GET", "/proposals"):
                self.json({"items": []})
            case ("POST", "/products"):
                origin.products.append(json.loads(body)["name"])
                self.json({"name": origin.products[-1]}, 201)
            case ("GET", "/releases"):
                self.json({"items": origin.releases})
            case ("GET", _) if path.startswith("/releases/"):
                version = path.rpartition("/")[2]
                found = [entry for entry in origin.releases if entry["version"] == version]
                self.json(found[0]) if found else self.problem(404, f"no release {version}", "not-found")
            case ("GET", "/rollouts"):
                self.json({"items": [r for r in origin.rollouts if r["cohort"] == query["cohort"][0]]})
            case ("POST", "/rollouts"):
                number = len(origin.rollouts) + 1
                origin.rollouts.append(
                    {"id": number, "name": f"r-{number}", "state": "running", **json.loads(body)}
                )
                self.json(origin.rollouts[-1], 201)
            case (_, _) if path.startswith("/uploads/"):
                self.upload(path.removeprefix("/uploads/"), body)
            case _:
                self.problem(404, f"there is no {path}", "not-found")

    def upload(self, digest: str, body: bytes) -> None:
        origin = self.origin
        if self.command == "HEAD":
            if digest in origin.blobs:
                self.reply(
                    200, b"", {"Upload-Offset": str(len(origin.blobs[digest])), "Upload-Complete": "1"}
                )
            elif digest in origin.parts:
                self.reply(200, b"", {"Upload-Offset": str(len(origin.parts[digest]))})
            else:
                self.reply(404, b"", {})
            return
        part = origin.parts.get(digest, b"")
        if int(self.headers["Upload-Offset"]) != len(part):
            self.reply(409, b"{}", {"Upload-Offset": str(len(part))})
            return
        part += body
        origin.parts[digest] = part
        if len(part) < int(self.headers["Upload-Length"]):
            self.reply(204, b"", {"Upload-Offset": str(len(part))})
            return
        del origin.parts[digest]
        if sha256(part).hexdigest() != digest:
            self.problem(422, "these bytes have another digest", "digest-mismatch")
            return
        origin.blobs[digest] = part
        self.reply(204, b"", {"Upload-Offset": str(len(part)), "Upload-Complete": "1"})


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up in the middle is what some tests are about."""


@contextmanager
def serve() -> Iterator[Origin]:
    """A running server that has no root yet."""
    state = Origin()
    handler = type("Bound", (Handler,), {"origin": state})
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()
    thread.join()
