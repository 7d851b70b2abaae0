"""This module is the systemd tier: the agent as a service of a machine that really boots.

One machine, one host, one release server on loopback. Each scenario takes the host from idle to idle again:
versions that end, hang or stop answering; a stop, a reboot and a cut in the middle of a trial; kills. The
unit is the one that `agent install-service` writes, typed in the machine; a drop-in shortens its waits.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sysconfig
import tempfile
import urllib.request
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_core import slots
from agent_core.bundle import Index
from tests.crash.machine import Machine, unavailable
from tests.integration.world import LIBRARY, Host, World, index_of, member_of, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from agent_core.slots import Record
    from tests.crash.tally import Tally

__all__ = ["run", "unavailable"]

ROOT = "/var/lib/relfleet"
WORKLOAD = "app/main.py"
UNIT = "relfleet-agent.service"
HOUSE = Path(__file__).resolve().parents[2]
OTHER_USER = "daemon"
SERVER_UNIT = HOUSE / "deploy" / "systemd" / "relfleet-server.service"
SIGNER_UNIT = HOUSE / "deploy" / "systemd" / "relfleet-signer.service"
SERVER_DATA = "/var/lib/relfleet-server"
SIGNER_HOME = "/var/lib/relfleet-signer"
SIGNER_SOCKET = "/run/relfleet-signer/signer.sock"
SERVER = """\
#!/usr/bin/python3 -B
import sys
from release_server.cli import main
sys.exit(main())
"""
LIBRARIES = "/opt/house\n/opt/libraries\n"
DROP_INS = f"/etc/systemd/system/{UNIT}.d"
HASTY = "[Service]\nRestartSec=200ms\n"
# A container has its boot id from a bind mount, which these two hide; a real host's is the kernel's own.
BOOT_ID = "[Service]\nProtectKernelTunables=no\nProtectControlGroups=no\n"
WATCHED = "[Service]\nWatchdogSec=4s\n"
MOST_EXPOSED, SERVER_MOST_EXPOSED = 2.5, 1.5
"""Of 10, as `systemd-analyze security` counts on the running unit."""
MORE_THAN_SYSTEMD_ALLOWS = 8
"""Kills in quick succession; systemd gives a unit up after five in ten seconds unless told otherwise."""

KILLS = """\
last=0 killed=0
while [ $killed -lt $2 ]; do
    pid=$(systemctl show --value --property=MainPID $1)
    [ $pid = 0 ] || [ $pid = $last ] || { kill -KILL $pid && last=$pid killed=$((killed + 1)); }
    sleep 0.05
done
"""

# What a version on trial does, written over the agent's own module or the product's.
WAITS = 'test -e "$RELFLEET_ROOT/go"\n'
ENDS_WITH = "def serve(root):\n    return {code}\n"
HANGS_BEFORE = "import time\ndef serve(root):\n    time.sleep(3600)\n"
HANGS_WHEN_READY = "\n\nimport time\nService._begin = lambda self: time.sleep(3600)\n"
ENDS_WHEN_READY = "\n\nService._begin = lambda self: self.runtime.stop({code})\n"
LOOKS = """\
import json, os, pathlib, socket, time
import psutil
seen = {
    "processes": len(list(psutil.process_iter(["name", "memory_info", "cpu_times", "username"]))),
    "first": psutil.Process(1).name(),
    "cpu": psutil.cpu_percent(0.1),
    "memory": psutil.virtual_memory().total,
    "disk": psutil.disk_usage("/").total,
    "home": psutil.disk_usage("/home").total == psutil.disk_usage("/").total,
    "mounts": len(psutil.disk_partitions(all=True)),
    "addresses": sorted({a.address for all in psutil.net_if_addrs().values() for a in all if a.family == 2}),
    "traffic": sorted(psutil.net_io_counters(pernic=True)),
    "sensors": isinstance(psutil.sensors_temperatures(), dict),
    "sysfs": sorted(os.listdir("/sys/class")),
    "boot_s": psutil.boot_time(),
}
for name, path in (("etc", "/etc/relfleet-was-here"), ("home", "/root/relfleet-was-here"), ("usr", "/usr/x")):
    try:
        pathlib.Path(path).touch()
        seen["wrote " + name] = True
    except OSError as error:
        seen["wrote " + name] = False
