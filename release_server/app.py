"""The web application: settings, database and routes wired together, with the static fast path in front."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING, Any

from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI
from werkzeug.middleware.proxy_fix import ProxyFix

from agent_core import clock as wall
from release_server import bell
from release_server.api import PREFIX, Services, contract, problems
from release_server.api.access import COOKIE
from release_server.blobs import Blobs
from release_server.config import COUNTERS_VARIABLE, Config, data_directory
from release_server.database import Sessions, make_engine
from release_server.headers import SafeHeaders
from release_server.presence import Pulse
from release_server.slow import Pace, Watch
from release_server.static import StaticFiles
from release_server.transfers import Slots, Transfers

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from flask import Flask

    from release_server.signin.provider import Provider

SECURITY_SCHEMES: dict[str, Any] = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "session": {"type": "apiKey", "in": "cookie", "name": COOKIE},
}


class Documented(OpenAPI):
    """Flask with a document of its routes that says what they answer, too."""

    def generate_spec_json(self) -> None:
        super().generate_spec_json()  # type: ignore[no-untyped-call]
        contract.complete(self.spec_json)


def create_app(config: Config, *, clock: Callable[[], datetime] = wall.now) -> Flask:
    """Make the application of one data directory. It holds no key, and opens nothing before a request
    but the secret that the sign-in provider knows it by.

    Args:
        config: the settings.
        clock: what time it is; tests step it.
    """
    from agent_core.console import version
    from release_server.api import metrics as scrape

    app = Documented(
        "release_server",
        info=Info(title="relfleet", version=version()),
        security_schemes=SECURITY_SCHEMES,
        doc_prefix=PREFIX,
        doc_url="/openapi.json",
        validation_error_callback=problems.answer_invalid,
        static_folder=None,
    )
    app.config["MAX_CONTENT_LENGTH"] = config.body_limit
    app.extensions["relfleet"] = Services(
        config=config,
        sessions=Sessions(make_engine(config.database_url), lambda: bell.ring(config.bell)),
        blobs=Blobs(config.blobs, config.uploads),
        clock=clock,
        provider=_provider(config),
    )
    problems.install(app)
    _register(app)
    files = StaticFiles(app.wsgi_app, config.repository)
    app.wsgi_app = SafeHeaders(Transfers(files, watched_slots(config)))  # type: ignore[method-assign,assignment]
    scrape.install(app, app.extensions["relfleet"])
    if config.trusted_proxies:
        near = config.trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=near, x_proto=near, x_host=near)  # type: ignore[method-assign]
    return app


def _provider(config: Config) -> Provider | None:
    if config.oidc is None:
        return None
    from release_server.signin.provider import Provider  # its libraries are loaded where it is used alone

    return Provider(config.oidc)


def watched_slots(config: Config) -> Slots:
    """The slots of one process, whose slow transfers are ended."""
    slots = Slots(config.threads)
    slots.entered = Watch(slots, Pace(config.least_rate_bps, config.slow_s)).wake
    return slots


def _register(app: OpenAPI) -> None:
    from release_server import dashboard
    from release_server.api import (
        agents,
        audit,
        cohorts,
        people,
        plans,
        proposals,
        releases,
        rollouts,
        sessions,
        tokens,
        trust,
        uploads,
        webhooks,
    )
    from release_server.dashboard import signin

    parts = (
        people,
        trust,
        uploads,
        releases,
        proposals,
        tokens,
        sessions,
        audit,
        agents,
        cohorts,
        plans,
        rollouts,
        webhooks,
    )
    for module in parts:
        app.register_api(module.blueprint)
    app.register_blueprint(dashboard.blueprint)
    app.register_blueprint(signin.blueprint)


def wsgi() -> Flask:
    """The application of the data directory in `RELFLEET_SERVER_DATA`, for any WSGI server.

    `gunicorn 'release_server.app:wsgi()'`; a jobs process (`release-server worker`) runs beside it.
    """
    config = Config.load(data_directory())
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")
    share_counters(config)
    app = create_app(config)
    Pulse(app.extensions["relfleet"].sessions, wall.now).start()
    return app


def share_counters(config: Config) -> None:
    """Have this process and its children count into files that each of them adds up; before any is loaded."""
    config.counters.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ.setdefault(COUNTERS_VARIABLE, str(config.counters))
