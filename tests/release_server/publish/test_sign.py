"""What the release manager believes of the server, and what the release keys are made to sign."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest
from tuf.api.metadata import TargetFile

from agent_core.errors import ConflictError, NotAllowedError, NotFoundError, TrustError, UnreachableError
from agent_core.wire import Policy, ReleaseFacts, bundle_path, index_path, policy_path
from keys import ceremony, signers
from release_server.publish import sign
from release_server.publish.sign import Blob, Release
from tests.release_origin import PASSPHRASE, PRODUCT, Answer

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)


def digest(text):
    return sha256(text.encode()).hexdigest()


def a_release(tmp_path, version="1.0.0", platform="any", content="bytes", product=PRODUCT):
    index = f"index of {version} {platform} {content}"
    facts = ReleaseFacts(product, version, 1, platform, digest(index), len(index), unpacked=10, files=1)
    archive = Blob(tmp_path / "archive", digest(content + version + platform), 5)
    return Release(facts, archive, Blob(tmp_path / "index", digest(index), len(index)))


@pytest.fixture
def root(held):
    return held.root.to_bytes()


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def trusted(client, root, cache):
    return sign.fetch(client, root, cache)


@pytest.fixture
def keys(keys_dir, trusted):
    return sign.release_signers(keys_dir, trusted.root.signed, lambda _prompt: PASSPHRASE)


def publish(origin, body):
    with_blobs = ceremony.parse_targets(body)
    for target in with_blobs.signed.targets.values():
        origin.blobs.setdefault(target.hashes["sha256"], b"")
    origin.targets = with_blobs
    origin.files[f"{with_blobs.signed.version}.targets.json"] = body
    origin.publish()


# --- fetching ---


def test_the_verified_targets_are_the_servers_current_ones(trusted, held):
    assert trusted.version == 1
    assert trusted.targets.signed == held.targets.signed
    assert trusted.root.signed == held.root.signed


def test_a_later_root_is_followed(client, origin, held, root, cache, keys_dir):
    signer = signers.load(keys_dir / "root.key.json", lambda _prompt: PASSPHRASE)
    second = ceremony.next_root(held.root, datetime.now(UTC))
    ceremony.sign(second, [signer])
    origin.files["2.root.json"] = second.to_bytes()
    assert sign.fetch(client, root, cache).root.signed.version == 2


def test_a_server_that_has_published_nothing_says_what_to_do(client, held, root, cache, origin):
    del origin.files["timestamp.json"]
    with pytest.raises(NotFoundError) as caught:
        sign.fetch(client, root, cache)
    assert caught.value.reason == "nothing-published"


def _forged(origin, held):
    body = origin.files["1.targets.json"].replace(b'"version":1', b'"version":1 ')
    document = body.replace(b"cohorts/*/*", b"bundles/*/*")
    origin.files["1.targets.json"] = document
    origin.publish()


def _signed_by_another(origin, held):
    origin.online["timestamp"] = type(origin.online["timestamp"]).generate_ed25519()
    origin.publish()


def _changed_behind_its_digest(origin, held):
    origin.files["1.targets.json"] += b" "


def _expired(origin, held):
    origin.publish(now=datetime.now(UTC) - timedelta(days=30))


def _no_json(origin, held):
    origin.files["timestamp.json"] = b"<html>"


def _endless(origin, held):
    origin.files["timestamp.json"] = b" " * 2**20


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_forged, "bad-signature"),
        (_signed_by_another, "bad-signature"),
        (_changed_behind_its_digest, "length-mismatch"),
        (_expired, "expired"),
        (_no_json, "bad-metadata"),
        (_endless, "length-mismatch"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__.strip("_"),
)
def test_metadata_that_the_keys_did_not_sign_is_refused(client, origin, held, root, cache, spoil, reason):
    spoil(origin, held)
    with pytest.raises(TrustError) as caught:
        sign.fetch(client, root, cache)
    assert caught.value.reason == reason


def test_an_older_timestamp_than_seen_before_is_refused(client, origin, held, root, cache):
    old = origin.files["timestamp.json"]
    origin.publish()
    sign.fetch(client, root, cache)
    origin.files["timestamp.json"] = old
    with pytest.raises(TrustError) as caught:
        sign.fetch(client, root, cache)
    assert caught.value.reason == "replayed"


def test_a_redirect_is_refused(client, origin, held, root, cache):
    origin.instead.append(Answer(302, b"", {"Location": "http://127.0.0.1:1/"}, path="timestamp.json"))
    with pytest.raises(Exception, match="redirects"):
        sign.fetch(client, root, cache)


@pytest.mark.parametrize(
    "answer",
    [
        Answer(206, b"{}", path="timestamp.json"),
        Answer(200, b"x", {"Content-Encoding": "gzip"}, path="timestamp.json"),
    ],
    ids=["part", "encoded"],
)
def test_an_answer_that_was_not_asked_for_is_not_taken(client, origin, held, root, cache, answer):
    origin.instead.append(answer)
    with pytest.raises(NotFoundError):
        sign.fetch(client, root, cache)


def test_a_server_that_is_away_is_unreachable(make_client, origin, held, root, cache):
    client = make_client(origin.url, attempts=2, sleep=lambda _s: None)
    origin.instead.extend([Answer(503)] * 2)
    with pytest.raises(UnreachableError):
        sign.fetch(client, root, cache)


def test_what_was_seen_under_another_root_is_kept_apart(tmp_path):
    one = sign.cache_dir(tmp_path, "https://a", b"root")
    assert one != sign.cache_dir(tmp_path, "https://b", b"root")
    assert one != sign.cache_dir(tmp_path, "https://a", b"other")
    assert one == sign.cache_dir(tmp_path, "https://a", b"root")


def test_a_trusted_root_must_be_there_and_sound(tmp_path, held):
    with pytest.raises(NotFoundError) as caught:
        sign.read_trust(tmp_path / "none.json")
    assert "--trust" in caught.value.then
    path = tmp_path / "root.json"
    path.write_bytes(held.root.to_bytes())
    assert sign.read_trust(path) == held.root.to_bytes()
    path.write_bytes(held.targets.to_bytes())
    with pytest.raises(TrustError):
        sign.read_trust(path)


# --- adding ---


def test_a_release_is_listed_with_its_facts_and_its_index(trusted, tmp_path):
    release = a_release(tmp_path)
    metadata = sign.with_releases(trusted, [release], NOW)
    targets = metadata.signed.targets
    archive = targets[bundle_path(PRODUCT, "1.0.0", "any")]
    assert (archive.length, archive.hashes) == (5, {"sha256": release.archive.sha256})
    assert ReleaseFacts.from_json(archive.custom) == replace(release.facts, seq=1)
    index = targets[index_path(PRODUCT, "1.0.0", "any")]
    assert (index.length, index.hashes) == (release.index.length, {"sha256": release.index.sha256})
    assert (metadata.signed.version, metadata.signed.expires) == (2, NOW + timedelta(days=60))
    assert metadata.signatures == {}
    assert trusted.targets.signed.targets == {}


def test_seq_grows_with_every_version_and_is_one_for_all_platforms(trusted, tmp_path):
    targets = trusted.targets.signed
    seqs = {}
    for version, platform in [
        ("1.0.0", "any"),
        ("0.9.0", "any"),
        ("1.0.0", "linux-x86_64"),
        ("2.0.0", "any"),
    ]:
        release = a_release(tmp_path, version, platform)
        seq = sign.next_seq(targets, PRODUCT, version)
        sign.add(targets, replace(release, facts=replace(release.facts, seq=seq)))
        seqs[version, platform] = seq
    assert list(seqs.values()) == [1, 2, 1, 3]


def test_each_product_counts_for_itself(trusted, tmp_path):
    targets = sign.with_releases(trusted, [a_release(tmp_path, "1.0.0")], NOW).signed
    assert sign.next_seq(targets, PRODUCT, "1.1.0") == 2
    assert sign.next_seq(targets, "other", "1.1.0") == 1


def test_what_is_signed_after_a_barrier_installs_over_it_or_what_came_later(trusted, tmp_path):
    wall = a_release(tmp_path, "1.0.0")
    wall = replace(wall, facts=replace(wall.facts, barrier=True))
    later = [a_release(tmp_path, "1.1.0"), a_release(tmp_path, "1.2.0")]
    later[1] = replace(later[1], facts=replace(later[1].facts, upgrade_from_seq=2))
    first = replace(trusted, targets=sign.with_releases(trusted, [wall], NOW))
    signed = sign.releases(sign.with_releases(first, later, NOW).signed, PRODUCT).values()
    assert [(facts.version, facts.upgrade_from_seq) for facts in signed] == [
        ("1.0.0", 0),
        ("1.1.0", 1),
        ("1.2.0", 2),
    ]


def test_what_is_signed_after_a_revoked_barrier_installs_over_what_is_older(trusted, tmp_path):
    wall = a_release(tmp_path, "1.0.0")
    wall = replace(wall, facts=replace(wall.facts, barrier=True))
    first = replace(trusted, targets=sign.with_releases(trusted, [wall], NOW))
    first = replace(first, targets=sign.with_policy(first, PRODUCT, Policy(revoked_seq=(1,)), NOW))
    signed = sign.releases(sign.with_releases(first, [a_release(tmp_path, "1.1.0")], NOW).signed, PRODUCT)
    assert [(facts.version, facts.upgrade_from_seq) for facts in signed.values()] == [
        ("1.0.0", 0),
        ("1.1.0", 0),
    ]


def test_a_new_seq_is_above_the_floor_and_above_what_was_revoked(trusted):
    targets = trusted.targets.signed
    rule = Policy(floor_seq=7, revoked_seq=(9,))
    path = policy_path(PRODUCT)
    targets.targets[path] = TargetFile(
        0, {"sha256": sha256(b"").hexdigest()}, path, {"custom": rule.to_json()}
    )
    assert sign.next_seq(targets, PRODUCT, "1.0.0") == 10


def test_the_same_bytes_are_published_already_and_others_are_a_conflict(trusted, tmp_path):
    release = a_release(tmp_path)
    targets = sign.with_releases(trusted, [release], NOW).signed
    assert sign.is_published(targets, release)
    assert not sign.is_published(targets, a_release(tmp_path, "1.0.1"))
    with pytest.raises(ConflictError) as caught:
        sign.is_published(targets, a_release(tmp_path, content="other bytes"))
    assert caught.value.reason == "version-exists"
    assert caught.value.what.startswith("version exists: ")
    del targets.targets[index_path(PRODUCT, "1.0.0", "any")]
    with pytest.raises(ConflictError):
        sign.is_published(targets, release)


# --- signing ---


def test_signed_targets_are_taken_by_the_root_and_by_a_client(
    client, origin, root, cache, trusted, keys, tmp_path
):
    metadata = sign.with_releases(trusted, [a_release(tmp_path)], datetime.now(UTC))
    assert sign.sign_targets(metadata, trusted.root.signed, keys) == 0
    publish(origin, metadata.to_bytes())
    assert sign.releases(sign.fetch(client, root, cache).targets.signed, PRODUCT)


def test_a_stranger_s_signature_is_not_enough(trusted, tmp_path):
    stranger = signers.create(tmp_path / "s.key.json", role="release", now=NOW, passphrase=None)
    metadata = sign.with_releases(trusted, [a_release(tmp_path)], NOW)
    with pytest.raises(TrustError) as caught:
        sign.sign_targets(metadata, trusted.root.signed, [stranger])
    assert caught.value.reason == "bad-signature"


def test_only_keys_that_the_root_names_are_opened(trusted, keys_dir, tmp_path):
    signers.create(keys_dir / "a-stray.key.json", role="release", now=NOW, passphrase="another passphrase")
    asked = []

    def ask(prompt):
        asked.append(prompt)
        return PASSPHRASE

    opened = sign.release_signers(keys_dir, trusted.root.signed, ask)
    assert [signer.public_key.keyid for signer in opened] == trusted.root.signed.roles["targets"].keyids
    assert asked == ["Passphrase of key release"]
    with pytest.raises(NotAllowedError) as caught:
        sign.release_signers(tmp_path / "empty", trusted.root.signed, ask)
    assert caught.value.reason == "no-release-key"
