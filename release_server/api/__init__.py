"""The REST API: a view parses, calls one service function, and renders."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from flask import current_app

from release_server.limits import Limits

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from release_server.blobs import Blobs
    from release_server.config import Config
    from release_server.database import Sessions
    from release_server.signin.provider import Provider

PREFIX = "/api/v1"


@dataclass(frozen=True)
class Services:
    """What every view may use; made once an application.

    Attributes:
        provider: with whom people sign in at the page; None for tokens only.
    """

    config: Config
    sessions: Sessions
    blobs: Blobs
    clock: Callable[[], datetime]
    limits: Limits = field(default_factory=Limits)
    provider: Provider | None = None


def services() -> Services:
    """The services of the application that answers this request."""
    return cast("Services", current_app.extensions["relfleet"])
