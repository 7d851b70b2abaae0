"""Where requests to the signer are answered: the keys, what is remembered, the log, and the policy between.

The order is what holds after a kill at any moment: decide, sign, put the envelope on the disk, write the
line of the log, answer. Without the line nothing was signed; with it, asking again gives the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Snapshot, Targets, Timestamp
from tuf.api.serialization import DeserializationError
from tuf.api.serialization.json import JSONSerializer

from agent_core.clock import iso, parse_iso
from agent_core.errors import ConflictError, MalformedError, RelfleetError, TrustError
from keys import ceremony, changes, signers
from keys.roles import ONLINE_ROLES, ROOT, SNAPSHOT, TARGETS, TIMESTAMP
from release_server.blobs import sync_directory, write_file
from release_server.signer import NEXT, key_path, upcoming_halves
from release_server.signing.log import Log, open_log
from release_server.signing.policy import (
    SIGNED_AT,
    TYPES,
    Answer,
    Memory,
    Refusal,
    Signed,
    judge,
    named_keys,
    next_due,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from datetime import datetime
    from pathlib import Path

    from securesystemslib.signer import Key, Signer

SERIALIZER = JSONSerializer(compact=True)
MOST_WHY = 500


class RefusedError(TrustError):
    """The policy speaks against a request; `reason` is one of `policy.Refusal`."""


@dataclass
class Keyring:
    """The online keys, opened when first needed, and again when their file is another."""

    directory: Path
    passphrase: Callable[[str], str] | None = None
    _opened: dict[str, tuple[tuple[int, int], Signer]] = field(default_factory=dict)

    def signer(self, role: str) -> Signer:
        """The signer of a role's key.

        Raises:
            NotFoundError: there is no such key.
            TrustError: others can read it.
        """
        place = key_path(self.directory, role)
        status = place.stat() if place.exists() else None
        mark = (status.st_ino, status.st_mtime_ns) if status else (0, 0)
        held = self._opened.get(role)
        if held is None or held[0] != mark:
            held = self._opened[role] = (mark, signers.load(place, self.passphrase))
        return held[1]

    def public(self, role: str) -> Key:
        return self.signer(role).public_key

    def promote(self, role: str, named: Collection[str]) -> str:
        """Let the key that waits for a role take its place, once it is named; its id, or empty."""
        waiting = key_path(self.directory, f"{role}{NEXT}")
        if not waiting.exists():
            return ""
        keyid = signers.read(waiting).keyid
        if keyid not in named:
            return ""
        waiting.replace(key_path(self.directory, role))
        sync_directory(self.directory)
        return keyid


@dataclass
class Desk:
    """Answers one request at a time; made by `open_desk`."""

    keyring: Keyring
    state: Path
    clock: Callable[[], datetime]
    journal: Log
    memory: Memory = field(default_factory=Memory)

    # --- what is asked -----------------------------------------------------------------------------------

    def status(self) -> dict[str, Any]:
        """Which keys there are and what was signed last; nothing of it is secret."""
        return {
            "keys": ceremony.OnlineKeys.of_roles(
                {role: self.keyring.public(role) for role in ONLINE_ROLES}
            ).to_json(),
            "upcoming": upcoming.to_json() if (upcoming := upcoming_halves(self.keyring.directory)) else None,
            "root": self.memory.root.version if self.memory.root else 0,
            "targets": self.memory.targets.version if self.memory.targets else 0,
            "signed": {role: signed.version for role, signed in self.memory.signed.items()},
            "signed_by": {role: signed.keyid for role, signed in self.memory.signed.items()},
            "entries": self.journal.sequence,
        }

    def last(self, role: str) -> bytes:
        """The newest envelope of a role, for whoever lost the answer; empty before the first."""
        held = self.memory.signed.get(role)
        return self._envelope(role, held).read_bytes() if held else b""

    def sign(self, role: str, body: bytes, asker: dict[str, int]) -> bytes:
        """Sign what the policy allows.

        Args:
            role: one of the online roles.
            body: metadata of that role; signatures in it are ignored.
            asker: user and process id, for the log.

        Returns:
            The envelope, with this signature alone.

        Raises:
            RefusedError: the policy speaks against it.
            MalformedError: it is no metadata.
        """
        now = self.clock()
        entry = _entry("sign", role, body, now, asker)
        try:
            metadata = _parse(body)
            metadata.signatures.clear()
            signer = self.keyring.signer(role)
        except RelfleetError as error:
            self._refuse(entry, error)
            raise
        entry |= {
            "version": metadata.signed.version,
            "digest": sha256(metadata.signed_bytes).hexdigest(),
        }
        verdict = judge(self.memory, role, metadata, signer.public_key.keyid, now)
        if verdict.answer is Answer.SIGN:
            metadata.sign(signer)
            return self._keep(role, metadata, signer.public_key.keyid, entry | {"answer": "sign"}, now)
        if verdict.answer is Answer.REFUSE:
            refusal = RefusedError(f"the signer refuses {role}", why=verdict.why, reason=verdict.reason)
            self._refuse(entry, refusal)
            raise refusal
        self.journal.append(entry | {"answer": verdict.answer})
        return self.last(role)

    def trust(self, role: str, body: bytes, asker: dict[str, int]) -> None:
        """Follow metadata that others have signed: the next root, newer targets, or what the same key signed.

        Older versions, and the same again, change nothing.

        Raises:
            RefusedError: it is not what the chain so far allows.
            MalformedError: it is no metadata.
        """
        now = self.clock()
        entry = _entry("trust", role, body, now, asker)
        try:
            if role == ROOT:
                self._follow_root(body, entry)
            elif role == TARGETS:
                self._follow_targets(body, entry)
            else:
                self._learn(role, body, entry, now)
        except RelfleetError as error:
            self._refuse(entry, error)
            raise

    # --- following others --------------------------------------------------------------------------------

    def _follow_root(self, body: bytes, entry: dict[str, Any]) -> None:
        metadata, held = ceremony.parse_root(body), self.memory.root
        if held and metadata.signed.version <= held.version:
            return
        current = ceremony.parse_root(self._root(held.version).read_bytes()) if held else None
        ceremony.verify_root(metadata, current)
        write_file(self._root(metadata.signed.version), body, mode=0o600)
        self.journal.append(entry | {"version": metadata.signed.version, "answer": "follow"})
        self.memory = replace(self.memory, root=metadata.signed)
        self._promote()

    def _follow_targets(self, body: bytes, entry: dict[str, Any]) -> None:
        metadata, held = ceremony.parse_targets(body), self.memory.targets
        if held and metadata.signed.version <= held.version:
            return
        root = self.memory.root
        if root is None:
            raise RefusedError("the targets are refused", why="no root yet", reason=Refusal.NO_ROOT)
        if missing := ceremony.missing_signatures(root, TARGETS, metadata):
            raise RefusedError(
                "the targets are refused", why=f"{missing} signature(s) are missing", reason="bad-signature"
            )
        ceremony.check_targets(metadata.signed, root)
        before = held.targets if held else {}
        listed = changes.read_listed(metadata.signed.targets)
        changes.check_kept(before, metadata.signed.targets)
        changes.read_deltas(metadata.signed.targets, listed)
        changes.check_policies(before, metadata.signed.targets)
        write_file(self._targets, body, mode=0o600)
        self.journal.append(entry | {"version": metadata.signed.version, "answer": "follow"})
        self.memory = _with_targets(self.memory, metadata.signed, body)
        self._promote()

    def _promote(self) -> None:
        """Put keys that waited in the place of those that people have taken away, which are gone then."""
        for role in ONLINE_ROLES:
            if keyid := self.keyring.promote(role, named_keys(self.memory, role)):
                entry = {"at": iso(self.clock()), "op": "promote", "role": role, "keyid": keyid}
                self.journal.append(entry | {"answer": "follow"})

    def _learn(self, role: str, body: bytes, entry: dict[str, Any], now: datetime) -> None:
        """Take over what this very key has signed elsewhere: beside another server, or before a backup."""
        metadata, held = _parse(body), self.memory.signed.get(role)
        if not isinstance(metadata.signed, TYPES[role]):
            raise RefusedError(
                f"this is no {role} metadata", why=f"it is {metadata.signed.type}", reason=Refusal.WRONG_ROLE
            )
        if held and metadata.signed.version <= held.version:
            return
        key = self.keyring.public(role)
        try:
            key.verify_signature(metadata.signatures[key.keyid], metadata.signed_bytes)
        except Exception as error:  # noqa: BLE001 - whatever it is, this is not the key's signature
            raise RefusedError(f"{role} is refused", why=str(error), reason="bad-signature") from None
        digest = sha256(metadata.signed_bytes).hexdigest()
        entry |= {"version": metadata.signed.version, "digest": digest, "answer": "learn"}
        self._keep(role, metadata, key.keyid, entry, now)

    # --- remembering -------------------------------------------------------------------------------------

    def _keep(
        self, role: str, metadata: Metadata[Any], keyid: str, entry: dict[str, Any], now: datetime
    ) -> bytes:
        """Make a signature durable: the envelope, then the line, which alone makes it count."""
        envelope: bytes = metadata.to_bytes(SERIALIZER)
        held, due = self.memory.signed.get(role), next_due(self.memory.signed.get(role), now)
        file = _meta(metadata.signed.version, envelope)
        signed = Signed(metadata.signed.version, keyid, entry["digest"], file, due)
        memory = _with_signed(self.memory, role, metadata, signed)
        write_file(self._envelope(role, signed), envelope, mode=0o600)
        self.journal.append(entry | {"keyid": keyid, "due": iso(due), "remember": True})
        self.memory = memory
        if held:
            self._envelope(role, held).unlink(missing_ok=True)
        return envelope

    def _refuse(self, entry: dict[str, Any], error: RelfleetError) -> None:
        why = (error.why or error.what)[:MOST_WHY]
        self.journal.append(entry | {"answer": Answer.REFUSE, "reason": error.reason, "why": why})

    def _root(self, version: int) -> Path:
        return self.state / "trust" / f"{version}.{ROOT}.json"

    @property
    def _targets(self) -> Path:
        return self.state / "trust" / f"{TARGETS}.json"

    def _envelope(self, role: str, signed: Signed) -> Path:
        return self.state / "signed" / f"{role}.{signed.digest[:32]}.json"

    def recall(self, pinned: bytes | None) -> None:
        """Fill the memory from the disk; done once, at start.

        Raises:
            ConflictError: the root that was pinned is not the one the chain began with.
            TrustError: what lies there is not what the log says.
        """
        if pinned is not None and self._root(1).exists() and self._root(1).read_bytes() != pinned:
            raise ConflictError("the pinned root is another than the chain began with", reason="other-root")
        versions = sorted(int(place.name.split(".")[0]) for place in self._root(1).parent.glob("*.root.json"))
        if versions:
            newest = ceremony.parse_root(self._root(versions[-1]).read_bytes())
            self.memory = replace(self.memory, root=newest.signed)
        elif pinned is not None:
            self.trust(ROOT, pinned, {})
        if self._targets.exists():
            body = self._targets.read_bytes()
            self.memory = _with_targets(self.memory, ceremony.parse_targets(body).signed, body)
        for role, entry in self.journal.newest.items():
            self._recall_signed(role, entry)
        self._promote()
        kept = {self._envelope(role, signed) for role, signed in self.memory.signed.items()}
        for left in set((self.state / "signed").iterdir()) - kept:
            left.unlink()  # a kill came before its line in the log

    def _recall_signed(self, role: str, entry: dict[str, Any]) -> None:
        version, digest = int(entry["version"]), str(entry["digest"])
        signed = Signed(version, entry["keyid"], digest, MetaFile(version), parse_iso(entry["due"]))
        place = self._envelope(role, signed)
        envelope = place.read_bytes() if place.exists() else b"{}"
        try:
            metadata = _parse(envelope)
            same = sha256(metadata.signed_bytes).hexdigest() == digest
        except MalformedError:
            same = False
        if not same:
            raise TrustError(
                f"{role} {version} is not what the signer's log says",
                why=f"{place} is missing or another",
                then="restore the signer's directory from a backup",
                reason="log-broken",
            )
        signed = replace(signed, file=_meta(version, envelope))
        self.memory = _with_signed(self.memory, role, metadata, signed)


def open_desk(
    keys: Path,
    state: Path,
    *,
    clock: Callable[[], datetime],
    pinned: bytes | None = None,
    passphrase: Callable[[str], str] | None = None,
) -> Desk:
    """Open keys, log and memory, for this process alone.

    Args:
        keys: directory of the online keys.
        state: directory of the signer's own; made when missing.
        clock: what time it is.
        pinned: the first root, from a way of its own; without it the first one that is shown is kept.
        passphrase: of sealed keys, and the PIN of a token; see `keys.signers.passphrase_source`.

    Raises:
        NotFoundError: a key is missing.
        ConflictError: another signer works with `state`; or see `Desk.recall`.
        TrustError: others can read a key; or the log was changed.
    """
    for directory in (state, state / "trust", state / "signed"):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    sync_directory(state)
    desk = Desk(Keyring(keys, passphrase), state, clock, open_log(state / "log"))
    try:
        for role in ONLINE_ROLES:
            desk.keyring.signer(role)
        desk.recall(pinned)
    except BaseException:
        desk.journal.close()
        raise
    return desk


def _entry(op: str, role: str, body: bytes, now: datetime, asker: dict[str, int]) -> dict[str, Any]:
    return {"at": iso(now), "op": op, "role": role, "request": sha256(body).hexdigest(), **asker}


def _parse(body: bytes) -> Metadata[Any]:
    try:
        metadata: Metadata[Any] = Metadata.from_bytes(body)
        metadata.signed_bytes  # noqa: B018 - what has no canonical form cannot be signed
        return metadata
    except (DeserializationError, RepositoryError) as error:
        raise MalformedError("this is no metadata", why=str(error), reason="bad-metadata") from None


def _meta(version: int, envelope: bytes) -> MetaFile:
    return MetaFile(version, len(envelope), {"sha256": sha256(envelope).hexdigest()})


def _with_targets(memory: Memory, targets: Targets, body: bytes) -> Memory:
    return replace(memory, targets=targets, targets_file=_meta(targets.version, body))


def _with_signed(memory: Memory, role: str, metadata: Metadata[Any], signed: Signed) -> Memory:
    memory = replace(memory, signed={**memory.signed, role: signed})
    if role == SNAPSHOT and isinstance(metadata.signed, Snapshot):
        entries = {name: entry.version for name, entry in metadata.signed.meta.items()}
        return replace(memory, entries=entries)
    if role == TIMESTAMP and isinstance(metadata.signed, Timestamp):
        return replace(memory, signed_at=_said(metadata.signed) or memory.signed_at)
    return memory


def _said(timestamp: Timestamp) -> datetime | None:
    """The time a timestamp says it was signed at; one that a thief made elsewhere may say anything."""
    try:
        return parse_iso(timestamp.unrecognized_fields[SIGNED_AT])
    except (KeyError, TypeError, ValueError):
        return None
