"""Signs releases where there is no network: what is current came on a stick, what is signed leaves on one.

The next targets travel as a file. Each holder of a key makes or verifies it from the root that is trusted on
that machine; whoever carries it can lose signatures and add none, and the server verifies it once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent_core.errors import ConflictError, TrustError
from keys import ceremony, changes
from release_server.publish import export, sign
from release_server.publish.sign import Trusted

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime
    from pathlib import Path

    from tuf.api.metadata import Metadata, Targets

    from release_server.publish.sign import Release


def trusted(directory: Path, trust: bytes, now: datetime) -> Trusted:
    """What a copy of the server's metadata says, verified from the trusted root on.

    Raises:
        NotFoundError, TrustError: as of `export.from_directory`.
    """
    source = export.from_directory(directory, trust, now)
    return Trusted(
        ceremony.parse_root(source.roots[max(source.roots)]), ceremony.parse_targets(source.targets)
    )


def make(current: Trusted, releases: Sequence[Release], now: datetime) -> Metadata[Targets]:
    """The next targets with these releases added, not signed yet.

    Raises:
        ConflictError: `already`, all of them are published; or one is, with other bytes.
    """
    fresh = [release for release in releases if not sign.is_published(current.targets.signed, release)]
    if not fresh:
        raise ConflictError("these bundles are published already", reason="already")
    return sign.with_releases(current, fresh, now)


def check(current: Trusted, following: Metadata[Targets], releases: Sequence[Release], now: datetime) -> None:
    """Hold next targets that came in a file to the rules, and to the bundles at hand and no others.

    Raises:
        ConflictError: `old-base` or `version-jump`; something else was published since they were made.
        TrustError: a rule is broken, or what they add is not what is here.
    """
    fresh = changes.check_successor(current.targets.signed, following.signed, now)
    ceremony.check_targets(following.signed, current.root.signed)
    added = {entry.path for entry in fresh}
    here = {release.target for release in releases if sign.is_published(following.signed, release)}
    if not added or not added <= here:
        others = ", ".join(sorted(added - here)) or "nothing"
        raise TrustError(
            "the signed file is refused",
            why=f"it adds {others}, which is not among the bundles here",
            then="name every bundle that was signed",
            reason="other-bundles",
        )
