"""This module lets securesystemslib be loaded without the signers that hardly any process uses.

The library imports its signers for clouds, OpenPGP and tokens when the first key is read. An agent signs with
none of them, and each release command with one at most; where the library of PKCS#11 is installed they cost
more than all the rest of the library. Here each is loaded when somebody first asks it for something.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

PACKAGE = "securesystemslib.signer"
LATE: dict[str, dict[str, str]] = {
    "_aws_signer": {"AWSSigner": "awskms"},
    "_azure_signer": {"AzureSigner": "azurekms"},
    "_gcp_signer": {"GCPSigner": "gcpkms"},
    "_gpg_signer": {"GPGKey": "", "GPGSigner": "gnupg"},
    "_hsm_signer": {"HSMSigner": "hsm"},
    "_sigstore_signer": {"SigstoreKey": "", "SigstoreSigner": "sigstore"},
    "_tkey_signer": {"TKeySigner": "tkey"},
    "_vault_signer": {"VaultSigner": "hv"},
}
"""Module, the classes that the package takes from it, and the scheme of each one's addresses."""


class _Late(type):
    """A class that stands for one of the library's, and hands it whatever it is asked."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(_real(cls), name)

    def __call__(cls, *args: Any, **options: Any) -> Any:
        return _real(cls)(*args, **options)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _real(cls))


def _real(stand_in: type) -> Any:
    import importlib

    found = sys.modules.get(stand_in.__module__)
    if isinstance(found, _StandIn):
        del sys.modules[stand_in.__module__]
    return getattr(importlib.import_module(stand_in.__module__), stand_in.__name__)


class _StandIn(ModuleType):
    """A module of which only the names are there."""


def stand_in() -> None:
    """Put the stand-ins where the library will look, unless it is loaded already."""
    if PACKAGE in sys.modules:
        return
    for name, classes in LATE.items():
        module = _StandIn(f"{PACKAGE}.{name}")
        for title, scheme in classes.items():
            facts = {"__module__": module.__name__} | ({"SCHEME": scheme} if scheme else {})
            setattr(module, title, _Late(title, (), facts))
        sys.modules.setdefault(module.__name__, module)


stand_in()
