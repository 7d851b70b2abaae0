"""Keys that change: which roots and which roles count, by who signed them and how many it takes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Role

from tests.conformance.runner import OK, REFUSED

KEYS = [CryptoSigner.generate_ed25519() for _ in range(10)]
FIVE, OTHERS = (0, 1, 2, 3, 4), (5, 6, 7, 8, 9)
ONE_OTHER = (0, 1, 3, 4, 5)


@dataclass(frozen=True)
class Signing:
    """Of one version: whose keys count, how many of them it takes, and who signed."""

    keys: tuple[int, ...]
    threshold: int
    by: tuple[int, ...]

    def role(self):
        return Role([KEYS[number].public_key.keyid for number in self.keys], self.threshold)

    def signers(self):
        return [KEYS[number] for number in self.by]


def one(key, *by):
    return Signing((key,), 1, by)


def five(keys, *by):
    return Signing(keys, 3, by)


FOLLOWED = {
    "one key for another": [one(1, 1), one(2, 2, 1), one(2, 2)],
    "strangers sign too": [one(1, 3, 1, 4), one(2, 3, 2, 1, 4), one(2, 3, 2, 4)],
    "any three of five": [five(FIVE, 0, 2, 4), five(FIVE, 0, 4, 1), five(FIVE, 0, 1, 3), five(FIVE, 0, 1, 3)],
    "one of five goes": [five(FIVE, 0, 2, 4), five(ONE_OTHER, 0, 4, 1)],
    "one of five goes in two steps": [
        five(FIVE, 0, 2, 4),
        five(ONE_OTHER, 0, 2, 4, 5),
        five(ONE_OTHER, 0, 4, 5),
    ],
    "all five go": [five(FIVE, 0, 2, 4), five(OTHERS, 0, 2, 4, 5, 6, 7), five(OTHERS, 5, 6, 7)],
    "the threshold rises": [Signing((1, 2, 3), 1, (1,)), Signing((1, 2, 3), 2, (1, 2))],
    "the threshold falls": [
        Signing((1, 2, 3), 2, (1, 2)),
        Signing((1, 2, 3), 1, (1, 2)),
        Signing((1, 2, 3), 1, (1,)),
    ],
    "a second key, and both needed": [one(1, 1), Signing((1, 2), 2, (1, 2))],
}
NOT_FOLLOWED = {
    "without the old key": [one(1, 1), one(2, 2, 3, 4)],
    "without the new key": [one(1, 1), one(2, 1, 3, 4)],
    "two of the new five": [five(FIVE, 0, 2, 4), five(ONE_OTHER, 0, 2, 4)],
    "two of the old five": [five(FIVE, 0, 2, 4), five(ONE_OTHER, 0, 4, 5)],
    "below the risen threshold": [Signing((1, 2, 3), 1, (1,)), Signing((1, 2, 3), 2, (2,))],
    "below the threshold that was": [Signing((1, 2, 3), 2, (1, 2)), Signing((1, 2, 3), 1, (1,))],
}


@pytest.fixture
def publish_roots(repository, runner):
    """Publishes a history of roots, and has the client begin from its first."""

    def publish(history):
        for key in KEYS:
            repository.root.keys[key.public_key.keyid] = key.public_key
        for version, signing in enumerate(history, 1):
            repository.root.version = version
            repository.root.roles["root"] = signing.role()
            repository.write(f"{version}.root.json", repository.sign(repository.root, signing.signers()))
        runner.root.write_bytes(repository.read("1.root.json"))
        assert runner.init() == OK

    return publish


@pytest.mark.parametrize("history", FOLLOWED.values(), ids=FOLLOWED)
def test_a_history_of_roots_is_followed_to_its_end(runner, repository, publish_roots, history):
    publish_roots(history)
    assert runner.refresh() == OK
    assert runner.content("root") == repository.read(f"{len(history)}.root.json")


@pytest.mark.parametrize("history", NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_a_root_that_too_few_signed_is_not_followed_and_nothing_after_it(
    runner, repository, publish_roots, history
):
    publish_roots(history)
    assert runner.refresh() == REFUSED
    assert runner.content("root") == repository.read(f"{len(history) - 1}.root.json")
    assert set(runner.versions()) == {"root"}


TAKEN = {
    "the new key": one(2, 2),
    "strangers too": one(1, 3, 1, 4),
    **{
        f"three of five: {by}": five(FIVE, *by)
        for by in ((0, 2, 4), (0, 4, 1), (0, 1, 3), (1, 2, 3), (2, 3, 4))
    },
}
NOT_TAKEN = {
    "the old key and strangers": one(2, 1, 3, 4),
    "three, one of them old": five(ONE_OTHER, 0, 2, 4),
    "two of three": five(ONE_OTHER, 0, 4),
    "a threshold above all keys": Signing(FIVE, 6, FIVE),
}
ROLES = ("timestamp", "snapshot", "targets")


def sign_anew(repository, role, signing):
    """The next root gives a role these keys; the next version of it is signed like this."""
    for key in KEYS:
        repository.root.keys[key.public_key.keyid] = key.public_key
    repository.root.roles[role] = signing.role()
    repository.signers[role] = signing.signers()
    repository.publish_root()
    repository.publish()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("signing", TAKEN.values(), ids=TAKEN)
def test_a_role_is_taken_when_enough_of_its_new_keys_signed_it(runner, repository, role, signing):
    assert runner.refresh() == OK
    sign_anew(repository, role, signing)
    assert runner.refresh() == OK
    name = role if role == "timestamp" else f"2.{role}"
    assert runner.content(role) == repository.read(f"{name}.json")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("signing", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_a_role_that_too_few_of_its_new_keys_signed_is_not_taken(runner, repository, role, signing):
    sign_anew(repository, role, signing)
    assert runner.refresh() == REFUSED
    assert role not in runner.versions()


@pytest.mark.parametrize("make", ["ed25519", "ecdsa", "rsa"])
def test_each_kind_of_key_of_the_specification_is_known_and_a_wrong_signature_of_it_is_not(
    runner, repository, make
):
    signer = getattr(CryptoSigner, f"generate_{make}")()
    repository.add_signer("root", signer)
    repository.root.roles["root"].threshold = 2
    repository.publish_root()
    assert runner.refresh() == OK
    # The next root is right but for this one signature: the same key's, over something else.
    repository.publish_root()
    name, keyid = "3.root.json", signer.public_key.keyid
    repository.resign(name, keyid, signer.sign(b"something else").signature)
    repository.bump_timestamp()
    assert runner.refresh() == REFUSED
    assert runner.versions()["root"] == 2
