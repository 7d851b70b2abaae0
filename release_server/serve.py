"""Runs the server: one parent watches signer, web server and jobs process, and stops with them as one.

The parent does nothing else, so that it cannot fail for their reasons. A child that dies is started again
after a pause that grows; a child whose parent is killed gets SIGTERM from the kernel, so none is left over.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from agent_core.clock import boot_s
from agent_core.errors import RelfleetError, UnreachableError
from release_server import tls
from release_server.blobs import write_file
from release_server.config import DATA_VARIABLE, TABLE, Config

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from types import FrameType

    from release_server.signing.desk import Desk

log = logging.getLogger(__name__)

PR_SET_PDEATHSIG = 1
STOP_S = 6.0
"""How long a child may take to stop before it is killed."""
START_S = 60.0
LEAST_BACKOFF_S = 0.2
MOST_BACKOFF_S = 30.0
WELL_S = 20.0
"""A child that lived this long starts again at once."""
START_STEP_S = 0.05
WATCH_S = 0.5
PARENT_VARIABLE = "RELFLEET_SERVER_PARENT"


# --- what runs in the children ---------------------------------------------------------------------------


def die_with_parent() -> None:
    """Ask the kernel for SIGTERM when the parent is gone; ends at once when it is gone already."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    parent = os.environ.get(PARENT_VARIABLE)
    if parent and os.getppid() != int(parent):
        raise SystemExit(1)


def show_logs(level: str) -> None:
    """Log lines on stderr; whoever runs the server decides where that goes."""
    logging.basicConfig(
        level=level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.INFO)  # it tells whole URLs, and some hold what lets one in
    logging.getLogger("urllib3.connection").setLevel(logging.ERROR)  # and warns with them, of bad headers


def run_web(config: Config) -> int:
    """The web server: granian with `workers` processes on one address, until SIGTERM."""
    from granian.constants import HTTPModes, Interfaces, SSLProtocols
    from granian.http import HTTP1Settings
    from granian.log import LogLevels
    from granian.server import Server as Granian

    from release_server.app import share_counters  # workers are forked and share what is loaded before

    for left in config.counters.glob("*.db"):
        left.unlink(missing_ok=True)  # of web processes that are gone
    share_counters(config)
    os.environ[DATA_VARIABLE] = str(config.data)
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    server = Granian(
        "release_server.serve:load_app",
        address=config.host,
        port=config.port,
        interface=Interfaces.WSGI,
        factory=True,
        workers=config.workers,
        blocking_threads=config.threads,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(header_read_timeout=round(config.head_timeout_s * 1000)),
        websockets=False,
        ssl_cert=config.tls.certificate if config.tls else None,
        ssl_key=config.tls.key if config.tls else None,
        ssl_protocol_min=SSLProtocols.tls12,
        log_level=LogLevels.error,
        workers_kill_timeout=3,
    )
    server.serve()
    return 0


def load_app() -> object:
    """What each web worker loads."""
    from release_server.app import wsgi

    die_with_parent()
    return wsgi()


def run_jobs(config: Config) -> int:
    """The jobs process, until SIGTERM."""
    from release_server.jobs import Jobs

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    Jobs(config).run(stop)
    return 0


def run_signer(desk: Desk, place: Path, users: frozenset[int]) -> int:
    """The signer, until SIGTERM.

    Args:
        desk: of `open_desk`.
        place: its socket.
        users: who may ask beside this process's own user, which may when it is the only one.
    """
    from release_server.signing.process import Service, listen

    service = Service(desk, users or frozenset({os.geteuid()}))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: service.stop.set())
    with listen(place, shared=bool(users)) as listening:
        service.run(listening)
    desk.journal.close()
    return 0


# --- the parent ------------------------------------------------------------------------------------------


