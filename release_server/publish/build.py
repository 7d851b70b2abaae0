"""This module makes one archive of a product: the agent, what it needs, and the product itself.

The tree is `agent.py` (starts this version), `lib.zip` (relfleet's device half and what only that imports,
where nothing of it is machine code), `lib/` (the other distributions that it or the product imports),
`app/` (the product) and `licenses/` (of what is carried along). The same source in the same environment gives
the same bytes, wherever and whenever it is built: two people can compare what they built.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass, field
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from agent_core.archive import stored_zip
from agent_core.bundle import File, Index, host_platforms, pack, verify
from agent_core.errors import DiskError, MalformedError, NotFoundError, SettingsError, UsageError
from agent_core.health import Kind, parse_checks, weakness
from agent_core.hooks import NO_HOOKS, POST_ACTIVATE, PRE_ACTIVATE, Hooks, parse_hooks
from agent_core.wire import NAME, VERSION, Getter, ReleaseFacts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    Progress = Callable[[str, int, int], None]
    """Called with what begins now, how many steps are done, and how many there are."""

PROJECT_FILE = "relfleet.toml"
ARCHIVE_SUFFIX = ".tar.zst"
INDEX_SUFFIX = ".index.json"

DEVICE_PACKAGES = ("agent_core", "updater")
NEVER = (
    "__pycache__",
    "*.pyc",
    "*.pyi",
    "*.pth",
    ".git",
    ".hg",
    ".venv",
    ".mypy_cache",
    ".ruff_cache",
    ".DS_Store",
)
"""Left out of every bundle, in the product's source too."""

NOT_IN_LIB = ("*.c", "*.h", "*.pyx", "*.pxd", "py.typed", "tests", "test", "test_data")
"""Left out of every distribution that is carried along: nothing imports these."""

NOT_ON_LINUX = {
    "click": ("click/_winconsole.py",),
    "psutil": ("psutil/_ps[!lpu]*.py", "psutil/_psutil_[!l]*"),
    "watchdog": (
        "watchdog/observers/fsevents*.py",
        "watchdog/observers/kqueue.py",
        "watchdog/observers/read_directory_changes.py",
        "watchdog/observers/winapi.py",
    ),
}
"""What cannot be loaded on any device, by distribution."""

NOT_FOR_THE_AGENT = {
    "backports-zstd": ("backports/zstd/_cffi", "backports/zstd/tarfile.py", "backports/zstd/zipfile"),
    "cffi": ("cffi",),
    "click": ("click/testing.py",),
    "cryptography": (
        "cryptography/cobblestone.py",
        "cryptography/fernet.py",
        "cryptography/x509",
        "cryptography/hazmat/asn1",
        "cryptography/hazmat/primitives/kdf",
        "cryptography/hazmat/primitives/serialization/pkcs*.py",
        "cryptography/hazmat/primitives/twofactor",
        *(
            f"cryptography/hazmat/primitives/{name}.py"
            for name in ("cmac", "hmac", "hpke", "keywrap", "padding", "poly1305")
        ),
    ),
    "packaging": ("packaging",),
    "pycparser": ("pycparser",),
    "securesystemslib": ("*/test_*.py", "*/science.py"),
    # The agent fetches by `updater.transport`; `updater.without_urllib3` stands in for tuf's own client.
    "tuf": (
        "tuf/repository",
        "tuf/ngclient/_internal/proxy.py",
        "tuf/ngclient/requests_fetcher.py",
        "tuf/ngclient/urllib3_fetcher.py",
    ),
    "urllib3": ("urllib3",),
    "watchdog": (
        "watchdog/__main__.py",
        "watchdog/tricks",
        "watchdog/utils/echo.py",
        "watchdog/utils/process_watcher.py",
        "watchdog/watchmedo.py",
    ),
}
"""What the agent never loads of its own libraries: each file is one more to write, sync and read on every
host. What the product names in `vendor`, and what that needs, is carried whole. A test imports the rest."""

