"""One world for all stories of a worker; every test of this directory runs in the same worker."""

from __future__ import annotations

import subprocess

import pytest

from tests.integration.world import World


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items):
    for item in items:
        if "/integration/" in str(item.path):
            item.add_marker(pytest.mark.xdist_group("integration"))


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    home = tmp_path_factory.mktemp("world")
    world = World(home)
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
