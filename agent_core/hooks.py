"""Hooks: programs of a version, signed in its index, that run before and after it is activated.

`pre_activate` runs when the version is staged and nothing points to it yet; when it fails the version is
refused. `post_activate` runs in each start of the trial, once the workload was started; when it fails the
version is rolled back, and the observation begins when it has ended. Both may run more than once for one
version, and have to bear that. A rollback runs no hook: going back must not depend on what anybody wrote.
"""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

from agent_core.late import late_dataclass
from agent_core.wire import Getter

if TYPE_CHECKING:
    from agent_core.workload import Place

PRE_ACTIVATE, POST_ACTIVATE = "pre_activate", "post_activate"
LONGEST_S = 600
"""A check of the updater waits for `pre_activate`; what takes longer belongs into the workload."""


@late_dataclass(frozen=True)
class Hook:
    """One hook: `argv` with the placeholders of `Place.argv`, and the seconds after which it has failed."""

    argv: tuple[str, ...]
    timeout_s: float = 60.0

    def to_json(self) -> dict[str, Any]:
        return {"argv": list(self.argv), "timeout_s": self.timeout_s}


@late_dataclass(frozen=True)
class Hooks:
    """The hooks of a version; most have none."""

    pre_activate: Hook | None = None
    post_activate: Hook | None = None

    def to_json(self) -> dict[str, Any]:
        named = {PRE_ACTIVATE: self.pre_activate, POST_ACTIVATE: self.post_activate}
        return {name: hook.to_json() for name, hook in named.items() if hook is not None}


NO_HOOKS = Hooks()


def parse_hooks(hooks: object, path: str = "index.hooks") -> Hooks:
    """Read the `hooks` of an index; as with checks, a key that is not known is a misspelt one.

    Raises:
        MalformedError: with the path of the key.
    """
    get = Getter(hooks, path)
    _refuse_unknown(get, {PRE_ACTIVATE, POST_ACTIVATE})
    return Hooks(_parse(get, PRE_ACTIVATE, path), _parse(get, POST_ACTIVATE, path))


def _parse(hooks: Getter, name: str, path: str) -> Hook | None:
    if name not in hooks.mapping:
        return None
    get = Getter(hooks.object(name), f"{path}.{name}")
    _refuse_unknown(get, {"argv", "timeout_s"})
    argv = get.texts("argv", most=100)
    if not argv or not argv[0]:
        raise get.refuse("argv", "a program is needed")
    return Hook(argv, get.number("timeout_s", Hook.timeout_s, low=0.05, high=LONGEST_S))


def _refuse_unknown(get: Getter, known: set[str]) -> None:
    for key in get.mapping:
        if key not in known:
            raise get.refuse(str(key)[:80], f"known are {', '.join(sorted(known))}")


def run_hook(name: str, hook: Hook, place: Place, before: str) -> str:
    """Run one hook to its end; blocks for its `timeout_s` and a little, and leaves no process of it behind.

    One that somebody else ended is tried again within its time, as a preflight is: only a hook that never
    comes through has failed, for a failure is remembered.

    Args:
        name: as the hook finds it in `RELFLEET_HOOK`.
        hook: of the version at `place`.
        place: where the version stays; the hook's working directory.
        before: the version that is good meanwhile, for `RELFLEET_VERSION_BEFORE`; empty when there is none.

    Returns:
        Why it failed, in words with the last of its output; empty when it ended with 0.
    """
    # Late: whoever only reads an index runs no process.
    from agent_core.processes import finish_one, spawn

    def start() -> subprocess.Popen[bytes]:
        return spawn(
            place.argv(hook.argv),
            cwd=place.version_dir,
            env={**place.environment(), "RELFLEET_HOOK": name, "RELFLEET_VERSION_BEFORE": before},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    try:
        why = finish_one(start, hook.timeout_s)
    except OSError as error:
        why = f"could not be started: {error}"
    return f"{name}: {why}" if why else ""
