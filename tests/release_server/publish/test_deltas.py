"""Deltas of a push: from which releases, kept how, and from the command to a device that goes on by one."""

from __future__ import annotations

import random
import re
from datetime import UTC, datetime
from hashlib import sha256

import pytest

from agent_core import slots
from agent_core.bundle import INDEX_NAME
from agent_core.errors import Exit
from agent_core.layout import Layout
from agent_core.settings import AGENT, AgentSettings
from tests.release_server.publish.house import PRODUCT, Desk, ceremony_at, serve
from updater import poll
from updater.catalog import Catalog
from updater.device import Device
from updater.identity import Identity
from updater.transport import Transport

NOISE = random.Random(3).randbytes(60_000)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("house") / "server") as running:
        yield running


@pytest.fixture(scope="module")
def desk(house, tmp_path_factory):
    desk = Desk(house, tmp_path_factory.mktemp("desks") / "ada", role="admin")
    ceremony_at(desk, house)
    return desk


@pytest.fixture
def ada(desk, capsys, monkeypatch, request):
    """A release manager with a product of this test's own, and its directory."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name[5:]).strip("-")[-40:].strip("-")
    desk.capsys, desk.environ["RELFLEET_PRODUCT"] = capsys, f"{PRODUCT}-{name}"
    home = desk.home / name
    home.mkdir()
    monkeypatch.chdir(home)
    assert desk("key", "gen")[0] == Exit.DONE
    return desk


@pytest.fixture
def publish(ada, make_bundle):
    """Pushes a version whose one large file is nearly that of every other."""

    def push(version, content=None, *words):
        archive = make_bundle(
            version,
            platform="any",
            product=ada.environ["RELFLEET_PRODUCT"],
            content=NOISE + version.encode() if content is None else content,
        )
        return ada.json("push", archive, "--wait", *words)

    return push


def deltas(pushed):
    return [entry["from"] for entry in pushed["deltas"]]


def files(house, product):
    return sorted((house.data / "repository" / "targets" / "deltas" / product).rglob("*.delta"))


def device_with(house, ada, root, version):
    """A device that has a version, and a checker of it under a verified catalog."""
    layout = Layout(root)
    layout.make()
    product = ada.environ["RELFLEET_PRODUCT"]
    device = Device(
        layout,
        AgentSettings.of(AGENT.load(environ={}, flags={"disk.reserve": 0})),
        Identity(house.url, product, "web-1", "any", "main"),
    )
    transport = Transport(house.url, proxies={}, timeout_s=5.0)
    catalog = Catalog(layout.tuf, transport, product, (ada.keys / "root.json").read_bytes())
    check = poll._Check(device, catalog, transport, datetime.now(UTC), None)
    with catalog:
        catalog.refresh(datetime.now(UTC), None)
        name, _ = check._stage(catalog.release(version, ["any"]))
    slots.Slots(layout.root).write(slots.Record(good=name))
    return check


def test_what_is_pushed_takes_a_device_on_by_a_delta(publish, house, ada, tmp_path):
    assert deltas(publish("1.0.0")) == []
    check = device_with(house, ada, tmp_path / "root", "1.0.0")
    pushed = publish("1.1.0")
    assert deltas(pushed) == ["1.0.0"]
    assert pushed["deltas"][0]["length"] < 200 < 60_000 < pushed["bundles"][0]["length"]
    with check.catalog as catalog:
        catalog.refresh(datetime.now(UTC), None)
        release = catalog.release("1.1.0", ["any"])
        bundle = house.data / "repository" / "targets" / release.archive_url.removeprefix("/targets/")
        bundle.unlink()
        name, index = check._stage(release)
    directory = check.device.layout.version_dir(name)
    assert sha256((directory / INDEX_NAME).read_bytes()).hexdigest() == release.index_sha256
    for file in index.files:
        assert sha256((directory / file.path).read_bytes()).hexdigest() == file.sha256
    assert check.fallback == ""


def test_deltas_lead_from_the_newest_earlier_releases_which_are_fetched_once(publish, house, ada):
    for version in ("1.0.0", "1.1.0"):
        publish(version)
    cache = next(ada.home.glob("state/**/bundles"))
    first = {file.name for file in cache.iterdir()}
    assert len(first) == 2
    damaged = cache / min(first)
    damaged.write_bytes(b"?")
    assert deltas(publish("1.2.0")) == ["1.1.0", "1.0.0"]
    assert first < {file.name for file in cache.iterdir()}
    assert sha256(damaged.read_bytes()).hexdigest() == damaged.name
    assert deltas(publish("1.3.0")) == ["1.2.0", "1.1.0", "1.0.0"]
    assert deltas(publish("1.4.0")) == ["1.3.0", "1.2.0", "1.1.0"]
    assert not first & {file.name for file in cache.iterdir()}
    assert len(files(house, ada.environ["RELFLEET_PRODUCT"])) == 1 + 2 + 3 + 3


def test_the_project_says_from_how_many(publish, ada, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project = f'[product]\nname = "{ada.environ["RELFLEET_PRODUCT"]}"\n[release]\ndeltas = '
    publish("1.0.0")
    (tmp_path / "relfleet.toml").write_text(f"{project}0\n")
    assert deltas(publish("1.1.0")) == []
    (tmp_path / "relfleet.toml").write_text(f"{project}1\n")
    assert deltas(publish("1.2.0")) == ["1.1.0"]


def test_a_delta_that_spares_little_is_not_published(publish, ada):
    publish("1.0.0")
    assert deltas(publish("1.1.0", random.Random(4).randbytes(60_000))) == []


def test_a_release_with_the_files_of_the_one_before_is_published_without_a_delta(publish):
    publish("1.0.0", NOISE)
    assert deltas(publish("1.1.0", NOISE)) == []


def test_an_earlier_release_that_is_gone_or_changed_costs_a_delta_and_not_the_push(publish, house, ada):
    publish("1.0.0")
    publish("1.1.0")
    targets = house.data / "repository" / "targets" / "bundles" / ada.environ["RELFLEET_PRODUCT"]
    cache = next(ada.home.glob("state/**/bundles"))
    for file in cache.iterdir():
        file.unlink()
    next((targets / "1.0.0").glob("*.tar.zst")).unlink()
    old = next((targets / "1.1.0").glob("*.tar.zst"))
    content = old.read_bytes()
    old.unlink()  # it is linked with the blob
    old.write_bytes(content[:-9] + bytes(9))
    assert deltas(publish("1.2.0")) == []
