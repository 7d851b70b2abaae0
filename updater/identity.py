"""Who this agent is: its identity file, its private key, and the counter that makes a signature good once."""

from __future__ import annotations

import errno
import fcntl
import os
from contextlib import contextmanager, suppress
from dataclasses import field
from typing import TYPE_CHECKING, Any, Self

from agent_core import clock, disk, layout, wire
from agent_core.errors import DiskError, MalformedError, NotAllowedError, NotFoundError, RelfleetError
from agent_core.late import late_dataclass
from agent_core.wire import SCHEMA, Getter, Reason
from updater import notes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from agent_core.layout import Layout

COUNTER_DIGITS = 20
HIGHEST_COUNTER = 2**52
_NO_IDENTITY = frozenset({errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.EFBIG})
"""What the disk says of a directory, a link in a circle, a socket, or more than was ever written here."""


@late_dataclass(frozen=True)
class Identity:
    """What enrolment settled; the key stands apart, in `state/agent.key`.

    Attributes:
        server: base address of the release server.
        cohort: as the server last said, None while no cohort matches.
        gate: set on this host and never by the server; empty lets every release through.
        enrolled: the server knows this agent; False where none could be asked yet.
        standing: `pending` until an operator accepts it, `retired` once the server says so, else empty.
    """

    server: str
    product: str
    agent_id: str
    platform: str
    cohort: str | None = None
    gate: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    enrolled: bool = True
    standing: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "server": self.server,
            "product": self.product,
            "agent_id": self.agent_id,
            "platform": self.platform,
            "cohort": self.cohort,
            "gate": self.gate,
            "labels": dict(self.labels),
            "enrolled": self.enrolled,
            "standing": self.standing,
        }

    @classmethod
    def from_json(cls, body: object, path: str = "identity") -> Self:
        get = Getter(body, path)
        get.integer("schema", low=1, high=SCHEMA)
        return cls(
            server=get.text("server"),
            product=get.text("product", form=wire.NAME),
            agent_id=get.text("agent_id", form=wire.AGENT_ID),
            platform=get.text("platform", form=wire.PLATFORM),
            cohort=get.optional_text("cohort", form=wire.NAME),
            gate=get.text("gate", ""),
            labels=get.labels("labels"),
            enrolled=get.boolean("enrolled", True),
            standing=get.text("standing", ""),
        )


NOBODY = Identity(server="", product="", agent_id="", platform="")
"""Stands for an identity that cannot be read: a host that cannot tell who it is runs what it has, no more."""


def load(paths: Layout) -> Identity:
    """Read this host's identity; where the file is damaged or lost, from its copy.

    Raises:
        NotFoundError: it has not been enrolled.
        MalformedError: neither can be used, and none of the two holds an identity any more.
        DiskError: neither can be used, and the disk does not give out what one of them holds.
    """
    try:
        return _read(paths.identity)
    except (NotFoundError, MalformedError, DiskError) as error:
        try:
            return _read(paths.identity_copy)
        except (NotFoundError, MalformedError, DiskError) as other:
            worse = max(error, other, key=_weight)
        raise _lost(worse) from worse


def load_anyway(paths: Layout) -> Identity:
    """The same, and `NOBODY` where neither can be used.

    Raises:
        NotFoundError: it has not been enrolled.
    """
    try:
        return load(paths)
    except (MalformedError, DiskError):
        return NOBODY


def damage(paths: Layout) -> str:
    """Why the file cannot be used, though its copy can; empty when it can, or neither can."""
    try:
        _read(paths.identity)
    except (NotFoundError, MalformedError, DiskError) as error:
        with suppress(NotFoundError, MalformedError, DiskError):
            _read(paths.identity_copy)
            return f"{paths.identity} cannot be used ({error.why or error.what}): its copy is in its place"
    return ""


def mend(paths: Layout) -> str:
    """Let file and copy say the same: what the file says, and where that is damaged what the copy says.

    Returns:
        What was wrong with the file, as of `damage`.

    Raises:
        NotFoundError, MalformedError: neither can be used.
        DiskError: nor can they be written.
    """
    damaged, identity = damage(paths), load(paths)
    if damaged:
        _write(paths.identity, identity)
        return damaged
    try:
        is_kept = _read(paths.identity_copy) == identity
    except (NotFoundError, MalformedError, DiskError):
        is_kept = False
    if not is_kept:
        _write(paths.identity_copy, identity)
    return ""


def save(paths: Layout, identity: Identity) -> None:
    """Write the identity durably; the copy first, so that one of the two is whole at every moment."""
    _write(paths.identity_copy, identity)
    _write(paths.identity, identity)


def _read(file: Path) -> Identity:
    try:
        body = layout.read_json(file)
    except DiskError as error:
        if isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_IDENTITY:
            raise MalformedError(f"{file} is no identity", why=error.why) from error
        raise
    if body is None:
        raise NotFoundError(
            "this host is not enrolled", why=f"there is no {file}", then="agent enroll --server URL"
        )
    return Identity.from_json(body, file.name)