pathlib.Path("/tmp/of-the-service").touch()
root = pathlib.Path(os.environ["RELFLEET_ROOT"])
(root / "seen.new").write_text(json.dumps(seen))
(root / "seen.new").rename(root / "seen.json")
while True:
    time.sleep(60)
"""


@dataclass(frozen=True)
class Scenario:
    """A sentence that has to come true, and what tries it."""

    claim: str
    run: Callable[[Bench], None]
    quick: bool = False


class Bench:
    """The machine, its host and its server, while scenarios run."""

    def __init__(self, home: Path, world: World) -> None:
        self.world = world
        self.cohort = world.cohort()
        self.host: Host = world.host(self.cohort, start=False)
        shown = {"/opt/house": HOUSE, "/opt/libraries": Path(sysconfig.get_path("purelib"))}
        self.machine = Machine(home / "machine", {ROOT: self.host.root}, shown)

    # --- the machine's systemd -------------------------------------------------------------------------

    def agent(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Type `agent WORDS…` in the machine; its relfleet is the one in the installed version."""
        program = f"{ROOT}/current/agent.py"
        return self.machine.run("/usr/bin/python3", "-I", "-S", "-B", program, *words, "--json")

    def show(self, fact: str) -> str:
        return self.machine.ask("systemctl", "show", "--value", f"--property={fact}", UNIT)

    def systemctl(self, verb: str, *words: str) -> None:
        self.machine.do("systemctl", verb, *words, UNIT)

    def drop_in(self, name: str, text: str) -> None:
        """What an operator writes with `systemctl edit`; an empty text takes it away."""
        script = f'mkdir -p {DROP_INS} && printf %s "$1" > {DROP_INS}/{name}.conf && systemctl daemon-reload'
        self.machine.do("sh", "-c", script, "sh", text)

    def await_active(self) -> None:
        until("the unit to be active", lambda: self.show("ActiveState") == "active", every_s=0.2)

    def journal(self) -> str:
        return self.machine.ask("journalctl", "--no-pager", "--output=cat", f"--unit={UNIT}")

    # --- the host --------------------------------------------------------------------------------------

    @property
    def service(self) -> str:
        """The agent's main module, for a version to add to."""
        return member_of(self.world.tree / LIBRARY, "updater/service.py").decode()

    @property
    def record(self) -> Record:
        return self.host.record

    def offer(self, version: str, files: dict[str, str], **said: Any) -> None:
        """Make, sign and publish a version, and ask the host for it."""
        if version not in self.world.published:
            self.world.derive(version, files, **said)
        self.world.pin(self.cohort, version)

    def recall(self) -> None:
        """Ask for what is good, so that a version that failed is not asked for while others are tried."""
        self.world.pin(self.cohort, self.host.good)

    def await_trial(self, version: str, *, ready: bool = True) -> Record:
        """Wait until a version was started on trial and, unless it never will, its agent listens."""

        def on_trial() -> Record | None:
            record = self.record
            is_it = record.phase == slots.TRIAL and slots.version_of(record.candidate) == version
            listens = not ready or self.show("ActiveState") == "active"
            return record if is_it and record.is_up and listens else None

        found: Record = until(f"{version} to be on trial", on_trial, every_s=0.2)
        return found

    def await_skip(self, version: str, *reasons: str) -> None:
        """Wait until a version was left for one of these reasons, and the good one runs again."""
        reason = self.host.await_skip(version)
        assert reason in reasons, f"{version} was left for {reason}, not for {reasons}"
        until("an idle record", lambda: self.record.phase == slots.IDLE)
        self.await_active()
        assert slots.version_of(self.record.good) != version

    def offer_waiting(self, version: str) -> Record:
        """A version that stays on trial until `go`: its check passes when a file is there."""
        (self.host.root / "go").unlink(missing_ok=True)
        index = Index.from_bytes(index_of(self.world.archive("1.0.0")).read_bytes())
        patient = tuple({**check, "grace_s": 600} for check in index.health)
        self.offer(version, {"app/check": WAITS}, health=patient, deadman_s=900, boots=3)
        return self.await_trial(version)

    def rest(self) -> None:
        """After a scenario that failed: an idle host on its good version, whatever state it was left in."""
        if not self.machine.is_on:
            self.machine.boot()
        self.drop_in("watched", "")
        self.machine.run("systemctl", "stop", UNIT)
        if self.record.phase != slots.IDLE:
            self.agent("rollback", "--yes", "--root", ROOT)
        self.recall()
        self.machine.run("systemctl", "start", UNIT)

    def go(self, version: str) -> None:
        (self.host.root / "go").touch()
        self.host.await_good(version)
        self.await_active()