_METADATA = (".dist-info", ".egg-info")
LICENSE_FILES = ("licen[cs]e*", "copying*", "notice*", "authors*")

BOOTSTRAP = '''\
"""Starts this version: all it needs is beside it, and none of the host's packages can get in its way."""

import os
import sys

here = os.path.dirname(os.path.realpath(__file__))
sys.dont_write_bytecode = True
host = [entry for entry in sys.path if not entry.rstrip("/").endswith(("site-packages", "dist-packages"))]
sys.path[:] = [os.path.join(here, "lib.zip"), os.path.join(here, "lib"), *host]

if __name__ == "__main__":
    from agent_core.leaving import leave
    from updater.__main__ import main

    leave(main(sys.argv[1:]))
'''

COMPILE = """\
import importlib.util, json, py_compile, sys, warnings
warnings.simplefilter("ignore")
failed = {}
for path in json.load(sys.stdin):
    try:
        py_compile.compile(
            path, importlib.util.cache_from_source(path), path, doraise=True,
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
    except py_compile.PyCompileError as error:
        failed[path] = str(error.exc_value)
json.dump(failed, sys.stdout)
"""


# --- the project's file -----------------------------------------------------------------------------------


DELTAS, MOST_DELTAS = 3, 20


@dataclass(frozen=True)
class Project:
    """A product's `relfleet.toml`, read and checked.

    Attributes:
        directory: where the file stands; the paths in it are relative to this.
        source: the directory that becomes `app/`.
        overlays: for a version, directories laid over the source one after the other.
        vendor: distributions to carry along, as requirements; they must be installed where the build runs.
        exclude: glob patterns of what stays out of `app/`.
        gates, upgrade_from_seq, min_launcher: what the release says of itself when it is signed.
        deltas: from how many of the newest earlier releases `release push` makes deltas; 0 for none.
    """

    directory: Path
    product: str
    server: str | None
    source: str = "app"
    overlays: dict[str, tuple[str, ...]] = field(default_factory=dict)
    entry: tuple[str, ...] = ("{python}", "app/main.py")
    vendor: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    checks: tuple[dict[str, Any], ...] = ({"kind": "process"},)
    observe_s: float = 60
    boots: int = 3
    deadman_s: int = 120
    hooks: Hooks = NO_HOOKS
    gates: tuple[str, ...] = ()
    upgrade_from_seq: int = 0
    min_launcher: int = 1
    deltas: int = DELTAS


TABLES = {
    "product": {"name"},
    "server": {"url"},
    "build": {"source", "overlays", "entry", "vendor", "exclude"},
    "health": {"checks", "observe_s", "boots", "deadman_s"},
    "hooks": {"pre_activate", "post_activate"},
    "release": {"gates", "upgrade_from_seq", "min_launcher", "deltas"},
}


def read_project(directory: Path) -> Project:
    """Read `relfleet.toml` in `directory`.

    Raises:
        NotFoundError: there is none.
        SettingsError: it is not TOML, has a key nobody knows, or a value that cannot be.
        UsageError: its health rules could never see a fault.
    """
    path = directory / PROJECT_FILE
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"there is no {PROJECT_FILE} in {directory}", then="release init") from None
    except (ValueError, OSError) as error:
        raise SettingsError(f"{path} cannot be read", why=str(error)) from error
    _refuse_unknown(document, set(TABLES), PROJECT_FILE)
    for name, known in TABLES.items():
        _refuse_unknown(document.get(name, {}), known, name)
    try:
        project = _project(directory, Getter(document, PROJECT_FILE))
    except MalformedError as error:
        raise SettingsError(error.what, why=error.why, then=f"edit {path}") from error
    check_rules(project)
    return project


def _refuse_unknown(table: object, known: set[str], path: str) -> None:
    if not isinstance(table, dict):
        return  # the getter says so with the whole path
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            why = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise SettingsError(f"{path}.{key} is not a setting", why=why)


