"""What every command line promises: options everywhere, exit codes, three-part messages, late imports."""

import dataclasses
import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import click
import pytest

from agent_core import console, errors
from agent_core.errors import Exit

REPOSITORY = Path(__file__).parents[2]


def tool():
    """A small command line: two plain commands, a group in a group, and lazy ones."""
    group = console.LazyGroup(
        "tool",
        lazy={
            "completion": ("agent_core.console:completion", "Print a completion script."),
            "missing": ("no_such_library_anywhere.cli:main", "Needs a library."),
            "broken": ("agent_core.console:LazyGroup", "Is no command."),
        },
        params=[console.version_option("tool")],
    )

    @group.command("echo", short_help="Say it back.")
    @click.argument("word")
    def echo(word):
        console.say(f"saying {word}")
        console.emit({"word": word, "timeout_s": console.options().timeout_s})

    @group.command("own")
    @click.option("--timeout", default="mine")
    def own(timeout):
        console.emit({"timeout": timeout})

    @group.group("deep", cls=console.Group)
    def deep():
        pass

    @deep.command("leaf")
    def leaf():
        console.emit(dataclasses.asdict(console.options()))

    @deep.command("wipe")
    def wipe():
        console.confirm("This reaches 42 agents.")
        console.emit("wiped")

    return group


def raising(error):
    @click.command()
    def command():
        raise error

    return command


def run(*words, command=None):
    return console.run(command or tool(), "tool", words)


# --- options ---


@pytest.mark.parametrize(
    "words",
    [("--json", "echo", "hi"), ("echo", "--json", "hi"), ("echo", "hi", "--json")],
    ids=" ".join,
)
def test_common_options_are_taken_before_and_after_the_command(words, capsys):
    assert run(*words) == Exit.DONE
    assert json.loads(capsys.readouterr().out)["word"] == "hi"


def test_common_options_reach_a_command_in_a_group_in_a_group(capsys):
    words = ["-q", "deep", "--no-input", "leaf", "--json", "-y", "-vv", "--no-color", "--timeout", "2m"]
    assert run(*words) == Exit.DONE
    assert json.loads(capsys.readouterr().out) == {
        "quiet": True,
        "verbose": 2,
        "json": True,
        "no_color": True,
        "no_input": True,
        "yes": True,
        "timeout_s": 120.0,
    }


def test_what_one_call_said_is_forgotten_by_the_next(capsys):
    command = tool()
    run("echo", "--json", "a", command=command)
    capsys.readouterr()
    run("echo", "b", command=command)
    assert capsys.readouterr().out.startswith("word")


def test_an_option_that_a_command_defines_itself_stays_its_own(capsys):
    assert run("own", "--timeout", "7", "--json") == Exit.DONE
    assert json.loads(capsys.readouterr().out) == {"timeout": "7"}


def test_equipping_twice_changes_nothing():
    command = tool()
    console.equip(command)
    before = len(command.params), len(command.commands["echo"].params)
    console.equip(command)
    assert (len(command.params), len(command.commands["echo"].params)) == before


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("30s", 30), ("15m", 900), ("2h", 7200), ("7d", 604_800), ("1w", 604_800), ("1.5h", 5400)],
)
def test_durations_are_read_as_people_write_them(text, seconds):
    assert console.duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-5s", "5 parsecs", "1h30m"])
def test_other_durations_are_usage_errors(text, capsys):
    with pytest.raises(ValueError, match="duration"):
        console.duration_s(text)
    assert run("echo", "x", "--timeout", text) == Exit.USAGE
    assert "duration" in capsys.readouterr().err


@pytest.mark.parametrize("words", [("-h",), ("--help",), ("deep", "leaf", "-h")], ids=" ".join)
def test_help_is_everywhere(words, capsys):
    assert run(*words) == Exit.DONE
    out = capsys.readouterr().out
    assert "Usage: tool" in out
    assert "--json" in out


def test_version_names_the_program(capsys):
    assert run("--version") == Exit.DONE
    assert capsys.readouterr().out.startswith("tool ")


# --- exit codes and messages ---

