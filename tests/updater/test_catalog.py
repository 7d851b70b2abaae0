from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from securesystemslib.signer import CryptoSigner, SSlibKey
from tuf.api.metadata import Delegations, SuccinctRoles, Targets

from agent_core import clock
from agent_core.errors import ConflictError, DiskError, TrustError, UnreachableError
from tests.http_origin import Endless, Gzip, Origin, Slow, Status, Truncated, WithoutEtag
from tests.repository_simulator import PRODUCT, RepositorySimulator
from updater import catalog as catalog_module
from updater import freshness, trusted_metadata
from updater.catalog import Catalog
from updater.freshness import Memory, believed, is_fresh, is_unchanged, raise_high_water, recall, remember
from updater.transport import Transport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from updater.catalog import Verified

NOW = datetime(2026, 6, 1, 12, 0, 0, tzinfo=UTC)
DAY = timedelta(days=1)


class Device:
    """One agent's side: a metadata directory that lives on while catalogs come and go."""

    def __init__(self, directory: Path, origin: Origin, repository: RepositorySimulator) -> None:
        self.directory = directory
        self.root = repository.trusted_root
        self.transport = Transport(origin.url, proxies={}, timeout_s=2.0)
        self.high_water: datetime | None = None

    def catalog(self) -> Catalog:
        return Catalog(self.directory, self.transport, PRODUCT, self.root)

    def refresh(self, now: datetime = NOW) -> Verified:
        with self.catalog() as catalog:
            verified = catalog.refresh(now, self.high_water)
        self.high_water = verified.high_water
        return verified

    def refusal(self, now: datetime = NOW) -> str:
        with pytest.raises(TrustError) as caught:
            self.refresh(now)
        return caught.value.reason


@pytest.fixture
def repository(tmp_path: Path) -> RepositorySimulator:
    made = RepositorySimulator(tmp_path / "www", now=NOW)
    made.add_release("1.0.0", seq=1, archive=b"archive of 1.0.0", index=b'{"one":1}')
    made.set_policy(floor_seq=0)
    made.set_directive("stable", release="1.0.0")
    made.publish()
    return made


@pytest.fixture
def origin(repository: RepositorySimulator) -> Iterator[Origin]:
    with Origin(repository.directory) as origin:
        yield origin


@pytest.fixture
def device(tmp_path: Path, origin: Origin, repository: RepositorySimulator) -> Device:
    return Device(tmp_path / "tuf", origin, repository)


# --- the good way --------------------------------------------------------------------------------------


def test_a_refresh_says_what_it_verified(device: Device, repository: RepositorySimulator) -> None:
    verified = device.refresh()
    content = repository.read("timestamp.json")
    assert verified.timestamp_version == 1
    assert verified.timestamp_sha256 == sha256(content).hexdigest()
    assert verified.signed_at == verified.high_water == NOW
    assert (verified.root_version, verified.targets_version) == (1, 1)
    assert set(verified.expires) == {"root", "targets", "cohorts", "snapshot", "timestamp"}
    assert verified.earliest_expiry == NOW + DAY
    assert verified.etag == f'"{sha256(content).hexdigest()[:16]}"'


def test_directive_policy_and_release_are_looked_up(device: Device, repository: RepositorySimulator) -> None:
    repository.add_release("1.1.0", seq=2, platform="linux-x86_64", gates=("canary",))
    repository.set_policy(floor_seq=1, revoked_seq=(7,))
    repository.publish()
    with device.catalog() as catalog:
        catalog.refresh(NOW, None)
        directive = catalog.directive("stable")
        assert directive is not None
        assert (directive.release, directive.progress) == ("1.0.0", 10_000)
        assert catalog.directive("nobody") is None
        assert catalog.policy().revoked_seq == (7,)
        release = catalog.release("1.0.0", ["linux-x86_64", "any"])
        assert release is not None
        assert (release.platform, release.length, release.facts.seq) == ("any", 16, 1)
        assert (repository.directory / release.archive_url.lstrip("/")).read_bytes() == b"archive of 1.0.0"
        assert (repository.directory / release.index_url.lstrip("/")).read_bytes() == b'{"one":1}'
        other = catalog.release("1.1.0", ["linux-x86_64", "any"])
        assert other is not None
        assert other.facts.gates == ("canary",)
        assert catalog.release("1.1.0", ["any"]) is None
        assert catalog.release("9.9.9", ["any"]) is None


