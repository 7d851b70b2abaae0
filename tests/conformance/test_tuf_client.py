"""The adapter for the public conformance suite, over the project's own simulator: the cases it has."""

from __future__ import annotations

import json
import shutil
import subprocess
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import DelegatedRole, Delegations, Targets

from agent_core import clock
from tests.conformance import client
from tests.http_origin import Origin
from tests.repository_simulator import RepositorySimulator

PROGRAM = Path(client.__file__).with_name("tuf_client")
DAY = timedelta(days=1)
OK, REFUSED = 0, 1


class Runner:
    """One client: its directories, and calls of the command line in this process."""

    def __init__(self, home: Path, origin: Origin, repository: RepositorySimulator):
        self.metadata, self.files = home / "client", home / "files"
        for directory in (self.metadata, self.files):
            directory.mkdir()
        self.url = f"{origin.url}/metadata/"
        self.root = home / "trusted_root.json"
        self.root.write_bytes(repository.trusted_root)
        self.origin = origin

    def words(self, command, *more):
        place = ["--metadata-dir", str(self.metadata)]
        if command == "init":
            return [*place, "init", str(self.root)]
        return ["--metadata-url", self.url, *place, *map(str, more), command]

    def init(self):
        return client.main(self.words("init"))

    def refresh(self):
        return client.main(self.words("refresh"))

    def download(self, *names):
        named = [word for name in names for word in ("--target-name", name)]
        base = f"{self.origin.url}/targets/"
        return client.main(
            self.words("download", *named, "--target-dir", self.files, "--target-base-url", base)
        )

    def versions(self):
        """What is trusted, read back as the suite reads it."""
        return {
            place.stem: json.loads(place.read_bytes())["signed"]["version"]
            for place in self.metadata.glob("*.json")
        }

    def downloaded(self):
        return sorted(place.read_bytes() for place in self.files.rglob("*") if place.is_file())


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


def test_the_program_speaks_the_suites_command_line(runner):
    for words in (runner.words("init"), runner.words("refresh")):
        subprocess.run([PROGRAM, *words], check=True)
    assert runner.versions() == {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}
    names = ["--target-name", "no-file.txt", "--target-name", "file.txt"]
    rest = ["--target-dir", runner.files, "--target-base-url", f"{runner.origin.url}/targets/"]
    refused = subprocess.run(
        [PROGRAM, *runner.words("download", *names, *rest)], check=False, capture_output=True
    )
    assert (refused.returncode, runner.downloaded()) == (REFUSED, [])
    assert b"Traceback" not in refused.stderr


def test_a_first_refresh_asks_for_each_role_once(runner):
    assert runner.refresh() == OK
    names = ["2.root", "timestamp", "1.snapshot", "1.targets"]
    assert runner.origin.paths() == [f"/metadata/{name}.json" for name in names]


def test_an_idle_refresh_is_one_conditional_get(runner):
    assert runner.refresh() == OK
    runner.origin.requests.clear()
    assert runner.refresh() == OK
    assert [request.path for request in runner.origin.requests] == ["/metadata/timestamp.json"]
    assert "if-none-match" in runner.origin.requests[0].headers


def test_a_download_refreshes_first(runner, repository):
    assert runner.download("no-file.txt") == REFUSED
    assert runner.versions()["targets"] == 1
    assert runner.download("file.txt") == OK
    assert runner.downloaded() == [b"content"]


@pytest.mark.parametrize(
    "spoil", [lambda body: body["signed"].pop("version"), lambda body: body["signatures"].clear()]
)
def test_a_first_root_that_is_none_asks_the_server_nothing(runner, spoil):
    body = json.loads(runner.root.read_bytes())
    spoil(body)
    runner.root.write_text(json.dumps(body))
    runner.init()
    assert runner.refresh() == REFUSED
    assert runner.origin.requests == []


@pytest.mark.parametrize("role", ["timestamp", "1.snapshot", "1.targets"])
def test_what_is_not_signed_is_not_kept(runner, repository, role):
    repository.unsign(f"{role}.json")
    assert runner.refresh() == REFUSED
    assert role.rpartition(".")[2] not in runner.versions()


# --- rollback --------------------------------------------------------------------------------------------


