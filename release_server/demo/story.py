"""The demo: twenty real agents, one good rollout, one that halts itself, one tampered byte.

It types the commands that people type and reads the server's answers; nothing here knows how either works.
Every line says what was found, not what was hoped for.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import shutil
import signal
import socket
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from agent_core.errors import ConflictError, RelfleetError, UsageError
from release_server.demo.processes import Processes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from release_server.publish.client import Client

PRODUCT = "warehouse-agent"
COHORT = "main"
MARK = ".relfleet-demo"
AT_ONCE = 4
"""Enrolments side by side: twice as many as processors, since each also waits for disk and network."""
STEPS = "1,5,100%"
SITES = ("nord", "sued", "west", "ost")


@click.command()
@click.option("--agents", type=click.IntRange(3, 200), default=20, show_default=True, help="How many agents.")
@click.option(
    "--data",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("relfleet-demo"),
    show_default=True,
    help="Where everything goes; made anew.",
)
@click.option("--exit", "leave", is_flag=True, help="End when the story is told.")
def demo(agents: int, data: Path, leave: bool) -> None:
    """A real server and real agents on this machine: one good release, one bad one, one tampered byte."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background job begins with INT ignored
        signal.signal(number, signal.default_int_handler)
    story = Story(data.absolute(), data, agents)
    try:
        story.tell()
        story.forget_before()
        if not leave:
            story.linger()
    finally:
        story.processes.stop()


def example() -> Path:
    """The example product: in the installed package, else in the source tree."""
    here = Path(__file__).parent
    for place in (here / PRODUCT, here.parents[1] / "examples" / PRODUCT):
        if (place / "relfleet.toml").exists():
            return place
    raise RelfleetError(
        "the example product is not there", then="install relfleet from a wheel or its source"
    )