ERRORS = [
    (errors.RelfleetError("x"), Exit.FAILED),
    (errors.UsageError("x"), Exit.USAGE),
    (errors.SettingsError("x"), Exit.USAGE),
    (errors.MalformedError("x"), Exit.USAGE),
    (errors.TrustError("x"), Exit.TRUST),
    (errors.NotAllowedError("x"), Exit.NOT_ALLOWED),
    (errors.ConflictError("x"), Exit.CONFLICT),
    (errors.NotFoundError("x"), Exit.NOT_FOUND),
    (errors.UnreachableError("x"), Exit.UNREACHABLE),
    (errors.DiskError("x"), Exit.FAILED),
    (click.UsageError("x"), Exit.USAGE),
    (click.BadParameter("x"), Exit.USAGE),
    (click.ClickException("x"), Exit.FAILED),
    (click.Abort(), Exit.INTERRUPTED),
    (KeyboardInterrupt(), Exit.INTERRUPTED),
    (FileNotFoundError(2, "No such file or directory", "/nowhere"), Exit.FAILED),
    (RuntimeError("boom"), Exit.FAILED),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
def test_every_error_has_its_exit_code_and_says_nothing_on_stdout(error, code, capsys):
    assert run(command=raising(error)) == code
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.strip()
    assert "Traceback" not in printed.err


def test_a_message_has_three_parts(capsys):
    error = errors.ConflictError(
        "version exists: 1.0.0", why="it has another digest", then="use a new version"
    )
    run(command=raising(error))
    assert capsys.readouterr().err == (
        "error: version exists: 1.0.0\n  why:  it has another digest\n  next: use a new version\n"
    )


@pytest.mark.parametrize("words", [("--json",)])
def test_under_json_an_error_is_one_line_of_json(words, capsys):
    error = errors.UnreachableError("away", why="no answer", then="wait", reason="overloaded")
    assert run(*words, command=raising(error)) == Exit.UNREACHABLE
    assert json.loads(capsys.readouterr().err) == {
        "error": {
            "reason": "overloaded",
            "what": "away",
            "why": "no answer",
            "then": "wait",
            "retry": True,
            "exit": 8,
        }
    }


def test_a_usage_error_is_json_too_although_parsing_stopped(capsys):
    assert run("nope", "--json") == Exit.USAGE
    assert json.loads(capsys.readouterr().err)["error"]["then"] == "tool --help"


def test_a_bug_shows_its_traceback_only_when_asked(capsys):
    run(command=raising(RuntimeError("boom")))
    quiet = capsys.readouterr().err
    assert "boom" in quiet
    assert "-v" in quiet
    run("-v", command=raising(RuntimeError("boom")))
    loud = capsys.readouterr().err
    assert "Traceback" in loud
    assert "raise error" in loud


def test_a_command_that_returns_a_number_exits_with_it(capsys):
    @click.command()
    def halted():
        return Exit.HALTED

    assert run(command=halted) == 5

    @click.command()
    @click.pass_context
    def leaves(ctx):
        ctx.exit(10)

    assert run(command=leaves) == 10


def test_a_mistyped_command_names_the_nearest(capsys):
    assert run("ecko", "x") == Exit.USAGE
    assert "Did you mean 'echo'?" in capsys.readouterr().err
    assert run("deep", "laef") == Exit.USAGE
    assert "Did you mean 'leaf'?" in capsys.readouterr().err
    assert run("zzzzzz") == Exit.USAGE
    assert "Did you mean" not in capsys.readouterr().err


def test_a_group_without_a_command_shows_its_help_as_a_usage_error(capsys):
    assert run() == Exit.USAGE
    printed = capsys.readouterr()
    assert "Commands:" in printed.err
    assert printed.out == ""


def test_a_reader_that_goes_away_ends_the_command_quietly():
    program = (
        "import sys, click; from agent_core import console\n"
        "@click.command()\ndef many():\n    for n in range(200_000): console.emit('line %d' % n)\n"
        "sys.exit(console.run(many, 'many', []))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout.readline() == "line 0\n"
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=20) == Exit.FAILED


# --- lazy groups ---


def test_help_of_a_lazy_group_imports_none_of_its_commands(capsys):
    assert run("--help") == Exit.DONE
    out = capsys.readouterr().out
    assert "Needs a library." in out
    assert "Say it back." in out


def test_a_command_whose_library_is_missing_says_what_to_install(capsys):
    assert run("missing") == Exit.FAILED
    err = capsys.readouterr().err
    assert "no_such_library_anywhere" in err
    assert "pip install" in err


def test_a_lazy_entry_that_is_no_command_is_a_bug_and_said_to_be_one(capsys):
    assert run("broken") == Exit.FAILED
    assert "something unexpected" in capsys.readouterr().err


def test_options_of_a_lazy_group_reach_its_commands_through_another_root(capsys):
    def extra():
        return [click.Option(["extra", "--extra"], expose_value=False)]

    inner = console.LazyGroup("inner", lazy={}, extra=extra)
    inner.add_command(click.Command("leaf", callback=lambda: None))
    outer = console.LazyGroup("outer", lazy={})
    outer.add_command(inner)
    assert console.run(outer, "outer", ["inner", "leaf", "--extra", "1", "--json"]) == Exit.DONE
    assert console.run(outer, "outer", ["--extra", "1", "inner", "leaf"]) == Exit.USAGE


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_are_printed(shell, capsys):
    assert run("completion", shell) == Exit.DONE
    assert "_TOOL_COMPLETE" in capsys.readouterr().out


def test_a_command_that_two_roots_share_has_the_options_of_both(capsys):
    assert run("completion", "bash") == Exit.DONE
    entry = {"completion": ("agent_core.console:completion", "x")}
    other = console.LazyGroup(
        "other", lazy=entry, extra=lambda: [click.Option(["x", "--of-other"], expose_value=False)]
    )
    assert console.run(other, "other", ["completion", "bash", "--of-other", "1"]) == Exit.DONE


def test_completion_knows_commands_without_importing_them():
    command = tool()
    context = click.Context(command)
    found = {item.value: item.help for item in command.shell_complete(context, "m")}
    assert found == {"missing": "Needs a library."}


# --- what is printed ---


def test_data_goes_to_stdout_and_words_to_stderr(capsys):
    run("echo", "hi")
    printed = capsys.readouterr()
    assert printed.out == "word       hi\ntimeout_s\n"
    assert printed.err == "saying hi\n"
    run("-q", "echo", "hi")
    assert capsys.readouterr().err == ""


def test_emit_writes_what_the_wire_writes(capsys):
    @dataclasses.dataclass
    class Thing:
        at: datetime

    moment = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
    console.emit({"thing": Thing(moment), "path": Path("a/b"), "set": {2, 1}}, json=True)
    assert json.loads(capsys.readouterr().out) == {
        "thing": {"at": "2026-05-01T12:00:00Z"},
        "path": "a/b",
        "set": [1, 2],
    }


def test_a_table_is_aligned_and_plain_when_nobody_looks(capsys):
    console.emit([{"name": "a", "on": True, "x": None}, {"name": "long name", "on": False, "x": [1]}])
    assert capsys.readouterr().out == "NAME       ON   X\na          yes\nlong name  no   [1]\n"
    assert console.table(["a"], [], empty="no cohorts") == "no cohorts"


def test_a_text_for_people_is_made_only_when_people_read_it(capsys):
    def text():
        raise AssertionError("nobody reads this")

    console.emit({"a": 1}, text, json=True)
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def on_terminal(program, *, env=None):
    """Run a program with a terminal on all three ends; what it printed, and its exit code."""
    leader, follower = pty.openpty()
    environ = {**os.environ, "TERM": "xterm", **(env or {})}
    environ.pop("NO_COLOR", None) if env is None else None
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        env=environ,
    ) as process:
        os.close(follower)
        os.write(leader, b"n\n")
        printed = b""
        while True:
            try:
                block = os.read(leader, 4096)
            except OSError:
                break
            if not block:
                break
            printed += block
        code = process.wait(timeout=20)
    os.close(leader)
    return printed.decode(), code


FAILING = """
import sys, click
from agent_core import console, errors
@click.command()
def main():
    {body}
sys.exit(console.run(main, "main", {words}))
"""


def test_colours_are_for_terminals_and_stop_when_asked():
    program = FAILING.format(body='raise errors.TrustError("x")', words=[])
    assert "\x1b[31m" in on_terminal(program)[0]
    assert "\x1b[" not in on_terminal(program, env={"NO_COLOR": "1"})[0]
    program = FAILING.format(body='raise errors.TrustError("x")', words=["--no-color"])
    assert "\x1b[" not in on_terminal(program)[0]


def test_a_destructive_command_asks_and_no_means_no():
    printed, code = on_terminal(FAILING.format(body='console.confirm("This reaches 42 agents.")', words=[]))
    assert "This reaches 42 agents. Go on? [y/N]" in printed
    assert code == Exit.USAGE


def test_without_a_terminal_a_destructive_command_needs_yes(capsys):
    assert run("deep", "wipe") == Exit.USAGE
    assert "--yes" in capsys.readouterr().err
    assert run("deep", "wipe", "--yes") == Exit.DONE
    assert run("-y", "deep", "wipe") == Exit.DONE
