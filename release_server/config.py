"""The server's settings: one table for the file, the environment, `config show` and the docs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_core.errors import NotFoundError, SettingsError
from agent_core.settings import Setting, Settings, Table
from release_server.retention import settings as retention
from release_server.retention.settings import Retention
from release_server.signin import settings as signin
from release_server.signin.settings import Oidc
from release_server.tls import Pair

if TYPE_CHECKING:
    from collections.abc import Mapping

FILE = "server.toml"
DATA_VARIABLE = "RELFLEET_SERVER_DATA"
COUNTERS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""The library's name for where the web processes keep their counters; read when it is loaded."""

TABLE = Table(
    [
        Setting(
            "server.url",
            str,
            "",
            "how agents and people reach this server; empty: from host and port",
            form=r"https?://[^\s/]+(/[^\s]*)?",
        ),
        Setting("server.host", str, "127.0.0.1", "address to listen on; 0.0.0.0 for all of them"),
        Setting("server.port", int, 8470, "port to listen on; 0: any free one", low=0, high=65_535),
        Setting(
            "server.tls_cert",
            str,
            "",
            "PEM certificate with its chain, read at start; with it the server speaks TLS (1.2 or newer)",
        ),
        Setting(
            "server.tls_key",
            str,
            "",
            "PEM private key of server.tls_cert, without a passphrase and with mode 0600",
        ),
        Setting("server.workers", int, 2, "web processes", low=1, high=256),
        Setting(
            "server.threads",
            int,
            32,
            "requests each web process answers at once, of which at most half wait for a client",
            low=2,
            high=512,
        ),
        Setting(
            "server.trusted_proxies",
            int,
            0,
            "reverse proxies in front whose X-Forwarded headers are believed",
            low=0,
            high=10,
        ),
        Setting(
            "server.log_level",
            str,
            "info",
            "least important line",
            choices=("debug", "info", "warning", "error"),
        ),
        Setting(
            "database.url",
            str,
            "",
            "a SQLAlchemy URL, e.g. of PostgreSQL; empty: SQLite in the data directory",
            secret=True,
        ),
        Setting(
            "jobs.tick_s", float, 1.0, "how often rollouts are reconciled and signed", "s", low=0.05, high=60
        ),
        Setting(
            "jobs.lease_s",
            float,
            15.0,
            "silence after which another jobs process takes over",
            "s",
            low=1,
            high=600,
        ),
        Setting(
            "signer.socket",
            str,
            "",
            "where a signer of its own user listens; empty: `release-server run` starts one itself",
        ),
        Setting(
            "metrics.networks",
            list,
            [],
            "who may read /metrics without a reader's token: addresses and networks (`10.0.0.0/8`)",
        ),
        Setting(
            "webhooks.ca_file",
            str,
            "",
            "PEM certificates to verify receivers of webhooks with; empty: the public ones",
        ),
        Setting(
            "limits.head_s",
            float,
            30.0,
            "time for a request's head to be through, and for the next one on the same connection to begin",
            "s",
            low=0.1,
            high=3600,
        ),
        Setting(
            "limits.slow_s",
            float,
            30.0,
            "a body or a download that moves less than limits.least_rate_bps for so long is ended",
            "s",
            low=1,
            high=3600,
        ),
        Setting(
            "limits.least_rate_bps",
            int,
            1024,
            "what a body or a download must move",
            "bytes per second",
            low=1,
            high=2**30,
        ),
        Setting("limits.body", int, 2 * 2**20, "largest JSON body", "bytes", low=1024, high=2**30),
        Setting(
            "limits.metadata",
            int,
            16 * 2**20,
            "largest signed targets or root",
            "bytes",
            low=1024,
            high=2**30,
        ),
        Setting("limits.upload", int, 4 * 2**30, "largest bundle", "bytes", low=1024, high=2**40),
        *retention.TABLE,
        *signin.TABLE,
    ]
)


