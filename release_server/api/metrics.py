"""`/metrics`: for a reader's token, or for a listed network, through no proxy that is not believed."""

from __future__ import annotations

from ipaddress import ip_address
from typing import TYPE_CHECKING, cast

from flask import Blueprint, Response, current_app, request
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from release_server.api import services
from release_server.api.access import requires
from release_server.metrics import ROUTE, Metrics, Traffic

if TYPE_CHECKING:
    from flask import Flask

    from release_server.api import Services

blueprint = Blueprint("metrics", __name__)
EXTENSION = "relfleet.metrics"
FORWARDED = ("X-Forwarded-For", "Forwarded", "Via")
"""What proxies add: behind one that is not believed, every caller has the proxy's own address."""


def install(app: Flask, hub: Services) -> None:
    """Count what `app` answers, and answer what was counted."""
    traffic = Traffic(app.wsgi_app)
    app.wsgi_app = traffic  # type: ignore[method-assign,assignment]
    app.extensions[EXTENSION] = Metrics(hub.config, hub.sessions, traffic)
    app.register_blueprint(blueprint)
    app.before_request(_note_route)


def _note_route() -> None:
    if request.url_rule is not None:
        request.environ[ROUTE] = request.url_rule.rule


@blueprint.get("/metrics")
def scrape() -> Response:
    """How the server is, in Prometheus's text format."""
    return _answer() if _is_near() else _for_readers()


@requires("reader")
def _for_readers() -> Response:
    return _answer()


def _answer() -> Response:
    made = cast("Metrics", current_app.extensions[EXTENSION])
    return Response(made.text(services().clock()), content_type=CONTENT_TYPE_PLAIN_0_0_4)


def _is_near() -> bool:
    config = services().config
    if not config.trusted_proxies and any(name in request.headers for name in FORWARDED):
        return False
    try:
        address = ip_address(request.remote_addr or "")
    except ValueError:
        return False
    return any(address in network for network in config.metrics_networks)