def test_no_policy_means_no_floor_and_no_cohorts_no_directive(
    device: Device, repository: RepositorySimulator
) -> None:
    repository.targets.targets.clear()
    repository.targets.delegations = None
    repository.publish()
    with device.catalog() as catalog:
        verified = catalog.refresh(NOW, None)
        assert (catalog.policy().floor_seq, catalog.directive("stable")) == (0, None)
        assert "cohorts" not in verified.expires


def test_an_unchanged_repository_costs_a_root_look_and_a_timestamp(device: Device, origin: Origin) -> None:
    device.refresh()
    origin.requests.clear()
    device.refresh()
    assert origin.paths() == ["/metadata/2.root.json", "/metadata/timestamp.json"]


def test_new_roots_are_walked_one_by_one_and_kept(
    device: Device, repository: RepositorySimulator, origin: Origin
) -> None:
    device.refresh()
    repository.rotate("root")
    repository.publish_root()
    repository.rotate("timestamp")
    repository.publish_root()
    repository.publish()
    assert device.refresh().root_version == 3
    origin.requests.clear()
    assert device.refresh().root_version == 3
    assert "/metadata/2.root.json" not in origin.paths()


def test_a_lookup_before_a_refresh_and_a_refresh_without_the_lock_are_refused(device: Device) -> None:
    with pytest.raises(RuntimeError):
        device.catalog().refresh(NOW, None)
    with device.catalog() as catalog, pytest.raises(RuntimeError):
        catalog.policy()


def test_a_failed_refresh_leaves_nothing_to_ask(device: Device, repository: RepositorySimulator) -> None:
    with device.catalog() as catalog:
        catalog.refresh(NOW, None)
        repository.unsign("timestamp.json")
        with pytest.raises(TrustError):
            catalog.refresh(NOW, None)
        with pytest.raises(RuntimeError):
            catalog.directive("stable")


# --- replayed, expired, frozen -------------------------------------------------------------------------


def test_an_older_timestamp_is_refused(device: Device, repository: RepositorySimulator) -> None:
    old = repository.tree()
    repository.publish()
    device.refresh()
    repository.replay(old)
    assert device.refusal() == "replayed"


def test_an_older_snapshot_under_a_new_timestamp_is_refused(
    device: Device, repository: RepositorySimulator
) -> None:
    repository.publish()
    device.refresh()
    old = json.loads(repository.read("1.snapshot.json"))["signed"]["version"]
    repository.timestamp.snapshot_meta.version = old
    repository.bump_timestamp()
    assert device.refusal() == "replayed"


def test_older_targets_under_a_new_snapshot_are_refused(
    device: Device, repository: RepositorySimulator
) -> None:
    repository.publish()
    device.refresh()
    repository.snapshot.version += 1
    repository.snapshot.meta["targets.json"].version = 1
    repository.write_snapshot()
    repository.bump_timestamp()
    assert device.refusal() == "replayed"


def test_a_file_that_is_not_the_one_the_snapshot_names_is_refused(
    device: Device, repository: RepositorySimulator
) -> None:
    repository.set_policy(floor_seq=5)
    repository.publish()
    repository.write("2.targets.json", repository.read("1.targets.json"))
    assert device.refusal() == "digest-mismatch"


def test_a_root_replayed_as_the_next_is_refused(device: Device, repository: RepositorySimulator) -> None:
    repository.write("2.root.json", repository.trusted_root)
    assert device.refusal() == "replayed"


def test_a_root_that_skips_a_version_is_refused(device: Device, repository: RepositorySimulator) -> None:
    repository.root.version = 3
    repository.write("2.root.json", repository.sign(repository.root, repository.signers["root"]))
    assert device.refusal() == "replayed"


def test_a_frozen_server_is_refused_when_the_timestamp_expires(device: Device) -> None:
    device.refresh()
    assert device.refusal(NOW + 2 * DAY) == "expired"


@pytest.mark.parametrize("role", ["root", "targets", "cohorts", "snapshot", "timestamp"])
def test_every_expired_role_is_refused(device: Device, repository: RepositorySimulator, role: str) -> None:
    getattr(repository, role).expires = NOW - DAY
    if role == "root":
        repository.publish_root()
    repository.publish()
    assert device.refusal() == "expired"


def test_the_cache_protects_after_a_refusal(device: Device, repository: RepositorySimulator) -> None:
    old = repository.tree()
    repository.publish()
    device.refresh()
    new = repository.tree()
    repository.replay(old)
    assert device.refusal() == "replayed"
    assert device.refusal() == "replayed"
    repository.replay(new)
    assert device.refresh().timestamp_version == 2