def _project(directory: Path, document: Getter) -> Project:
    product, server, build, health, release = (
        Getter(document.object(name, {}), name)
        for name in ("product", "server", "build", "health", "release")
    )
    overlays = Getter(build.object("overlays", {}), "build.overlays")
    return Project(
        directory=directory,
        product=product.text("name", form=NAME),
        server=server.optional_text("url"),
        source=build.text("source", "app"),
        overlays={version: overlays.texts(version) for version in overlays.mapping},
        entry=build.texts("entry", list(Project.entry)),
        vendor=build.texts("vendor", []),
        exclude=build.texts("exclude", []),
        checks=tuple(health.items("checks", list(Project.checks), most=32)),
        observe_s=health.number("observe_s", Project.observe_s),
        boots=health.integer("boots", Project.boots, high=100),
        deadman_s=health.integer("deadman_s", Project.deadman_s, low=1, high=86_400),
        hooks=parse_hooks(document.object("hooks", {}), "hooks"),
        gates=release.texts("gates", [], most=32),
        upgrade_from_seq=release.integer("upgrade_from_seq", 0),
        min_launcher=release.integer("min_launcher", 1),
        deltas=release.integer("deltas", DELTAS, high=MOST_DELTAS),
    )


def check_rules(project: Project) -> None:
    """Refuse health rules under which a fault could never show before the trial is committed.

    Raises:
        SettingsError: a check cannot be read.
        UsageError: `never-detects`, with the check and the seconds it takes to fail.
    """
    try:
        checks = parse_checks(list(project.checks), "health.checks")
    except MalformedError as error:
        raise SettingsError(error.what, why=error.why, then=f"edit {PROJECT_FILE}") from error
    if why := weakness(checks, project.observe_s, project.boots, project.deadman_s):
        then = f"change [health] in {PROJECT_FILE}"
        raise UsageError("the health rules are refused", why=why, then=then, reason="never-detects")


# --- building ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Built:
    """A bundle on a release manager's disk: the archive, and its index beside it."""

    archive: Path
    index_file: Path
    index: Index
    index_bytes: bytes
    sha256: str
    length: int

    @property
    def index_sha256(self) -> str:
        return sha256(self.index_bytes).hexdigest()

    def facts(
        self,
        seq: int,
        *,
        gates: tuple[str, ...] = (),
        upgrade_from_seq: int = 0,
        notes: str = "",
        barrier: bool = False,
    ) -> ReleaseFacts:
        """What the release keys will sign of this bundle."""
        return ReleaseFacts(
            product=self.index.product,
            version=self.index.version,
            seq=seq,
            platform=self.index.platform,
            index_sha256=self.index_sha256,
            index_length=len(self.index_bytes),
            unpacked=self.index.unpacked,
            files=len(self.index.files),
            gates=gates,
            upgrade_from_seq=upgrade_from_seq,
            min_launcher=self.index.min_launcher,
            notes=notes,
            barrier=barrier,
        )


def _silent(step: str, done: int, total: int) -> None:
    """Nobody watches."""


