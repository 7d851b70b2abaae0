"""A real server, real bundles and real agents on loopback, for tests that tell a whole story."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from agent_core import clock, slots
from agent_core.archive import stored_zip
from agent_core.bundle import Index, host_platforms, pack, unpack
from agent_core.errors import UnreachableError
from agent_core.hooks import Hook, Hooks
from agent_core.layout import Layout
from agent_core.slots import Record
from release_server.database import Sessions, make_engine
from release_server.demo.processes import Processes, wait_for
from release_server.publish import push, sign
from release_server.publish.client import Client
from tests import postgres
from updater import attempt as attempts
from updater import control, transport
from updater.device import Device

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

PRODUCT = "probe"
PATIENCE_S = 60.0

FOREVER = "import time\nwhile True:\n    time.sleep(60)\n"

WAITS = 'test -e "$RELFLEET_ROOT/go"\n'
"""A check that passes when a file is there: the trial lasts until a story has seen what it looks at."""

PATIENT = {"timeout_s": 60.0}
CHECK = {"kind": "exec", "name": "check", "argv": ["/bin/sh", "app/check"], "interval_s": 0.2, **PATIENT}

UNTIL_TOLD = """\
import os, pathlib, time
while not pathlib.Path(os.environ["RELFLEET_ROOT"], "leave").exists():
    time.sleep(0.05)
"""

SAYS_NO = Hooks(pre_activate=Hook(("/bin/sh", "-c", "echo the table is locked; exit 4")))
FAILS_AFTER = Hooks(post_activate=Hook(("/bin/sh", "-c", "exit 5")))
MARK = Hook(("/bin/sh", "-c", 'echo "$RELFLEET_HOOK $RELFLEET_VERSION_BEFORE" >> "$RELFLEET_ROOT/hooks"'))

LIES = """\
import json
def main(verb, words):
    print(json.dumps({"ok": True, "version": "9.9.9", "product": "probe"}))
    return 0
"""


DEAF = (
    Path(transport.__file__).read_text()
    + """
def _hears_nothing(*_, **__):
    raise _offline("the server", "anything", "this version cannot be told a word")

Transport._exchange = _hears_nothing
"""
)


@dataclass(frozen=True)
class Variant:
    """What a version of the probe has that the good one has not: other files, other words in its index."""

    files: dict[str, str] = field(default_factory=dict)
    index: dict[str, Any] = field(default_factory=dict)


# Each is a whole bundle with the whole agent inside, packed anew and signed like any other.
VARIANTS: dict[str, Variant] = {
    "1.1.0": Variant(),
    "1.2.0": Variant({"app/notes.txt": "another good one\n"}, {"boots": 4, "hooks": Hooks(MARK, MARK)}),
    "1.3.0": Variant(),
    "1.4.0-waits": Variant({"app/check": WAITS}, {"health": ({**CHECK, "grace_s": 600.0},)}),
    "2.0.0-exits-at-once": Variant({"app/main.py": "raise SystemExit(3)\n"}),
    "2.1.0-never-healthy": Variant({"app/check": "exit 1\n"}),
    "2.2.0-cannot-import": Variant({"lib.zip/updater/service.py": "import there_is_no_such_module\n"}),
    "2.3.0-hangs": Variant(
        {"lib.zip/updater/service.py": "import time\ndef serve(root):\n    time.sleep(3600)\n"},
        {"deadman_s": 3},
    ),
    "2.4.0-agent-exits": Variant({"lib.zip/updater/service.py": "def serve(root):\n    return 3\n"}),
    "2.5.0-exits-when-good": Variant({"app/main.py": UNTIL_TOLD}),
    "2.6.0-lies": Variant({"lib.zip/updater/internal.py": LIES}),
    "2.7.0-says-no": Variant(index={"hooks": SAYS_NO}),
    "2.8.0-hook-fails": Variant(index={"hooks": FAILS_AFTER}),
    "2.8.1-hears-nothing": Variant({"lib.zip/updater/transport.py": DEAF}),
    "2.9.0-exits-by-file": Variant({"app/main.py": "raise SystemExit(3)\n"}),
}

PROJECT = """\
[product]
name = "probe"

