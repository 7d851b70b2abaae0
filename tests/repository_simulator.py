"""A small TUF repository with real keys and real signatures, that tests bump, replay, expire and spoil.

It holds the signed objects (`root`, `targets`, `cohorts`, `snapshot`, `timestamp`) for tests to change as an
attacker or a careless release manager would; `publish` signs them and writes the files that an origin serves.

    repository = RepositorySimulator(tmp_path / "www")
    repository.add_release("1.0.0", seq=1, archive=b"...")
    repository.set_directive("stable", release="1.0.0", progress=10_000)
    repository.publish()
"""

from __future__ import annotations

import json
from copy import deepcopy
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from securesystemslib.signer import CryptoSigner, Key, SSlibKey
from tuf.api.metadata import (
    DelegatedRole,
    Delegations,
    Metadata,
    MetaFile,
    Role,
    Root,
    Signed,
    Snapshot,
    TargetFile,
    Targets,
    Timestamp,
)
from tuf.api.serialization.json import JSONSerializer

from agent_core import clock, wire

if TYPE_CHECKING:
    from pathlib import Path

PRODUCT = "warehouse-agent"
TOP_LEVEL = ("root", "targets", "snapshot", "timestamp")
LIFE = {
    "root": timedelta(days=365),
    "targets": timedelta(days=60),
    "cohorts": timedelta(days=14),
    "snapshot": timedelta(days=14),
    "timestamp": timedelta(days=1),
}


