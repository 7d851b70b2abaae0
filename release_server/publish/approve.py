"""The second release manager's half: see for oneself what is proposed, then add a signature and nothing else.

Nothing that the server or the first release manager says is believed: what is current comes through a TUF
client of this machine's own, every new byte is fetched and read as a device would read it, and what changes
is computed here.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_core import clock
from agent_core.errors import ConflictError, NotFoundError, TrustError, UsageError
from agent_core.wire import Reason
from keys import ceremony, changes
from keys.roles import TARGETS
from release_server.publish import propose, push, sign

if TYPE_CHECKING:
    from collections.abc import Callable

    from securesystemslib.signer import Key
    from tuf.api.metadata import Metadata, Targets

    from keys.changes import Change, Listed
    from release_server.publish.client import Client
    from release_server.publish.propose import Manager, Sent
    from release_server.publish.sign import Trusted


@dataclass(frozen=True)
class Review:
    """A proposal that holds every rule, as this machine has found.

    Attributes:
        number: the server's.
        changes: what it changes of what is current.
        verified: the bundles that were fetched and read whole.
        signed: the release keys that have signed it, by id.
        missing: how many more signatures it needs.
    """

    number: int
    trusted: Trusted
    metadata: Metadata[Targets]
    changes: list[Change]
    verified: list[Listed]
    signed: dict[str, Key]
    missing: int


def choose(client: Client, number: int | None) -> int:
    """The proposal to look at: the one that was named, or the only one that waits.

    Raises:
        NotFoundError: none waits.
        UsageError: several do.
    """
    if number is not None:
        return number
    waiting = [int(entry["id"]) for entry in client.items("/proposals")]
    if not waiting:
        raise NotFoundError("no proposal waits for a signature", then="release approve --list --all")
    if len(waiting) > 1:
        numbers = ", ".join(map(str, sorted(waiting)))
        raise UsageError(f"{len(waiting)} proposals wait", why=numbers, then="release approve ID")
    return waiting[0]


def review(manager: Manager, number: int, progress: Callable[[str], None] = lambda _name: None) -> Review:
    """Fetch a proposal with every new bundle, and hold it to every rule.

    Args:
        progress: told the name of each bundle before it is fetched.

    Raises:
        ConflictError: it is not made from what is current, or its version jumps.
        TrustError: it drops or changes what was published, is signed by no release key, delegates elsewhere,
            lowers a floor, or a bundle is not what is signed of it.
        NotFoundError: there is no such proposal.
    """
    trusted = manager.look()
    metadata = propose.fetch_proposal(manager.client, number)
    root = trusted.root.signed
    changes.check_version(TARGETS, trusted.version, metadata.signed.version)
    ceremony.check_targets(metadata.signed, root)
    fresh = changes.check_successor(trusted.targets.signed, metadata.signed, clock.now())
    signed = ceremony.signed_by(root, TARGETS, metadata)
    if not signed:
        raise TrustError(
            f"proposal {number} is refused",
            why="no release key of the trusted root has signed it",
            reason=Reason.BAD_SIGNATURE,
        )
    for entry in fresh:
        progress(entry.name)
        verify_bundle(manager.client, number, entry)
    return Review(
        number,
        trusted,
        metadata,
        changes.changes(trusted.targets.signed, metadata.signed),
        fresh,
        signed,
        ceremony.missing_signatures(root, TARGETS, metadata),
    )


def verify_bundle(client: Client, number: int, entry: Listed) -> None:
    """Fetch one proposed bundle with its index, and read all of it as a device would.

    Raises:
        TrustError: `length-mismatch`, `digest-mismatch`, `bad-index` or `bad-archive`.
    """
    facts = entry.facts
    with tempfile.TemporaryDirectory(prefix="relfleet-approve-") as place:
        stem = Path(place) / f"{facts.product}-{facts.version}-{facts.platform}"
        archive = stem.with_name(f"{stem.name}.tar.zst")
        index = stem.with_name(f"{stem.name}.index.json")
        _fetch(client, number, archive, entry.sha256, entry.length)
        _fetch(client, number, index, facts.index_sha256, facts.index_length)
        found = push.load(archive).facts
    said = replace(facts, seq=found.seq, gates=(), notes="", upgrade_from_seq=0, barrier=False)
    if found != said:
        raise TrustError(
            f"the bundle of {entry.name} is refused",
            why="it is not what is signed of it",
            then="ask who proposed it; withdraw it: release withdraw ID",
            reason=Reason.BAD_INDEX,
        )


def _fetch(client: Client, number: int, file: Path, digest: str, length: int) -> None:
    found = sha256()
    with file.open("wb") as stream:

        def keep(chunk: bytes) -> None:
            found.update(chunk)
            stream.write(chunk)

        client.download(f"/proposals/{number}/blobs/{digest}", length, keep)
    if found.hexdigest() != digest:
        raise TrustError(
            f"{file.name} is refused",
            why=f"its sha256 is {found.hexdigest()[:12]}, signed is {digest[:12]}",
            reason=Reason.DIGEST_MISMATCH,
        )


def approve(manager: Manager, seen: Review, opened: list[Any], wait_s: float) -> Sent:
    """Sign what was reviewed and send the signatures, nothing else; at the threshold the server publishes.

    Raises:
        ConflictError: somebody published something else meanwhile, or withdrew this.
        NotAllowedError: the same person has signed already.
    """
    targets = seen.metadata.signed
    answer: dict[str, Any] = {}
    for signer in opened:
        signature = signer.sign(seen.metadata.signed_bytes)
        body = {"keyid": signature.keyid, "sig": signature.signature}
        answer = manager.client.post(f"/proposals/{seen.number}/signatures", body)
    sent = propose.Sent(propose.STAGED, targets.version, clock.iso(targets.expires), answer)
    if answer.get("state") != propose.PUBLISHED:
        return sent
    published = propose.wait_published(manager.look, targets, wait_s)
    return replace(sent, state=propose.PUBLISHED if published else propose.ACCEPTED)


def open_keys(directory: Path, seen: Review, passphrase: Callable[[str], str]) -> list[Any]:
    """The release keys of this machine that may still sign what was reviewed.

    Raises:
        ConflictError: `signed-already`.
        NotAllowedError: there is none here.
    """
    if not seen.missing:
        raise ConflictError(f"proposal {seen.number} is signed by enough people", reason="signed-already")
    return sign.release_signers(directory, seen.trusted.root.signed, passphrase, signed=seen.signed)
