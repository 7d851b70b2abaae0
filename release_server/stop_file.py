"""The file by which whoever runs the file server stops updates: what it says, and that others hear of it.

It lies beside the metadata, and agents obey it without the server (docs/decisions/0017). Where it lies in the
repository of the jobs process that process sees it as well: rollouts stand still by it, and its coming and
going are told once each. What was last told of a product is kept with it, by the transaction that tells it.
"""

from __future__ import annotations

import stat
from typing import TYPE_CHECKING

from sqlalchemy import select

from agent_core.wire import STOP_LENGTH, stop_for
from release_server import audit
from release_server.models import Product
from release_server.webhooks import events, outbox

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy.orm import Session

NAME = "stop.json"


def look(repository: Path) -> bytes | None:
    """What the file holds; None where there is none that an agent would be given.

    Raises:
        OSError: it cannot be read.
    """
    file = repository / "metadata" / NAME
    try:
        # By `stat`, for `is_file` of Python 3.14 takes a file that it cannot look at for none.
        if not stat.S_ISREG(file.stat().st_mode):
            return None
        with file.open("rb") as opened:
            body = opened.read(STOP_LENGTH + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return body if len(body) <= STOP_LENGTH else None


def tell(session: Session, now: datetime, body: bytes | None) -> None:
    """Note, audit and tell of each product whose updates a file stops now, or no longer stops.

    Args:
        session: of `Sessions.write()`.
        body: of `look`.
    """
    for product in session.scalars(select(Product).order_by(Product.id)):
        says = None if body is None else stop_for(product.name, body)
        if says == product.stopped:
            continue
        product.stopped = says
        stops, reason = says is not None, says or ""
        audit.record(
            session,
            now,
            audit.SERVER,
            "fleet.stop" if stops else "fleet.resume",
            product.name,
            by=NAME,
            reason=reason,
        )
        kind = events.FLEET_STOPPED if stops else events.FLEET_RESUMED
        outbox.tell(session, now, kind, product.name, None, by=NAME, reason=reason, actor=audit.SERVER)