class RepositorySimulator:
    """One repository.

    Args:
        directory: gets `metadata/` and `targets/`, as an origin serves them.
        product: of the releases, policy and directives made here.
        now: what signed times and expiries count from; tests move it.
        thresholds: signatures wanted, by role; each role has that many signers.
    """

    def __init__(
        self,
        directory: Path,
        product: str = PRODUCT,
        now: datetime | None = None,
        thresholds: dict[str, int] | None = None,
    ) -> None:
        self.directory = directory
        self.product = product
        self.now = now or clock.now().replace(microsecond=0)
        self.signers: dict[str, list[CryptoSigner]] = {}
        self.root = Root(version=1, expires=self._expiry("root"), consistent_snapshot=True)
        for role in TOP_LEVEL:
            count = (thresholds or {}).get(role, 1)
            self.root.roles[role] = Role([], count)
            for _ in range(count):
                self.add_signer(role)
        self.targets = Targets(version=1, expires=self._expiry("targets"))
        self.signers["cohorts"] = [CryptoSigner.generate_ed25519()]
        self.delegate("cohorts", ["cohorts/*/*"], self.signers["cohorts"][0])
        self.cohorts = Targets(version=1, expires=self._expiry("cohorts"))
        self.snapshot = Snapshot(version=1, expires=self._expiry("snapshot"))
        self.timestamp = Timestamp(version=1, expires=self._expiry("timestamp"))
        self.extra: dict[str, Targets] = {}
        self.fresh = True
        self.names_hashes = True
        self._signed_root_by: dict[int, list[CryptoSigner]] = {}
        (directory / "metadata").mkdir(parents=True, exist_ok=True)
        (directory / "targets").mkdir(parents=True, exist_ok=True)

    # --- what people publish ---------------------------------------------------------------------------

    def add_release(
        self,
        version: str,
        seq: int,
        archive: bytes = b"archive",
        index: bytes = b"{}",
        platform: str = "any",
        **facts: Any,
    ) -> wire.ReleaseFacts:
        """Sign a bundle and its index into top-level targets, and put both files up."""
        made = wire.ReleaseFacts(
            product=self.product,
            version=version,
            seq=seq,
            platform=platform,
            index_sha256=sha256(index).hexdigest(),
            index_length=len(index),
            unpacked=facts.pop("unpacked", 0),
            files=facts.pop("files", 0),
            **facts,
        )
        path = wire.bundle_path(self.product, version, platform)
        self.add_target(path, archive, made.to_json())
        self.add_target(wire.index_path(self.product, version, platform), index)
        return made

    def set_policy(self, floor_seq: int = 0, revoked_seq: tuple[int, ...] = ()) -> None:
        policy = wire.Policy(floor_seq, revoked_seq)
        self.add_target(wire.policy_path(self.product), b"", policy.to_json())

    def set_directive(self, cohort: str = "stable", **fields: Any) -> wire.Directive:
        """Sign a directive into the delegated role; unnamed fields lead everyone to `release`."""
        told: dict[str, Any] = {
            "product": self.product,
            "cohort": cohort,
            "release": None,
            "base": None,
            "progress": 10_000,
            "salt": "salt",
            "revision": 1,
            **fields,
        }
        directive = wire.Directive(**told)
        path = wire.directive_path(self.product, cohort)
        self.add_target(path, b"", directive.to_json(), self.cohorts)
        return directive

    def add_target(
        self, path: str, content: bytes, custom: dict[str, Any] | None = None, role: Targets | None = None
    ) -> None:
        """List a file in a role (top-level targets unless said) and put it up under its digest."""
        target = TargetFile.from_data(path, content, ["sha256"])
        if custom is not None:
            target.unrecognized_fields["custom"] = custom
        (role or self.targets).targets[path] = target
        file = self.target_file(path, sha256(content).hexdigest())
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    def target_file(self, path: str, digest: str) -> Path:
        """Where a target lies on the disk, for tests that spoil it."""
        directory, _, name = path.rpartition("/")
        return self.directory / "targets" / directory / f"{digest}.{name}"

    # --- keys and delegations --------------------------------------------------------------------------

    def add_signer(self, role: str, signer: CryptoSigner | None = None) -> CryptoSigner:
        """Give a top-level role one more key; bump the threshold yourself where it matters."""
        signer = signer or CryptoSigner.generate_ed25519()
        self.signers.setdefault(role, []).append(signer)
        self.root.add_key(signer.public_key, role)
        return signer

    def rotate(self, role: str) -> None:
        """Replace the first key of a top-level role; `publish_root` makes it known."""
        old = self.signers[role].pop(0)
        self.root.revoke_key(old.public_key.keyid, role)
        self.add_signer(role)

    def twin(self, key: Key, keyid: str = "ab" * 32, *, upper: bool = True) -> Key:
        """The same public key once more, under another id and spelled differently."""
        assert isinstance(key, SSlibKey)
        public = key.keyval["public"].upper() if upper else key.keyval["public"]
        return SSlibKey(keyid, key.keytype, key.scheme, {"public": public})

    def delegate(self, name: str, paths: list[str], signer: CryptoSigner) -> None:
        """Let a role speak for paths, from top-level targets."""
        if self.targets.delegations is None:
            self.targets.delegations = Delegations({}, {})
        assert self.targets.delegations.roles is not None
        role = DelegatedRole(name, [], 1, terminating=True, paths=paths)
        self.targets.delegations.roles[name] = role
        self.targets.add_key(signer.public_key, name)
        self.signers[name] = [signer]

    # --- publishing ------------------------------------------------------------------------------------

    def publish(self) -> None:
        """Sign everything with the next versions and write it, timestamp last."""
        if not self._signed_root_by:
            self.publish_root()
        if not self.fresh:
            for signed in (self.targets, self.cohorts, self.snapshot, self.timestamp):
                signed.version += 1
            for signed in self.extra.values():
                signed.version += 1
        self.fresh = False
        self.write_targets()
        self.write_snapshot()
        self.write_timestamp()

    def publish_root(self, signers: list[CryptoSigner] | None = None) -> None:
        """Write the root as it stands: first as version 1, later as the next, signed by old and new keys."""
        if self._signed_root_by:
            previous = self._signed_root_by[self.root.version]
            self.root.version += 1
        else:
            previous = []
        signing = signers if signers is not None else [*previous, *self.signers["root"]]
        self._signed_root_by[self.root.version] = list(self.signers["root"])
        self.write(f"{self.root.version}.root.json", self.sign(self.root, signing))

    def write_targets(self) -> None:
        """Sign the targets role and all that it delegates to, under their present versions."""
        roles = {"targets": self.targets, "cohorts": self.cohorts, **self.extra}
        for name, signed in roles.items():
            content = self.sign(signed, self.signers[name])
            self.write(f"{signed.version}.{name}.json", content)
            self.snapshot.meta[f"{name}.json"] = self._meta(signed.version, content)

    def write_snapshot(self) -> None:
        content = self.sign(self.snapshot, self.signers["snapshot"])
        self.write(f"{self.snapshot.version}.snapshot.json", content)
        self.timestamp.snapshot_meta = self._meta(self.snapshot.version, content)

    def write_timestamp(self, signed_at: datetime | None = None) -> None:
        self.timestamp.unrecognized_fields["x-signed-at"] = clock.iso(signed_at or self.now)
        self.write("timestamp.json", self.sign(self.timestamp, self.signers["timestamp"]))

    def bump_timestamp(self, signed_at: datetime | None = None) -> None:
        """Publish a new timestamp over an unchanged snapshot, as the server does every few hours."""
        self.timestamp.version += 1
        self.timestamp.expires = (signed_at or self.now) + LIFE["timestamp"]
        self.write_timestamp(signed_at)

    def sign(self, signed: Signed, signers: list[CryptoSigner]) -> bytes:
        # A copy: each published version stays what it was when the object changes afterwards.
        metadata: Metadata[Any] = Metadata(deepcopy(signed))
        for signer in signers:
            metadata.sign(signer, append=True)
        return metadata.to_bytes(JSONSerializer(compact=False))

    # --- files -----------------------------------------------------------------------------------------

    @property
    def trusted_root(self) -> bytes:
        """The root that an agent is installed with."""
        return self.read("1.root.json")

    def read(self, name: str) -> bytes:
        return (self.directory / "metadata" / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        """Put a metadata file up, whatever it holds."""
        target = self.directory / "metadata" / name
        beside = target.with_name(f".{name}.new")
        beside.write_bytes(content)
        beside.replace(target)

    def unsign(self, name: str) -> None:
        """Take the signatures off a published file."""
        body = json.loads(self.read(name))
        body["signatures"] = []
        self.write(name, json.dumps(body).encode())

    def resign(self, name: str, keyid: str, signature: str) -> None:
        """Put another signature of one key into a published file."""
        body = json.loads(self.read(name))
        for entry in body["signatures"]:
            if entry["keyid"] == keyid:
                entry["sig"] = signature
        self.write(name, json.dumps(body).encode())

    def tree(self) -> dict[str, bytes]:
        """Every metadata file as it is now; `replay` puts them back."""
        return {file.name: file.read_bytes() for file in (self.directory / "metadata").iterdir()}

    def replay(self, tree: dict[str, bytes]) -> None:
        """Serve an earlier state again, as a hostile mirror does."""
        for name, content in tree.items():
            self.write(name, content)

    def _expiry(self, role: str) -> datetime:
        return self.now.astimezone(UTC) + LIFE[role]

    def _meta(self, version: int, content: bytes) -> MetaFile:
        if not self.names_hashes:  # TUF leaves them out if it likes; our server never does
            return MetaFile(version)
        return MetaFile(version, len(content), {"sha256": sha256(content).hexdigest()})