# --- scenarios ------------------------------------------------------------------------------------------


def _installs(bench: Bench) -> None:
    done = bench.agent("install-service", "--root", ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", f"systemd-analyze verify said: {done.stderr}"
    said = json.loads(done.stdout)
    assert (said["changed"], said["running"], said["user"]) == (True, True, "root"), said
    bench.await_active()
    bench.drop_in("hasty", HASTY)
    again = json.loads(bench.agent("install-service", "--root", ROOT).stdout)
    assert again["changed"] is False, again
    assert bench.machine.ask("systemctl", "is-enabled", UNIT) == "enabled"


def _verifies(bench: Bench) -> None:
    done = bench.machine.run("systemd-analyze", "verify", UNIT)
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), done


def _is_hardened(bench: Bench) -> None:
    threshold = f"--threshold={int(MOST_EXPOSED * 10)}"
    done = bench.machine.run("systemd-analyze", "security", "--no-pager", threshold, UNIT)
    assert done.returncode == 0, done.stdout[-300:]


def _updates(bench: Bench) -> None:
    before = int(bench.show("NRestarts"))
    bench.offer("5.0.0", {"app/notes.txt": "good\n"})
    bench.host.await_good("5.0.0")
    bench.await_active()
    assert int(bench.show("NRestarts")) == before + 1


def _looks_at_the_host(bench: Bench) -> None:
    bench.offer("5.1.0", {"app/main.py": LOOKS})
    bench.host.await_good("5.1.0")
    file = bench.host.root / "seen.json"
    until("the workload to have looked", file.exists)
    seen = json.loads(file.read_text())
    assert seen["first"] == "systemd", seen
    assert seen["processes"] > 3, seen
    assert "127.0.0.1" in seen["addresses"], seen
    assert "lo" in seen["traffic"], seen
    assert seen["sensors"], seen
    assert seen["home"], seen
    assert {"net", "thermal"} & set(seen["sysfs"]), seen
    assert not any(seen[f"wrote {place}"] for place in ("etc", "home", "usr")), seen
    assert bench.machine.run("test", "-e", "/tmp/of-the-service").returncode != 0


def _leaves(
    version: str, files: dict[str, str], *reasons: str, more: str = "", **said: Any
) -> Callable[[Bench], None]:
    """A version that has to be left for one of these reasons; `more` is added to the agent's own module."""

    def run(bench: Bench) -> None:
        own = {"lib.zip/updater/service.py": bench.service + more} if more else {}
        bench.offer(version, {**files, **own}, **said)
        bench.await_skip(version, *reasons)
        bench.recall()

    return run


def _watchdog(bench: Bench) -> None:
    bench.drop_in("watched", WATCHED)
    bench.systemctl("restart")
    files = {"lib.zip/updater/service.py": bench.service + HANGS_WHEN_READY}
    # Its alarm is far away, so it is the watchdog that ends it.
    bench.offer("6.4.0-hangs-when-ready", files, deadman_s=600)
    bench.await_skip("6.4.0-hangs-when-ready", "boots-used-up")
    bench.recall()
    assert "watchdog" in bench.journal().lower()
    bench.drop_in("watched", "")
    bench.systemctl("restart")


def _stop(bench: Bench) -> None:
    record = bench.offer_waiting("7.0.0")
    assert record.boots_left == record.boots_max - 1, record
    bench.systemctl("stop")
    after = bench.record
    assert (after.boots_left, after.phase) == (after.boots_max, slots.TRIAL), after
    assert bench.show("ActiveState") == "inactive"
    assert bench.show("Result") == "success"
    assert _left_over(bench) == []
    bench.systemctl("start")
    bench.await_trial("7.0.0")
    bench.go("7.0.0")


