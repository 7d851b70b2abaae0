"""This module sends what lies in the outbox, from a thread of the jobs process that nothing else waits for.

What it sends is committed already, and no transaction is open while it sends. A process that dies between
the receiver's answer and the note of it leaves the delivery pending: it is sent again, with the same id, the
same sequence and the same bytes, by which a receiver knows that it has it.
"""

from __future__ import annotations

import logging
import random
import threading
from contextlib import contextmanager
from ipaddress import IPv6Network, ip_address
from typing import TYPE_CHECKING

import requests

from agent_core.clock import boot_s
from agent_core.errors import RelfleetError, UnreachableError
from release_server import outgoing
from release_server.webhooks import outbox, schedule, signature
from release_server.webhooks.schedule import Answer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from datetime import datetime

    from sqlalchemy.orm import Session

    from release_server.database import Sessions
    from release_server.webhooks.outbox import Letter
    from release_server.webhooks.vault import Vault

    Guard = Callable[[Session], None]

log = logging.getLogger(__name__)

LONGEST_S = 15.0
"""For one receiver's whole answer, from the first packet on."""
PASS_S = 60.0
"""For one pass: then everything is looked at anew, so that who is quick is not forgotten for who is slow."""
AT_ONCE = 20
MOST_PAUSE_S = 60.0
AGENT = "relfleet-webhook/1"
NAT64 = IPv6Network("64:ff9b::/96")
"""Below it lies IPv4, as hosts see it that have IPv6 only (RFC 6052)."""


class Sender:
    """One thread, one delivery after the other.

    Args:
        guard: raises inside a transaction when this process no longer may write (`jobs.check_fence`).
        leads: whether this process is the one that sends; asked before each delivery.
        clock: what time it is; tests step it.
        ca_file: PEM certificates to verify receivers with; None for the public ones.
        spread: a random number in [0, 1) for pauses.
    """

    def __init__(
        self,
        sessions: Sessions,
        vault: Vault,
        *,
        guard: Guard,
        leads: Callable[[], bool],
        clock: Callable[[], datetime],
        ca_file: str | None = None,
        spread: Callable[[], float] = random.random,
    ) -> None:
        self._sessions, self._vault = sessions, vault
        self._guard, self._leads, self._clock, self._spread = guard, leads, clock, spread
        self._ca_file = ca_file
        self.stop = threading.Event()

    def send_due(self) -> int:
        """Send whatever may be sent now, the oldest of each webhook first.

        Returns:
            How many tries there were.
        """
        tries, ends = 0, boot_s() + PASS_S
        while self._leads():
            with self._sessions.read() as session:
                letters = outbox.due(session, self._clock(), AT_ONCE)
            if not letters:
                break
            for letter in letters:
                if self.stop.is_set() or boot_s() >= ends or not self._leads():
                    return tries
                self._deliver(letter)
                tries += 1
        return tries

    def _deliver(self, letter: Letter) -> None:
        answer = self._ask_anyhow(letter)
        with self._sessions.write() as session:
            self._guard(session)
            kept = outbox.settle(session, self._clock(), letter, answer, self._spread())
        if not answer.took and kept is not None:
            told = {"webhook": letter.webhook_id, "event": letter.event_id, "why": answer.says}
            given_up = kept is outbox.Kept.DEAD
            log.warning("a delivery was given up" if given_up else "a delivery failed", extra=told)

    def _ask_anyhow(self, letter: Letter) -> Answer:
        """Send a letter. What nobody thought of is an answer too, else it would be tried first for ever."""
        try:
            return self._ask(letter)
        except Exception as error:
            kind = type(error).__name__
            # Where it was, and not its words: they may hold the URL.
            where = RuntimeError(kind).with_traceback(error.__traceback__)
            told = {"webhook": letter.webhook_id}
            log.exception("a webhook could not be asked", exc_info=where, extra=told)
            return Answer(False, f"it cannot be asked ({kind})")

    def _ask(self, letter: Letter) -> Answer:
        """Send a letter. Whatever happens is an answer, and says nothing that is secret: URLs may be."""
        try:
            secrets = self._vault.open(letter.secrets)
        except RelfleetError as error:
            log.warning("nothing can be signed for webhooks", extra={"why": str(error)})
            return Answer(False, f"not sent: {error.why or error}")
        headers = signature.headers(letter.event_id, self._clock(), letter.body, secrets)
        headers |= {"Content-Type": "application/json", "User-Agent": AGENT}
        try:
            with self._client() as client:
                found = client.post(letter.url, letter.body, headers=headers, allow_redirects=False)
        except UnreachableError as error:
            return Answer(False, str(error.why))
        except requests.exceptions.SSLError:
            return Answer(False, "its certificate is not believed")
        except requests.exceptions.Timeout:
            return Answer(False, "it took too long to answer")
        except (requests.RequestException, OSError) as error:
            return Answer(False, f"it does not answer ({type(error).__name__})")
        return schedule.answer_of(found.status_code, found.headers.get("Retry-After"))

    @contextmanager
    def _client(self) -> Iterator[requests.Session]:
        """A connection for one delivery: receivers are many, and each is told something now and then."""
        with requests.Session() as client:
            outgoing.guard(
                client, lambda: outgoing.Bounded(_unreachable, LONGEST_S, refuse_peer), self._ca_file
            )
            yield client

    def run(self, every_s: float) -> None:
        """Send until `stop`; whatever goes wrong is logged, and the next pass comes later."""
        failures = 0
        while not self.stop.is_set():
            try:
                self.send_due()
                failures = 0
            except Exception:
                failures += 1
                log.exception("webhooks were not sent", extra={"failures": failures})
            self.stop.wait(min(every_s * 2 ** min(failures, 10), MOST_PAUSE_S))


def refuse_peer(address: str) -> None:
    """Refuse what no receiver has, and what a name may be made to lead to: the cloud's own services.

    Raises:
        OSError: the address is link-local (169.254.169.254 and its like), multicast, or none.
    """
    found = ip_address(address.partition("%")[0])
    plain = getattr(found, "ipv4_mapped", None) or found
    if plain in NAT64:
        plain = ip_address(int(plain) & 0xFFFF_FFFF)
    if plain.is_loopback:  # first: to the library ::1 is reserved as well
        return
    if plain.is_link_local or plain.is_multicast or plain.is_unspecified or plain.is_reserved:
        raise PermissionError(f"{plain} is no address of a receiver")


def _unreachable(why: str) -> UnreachableError:
    return UnreachableError("the receiver cannot be told", why=why)