def build(
    project: Path,
    version: str,
    *,
    platform: str | None = None,
    entry: str | Sequence[str] | None = None,
    out: Path | None = None,
    progress: Progress = _silent,
) -> Built:
    """Make the bundle of one version.

    Args:
        project: the directory with `relfleet.toml`.
        version: of the product; overlays for it are laid over the source.
        platform: must be this host's best one, which is the default: what is carried along comes from here.
        entry: argv of the workload, instead of the project's; a text is split as a shell would.
        out: the directory for the two files; `dist` in the project otherwise.
        progress: called at the beginning of each step.

    Raises:
        UsageError: something cannot be built, with what to change.
    """
    plan = read_project(project)
    platform = _platform(platform)
    if not VERSION.fullmatch(version):
        raise UsageError(f"{version!r} is not a version", why="it begins with a digit and has no blanks")
    out = out or project / "dist"
    out.mkdir(parents=True, exist_ok=True)
    archive = out / f"{plan.product}-{version}-{platform}{ARCHIVE_SUFFIX}"
    with tempfile.TemporaryDirectory(prefix="relfleet-build-") as scratch:
        tree = Path(scratch) / "tree"
        progress("collect", 0, 3)
        (tree / "lib").mkdir(parents=True)
        (tree / "agent.py").write_text(BOOTSTRAP, encoding="utf-8")
        _copy_device(tree)
        product = _closure(plan.vendor)
        device = _closure(_base_requirements())
        unused = {name: NOT_FOR_THE_AGENT[name] for name in NOT_FOR_THE_AGENT.keys() - product.keys()}
        _copy_distributions({name: device[name] for name in device.keys() - product.keys()}, unused, tree)
        own = [top for top in (tree / "lib").iterdir() if top.is_dir() and not any(top.rglob("*.so"))]
        _copy_distributions(product, {}, tree)
        _copy_product(plan, version, tree)
        progress("compile", 1, 3)
        _compile(tree)
        _gather(own, tree / "lib.zip")
        progress("pack", 2, 3)
        files = pack(tree, archive)
        progress("done", 3, 3)
    index = Index(
        product=plan.product,
        version=version,
        platform=platform,
        entry=_program(shlex.split(entry) if isinstance(entry, str) else entry or plan.entry, "entry", files),
        files=files,
        health=_checks(plan.checks, files),
        observe_s=plan.observe_s,
        boots=plan.boots,
        deadman_s=plan.deadman_s,
        hooks=_hooks(plan.hooks, files),
        min_launcher=plan.min_launcher,
    )
    index_file = _index_file(archive)
    index_file.write_bytes(index.to_bytes())
    return open_bundle(archive)


def open_bundle(archive: Path, index_file: Path | None = None) -> Built:
    """Read what `build` wrote, in another process or on another machine; nothing is verified here.

    Args:
        archive: the `.tar.zst`.
        index_file: where its index is; beside it otherwise.

    Raises:
        NotFoundError: one of the two is missing.
        TrustError: `bad-index`.
    """
    index_file = index_file or _index_file(archive)
    digest = sha256()
    try:
        index_bytes = index_file.read_bytes()
        with archive.open("rb") as file:
            while chunk := file.read(2**20):
                digest.update(chunk)
    except FileNotFoundError as error:
        raise NotFoundError(f"there is no {error.filename}", then="release build") from error
    except OSError as error:
        raise DiskError(f"{archive} cannot be read", why=str(error)) from error
    index = Index.from_bytes(index_bytes)
    return Built(archive, index_file, index, index_bytes, digest.hexdigest(), archive.stat().st_size)


def verify_bundle(archive: Path, index: Path | None = None) -> Index:
    """Read a whole bundle as a device would, and believe nothing but the index.

    Raises:
        TrustError: `bad-index`, `bad-archive` or `digest-mismatch`.
    """
    built = open_bundle(archive, index)
    verify(archive, built.index)
    return built.index


def _index_file(archive: Path) -> Path:
    if not archive.name.endswith(ARCHIVE_SUFFIX):
        raise UsageError(f"{archive} is not a bundle", why=f"its name does not end in {ARCHIVE_SUFFIX}")
    return archive.with_name(archive.name.removesuffix(ARCHIVE_SUFFIX) + INDEX_SUFFIX)


def _platform(asked: str | None) -> str:
    best = host_platforms()[0]
    if asked not in (None, best):
        why = f"the libraries of this host are for {best}"
        raise UsageError(f"a bundle for {asked} cannot be built here", why=why, then="build on such a host")
    return best


def _checks(checks: Sequence[dict[str, Any]], files: Iterable[File]) -> tuple[dict[str, Any], ...]:
    """The checks, when the bundle holds the programs they name: one that cannot run has failed everywhere."""
    for check in parse_checks(list(checks), "health.checks"):
        if check.kind is Kind.EXEC:
            _program(check.argv, f"check {check.name!r}", files)
    return tuple(checks)