class Story:
    """One run of the demo.

    Args:
        home: absolute directory for everything.
        shown: the same as the person wrote it.
        count: how many agents.
    """

    def __init__(self, home: Path, shown: Path, count: int) -> None:
        self.home, self.shown = home, shown
        self.names = [f"demo-{number:02d}" for number in range(1, count + 1)]
        self.began = time.monotonic()
        self._before = home.with_name(f".{home.name}.before")
        self._mark = _make_anew(home, self._before)
        self.log = home / "demo.log"
        self.token = home / "enroll.token"
        self.processes = Processes(home, self.log)
        self.project = home / "product"
        self.url = ""
        self.client: Client
        self._building: dict[str, Any] = {}
        self._pushing: dict[str, Any] = {}

    def tell(self) -> None:
        """The whole story, top to bottom."""
        self.serve()
        self.make_keys()
        self.first_release()
        self.start_agents()
        self.good_rollout()
        self.bad_rollout()
        self.tamper()
        self.close()

    # --- telling ---------------------------------------------------------------------------------------

    def line(self, label: str, text: str, since: float | None = None) -> None:
        took = f"{time.monotonic() - since:.0f} s" if since is not None else ""
        click.echo(f" {label:<10} {text:<70} {took:>5}".rstrip())

    def release(self, *words: str) -> str:
        return self.processes.run("release", *words, cwd=self.project)

    # --- the parts -------------------------------------------------------------------------------------

    def serve(self) -> None:
        shutil.copytree(example(), self.project)
        self._begin_build("1.0.0")
        server = self.home / "server"
        data = ("--data", str(server))
        # A small machine: one web process is enough.
        self.processes.environ["RELFLEET_SERVER_WORKERS"] = "1"
        self.processes.run("release-server", "init", *data)
        log = self.home / "server.log"
        port = str(_free_port())
        self.processes.keep_command("server", "release-server", "run", *data, "--port", port, log=log)
        from release_server.publish.client import Client  # loaded while the server comes up

        url_file = server / "run" / "url"
        self.url = self.processes.wait_for(
            "the server", lambda: url_file.exists() and url_file.read_text(), within_s=120, every_s=0.05
        ).strip()
        self.client = Client(self.url, (server / "admin.token").read_text().strip())
        reader = self.client.post("/tokens", {"name": "demo-page", "role": "reader", "expires_s": 86_400})
        self.line("server", f"{self.url}   data in {self.shown}")
        self.line("", f"sign-in link: {self.url}/#token={reader['token']}")
        self._begin_build("1.1.0")

    def make_keys(self) -> None:
        passphrase = self.home / "passphrase"
        passphrase.touch(0o600)
        passphrase.write_text(secrets.token_urlsafe(16) + "\n")
        self.processes.environ |= {
            "RELFLEET_PASSPHRASE_FILE": str(passphrase),
            "RELFLEET_TOKEN_FILE": str(self.home / "server" / "admin.token"),
            "RELFLEET_SERVER": self.url,
        }
        self.release("key", "gen", "--trust-file", str(self.home / "root.json"))
        self.line("keys", "root + release key made, threshold 1: fine for a demo, see `release key gen`")

    def first_release(self) -> None:
        words = ("--role", "enroller", "--expires", "1d", "--name", "demo", "--out", str(self.token))
        token = self.processes.begin("release", "token", "create", *words, cwd=self.project)
        self._publish("1.0.0")
        self._begin_push("1.1.0")  # before there is an agent to look at it
        every = ("--poll", "1s", "--report", "20s")
        self.release("cohort", "create", COHORT, "--match", "", "--release", "1.0.0", *every)
        self.processes.finish(token)

    def _begin_build(self, version: str) -> None:
        """Build the next version while something else waits."""
        words = ("build", "--version", version)
        self._building[version] = self.processes.begin("release", *words, cwd=self.project)

    def _archive(self, version: str) -> Path:
        return self.project / "dist" / f"{PRODUCT}-{version}-{_platform()}.tar.zst"

    def _begin_push(self, version: str) -> bool:
        """Publish the next version while something else waits; no agent is told to take it.

        Returns:
            Whether that has begun; not while it is being built.
        """
        if version not in self._pushing and self._building[version].poll() is not None:
            self.processes.finish(self._building[version])
            words = ("push", "--quiet", str(self._archive(version)))
            self._pushing[version] = self.processes.begin("release", *words, cwd=self.project)
        return version in self._pushing

    def _publish(self, version: str) -> Path:
        self.processes.wait_for(
            f"the bundle of {version}", lambda: self._begin_push(version), within_s=120, every_s=0.05
        )
        self.processes.finish(self._pushing[version])
        return self._archive(version)

    def start_agents(self) -> None:
        since = time.monotonic()
        waiting = list(self.names)
        running: dict[str, Any] = {}
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                name = waiting.pop(0)
                running[name] = self._enroll(name)
            self._begin_push("1.1.0")
            ended = self.processes.wait_for(
                "an enrolment",
                lambda: [name for name, child in running.items() if child.poll() is not None],
                within_s=180,
                every_s=0.05,
            )
            for name in ended:
                self.processes.finish(running.pop(name))
                self._start(name)
        self._begin_push("1.1.0")
        enrolled = len(self._agents())
        self._await_all_on("1.0.0", 240)
        count = len(self.names)
        text = f"{count} started as processes, {enrolled} enrolled, {self._on('1.0.0')} on 1.0.0"
        self.line("agents", text, since)

    def _root(self, name: str) -> Path:
        return self.home / "agents" / name

    def _enroll(self, name: str, *extra: str) -> Any:
        site = SITES[sum(name.encode()) % len(SITES)]
        words = ("--root", str(self._root(name)), "--server", self.url, "--product", PRODUCT)
        trust = ("--trust", str(self.home / "root.json"), "--token-file", str(self.token))
        return self.processes.begin(
            "agent", "enroll", *words, *trust, "--name", name, "--label", f"site={site}", *extra
        )

    def _start(self, name: str) -> None:
        root = self._root(name)
        launcher = str(root / "launcher" / "launcher.pyz")
        argv = [sys.executable, "-I", "-S", "-B", launcher, "--root", str(root), "--supervise"]
        self.processes.keep(name, argv, self.home / "agents" / f"{name}.log")

    def _agents(self) -> list[dict[str, Any]]:
        return self.client.items("/agents", product=PRODUCT)

    def _await_all_on(self, version: str, within_s: float) -> None:
        every = len(self.names)
        self.processes.wait_for(
            f"all agents on {version}", lambda: self._on(version) == every, within_s=within_s
        )

    def _on(self, version: str) -> int:
        return sum(agent["version"] == version for agent in self._agents())

    def good_rollout(self) -> None:
        self._push("1.1.0", "")
        since = time.monotonic()
        rollout = self._begin_rollout("1.1.0")
        self._begin_build("1.2.0")
        ended = self._await(rollout, {"completed", "paused"}, lambda: self._begin_push("1.2.0"))
        if ended["state"] != "completed":
            raise RelfleetError(
                "the good rollout did not complete", why=ended["detail"], then=f"read {self.log}"
            )
        self._await_all_on("1.1.0", 120)
        healthy = ended["counters"]["healthy"]
        way = f"{ended['name']}  {ended['base']} → {ended['version']}   {self._stages(ended)} agents"
        self.line("rollout", f"{way}     {healthy}/{len(self.names)} healthy", since)

    def bad_rollout(self) -> None:
        self._push("1.2.0", "  (broken on purpose: it exits after two seconds)")
        since = time.monotonic()
        rollout = self._begin_rollout("1.2.0")
        ended = self._await(rollout, {"completed", "paused"})
        tried = [event for event in ended["events"] if event["event"] == "halted"]
        reached = sum(
            ended["counters"].get(state, 0) for state in ("rolled_back", "failed", "healthy", "trial")
        )
        agents = "1 agent" if reached == 1 else f"{reached} agents"
        way = f"{ended['name']}  {ended['base']} → {ended['version']}   {agents}"
        if not tried:
            raise RelfleetError(
                "the bad rollout was not halted", why=ended["detail"], then=f"read {self.log}"
            )
        self.line("rollout", f"{way}   halted: {ended['detail']}", since)
        self._tell_rollback()

    def _tell_rollback(self) -> None:
        self._await_all_on("1.1.0", 120)
        saw = self.processes.wait_for("the way back of all who tried", self._who_went_back, within_s=120)
        others = len(self.names) - len(saw)
        for name, events in saw.items():
            took = _seconds_between(events, "1.2.0", "trial", "rolled_back")
            self.line(
                "", f"{name} went back to 1.1.0 by itself in {took} s; the other {others} never saw 1.2.0"
            )
        self.bad = next(iter(saw))

    def _who_went_back(self) -> dict[str, list[dict[str, Any]]] | None:
        """What everyone who tried 1.2.0 told of it; None while someone has not told its end."""
        histories = {name: self.client.get(f"/agents/{name}")["events"] for name in self.names}
        saw = {name: events for name, events in histories.items() if _tried(events, "1.2.0")}
        told = all(_tried(events, "1.2.0", "rolled_back") for events in saw.values())
        return saw if told else None

    def _push(self, version: str, remark: str) -> None:
        length = self._publish(version).stat().st_size
        published = self.client.get(f"/releases/{PRODUCT}/{version}")
        said = "signed, uploaded" if published["version"] == version else "not published"
        self.line("push", f"{version}  {length / 1e6:.1f} MB, {said}{remark}")

    def _begin_rollout(self, version: str) -> int:
        words = (
            "--cohort",
            COHORT,
            "--steps",
            STEPS,
            "--soak",
            "0s",
            "--max-failed",
            "0",
            "--deadline",
            "2m",
        )
        begun = self.processes.ask("release", "rollout", "start", version, *words, cwd=self.project)
        number: int = begun["id"]
        return number

    def _await(
        self, rollout: int, states: set[str], meanwhile: Callable[[], object] = lambda: None
    ) -> dict[str, Any]:
        def ended() -> dict[str, Any] | None:
            meanwhile()
            found: dict[str, Any] = self.client.get(f"/rollouts/{rollout}")
            return found if found["state"] in states else None

        found: dict[str, Any] = self.processes.wait_for(f"rollout r-{rollout}", ended, within_s=300)
        return found

    def _unexpected(self, what: str, rollout: dict[str, Any]) -> RelfleetError:
        why = f"it is {rollout['state']}: {rollout['reason']} {rollout['detail']}"
        return RelfleetError(what, why=why, then=f"read {self.log}")

    def _stages(self, rollout: dict[str, Any]) -> str:
        """How many agents each stage reached, by the numbers that its end saw."""
        passed = [event for event in rollout["events"] if event["event"] == "stage-passed"]
        return " → ".join(
            str(event["numbers"]["reached"]) for event in sorted(passed, key=lambda one: one["stage"])
        )

    def tamper(self) -> None:
        """Change one byte of a published bundle; a new host must refuse it, and recover when it is mended."""
        published = self.client.get(f"/releases/{PRODUCT}/1.1.0")
        digest = published["bundles"][0]["sha256"]
        directory = self.home / "server" / "repository" / "targets" / "bundles" / PRODUCT / "1.1.0"
        bundle = next(directory.glob(f"{digest}.*.tar.zst"))
        _flip_a_byte(bundle)
        name = f"demo-{len(self.names) + 1:02d}"
        printed = self.processes.finish(self._enroll(name, "--json"))
        outcome = json.loads(printed)["outcome"]
        refused = outcome["failed"] and outcome["reason"] == "digest-mismatch"
        said = "refused it (digest mismatch)" if refused else f"answered: {outcome['reason']}"
        self.line("tamper", f"one byte of 1.1.0 changed on the server → {name}, a new host, {said}")
        if not refused:
            raise RelfleetError("the tampered bundle was not refused", why=outcome["detail"])
        _flip_a_byte(bundle)
        self.names.append(name)
        words = ("run", "--root", str(self._root(name)), "--supervise")  # installs what is not there yet
        self.processes.keep_command(name, "agent", *words, log=self.home / "agents" / f"{name}.log")
        self._await_all_on("1.1.0", 120)
        self.line("", f"the byte put back → {name} installed 1.1.0")

    def close(self) -> None:
        took = time.monotonic() - self.began
        click.echo(f" Done in {took:.0f} s.  Logs: {self.shown / 'demo.log'}, {self.shown / 'agents'}/*.log")
        place = f"cd {self.shown / 'product'}"
        click.echo(f" Try:  {place} && . ../env")
        click.echo(f"       release rollout status r-2 · release agents why {self.bad} · open the link")
        self._write_env()

    def forget_before(self) -> None:
        """Remove what an earlier demo left; while this one is told, agents have better things to do."""
        if self._before.exists():
            _remove(self._before)

    def _write_env(self) -> None:
        names = (
            "XDG_CONFIG_HOME",
            "XDG_STATE_HOME",
            "RELFLEET_SERVER",
            "RELFLEET_TOKEN_FILE",
            "RELFLEET_PASSPHRASE_FILE",
        )
        lines = [f"export {name}='{self.processes.environ[name]}'" for name in names]
        lines.append(f"export PATH='{Path(sys.executable).parent}':$PATH")
        (self.home / "env").write_text("\n".join(lines) + "\n")

    def linger(self) -> None:
        """Go on until Ctrl-C, so that people can look around."""
        click.echo(" The server and the agents go on. Ctrl-C ends them all.")
        while True:
            time.sleep(1)
            self.processes.revive()


