"""The application keeps to its own document: generated requests, as every role and as nobody.

`make test` sends a few to each route; `make api-fuzz` sets RELFLEET_API_FUZZ and sends many.
"""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from release_server import auth
from release_server.app import create_app
from tests.release_server.fleet_world import World

DEEP = int(os.environ.get("RELFLEET_API_FUZZ", "0"))
ROLES = [*auth.Role, None] if DEEP else [auth.Role.ADMIN, auth.Role.READER, None]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
BOUNDED = settings(
    derandomize=not DEEP,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture
def served(config, clock, sessions):
    """An application whose clock goes on with every look, so that no limit by rate hides the rest."""
    World(sessions, clock)

    def later():
        clock.now += timedelta(seconds=1)
        return clock.now

    app = create_app(config, clock=later)
    yield app
    app.extensions["relfleet"].sessions.close()


def send_to_every_route(app, headers, mode, checks, examples):
    """Generated requests to each route of the document; returns every status that came."""
    schema = schemathesis.openapi.from_wsgi("/api/v1/openapi.json", app)
    seen = set()
    for found in schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue

        @settings(BOUNDED, max_examples=DEEP or examples)
        @given(case=operation.as_strategy(generation_mode=mode))
        def send(case):
            seen.add(case.call_and_validate(headers=headers, checks=checks).status_code)

        send()
    return seen


@pytest.mark.parametrize("role", ROLES, ids=str)
def test_whatever_is_asked_is_answered_as_documented(served, token, role):
    headers = {"Authorization": f"Bearer {token(role)}"} if role else {}
    # Who may do nearly nothing is refused at each route alike: one request tells.
    examples = 3 if role == auth.Role.ADMIN else 1
    seen = send_to_every_route(served, headers, GenerationMode.POSITIVE, CHECKS, examples)
    assert 200 in seen
    assert 401 in seen or role


def test_what_the_document_forbids_is_answered_as_documented(served, token):
    headers = {"Authorization": f"Bearer {token('admin')}"}
    assert 422 in send_to_every_route(served, headers, GenerationMode.NEGATIVE, CHECKS, 2)
