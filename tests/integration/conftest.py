"""One world for all stories of a worker; the stories of a file stay together."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack

import pytest

from tests import postgres
from tests.integration.world import World


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    home = tmp_path_factory.mktemp("world")
    with ExitStack() as stack:
        url = stack.enter_context(postgres.cluster().database()) if postgres.WANTED else ""
        world = World(home, url)
        try:
            world.make()
            yield world
        finally:
            world.processes.stop()
            subprocess.run(["chmod", "-R", "u+w", home], check=False)


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