def _hooks(hooks: Hooks, files: Iterable[File]) -> Hooks:
    """The hooks, when the bundle holds the programs they name: a missing one would refuse the version."""
    for name, hook in ((PRE_ACTIVATE, hooks.pre_activate), (POST_ACTIVATE, hooks.post_activate)):
        if hook is not None:
            _program(hook.argv, f"hook {name}", files)
    return hooks


def _program(argv: Sequence[str], what: str, files: Iterable[File]) -> tuple[str, ...]:
    """An argv, when what it names is in the bundle; one of the host's programs has an absolute path."""
    modes = {file.path: file.mode for file in files}
    if not argv:
        raise UsageError(f"the {what} is empty", then='for example ["{python}", "app/main.py"]')
    script = argv[1] if argv[0] == "{python}" and len(argv) > 1 else argv[0]
    if script.startswith(("-", "{", "/")):
        return tuple(argv)
    if script not in modes:
        raise UsageError(f"the {what} names {script}", why="the bundle has no such file")
    if script == argv[0] and modes[script] != 0o755:
        raise UsageError(
            f"the {what} {script} cannot be run", why="it is not executable", then=f"chmod +x {script}"
        )
    return tuple(argv)


def _copy_product(plan: Project, version: str, tree: Path) -> None:
    for place in (plan.source, *plan.overlays.get(version, ())):
        source = plan.directory / place
        if not source.is_dir():
            raise NotFoundError(f"there is no directory {source}", why=f"{PROJECT_FILE} names it in [build]")
        _copy_tree(source, tree / "app", (*NEVER, *plan.exclude))
    if not (tree / "app").is_dir():
        raise UsageError(f"{plan.directory / plan.source} holds no files", why="there is nothing to run")


def _copy_tree(source: Path, target: Path, left_out: Sequence[str]) -> None:
    for path in sorted(_walk(source, left_out)):
        _copy(source / path, target / path)


def _walk(source: Path, left_out: Sequence[str], inside: str = "") -> Iterator[str]:
    with os.scandir(source / inside) as entries:
        for entry in entries:
            path = f"{inside}{entry.name}"
            if _matches(path, left_out):
                continue
            if entry.is_symlink():
                why = "a bundle holds regular files and directories only"
                raise UsageError(
                    f"{source / path} is a link", why=why, then="put a copy there, or exclude it"
                )
            if entry.is_dir():
                yield from _walk(source, left_out, f"{path}/")
            else:
                yield path


def _matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern fits the path, one of its parts, or a directory above it."""
    parts = path.split("/")
    above = ["/".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatch(name, pattern) for pattern in patterns for name in (*above, *parts))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755 if source.stat().st_mode & 0o100 else 0o644)


# --- what the device runs ---------------------------------------------------------------------------------


def _copy_device(tree: Path) -> None:
    """Relfleet's own device half, from wherever it is imported here: installed, editable or a checkout."""
    for name in DEVICE_PACKAGES:
        _copy_tree(_package(name), tree / "lib" / name, (*NEVER, *NOT_IN_LIB))
    if any(_imports_keys(path) for name in DEVICE_PACKAGES for path in (tree / "lib" / name).rglob("*.py")):
        _copy_tree(_package("keys"), tree / "lib" / "keys", (*NEVER, *NOT_IN_LIB))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise NotFoundError(f"relfleet's package {name} is not installed here", then="pip install relfleet")
    return Path(next(iter(spec.submodule_search_locations)))