def test_a_version_run_forward_is_recovered_by_new_keys(
    device: Device, repository: RepositorySimulator
) -> None:
    repository.timestamp.version = repository.snapshot.version = 2**31
    repository.write_targets()
    repository.write_snapshot()
    repository.write_timestamp()
    assert device.refresh().timestamp_version == 2**31
    repository.timestamp.version = repository.snapshot.version = 2
    repository.write_snapshot()
    repository.write_timestamp()
    assert device.refusal() == "replayed"
    repository.rotate("snapshot")
    repository.rotate("timestamp")
    repository.publish_root()
    repository.write_snapshot()
    repository.write_timestamp()
    assert device.refresh().timestamp_version == 2


# --- time ----------------------------------------------------------------------------------------------


def test_a_clock_set_back_makes_nothing_old_fresh(device: Device, repository: RepositorySimulator) -> None:
    device.refresh()
    repository.bump_timestamp(NOW + 3 * DAY)
    device.refresh(NOW + 3 * DAY)
    assert device.high_water == NOW + 3 * DAY
    repository.timestamp.version += 1
    repository.timestamp.expires = NOW + 2 * DAY
    repository.write_timestamp(NOW + DAY)
    assert device.refusal(NOW - 100 * DAY) == "expired"


def test_a_host_that_boots_in_1970_takes_the_signed_time(device: Device) -> None:
    assert device.refresh(datetime(1970, 1, 1, tzinfo=UTC)).high_water == NOW


def test_a_host_that_boots_in_2040_trusts_nothing_and_is_well_again_when_its_clock_is(device: Device) -> None:
    assert device.refusal(datetime(2040, 1, 1, tzinfo=UTC)) == "expired"
    assert device.high_water is None
    assert device.refresh().high_water == NOW
    assert device.refusal(datetime(2040, 1, 1, tzinfo=UTC)) == "expired"
    assert device.refresh(NOW + timedelta(hours=1)).high_water == NOW


def test_one_step_of_signed_time_goes_seven_days_at_most(
    device: Device, repository: RepositorySimulator
) -> None:
    device.refresh()
    repository.bump_timestamp(NOW + 13 * DAY)
    assert device.refresh().high_water == NOW + 7 * DAY


def test_a_signed_time_past_an_expiry_is_refused_and_not_kept(
    device: Device, repository: RepositorySimulator
) -> None:
    device.refresh()
    repository.snapshot.expires = NOW + 2 * DAY
    repository.snapshot.version += 1
    repository.write_snapshot()
    repository.bump_timestamp(NOW + 300 * DAY)
    assert device.refusal() == "expired"
    assert device.high_water == NOW


def test_a_stolen_timestamp_key_cannot_lock_out_a_host_whose_clock_is_not_set(
    device: Device, repository: RepositorySimulator
) -> None:
    repository.bump_timestamp(NOW + 10_000 * DAY)
    assert device.refusal(datetime(1970, 1, 1, tzinfo=UTC)) == "expired"
    repository.bump_timestamp(NOW)
    assert device.refresh(datetime(1970, 1, 1, tzinfo=UTC)).high_water == NOW


@pytest.mark.parametrize(
    ("high_water", "signed_at", "now", "raised"),
    [
        (None, None, NOW, None),
        (NOW, None, NOW + DAY, NOW),
        (None, NOW, NOW, NOW),
        (None, NOW + 30 * DAY, NOW + 29 * DAY, NOW + 30 * DAY),
        (None, datetime(1, 1, 1, tzinfo=UTC), NOW, datetime(1, 1, 1, tzinfo=UTC)),
        (NOW, NOW - DAY, NOW, NOW),
        (NOW, NOW + DAY, NOW, NOW + DAY),
        (NOW, NOW + 30 * DAY, NOW, NOW + 7 * DAY),
        (NOW, NOW + 30 * DAY, NOW + 29 * DAY, NOW + 30 * DAY),
        (NOW, NOW + DAY, NOW + 5000 * DAY, NOW + DAY),
    ],
)
def test_the_high_water_mark_follows_signed_time_only(high_water, signed_at, now, raised) -> None:
    assert raise_high_water(high_water, signed_at, now) == raised


