"""Looks at TLS certificates: the one in a file, and the one that an address shows."""

from __future__ import annotations

import socket
import ssl
from datetime import timedelta
from typing import TYPE_CHECKING

from cryptography import x509

from release_server import tls

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

LOOK_S = 5.0
NEAR = timedelta(days=21)


def of_file(path: Path) -> x509.Certificate:
    """The first certificate of a PEM file, which is the server's own; its chain follows.

    Raises:
        OSError, ValueError: it cannot be read, or is none.
    """
    return x509.load_pem_x509_certificates(path.read_bytes())[0]


def shown_at(host: str, port: int) -> x509.Certificate:
    """What a server shows to whoever connects; whether to believe it is not asked.

    Raises:
        OSError: nobody answers there, or not with TLS.
    """
    with (
        socket.create_connection((host, port), timeout=LOOK_S) as connection,
        tls.unverified().wrap_socket(connection, server_hostname=host) as spoken,
    ):
        shown = spoken.getpeercert(binary_form=True)
    if shown is None:
        raise ssl.SSLError("no certificate was shown")
    return x509.load_der_x509_certificate(shown)


def is_near_its_end(certificate: x509.Certificate, now: datetime) -> bool:
    """Whether it should have been renewed: three weeks are left, or a quarter of a life that is shorter."""
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return ends - now < min(NEAR, (ends - begins) / 4)
