"""Settings: one table of them feeds the parser, `config show`, the docs and the live reload.

Layers, strongest first: flag, environment, files (a later file wins), default. Every value remembers which
layer it came from. Unknown keys are refused with the nearest known name, because a setting that is misspelt
and ignored is found only on the day it was needed.
"""

from __future__ import annotations

import logging
import os
import re
import threading
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from agent_core.errors import SettingsError
from agent_core.late import late_dataclass
from agent_core.wire import LABEL_KEY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from watchdog.events import FileSystemEvent
    from watchdog.observers.api import BaseObserver

log = logging.getLogger(__name__)

PREFIX = "RELFLEET_"
TRUE = frozenset({"1", "true", "yes", "on"})
FALSE = frozenset({"0", "false", "no", "off"})
KINDS: dict[type, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    list: "a list of texts",
    dict: "a table of texts",
}


@late_dataclass(frozen=True)
class Setting:
    """One setting.

    Attributes:
        name: dotted, `poll.min_s`; the path of the key in a file.
        kind: `str`, `int`, `float`, `bool`, `list` (of texts) or `dict` (a free table of texts).
        unit: for people, when the name does not say it.
        secret: never shown by `config show`.
        choices: the only texts that are accepted; empty for any.
        low, high: inclusive bounds of a number.
        form: what a text that is not empty must fully match.
    """

    name: str
    kind: type
    default: Any
    help: str
    unit: str = ""
    secret: bool = False
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None
    form: str = ""

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return PREFIX + re.sub(r"[.-]", "_", self.name).upper()

    def accept(self, value: object, origin: str) -> Any:
        """Check a value that has a type already, as TOML and flags give it.

        Raises:
            SettingsError: naming `origin` and the setting.
        """
        if type(value) is int and value.bit_length() > 63:  # TOML's own limit, and no float overflows below
            raise self._refuse(origin, "it must be a number of 64 bits at most")
        if self.kind is float and type(value) is int:
            value = float(value)
        if type(value) is not self.kind:
            shown = type(value).__name__ if self.secret else f"{value!r:.80}"
            raise self._refuse(origin, f"it must be {KINDS[self.kind]}, not {shown}")
        if isinstance(value, int | float) and not isinstance(value, bool):
            self._check_range(value, origin)
        elif isinstance(value, str):
            self._check_text(value, origin)
        elif isinstance(value, list) and not all(isinstance(entry, str) for entry in value):
            raise self._refuse(origin, "every entry must be a text")
        elif isinstance(value, dict):
            self._check_table(value, origin)
        return value

    def parse(self, text: str, origin: str) -> Any:
        """Read a value from text, as environment variables and flags give it: `1,2` or `a=b,c=d` for many."""
        try:
            value = self._convert(text.strip())
        except ValueError:
            raise self._refuse(origin, f"it must be {KINDS[self.kind]}, not {text[:80]!r}") from None
        return self.accept(value, origin)

    def _convert(self, text: str) -> Any:
        if self.kind is bool:
            if text.lower() not in TRUE | FALSE:
                raise ValueError(text)
            return text.lower() in TRUE
        if self.kind is list:
            return [entry.strip() for entry in text.split(",") if entry.strip()]
        if self.kind is dict:
            pairs = [entry.partition("=") for entry in text.split(",") if entry.strip()]
            if not all(equals for _, equals, _ in pairs):
                raise ValueError(text)
            return {key.strip(): value.strip() for key, _, value in pairs}
        return self.kind(text)

    def _check_range(self, value: float, origin: str) -> None:
        low = float("-inf") if self.low is None else self.low
        high = float("inf") if self.high is None else self.high
        if not low <= value <= high:
            bounds = []
            if self.low is not None:
                bounds.append(f"at least {self.low:g}")
            if self.high is not None:
                bounds.append(f"at most {self.high:g}")
            must = " and ".join(bounds) or "a finite number"
            raise self._refuse(origin, f"it is {value:g} and must be {must}")

    def _check_text(self, value: str, origin: str) -> None:
        if self.choices and value not in self.choices:
            raise self._refuse(origin, f"{value[:80]!r} is not one of {', '.join(self.choices)}")
        if self.form and value and not re.fullmatch(self.form, value):
            shown = "the value" if self.secret else repr(value[:80])
            raise self._refuse(origin, f"{shown} does not have the form {self.form}")

    def _check_table(self, value: dict[str, object], origin: str) -> None:
        for key, text in value.items():
            if not LABEL_KEY.fullmatch(key) or not isinstance(text, str) or len(text) > 256:
                raise self._refuse(
                    f"{origin}", f"{key!r:.80} must be a short text under a plain lower-case name"
                )

    def _refuse(self, origin: str, why: str) -> SettingsError:
        return SettingsError(
            f"{origin}: {self.name} cannot be used", why=why, then=f"{self.name}: {self.help}"
        )


