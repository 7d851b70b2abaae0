"""Key files: what they keep secret, what they refuse, and where passphrases come from."""

import io
import json
import os
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa
from securesystemslib.signer import CryptoSigner, Signer, SSlibKey

from agent_core.errors import (
    ConflictError,
    Exit,
    MalformedError,
    NotAllowedError,
    NotFoundError,
    TrustError,
    UsageError,
)
from keys import signers

NOW = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
WORDS = "correct horse battery"
LOW = 2**4


def make(path, passphrase=WORDS, role="release"):
    return signers.create(path, role=role, now=NOW, passphrase=passphrase, scrypt_n=LOW)


def say(words):
    return lambda _prompt: words


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keys" / "alice.key.json"


def rewrite(path, **changes):
    document = json.loads(path.read_text())
    for place, value in changes.items():
        table, _, key = place.rpartition("__")
        (document[table] if table else document)[key] = value
    path.write_text(json.dumps(document))


def test_a_sealed_key_opens_with_its_passphrase_and_signs(path):
    made = make(path)
    opened = signers.load(path, say(WORDS))
    signature = opened.sign(b"release")
    made.public_key.verify_signature(signature, b"release")


def test_a_plain_key_opens_without_one(path):
    made = make(path, passphrase=None)
    made.public_key.verify_signature(signers.load(path).sign(b"x"), b"x")


def test_the_file_says_whose_key_it_is_without_being_opened(path):
    made = make(path)
    found = signers.read(path)
    assert (found.name, found.role, found.created) == ("alice", "release", "2026-05-01T12:00:00Z")
    assert found.keyid == made.public_key.keyid
    assert found.protection == "scrypt-aesgcm"
    assert "private" not in found.to_json()


def test_neither_the_seed_nor_the_passphrase_is_in_a_sealed_file(path):
    made = make(path)
    seed = made._private_key.private_bytes_raw()
    body = path.read_text()
    assert seed.hex() not in body
    assert WORDS not in body


def test_the_default_cost_is_high_enough_to_slow_a_guesser(path):
    assert signers.SCRYPT_N >= 2**15
    signers.create(path, role="root", now=NOW, passphrase=WORDS)
    assert json.loads(path.read_text())["private"]["n"] == signers.SCRYPT_N
    signers.load(path, say(WORDS))


def test_a_new_file_is_for_its_owner_only_whatever_the_umask(path):
    before = os.umask(0o000)
    try:
        make(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_key_is_never_overwritten(path):
    make(path)
    body = path.read_bytes()
    with pytest.raises(ConflictError) as caught:
        make(path)
    assert caught.value.reason == "key-exists"
    assert path.read_bytes() == body


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620, 0o601], ids=oct)
def test_a_key_that_others_can_open_is_refused(path, mode):
    make(path)
    path.chmod(mode)
    with pytest.raises(TrustError) as caught:
        signers.load(path, say(WORDS))
    assert caught.value.reason == "exposed"
    assert f"{mode:04o}" in caught.value.why
    assert "chmod 600" in caught.value.then


def test_a_missing_file_a_directory_and_no_json_are_said_to_be_that(path, tmp_path):
    with pytest.raises(NotFoundError):
        signers.read(path)
    path.parent.mkdir()
    path.write_text("{")
    path.chmod(0o600)
    with pytest.raises(MalformedError):
        signers.read(path)
    path.write_bytes(b" " * (signers.MAX_FILE + 1))
    with pytest.raises(MalformedError, match="cannot be used"):
        signers.read(path)


def test_a_wrong_passphrase_is_not_allowed(path):
    make(path)
    with pytest.raises(NotAllowedError) as caught:
        signers.load(path, say("wrong horse battery"))
    assert caught.value.reason == "bad-passphrase"
    assert caught.value.exit_code == Exit.NOT_ALLOWED


def test_a_sealed_key_without_anybody_to_ask_stays_closed(path):
    make(path)
    with pytest.raises(NotAllowedError):
        signers.load(path)


def test_a_short_passphrase_is_refused_before_anything_is_written(path):
    with pytest.raises(UsageError) as caught:
        make(path, passphrase="short")
    assert caught.value.reason == "short-passphrase"
    assert not path.exists()


def test_a_role_that_was_changed_in_the_file_breaks_the_seal(path):
    make(path, role="release")
    rewrite(path, role="root")
    with pytest.raises(NotAllowedError):
        signers.load(path, say(WORDS))


def test_a_public_half_of_another_key_is_refused(path, tmp_path):
    make(path, passphrase=None)
    other = make(tmp_path / "other.key.json", passphrase=None)
    rewrite(path, public=other.public_key.to_dict(), keyid=other.public_key.keyid)
    with pytest.raises(TrustError) as caught:
        signers.load(path)
    assert caught.value.reason == "key-mismatch"


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "something"},
        {"keyid": "0" * 64},
        {"schema": 2},
        {"public": {"keytype": "ed25519", "scheme": "ed25519", "keyval": {"public": "zz"}}},
        {"private__n": 2**40},
        {"private__n": 1000},
        {"private__r": 1000},
        {"private__salt": "not hex"},
        {"private__protection": "rot13"},
    ],
    ids="-".join,
)
def test_a_key_file_with_a_senseless_field_is_refused(path, changes):
    make(path)
    rewrite(path, **changes)
    with pytest.raises(MalformedError):
        signers.load(path, say(WORDS))


