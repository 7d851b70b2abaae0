"""Private keys: key files, passphrases, and the signers made of them.

A key file is JSON. Its public half is in the clear, so that tools can say which key it is without opening
it. The private half is one of three kinds:

- `scrypt-aesgcm`: sealed under a passphrase; what people's keys are.
- `plain`: protected by the file's permissions alone; what the server's online keys are, since a process
  that signs without a person would have to keep the passphrase beside the key anyway.
- `uri`: the key is elsewhere (PKCS#11, a cloud's KMS …) and a `securesystemslib` signer reaches it.

A key file that its group or others can open is refused, not repaired: it may have been read already.
"""

from __future__ import annotations

import json
import os
import stat
import sys
from dataclasses import dataclass
from functools import cache
from hashlib import scrypt
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_public_key
from securesystemslib.exceptions import KeyMismatchError
from securesystemslib.signer import SIGNER_FOR_URI_SCHEME, CryptoSigner, Key, Signer, SSlibKey

from agent_core import secret_file
from agent_core.clock import iso
from agent_core.errors import (
    ConflictError,
    MalformedError,
    NotAllowedError,
    NotFoundError,
    RelfleetError,
    TrustError,
    UsageError,
)
from agent_core.wire import SCHEMA, Getter

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from cryptography.hazmat.primitives.asymmetric.types import PublicKeyTypes
    from securesystemslib.signer import SecretsHandler

KIND = "relfleet-key"
SUFFIX = ".key.json"
SCRYPT_N = 2**15
SCRYPT_R = 8
SCRYPT_P = 1
SCRYPT_MOST = 2**28
"""Bytes of memory that a key file may ask of scrypt; a hostile one could ask for all there is."""
MIN_PASSPHRASE = 8
MAX_FILE = 64 * 1024
STDIN = Path("-")
CREDENTIAL = "relfleet-passphrase"
"""The name of the systemd credential that holds a passphrase (`LoadCredential=relfleet-passphrase:…`)."""


@dataclass(frozen=True)
class KeyFile:
    """What a key file says of its key; the private half stays as it is until `load`."""

    path: Path
    name: str
    role: str
    created: str
    public: SSlibKey
    private: dict[str, Any]

    @property
    def keyid(self) -> str:
        return self.public.keyid

    @property
    def protection(self) -> str:
        return str(self.private["protection"])

    def to_json(self) -> dict[str, Any]:
        """What may be shown of it: everything but the private half."""
        return {
            "name": self.name,
            "role": self.role,
            "keyid": self.keyid,
            "created": self.created,
            "protection": self.protection,
            "keytype": self.public.keytype,
            "scheme": self.public.scheme,
            "public": self.public.keyval["public"],
            "path": str(self.path),
        }


# --- making ----------------------------------------------------------------------------------------------


def create(
    path: Path, *, role: str, now: datetime, passphrase: str | None, scrypt_n: int = SCRYPT_N
) -> CryptoSigner:
    """Make a new ed25519 key and write its file, 0600 and never over another.

    Args:
        path: the new file; its directory is made (0700) when missing.
        role: what the key is for, e.g. `root` or `release`; kept for people and for finding keys.
        passphrase: seals the private half; None writes it plain, for keys of the server only.
        scrypt_n: scrypt's cost, a power of two; tests use a small one.

    Raises:
        ConflictError: the file exists.
        UsageError: the passphrase is too short.
    """
    private_key = Ed25519PrivateKey.generate()
    signer, seed = CryptoSigner(private_key), private_key.private_bytes_raw()
    header = _header(path, role, signer.public_key, now)
    if passphrase is None:
        private: dict[str, Any] = {"protection": "plain", "seed": seed.hex()}
    else:
        private = _seal(seed, passphrase, header, scrypt_n)
    _write_new(path, json.dumps({**header, "private": private}, indent=2).encode() + b"\n")
    return signer


def refer(path: Path, uri: str, public: Key, *, role: str, now: datetime) -> None:
    """Write the file of a key that is elsewhere, so that it is found and used like any other.

    Args:
        uri: of a `securesystemslib` signer; holds no secret.
        public: its public half, as the signer's own library tells it.

    Raises:
        ConflictError: the file exists.
    """
    header = _header(path, role, public, now)
    private = {"protection": "uri", "uri": uri}
    _write_new(path, json.dumps({**header, "private": private}, indent=2).encode() + b"\n")