def test_an_older_repository_is_refused_and_what_was_kept_stays(runner, repository):
    old = repository.tree()
    repository.publish()
    assert runner.refresh() == OK
    kept = runner.versions()
    repository.replay(old)
    assert runner.refresh() == REFUSED
    assert runner.versions() == kept


@pytest.mark.parametrize(
    "roles", [("timestamp",), ("snapshot", "timestamp"), ("targets", "snapshot", "timestamp")]
)
def test_versions_that_ran_forward_are_given_up_once_keys_were_changed(runner, repository, roles):
    named = {
        "timestamp": repository.timestamp,
        "snapshot": repository.snapshot,
        "targets": repository.targets,
    }
    for role in roles:
        named[role].version = 999
    repository.publish()
    assert runner.refresh() == OK
    assert runner.versions()[roles[0]] == 1000
    for role in {"snapshot", "timestamp"} & {*roles, "snapshot"}:
        repository.rotate(role)
    if roles == ("timestamp",):
        repository.rotate("timestamp")
    repository.publish_root()
    for role in roles:
        named[role].version = 1
    repository.timestamp.version = 1
    repository.publish()
    assert runner.refresh() == OK
    assert runner.versions()[roles[0]] == 2


# --- expiry ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "kept"),
    [("timestamp", (1, 1, 1)), ("snapshot", (2, 1, 1)), ("targets", (2, 2, 1))],
)
def test_what_has_expired_is_not_kept(runner, repository, role, kept):
    assert runner.refresh() == OK
    getattr(repository, role).expires = repository.now - DAY
    repository.publish()
    assert runner.refresh() == REFUSED
    found = runner.versions()
    assert (found["timestamp"], found["snapshot"], found["targets"]) == kept


def test_an_expired_root_is_kept_and_nothing_follows_it(runner, repository):
    assert runner.refresh() == OK
    repository.root.expires = repository.now - DAY
    repository.publish_root()
    repository.publish()
    assert runner.refresh() == REFUSED
    assert (runner.versions()["root"], runner.versions()["timestamp"]) == (2, 1)


def test_under_another_time_what_has_expired_here_is_brought_up_to_date(runner, repository):
    if shutil.which("faketime") is None:
        pytest.skip("faketime is not here: scripts/test-setup installs it")
    assert runner.refresh() == OK
    later = repository.now + 18 * DAY
    late = ["faketime", clock.iso(later).replace("T", " ").rstrip("Z"), PROGRAM, *runner.words("refresh")]
    environ = {"TZ": "UTC", "PATH": "/usr/bin:/bin"}
    assert subprocess.run(late, check=False, env=environ, capture_output=True).returncode == REFUSED
    for signed in (repository.timestamp, repository.snapshot):
        signed.expires = later + DAY
    repository.publish()
    subprocess.run(late, check=True, env=environ)
    assert runner.versions()["timestamp"] == 2


# --- keys ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
def test_a_threshold_is_met_by_so_many_keys_and_by_no_fewer(runner, repository, role):
    for _ in range(2):
        repository.add_signer(role)
    repository.root.roles[role].threshold = 3
    repository.publish_root()
    repository.publish()
    assert runner.refresh() == OK
    repository.signers[role].pop()
    repository.publish()
    assert runner.refresh() == REFUSED


def test_one_key_listed_many_times_counts_once(runner, repository):
    keyid = repository.signers["snapshot"][0].public_key.keyid
    repository.root.roles["snapshot"].keyids += [keyid] * 3
    repository.root.roles["snapshot"].threshold = 2
    repository.publish_root()
    repository.publish()
    assert runner.refresh() == REFUSED
    assert "snapshot" not in runner.versions()


@pytest.mark.parametrize(
    ("signed_by", "outcome"), [("both", OK), ("old", REFUSED), ("new", REFUSED)], ids=["both", "old", "new"]
)
def test_a_root_is_followed_when_old_and_new_keys_signed_it(runner, repository, signed_by, outcome):
    old = list(repository.signers["root"])
    repository.rotate("root")
    new = list(repository.signers["root"])
    repository.publish_root({"both": [*old, *new], "old": old, "new": new}[signed_by])
    assert runner.refresh() == outcome
    assert runner.versions()["root"] == (2 if outcome == OK else 1)