def test_find_lists_key_files_by_name_and_nothing_else(tmp_path):
    assert signers.find(tmp_path / "none") == []
    for name in ("b", "a"):
        make(tmp_path / f"{name}.key.json", passphrase=None)
    (tmp_path / "root.json").write_text("{}")
    assert [found.name for found in signers.find(tmp_path)] == ["a", "b"]


def test_a_public_key_has_one_id_however_it_is_spelled():
    key = CryptoSigner.generate_ed25519().public_key
    public = key.keyval["public"]
    spaced = " ".join(public[place : place + 2] for place in range(0, 64, 2))
    for text in (public, public.upper(), spaced):
        read = signers.public_key({"keytype": "ed25519", "scheme": "ed25519", "public": text})
        assert (read.keyid, read.keyval["public"]) == (key.keyid, public)
        spelled = SSlibKey("other-id", "ed25519", "ed25519", {"public": text})
        assert signers.key_material(spelled) == signers.key_material(key)


def test_other_kinds_of_keys_are_read_too():
    key = SSlibKey.from_crypto(rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key())
    assert signers.public_key(key.to_dict()) == key


# --- signers by URI ---


def test_a_file_uri_opens_a_key_file_through_securesystemslib_too(path):
    made = make(path)
    for signer in (
        signers.signer_from_uri(f"file:{path}", passphrase=say(WORDS)),
        Signer.from_priv_key_uri(f"file:{path}", made.public_key, say(WORDS)),
    ):
        made.public_key.verify_signature(signer.sign(b"x"), b"x")


def test_a_key_elsewhere_is_reached_by_its_uri(path, tmp_path):
    pem = tmp_path / "outside.pem"
    outside = CryptoSigner.generate_ed25519()
    pem.write_bytes(outside.private_bytes)
    make(path, passphrase=None)
    rewrite(
        path,
        public=outside.public_key.to_dict(),
        keyid=outside.public_key.keyid,
        private={"protection": "uri", "uri": f"file2:{pem}"},
    )
    outside.public_key.verify_signature(signers.load(path).sign(b"x"), b"x")


def test_a_uri_with_another_key_behind_it_is_refused(path):
    make(path, passphrase=None)
    other = CryptoSigner.generate_ed25519().public_key
    with pytest.raises(TrustError) as caught:
        signers.signer_from_uri(f"file:{path}", other)
    assert caught.value.reason == "no-signer"


@pytest.mark.parametrize("uri", ["carrier-pigeon:x", "hsm:1", "no scheme"])
def test_a_uri_that_leads_nowhere_is_a_usage_error(uri):
    with pytest.raises(UsageError):
        signers.signer_from_uri(uri)


# --- passphrases ---


def test_a_passphrase_on_stdin_is_read_once_for_every_key(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("first line\nsecond\n"))
    ask = signers.passphrase_source(Path("-"), {"RELFLEET_PASSPHRASE": "not this"}, None)
    assert [ask("one"), ask("two")] == ["first line", "first line"]


def test_passphrases_come_from_the_first_place_that_has_one(tmp_path):
    flag, variable, credentials = tmp_path / "flag", tmp_path / "variable", tmp_path / "credentials"
    flag.write_text("from the flag's file\nsecond line")
    variable.write_text("from the variable's file\n")
    credentials.mkdir()
    (credentials / signers.CREDENTIAL).write_text("from systemd")
    environ = {
        "RELFLEET_PASSPHRASE_FILE": str(variable),
        "RELFLEET_PASSPHRASE": "from the variable",
        "CREDENTIALS_DIRECTORY": str(credentials),
    }
    ask = say("from a person")
    assert signers.passphrase_source(flag, environ, ask)("?") == "from the flag's file"
    assert signers.passphrase_source(None, environ, ask)("?") == "from the variable's file"
    del environ["RELFLEET_PASSPHRASE_FILE"]
    assert signers.passphrase_source(None, environ, ask)("?") == "from the variable"
    del environ["RELFLEET_PASSPHRASE"]
    assert signers.passphrase_source(None, environ, ask)("?") == "from systemd"
    assert signers.passphrase_source(None, {}, ask)("?") == "from a person"


def test_with_nobody_to_ask_the_message_names_what_to_use():
    with pytest.raises(NotAllowedError) as caught:
        signers.passphrase_source(None, {}, None)("?")
    assert caught.value.reason == "no-passphrase"
    assert "RELFLEET_PASSPHRASE" in caught.value.then


def test_a_passphrase_in_the_place_of_its_file_is_not_repeated():
    with pytest.raises(NotFoundError) as caught:
        signers.passphrase_source(Path(WORDS), {}, None)("?")
    assert caught.value.reason == "no-file"
    assert WORDS not in str(caught.value)