def test_a_timestamp_without_signed_time_raises_nothing_and_nonsense_is_refused(
    device: Device, repository: RepositorySimulator
) -> None:
    device.refresh()
    repository.timestamp.version += 1
    del repository.timestamp.unrecognized_fields["x-signed-at"]
    repository.write("timestamp.json", repository.sign(repository.timestamp, repository.signers["timestamp"]))
    verified = device.refresh(NOW + timedelta(hours=1))
    assert (verified.signed_at, verified.high_water) == (None, NOW)
    repository.timestamp.version += 1
    repository.timestamp.unrecognized_fields["x-signed-at"] = ["tomorrow"]
    repository.write("timestamp.json", repository.sign(repository.timestamp, repository.signers["timestamp"]))
    assert device.refusal() == "bad-metadata"


# --- signatures and keys -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["timestamp.json", "2.snapshot.json", "2.targets.json", "2.cohorts.json"])
def test_unsigned_metadata_is_refused(device: Device, repository: RepositorySimulator, name: str) -> None:
    repository.publish()
    repository.unsign(name)
    # What snapshot and timestamp list by digest is caught by that before anyone looks at a signature.
    assert device.refusal() in ("bad-signature", "digest-mismatch")


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets", "cohorts"])
def test_a_signature_by_a_key_of_another_role_is_refused(
    device: Device, repository: RepositorySimulator, role: str
) -> None:
    thief = "timestamp" if role == "cohorts" else "cohorts"
    repository.signers[role] = repository.signers[thief]
    repository.publish()
    assert device.refusal() == "bad-signature"


def test_one_of_two_signatures_is_refused(tmp_path: Path) -> None:
    repository = RepositorySimulator(tmp_path / "www", now=NOW, thresholds={"targets": 2})
    repository.publish()
    with Origin(repository.directory) as origin:
        device = Device(tmp_path / "tuf", origin, repository)
        device.refresh()
        repository.signers["targets"].pop()
        repository.publish()
        assert device.refusal() == "bad-signature"


def test_a_root_signed_by_its_new_keys_only_is_refused(
    device: Device, repository: RepositorySimulator
) -> None:
    repository.rotate("root")
    repository.publish_root(signers=repository.signers["root"])
    assert device.refusal() == "bad-signature"


def test_signers_that_rotate_in_the_middle_of_a_refresh_are_met_by_one_retry(
    device: Device, repository: RepositorySimulator, origin: Origin
) -> None:
    device.refresh()
    repository.rotate("timestamp")
    repository.publish_root()
    repository.publish()
    origin.misbehave("2.root.json", Status(404), times=1)
    assert device.refresh().root_version == 2


@pytest.mark.parametrize("upper", [False, True], ids=["same spelling", "other spelling"])
def test_a_root_with_one_key_under_two_ids_is_refused(
    device: Device, repository: RepositorySimulator, upper: bool
) -> None:
    device.refresh()
    signer = repository.signers["targets"][0]
    twin = repository.twin(signer.public_key, upper=upper)
    repository.root.add_key(twin, "targets")
    repository.root.roles["targets"].threshold = 2
    repository.publish_root()
    repository.signers["targets"].append(CryptoSigner(signer._private_key, twin))
    repository.publish()
    assert device.refusal() == "bad-metadata"
    assert not (device.directory / "root_history" / "2.root.json").exists()


def test_an_installed_root_with_one_key_under_two_ids_is_refused(tmp_path: Path) -> None:
    repository = RepositorySimulator(tmp_path / "www", now=NOW)
    repository.root.add_key(repository.twin(repository.signers["root"][0].public_key), "targets")
    repository.publish()
    with Origin(repository.directory) as origin:
        assert Device(tmp_path / "tuf", origin, repository).refusal() == "bad-metadata"


def test_two_spellings_of_one_pem_are_one_key(device: Device, repository: RepositorySimulator) -> None:
    signer = CryptoSigner.generate_ecdsa()
    key = signer.public_key
    repository.root.add_key(key, "targets")
    pem = key.keyval["public"].replace("\n", "\r\n") + "\n"
    repository.root.add_key(SSlibKey("cd" * 32, key.keytype, key.scheme, {"public": pem}), "targets")
    repository.publish_root()
    assert device.refusal() == "bad-metadata"


# --- delegations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pattern",
    [
        "bundles/*/*/*",
        "bundles/warehouse-agent/1.0.0/any.tar.zst",
        "*/*/*/*",
        "b*/*/*/*",
        "[bd]undles/x",
        "?olicy/*",
        "policy/warehouse-agent.json",
        "deltas/*/*",
        "*",
    ],
)
def test_a_delegation_that_reaches_releases_is_refused(
    device: Device, repository: RepositorySimulator, pattern: str
) -> None:
    thief = CryptoSigner.generate_ed25519()
    repository.delegate("extra", ["harmless/*", pattern], thief)
    repository.extra["extra"] = Targets(version=1, expires=NOW + DAY)
    repository.publish()
    assert device.refusal() == "bad-delegation"


