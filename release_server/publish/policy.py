"""What a floor and a revocation are: from versions to seqs, and from one policy to the next."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from agent_core.errors import ConflictError, NotFoundError
from agent_core.wire import Reason
from keys import changes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tuf.api.metadata import TargetFile

    from agent_core.wire import Policy

    Files = Mapping[str, TargetFile]


def seq_of(files: Files, product: str, version: str) -> int:
    """The seq of a published version.

    Raises:
        NotFoundError: it was never published.
    """
    for seq, known in changes.versions_by_seq(files, product).items():
        if known == version:
            return seq
    raise NotFoundError(f"{product} has no release {version}", then=f"release list --product {product}")


def with_floor(policy: Policy, seq: int, version: str) -> Policy:
    """The policy with its floor at `seq`.

    Raises:
        ConflictError: `below-floor`; the floor is higher already, and agents remember it.
    """
    if seq < policy.floor_seq:
        raise ConflictError(
            f"the floor cannot be {version}",
            why=f"it is at seq {policy.floor_seq} already, {version} has seq {seq}, and floors never fall",
            then="to bring an old state back, publish it as a new version",
            reason=Reason.BELOW_FLOOR,
        )
    return replace(policy, floor_seq=seq)


def with_revoked(policy: Policy, seqs: Iterable[int]) -> Policy:
    return replace(policy, revoked_seq=tuple(sorted({*policy.revoked_seq, *seqs})))


def without_revoked(policy: Policy, seqs: Iterable[int]) -> Policy:
    return replace(policy, revoked_seq=tuple(sorted({*policy.revoked_seq} - {*seqs})))


def forbidden(files: Files, product: str, policy: Policy) -> list[str]:
    """The published versions that a policy forbids, the oldest first."""
    return [
        version
        for seq, version in sorted(changes.versions_by_seq(files, product).items())
        if changes.forbids(policy, seq)
    ]


def newly_forbidden(files: Files, product: str, before: Policy, after: Policy) -> list[str]:
    """The published versions that the second policy forbids and the first does not."""
    known = set(forbidden(files, product, before))
    return [version for version in forbidden(files, product, after) if version not in known]


def released_barriers(before: Files, after: Files, product: str) -> list[str]:
    """The barriers that bind by the first targets and not by the second ones, the oldest first."""
    kept = changes.barriers(after, product)
    return [version for seq, version in sorted(changes.barriers(before, product).items()) if seq not in kept]