@late_dataclass(frozen=True)
class Settings:
    """The value of every setting of a table, and where each came from."""

    table: Table
    values: Mapping[str, Any]
    origins: Mapping[str, str]

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def origin(self, name: str) -> str:
        return self.origins[name]

    def show(self) -> Iterator[tuple[str, Any, str]]:
        """Name, value and origin of every setting, in the table's order; a secret shows as `***`."""
        for setting in self.table:
            value = self.values[setting.name]
            yield setting.name, "***" if setting.secret and value else value, self.origins[setting.name]


class Table:
    """The settings that one program knows."""

    def __init__(self, settings: Iterable[Setting]) -> None:
        self._settings = {setting.name: setting for setting in settings}

    def __iter__(self) -> Iterator[Setting]:
        return iter(self._settings.values())

    def __contains__(self, name: object) -> bool:
        return name in self._settings

    def __getitem__(self, name: str) -> Setting:
        return self._settings[name]

    def load(
        self,
        files: Iterable[Path] = (),
        *,
        environ: Mapping[str, str] | None = None,
        flags: Mapping[str, Any] | None = None,
    ) -> Settings:
        """Read all layers.

        Args:
            files: weakest first; those that do not exist are passed over.
            environ: the environment; `os.environ` when None. Variables that no setting of this table claims
                are left alone, because several programs and the launcher share the prefix.
            flags: setting name to value; None says that the flag was not given.

        Raises:
            SettingsError: an unknown key or flag, a wrong type or range, or a file that cannot be read.
        """
        values = {setting.name: _copy(setting.default) for setting in self}
        origins = dict.fromkeys(values, "default")
        layers: list[tuple[str, dict[str, Any]]] = [
            *((str(file), self._from_file(file)) for file in files),
            *self._from_environment(os.environ if environ is None else environ),
            ("flag", self._from_flags(flags or {})),
        ]
        for origin, layer in layers:
            for name, value in layer.items():
                both = isinstance(value, dict) and origins[name] != "default"
                values[name] = {**values[name], **value} if isinstance(value, dict) else value
                origins[name] = f"{origins[name]}, {origin}" if both else origin
        return Settings(self, values, origins)

    def _from_file(self, file: Path) -> dict[str, Any]:
        try:
            tree = tomllib.loads(file.read_bytes().decode())
            return dict(self._flatten(tree, "", str(file)))
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise SettingsError(f"{file} cannot be read", why=str(error.strerror or error)) from error
        except ValueError as error:  # not UTF-8, or not TOML
            raise SettingsError(f"{file} is not TOML", why=str(error)) from error
        except RecursionError as error:
            raise SettingsError(f"{file} cannot be read", why="it is nested too deeply") from error

    def _flatten(self, tree: Mapping[str, Any], above: str, origin: str) -> Iterator[tuple[str, Any]]:
        for key, value in tree.items():
            name = above + key
            if name in self:
                yield name, self[name].accept(value, origin)
            elif isinstance(value, dict) and any(known.startswith(name + ".") for known in self._settings):
                yield from self._flatten(value, name + ".", origin)
            else:
                raise self._unknown(name, origin)

    def _from_environment(self, environ: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        for setting in self:
            text = environ.get(setting.variable)
            if text is not None:
                origin = f"environment {setting.variable}"
                yield origin, {setting.name: setting.parse(text, origin)}

    def _from_flags(self, flags: Mapping[str, Any]) -> dict[str, Any]:
        layer = {}
        for name, value in flags.items():
            if name not in self:
                raise self._unknown(name, "flag")
            if value is not None:
                setting = self[name]
                read = setting.parse if isinstance(value, str) and setting.kind is not str else setting.accept
                layer[name] = read(value, "flag")
        return layer

    def _unknown(self, name: str, origin: str) -> SettingsError:
        import difflib  # for people who mistyped

        tables = {known.rpartition(".")[0] for known in self._settings} - {""}
        near = difflib.get_close_matches(name, [*self._settings, *sorted(tables)], n=1, cutoff=0.5)
        then = f"did you mean {near[0]}?" if near else "`config show` lists every setting"
        return SettingsError(f"{origin}: {name} is not a setting", then=then)

    def markdown(self) -> str:
        """The table as people read it in the docs."""
        rows = ["| setting | default | meaning |", "|---|---|---|"]
        for setting in self:
            default = "" if setting.default in ("", {}, []) else f"`{setting.default}`"
            unit = f" ({setting.unit})" if setting.unit else ""
            rows.append(f"| `{setting.name}` | {default} | {setting.help}{unit} |")
        return "\n".join(rows) + "\n"


def _copy(value: Any) -> Any:
    return value.copy() if isinstance(value, list | dict) else value


def fragments(directory: Path) -> list[Path]:
    """The `*.toml` files of a fragments directory, sorted by name; hidden ones are editors' leavings.

    Raises:
        SettingsError: the directory is there and cannot be read; what it holds may forbid something.
    """
    try:
        files = sorted(directory.iterdir())  # glob would take one that cannot be read for an empty one
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise SettingsError(f"{directory} cannot be read", why=str(error.strerror or error)) from error
    return [file for file in files if file.suffix == ".toml" and not file.name.startswith(".")]


# --- the agent's own ------------------------------------------------------------------------------------

AGENT = Table(
    [
        Setting(
            "server.url",
            str,
            "",
            "where the server answers; empty: the one this agent enrolled with",
            form=r"https?://[^\s]+",
        ),
        Setting(
            "server.ca_file",
            str,
            "",
            "PEM file of the only authorities the server is checked by; empty: the host's",
        ),
        Setting("server.client_cert", str, "", "PEM certificate this host shows to the server"),
        Setting(
            "server.client_key",
            str,
            "",
            "PEM private key of server.client_cert, without a passphrase and with mode 0600",
        ),
        Setting(
            "server.proxy",
            str,
            "",
            "proxy for every request, with its password if it needs one; empty: the environment's",
            secret=True,
            form=r"http://[^\s]+",
        ),
        Setting(
            "server.no_proxy",
            list,
            [],
            "what is reached without the proxy: names with all below them, addresses, networks"
            " (`10.0.0.0/8`), each with a port if only that, `*` for everything; empty: the environment's",
        ),
        Setting(
            "server.timeout_s",
            float,
            30.0,
            "silence after which a request is given up",
            "s",
            low=0.1,
            high=600,
        ),
        Setting(
            "poll.min_s",
            float,
            1.0,
            "never poll more often, whatever the directive says",
            "s",
            low=0.1,
            high=86_400,
        ),
        Setting(
            "poll.max_backoff_s",
            float,
            3600.0,
            "longest pause between polls that fail",
            "s",
            low=1,
            high=86_400,
        ),
        Setting("download.rate_bps", int, 0, "ceiling for downloads; 0: none", "bytes per second", low=0),
        Setting(
            "download.min_rate_bps",
            int,
            1024,
            "a download that is slower than this after half a minute is given up for now, and resumed later;"
            " never more than half of download.rate_bps counts",
            "bytes per second",
            low=0,
        ),
        Setting(
            "download.deadline_s",
            float,
            6 * 3600.0,
            "longest time for one transfer",
            "s",
            low=1,
            high=30 * 86_400,
        ),
        Setting(
            "disk.reserve", int, 64 * 2**20, "room an update must leave free", "bytes", low=0, high=2**50
        ),
        Setting(
            "versions.keep",
            int,
            2,
            "how many versions stay on the disk: good, previous, and the newest of the others;"
            " they give way when an update needs their room",
            low=2,
            high=100,
        ),
        Setting(
            "versions.keep_bytes",
            int,
            0,
            "room that all versions together may take before the oldest go; good and previous"
            " never do; 0: any",
            "bytes",
            low=0,
            high=2**50,
        ),
        Setting("health.step_s", float, 1.0, "how often due checks are looked for", "s", low=0.05, high=5),
        Setting(
            "workload.stop_s",
            float,
            10.0,
            "time between asking the workload to stop and killing it",
            "s",
            low=0,
            high=600,
        ),
        Setting(
            "workload.max_backoff_s",
            float,
            300.0,
            "longest pause before a crashed workload starts again",
            "s",
            low=1,
        ),
        Setting(
            "workload.log_bytes",
            int,
            4 * 2**20,
            "size at which the workload's output begins a new file",
            "bytes",
            low=4096,
        ),
        Setting("workload.log_files", int, 3, "how many older output files are kept", low=0, high=100),
        Setting(
            "log.level",
            str,
            "info",
            "least important line that is written",
            choices=("debug", "info", "warning", "error"),
        ),
        Setting("log.file", str, "", "where lines go; empty: standard error"),
        Setting("log.max_bytes", int, 4 * 2**20, "size at which a new log file begins", "bytes", low=4096),
        Setting("log.files", int, 3, "how many older log files are kept", low=0, high=100),
        Setting(
            "stop.file",
            str,
            "/etc/relfleet/stop",
            "while this file is there nothing new is installed; its first line says why",
        ),
        Setting(
            "labels", dict, {}, 'what this host is (`region = "eu"`), for the server\'s cohorts to match'
        ),
    ]
)


@dataclass(frozen=True)
class AgentSettings:
    """The agent's settings, typed; the field `a_b_c` is the setting `a.b_c`."""

    server_url: str
    server_ca_file: str
    server_client_cert: str
    server_client_key: str
    server_proxy: str = field(repr=False)
    server_no_proxy: Sequence[str]
    server_timeout_s: float
    poll_min_s: float
    poll_max_backoff_s: float
    download_rate_bps: int
    download_min_rate_bps: int
    download_deadline_s: float
    disk_reserve: int
    versions_keep: int
    versions_keep_bytes: int
    health_step_s: float
    workload_stop_s: float
    workload_max_backoff_s: float
    workload_log_bytes: int
    workload_log_files: int
    log_level: str
    log_file: str
    log_max_bytes: int
    log_files: int
    stop_file: str
    labels: Mapping[str, str]
    settings: Settings = field(repr=False, compare=False)

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Give the loaded values their types, and check what concerns more than one.

        Raises:
            SettingsError: a client certificate without its key, or a key without its certificate.
        """
        if bool(settings["server.client_cert"]) != bool(settings["server.client_key"]):
            given = "server.client_cert" if settings["server.client_cert"] else "server.client_key"
            raise SettingsError(
                f"{settings.origin(given)}: {given} is set alone",
                why="a certificate and its key go together",
                then="set both server.client_cert and server.client_key, or neither",
            )
        values = {name.replace(".", "_"): value for name, value in settings.values.items()}
        return cls(**values, settings=settings)


class Places(Protocol):
    """What of the device's layout the settings need."""

    @property
    def settings(self) -> Path: ...
    @property
    def settings_dir(self) -> Path: ...


def load_agent(
    layout: Places,
    *,
    environ: Mapping[str, str] | None = None,
    flags: Mapping[str, Any] | None = None,
) -> AgentSettings:
    """Read `agent.toml`, then `agent.d/*.toml` in the order of their names, the environment and the flags.

    Raises:
        SettingsError: see `Table.load`.
    """
    files = [layout.settings, *fragments(layout.settings_dir)]
    return AgentSettings.of(AGENT.load(files, environ=environ, flags=flags))


# --- live reload ----------------------------------------------------------------------------------------


class Live:
    """Settings that follow their files; a file that breaks leaves the last good settings in force.

    Args:
        load: reads all layers; raises SettingsError.
        apply: called with settings that differ from the last ones.
        current: those in force so far; loaded when not given.

    Attributes:
        current: the settings in force.
        problem: why the files are not in force, for the status; empty when they are.
    """

    def __init__(
        self,
        load: Callable[[], AgentSettings],
        apply: Callable[[AgentSettings], None],
        current: AgentSettings | None = None,
    ) -> None:
        self._load = load
        self._apply = apply
        self.current = current or load()
        self.problem = ""

    def reload(self) -> None:
        """Read the files again; never raises for what stands in them."""
        try:
            loaded = self._load()
        except SettingsError as error:
            self.problem = str(error)
            log.warning("settings kept, the new ones cannot be used", extra={"why": self.problem})
            return
        self.problem = ""
        if loaded != self.current:
            before, after = self.current.settings.values, loaded.settings.values
            names = [name for name in after if after[name] != before[name]]
            self.current = loaded
            log.info("settings changed", extra={"changed": names})
            self._apply(loaded)


class Watcher:
    """Calls `on_change` soon after any of `paths` (files, or directories of files) changed.

    Directories are watched rather than files, because editors and configuration tools replace files by
    renaming; a directory that does not exist yet is noticed when it is made. inotify when the kernel has an
    instance left for us, else a look every few seconds. `on_change` runs in a thread of its own and gets one
    call for a burst of changes; an agent gives `lambda: runtime.call_soon(live.reload)`.

    Args:
        paths: files and directories.
        on_change: takes nothing; what it raises is logged.
        debounce_s: how long a burst may last.
        poll_s: how often to look when there is no inotify.
        polling: do not even try inotify.
    """

    def __init__(
        self,
        paths: Iterable[Path],
        on_change: Callable[[], None],
        *,
        debounce_s: float = 0.3,
        poll_s: float = 5.0,
        polling: bool = False,
    ) -> None:
        self._paths = frozenset(Path(os.path.abspath(path)) for path in paths)  # noqa: PTH100 - links stay links
        self._on_change = on_change
        self._debounce_s = debounce_s
        self._poll_s = poll_s
        self._polling = polling
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._observer: BaseObserver | None = None
        self._watched: set[Path] = set()

    def start(self) -> None:
        try:
            self._observer = self._observe(polling=self._polling)
        except OSError as error:  # no inotify instance or watch is left, or the file system has none
            log.warning(
                "settings are looked at on a timer", extra={"why": str(error), "poll_s": self._poll_s}
            )
            self._watched.clear()
            self._observer = self._observe(polling=True)

    def stop(self) -> None:
        with self._lock:
            observer, self._observer = self._observer, None
            timer, self._timer = self._timer, None
        if timer is not None:
            timer.cancel()
        if observer is not None:
            observer.stop()
            observer.join()

    def _observe(self, *, polling: bool) -> BaseObserver:
        # Late: the launcher's neighbours and the commands that never watch do not load it.
        from watchdog.observers import Observer
        from watchdog.observers.polling import PollingObserver

        observer: BaseObserver = PollingObserver(timeout=self._poll_s) if polling else Observer()
        self._schedule(observer)
        observer.start()
        return observer

    def _schedule(self, observer: BaseObserver) -> None:
        from watchdog.events import FileSystemEventHandler

        handler = FileSystemEventHandler()
        handler.on_any_event = self._notice  # type: ignore[method-assign]
        directories = {path.parent for path in self._paths} | {path for path in self._paths if path.is_dir()}
        for directory in directories:
            if directory not in self._watched and directory.is_dir():
                observer.schedule(handler, str(directory), recursive=False)
                self._watched.add(directory)

    def _notice(self, event: FileSystemEvent) -> None:
        # Our own reading makes "opened" and "closed_no_write"; answering those would never end.
        if event.event_type not in {"created", "modified", "moved", "deleted", "closed"}:
            return
        touched = {Path(os.fsdecode(name)) for name in (event.src_path, event.dest_path) if name}
        if not any(path in self._paths or path.parent in self._paths for path in touched):
            return
        with self._lock:
            if self._timer is None and self._observer is not None:
                self._timer = threading.Timer(self._debounce_s, self._fire)
                self._timer.daemon = True
                self._timer.start()

    def _fire(self) -> None:
        with self._lock:
            self._timer = None
            observer = self._observer
        if observer is None:
            return
        try:
            self._watched = {directory for directory in self._watched if directory.is_dir()}
            self._schedule(observer)
            self._on_change()
        except Exception:
            log.exception("settings could not be looked at again")
