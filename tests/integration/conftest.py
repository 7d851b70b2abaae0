"""One world for all stories of a worker; the stories of a file stay together."""

from __future__ import annotations

import pytest

from tests.integration.world import running


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    with running(tmp_path_factory.mktemp("world")) as world:
        yield world


@pytest.fixture(scope="module", autouse=True)
def _hosts_of_a_module_end_with_it(world):
    kept = set(world.processes.pids())
    yield
    world.processes.end_all_but(*kept)


@pytest.fixture(autouse=True)
def _hosts_of_a_story_end_with_it(world):
    kept = set(world.processes.pids())
    yield
    world.processes.end_all_but(*kept)