def _stop_before_it_listens(bench: Bench) -> None:
    version = "6.5.0-never-listens"
    bench.offer(version, {"lib.zip/updater/service.py": HANGS_BEFORE}, deadman_s=600, boots=2)
    bench.await_trial(version, ready=False)
    bench.systemctl("stop")
    after = bench.record
    assert (after.boots_left, after.phase) == (after.boots_max, slots.TRIAL), after
    assert bench.agent("rollback", "--yes", "--root", ROOT).returncode == 0
    bench.recall()
    bench.systemctl("start")
    bench.await_active()


def _reboot(bench: Bench) -> None:
    bench.offer_waiting("7.1.0")
    bench.machine.reboot()
    record = bench.await_trial("7.1.0")
    assert record.boots_left == record.boots_max - 1, record
    assert record.refunds == 1, record
    bench.go("7.1.0")


def _cut(bench: Bench) -> None:
    bench.drop_in("boot-id", BOOT_ID)
    bench.offer_waiting("7.2.0")
    bench.machine.cut()
    bench.machine.boot()
    record = bench.await_trial("7.2.0")
    assert record.boots_left == record.boots_max - 1, record
    assert (record.refunds, record.reboots) == (0, 1), record
    bench.drop_in("boot-id", "")
    bench.go("7.2.0")


def _kills(bench: Bench) -> None:
    bench.await_active()
    bench.machine.do("sh", "-c", KILLS, "sh", UNIT, str(MORE_THAN_SYSTEMD_ALLOWS))
    assert bench.show("StartLimitIntervalUSec") == "0"  # a slow machine kills too slowly to find a limit
    bench.await_active()
    until("one workload", lambda: len([one for one in _left_over(bench) if WORKLOAD in one]) == 1)


def _uninstalls(bench: Bench) -> None:
    before = bench.record
    done = bench.agent("uninstall-service", "--yes")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["removed"] is True
    assert bench.machine.ask("systemctl", "list-unit-files", "--no-legend", UNIT) == ""
    assert _left_over(bench) == []
    assert bench.record == before
    assert (bench.host.root / "state" / "agent.key").exists()
    assert json.loads(bench.agent("uninstall-service", "--yes").stdout)["removed"] is False


def _runs_as_another_user(bench: Bench) -> None:
    bench.agent("uninstall-service", "--yes")
    bench.machine.do("chown", "-R", f"{OTHER_USER}:", ROOT)
    assert bench.agent("install-service", "--root", ROOT, "--user", "nobody").returncode == 2
    done = bench.agent("install-service", "--root", ROOT, "--user", OTHER_USER)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    bench.await_active()
    bench.offer("5.2.0", {"app/notes.txt": "of another user\n"})
    bench.host.await_good("5.2.0")
    bench.await_active()
    assert bench.machine.ask("stat", "--format=%U", f"/proc/{bench.show('MainPID')}") == OTHER_USER
    bench.agent("uninstall-service", "--yes")
    bench.machine.do("chown", "-R", "root:", ROOT)


def _serves(bench: Bench) -> None:
    machine, unit, port = bench.machine, SERVER_UNIT.name, _free_port()
    machine.put("/usr/lib/python3/dist-packages/relfleet.pth", LIBRARIES)
    machine.put("/opt/relfleet/bin/release-server", SERVER, mode="0755")
    machine.put(f"/etc/systemd/system/{unit}", SERVER_UNIT.read_text())
    machine.do("useradd", "--system", "relfleet")
    machine.do(*f"install -d -m 0700 -o relfleet -g relfleet {SERVER_DATA}".split())
    init = f"/opt/relfleet/bin/release-server init --data {SERVER_DATA} --url http://127.0.0.1:{port}"
    machine.do("setpriv", "--reuid=relfleet", "--regid=relfleet", "--clear-groups", *init.split())
    start = f"/opt/relfleet/bin/release-server run --data {SERVER_DATA} --port {port}"
    drop_in = f"[Service]\nExecStart=\nExecStart={start}\n"
    machine.put(f"/etc/systemd/system/{unit}.d/port.conf", drop_in)
    machine.do("systemctl", "daemon-reload")
    machine.do("systemctl", "start", unit)
    until("the server to answer", lambda: _is_healthy(port), every_s=0.2)
    machine.do("systemctl", "kill", "--signal=KILL", unit)
    until("the server to answer again", lambda: _is_healthy(port), every_s=0.2)
    threshold = f"--threshold={int(SERVER_MOST_EXPOSED * 10)}"
    done = machine.run("systemd-analyze", "security", "--no-pager", threshold, unit)
    assert done.returncode == 0, done.stdout[-300:]
    machine.do("systemctl", "stop", unit)
    assert not _is_healthy(port)
    assert machine.ask("systemctl", "show", "--value", "--property=Result", unit) == "success"


