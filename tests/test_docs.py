"""The pages say what is so: commands exist, links lead somewhere, tables are fresh, nothing is undone."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import subprocess
from functools import cache
from pathlib import Path

import click
import pytest

from agent_core import console
from release_server.cli import cli as release_server
from release_server.demo.cli import cli as relfleet
from release_server.publish.cli import release
from updater.cli import cli as agent

HOUSE = Path(__file__).resolve().parents[1]
PROGRAMS = {"release": release, "release-server": release_server, "agent": agent, "relfleet": relfleet}
MOST_IN_THE_QUICK_START = 8
UNDONE = re.compile(
    r"\b(" + "|".join(["TO" + "DO", "FIX" + "ME", "X" * 3, "NotImplemented" + "Error"]) + r")\b"
)


def tracked() -> list[Path]:
    """Every file of the source: what git has or would take."""
    listed = subprocess.run(
        ["git", "-C", str(HOUSE), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    ).stdout
    files = (HOUSE / name for name in listed.decode().split("\0") if name)
    return [file for file in files if file.is_file()]


SOURCE = tracked()
PAGES = sorted(file for file in SOURCE if file.suffix == ".md")


def name_of(file: Path) -> str:
    return str(file.relative_to(HOUSE))


# --- commands --------------------------------------------------------------------------------------------


def blocks(text: str) -> list[str]:
    """What stands between fences, but for pictures and the like, which are marked as `text`."""
    found = re.findall(r"^```([a-z]*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return [block for language, block in found if language != "text"]


def commands(text: str) -> list[list[str]]:
    """The calls of our programs in fenced blocks, and those quoted in a line of text, as lists of words."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks(text) for line in block.replace("\\\n", " ").splitlines()]
    lines += [found.replace("\\|", "/") for found in re.findall(r"`([^`\n]+)`", prose)]
    parts = (part for line in lines for part in re.split(r"\s·\s|&&|\||;", line))
    return [words for part in parts if (words := call_in(part))]


def call_in(part: str) -> list[str] | None:
    """The words of a part of a line when it calls one of our programs, else None."""
    try:
        words = shlex.split(part.strip().removeprefix("$ "), comments=True)
    except ValueError:  # a lone quote: prose
        return None
    while words and (words[0] in ("sudo", "ssh", "HOST", ".") or re.match(r"[A-Z_]+=", words[0])):
        words = words[1:]
    if (
        not words
        or Path(words[0]).name not in PROGRAMS
        or (words[0] != Path(words[0]).name and "bin/" not in words[0])
    ):
        return None
    return [Path(words[0]).name, *words[1:]]


@cache
def equipped(program: str) -> click.Command:
    return console.equip(PROGRAMS[program])


def problem(words: list[str]) -> str | None:
    """What is wrong with a call, or None: its subcommands and its long options must exist."""
    command, rest = equipped(words[0]), list(words[1:])
    context = click.Context(command)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        if name == "…" or name.isupper() or "|" in name:
            return None
        below = command.get_command(context, name)
        if below is None:
            return f"`{' '.join(words)}`: there is no {name}"
        command = below
    known = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    for word in rest:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in known | {"--help"}:
            return f"`{' '.join(words)}`: there is no {option}"
    return None


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_a_page_names_exists(page: Path) -> None:
    found = [problem(words) for words in commands(page.read_text())]
    assert [each for each in found if each] == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        pytest.param("```\nrelease pusch\n```\n", True, id="a word that is no command"),
        pytest.param("```\n$ sudo agent run --supervize\n```\n", True, id="an option that is none"),
        pytest.param(
            "```\nrelease token create --role reader | agent enrol -\n```\n", True, id="behind a pipe"
        ),
        pytest.param("say `relfleet server walk` here", True, id="quoted in a line, under its other name"),
        pytest.param(
            "```\n.venv/bin/relfleet release push . --version 1.0.0  # why\n```\n",
            False,
            id="one that is right",
        ),
        pytest.param(
            "an `agent` and its `release`, and `agents` of /etc/agent", False, id="words of the language"
        ),
    ],
)
def test_a_command_that_does_not_exist_is_found(text: str, wrong: bool) -> None:
    assert any(problem(words) for words in commands(text)) is wrong


def hints(file: Path) -> list[str]:
    """What messages tell people to type next: the texts of `then=`, with a word for what is filled in."""
    calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
    given = (keyword.value for call in calls for keyword in call.keywords if keyword.arg == "then")
    return [text for value in given if (text := literal(value))]