def _header(path: Path, role: str, public: Key, now: datetime) -> dict[str, Any]:
    return {
        "kind": KIND,
        "schema": SCHEMA,
        "name": path.name.removesuffix(SUFFIX),
        "role": role,
        "created": iso(now),
        "keyid": public.keyid,
        "public": public.to_dict(),
    }


def _seal(seed: bytes, passphrase: str, header: Mapping[str, Any], scrypt_n: int) -> dict[str, Any]:
    if len(passphrase) < MIN_PASSPHRASE:
        raise UsageError(
            "the passphrase is too short",
            why=f"it has {len(passphrase)} characters",
            then=f"use at least {MIN_PASSPHRASE}; several words are easiest",
            reason="short-passphrase",
        )
    salt, nonce = os.urandom(16), os.urandom(12)
    wrap = _stretch(passphrase, salt, scrypt_n, SCRYPT_R, SCRYPT_P)
    return {
        "protection": "scrypt-aesgcm",
        "n": scrypt_n,
        "r": SCRYPT_R,
        "p": SCRYPT_P,
        "salt": salt.hex(),
        "nonce": nonce.hex(),
        "sealed": AESGCM(wrap).encrypt(nonce, seed, _bound(header)).hex(),
    }


def _stretch(passphrase: str, salt: bytes, n: int, r: int, p: int) -> bytes:
    return scrypt(passphrase.encode(), salt=salt, n=n, r=r, p=p, maxmem=2 * SCRYPT_MOST, dklen=32)


def _bound(header: Mapping[str, Any]) -> bytes:
    """What the seal covers beside the seed, so that nobody can pass one key's file off as another's."""
    return json.dumps([KIND, header["role"], header["keyid"]]).encode()