def _signs_as_its_own_user(bench: Bench) -> None:
    """Both units; then whoever is the server's user tries for what is the signer's."""
    machine, unit, port, data = bench.machine, SIGNER_UNIT.name, _free_port(), f"{SERVER_DATA}-2"
    machine.do(*["useradd", "--system", "--no-create-home", "--gid", "relfleet", "relfleet-signer"])
    machine.put(f"/etc/systemd/system/{unit}", SIGNER_UNIT.read_text())
    machine.do("systemctl", "daemon-reload")
    machine.do("systemctl", "start", unit)
    until("the signer's socket", lambda: machine.run("test", "-S", SIGNER_SOCKET).returncode == 0)
    machine.do(*f"install -d -m 0700 -o relfleet -g relfleet {data}".split())
    program, url = "/opt/relfleet/bin/release-server", f"http://127.0.0.1:{port}"
    server = ("setpriv", "--reuid=relfleet", "--regid=relfleet", "--clear-groups")
    init = f"{program} init --data {data} --url {url} --signer-socket {SIGNER_SOCKET}"
    machine.do(*server, *init.split())
    assert machine.run("test", "-e", f"{data}/keys").returncode != 0
    start = (
        f"[Service]\nReadWritePaths={data}\nExecStart=\nExecStart={program} run --data {data} --port {port}\n"
    )
    machine.put(f"/etc/systemd/system/{SERVER_UNIT.name}.d/port.conf", start)
    machine.do("systemctl", "daemon-reload")
    machine.do("systemctl", "start", SERVER_UNIT.name)
    until("the server to answer", lambda: _is_healthy(port), every_s=0.2)
    _push_a_first_root(bench, url, machine.do("cat", f"{data}/admin.token"))
    until(
        "a timestamp that the signer signed", lambda: _answers(port, "/metadata/timestamp.json"), every_s=0.2
    )
    pid = _main_pid(machine, unit)
    assert machine.ask("stat", "--format=%U", f"/proc/{pid}") == "relfleet-signer"
    keys = machine.do("sh", "-c", f"ls {SIGNER_HOME}/keys/*").split()
    assert len(keys) == 3, keys
    for secret in (*keys, f"/proc/{pid}/mem", f"/proc/{pid}/environ"):
        assert machine.run(*server, "head", "-c1", secret).returncode != 0, secret
    doctor = json.loads(machine.run(*server, program, "doctor", "--data", data, "--json").stdout)
    found = {one["check"]: one["state"] for one in doctor}
    assert (found["signer"], found["keys"]) == ("ok", "ok"), doctor
    machine.do("systemctl", "kill", "--signal=KILL", unit)
    until("another signer", lambda: _main_pid(machine, unit) not in ("0", pid), every_s=0.2)
    threshold = f"--threshold={int(SERVER_MOST_EXPOSED * 10)}"
    done = machine.run("systemd-analyze", "security", "--no-pager", threshold, unit)
    assert done.returncode == 0, done.stdout[-300:]
    machine.do("systemctl", "stop", SERVER_UNIT.name, unit)


def _push_a_first_root(bench: Bench, url: str, token: str) -> None:
    """As a release manager of a server of his own."""
    home = bench.world.home / "another"
    home.mkdir(mode=0o700)
    (home / "token").write_text(token)
    (home / "token").chmod(0o600)
    where = ("--server", url, "--token-file", str(home / "token"), "--keys-dir", str(home / "keys"))
    bench.world.release("key", "gen", *where)