def test_a_delegation_of_something_else_is_no_reason_to_refuse(
    device: Device, repository: RepositorySimulator
) -> None:
    repository.delegate("extra", ["extra/*"], CryptoSigner.generate_ed25519())
    repository.extra["extra"] = Targets(version=1, expires=NOW + DAY)
    repository.publish()
    device.refresh()


def test_delegations_by_hash_are_refused(device: Device, repository: RepositorySimulator) -> None:
    signer = CryptoSigner.generate_ed25519()
    repository.delegate("bins", ["unused"], signer)
    role = repository.targets.delegations.roles["bins"]
    role.paths, role.path_hash_prefixes = None, ["0"]
    repository.extra["bins"] = Targets(version=1, expires=NOW + DAY)
    repository.publish()
    assert device.refusal() == "bad-delegation"


def test_succinct_delegations_are_refused(device: Device, repository: RepositorySimulator) -> None:
    key = repository.signers["cohorts"][0].public_key
    bins = SuccinctRoles([key.keyid], 1, 4, "bin")
    repository.targets.delegations = Delegations({key.keyid: key}, succinct_roles=bins)
    repository.publish()
    assert device.refusal() == "bad-delegation"


def test_cohorts_that_delegates_further_is_refused(device: Device, repository: RepositorySimulator) -> None:
    key = CryptoSigner.generate_ed25519().public_key
    repository.cohorts.delegations = Delegations({key.keyid: key}, {})
    repository.publish()
    assert device.refusal() == "bad-delegation"


def test_a_bundle_listed_by_the_cohorts_key_is_not_seen(
    device: Device, repository: RepositorySimulator
) -> None:
    evil = repository.add_release("6.6.6", seq=666, archive=b"evil")
    stolen = repository.targets.targets
    for path in [path for path in stolen if "6.6.6" in path]:
        repository.cohorts.targets[path] = stolen.pop(path)
    repository.set_directive("stable", release=evil.version)
    repository.publish()
    with device.catalog() as catalog:
        catalog.refresh(NOW, None)
        assert catalog.directive("stable").release == "6.6.6"
        assert catalog.release("6.6.6", ["any"]) is None


def test_a_policy_listed_by_the_cohorts_key_is_not_seen(
    device: Device, repository: RepositorySimulator
) -> None:
    path = f"policy/{PRODUCT}.json"
    repository.set_policy(floor_seq=3)
    repository.cohorts.targets[path] = repository.targets.targets.pop(path)
    repository.publish()
    with device.catalog() as catalog:
        catalog.refresh(NOW, None)
        assert catalog.policy().floor_seq == 0


def test_a_directive_outside_the_paths_of_cohorts_is_not_seen(
    device: Device, repository: RepositorySimulator
) -> None:
    repository.targets.delegations.roles["cohorts"].paths = ["cohorts/other-product/*"]
    repository.publish()
    with device.catalog() as catalog:
        catalog.refresh(NOW, None)
        assert catalog.directive("stable") is None


# --- what is signed but wrong --------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"product": "other"}, {"cohort": "canary"}, {"progress": 10_001}])
def test_a_directive_for_somebody_else_or_malformed_is_refused(
    device: Device, repository: RepositorySimulator, change: dict[str, object]
) -> None:
    target = repository.cohorts.targets[f"cohorts/{PRODUCT}/stable.json"]
    target.unrecognized_fields["custom"].update(change)
    repository.publish()
    with device.catalog() as catalog:
        catalog.refresh(NOW, None)
        with pytest.raises(TrustError) as caught:
            catalog.directive("stable")
    assert caught.value.reason == "bad-directive"


@pytest.mark.parametrize(
    "change", [{"product": "other"}, {"version": "2.0.0"}, {"platform": "linux-x86_64"}, {"seq": 0}]
)
def test_facts_that_contradict_their_path_are_refused(
    device: Device, repository: RepositorySimulator, change: dict[str, object]
) -> None:
    path = f"bundles/{PRODUCT}/1.0.0/any.tar.zst"
    repository.targets.targets[path].unrecognized_fields["custom"].update(change)
    repository.publish()
    with device.catalog() as catalog:
        catalog.refresh(NOW, None)
        with pytest.raises(TrustError) as caught:
            catalog.release("1.0.0", ["any"])
    assert caught.value.reason == "bad-metadata"