def _write(file: Path, identity: Identity) -> None:
    notes.write(file, identity.to_json(), 0o600)


def _weight(error: RelfleetError) -> int:
    """What may still be read weighs more than what is damaged, and that more than what is not there."""
    return 2 if isinstance(error, DiskError) else 1 if isinstance(error, MalformedError) else 0


def _lost(error: RelfleetError) -> RelfleetError:
    """Both are damaged: a person has to say again who this host is, and until then it runs what it has."""
    if isinstance(error, NotFoundError):
        return error
    bad = ", and remove a file that it never gives out" if isinstance(error, DiskError) else ""
    again = "agent enroll, again, with its gate and labels as before"
    then = f"look at the disk{bad}; then {again}: what is installed stays, and runs on meanwhile"
    return type(error)("this host cannot tell who it is", why=str(error).partition("\n")[0], then=then)


def make_key(paths: Layout, *, fresh: bool = False) -> str:
    """Make this host's ed25519 key unless it has one; a repeated enrolment keeps it, unless `fresh`.

    Returns:
        The public half, 64 hex digits.
    """
    if fresh:
        disk.remove(paths.next_key)
    if fresh or not paths.key.exists():
        layout.write_durable(paths.key, os.urandom(32).hex().encode() + b"\n", 0o600)
    return public_key(paths)


def public_key(paths: Layout) -> str:
    """The public half of this host's key, 64 hex digits; errors as of `sign`."""
    return _private_key(paths.key).public_key().public_bytes_raw().hex()


def make_next_key(paths: Layout) -> str:
    """Make the key that is to follow, on the disk before anybody hears of it; one that is there is kept.

    Returns:
        The public half, 64 hex digits.
    """
    if not disk.exists(paths.next_key):
        layout.write_durable(paths.next_key, os.urandom(32).hex().encode() + b"\n", 0o600)
    return _private_key(paths.next_key).public_key().public_bytes_raw().hex()


def take_next_key(paths: Layout) -> None:
    """Make the next key this host's; another process may have done so already."""
    with _disk_errors(paths.key):
        with suppress(FileNotFoundError):
            disk.rename(paths.next_key, paths.key)
        disk.fsync_dir(paths.state)


def sign(paths: Layout, text: bytes, key: Path | None = None) -> bytes:
    """Sign with this host's key, or the one in the file `key`.

    Raises:
        NotFoundError: there is no key.
        NotAllowedError: others on this host may read the key, so it proves nothing.
        MalformedError: the file is damaged.
    """
    return _private_key(key or paths.key).sign(text)


def next_counter(paths: Layout) -> int:
    """A number greater than every one before it, on the disk before it is used.

    It is at least the wall clock's seconds: a host set back to an old image, or with a damaged counter, would
    otherwise sign numbers that the server has seen, and never be heard again.
    """
    with _disk_errors(paths.state / "counter"):
        notes.set_aside(paths.state / "counter", paths.trash)  # it would never be heard again
        fd = disk.open(paths.state / "counter", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            disk.flock(fd, fcntl.LOCK_EX)
            counter = max(_stored(fd) + 1, int(clock.now().timestamp()))
            disk.pwrite(fd, f"{counter:0{COUNTER_DIGITS}d}\n".encode(), 0)
            disk.fsync(fd)
        finally:
            disk.close(fd)
    return counter


def _stored(fd: int) -> int:
    content = disk.pread(fd, COUNTER_DIGITS + 1, 0)
    with suppress(ValueError):
        counter = int(content)
        # One near the end of what the server takes was never drawn here, and would be the last that is heard.
        return counter if counter < HIGHEST_COUNTER else 0
    return 0


def _private_key(file: Path) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    mode, content = _read_key(file)
    if mode & 0o077:
        raise NotAllowedError(
            f"{file} is not private",
            why=f"others on this host may use it (mode {mode & 0o777:04o})",
            then=f"chmod 600 {file}; if others may have read it, remove it and enroll again",
        )
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(content.decode("ascii").strip()))
    except ValueError:
        # The cause is not chained: its message could quote the key.
        raise MalformedError(
            f"{file} holds no key", why="it is not 64 hex digits", then="remove it and enroll again"
        ) from None


def _read_key(file: Path) -> tuple[int, bytes]:
    """Its mode and its bytes; neither a link, a directory nor a pipe is one."""
    try:
        fd = disk.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            return disk.fstat(fd).st_mode, disk.read(fd, 256)
        finally:
            disk.close(fd)
    except FileNotFoundError as error:
        raise NotFoundError(
            "this host has no key", why=f"there is no {file}", then="agent enroll --server URL"
        ) from error
    except OSError as error:
        raise DiskError(f"{file} cannot be read", why=str(error), reason=Reason.DISK) from error


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(f"{path} cannot be written", why=str(error), reason=Reason.DISK) from error