def _main_pid(machine: Machine, unit: str) -> str:
    return machine.ask("systemctl", "show", "--value", "--property=MainPID", unit)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_healthy(port: int) -> bool:
    return _answers(port, "/api/v1/health")


def _answers(port: int, path: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return answer.status == 200
    return False


def _left_over(bench: Bench) -> list[str]:
    """Processes of the machine that are the agent's or its product's."""
    script = 'for f in /proc/[0-9]*/cmdline; do tr "\\0" " " < $f; echo; done 2>/dev/null'
    lines = bench.machine.ask("sh", "-c", script).splitlines()
    return [line for line in lines if (ROOT in line or WORKLOAD in line) and "sh -c" not in line]


SCENARIOS = (
    Scenario("the unit is installed, enabled and runs; done again, nothing changes", _installs, quick=True),
    Scenario("systemd finds nothing odd in it", _verifies, quick=True),
    Scenario("it leaves little exposed", _is_hardened, quick=True),
    Scenario("a good version is committed with one restart", _updates, quick=True),
    Scenario("a monitoring workload sees the host, and writes nowhere else", _looks_at_the_host),
    Scenario(
        "an agent that crashes at once is left",
        _leaves("6.0.0-crashes", {"lib.zip/updater/service.py": ENDS_WITH.format(code=3)}, "boots-used-up"),
        quick=True,
    ),
    Scenario(
        "an agent that exits with 0 when it is ready is left",
        _leaves("6.1.0-exits-0", {}, "boots-used-up", more=ENDS_WHEN_READY.format(code=0)),
    ),
    Scenario(
        "an agent that asks for a restart when it is ready, for ever, is left",
        _leaves("6.2.0-exits-75", {}, "boots-used-up", more=ENDS_WHEN_READY.format(code=75)),
    ),
    Scenario(
        "an agent that hangs before it is ready is ended by the dead-man and left",
        _leaves("6.3.0-hangs", {"lib.zip/updater/service.py": HANGS_BEFORE}, "boots-used-up", deadman_s=3),
    ),
    Scenario(
        "a workload that ends on trial is left",
        _leaves("6.6.0-workload", {"app/main.py": "raise SystemExit(3)\n"}, "workload-exited"),
    ),
    Scenario("an agent that hangs when it is ready is ended by the watchdog and left", _watchdog),
    Scenario("a stop in mid-trial gives the boot back, and the trial goes on", _stop, quick=True),
    Scenario("a stop before the version listens gives the boot back too", _stop_before_it_listens),
    Scenario("a reboot in mid-trial gives the boot back, and the trial goes on", _reboot),
    Scenario("a cut in mid-trial gives the boot back, and the trial goes on", _cut),
    Scenario("kills without end do not end the service", _kills),
    Scenario("the unit is taken away, and the root stays", _uninstalls, quick=True),
    Scenario("the agent runs, and updates, as another user than root", _runs_as_another_user),
    Scenario("the server's unit runs the server, starts it again and stops it", _serves),
    Scenario(
        "the signer's unit signs for the server's, whose user reads none of its keys", _signs_as_its_own_user
    ),
)


def run(tally: Tally, *, quick: bool) -> None:
    """Try every scenario in order; one that fails does not keep the next from being tried."""
    home = Path(tempfile.mkdtemp(prefix="relfleet-systemd-"))
    (home / "world").mkdir()
    world = World(home / "world")
    bench: Bench | None = None
    try:
        world.make()
        bench = Bench(home, world)
        bench.machine.boot()
        for scenario in SCENARIOS:
            if scenario.quick or not quick:
                _try(tally, scenario, bench)
    finally:
        if bench is not None:
            bench.machine.cut()
        world.processes.stop()
        subprocess.run(["chmod", "-R", "u+w", home], check=False)
        with suppress(OSError):
            shutil.rmtree(home)


def _try(tally: Tally, scenario: Scenario, bench: Bench) -> None:
    tally.count(1, scenario.claim)
    try:
        scenario.run(bench)
    except Exception as error:  # the next scenario is tried all the same
        tally.fail(f"not so: {scenario.claim}: {type(error).__name__}: {error}")
        with suppress(Exception):  # what cannot be put right fails the next one too
            bench.rest()