@pytest.mark.parametrize("spoil", ["index missing", "index other", "no custom", "no sha256"])
def test_a_release_that_is_not_whole_is_refused(
    device: Device, repository: RepositorySimulator, spoil: str
) -> None:
    path = f"bundles/{PRODUCT}/1.0.0/any.tar.zst"
    index = f"bundles/{PRODUCT}/1.0.0/any.index.json"
    targets = repository.targets.targets
    if spoil == "index missing":
        del targets[index]
    elif spoil == "index other":
        targets[index].length += 1
    elif spoil == "no custom":
        del targets[path].unrecognized_fields["custom"]
    else:
        targets[path].hashes = {"sha512": "0" * 128}
    repository.publish()
    with device.catalog() as catalog:
        catalog.refresh(NOW, None)
        with pytest.raises(TrustError) as caught:
            catalog.release("1.0.0", ["any"])
    assert caught.value.reason == "bad-metadata"


def test_a_policy_that_is_malformed_is_refused(device: Device, repository: RepositorySimulator) -> None:
    target = repository.targets.targets[f"policy/{PRODUCT}.json"]
    target.unrecognized_fields["custom"]["floor_seq"] = "none"
    repository.publish()
    with device.catalog() as catalog:
        catalog.refresh(NOW, None)
        with pytest.raises(TrustError) as caught:
            catalog.policy()
    assert caught.value.reason == "bad-metadata"


# --- what the network does -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"])
@pytest.mark.parametrize(
    "fault",
    [Endless(), Gzip(), Status(302, {"Location": "http://127.0.0.1:1/"}), Status(304), Status(206)],
    ids=["endless", "gzip", "redirect", "unasked 304", "unasked 206"],
)
def test_lies_of_the_network_are_refused(
    device: Device, repository: RepositorySimulator, origin: Origin, name: str, fault
) -> None:
    repository.write("2.root.json", b"{}")
    if name != "2.root.json":
        (repository.directory / "metadata" / "2.root.json").unlink()
    origin.misbehave(f"/{name}", fault)
    assert device.refusal() == "bad-answer"


def test_a_length_announced_by_an_online_key_has_a_ceiling(
    device: Device, repository: RepositorySimulator, origin: Origin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trusted_metadata, "METADATA_MAX", 100_000)
    monkeypatch.setattr(trusted_metadata, "METADATA_DEADLINE_S", 1.0)
    repository.snapshot.meta["cohorts.json"].length = 10**15
    repository.write_snapshot()
    repository.write_timestamp()
    origin.misbehave("cohorts.json", Endless())
    assert device.refusal() == "bad-answer"


@pytest.mark.parametrize("name", ["timestamp.json", "1.snapshot.json", "1.targets.json", "1.cohorts.json"])
@pytest.mark.parametrize(
    ("fault", "reason", "retry_after_s"),
    [
        (Status(429, {"Retry-After": "3"}), "overloaded", 3.0),
        (Status(503), "overloaded", None),
        (Status(500), "overloaded", None),
        (Status(404), "offline", None),
        (Truncated(20), "offline", None),
    ],
    ids=["429", "503", "500", "404", "truncated"],
)
def test_a_server_that_is_away_is_unreachable(
    device: Device, origin: Origin, name: str, fault, reason: str, retry_after_s: float | None
) -> None:
    origin.misbehave(f"/{name}", fault)
    with pytest.raises(UnreachableError) as caught:
        device.refresh()
    assert (caught.value.reason, caught.value.retry_after_s) == (reason, retry_after_s)
    origin.behave()
    device.refresh()


def test_a_drip_is_unreachable(device: Device, origin: Origin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusted_metadata, "METADATA_DEADLINE_S", 0.3)
    origin.misbehave("timestamp.json", Slow(pause_s=0.02))
    with pytest.raises(UnreachableError):
        device.refresh()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"signed":{}}', b"\xff\xfe", b"[" * 100_00])
def test_metadata_that_is_no_metadata_is_refused(
    device: Device, repository: RepositorySimulator, content: bytes
) -> None:
    repository.write("timestamp.json", content)
    assert device.refusal() == "bad-metadata"


# --- the cache -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"\0" * 512, b"{"], ids=["empty", "zeros", "torn"])
@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "targets.json", "cohorts.json"])
def test_a_damaged_cache_is_fetched_again(device: Device, name: str, content: bytes) -> None:
    device.refresh()
    (device.directory / name).write_bytes(content)
    device.refresh()


