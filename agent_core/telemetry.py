"""Telemetry: a few figures of the agent and its workload, and how the agent writes its log.

A log line is a constant message with keyed fields: ECS JSON to a file or a pipe, plain text on a terminal.
Secrets never reach either: fields are redacted by name, and texts by what a secret looks like.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from typing import TYPE_CHECKING, Any, TextIO

import psutil

if TYPE_CHECKING:
    from io import TextIOWrapper
    from pathlib import Path

# --- figures --------------------------------------------------------------------------------------------


def tree(pid: int) -> list[psutil.Process]:
    """A process and all it started; empty when it is gone or a zombie.

    A child whose own parent ended is nobody's descendant any more, but it stays in the session that a
    workload leads, so that too is looked at.
    """
    try:
        parent = psutil.Process(pid)
        if parent.status() == psutil.STATUS_ZOMBIE:
            return []
        found = {child.pid: child for child in parent.children(recursive=True)}
        for other in psutil.pids():
            with contextlib.suppress(OSError, psutil.Error):
                if other not in found and os.getsid(other) == pid != other:
                    found[other] = psutil.Process(other)
        return [parent, *found.values()]
    except psutil.Error:
        return []


def tree_rss(pid: int) -> int | None:
    """Resident bytes of a process and its descendants; None when it is gone."""
    return _rss(tree(pid)) or None


def tree_cpu_s(pid: int) -> float | None:
    """Processor seconds used so far by a process and its descendants, those that ended included."""
    processes = tree(pid)
    return _cpu_s(processes) if processes else None


def _rss(processes: list[psutil.Process]) -> int:
    held = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            held += process.memory_info().rss
    return held


def _cpu_s(processes: list[psutil.Process]) -> float:
    used_s = 0.0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            used_s += times.user + times.system + times.children_user + times.children_system
    return used_s


class Figures:
    """Takes the small figures that a report carries.

    `rss`, `cpu`, `uptime_s`, `fds`, `processes` and `restarts` are the workload's, with its children; those
    with `agent_` before them are our own. `cpu` is percent of one core since the figures were last taken.
    """

    def __init__(self) -> None:
        self._used: dict[str, tuple[int, float, float]] = {}

    def take(
        self, now_s: float, *, workload_pid: int | None, started_s: float | None = None, restarts: int = 0
    ) -> dict[str, float]:
        """Look at the agent and its workload now.

        Args:
            now_s: boot clock.
            workload_pid: None while it does not run; its figures are then left out.
            started_s: when the workload started, boot clock.
        """
        figures: dict[str, float] = {"restarts": restarts}
        with contextlib.suppress(psutil.Error):
            own = psutil.Process()
            times = own.cpu_times()
            figures |= self._of("agent_", own, now_s, own.memory_info().rss, times.user + times.system)
        # One look for all of it: finding a tree reads every process of the host.
        processes = tree(workload_pid) if workload_pid is not None else []
        if rss := _rss(processes):
            figures |= self._of("", processes[0], now_s, rss, _cpu_s(processes))
            figures["processes"] = len(processes)
            if started_s is not None:
                figures["uptime_s"] = round(max(0.0, now_s - started_s), 1)
        return figures

    def _of(
        self, prefix: str, process: psutil.Process, now_s: float, rss: int, used_s: float
    ) -> dict[str, float]:
        figures: dict[str, float] = {f"{prefix}rss": rss} | self._cpu(prefix, process.pid, now_s, used_s)
        with contextlib.suppress(psutil.Error):
            figures[f"{prefix}fds"] = process.num_fds()
        return figures

    def _cpu(self, prefix: str, pid: int, now_s: float, used_s: float) -> dict[str, float]:
        before = self._used.get(prefix)
        self._used[prefix] = (pid, now_s, used_s)
        if before is None or before[0] != pid or now_s <= before[1]:
            return {}
        return {f"{prefix}cpu": round(max(0.0, 100.0 * (used_s - before[2]) / (now_s - before[1])), 1)}


# --- the log --------------------------------------------------------------------------------------------

ECS_VERSION = "8.11"
REDACTED = "***"
SECRET_NAME = re.compile(
    r"(?:^|[._-])(?:token|secret|password|passwd|passphrase|authorization|cookie|session|private|seed|credential)s?"
    r"(?:$|[._-])",
    re.IGNORECASE,
)
SECRET_TEXT = [
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]+"), rf"\1 {REDACTED}"),
    (re.compile(r"(?<=://)[^/\s@]+@"), f"{REDACTED}@"),
    (re.compile(r"\b(token|password|secret)=[^&\s]+", re.IGNORECASE), rf"\1={REDACTED}"),
]
ORDINARY = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def redact(value: Any, name: str = "") -> Any:
    """Take secrets out of a field, by its name and by what it looks like; deep into lists and tables."""
    if name and SECRET_NAME.search(name) and not isinstance(value, bool | int | float | None):
        return REDACTED
    if isinstance(value, dict):
        return {str(key): redact(inner, str(key)) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(inner) for inner in value]
    if isinstance(value, bool | int | float | None):
        return value
    text = str(value)
    for form, instead in SECRET_TEXT:
        text = form.sub(instead, text)
    return text


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What was given as `extra`, redacted."""
    return {name: redact(value, name) for name, value in vars(record).items() if name not in ORDINARY}