@pytest.mark.parametrize("make", ["ed25519", "ecdsa", "rsa"])
def test_each_kind_of_key_of_the_specification_is_known(runner, repository, make):
    signer = getattr(CryptoSigner, f"generate_{make}")()
    repository.add_signer("root", signer)
    repository.root.roles["root"].threshold = 2
    repository.publish_root()
    assert runner.refresh() == OK
    assert runner.versions()["root"] == 2


# --- delegations and names -------------------------------------------------------------------------------


def delegate(repository, delegator, name, paths=("*",), terminating=False):
    """A role of a graph, published with the next `publish`."""
    above = repository.targets if delegator == "targets" else repository.extra[delegator]
    if above.delegations is None:
        above.delegations = Delegations({}, {})
    signer = repository.signers.setdefault(name, [CryptoSigner.generate_ed25519()])[0]
    above.delegations.roles[name] = DelegatedRole(name, [], 1, terminating, list(paths))
    above.add_key(signer.public_key, name)
    repository.extra.setdefault(name, Targets(1, expires=repository.now + DAY))


def visited(runner):
    return [path.partition(".")[2].removesuffix(".json") for path in runner.origin.paths()[4:]]


@pytest.mark.parametrize(
    ("edges", "order"),
    [
        ([("targets", "A"), ("targets", "B"), ("A", "C"), ("A", "D")], "ACDB"),
        ([("targets", "A"), ("targets", "B"), ("B", "C"), ("C", "D"), ("D", "B")], "ABCD"),
        ([("targets", "A"), ("targets", "B"), ("A", "C", ("*",), True), ("A", "D")], "AC"),
        ([("targets", "A", ("*.py",)), ("targets", "B"), ("A", "C")], "B"),
    ],
    ids=["depth first", "cyclic", "terminating", "paths"],
)
def test_delegations_are_walked_in_their_order(runner, repository, edges, order):
    for edge in edges:
        delegate(repository, *edge)
    repository.publish()
    assert runner.download("missing") == REFUSED
    assert visited(runner) == list(order)


def test_a_target_is_found_in_the_role_that_may_list_it_and_in_no_other(runner, repository):
    delegate(repository, "targets", "A", ("docs/*",))
    repository.add_target("docs/one", b"one", role=repository.extra["A"])
    repository.add_target("other/two", b"two", role=repository.extra["A"])
    repository.publish()
    assert runner.download("docs/one") == OK
    assert runner.download("other/two") == REFUSED
    assert runner.downloaded() == [b"one"]


@pytest.mark.parametrize("name", ["?", "#", "/delegated", "../delegated"])
def test_an_odd_name_of_a_role_is_quoted_on_the_way_and_on_the_disk(runner, repository, name):
    write = repository.write
    repository.write = lambda file, content: write(quote(file, safe=""), content)
    delegate(repository, "targets", name)
    repository.publish()
    before = set(runner.metadata.parent.iterdir())
    assert runner.download("missing") == REFUSED
    assert runner.origin.paths()[-1] == f"/metadata/2.{quote(name, safe='')}.json"
    assert len(runner.versions()) == 5
    assert set(runner.metadata.parent.iterdir()) == before


# --- files -----------------------------------------------------------------------------------------------


def test_a_file_in_a_directory_is_downloaded(runner, repository):
    repository.add_target("path/to/file.txt", b"deep")
    repository.publish()
    assert runner.download("path/to/file.txt", "file.txt") == OK
    assert runner.downloaded() == [b"content", b"deep"]


def test_a_file_that_was_exchanged_is_refused_and_leaves_nothing(runner, repository):
    digest = repository.targets.targets["file.txt"].hashes["sha256"]
    repository.target_file("file.txt", digest).write_bytes(b"CONTENT")
    assert runner.download("file.txt") == REFUSED
    assert runner.downloaded() == []


def test_without_consistent_snapshots_names_have_no_versions(runner, repository):
    repository.root.consistent_snapshot = False
    repository.publish_root()
    for name in ("snapshot", "targets"):
        repository.write(f"{name}.json", repository.read(f"1.{name}.json"))
    (repository.directory / "targets" / "file.txt").write_bytes(b"content")
    assert runner.download("file.txt") == OK
    assert runner.downloaded() == [b"content"]
