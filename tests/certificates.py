"""A private certificate authority for tests that speak TLS on loopback."""

from __future__ import annotations

import ipaddress
import ssl
from datetime import timedelta
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from agent_core import clock

if TYPE_CHECKING:
    from pathlib import Path


class Authority:
    """Its certificate lies in `file`; `issue` makes a server's, for 127.0.0.1 unless said."""

    def __init__(self, directory: Path, name: str = "test authority") -> None:
        self.directory = directory
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.certificate = _certificate(name, self.key)
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(self.certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        name: str,
        *,
        address: str = "127.0.0.1",
        since: timedelta = timedelta(hours=1),
        left: timedelta = timedelta(hours=1),
    ) -> tuple[Path, Path]:
        """The certificate's file and the key's; it holds for as long as is left."""
        key = ec.generate_private_key(ec.SECP256R1())
        made = _certificate(name, key, self, address, since=since, left=left)
        files = (self.directory / f"{name}.pem", self.directory / f"{name}.key")
        files[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
        files[1].write_bytes(pem(key))
        files[1].chmod(0o600)
        return files


def shown(files: tuple[Path, Path]) -> ssl.SSLContext:
    """How a server shows a certificate, of what `issue` made."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    return context


def pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    plain = serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    by: Authority | None = None,
    address: str = "",
    *,
    since: timedelta = timedelta(hours=1),
    left: timedelta = timedelta(hours=1),
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = clock.now()
    issuer_key = by.key if by else key
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(by.certificate.subject if by else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - since)
        .not_valid_after(now + left)
        .add_extension(x509.BasicConstraints(ca=by is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()),
            critical=False,
        )
    )
    if by is None:
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        builder = builder.add_extension(usage, critical=True)
    else:
        names = [x509.IPAddress(ipaddress.ip_address(address))]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())
