"""Takes releases from a file that a person brought, where the server is out of reach.

The same check runs as for the server's word (`poll.check_file`). This module makes the file answer as a
server would, writes the directive that the person's wish amounts to, and keeps what the file brought: so no
later file is older, and a version that came by hand can verify for itself that it is signed.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from agent_core import disk
from agent_core import layout as durable
from agent_core.errors import NotFoundError
from agent_core.release_file import MAX_TARGETS, TARGETS
from agent_core.wire import PROGRESS_FULL, Directive
from updater import notes
from updater.transport import MAX_ANSWER, Answer, Stream

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from agent_core.layout import Layout
    from agent_core.release_file import ReleaseFile
    from updater.device import Device

SALT = "file"
"""Stands where a rollout's salt would, in attempts and reports: no rollout asked, a person did."""


class FileOrigin:
    """A release file in the place of a server (`transport.Origin`)."""

    def __init__(self, file: ReleaseFile) -> None:
        self._file = file

    def get(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        max_length: int = MAX_ANSWER,
        deadline_s: float = 0.0,
    ) -> Answer:
        """Answer from the file: 200, or 404 for metadata that it does not hold.

        Raises:
            NotFoundError: `no-bundle`, the release is signed for this host and the file has it for others.
            TrustError: as of `ReleaseFile.read`.
        """
        content = self._file.read(path.lstrip("/"), max_length)
        if content is None:
            self._refuse_absent(path)
        return Answer(404, {}, b"") if content is None else Answer(200, {}, content)

    @contextmanager
    def open(
        self, path: str, headers: Mapping[str, str] | None = None, *, deadline_s: float | None = None
    ) -> Iterator[Stream]:
        name = path.lstrip("/")
        length = self._file.length(name)
        if length is None:
            self._refuse_absent(path)
            yield Stream(404, {}, 0, iter(()))
        else:
            yield Stream(200, {}, length, self._file.pieces(name))

    def _refuse_absent(self, path: str) -> None:
        if path.startswith("/targets/"):
            title = self._file.title
            raise NotFoundError(
                "the file holds no bundle for this host",
                why=f"it has {title.product} {title.version} for {', '.join(title.platforms)}",
                then=f"release export {title.version} on a machine that reaches the server",
                reason="no-bundle",
            )


class KeptOrigin:
    """The targets that the last file brought, answered as a file would."""

    def __init__(self, targets: bytes) -> None:
        self._answers = {f"/{TARGETS}": targets}

    def get(
        self,
        path: str,
        headers: Mapping[str, str] | None = None,
        *,
        max_length: int = MAX_ANSWER,
        deadline_s: float = 0.0,
    ) -> Answer:
        content = self._answers.get(path)
        return Answer(404, {}, b"") if content is None else Answer(200, {}, content)

    @contextmanager
    def open(
        self, path: str, headers: Mapping[str, str] | None = None, *, deadline_s: float | None = None
    ) -> Iterator[Stream]:
        yield Stream(404, {}, 0, iter(()))


def keep(layout: Layout, targets: bytes) -> None:
    """Keep verified targets of a file; `kept` gives them back."""
    file = layout.file_targets
    notes.replace(file, lambda: durable.write_durable(file, targets))


def kept(layout: Layout) -> bytes | None:
    """What the last file brought; None when there was none, or it cannot be read."""
    try:
        content = disk.read_file(layout.file_targets)
    except OSError:
        return None
    return content if len(content) <= MAX_TARGETS else None


def directive(device: Device, version: str, *, older: bool) -> Directive:
    """What a person says by installing a file: this version, on this host, now.

    Args:
        older: the person allows a version older than the one that runs.
    """
    seen = device.seen()
    return Directive(
        product=device.identity.product,
        cohort=device.identity.cohort or SALT,
        release=version,
        base=version,
        progress=PROGRESS_FULL,
        salt=SALT,
        revision=0,
        rollback=older,
        retry_epoch=seen.directive.retry_epoch if seen else 0,
    )