@pytest.mark.parametrize("name", ["timestamp.json", "snapshot.json", "targets.json", "cohorts.json"])
@pytest.mark.parametrize("put", [Path.mkdir, os.mkfifo], ids=["directory", "pipe"])
def test_what_is_no_file_in_the_place_of_cached_metadata_is_set_aside(
    device: Device, name: str, put: Any
) -> None:
    device.refresh()
    (device.directory / name).unlink()
    put(device.directory / name)
    device.refresh()
    assert (device.directory / name).is_file()


def test_metadata_is_on_the_disk_before_it_replaces_the_old(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced = []
    real = os.fsync

    def watched(fd: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink()))
        real(fd)

    monkeypatch.setattr(os, "fsync", watched)
    device.refresh()
    for name in ("timestamp.json", "snapshot.json", "targets.json", "cohorts.json", "1.root.json"):
        assert any(name in path for path in synced), name


def test_a_cache_that_cannot_be_written_is_a_disk_error(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    device.refresh()
    (device.directory / "root_history" / "1.root.json").unlink()
    (device.directory / "root_history" / "1.root.json").mkdir()
    with pytest.raises(DiskError):
        device.refresh()


def test_one_metadata_directory_has_one_writer(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalog_module, "LOCK_WAIT_S", 0.1)
    with device.catalog(), pytest.raises(ConflictError), device.catalog():
        pass
    device.refresh()


def test_a_second_check_waits_for_the_first(device: Device) -> None:
    first = device.catalog()
    first.__enter__()
    timer = threading.Timer(0.2, first.__exit__)
    timer.start()
    device.refresh()
    timer.join()


# --- when a 304 may stand for a refresh ----------------------------------------------------------------

MEMORY = Memory('"etag"', "ab" * 32, NOW + DAY, NOW, 1000.0, "boot-1", NOW)
ASKED = {"timestamp_sha256": "ab" * 32, "now": NOW, "boot_s": 2000.0, "boot_id": "boot-1"}


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        ({}, True),
        ({"timestamp_sha256": "cd" * 32}, False),
        ({"timestamp_sha256": None}, False),
        ({"now": NOW + DAY}, False),
        ({"now": NOW - 300 * DAY}, True),
        ({"boot_s": 1000 + 6 * 3600 - 1}, True),
        ({"boot_s": 1000.0 + 6 * 3600}, False),
        ({"boot_s": 999.0}, False),
        ({"boot_id": "boot-2"}, False),
    ],
    ids=[
        "all right",
        "other cache",
        "no cache",
        "expired",
        "clock back",
        "just young",
        "old",
        "before",
        "reboot",
    ],
)
def test_a_304_may_skip_a_refresh_only_when_all_holds(change, fresh: bool) -> None:
    assert is_fresh(MEMORY, **{**ASKED, **change}) is fresh
    assert not is_fresh(Memory(), **{**ASKED, **change})


def test_a_clock_set_back_does_not_make_the_cache_fresh() -> None:
    memory = Memory('"etag"', "ab" * 32, NOW, NOW, 1000.0, "boot-1", high_water=NOW)
    assert not is_fresh(memory, **{**ASKED, "now": NOW - 300 * DAY})


def test_the_memory_survives_beside_what_others_keep_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "poll.json"
    assert recall(file, tmp_path, NOW) == Memory()
    file.write_text('{"backoff": 7}')
    remember(file, MEMORY)
    assert recall(file, tmp_path, NOW) == MEMORY
    assert json.loads(file.read_text())["backoff"] == 7


