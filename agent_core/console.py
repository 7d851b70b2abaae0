"""What all command lines share: common options, exit codes, three-part messages, subcommands loaded late.

A `main` is one line, `return console.run(cli, "release", argv)`. `run` gives every command and group below
`cli` the common options, so that none can forget them; a command asks `options()` for what was said.
Data goes to stdout through `emit`, everything else to stderr through `say` and `warn`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json as jsonlib
import os
import re
import sys
from contextvars import ContextVar
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from agent_core.errors import Exit, RelfleetError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from click.shell_completion import CompletionItem

KEY = "relfleet.options"
OWN_PACKAGES = ("agent_core", "keys", "updater", "release_server")


@dataclasses.dataclass
class Options:
    """What the common options said; the same object for all commands of one call.

    Attributes:
        verbose: how many times -v was given; 1 shows tracebacks and progress logs, 2 debugging ones.
        no_input: never ask; True as well when there is no terminal to ask on, see `can_ask`.
        timeout_s: how long the whole command may wait, or None for its own default.
    """

    quiet: bool = False
    verbose: int = 0
    json: bool = False
    no_color: bool = False
    no_input: bool = False
    yes: bool = False
    timeout_s: float | None = None


_CURRENT: ContextVar[Options | None] = ContextVar("relfleet_options", default=None)


def options() -> Options:
    """The options of the running command; defaults outside of one."""
    context = click.get_current_context(silent=True)
    if context is None:
        return _CURRENT.get() or Options()
    found: Options = context.meta.setdefault(KEY, _CURRENT.get() or Options())
    return found


# --- common options --------------------------------------------------------------------------------------

DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(s|m|h|d|w)?")
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def duration_s(text: str) -> float:
    """Read `90`, `30s`, `15m`, `2h`, `7d` or `1w` as seconds.

    Raises:
        ValueError: any other form.
    """
    found = DURATION.fullmatch(text.strip().lower())
    if found is None:
        raise ValueError(f"{text!r} is not a duration such as 30s, 15m, 2h or 7d")
    return float(found[1]) * UNITS_S[found[2] or "s"]


class Duration(click.ParamType):  # type: ignore[type-arg]
    """A duration in seconds, written as people write it: 30s, 15m, 2h, 7d."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, (int, float)):
            return float(value)
        try:
            return duration_s(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


def _remember(field: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    def store(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if not value:
            return
        said: Options = ctx.meta.setdefault(KEY, _CURRENT.get() or Options())
        setattr(said, field, value)
        if field == "no_color":
            ctx.color = False
        if field == "verbose":
            _show_logs(value)

    return store


def _show_logs(verbose: int) -> None:
    import logging

    level = logging.DEBUG if verbose > 1 else logging.INFO
    logging.basicConfig(stream=sys.stderr, level=level, format="%(levelname)s %(name)s: %(message)s")


def _common() -> list[click.Option]:
    def option(field: str, *names: str, **how: Any) -> click.Option:
        declared = [f"common_{field}", *names]
        return click.Option(declared, expose_value=False, is_eager=True, callback=_remember(field), **how)

    return [
        option("json", "--json", is_flag=True, help="Print data as JSON."),
        option("quiet", "-q", "--quiet", is_flag=True, help="Say nothing but data and errors."),
        option("verbose", "-v", "--verbose", count=True, help="Say more; twice for debugging."),
        option("no_color", "--no-color", is_flag=True, help="No colours; NO_COLOR does the same."),
        option("no_input", "--no-input", is_flag=True, help="Never ask anything."),
        option("yes", "-y", "--yes", is_flag=True, help="Answer yes to confirmations."),
        option("timeout_s", "--timeout", type=Duration(), metavar="TIME", help="Give up after this long."),
    ]


def equip(command: click.Command, extra: Callable[[], list[click.Option]] = list) -> click.Command:
    """Give a command, and everything below it, the common options that it does not define itself.

    Idempotent. Lazy subcommands are equipped when they are loaded.

    Args:
        command: the root of a tree of commands; changed in place.
        extra: makes further options to give to each of them.
    """
    if isinstance(command, LazyGroup):
        command.extra = extra = command.extra or extra
    command.context_settings.setdefault("help_option_names", ["-h", "--help"])
    command.context_settings.setdefault("max_content_width", 100)
    taken = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    for option in [*extra(), *_common()]:
        option.opts = [name for name in option.opts if name not in taken]
        if option.opts:
            command.params.append(option)
    if isinstance(command, click.Group):
        for below in command.commands.values():
            equip(below, extra)
    return command


def version() -> str:
    """The installed version of relfleet; says so when it runs from a source tree."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("relfleet")
    except PackageNotFoundError:
        return "0 (source tree, not installed)"


def version_option(prog: str) -> click.Option:
    """The `--version` of a root command."""

    def show(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
        if value and not ctx.resilient_parsing:
            click.echo(f"{prog} {version()}")
            ctx.exit()

    return click.Option(
        ["--version"],
        is_flag=True,
        expose_value=False,
        is_eager=True,
        callback=show,
        help="Show the version.",
    )


# --- groups ----------------------------------------------------------------------------------------------


class Group(click.Group):
    """A group that names the nearest command when one is mistyped."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if not name.startswith("-") and not ctx.resilient_parsing and self.get_command(ctx, name) is None:
            import difflib  # for people who mistyped

            near = difflib.get_close_matches(name, self.list_commands(ctx), n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {name!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


class Lazy(NamedTuple):
    """Where a subcommand is, `module:attribute`, and its line in the help, known without importing it."""

    where: str
    short_help: str


class LazyGroup(Group):
    """A group whose subcommands are imported when they are called, so that `--help` answers at once.

    Args:
        lazy: name → `Lazy(where, short help)`, in the order of the help.
        extra: makes options that everything in this group gets besides the common ones.
    """

    def __init__(
        self,
        *args: Any,
        lazy: Mapping[str, Lazy | tuple[str, str]],
        extra: Callable[[], list[click.Option]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.lazy = {name: Lazy(*entry) for name, entry in lazy.items()}
        self.extra = extra

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*self.lazy, *(name for name in self.commands if name not in self.lazy)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.commands and cmd_name in self.lazy:
            self.add_command(equip(self._load(cmd_name), self.extra or list), cmd_name)
        return super().get_command(ctx, cmd_name)

    def _load(self, name: str) -> click.Command:
        module, _, attribute = self.lazy[name].where.partition(":")
        try:
            command = getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] in OWN_PACKAGES:
                raise
            raise RelfleetError(
                f"`{name}` needs a library that is not installed",
                why=f"there is no module {error.name}",
                then="pip install 'relfleet[cli]' (or 'relfleet[server]' for the server)",
                reason="missing-library",
            ) from error
        if not isinstance(command, click.Command):
            raise TypeError(f"{self.lazy[name].where} is not a command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if rows := self._rows():
            with formatter.section("Commands"):
                formatter.write_dl(rows)

    def _rows(self) -> list[tuple[str, str]]:
        """Every visible command with its line, without importing any."""
        rows = [(name, entry.short_help) for name, entry in self.lazy.items()]
        rows += [
            (name, command.get_short_help_str(80))
            for name, command in self.commands.items()
            if name not in self.lazy and not command.hidden
        ]
        return rows

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [
            CompletionItem(name, help=text) for name, text in self._rows() if name.startswith(incomplete)
        ]
        return [*found, *click.Command.shell_complete(self, ctx, incomplete)]


@click.command("completion", short_help="Print a completion script for a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print a completion script, e.g. `eval "$(release completion bash)"`."""
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root()
    prog = root.info_name or "relfleet"
    found = get_completion_class(shell)
    if found is None:
        raise UsageError(f"there is no completion for {shell}")
    variable = f"_{prog}_COMPLETE".replace("-", "_").upper()
    click.echo(found(root.command, {}, prog, variable).source())


# --- what is printed -------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        from agent_core.clock import iso

        return iso(value)
    if hasattr(value, "to_json"):
        return value.to_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)


def emit(value: Any, text: str | Callable[[], str] | None = None, *, json: bool | None = None) -> None:
    """Print a command's data on stdout: `value` as JSON under --json, else `text` for people.

    Args:
        value: anything JSON can hold, and dataclasses, times and paths.
        text: what people read, or a function that makes it; without it mappings become `key  value` lines
            and lists of mappings a table.
        json: overrides what the options said.
    """
    if options().json if json is None else json:
        click.echo(jsonlib.dumps(value, indent=2, ensure_ascii=False, default=_plain))
        return
    shown = text() if callable(text) else text
    click.echo(as_text(value) if shown is None else shown)


def as_text(value: Any) -> str:
    """The plain form of a value: facts for a mapping, a table for a list of mappings, else `str`."""
    if isinstance(value, dict):
        return facts(value.items())
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        columns = list(dict.fromkeys(key for entry in value for key in entry))
        return table(columns, [[entry.get(column) for column in columns] for entry in value])
    if isinstance(value, list):
        return "\n".join(cell(entry) for entry in value)
    return cell(value)


def cell(value: Any) -> str:
    """One value as people read it: nothing for None, yes and no, JSON for what is nested."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (dict, list, tuple)):
        return jsonlib.dumps(value, ensure_ascii=False, default=_plain)
    return str(_plain(value)) if isinstance(value, datetime) else str(value)


def facts(pairs: Iterable[tuple[str, Any]]) -> str:
    """Lines of `name  value`, values aligned."""
    shown = [(name, cell(value)) for name, value in pairs]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in shown)


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str = "nothing to list") -> str:
    """Aligned columns under a heading; on a terminal the heading is bold."""
    cells = [[cell(value) for value in row] for row in rows]
    if not cells:
        return empty
    heads = [column.upper() for column in columns]
    widths = [max(len(row[place]) for row in [heads, *cells]) for place in range(len(heads))]
    lines = ["  ".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)) for row in cells]
    heading = "  ".join(f"{text:<{width}}" for text, width in zip(heads, widths, strict=True)).rstrip()
    return "\n".join([click.style(heading, bold=True), *(line.rstrip() for line in lines)])


def say(text: str) -> None:
    """A line for people, on stderr; not under -q."""
    if not options().quiet:
        click.echo(text, err=True)


def warn(text: str) -> None:
    """A line for people that -q does not hide."""
    click.echo(f"{click.style('warning:', fg='yellow', bold=True)} {text}", err=True)


def progress_line(verb: str) -> Callable[[int, int], None] | None:
    """A line on a terminal that shows how far something is, told done and total; None elsewhere."""
    if not sys.stderr.isatty() or options().quiet:
        return None
    last = [-1]

    def show(done: int, total: int) -> None:
        percent = done * 100 // max(total, 1)
        if percent != last[0]:
            last[0] = percent
            filled = "#" * (percent * 30 // 100)
            ending = "\n" if done >= total else ""
            click.echo(f"\r{verb} [{filled:<30}] {percent:3d} %{ending}", err=True, nl=False)

    return show


def can_ask() -> bool:
    """Whether there is a person to ask: a terminal on both ends, and no --no-input."""
    return not options().no_input and sys.stdin.isatty() and sys.stderr.isatty()


def confirm(what: str) -> None:
    """Ask before something destructive; `what` says how far it reaches ("this reaches 42 agents").

    Raises:
        UsageError: the answer was no, or nobody can be asked and --yes was not given.
    """
    if options().yes:
        return
    if not can_ask():
        raise UsageError(
            what, why="nobody can be asked to confirm", then="add --yes", reason="confirmation-missing"
        )
    if not click.confirm(f"{what} Go on?", err=True):
        raise UsageError("not done", why="it was not confirmed", reason="confirmation-missing")


# --- running a command -----------------------------------------------------------------------------------


def run(command: click.Command, prog: str, argv: Sequence[str] | None = None) -> int:
    """Run a command line to its end and say how it went, in the codes of `Exit`.

    Args:
        command: the root command; it and all below it get the common options.
        prog: the name in usage lines and completion.
        argv: the words after the program's name; the process's own when None.

    Returns:
        The exit code: a command's own when it returns a number, 0 when it returns anything else.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    said = Options()
    token = _CURRENT.set(said)
    equip(command)
    color = False if os.environ.get("NO_COLOR") or "--no-color" in words else None
    try:
        outcome = command.main(args=words, prog_name=prog, standalone_mode=False, color=color)
        sys.stdout.flush()
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        return Exit.INTERRUPTED
    except BrokenPipeError:
        _close_stdout()
        return Exit.FAILED
    except Exception as error:  # noqa: BLE001 - the one place where an exception becomes an exit code
        return _report(error, said, json=said.json or "--json" in words, color=color)
    finally:
        _CURRENT.reset(token)
    return int(outcome) if type(outcome) is int or isinstance(outcome, Exit) else Exit.DONE


def _close_stdout() -> None:
    """Whoever read our output has gone; keep the interpreter from complaining when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: Exception, said: Options, *, json: bool, color: bool | None) -> int:
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return Exit.USAGE
    if isinstance(error, RelfleetError):
        problem = error
    elif isinstance(error, click.UsageError):
        problem = _usage(error)
    elif isinstance(error, click.ClickException):
        problem = RelfleetError(error.format_message())
    elif isinstance(error, OSError) and error.filename is not None:
        why = error.strerror or str(error)
        problem = RelfleetError(f"cannot use {error.filename}", why=why, reason="file")
    else:
        problem = _unexpected(error, said)
    if said.verbose:
        _show_traceback(error)
    show_error(problem, json=json, color=color)
    return int(problem.exit_code)


def _usage(error: click.UsageError) -> UsageError:
    then = f"{error.ctx.command_path} --help" if error.ctx else ""
    return UsageError(error.format_message().rstrip("."), then=then)


def _unexpected(error: Exception, said: Options) -> RelfleetError:
    then = "this is a bug in relfleet; please report it with the traceback above"
    if not said.verbose:
        then = "run it again with -v for the traceback; this is a bug in relfleet, please report it"
    why = f"{type(error).__name__}: {error}"
    return RelfleetError("something unexpected went wrong", why=why, then=then, reason="internal")


def _show_traceback(error: Exception) -> None:
    import traceback

    click.echo("".join(traceback.format_exception(error)), err=True, nl=False)


def show_error(error: RelfleetError, *, json: bool = False, color: bool | None = None) -> None:
    """Print what went wrong, why, and what to do next, on stderr; one line of JSON for scripts."""
    if json:
        said = {"reason": error.reason, "what": error.what, "why": error.why, "then": error.then}
        line = {"error": {**said, "retry": error.retry, "exit": int(error.exit_code)}}
        click.echo(jsonlib.dumps(line, ensure_ascii=False), err=True)
        return
    click.echo(f"{click.style('error:', fg='red', bold=True)} {error.what}", err=True, color=color)
    if error.why:
        click.echo(f"  why:  {error.why}", err=True)
    if error.then:
        click.echo(f"  next: {error.then}", err=True)
