"""Publishes a release: check, sign, upload, and wait until agents could see it.

Order is what makes a cut push harmless: blobs go first, under their digests, where nobody looks for them; the
signed targets go last and make everything visible at once. Running the same command again finishes whatever
is left, because each step first asks what is there already.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from agent_core import bundle, clock, console
from agent_core.errors import (
    ConflictError,
    NotFoundError,
    RelfleetError,
    TrustError,
    UnreachableError,
    UsageError,
)
from agent_core.wire import Reason
from keys import changes
from release_server.publish import offline, propose, sign
from release_server.publish.build import open_bundle
from release_server.publish.deltas import Workshop
from release_server.publish.export import download
from release_server.publish.sign import Blob, Release, Trusted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from tuf.api.metadata import Metadata, Targets

    from release_server.publish.client import Client

CHUNK = 8 * 2**20
STALLS = 6
"""How many answers in a row may be lost without a byte of progress before an upload gives up."""
PUBLISH_S = propose.PUBLISH_S
POLL_S = propose.POLL_S
SETTLE_S = 5.0
"""How long to look whether a conflict was with ourselves: an earlier try that the server had taken."""
GATE = {"soak_s": 1800, "max_failed_bp": 100, "min_sample": 1, "deadline_s": 7200}
DEFAULT_STAGES = tuple({"share_bp": share, **GATE} for share in (100, 1000, 5000, 10_000))
"""What `rollout start` takes when nothing is said."""
ENDED = frozenset({"completed", "aborted", "rolled_back", "superseded"})


class Progress(Protocol):
    """Told how far an upload is."""

    def __call__(self, name: str, done: int, total: int) -> None: ...


def _silent(name: str, done: int, total: int) -> None:
    """Nobody watches."""


@dataclass
class Outcome:
    """What a push did.

    Attributes:
        state: `published`, `already` (it was there before), `accepted` (taken, published any moment now),
            `staged` (others have to sign it first), or `dry-run`.
        targets_version: the version of targets that lists it; the one that would, in a dry run.
        left_behind: barriers, and the platforms of earlier releases that have no bundle of them.
    """

    product: str
    version: str
    seq: int
    state: str
    targets_version: int
    bundles: list[dict[str, Any]] = field(default_factory=list)
    deltas: list[dict[str, Any]] = field(default_factory=list)
    uploaded: int = 0
    left_behind: dict[str, list[str]] = field(default_factory=dict)
    proposal: dict[str, Any] | None = None
    rollout: dict[str, Any] | None = None


def load(
    archive: Path,
    *,
    gates: Sequence[str] = (),
    upgrade_from_seq: int = 0,
    notes: str = "",
    barrier: bool = False,
) -> Release:
    """Read a bundle and check it as a device would; its seq is set when it is signed.

    Raises:
        TrustError: archive and index do not belong together, or one of them is not what it should be.
    """
    built = open_bundle(archive)
    digest = bundle.verify(archive, built.index)
    if digest != built.sha256:
        raise TrustError(f"{archive} changed while it was read", reason=Reason.DIGEST_MISMATCH)
    facts = built.facts(
        1, gates=tuple(gates), upgrade_from_seq=upgrade_from_seq, notes=notes, barrier=barrier
    )
    return Release(
        facts,
        Blob(built.archive, built.sha256, built.length),
        Blob(built.index_file, built.index_sha256, len(built.index_bytes)),
    )


def push(
    client: Client,
    releases: Sequence[Release],
    *,
    trust: bytes,
    state: Path,
    signers: Callable[[Trusted], Sequence[Any]],
    signed: Metadata[Targets] | None = None,
    dry_run: bool = False,
    wait_s: float = PUBLISH_S,
    must_publish: bool = False,
    wait_for_others: bool = False,
    deltas: int = 0,
    progress: Progress = _silent,
) -> Outcome:
    """Publish the bundles of one version.

    Args:
        releases: one for each platform, as `load` made them.
        trust: the first root, from `sign.read_trust`.
        state: where verified metadata is remembered.
        signers: opens the release keys; called only when there is something to sign, before any upload.
        signed: the next targets, signed elsewhere; nothing is signed here then, and no delta made. Where the
            same targets are proposed already, its signatures are added to those.
        wait_s: how long to wait until the server has published it.
        must_publish: still unpublished after that is an error, not a note.
        wait_for_others: wait as well when other people have to sign first.
        deltas: from how many of the newest earlier releases to make deltas.

    Raises:
        ConflictError: the version exists with other bytes, somebody else published meanwhile, or
            `proposed-otherwise`.
        TrustError: the bundle, or what the server serves, is not what it should be.
        NotAllowedError: no release key here, or the token lacks the role.
        UnreachableError: the server does not answer; the same command continues where this one stopped.
    """
    product, version = _one_version(releases)
    cache = sign.cache_dir(state, client.url, trust)
    trusted = sign.fetch(client, trust, cache)
    missing = [release for release in releases if not sign.is_published(trusted.targets.signed, release)]
    outcome = _outcome(releases, trusted, product, version)
    if missing and signed is not None:
        offline.check(trusted, signed, missing, clock.now())
    planned = signed or sign.with_releases(trusted, missing, clock.now()) if missing else trusted.targets
    outcome.left_behind = changes.beside_barriers(planned.signed.targets, product)
    if not missing or dry_run:
        outcome.state = "dry-run" if missing else "already"
        outcome.targets_version += 1 if missing else 0
        return outcome

    def look() -> Trusted:
        return sign.fetch(client, trust, cache)

    outcome.targets_version = trusted.version + 1
    joined = propose.join(client, trusted, signed, lambda targets: _holds(targets, missing))
    if joined is None:
        opened = signers(trusted) if signed is None else ()
        ensure_product(client, product)
        blobs = [blob for release in missing for blob in (release.archive, release.index)]
        with tempfile.TemporaryDirectory(prefix="relfleet-push-") as place:
            workshop = Workshop(state / "bundles", Path(place), download(client, None))
            with_deltas = deltas and signed is None
            made = workshop.make(trusted.targets.signed, missing, deltas) if with_deltas else []
            blobs += [delta.blob for delta in made]
            outcome.uploaded = sum(upload(client, blob, progress) for blob in blobs)
        metadata = signed or sign.with_releases(trusted, missing, clock.now(), made)
        outcome.deltas = [{"from": delta.facts.from_version, "length": delta.blob.length} for delta in made]
        try:
            sent = propose.deliver(client, trusted, metadata, opened)
            joined = sent.state, sent.proposal
        except (ConflictError, UnreachableError) as error:
            return _settle(outcome, releases, look, error)
    outcome.state, outcome.proposal = joined
    if outcome.proposal and not wait_for_others:
        return outcome
    if wait_published(look, releases, wait_s):
        outcome.state = propose.PUBLISHED
    elif must_publish or wait_for_others:
        raise _not_yet(client.url, wait_s, outcome)
    return outcome


def _holds(targets: Targets, releases: Sequence[Release]) -> bool:
    """Whether a proposal holds these very bundles; other bytes under their version are a conflict."""
    return all(sign.is_published(targets, release) for release in releases)


def _one_version(releases: Sequence[Release]) -> tuple[str, str]:
    names = {(release.facts.product, release.facts.version) for release in releases}
    if len(names) != 1:
        raise UsageError(
            "these bundles are not of one version",
            why=", ".join(sorted(f"{product} {version}" for product, version in names)) or "there is none",
            then="push each version by itself",
        )
    platforms = [release.facts.platform for release in releases]
    if len(set(platforms)) < len(platforms):
        raise UsageError("two bundles are for the same platform", why=", ".join(sorted(platforms)))
    return names.pop()


def _outcome(releases: Sequence[Release], trusted: Trusted, product: str, version: str) -> Outcome:
    bundles = [
        {
            "platform": release.facts.platform,
            "sha256": release.archive.sha256,
            "length": release.archive.length,
            "index_sha256": release.index.sha256,
        }
        for release in releases
    ]
    seq = sign.next_seq(trusted.targets.signed, product, version)
    return Outcome(product, version, seq, "", trusted.version, bundles)


def _settle(
    outcome: Outcome, releases: Sequence[Release], look: Callable[[], Trusted], error: RelfleetError
) -> Outcome:
    """Find out whether a refusal or a lost answer was for a push that had gone through all the same."""
    if wait_published(look, releases, SETTLE_S, outcome.targets_version):
        outcome.state = "published"
        return outcome
    if isinstance(error, ConflictError):
        raise ConflictError(
            "someone else published meanwhile",
            why=error.what,
            then="run the same command again; what was uploaded is kept",
            reason=error.reason,
        ) from error
    raise error


def _not_yet(server: str, wait_s: float, outcome: Outcome) -> UnreachableError:
    if outcome.proposal:
        number, missing = outcome.proposal["id"], outcome.proposal["missing"]
        return UnreachableError(
            f"nobody has approved {outcome.version} within {wait_s:.0f} s",
            why=f"proposal {number} waits for {missing} more signature(s)",
            then=f"on another release manager's machine: release approve {number}",
            reason="not-approved",
        )
    return UnreachableError(
        f"{server} has taken the release but not published it within {wait_s:.0f} s",
        why="its jobs process signs what is published; it may be down or behind",
        then="run the same command again to go on waiting",
        reason="not-published",
    )


def wait_published(
    look: Callable[[], Trusted], releases: Sequence[Release], wait_s: float, version: int | None = None
) -> bool:
    """Wait until verified targets list these bundles; False when the time was up first.

    A server that is away or between two versions is asked again; one that serves what it should not raises.

    Args:
        version: targets of this version or later that do not list them are an answer, too.
    """
    until = clock.boot_s() + wait_s
    pause_s = POLL_S
    while True:
        try:
            targets = look().targets.signed
            if all(sign.is_published(targets, release) for release in releases):
                return True
            if version is not None and targets.version >= version:
                return False
        except (UnreachableError, NotFoundError):
            pass
        if clock.boot_s() + pause_s > until:
            return False
        time.sleep(pause_s)
        pause_s = min(2.0, pause_s * 1.5)


def ensure_product(client: Client, product: str) -> None:
    """Make the product known to the server if it is not."""
    if any(entry.get("name") == product for entry in client.items("/products")):
        return
    with suppress(ConflictError):  # somebody else was first
        client.post("/products", {"name": product})


# --- uploads -----------------------------------------------------------------------------------------------


def upload(client: Client, blob: Blob, progress: Progress = _silent) -> int:
    """Bring a file to the server, from wherever an earlier try stopped.

    Returns:
        How many bytes were sent; 0 when the server had it all.

    Raises:
        TrustError: what arrived is not what the digest says, even when sent anew from the start.
        UnreachableError: the server does not answer any more.
    """
    try:
        return _upload(client, blob, progress)
    except TrustError as error:
        if error.reason != Reason.DIGEST_MISMATCH:
            raise
    # The part that was there already was of something else; the server has dropped it. Once more, from 0.
    return _upload(client, blob, progress)


def _upload(client: Client, blob: Blob, progress: Progress) -> int:
    sent = stalls = 0
    offset = offset_of(client, blob)
    if offset == blob.length:
        return 0
    progress(blob.path.name, offset, blob.length)
    with blob.path.open("rb") as stream:
        while offset < blob.length:
            stream.seek(offset)
            chunk = stream.read(min(CHUNK, blob.length - offset))
            if not chunk:
                raise TrustError(f"{blob.path} changed while it was uploaded", reason=Reason.LENGTH_MISMATCH)
            after = _send(client, blob, offset, chunk)
            stalls = 0 if after is not None and after > offset else stalls + 1
            if stalls > STALLS:
                raise UnreachableError(
                    f"the upload of {blob.path.name} does not get on",
                    why=f"{offset} of {blob.length} bytes are there after {stalls} tries",
                    then="run the same command again; it goes on from there",
                )
            sent += len(chunk) if after is not None else 0
            offset = offset_of(client, blob) if after is None else after
            progress(blob.path.name, offset, blob.length)
    return sent


def offset_of(client: Client, blob: Blob) -> int:
    """How many bytes of a file the server has; all of them when it is complete."""
    answer = client.call("HEAD", f"/uploads/{blob.sha256}", accept=frozenset({404}))
    if answer.status_code == 404:
        return 0
    if answer.headers.get("Upload-Complete") == "1":
        return blob.length
    return _offset(answer.headers, blob)


def _send(client: Client, blob: Blob, offset: int, chunk: bytes) -> int | None:
    """Send one chunk; the new offset, or None when the answer was lost and the server must be asked."""
    said = {
        "Upload-Offset": str(offset),
        "Upload-Length": str(blob.length),
        "Content-Type": "application/octet-stream",
    }
    try:
        answer = client.call(
            "PATCH", f"/uploads/{blob.sha256}", data=chunk, headers=said, accept=frozenset({409})
        )
    except UnreachableError:
        return None
    return _offset(answer.headers, blob)


def _offset(headers: Mapping[str, str], blob: Blob) -> int:
    try:
        offset = int(headers["Upload-Offset"])
    except (KeyError, ValueError):
        raise RelfleetError("the server did not say how much it has", reason=Reason.BAD_ANSWER) from None
    if not 0 <= offset <= blob.length:
        raise RelfleetError(
            "the server says it has more than there is",
            why=f"{offset} of {blob.length} bytes",
            reason=Reason.BAD_ANSWER,
        )
    return offset


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on a terminal; elsewhere one line a file, and nothing under -q."""
    import sys

    options = console.options()
    if options.quiet or not sys.stderr.isatty():
        yield _line
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    shown = Console(stderr=True, no_color=options.no_color or None)
    with Progress(*columns, console=shown, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        yield show


def _line(name: str, done: int, total: int) -> None:
    if done == total:
        console.say(f"uploaded {name} ({size(total)})")


def size(length: int) -> str:
    """Bytes as people read them."""
    amount = float(length)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000 or unit == "GB":
            return f"{length} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("GB is the last unit")


# --- rollouts ----------------------------------------------------------------------------------------------


LOOKED_AT = 100
"""The newest so many rollouts are looked at for one that is under way."""


def start_rollout(
    client: Client, product: str, version: str, cohort: str, *, reason: str = ""
) -> dict[str, Any]:
    """Start a rollout in the default stages, or find the one of this version that is under way."""
    for entry in client.items("/rollouts", product=product, cohort=cohort, limit=LOOKED_AT):
        if entry.get("version") == version and entry.get("state") not in ENDED:
            return entry
    body = {
        "product": product,
        "cohort": cohort,
        "version": version,
        "stages": list(DEFAULT_STAGES),
        "reason": reason,
    }
    started: dict[str, Any] = client.post("/rollouts", body)
    return started