@pytest.mark.parametrize("content", [b"", b"[]", b'{"refreshed_at": "yesterday"}', b'{"etag": 5}', b"\xff"])
def test_a_damaged_memory_means_a_full_refresh(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "poll.json"
    file.write_bytes(content)
    assert recall(file, tmp_path, NOW) == Memory()
    remember(file, MEMORY)
    assert recall(file, tmp_path, NOW) == MEMORY


FAR = datetime(9999, 12, 30, tzinfo=UTC)
MARKS: dict[str, bytes] = {
    "a year 9999": json.dumps(replace(MEMORY, high_water=FAR, earliest_expiry=None).to_json()).encode(),
    "a year 9999, and nothing that expires before": json.dumps(
        replace(MEMORY, high_water=FAR, earliest_expiry=FAR + DAY).to_json()
    ).encode(),
    "bytes that are no JSON": b"\xff",
    "a cut": b'{"high_water": "20',
}


@pytest.mark.parametrize("content", MARKS.values(), ids=MARKS)
def test_a_signed_time_that_nobody_signed_loses_no_host_and_is_told(
    device: Device, repository: RepositorySimulator, tmp_path: Path, caplog: Any, content: bytes
) -> None:
    device.refresh()
    file = tmp_path / "poll.json"
    file.write_bytes(content)
    assert (believed(file, device.directory)[0] == Memory()) is not content.endswith(b"}")
    memory = recall(file, device.directory, NOW - 300 * DAY)
    assert memory.high_water == NOW, "what the kept timestamp says"
    assert memory.time_keys == tuple(sorted(repository.root.roles["timestamp"].keyids))
    assert "signed time not believed" in caplog.text
    device.high_water = memory.high_water
    assert device.refresh().high_water == NOW


def test_a_signed_time_within_what_was_verified_never_falls_to_what_is_kept(
    device: Device, tmp_path: Path, caplog: Any
) -> None:
    verified = device.refresh()
    file = tmp_path / "poll.json"
    highest = verified.expires["timestamp"] - timedelta(seconds=1)
    remember(file, replace(verified.memory(1.0, "boot"), high_water=highest, earliest_expiry=None))
    assert recall(file, device.directory, NOW).high_water == highest
    assert not caplog.records


def test_a_time_that_the_kept_metadata_had_not_survived_is_none_either(
    device: Device, repository: RepositorySimulator, tmp_path: Path
) -> None:
    device.refresh()
    signed = json.loads((device.directory / "timestamp.json").read_text())
    signed["signed"] |= {"x-signed-at": clock.iso(FAR), "expires": clock.iso(FAR + DAY)}
    (device.directory / "timestamp.json").write_text(json.dumps(signed))
    (tmp_path / "poll.json").write_bytes(b"")
    assert recall(tmp_path / "poll.json", device.directory, NOW - 300 * DAY) == Memory()


def unchanged(device: Device, memory: Memory) -> bool:
    return is_unchanged(device.transport, memory, device.directory, now=NOW, boot_s=1000.0, boot_id="boot-1")


def test_an_idle_poll_is_one_conditional_get(
    device: Device, repository: RepositorySimulator, origin: Origin
) -> None:
    memory = device.refresh().memory(990.0, "boot-1")
    origin.requests.clear()
    assert unchanged(device, memory)
    assert [(request.path, request.headers["if-none-match"]) for request in origin.requests] == [
        ("/metadata/timestamp.json", memory.etag)
    ]
    repository.bump_timestamp()
    assert not unchanged(device, memory)


def test_a_server_without_etags_is_always_asked_for_everything(device: Device, origin: Origin) -> None:
    origin.misbehave("timestamp.json", WithoutEtag())
    memory = device.refresh().memory(990.0, "boot-1")
    assert memory.etag == ""
    assert not unchanged(device, memory)


def test_the_same_timestamp_under_another_etag_may_stand_beside_a_new_root(
    device: Device, repository: RepositorySimulator, origin: Origin
) -> None:
    memory = device.refresh().memory(990.0, "boot-1")
    repository.publish_root()
    headers = {"ETag": '"root-2"'}
    origin.misbehave("timestamp.json", Status(200, headers, repository.read("timestamp.json")), times=1)
    assert not unchanged(device, memory)


def test_nothing_is_asked_when_a_refresh_is_due_anyway(device: Device, origin: Origin) -> None:
    verified = device.refresh()
    origin.requests.clear()
    assert not unchanged(device, verified.memory(990.0, "boot-0"))
    assert origin.requests == []


def test_an_unasked_304_does_not_skip_a_refresh(device: Device, origin: Origin) -> None:
    device.refresh()
    origin.misbehave("timestamp.json", Status(304))
    assert device.refusal() == "bad-answer"


def test_an_etag_is_bound_to_the_timestamp_that_was_verified(
    device: Device, repository: RepositorySimulator, origin: Origin
) -> None:
    device.refresh()
    # Other bytes under the same version: the cached ones stay, so this answer's ETag is none of theirs.
    repository.timestamp.expires += DAY
    repository.write_timestamp()
    verified = device.refresh()
    cached = (device.directory / "timestamp.json").read_bytes()
    assert verified.timestamp_sha256 == sha256(cached).hexdigest()
    assert verified.etag == ""


def test_this_boot_has_a_name() -> None:
    assert freshness.boot_id() == freshness.boot_id()
    assert clock.boot_s() > 0


def test_no_process_of_an_agent_loads_urllib3_even_where_it_is_installed() -> None:
    program = "import sys, updater.catalog; print('urllib3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
