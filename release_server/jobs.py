"""The jobs process: the one that reconciles rollouts, has the signer sign, and exports the files.

Any number may run; the holder of the lease `jobs` works and the others wait. Every transaction of the
holder checks the lease's fence first, so that one that was paused and lost the lease writes nothing. On
PostgreSQL all of this goes by the database's clock: those of replicas may differ.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError

from agent_core import clock as wall
from agent_core.errors import TrustError, UnreachableError
from release_server import fleet, membership, repository, stop_file
from release_server.bell import Bell
from release_server.blobs import Blobs
from release_server.database import Sessions, make_engine, shared_now
from release_server.models import Lease
from release_server.presence import with_gap
from release_server.retention.pruner import Pruner
from release_server.signer import follow_public
from release_server.signing.client import SignerClient, over_socket
from release_server.webhooks.sender import Sender
from release_server.webhooks.vault import Vault

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.orm import Session

    from release_server.config import Config

log = logging.getLogger(__name__)

LEASE = Lease.JOBS
MOST_BACKOFF_S = 30.0
LEAST_PAUSE_S = 0.02
SEND_EVERY_S = 1.0
"""How often the outbox of webhooks is looked into."""
STOP_S = 2.0
"""How long the sender may go on when the process is to end; what it has not noted is sent again."""
KEYS_EVERY = timedelta(minutes=1)
"""How soon keys that were made to take the place of others are offered to a ceremony."""
WAITING = 1
"""While the signer is away the pause is doubled once: it is back in seconds, or a person is needed anyway."""


class LostLeaseError(Exception):
    """Another process holds the lease; nothing was written."""


def make_holder() -> str:
    """A name for this process that no other ever has."""
    return f"{socket.gethostname()[:64]}:{os.getpid()}:{secrets.token_hex(4)}"


def take_lease(session: Session, holder: str, now: datetime, length: timedelta) -> int | None:
    """Take or renew the lease.

    Args:
        session: of `Sessions.write()`.
        holder: of `make_holder`.
        now: when, by the clock that all go by who may take it.
        length: how long it holds without being renewed.

    Returns:
        The fence, which grows with every change of hands; None while another holds the lease.
    """
    lease = session.scalar(select(Lease).where(Lease.name == LEASE).with_for_update())
    if lease is None:
        session.add(Lease(name=LEASE, holder=holder, fence=1, until=now + length))
        try:
            session.flush()
        except IntegrityError:
            session.rollback()
            return None
        return 1
    mine = lease.holder == holder
    # A lease that ends further away than any could is from a clock that was ahead; it does not count.
    if not mine and now < lease.until <= now + 10 * length:
        return None
    if mine and now + length * 2 / 3 < lease.until <= now + length:
        return lease.fence  # renewed a moment ago; a write, and its wait for the disk, can be saved
    fence = lease.fence if mine else lease.fence + 1
    was_ahead = lease.since is not None and lease.since > now
    was_away = was_ahead or now > lease.until + length
    since, gaps = (
        (now, with_gap(lease.gaps, lease.until - length, now)) if was_away else (lease.since, lease.gaps)
    )
    taken = session.execute(
        update(Lease)
        .where(Lease.name == LEASE, Lease.holder == lease.holder, Lease.fence == lease.fence)
        .values(holder=holder, fence=fence, until=now + length, since=since, gaps=gaps)
        .returning(Lease.fence)
        .execution_options(synchronize_session=False)
    ).first()
    return fence if taken else None


def check_fence(session: Session, holder: str, fence: int) -> None:
    """Make sure, inside a transaction, that the lease is still this holder's.

    Raises:
        LostLeaseError: it is not.
    """
    held = session.scalar(
        select(Lease.fence).where(Lease.name == LEASE, Lease.holder == holder).with_for_update()
    )
    if held != fence:
        raise LostLeaseError


def release_lease(session: Session, holder: str, now: datetime) -> None:
    """Give the lease back, so that the next process need not wait for its end."""
    session.execute(update(Lease).where(Lease.name == LEASE, Lease.holder == holder).values(until=now))


class Jobs:
    """The loop of one jobs process.

    Args:
        config: the settings.
        clock: what time it is; tests step it.
        signer: who signs; without it the one that listens where the settings say.
        shared_now: by what clock the lease is taken and a tick works; where it says None, by `clock`.
    """

    def __init__(
        self,
        config: Config,
        *,
        clock: Callable[[], datetime] = wall.now,
        signer: SignerClient | None = None,
        shared_now: Callable[[Session], datetime | None] = shared_now,
    ) -> None:
        self.config = config
        self.clock = clock
        self.shared_now = shared_now
        self.sessions = Sessions(make_engine(config.database_url))
        self.blobs = Blobs(config.blobs, config.uploads)
        self.signer = signer or over_socket(config.signer_socket)
        self.pruner = Pruner(self.sessions, self.blobs, config.repository, config.retention)
        self.bell = Bell(config.bell)
        self.holder = make_holder()
        self.fence: int | None = None
        self._restored = False
        self._leading = False
        self._waiting = False
        self._told: tuple[int, ...] = ()
        self._keys_due = datetime.min.replace(tzinfo=UTC)

    def tick(self) -> bool:
        """Do everything once, when the lease is ours.

        Returns:
            Whether it is.
        """
        with self.sessions.write() as session:
            now = self.shared_now(session) or self.clock()
            fence = take_lease(session, self.holder, now, self.config.lease)
        self.fence = fence
        self._note(leading=fence is not None)
        if fence is None:
            return False
        self._resettle(fence)
        try:
            self._work(fence, now)
        except TrustError:
            self._note_keys(now)  # a signer that lost its keys and made others: people have to see which
            raise
        self._note_keys(now)
        if not self._restored:
            repository.restore_bundles(self.sessions, self.blobs, self.config.repository)
            self._restored = True
        repository.export(self.sessions, self.blobs, self.config.repository)
        self._prune(fence, now)
        return True

    def _prune(self, fence: int, now: datetime) -> None:
        """Remove some of what is old; that it cannot be removed stops nothing else."""
        try:
            self.pruner.step(now, lambda session: check_fence(session, self.holder, fence))
        except LostLeaseError:
            raise
        except Exception:
            log.exception("old records were not removed")

    def _resettle(self, fence: int) -> None:
        """Place agents whose cohorts changed, some at a time and apart: this locks their rows."""
        with self.sessions.read() as session:
            if not membership.is_resettling(session):
                return
        with self.sessions.write() as session:
            check_fence(session, self.holder, fence)
            membership.resettle_some(session)

    def _work(self, fence: int, now: datetime) -> None:
        """Reconcile and sign as one transaction: what was not signed has not happened."""
        seen, stop = self._look_for_stop()
        try:
            with self.sessions.write() as session:
                check_fence(session, self.holder, fence)
                if seen:
                    stop_file.tell(session, now, stop)
                fleet.tick(session, now)
                repository.publish(session, self.signer, now)
        except BaseException:
            self.signer.forget()  # it may have signed what was just rolled back
            raise
        if self._waiting:
            log.info("the signer signs again")
        self._waiting = False

    def _look_for_stop(self) -> tuple[bool, bytes | None]:
        """Whether it is known if there is a stop file, and what it holds."""
        try:
            return True, stop_file.look(self.config.repository)
        except OSError:
            log.exception("the stop file could not be read; what was told of it stands")
            return False, None

    def _note_keys(self, now: datetime) -> None:
        """Tell web processes, by files, which keys the signer has and which wait to take their place."""
        if self._told == self.signer.briefed and now < self._keys_due:
            return
        known = self.signer.known()
        follow_public(self.config.trust, known.keys, known.upcoming)
        self._told, self._keys_due = self.signer.briefed, now + KEYS_EVERY

    def _note(self, *, leading: bool) -> None:
        if leading != self._leading:
            self.signer.forget()
            (self.bell.listen if leading else self.bell.mute)()
            log.info("the jobs lease is ours" if leading else "another process holds the jobs lease")
        self._leading = leading

    def sender(self) -> Sender:
        """What sends webhooks while the lease is ours; its notes are guarded by the same fence."""
        return Sender(
            self.sessions,
            Vault(self.config.webhook_key),
            guard=self._check_own_fence,
            leads=lambda: self.fence is not None,
            clock=self.clock,
            ca_file=self.config.webhook_ca_file,
        )

    def _check_own_fence(self, session: Session) -> None:
        fence = self.fence  # once: the thread that ticks may lose it meanwhile
        if fence is None:
            raise LostLeaseError
        check_fence(session, self.holder, fence)

    def run(self, stop: threading.Event) -> None:
        """Tick until `stop`; whatever goes wrong is logged, and the next tick comes later."""
        sender = self.sender()
        # A daemon: a receiver that is being waited for keeps no process from its end.
        sending = threading.Thread(target=sender.run, args=(SEND_EVERY_S,), name="webhooks", daemon=True)
        sending.start()
        try:
            self._tick_until(stop)
        finally:
            sender.stop.set()
            sending.join(STOP_S)
            self.fence = None
            self.close()

    def _tick_until(self, stop: threading.Event) -> None:
        failures = 0
        while not stop.is_set():
            began_s = wall.boot_s()
            try:
                self.tick()
                failures = 0
            except LostLeaseError:
                log.warning("the jobs lease was lost within a tick; nothing was written")
            except UnreachableError as error:
                failures = min(failures + 1, WAITING)
                self._wait_for_signer(error)
            except Exception:
                failures += 1
                log.exception("a tick failed", extra={"failures": failures})
            self._pause(stop, failures, wall.boot_s() - began_s)

    def _pause(self, stop: threading.Event, failures: int, took_s: float) -> None:
        """Until the next tick is due, or the bell rings; however often it does, half of the time is free."""
        if failures:
            stop.wait(min(self.config.tick_s * 2 ** min(failures, 10), MOST_BACKOFF_S))
        else:
            self.bell.wait(stop, max(took_s, LEAST_PAUSE_S), self.config.tick_s)

    def _wait_for_signer(self, error: UnreachableError) -> None:
        if not self._waiting:
            log.warning("nothing is signed until the signer is back", extra={"why": str(error)})
        self._waiting = True

    def close(self) -> None:
        """Give the lease back and leave the database."""
        self.bell.mute()
        try:
            with self.sessions.write() as session:
                release_lease(session, self.holder, self.shared_now(session) or self.clock())
        except Exception:
            log.exception("the jobs lease was not given back; the next process waits for its end")
        self.sessions.close()