def literal(value: ast.expr) -> str:
    if isinstance(value, ast.JoinedStr):
        return "".join(literal(part) if isinstance(part, ast.Constant) else "VALUE" for part in value.values)
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else ""


def test_every_command_that_a_message_tells_people_to_type_exists() -> None:
    modules = [file for file in SOURCE if file.suffix == ".py" and HOUSE / "tests" not in file.parents]
    begun = [hint for file in modules for hint in hints(file) if hint.split()[0] in PROGRAMS]
    assert len(begun) > 20
    wrong = [problem(words) for hint in begun if (words := call_in(re.split(r"[;,]", hint)[0]))]
    assert [each for each in wrong if each] == []


def leaves(command: click.Command, path: tuple[str, ...]) -> list[str]:
    if not isinstance(command, click.Group):
        return [] if command.hidden else [" ".join(path)]
    context = click.Context(command)
    below = [(name, command.get_command(context, name)) for name in command.list_commands(context)]
    return [leaf for name, each in below if each for leaf in leaves(each, (*path, name))]


def test_every_command_is_in_the_page_of_commands() -> None:
    page = (HOUSE / "docs" / "cli.md").read_text()
    own = [
        leaf for name in ("release", "release-server", "agent") for leaf in leaves(PROGRAMS[name], (name,))
    ]
    assert [leaf for leaf in own if f"`{leaf}" not in page] == []


def test_the_quick_start_stays_short() -> None:
    section = (HOUSE / "README.md").read_text().split("## Production quick start", 1)[1].split("\n## ", 1)[0]
    lines = [line for block in blocks(section) for line in block.replace("\\\n", " ").splitlines()]
    called = [line for line in lines if commands(f"```\n{line}\n```\n")]
    assert 1 <= len(called) <= MOST_IN_THE_QUICK_START


# --- links -----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked by."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.strip().replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page.parent / path if path else page
        if not there.exists() or (anchor and anchor not in anchors(there)):
            dead.append(target)
    assert dead == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [HOUSE / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        targets = re.findall(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)", page.read_text())
        waiting += [found for target in targets if (found := (page.parent / target).resolve()).is_file()]
    assert [name_of(page) for page in PAGES if page not in reached] == []


def test_every_test_that_the_page_of_claims_names_exists() -> None:
    page = (HOUSE / "docs" / "tested.md").read_text()
    tests = [file for file in SOURCE if HOUSE / "tests" in file.parents and file.suffix == ".py"]
    paths = {str(file) for file in tests}
    names = {name for file in tests for name in re.findall(r"def (test_\w+)", file.read_text())}
    quoted = re.findall(r"`([^`\n]+)`", page)
    files = [name for name in quoted if re.fullmatch(r"[\w/]+\.py", name)]
    claims = [name for name in quoted if name.startswith("test_") and not name.endswith(".py")]
    assert len(files) > 20
    assert [name for name in files if not any(path.endswith("/" + name) for path in paths)] == []
    begun = {name: name.rstrip("…") for name in claims}
    exact = [name for name in claims if name == begun[name] and name not in names]
    assert exact + [name for name in claims if not any(each.startswith(begun[name]) for each in names)] == []


# --- tests that pages name ---------------------------------------------------------------------------------

CASES = range(1, 37)
NOT_BUILT: set[int] = set()
"""Lines of the page that say so themselves."""


@cache
def known_tests() -> frozenset[str]:
    """The names of all test functions and modules."""
    modules = [file for file in SOURCE if file.suffix == ".py" and HOUSE / "tests" in file.parents]
    functions = re.compile(r"^ *(?:async )?def (test_\w+)", flags=re.MULTILINE)
    named = {name for file in modules for name in functions.findall(file.read_text())}
    return frozenset(named | {file.stem for file in modules})


def missing_tests(text: str) -> list[str]:
    """Tests that a page names and nobody wrote; `test_x_…` names all that begin so."""
    named = re.findall(r"\b(test_\w+)(…?)", text)
    known = known_tests()
    return [
        name
        for name, more in named
        if not (any(each.startswith(name) for each in known) if more else name in known)
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_names_tests_that_exist(page: Path) -> None:
    assert missing_tests(page.read_text()) == []


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        pytest.param("`test_a_page_names_tests_that_exist`", [], id="one that exists"),
        pytest.param("`test_docs.py`: `test_a_page_names_…`", [], id="a module, and a beginning"),
        pytest.param("`test_a_page_names_tests`", ["test_a_page_names_tests"], id="a name cut short"),
        pytest.param("`test_nobody_wrote_…`", ["test_nobody_wrote_"], id="a beginning of none"),
    ],
)
def test_a_test_that_does_not_exist_is_found(text: str, missing: list[str]) -> None:
    assert missing_tests(text) == missing


