"""This module says what systemd is to know of an agent: the unit's text, and whose unit a file is.

Pure: `updater.commands.service` writes files and calls `systemctl`. What each line is for stands in the unit
itself, because the person who reads it on a host has nothing else at hand.
"""

from __future__ import annotations

import re

from agent_core.errors import UsageError

UNIT_NAME = "relfleet-agent"
STEPS_SINCE = 254
"""The first systemd that can wait longer after each crash (RestartSteps=)."""

_MARK = "# Written by `agent install-service` for "
_PLAIN = re.compile(r"/[\w/.+@,:=~-]*")
_UNIT_NAME = re.compile(r"[A-Za-z0-9][\w.:@-]{0,100}")
_USER_NAME = re.compile(r"[A-Za-z_][\w.-]{0,30}")
_EMPTIED = ("/tmp", "/var/tmp")  # noqa: S108 - named to be refused

_WAIT_MORE = """\
# One second after the first end, more with each, never over 15: a loop costs little, an update waits little.
RestartSec=1s
RestartSteps=8
RestartMaxDelaySec=15s"""
_WAIT = """\
# Restarts after an update and after a crash wait the same: this systemd knows no longer wait for the latter.
RestartSec=3s"""

_TEXT = """\
{mark}{root}.
# To change something, write a drop-in (systemctl edit {name}); `agent install-service` writes this file anew.

[Unit]
Description=relfleet agent in {root}
After=network.target nss-lookup.target
RequiresMountsFor={root}
# A bad version is left by its boots, which the launcher counts: no limit of systemd's may end that before.
StartLimitIntervalSec=0

[Service]
# The launcher becomes the agent by exec, so both are the main process.
Type=notify
NotifyAccess=main
ExecStart={launcher}
WorkingDirectory={root}
{user}
# Exit 75 asks for the next start: an update or a rollback. Only `systemctl stop` means stopped; an agent that
# ends by itself, with 0 too, starts again.
Restart=always
RestartForceExitStatus=75
SuccessExitStatus=75
{wait}

# The agent says that it lives from its main loop only. One that hangs is ended and started again, which on
# trial counts a boot.
WatchdogSec=2min
TimeoutStartSec=3min
TimeoutAbortSec=10s

# TERM goes to the agent alone: it gives the boot of a trial back, then stops its workload in order. A TERM to
# all of them would show it a workload that ends on trial. Whatever is left is then killed.
KillMode=mixed
TimeoutStopSec=90s
# A stop that comes before the agent listens is no fault of the version either.
ExecStopPost=-/bin/sh -c '[ "$$SERVICE_RESULT $$EXIT_STATUS" != "success TERM" ] || exec {launcher} --refund'

# A workload that is killed for its memory is judged by its agent; it does not take the agent along.
# MemoryMax= and CPUQuota= are for a drop-in: only the product knows its size.
OOMPolicy=continue
# No core files: the agent's memory holds the key of this host. No secret is in this file; a drop-in can hand
# one over with LoadCredential=.
LimitCORE=0

# The workload is a child of this service and has these limits too. It may look at all of the host (processes
# in /proc, sensors in /sys, disks, network) and write to its own directory and /tmp only.
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ReadWritePaths={root}
ProtectHome=read-only
PrivateTmp=yes
PrivateDevices=yes
ProtectClock=yes
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
LockPersonality=yes
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
KeyringMode=private
UMask=0027
# AF_NETLINK lists the addresses of the host.
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
# What is not allowed fails as on a host without the right; it does not kill the workload.
SystemCallErrorNumber=EPERM

[Install]
WantedBy=multi-user.target
"""


def unit(root: str, python: str, *, name: str = UNIT_NAME, user: str = "", steps: bool = False) -> str:
    """The unit that runs the launcher of one root.

    Args:
        root: the device's directory, absolute and resolved.
        python: the host's interpreter, absolute.
        name: of the unit, without `.service`.
        user: whom the agent runs as; root when empty.
        steps: whether this systemd can wait longer after each crash, see `STEPS_SINCE`.

    Raises:
        UsageError: a name that a unit cannot carry, or a directory that does not last.
    """
    _check_path(root, "--root")
    _check_path(python, "the interpreter")
    _check(name, _UNIT_NAME, "--name", "letters, digits and . : @ - _")
    if user:
        _check(user, _USER_NAME, "--user", "the name of a user")
    if any(root == place or root.startswith(place + "/") for place in _EMPTIED):
        why = "it is emptied at a boot, and the service has a /tmp of its own"
        raise UsageError(f"an agent cannot live in {root}", why=why, then="enrol with another --root")
    return _TEXT.format(
        mark=_MARK,
        root=root,
        launcher=f"{python} -I -S -B {root}/launcher/launcher.pyz --root {root}",
        name=name,
        user=f"User={user}"
        if user
        else "# The user is root, with no capability left; --user NAME runs it as another.",
        wait=_WAIT_MORE if steps else _WAIT,
    )


def root_of(text: str) -> str:
    """The root a unit of ours was written for; empty when it is not one of ours."""
    first = text.partition("\n")[0]
    return first[len(_MARK) : -1] if first.startswith(_MARK) and first.endswith(".") else ""


def release_of(printed: str) -> int:
    """The release that `systemctl --version` printed; 0 when it said none."""
    found = re.match(r"systemd (\d+)", printed)
    return int(found[1]) if found else 0


def _check_path(path: str, what: str) -> None:
    """A unit has rules of its own for blanks, quotes, `%` and `$`; names without them need none."""
    _check(path, _PLAIN, what, "an absolute path of letters, digits and / . + @ , : = ~ - _")


def _check(text: str, allowed: re.Pattern[str], what: str, words: str) -> None:
    if not allowed.fullmatch(text):
        raise UsageError(f"a unit cannot carry {text!r}", why=f"{what} has to be {words}")