@dataclass(frozen=True)
class Config:
    """The server's settings with their types, and where its files are.

    Attributes:
        data: the data directory, made by `release-server init`.
        settings: where each value came from, for `config show`.
    """

    data: Path
    settings: Settings

    @classmethod
    def load(
        cls,
        data: Path,
        *,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> Config:
        """Read `server.toml` of a data directory, the environment and the flags.

        Raises:
            NotFoundError: the directory was never initialised.
            SettingsError: an unknown key (names the nearest one), or a value that cannot be used.
        """
        data = data.absolute()
        if not (data / FILE).is_file():
            raise NotFoundError(
                f"{data} is not a server's data directory",
                why=f"it has no {FILE}",
                then=f"release-server init --data {data} --url URL",
            )
        config = cls(data, TABLE.load([data / FILE], environ=environ, flags=flags))
        if config.lease <= 3 * timedelta(seconds=config.tick_s):
            raise SettingsError(
                "jobs.lease_s cannot be used",
                why="a lease shorter than three ticks is lost while its holder is well",
                then="raise jobs.lease_s or lower jobs.tick_s",
            )
        try:
            _ = config.metrics_networks
        except ValueError as error:
            raise SettingsError(
                "metrics.networks cannot be used", why=str(error), then="write `127.0.0.1` or `10.1.0.0/16`"
            ) from error
        _ = config.oidc
        if bool(config.settings["server.tls_cert"]) != bool(config.settings["server.tls_key"]):
            raise SettingsError(
                "server.tls_cert and server.tls_key go together",
                why="only one of them is set, and without both the server would speak plain HTTP",
                then="set both, or none",
            )
        return config

    # --- places ------------------------------------------------------------------------------------------

    @property
    def keys(self) -> Path:
        return self.data / "keys"

    @property
    def blobs(self) -> Path:
        return self.data / "blobs"

    @property
    def uploads(self) -> Path:
        return self.data / "uploads"

    @property
    def repository(self) -> Path:
        return self.data / "repository"

    @property
    def trust(self) -> Path:
        """`online.json`: the public halves of the online keys, for the web processes, which hold no keys."""
        return self.data / "trust" / "online.json"

    @property
    def webhook_key(self) -> Path:
        """What secrets of webhooks follow from; in a directory that replicas share and backups have."""
        return self.trust.with_name("webhooks.key")

    @property
    def signer_state(self) -> Path:
        """What the signer remembers, and its log."""
        return self.data / "signer"

    @property
    def signer_socket(self) -> Path:
        named = str(self.settings["signer.socket"])
        return self.data / named if named else self.run / "signer.sock"

    @property
    def has_own_signer(self) -> bool:
        """Whether `release-server run` starts the signer; otherwise something else does, as another user."""
        return not self.settings["signer.socket"]

    @property
    def run(self) -> Path:
        return self.data / "run"

    @property
    def bell(self) -> Path:
        """The socket by which web processes wake the jobs process of the same host."""
        return self.run / "jobs.sock"

    @property
    def counters(self) -> Path:
        """A file for each web process, of what it has counted since the server began."""
        return self.run / "counters"

    # --- values ------------------------------------------------------------------------------------------

    @property
    def host(self) -> str:
        return str(self.settings["server.host"])

    @property
    def port(self) -> int:
        return int(self.settings["server.port"])

    @property
    def url(self) -> str:
        """How others reach the server; without `server.url` good on this host only."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return str(self.settings["server.url"]).rstrip("/") or f"{self.scheme}://{shown}:{self.port}"

    @property
    def tls(self) -> Pair | None:
        """What the server speaks TLS with; None: it speaks HTTP, and TLS is a proxy's part."""
        certificate, key = (str(self.settings[f"server.tls_{half}"]) for half in ("cert", "key"))
        return Pair(self.data / certificate, self.data / key) if certificate else None

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"

    @property
    def workers(self) -> int:
        return int(self.settings["server.workers"])

    @property
    def threads(self) -> int:
        return int(self.settings["server.threads"])

    @property
    def trusted_proxies(self) -> int:
        return int(self.settings["server.trusted_proxies"])

    @property
    def log_level(self) -> str:
        return str(self.settings["server.log_level"])

    @property
    def database_url(self) -> str:
        return str(self.settings["database.url"]) or f"sqlite:///{self.data / 'relfleet.db'}"

    @property
    def tick_s(self) -> float:
        return float(self.settings["jobs.tick_s"])

    @property
    def lease(self) -> timedelta:
        return timedelta(seconds=self.settings["jobs.lease_s"])

    @property
    def metrics_networks(self) -> tuple[IPv4Network | IPv6Network, ...]:
        return tuple(ip_network(text) for text in self.settings["metrics.networks"])

    @property
    def webhook_ca_file(self) -> str | None:
        named = str(self.settings["webhooks.ca_file"])
        return str(self.data / named) if named else None

    @cached_property
    def oidc(self) -> Oidc | None:
        """With whom people sign in at the page; None: they use tokens."""
        return Oidc.of(self.settings, self.data, self.url)

    @property
    def retention(self) -> Retention:
        return Retention.of(self.settings)

    @property
    def head_timeout_s(self) -> float:
        return float(self.settings["limits.head_s"])

    @property
    def slow_s(self) -> float:
        return float(self.settings["limits.slow_s"])

    @property
    def least_rate_bps(self) -> int:
        return int(self.settings["limits.least_rate_bps"])

    @property
    def body_limit(self) -> int:
        return int(self.settings["limits.body"])

    @property
    def metadata_limit(self) -> int:
        return int(self.settings["limits.metadata"])

    @property
    def upload_limit(self) -> int:
        return int(self.settings["limits.upload"])


def data_directory(environ: Mapping[str, str] | None = None) -> Path:
    """The data directory that the environment names.

    Raises:
        SettingsError: it names none.
    """
    named = (os.environ if environ is None else environ).get(DATA_VARIABLE, "")
    if not named:
        raise SettingsError(
            "the data directory is not known",
            why=f"{DATA_VARIABLE} is not set",
            then=f"export {DATA_VARIABLE}=DIR, or give --data DIR",
        )
    return Path(named)


def first_file(flags: Mapping[str, Any]) -> str:
    """The `server.toml` that `init` writes: what was said, and nothing that defaults to itself."""
    import json

    lines = ["# Settings of this relfleet server; `release-server config show` lists all of them."]
    for section in ("server", "signer"):
        said = [
            f"{name.removeprefix(f'{section}.')} = {json.dumps(value)}"
            for name, value in flags.items()
            if name.startswith(f"{section}.") and value is not None
        ]
        lines += [f"[{section}]", *said] if said or section == "server" else []
    return "\n".join(lines) + "\n"