@dataclass
class Child:
    """One child process that is kept alive.

    Attributes:
        argv: how it is started.
        not_before: boot time before which it is not started again.
    """

    name: str
    argv: list[str]
    environ: Mapping[str, str]
    process: subprocess.Popen[bytes] | None = None
    failures: int = 0
    started: float = 0.0
    not_before: float = field(default=0.0)

    def keep(self, now: float) -> None:
        """Start it when it is not running and its pause is over."""
        if self.process is not None:
            code = self.process.poll()
            if code is None:
                return
            self.failures = 0 if now - self.started >= WELL_S else self.failures + 1
            pause = min(LEAST_BACKOFF_S * 2**self.failures, MOST_BACKOFF_S) if self.failures else 0.0
            self.not_before = now + pause
            self._kill_group()
            self.process = None
            log.error("%s ended with %s; it starts again in %.1f s", self.name, code, pause)
        if now >= self.not_before:
            # A process group of its own: Ctrl-C on the terminal reaches the parent only, which then stops
            # its children in order.
            self.process = subprocess.Popen(self.argv, env=dict(self.environ), process_group=0)
            self.started = now

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def wait(self, deadline: float) -> None:
        """Wait until it has ended; past the deadline its whole process group is killed."""
        if self.process is None:
            return
        try:
            self.process.wait(max(0.0, deadline - boot_s()))
        except subprocess.TimeoutExpired:
            log.warning("%s did not stop in time; it is killed", self.name)
        self._kill_group()
        self.process.wait()

    def _kill_group(self) -> None:
        """End what is left of it: web workers of a granian that was killed would serve on beside the next."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)


def reserve(host: str, port: int) -> socket.socket:
    """Bind the address for as long as the parent lives, so that nobody else is given it.

    The web workers share one port by SO_REUSEPORT; without this a second server would join them silently, and
    a free port could be taken between its choice and its use. The socket never listens, so no client sees it.

    Args:
        port: 0 for any free one; the socket then says which.

    Raises:
        RelfleetError: reason `port-taken`: somebody listens there, or the address is not this host's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        if port:
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        held = socket.socket(family, socket.SOCK_STREAM)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((host, port))
    except OSError as error:
        raise RelfleetError(
            f"cannot listen on {host}:{port}",
            why=error.strerror or str(error),
            then="stop what listens there, or choose another --port",
            reason="port-taken",
        ) from error
    return held


def reach(host: str) -> str:
    """The address to connect to for a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared, not bound


def is_answering(host: str, port: int, scheme: str = "http") -> bool:
    import http.client

    connection = http.client.HTTPConnection(reach(host), port, timeout=2)
    if scheme == "https":
        connection = http.client.HTTPSConnection(reach(host), port, timeout=2, context=tls.unverified())
    try:
        connection.request("GET", "/api/v1/health")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


class Server:
    """The parent process of one data directory.

    Args:
        config: the settings.
        announce: called once with the URL, when the server really answers there.
    """

    def __init__(self, config: Config, announce: Callable[[str], None]) -> None:
        self.config = config
        self.announce = announce
        self.stopping = threading.Event()

    @property
    def url_file(self) -> Path:
        return self.config.run / "url"

    def run(self) -> int:
        """Start everything, keep it alive, and stop it all on SIGTERM or SIGINT.

        Raises:
            RelfleetError: the port is taken, the TLS files are refused, or the web server does not come up.
        """
        if self.config.tls:
            self.config.tls.check()
        if self.config.oidc:
            self.config.oidc.check_files()
        with reserve(self.config.host, self.config.port) as held:
            port = int(held.getsockname()[1])
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._stop)
            signer = ("signer",) if self.config.has_own_signer else ()
            children = [self._child(name, port) for name in (*signer, "web", "worker")]
            try:
                self._keep(children, port)
            finally:
                self._end(children)
        return 0

    def _stop(self, _number: int, _frame: FrameType | None) -> None:
        self.stopping.set()

    def _child(self, command: str, port: int) -> Child:
        environ = os.environ | {PARENT_VARIABLE: str(os.getpid())}
        for name, value in self.config.settings.values.items():
            if self.config.settings.origin(name) == "flag":  # children read it as the next strongest layer
                environ[TABLE[name].variable] = str(value)
        environ[TABLE["server.port"].variable] = str(port)
        argv = [sys.executable, "-m", "release_server.cli", command, "--data", str(self.config.data)]
        return Child(command, argv, environ)

    def _keep(self, children: list[Child], port: int) -> None:
        give_up = boot_s() + START_S
        announced = False
        while not self.stopping.is_set():
            for child in children:
                child.keep(boot_s())
            if not announced and is_answering(self.config.host, port, self.config.scheme):
                announced = True
                self._announce(port)
            if not announced and boot_s() > give_up:
                raise UnreachableError(
                    "the web server does not come up", then="read the lines above; release-server doctor"
                )
            self.stopping.wait(WATCH_S if announced else START_STEP_S)

    def _announce(self, port: int) -> None:
        host = reach(self.config.host)
        url = f"{self.config.scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        self.config.run.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_file(self.url_file, url.encode() + b"\n")
        self.announce(url)

    def _end(self, children: list[Child]) -> None:
        self.url_file.unlink(missing_ok=True)
        for child in children:
            child.stop()
        deadline = boot_s() + STOP_S
        for child in children:
            child.wait(deadline)