def _free_port() -> int:
    """A port for the server, the same one when it is started again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _platform() -> str:
    from agent_core.bundle import host_platforms

    return host_platforms()[0]


def _make_anew(home: Path, before: Path) -> IO[str]:
    """An empty directory; only what an earlier demo made is ever set aside, and removed from there."""
    if home.exists() and any(home.iterdir()):
        _refuse_foreign(home)
        with _lock(home):
            if before.exists():  # of a demo that was interrupted
                _refuse_foreign(before)
                _remove(before)
            home.rename(before)
    home.mkdir(parents=True, exist_ok=True)
    (home / MARK).touch()
    return _lock(home)


def _refuse_foreign(home: Path) -> None:
    if not (home / MARK).exists():
        raise UsageError(f"{home} is not empty and no demo made it", then="choose another --data")


def _lock(home: Path) -> IO[str]:
    """Hold the directory for as long as the file is open."""
    mark = (home / MARK).open("a")
    try:
        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConflictError(f"a demo runs in {home}", then="end it, or choose another --data") from None
    return mark


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _remove(home: Path) -> None:
    """Remove a tree whose installed versions are read-only directories; its mark stays until the end."""
    for directory in home.glob("agents/*/versions/**/"):
        directory.chmod(0o755)
    for entry in home.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
    shutil.rmtree(home)


def _flip_a_byte(file: Path) -> None:
    mode = file.stat().st_mode
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    file.chmod(mode)


def _tried(events: Sequence[dict[str, Any]], version: str, state: str = "") -> bool:
    return any(event["version"] == version and state in ("", event["state"]) for event in events)


def _seconds_between(events: Sequence[dict[str, Any]], version: str, first: str, last: str) -> str:
    at = {
        event["state"]: datetime.fromisoformat(event["at"]) for event in events if event["version"] == version
    }
    return f"{(at[last] - at[first]).total_seconds():.0f}"