[build]
source = "app"
entry = ["{python}", "app/main.py"]

[health]
observe_s = 0.9
boots = 2
deadman_s = 8

[[health.checks]]
kind = "process"
interval_s = 0.2
timeout_s = 0.6
grace_s = 0

[[health.checks]]
kind = "exec"
argv = ["/bin/sh", "app/check"]
interval_s = 0.2
timeout_s = 0.6
grace_s = 0
"""

HASTY = """\
[poll]
max_backoff_s = 1.0

[health]
step_s = 0.1
"""
"""What the agents of the stories are set to; so a backoff is over before a test loses its patience."""


LIBRARY = "lib.zip"
"""Where a bundle keeps the agent itself; a variant names a module in it as if this were a directory."""


def member_of(archive: Path, name: str) -> bytes:
    """One file of an archive."""
    with zipfile.ZipFile(archive) as opened:
        return opened.read(name)


def _with_member(archive: Path, name: str, content: bytes) -> bytes:
    """The archive with another content of one module, whose compiled form goes."""
    with zipfile.ZipFile(archive) as opened:
        kept = {member: opened.read(member) for member in opened.namelist() if member != f"{name}c"}
    return stored_zip(kept | {name: content})


class Commands(Processes):
    """The demo's processes, and what only tests do to processes."""

    def end(self, name: str, how: signal.Signals) -> None:
        """Signal one that goes on, and wait for its end."""
        child = self._kept.pop(name)
        child.send_signal(how)
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def is_running(self, name: str) -> bool:
        return name in self._kept and self._kept[name].poll() is None

    def end_all_but(self, *names: str) -> None:
        """End what a test has left running, side by side."""
        ended = {name: child for name, child in self._kept.items() if name not in names}
        for child in ended.values():
            child.terminate()
        for name in ended:
            self.end(name, signal.SIGTERM)

    def outcome(
        self, command: str, *words: str, cwd: Path | None = None, environ: dict[str, str] | None = None
    ) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command that may fail."""
        done = subprocess.run(
            self._argv(command, words),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd=cwd,
            env=self.environ | (environ or {}),
            timeout=120,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr


class World:
    """One server for all tests of a worker; each test has a cohort of its own, told apart by a label."""

    def __init__(self, home: Path, database_url: str = "") -> None:
        self.home = home
        self.database_url = database_url
        self.processes = Commands(home, home / "commands.log")
        self.project = home / "probe"
        self.numbers = itertools.count(1)
        self.published: set[str] = set()
        self.url = ""
        self.port = "0"

    # --- the server ------------------------------------------------------------------------------------

    @property
    def server_data(self) -> Path:
        return self.home / "server"

    @property
    def metadata(self) -> Path:
        """What the server serves as /metadata/."""
        return self.server_data / "repository" / "metadata"

    def timestamp(self) -> bytes:
        return (self.metadata / "timestamp.json").read_bytes()

    def directive(self, cohort: str) -> dict[str, Any]:
        """What is given out for a cohort, come to from the timestamp as an agent does."""
        signed = json.loads(self.timestamp())["signed"]
        for role in ("snapshot", "cohorts"):
            number = signed["meta"][f"{role}.json"]["version"]
            signed = json.loads((self.metadata / f"{number}.{role}.json").read_bytes())["signed"]
        custom: dict[str, Any] = signed["targets"][f"cohorts/{PRODUCT}/{cohort}.json"]["custom"]
        return custom

    def make(self) -> None:
        """Server, keys, and the first good version published; others are when a test asks for them."""
        # The lease of a jobs process that was killed has to end before the next one works.
        self.processes.environ |= {"RELFLEET_JOBS_TICK_S": "0.1", "RELFLEET_JOBS_LEASE_S": "3"}
        if self.database_url:
            self.processes.environ["RELFLEET_DATABASE_URL"] = self.database_url
        self.processes.run("release-server", "init", "--data", str(self.server_data))
        self.start_server()
        (self.home / "passphrase").write_text("correct horse\n")
        (self.home / "passphrase").chmod(0o600)
        self.processes.environ |= {
            "RELFLEET_SERVER": self.url,
            "RELFLEET_TOKEN_FILE": str(self.server_data / "admin.token"),
            "RELFLEET_PASSPHRASE_FILE": str(self.home / "passphrase"),
        }
        self.project.mkdir()
        (self.project / "relfleet.toml").write_text(PROJECT)
        self.release("key", "gen")
        self.release("key", "export-trust", "-o", str(self.trust))
        app = self.project / "app"
        app.mkdir()
        (app / "main.py").write_text(FOREVER)
        (app / "check").write_text("exit 0\n")
        self.release("build", "--version", "1.0.0")
        self.unpack_good()
        self.publish("1.0.0")
        self.token = self.make_token("enroller")

    def start_server(self) -> None:
        data = ("--data", str(self.server_data))
        log = self.home / "server.log"
        self.processes.keep_command("server", "release-server", "run", *data, "--port", self.port, log=log)
        url_file = self.server_data / "run" / "url"
        self.url = wait_for(
            "the server",
            lambda: url_file.exists() and url_file.read_text().strip(),
            within_s=PATIENCE_S,
            every_s=0.05,
        )
        self.port = self.url.rpartition(":")[2]

    def stop_server(self) -> None:
        self.processes.end("server", signal.SIGTERM)

    def kill_server(self) -> None:
        """SIGKILL to its parent process, its web workers and its jobs process, as a power cut would."""
        doomed = self.server_processes()
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.processes.end("server", signal.SIGKILL)
        psutil.wait_procs(doomed[1:], timeout=10)
        (self.server_data / "run" / "url").unlink(missing_ok=True)

    def server_processes(self) -> list[psutil.Process]:
        parent = psutil.Process(self.processes.pids()["server"])
        return [parent, *parent.children(recursive=True)]

    @contextmanager
    def jobs_stopped(self) -> Iterator[None]:
        """Nothing is signed or exported meanwhile; the web server goes on."""
        worker = next(one for one in self.server_processes() if "worker" in one.cmdline())

        def is_stopped_between_transactions() -> bool:
            worker.suspend()
            # A signal is only sent: until it is taken, a system call may still get the database's lock.
            until("the jobs process to stand still", lambda: worker.status() == psutil.STATUS_STOPPED)
            if self._can_write():
                return True
            worker.resume()
            return False

        until("the jobs process to be outside a transaction", is_stopped_between_transactions)
        try:
            yield
        finally:
            worker.resume()

    def _can_write(self) -> bool:
        engine = make_engine(self.database_url or f"sqlite:///{self.server_data / 'relfleet.db'}")
        hurry = "PRAGMA busy_timeout=200" if engine.dialect.name == "sqlite" else "SET lock_timeout='200ms'"

        @event.listens_for(engine, "connect")
        def be_brief(connection: Any, _: object) -> None:
            """Whoever stands still in a transaction is to go on before his own deadlines pass."""
            connection.execute(hurry)
            connection.commit()

        with closing(Sessions(engine)) as sessions:
            try:
                with sessions.write() as session:
                    session.connection()  # nothing is begun before something is asked
                    return True
            except OperationalError:
                return False

    @cached_property
    def client(self) -> Client:
        return Client(self.url, (self.server_data / "admin.token").read_text().strip())

    # --- the release manager ---------------------------------------------------------------------------

    @property
    def trust(self) -> Path:
        return self.home / "root.json"

    def release(self, *words: str) -> str:
        return self.processes.run("release", *words, cwd=self.project)

    def exit_of(self, command: str, *words: str, **options: Any) -> tuple[int, str, str]:
        """Exit code, stdout and stderr of a command that may fail."""
        return self.processes.outcome(command, *words, cwd=self.project, **options)

    def archive(self, version: str) -> Path:
        return self.project / "dist" / f"{PRODUCT}-{version}-{host_platforms()[0]}.tar.zst"

    def digest(self, version: str) -> str:
        """The DIGEST12 by which a host knows this version."""
        return sha256(index_of(self.archive(version)).read_bytes()).hexdigest()[:12]

    def publish(self, *versions: str) -> None:
        """Build and push what is not there yet, all under one signature of the release keys."""
        fresh = [version for version in versions if version not in self.published]
        if not fresh:
            return
        with ThreadPoolExecutor(2) as both:  # compression leaves the interpreter's lock
            releases = list(both.map(push.load, both.map(self.build, fresh)))
        trust, cache = self.trust.read_bytes(), self.home / "cache"
        trusted = sign.fetch(self.client, trust, cache)
        push.ensure_product(self.client, PRODUCT)
        for release in releases:
            push.upload(self.client, release.archive)
            push.upload(self.client, release.index)
        targets = sign.with_releases(trusted, releases, clock.now())
        signers = sign.release_signers(self.keys, trusted.root.signed, lambda _: "correct horse")
        assert sign.sign_targets(targets, trusted.root.signed, signers) == 0
        self.client.post("/metadata/targets", targets.to_bytes())
        assert push.wait_published(lambda: sign.fetch(self.client, trust, cache), releases, PATIENCE_S)
        self.published |= set(fresh)

    @property
    def keys(self) -> Path:
        return self.home / "config" / "relfleet" / "keys"

    def build(self, version: str) -> Path:
        """The bundle of a version, packed if it is not there; the archive."""
        if not self.archive(version).exists():
            variant = VARIANTS[version]
            self.derive(version, variant.files, **variant.index)
        return self.archive(version)

    def derive(self, version: str, files: Mapping[str, str | bytes], **said: Any) -> Path:
        """A bundle like 1.0.0 but for its version, some files and some words of its index; the archive."""
        tree = self.home / f"tree-{version}"
        index = Index.from_bytes(index_of(self.archive("1.0.0")).read_bytes())
        shutil.copytree(self.tree, tree, copy_function=os.link)
        for path, text in files.items():
            content = text if isinstance(text, bytes) else text.encode()
            place = tree / path
            if path.startswith(f"{LIBRARY}/"):
                place = tree / LIBRARY
                content = _with_member(place, path.removeprefix(f"{LIBRARY}/"), content)
            place.unlink(missing_ok=True)
            place.write_bytes(content)
            for stale in place.parent.glob(f"__pycache__/{place.stem}.*.pyc"):
                stale.unlink()
        packed = pack(tree, self.archive(version))
        # A good version is not left because a busy machine took a second to start a shell, or ten to start an
        # agent. `release build` refuses checks that are slower than the trial, so 1.0.0 has its own.
        patient = {"health": tuple({**check, **PATIENT} for check in index.health), "deadman_s": 120}
        fresh = replace(index, version=version, files=packed, **patient | said)
        index_of(self.archive(version)).write_bytes(fresh.to_bytes())
        shutil.rmtree(tree)
        return self.archive(version)

    @property
    def tree(self) -> Path:
        """1.0.0 unpacked, for others to be made of."""
        return self.home / "tree"

    def unpack_good(self) -> None:
        archive = self.archive("1.0.0")
        unpack(archive, Index.from_bytes(index_of(archive).read_bytes()), self.tree)
        subprocess.run(["chmod", "-R", "u+w", self.tree], check=True)

    def target(self, version: str) -> Path:
        """The archive of a version as the server serves it."""
        digest = sha256(self.archive(version).read_bytes()).hexdigest()
        directory = self.server_data / "repository" / "targets" / "bundles" / PRODUCT / version
        return next(directory.glob(f"{digest}.*.tar.zst"))

    def make_token(self, role: str, *more: str) -> Path:
        file = self.home / f"{role}-{next(self.numbers)}.token"
        self.release("token", "create", "--role", role, "--name", file.stem, "--out", str(file), *more)
        return file

    # --- the operator ----------------------------------------------------------------------------------

    def steer(self, cohort: str, verb: str, **said: Any) -> dict[str, Any]:
        """Pin, unpin, freeze or unfreeze a cohort."""
        body = {"reason": "a test", **said}
        found: dict[str, Any] = self.client.post(f"/cohorts/{PRODUCT}/{cohort}/{verb}", body)
        return found

    def cohort(self, *, release: str = "1.0.0") -> str:
        """A new one; hosts made for it join by their label."""
        name = f"t{next(self.numbers)}"
        said = {"match": f"test={name}", "release": release, "poll_s": 1, "report_s": 1}
        self.client.post("/cohorts", {"product": PRODUCT, "name": name, **said})
        return name

    def pin(self, cohort: str, version: str) -> None:
        """The quickest way to ask hosts for a version."""
        self.publish(version)
        self.steer(cohort, "pin", version=version)

    def roll_out(self, version: str, cohort: str, *steps: str | int, soak_s: int = 0) -> int:
        """Begin a rollout; a step is a count of agents, or `all`."""
        self.publish(version)
        sizes = [{"share_bp": 10_000} if step == "all" else {"count": step} for step in steps or ("all",)]
        stages = [{**size, "soak_s": soak_s, "max_failed": 0} for size in sizes]
        body = {"product": PRODUCT, "cohort": cohort, "version": version, "stages": stages}
        return int(self.client.post("/rollouts", body)["id"])

    def rollout(self, number: int) -> dict[str, Any]:
        found: dict[str, Any] = self.client.get(f"/rollouts/{number}")
        return found

    def await_rollout(self, number: int, *states: str) -> dict[str, Any]:
        def reached() -> dict[str, Any] | None:
            found = self.rollout(number)
            return found if found["state"] in states else None

        return until(f"rollout {number} to be {states}", reached)

    # --- hosts -----------------------------------------------------------------------------------------

    def host(self, cohort: str, *, start: bool = True) -> Host:
        return self.hosts(cohort, start=start)[0]

    def hosts(self, *cohorts: str, start: bool = True) -> list[Host]:
        """One new host for each of the cohorts named, enrolled side by side."""
        hosts = [Host(self, f"{cohort}-{next(self.numbers)}", cohort) for cohort in cohorts]
        for child in [host.begin_enrolment() for host in hosts]:
            self.processes.finish(child)
        for host in hosts:
            Layout(host.root).settings.write_text(HASTY)
            if start:
                host.start()
        return hosts


@contextmanager
def running(home: Path, kind: type[World] = World) -> Iterator[World]:
    """A world below `home`, on PostgreSQL where that is wanted; none of its processes outlives it."""
    with ExitStack() as stack:
        url = stack.enter_context(postgres.cluster().database()) if postgres.WANTED else ""
        world = kind(home, url)
        try:
            world.make()
            yield world
        finally:
            world.processes.stop()
            subprocess.run(["chmod", "-R", "u+w", home], check=False)


def until(what: str, found: Callable[[], Any], *, every_s: float = 0.05) -> Any:
    """Ask until the answer is true, at most for as long as anything may take here."""
    return wait_for(what, found, within_s=PATIENCE_S, every_s=every_s)


def index_of(archive: Path) -> Path:
    return archive.with_name(archive.name.removesuffix(".tar.zst") + ".index.json")


class Host:
    """One host with a root of its own."""

    def __init__(self, world: World, name: str, cohort: str) -> None:
        self.world, self.name, self.cohort = world, name, cohort
        self.root = world.home / "hosts" / name
        self.layout = Layout(self.root)

    def begin_enrolment(self, *more: str, token: Path | None = None) -> subprocess.Popen[str]:
        world = self.world
        words = ["--root", str(self.root), "--server", world.url, "--product", PRODUCT, "--name", self.name]
        words += ["--trust", str(world.trust), "--token-file", str(token or world.token)]
        words += ["--label", f"test={self.cohort}", *more]
        return world.processes.begin("agent", "enroll", *words)

    def start(self) -> None:
        launcher = str(self.root / "launcher" / "launcher.pyz")
        argv = [sys.executable, "-I", "-S", "-B", launcher, "--root", str(self.root), "--supervise"]
        argv += ["--backoff-s", "0.1", "--backoff-most-s", "0.5"]
        self.world.processes.keep(self.name, argv, self.log)

    @property
    def log(self) -> Path:
        return self.world.home / f"{self.name}.log"

    def kill(self, *, everything: bool = False) -> None:
        """SIGKILL to the launcher, or to it and all that it started, as a power cut would."""
        launcher = psutil.Process(self.world.processes.pids()[self.name])
        doomed = [launcher, *(launcher.children(recursive=True) if everything else [])]
        for process in doomed:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.world.processes.end(self.name, signal.SIGKILL)

    def start_again(self) -> None:
        """As a service manager would after a crash: once what was left of the last run is gone."""
        until(f"{self.name} to be free", lambda: self._is_free() and not self.pid())
        self.start()

    def _is_free(self) -> bool:
        with control.alone(self.layout) as is_alone:
            return is_alone

    def stop(self) -> None:
        self.world.processes.end(self.name, signal.SIGTERM)

    def agent(self, *words: str) -> tuple[int, str, str]:
        return self.world.exit_of("agent", *words, "--root", str(self.root))

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.world.processes.ask("agent", "status", "--root", str(self.root))
        return found

    # --- what is so on it ------------------------------------------------------------------------------

    @property
    def record(self) -> Record:
        record = slots.read(self.root)
        assert record is not None
        return record

    @property
    def good(self) -> str:
        return slots.version_of(self.record.good)

    @property
    def skipped(self) -> dict[str, str]:
        """Why each bundle is skipped, by digest."""
        return {entry[0]: entry[1] for entry in self.record.skip}

    @property
    def attempt(self) -> attempts.Attempt | None:
        return attempts.load(Device.load(self.root).attempt_file)

    @property
    def reason(self) -> str:
        """Of the last check."""
        outcome = Device.load(self.root).outcome()
        return outcome.reason if outcome else ""

    @property
    def news(self) -> dict[str, Any]:
        return control.read_status(self.layout)

    def pid(self) -> int | None:
        """The resident agent's process."""
        return self.news["pid"] if control.is_running(self.layout) else None

    def look(self) -> str:
        """Have the agent check now; the reason that came of it."""
        self.await_agent()
        file = Device.load(self.root).outcome_file
        before = file.stat().st_mtime_ns
        control.wake(self.layout)
        until(f"{self.name} to look", lambda: file.stat().st_mtime_ns != before)
        return self.reason

    def await_look(self, reason: str) -> None:
        """Have the agent check until this comes of it: one in progress may have fetched what was before."""
        said: list[str] = []

        def says_so() -> bool:
            said.append(self.look())
            return said[-1] == reason

        try:
            until(f"{self.name} to look and say {reason}", says_so)
        except UnreachableError:
            raise AssertionError(f"{self.name} was to say {reason} and said {said[-5:]}") from None

    # --- waiting ---------------------------------------------------------------------------------------

    def await_good(self, version: str) -> None:
        until(
            f"{self.name} to settle on {version}",
            lambda: self.record.phase == slots.IDLE and self.good == version,
        )

    def await_reason(self, *reasons: str) -> None:
        until(f"{self.name} to say {reasons}", lambda: self.reason in reasons)

    def await_skip(self, version: str) -> str:
        """Wait until a bundle of this version is skipped here; the reason."""
        digest = self.world.digest(version)
        found: str = until(f"{self.name} to skip {version}", lambda: self.skipped.get(digest))
        return found

    def await_agent(self, *, other_than: int | None = None) -> int:
        """Wait until an agent runs; its process."""
        found: int = until(f"{self.name} to run", lambda: (pid := self.pid()) != other_than and pid)
        return found

    # --- what the server sees --------------------------------------------------------------------------

    def seen_by_server(self) -> dict[str, Any]:
        found: dict[str, Any] = self.world.client.get(f"/agents/{self.name}")
        return found

    def await_seen(self, **wanted: Any) -> dict[str, Any]:
        """Wait until the server's view of this agent has these values."""

        def seen() -> dict[str, Any] | None:
            found = self.seen_by_server()
            return found if all(found[key] == value for key, value in wanted.items()) else None

        found: dict[str, Any] = until(f"the server to see {self.name} as {wanted}", seen)
        return found

    def events(self, version: str) -> list[dict[str, Any]]:
        """What the server heard of this version from here, in order."""
        events = sorted(self.seen_by_server()["events"], key=lambda event: event["number"])
        return [event for event in events if event["version"] == version]

    def states(self, version: str) -> list[str]:
        return [event["state"] for event in self.events(version)]