def _write_new(path: Path, body: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConflictError(
            f"{path} exists",
            why="a key is never overwritten",
            then="choose another name",
            reason="key-exists",
        ) from None
    with os.fdopen(descriptor, "wb") as stream:
        os.fchmod(stream.fileno(), 0o600)
        stream.write(body)
        stream.flush()
        os.fsync(stream.fileno())
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# --- reading ---------------------------------------------------------------------------------------------


def read_private_file(path: Path, what: str) -> bytes:
    """Read a file that nobody but its owner may open.

    Args:
        what: names the file in messages, e.g. "the key file".

    Raises:
        NotFoundError: there is none.
        TrustError: its group or others can open it, or it is another user's (`exposed`).
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError:
        raise NotFoundError(f"{what} {path} does not exist", reason="no-file") from None
    except PermissionError:
        raise NotAllowedError(f"{what} {path} cannot be read", why="it belongs to another user") from None
    with stream:
        status = os.fstat(stream.fileno())
        _refuse_exposed(path, what, status)
        body = stream.read(MAX_FILE + 1)
    if len(body) > MAX_FILE:
        raise MalformedError(f"{what} {path} cannot be used", why=f"it is larger than {MAX_FILE} bytes")
    return body


def _refuse_exposed(path: Path, what: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise MalformedError(f"{what} {path} cannot be used", why="it is not a regular file")
    if status.st_mode & 0o077:
        raise TrustError(
            f"{what} {path} is refused",
            why=f"others than its owner can open it (mode {stat.S_IMODE(status.st_mode):04o})",
            then=f"if nobody else can have read it: chmod 600 {path}; otherwise make a new one",
            reason="exposed",
        )
    if status.st_uid not in (os.geteuid(), 0):
        raise TrustError(
            f"{what} {path} is refused",
            why=f"it belongs to user {status.st_uid}, who could exchange it",
            then=f"chown it: sudo chown {os.geteuid()} {path}",
            reason="exposed",
        )


def read(path: Path) -> KeyFile:
    """Read what a key file says of its key, without its passphrase.

    Raises:
        NotFoundError, TrustError: see `read_private_file`.
        MalformedError: it is no key file, or its key id is not that of its key.
    """
    body = read_private_file(path, "the key file")
    try:
        decoded = json.loads(body)
    except ValueError as error:
        raise MalformedError(f"the key file {path} cannot be read", why=str(error)) from None
    get = Getter(decoded, path.name)
    if get.text("kind") != KIND:
        raise get.refuse("kind", f"a key file says {KIND!r}")
    get.integer("schema", low=1, high=SCHEMA)
    private = get.object("private")
    Getter(private, f"{path.name}.private").text("protection")
    public = public_key(get.object("public"), f"{path.name}.public")
    if public.keyid != get.text("keyid"):
        raise get.refuse("keyid", f"the key's own id is {public.keyid}")
    return KeyFile(path, get.text("name"), get.text("role"), get.text("created"), public, private)


def public_key(mapping: object, path: str = "key") -> SSlibKey:
    """Read a public key as `GET /trust` and key files write it; its id is computed, never believed.

    Args:
        mapping: `{keytype, scheme, keyval: {public}}`, or with `public` beside `keytype`.
    """
    get = Getter(mapping, path)
    held = Getter(get.object("keyval"), f"{path}.keyval") if "keyval" in get.mapping else get
    keytype, scheme, material = get.text("keytype"), get.text("scheme"), held.text("public")
    try:
        # Going through the real key normalizes spelling: upper-case hex would be a second id of one key.
        return SSlibKey.from_crypto(_crypto_key(keytype, material), scheme=scheme)
    except (ValueError, TypeError) as error:
        raise MalformedError(f"{path} is not a public key", why=str(error), reason="bad-key") from None


def _crypto_key(keytype: str, material: str) -> PublicKeyTypes:
    if keytype == "ed25519":
        return Ed25519PublicKey.from_public_bytes(bytes.fromhex(material))
    return load_pem_public_key(material.encode())


def key_material(key: Key) -> bytes:
    """The key itself, however it is spelled and whatever id it goes under; equal for equal keys."""
    try:
        spki = _crypto_key(key.keytype, key.keyval["public"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return json.dumps([key.keytype, key.keyval], sort_keys=True).encode()
    return spki.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def find(directory: Path) -> list[KeyFile]:
    """All key files of a directory, by name; none when there is no directory."""
    if not directory.is_dir():
        return []
    return [read(path) for path in sorted(directory.glob(f"*{SUFFIX}"))]


def load(path: Path, passphrase: Callable[[str], str] | None = None) -> Signer:
    """Open a key file and make its signer.

    Args:
        passphrase: called with the words of a prompt when the key is sealed; see `passphrase_source`.

    Raises:
        NotAllowedError: the passphrase is wrong, or there is nobody to ask for it.
        TrustError: the private half is not the one of the public half.
        NotFoundError, MalformedError: see `read`.
    """
    found = read(path)
    if found.protection == "uri":
        return _elsewhere(found, passphrase)
    if found.protection == "plain":
        seed = _unhex(found, "seed")
    elif found.protection == "scrypt-aesgcm":
        seed = _open_seal(found, passphrase)
    else:
        raise MalformedError(f"the key file {path} cannot be used", why=f"protection {found.protection!r}")
    try:
        return CryptoSigner(Ed25519PrivateKey.from_private_bytes(seed), found.public)
    except (KeyMismatchError, ValueError) as error:
        raise TrustError(f"the key file {path} is refused", why=str(error), reason="key-mismatch") from None


def _unhex(found: KeyFile, field: str) -> bytes:
    get = Getter(found.private, f"{found.path.name}.private")
    try:
        return bytes.fromhex(get.text(field))
    except ValueError:
        raise get.refuse(field, "it is not hexadecimal") from None


def _open_seal(found: KeyFile, passphrase: Callable[[str], str] | None) -> bytes:
    get = Getter(found.private, f"{found.path.name}.private")
    n, r, p = get.integer("n", low=2), get.integer("r", low=1, high=64), get.integer("p", low=1, high=16)
    if n & (n - 1) or 128 * n * r > SCRYPT_MOST:
        raise get.refuse("n", "it is not a power of two of a size that fits in memory")
    salt, nonce, sealed = (_unhex(found, field) for field in ("salt", "nonce", "sealed"))
    if passphrase is None:
        raise NotAllowedError(f"the key {found.name} is sealed", why="no passphrase was given")
    wrap = _stretch(passphrase(f"Passphrase of key {found.name}"), salt, n, r, p)
    try:
        return AESGCM(wrap).decrypt(nonce, sealed, _bound({"role": found.role, "keyid": found.keyid}))
    except (InvalidTag, ValueError):
        raise NotAllowedError(
            f"the key {found.name} did not open",
            why="the passphrase is wrong, or the file was changed",
            reason="bad-passphrase",
        ) from None


def _elsewhere(found: KeyFile, passphrase: Callable[[str], str] | None) -> Signer:
    uri = Getter(found.private, f"{found.path.name}.private").text("uri")
    return signer_from_uri(uri, found.public, passphrase)


# --- signers by URI --------------------------------------------------------------------------------------


class KeyFileSigner(CryptoSigner):
    """A signer of a relfleet key file, for URIs `file:PATH`."""

    SCHEME = "file"

    @classmethod
    def from_priv_key_uri(
        cls, priv_key_uri: str, public_key: Key, secrets_handler: SecretsHandler | None = None
    ) -> CryptoSigner:
        path = Path(priv_key_uri.removeprefix("file:").removeprefix("//"))
        signer = load(path, secrets_handler)
        if not isinstance(signer, CryptoSigner):
            raise ValueError(f"{path} does not hold a private key itself")  # noqa: TRY004
        if signer.public_key.keyid != public_key.keyid:
            raise KeyMismatchError(f"{path} holds another key")
        return signer


SIGNER_FOR_URI_SCHEME.setdefault(KeyFileSigner.SCHEME, KeyFileSigner)


def signer_from_uri(
    uri: str, public: Key | None = None, passphrase: Callable[[str], str] | None = None
) -> Signer:
    """Make the signer of any URI that securesystemslib knows, and of `file:PATH` for our key files.

    Args:
        public: the public half; needed for all schemes but `file:`, whose files hold it.

    Raises:
        UsageError: the scheme is unknown, or the public half is missing.
        TrustError: the signer cannot be made, or holds another key.
    """
    scheme, _, rest = uri.partition(":")
    if public is None and scheme == KeyFileSigner.SCHEME:
        return load(Path(rest.removeprefix("//")), passphrase)
    if public is None or scheme not in SIGNER_FOR_URI_SCHEME:
        known = ", ".join(sorted(SIGNER_FOR_URI_SCHEME))
        why = "its public key is not known" if scheme in SIGNER_FOR_URI_SCHEME else f"schemes are {known}"
        raise UsageError(f"there is no signer for {scheme}:", why=why, reason="no-signer")
    try:
        return Signer.from_priv_key_uri(uri, public, passphrase)
    except RelfleetError:
        raise
    except Exception as error:
        # Backends raise what their vendors' libraries raise; whatever it is, there is no signature.
        raise TrustError(
            f"the signer {scheme}: cannot be used", why=f"{type(error).__name__}: {error}", reason="no-signer"
        ) from error


# --- passphrases -----------------------------------------------------------------------------------------


def passphrase_source(
    file: Path | None, environ: Mapping[str, str], ask: Callable[[str], str] | None
) -> Callable[[str], str]:
    """Where passphrases come from; never from a flag's value, which every process on the host can see.

    The first of: the file, RELFLEET_PASSPHRASE_FILE, RELFLEET_PASSPHRASE, the systemd credential
    `relfleet-passphrase`, and `ask`.

    Args:
        file: holds the passphrase in its first line; `-` is stdin, which is read once. Its mode is not looked
            at: container secrets are often readable by all, and without the key file it opens nothing.
        environ: the process's environment.
        ask: prompts a person, or None when there is nobody.

    Returns:
        A function from the words of a prompt to a passphrase; it raises NotAllowedError when there is none.
    """
    from_stdin = cache(lambda: sys.stdin.readline().rstrip("\n"))
    named = file or (Path(text) if (text := environ.get("RELFLEET_PASSPHRASE_FILE")) else None)

    def get(prompt: str) -> str:
        if named == STDIN:
            return from_stdin()
        if named is not None:
            return _first_line(secret_file.read(named, "passphrase"))
        if (said := environ.get("RELFLEET_PASSPHRASE")) is not None:
            return said
        if directory := environ.get("CREDENTIALS_DIRECTORY"):
            credential = Path(directory) / CREDENTIAL
            if credential.is_file():
                return _first_line(secret_file.read(credential, "passphrase"))
        if ask is not None:
            return ask(prompt)
        raise NotAllowedError(
            "a passphrase is needed",
            why="there is no terminal to ask on",
            then="use --passphrase-file FILE, or set RELFLEET_PASSPHRASE",
            reason="no-passphrase",
        )

    return get


def _first_line(text: str) -> str:
    return text.splitlines()[0] if text else ""