def test_the_runbook_names_tests_that_exist() -> None:
    page = (HOUSE / "docs" / "security.md").read_text()
    written = "".join(file.read_text() for file in (HOUSE / "tests").rglob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named
    assert {name for name in named if f"def {name}(" not in written} == set()


def test_what_the_runbook_says_to_type_is_typed_by_the_tests_that_a_row_names() -> None:
    """Each word of a command but names and files; the tests may have them apart, as options of a fixture."""
    page = (HOUSE / "docs" / "security.md").read_text()
    section = page.partition("## A key is stolen")[2].partition("\n## ")[0]
    texts, missing = texts_of_tests(set(re.findall(r"test_\w+", section))), set()
    for row in re.findall(r"^\| \*\*.*$", section, flags=re.MULTILINE):
        _, _, typed, tests, _ = re.split(r" ?\| ?", row)
        said = set().union(*(texts[name] for name in re.findall(r"test_\w+", tests)))
        for command in re.findall(r"`(release(?:-server)? [^`]*)`", typed):
            words = {word for word in command.split()[1:] if re.fullmatch(r"(--)?[a-z]+(-[a-z]+)*", word)}
            missing |= {(command, word) for word in words - said - {"key"}}
    assert missing == set()


def texts_of_tests(names: set[str]) -> dict[str, set[str]]:
    """What each of these tests says in quotes."""
    sources = (file.read_text() for file in (HOUSE / "tests").rglob("test_*.py"))
    wanted = re.compile(rf"^def ({'|'.join(names)})\(", flags=re.MULTILINE)
    nodes = (node for source in sources if wanted.search(source) for node in ast.parse(source).body)
    return {
        node.name: {inner.value for inner in ast.walk(node) if is_text(inner)}
        for node in nodes
        if isinstance(node, ast.FunctionDef) and node.name in names
    }


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_every_case_of_the_page_of_cases_names_a_test() -> None:
    page = (HOUSE / "docs" / "cases.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\| (.*) \|$", page, flags=re.MULTILINE)
    assert [int(number) for number, _ in rows] == list(CASES)
    assert {int(number) for number, named in rows if "test_" not in named} == NOT_BUILT


# --- what is made, and what is left undone ----------------------------------------------------------------


def test_the_page_of_settings_is_what_the_tables_say() -> None:
    page: str = runpy.run_path(str(HOUSE / "scripts" / "settings-doc"))["page"]()
    assert (HOUSE / "docs" / "settings.md").read_text() == page, "run scripts/settings-doc"


def test_nothing_in_the_source_is_left_undone() -> None:
    found = []
    for file in SOURCE:
        try:
            lines = file.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{name_of(file)}:{number}" for number, line in enumerate(lines, 1) if UNDONE.search(line)]
    assert found == []


def test_no_test_is_skipped_without_a_reason() -> None:
    tests = [file for file in SOURCE if file.suffix == ".py" and HOUSE / "tests" in file.parents]
    found = [f"{name_of(file)}:{line}" for file in tests for line in unreasoned(file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        pytest.param("@pytest.mark.skip\ndef test_a(): ...\n", [1], id="a bare mark"),
        pytest.param("@pytest.mark.xfail()\ndef test_a(): ...\n", [1], id="a mark that says nothing"),
        pytest.param("@pytest.mark.skipif(True)\ndef test_a(): ...\n", [1], id="a condition alone"),
        pytest.param("def test_a():\n    pytest.skip()\n", [2], id="a call that says nothing"),
        pytest.param(
            "@pytest.mark.skipif(True, reason='no IPv6 here')\ndef test_a(): ...\n", [], id="a reason"
        ),
    ],
)
def test_a_skip_without_a_reason_is_found(source: str, lines: list[int]) -> None:
    assert unreasoned(source) == lines


def unreasoned(source: str) -> list[int]:
    """Lines where a test is skipped, or expected to fail, and nobody says why."""
    tree = ast.parse(source)
    reasoned = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            said = {keyword.arg for keyword in node.keywords} & {"reason"}
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            if said or (node.args and name == "skip"):
                reasoned.add(id(node.func))
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("skip", "skipif", "xfail")
        and ast.unparse(node.value) in ("pytest", "pytest.mark")
        and id(node) not in reasoned
    ]
