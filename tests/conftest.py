"""What holds for every test: loopback only, and no deadline that a busy machine could miss."""

from __future__ import annotations

import ipaddress
import socket

import pytest
from hypothesis import settings

settings.register_profile("relfleet", deadline=None)
settings.load_profile("relfleet")

_connect = socket.socket.connect


def _only_loopback(self: socket.socket, address: object) -> None:
    if self.family in (socket.AF_INET, socket.AF_INET6):
        host = address[0]  # type: ignore[index]
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise AssertionError(f"a test tried to reach {host}: tests use loopback only")
    _connect(self, address)  # type: ignore[arg-type]


@pytest.fixture(autouse=True, scope="session")
def _loopback_only():
    socket.socket.connect = _only_loopback
    yield
    socket.socket.connect = _connect