class EcsFormatter(logging.Formatter):
    """One JSON object a line, in the names of the Elastic Common Schema; our own fields below `relfleet`."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "@timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "log.level": record.levelname.lower(),
            "message": redact(record.getMessage()),
            "ecs.version": ECS_VERSION,
            "log.logger": record.name,
            "process.pid": record.process,
            "service.name": self._service,
        }
        fields = fields_of(record)
        if fields:
            line["relfleet"] = fields
        if record.exc_info and record.exc_info[0] is not None:
            line["error.type"] = record.exc_info[0].__name__
            line["error.message"] = redact(str(record.exc_info[1]))
            line["error.stack_trace"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


class PlainFormatter(logging.Formatter):
    """A line for people: time, level, message, `key=value`."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).astimezone().strftime("%H:%M:%S")
        fields = "".join(f" {name}={value}" for name, value in fields_of(record).items())
        text = f"{at} {record.levelname.lower():<7} {redact(record.getMessage())}{fields}"
        if record.exc_info and record.exc_info[0] is not None:
            text += "\n" + str(redact(self.formatException(record.exc_info)))
        return text


class _Rotating(RotatingFileHandler):
    """A full disk or a missing directory costs lines, and never an exception; what was lost is counted."""

    lost = 0

    def _open(self) -> TextIOWrapper:
        fd = os.open(self.baseFilename, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        return os.fdopen(fd, "a", encoding=self.encoding)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        self.lost += 1
        if self.stream is not None:
            with contextlib.suppress(OSError):
                self.stream.close()
            self.stream = None


class _Stream(logging.StreamHandler[TextIO]):
    """Whoever read our lines may be gone; the agent goes on."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        return


def setup_logging(
    *,
    level: str = "info",
    file: Path | None = None,
    max_bytes: int = 4 * 2**20,
    files: int = 3,
    service: str = "relfleet-agent",
    stream: TextIO | None = None,
) -> logging.Handler:
    """Send everything that is logged to one place; calling it again replaces the former one.

    Args:
        level: least important level that is written.
        file: a rotating file, made readable for owner and group; None: `stream`.
        stream: standard error when None; plain text on a terminal, ECS JSON into anything else.
    """
    handler: _Rotating | _Stream
    if file is not None:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
        handler = _Rotating(file, maxBytes=max_bytes, backupCount=files, encoding="utf-8", delay=True)
        handler.setFormatter(EcsFormatter(service))
    else:
        out = stream or sys.stderr
        handler = _Stream(out)
        handler.setFormatter(PlainFormatter() if out.isatty() else EcsFormatter(service))
    root = logging.getLogger()
    for old in list(root.handlers):
        if isinstance(old, _Rotating | _Stream):
            root.removeHandler(old)
            old.close()
    root.addHandler(handler)
    set_level(level)
    return handler


def set_level(level: str) -> None:
    """Change what is written, live."""
    logging.getLogger().setLevel(level.upper())
    logging.getLogger("watchdog").setLevel(logging.WARNING)
