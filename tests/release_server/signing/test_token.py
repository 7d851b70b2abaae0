"""An online key in a PKCS#11 token (SoftHSM2): made there, used there, and never a file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tuf.api.metadata import Metadata, Targets

from agent_core.errors import UsageError
from keys import ceremony, roles
from release_server import signer
from release_server.cli import main

LIBRARY = next((place for place in map(Path, ("/usr/lib/softhsm/libsofthsm2.so",)) if place.exists()), None)
PIN = "1234"

# The library keeps what it has loaded for the life of its process, so keys are made in one of their own.
MAKE = """
import os, sys, pkcs11
from pkcs11.util.ec import encode_named_curve_parameters
token = pkcs11.lib(os.environ["PYKCS11LIB"]).get_token(token_label="relfleet")
with token.open(user_pin=sys.argv[1], rw=True) as session:
    curve = encode_named_curve_parameters("secp256r1")
    named = {pkcs11.Attribute.EC_PARAMS: curve}
    parameters = session.create_domain_parameters(pkcs11.KeyType.EC, named, local=True)
    parameters.generate_keypair(id=bytes([2]), store=True)
"""


@pytest.fixture(scope="module")
def token(tmp_path_factory):
    """A token of its own with one key, number 2."""
    if LIBRARY is None or shutil.which("softhsm2-util") is None:
        pytest.skip("SoftHSM2 is not here: scripts/test-setup installs it")
    home = tmp_path_factory.mktemp("token")
    (home / "tokens").mkdir()
    (home / "softhsm2.conf").write_text(f"directories.tokendir = {home / 'tokens'}\n")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SOFTHSM2_CONF", str(home / "softhsm2.conf"))
        patched.setenv("PYKCS11LIB", str(LIBRARY))
        patched.setenv("RELFLEET_PASSPHRASE", PIN)
        words = ["--init-token", "--free", "--label", "relfleet", "--pin", PIN, "--so-pin", "5678"]
        subprocess.run(["softhsm2-util", *words], check=True, capture_output=True)
        subprocess.run([sys.executable, "-c", MAKE, PIN], check=True)
        yield home


@pytest.fixture
def with_token(token, config):
    """A server whose cohorts key is in the token."""
    signer.key_path(config.keys, roles.COHORTS).unlink()
    words = ["signer", "--data", str(config.data), "--token", f"{roles.COHORTS}=hsm:2?label=relfleet"]
    assert main(words) == 0
    return config


def test_directives_are_signed_in_the_token(with_token, open_desk, managers, clock):
    managers.online = signer.public_halves(with_token.keys)
    targets = managers.targets()
    desk = open_desk(passphrase=lambda _prompt: PIN)
    desk.trust(roles.ROOT, managers.root().to_bytes(), {})
    desk.trust(roles.TARGETS, managers.sign(targets), {})
    asked = Metadata(Targets(1, expires=roles.ROLES[roles.COHORTS].expiry(clock())))
    envelope = desk.sign(roles.COHORTS, asked.to_bytes(), {})
    signed = Metadata.from_bytes(envelope)
    targets.signed.verify_delegate(roles.COHORTS, signed.signed_bytes, signed.signatures)
    # ECDSA never signs twice alike: asking again gives the signature that was kept.
    assert desk.sign(roles.COHORTS, asked.to_bytes(), {}) == envelope
    ceremony.check_targets(targets.signed, managers.root().signed)


def test_the_key_file_holds_no_secret(with_token, token):
    held = json.loads(signer.key_path(with_token.keys, roles.COHORTS).read_bytes())
    assert held["private"] == {"protection": "uri", "uri": "hsm:2?label=relfleet"}


@pytest.mark.parametrize("uri", ["hsm:7?label=relfleet", "hsm:2?label=other", "awskms:x", "hsm:two"])
def test_a_key_that_is_not_there_is_said_so(token, tmp_path, clock, uri):
    with pytest.raises(UsageError) as caught:
        signer.use_token(tmp_path, roles.COHORTS, uri, clock(), lambda _prompt: PIN)
    assert caught.value.reason == "no-signer"
