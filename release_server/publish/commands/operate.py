"""What the operator commands share: how words of the call are read, and how far a destructive one reaches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from agent_core import console
from agent_core.errors import RelfleetError
from release_server.publish import profile, render, words

if TYPE_CHECKING:
    from collections.abc import Callable

    from release_server.publish.client import Client

CLIENT = "relfleet.client"


def client() -> Client:
    """The client of the running command; one connection for all its calls."""
    context = click.get_current_context()
    if CLIENT not in context.meta:
        found = profile.connect()
        context.meta[CLIENT] = found
        context.find_root().call_on_close(found.session.close)
    api: Client = context.meta[CLIENT]
    return api


def product() -> str:
    """The product the call is about: --product, the environment, or `relfleet.toml`."""
    return profile.current().need_product()


def entries(page: Any) -> list[dict[str, Any]]:
    """The entries of one page of a list.

    Raises:
        RelfleetError: the server answered something that is no list.
    """
    found = page.get("items") if isinstance(page, dict) else None
    if not isinstance(found, list):
        raise RelfleetError("the server's answer cannot be read", why="it is no list", reason="malformed")
    return found


def confirm_reach(what: str, count: int) -> None:
    """Ask before something that reaches agents.

    Args:
        what: one sentence with `{}` where the number of agents belongs.
        count: how many agents it reaches.
    """
    console.confirm(what.replace("{}", render.agents(count), 1))


def reason_option(*, required: bool = False) -> Callable[[Any], Any]:
    """Why something is done; kept in the audit log."""
    return click.option("--reason", "-m", required=required, help="Why; kept in the audit log.")


# --- how words of a call are read ------------------------------------------------------------------------


class Seconds(console.Duration):
    """A duration of at least one second, or 0, as whole seconds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        seconds = super().convert(value, param, ctx)
        if seconds != int(seconds):
            self.fail(f"{value!r} is not a whole number of seconds", param, ctx)
        return int(seconds)


class Words(click.ParamType):  # type: ignore[type-arg]
    """A parameter read by a function whose ValueError says what is wrong."""

    def __init__(self, name: str, read: Callable[[str], Any]) -> None:
        self.name = name
        self.read = read

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self.read(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SECONDS = Seconds()
AMOUNT = Words("share or count", words.amount)
STEPS = Words("steps", words.steps)
ROLLOUT = Words("rollout", words.rollout_number)
LABEL = Words("label", words.label)
LABELS = Words("labels", words.labels)
MOMENT = Words("time", words.moment)
PAST = Words("time", words.past_moment)
WINDOW = Words("window", words.window)
LEASE = Words("lease", words.lease)
BUDGET = Words("budget", words.budget)
ENTRY = Words("entry", words.calendar_entry)
MATCH = Words("match", words.match)