def _imports_keys(path: Path) -> bool:
    return re.search(r"^\s*(from|import) keys\b", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def _base_requirements() -> list[str]:
    """What `pip install relfleet` brings, without extras: from the checkout when this is one."""
    beside = _package("agent_core").parent / "pyproject.toml"
    if beside.is_file():
        declared = tomllib.loads(beside.read_text(encoding="utf-8")).get("project", {})
        if declared.get("name") == "relfleet":
            return list(declared["dependencies"])
    return [text for text in _distribution("relfleet").requires or [] if "extra ==" not in text]


def _distribution(name: str) -> importlib.metadata.Distribution:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        why = "a bundle carries what is installed where it is built"
        raise NotFoundError(f"{name} is not installed here", why=why, then=f"pip install {name}") from None


def _closure(requirements: Iterable[str]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions named, and everything they need on this platform, by canonical name."""
    found: dict[str, importlib.metadata.Distribution] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [(text, "") for text in requirements]
    while waiting:
        text, extra = waiting.pop()
        try:
            wanted = Requirement(text)
        except InvalidRequirement as error:
            raise UsageError(f"{text!r} is not a requirement", why=str(error)) from error
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(wanted.name)
        if name not in found:
            found[name] = _distribution(wanted.name)
            if not wanted.specifier.contains(found[name].version, prereleases=True):
                why = f"{found[name].version} is installed"
                raise UsageError(f"{wanted} is needed", why=why, then=f"pip install '{wanted}'")
        for chosen in {"", *wanted.extras}:
            if (name, chosen) not in seen:
                seen.add((name, chosen))
                waiting += [(needed, chosen) for needed in found[name].requires or []]
    return dict(sorted(found.items()))


def _copy_distributions(
    closure: dict[str, importlib.metadata.Distribution], unused: dict[str, tuple[str, ...]], tree: Path
) -> None:
    for name, distribution in sorted(closure.items()):
        listed = distribution.files or []
        files = [file for file in listed if not file.is_absolute() and ".." not in file.parts]
        modules = [file for file in files if not file.parts[0].endswith(_METADATA)]
        if not any(file.suffix in (".py", ".so") for file in modules):
            why = "it is installed in editable mode, or has no list of its files"
            raise UsageError(f"{name} cannot be carried along", why=why, then=f"pip install --no-deps {name}")
        left_out = (*NEVER, *NOT_IN_LIB, *NOT_ON_LINUX.get(name, ()), *unused.get(name, ()))
        carried = [file for file in modules if not _matches(file.as_posix(), left_out)]
        for file in carried:
            _copy(Path(str(file.locate())), tree / "lib" / file.as_posix())
        for file in files if carried else ():
            if file not in modules and any(fnmatch(file.name.lower(), form) for form in LICENSE_FILES):
                _copy(Path(str(file.locate())), tree / "licenses" / name / file.name)


def _gather(packages: Iterable[Path], archive: Path) -> None:
    """Move compiled packages into one stored archive: every file of a version is written, synced and verified
    by itself on every host, and these would be two thirds of them.
    """
    members = {}
    for package in packages:
        for path in package.rglob("*"):
            name = path.relative_to(package.parent).as_posix()
            if path.suffix == ".pyc" or path.name == "__pycache__":
                continue
            if path.is_dir():
                members[f"{name}/"] = b""  # a package without an __init__.py is found by its directory
                continue
            members[name] = path.read_bytes()
            compiled = Path(importlib.util.cache_from_source(str(path)))
            if path.suffix == ".py" and compiled.exists():
                members[f"{name}c"] = compiled.read_bytes()
        shutil.rmtree(package)
    if members:
        archive.write_bytes(stored_zip(members))
        archive.chmod(0o644)


def _compile(tree: Path) -> None:
    """Compile every module in a fresh interpreter that no variable, hash seed or path of this one reaches.

    The `.pyc` files are never checked against their source (`unchecked-hash`): a stale one with an equal size
    and time cannot exist, and a read-only version needs no second look at each import.
    """
    modules = sorted(path.relative_to(tree).as_posix() for path in tree.glob("*/**/*.py"))
    compiled = subprocess.run(
        [sys.executable, "-s", "-S", "-P", "-B", "-c", COMPILE],
        input=json.dumps(modules),
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=tree,
        env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"},
        check=False,
    )
    if compiled.returncode != 0:
        raise UsageError("the bundle could not be compiled", why=compiled.stderr.strip()[-500:])
    for path, why in json.loads(compiled.stdout).items():
        if path.startswith("app/"):
            raise UsageError(f"{path} cannot be compiled", why=why)
