"""The floors and revocations that release managers have signed, as the server reads them."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from tuf.api.metadata import Metadata, Targets

from agent_core.wire import Policy
from release_server import repository

if TYPE_CHECKING:
    from sqlalchemy.orm import Session


def policy_of(session: Session, product: str) -> Policy:
    """The floor and what is revoked, by the newest signed targets."""
    row = repository.newest(session, Targets.type)
    return Policy() if row is None else _policies(row.body).get(f"policy/{product}.json", Policy())


@lru_cache(maxsize=2)
def _policies(body: bytes) -> dict[str, Policy]:
    """The policies in signed targets, by path. Reading these takes longer than all the rest of a `why`."""
    targets = Metadata[Targets].from_bytes(body).signed.targets
    return {
        path: Policy.from_json(found.custom)
        for path, found in targets.items()
        if path.startswith("policy/") and found.custom
    }
