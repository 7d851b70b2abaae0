"""How a host becomes an agent: its directory, its identity, its first version, its launcher."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
from typing import TYPE_CHECKING, NoReturn

from agent_core import layout as durable
from agent_core import slots
from agent_core.bundle import host_platforms
from agent_core.errors import MalformedError, NotFoundError, RelfleetError, UsageError
from agent_core.settings import load_agent
from agent_core.wire import AGENT_ID, EnrollAnswer, EnrollRequest, Reason
from updater import activation, poll, server
from updater import identity as identities
from updater.backoff import wait_s
from updater.device import Device, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from agent_core.layout import Layout
    from updater.device import Outcome

    Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)


def enroll(
    layout: Layout,
    url: str,
    product: str,
    token: str | None,
    trust: bytes,
    name: str,
    labels: Mapping[str, str],
    gate: str,
    *,
    new_key: bool = False,
) -> Device:
    """Make the directory, the key and the identity. Done again, it goes on where it was cut.

    Args:
        token: None where no server can be asked: the host takes releases from files, under the name it gives
            itself, and becomes known to the server when it is enrolled again with a token.
        trust: the root metadata this host is to believe, brought by another way than the server.
        new_key: become another agent than before, e.g. because that one was retired.

    Raises:
        UsageError: this host is enrolled with another server or product.
        MalformedError: the trust file is no root metadata.
        DiskError: a file cannot be written, or it cannot be read with whom this host is enrolled.
        NotAllowedError, UnreachableError, TrustError: the server's answer.
    """
    _check_trust(trust)
    layout.make()
    before = _check_same(layout, url, product)
    durable.write_durable(layout.trust_root, trust)
    settings = load_agent(layout)
    if token is None and before is not None:
        return Device(layout, settings, before)
    platform = host_platforms()[0]
    public_key = identities.make_key(layout, fresh=new_key)
    request = EnrollRequest(product, name, public_key, platform, gate, labels)
    if token is None:
        answer = EnrollAnswer(agent_id=_own_id(name), cohort=None)
    else:
        answer = server.enroll(connect(settings.server_url or url, settings), token, request)
    identity = identities.Identity(
        server=url,
        product=product,
        agent_id=answer.agent_id,
        platform=platform,
        cohort=answer.cohort,
        gate=gate,
        labels=labels,
        enrolled=token is not None,
        standing=str(Reason.PENDING) if answer.pending else "",
    )
    identities.save(layout, identity)
    return Device(layout, settings, identity)


def _own_id(name: str) -> str:
    if not AGENT_ID.fullmatch(name):
        raise UsageError(f"{name!r} cannot name an agent", then="give another --name")
    return name


def _check_trust(trust: bytes) -> None:
    try:
        kind = json.loads(trust)["signed"]["_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        kind = None
    if kind != "root":
        raise MalformedError(
            "the trust file is no root metadata", then="release key export-trust writes the right file"
        )


def _check_same(layout: Layout, url: str, product: str) -> identities.Identity | None:
    try:
        before = identities.load(layout)
    except (NotFoundError, MalformedError):
        return None  # whoever enrols a host that cannot tell who it is mends it
    if (before.server, before.product) != (url, product):
        raise UsageError(
            f"{layout.root} belongs to another agent",
            why=f"it is enrolled for {before.product} at {before.server}",
            then="give another --root, or remove that one first",
        )
    return before


def first_version(device: Device, progress: Progress | None = None) -> Outcome:
    """Check once, and make what it stages the good version when nothing is installed yet."""
    outcome = poll.check(device, progress=progress)
    if outcome.candidate and slots.read(device.layout.root) is None:
        activation.activate_first(device, outcome)
        poll.tell(device)
    return outcome


def wait_for_first_version(device: Device, progress: Progress | None = None) -> None:
    """Check again and again, with backoff, until a version is installed; whatever is wrong may mend."""
    failures = 0
    while slots.recover(device.layout.root) is None:
        outcome = first_version(device, progress)
        if outcome.candidate:
            return
        failures = failures + 1 if outcome.failed else 0
        log.warning("nothing installed yet", extra={"reason": outcome.reason, "why": outcome.detail})
        delay_s = wait_s(
            max(failures, 1),
            base_s=poll.poll_s(device),
            most_s=device.settings.poll_max_backoff_s,
            chance=random.random(),  # noqa: S311 - jitter is no secret
            retry_after_s=outcome.retry_after_s,
        )
        time.sleep(max(delay_s, device.settings.poll_min_s))


def exec_launcher(layout: Layout, *, supervise: bool) -> NoReturn:
    """Become the launcher, which starts the good version.

    Raises:
        RelfleetError: it cannot be started.
    """
    argv = [sys.executable, "-I", "-S", "-B", str(layout.launcher_file), "--root", str(layout.root)]
    try:
        os.execv(sys.executable, [*argv, "--supervise"] if supervise else argv)  # noqa: S606 - our own file
    except OSError as error:
        raise RelfleetError("the launcher cannot be started", why=str(error)) from error
