"""A repository of our own simulator, a server for it, and a client that begins from its first root."""

from __future__ import annotations

import pytest

from tests.conformance.runner import OK, Runner
from tests.http_origin import Origin
from tests.repository_simulator import RepositorySimulator


@pytest.fixture
def repository(tmp_path):
    made = RepositorySimulator(tmp_path / "www")
    made.add_target("file.txt", b"content")
    made.publish()
    return made


@pytest.fixture
def origin(repository):
    with Origin(repository.directory) as origin:
        yield origin


@pytest.fixture
def runner(tmp_path, origin, repository):
    made = Runner(tmp_path, origin, repository)
    assert made.init() == OK
    return made
