"""A bundle holds all it needs, is the same wherever it is built, and is refused when it could not work."""

from __future__ import annotations

import json
import marshal
import shutil
import subprocess
import sys
import time
import zipfile
from hashlib import sha256
from pathlib import Path

import pytest

from agent_core.bundle import Index, host_platforms, unpack
from agent_core.errors import NotFoundError, SettingsError, TrustError, UsageError
from agent_core.hooks import Hook, Hooks
from release_server.publish import build as building
from release_server.publish.build import build, open_bundle, read_project, verify_bundle

REPOSITORY = Path(building.__file__).parents[2]
MINIMAL = """
[product]
name = "shop"
[build]
vendor = ["psutil"]
"""


def make_project(place, toml=MINIMAL, files=None):
    (place / "app").mkdir(parents=True)
    (place / "relfleet.toml").write_text(toml)
    for path, content in (files or {"main.py": "NAMES = {'b', 'a', 'c'}\nprint(sorted(NAMES))\n"}).items():
        (place / "app" / path).parent.mkdir(parents=True, exist_ok=True)
        (place / "app" / path).write_text(content)
    return place


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return build(make_project(tmp_path_factory.mktemp("one") / "shop"), "1.0.0")


@pytest.fixture(scope="module")
def version_dir(built, tmp_path_factory):
    into = tmp_path_factory.mktemp("device") / "version"
    unpack(built.archive, built.index, into)
    return into


# --- what is in it ----------------------------------------------------------------------------------------


def test_the_two_files_are_named_after_product_version_and_platform(built):
    platform = host_platforms()[0]
    assert built.archive.name == f"shop-1.0.0-{platform}.tar.zst"
    assert sorted(path.name for path in built.archive.parent.iterdir()) == [
        f"shop-1.0.0-{platform}.index.json",
        f"shop-1.0.0-{platform}.tar.zst",
    ]
    assert built.archive.parent.name == "dist"


def test_the_digests_are_those_of_the_files(built):
    assert built.sha256 == sha256(built.archive.read_bytes()).hexdigest()
    assert built.length == built.archive.stat().st_size
    assert built.index_sha256 == sha256(built.index_file.read_bytes()).hexdigest()
    assert open_bundle(built.archive) == built
    assert verify_bundle(built.archive, built.index_file) == built.index


def test_the_facts_to_sign_are_those_of_the_bundle(built):
    facts = built.facts(7, gates=("canary",), upgrade_from_seq=3, notes="words")
    assert (facts.product, facts.version, facts.platform, facts.seq) == (
        "shop",
        "1.0.0",
        host_platforms()[0],
        7,
    )
    assert (facts.index_sha256, facts.index_length) == (built.index_sha256, len(built.index_bytes))
    assert (facts.unpacked, facts.files) == (built.index.unpacked, len(built.index.files))
    assert (facts.gates, facts.upgrade_from_seq, facts.notes) == (("canary",), 3, "words")


def test_a_bundle_holds_agent_libraries_product_and_licences_and_nothing_else(built):
    tops = {file.path.partition("/")[0] for file in built.index.files}
    assert tops == {"agent.py", "lib", "lib.zip", "app", "licenses"}
    paths = {file.path for file in built.index.files}
    assert {"lib/cryptography/__init__.py", "lib/psutil/__init__.py", "app/main.py"} <= paths
    assert any(path.startswith("licenses/cryptography/") for path in paths)
    assert not [path for path in paths if path.startswith(("lib/release_server", "lib/flask", "lib/rich"))]
    assert not [
        path for path in paths if "dist-info" in path or "/tests/" in path or path.endswith((".pyi", ".c"))
    ]


def test_a_bundle_is_a_reasonable_size(built):
    assert built.length < 8_000_000
    assert built.index.unpacked < 28_000_000
    assert len(built.index.files) < 250


def test_what_is_nothing_but_python_is_one_file_with_sources_and_what_was_compiled_from_them(version_dir):
    with zipfile.ZipFile(version_dir / "lib.zip") as archive:
        names = set(archive.namelist())
    packages = {name.partition("/")[0] for name in names}
    assert packages >= {"agent_core", "updater", "tuf", "securesystemslib", "click", "watchdog"}
    assert {name for name in names if name.endswith(".pyc")} == {
        f"{name}c" for name in names if name.endswith(".py")
    }
    assert not [place for place in packages if (version_dir / "lib" / place).exists()]


IMPORT_ALL = """
import importlib, json, pathlib, runpy, sys, zipfile
before = set(sys.modules)  # what the .pth files of the environment load is not the bundle's doing
runpy.run_path(sys.argv[1] + "/agent.py")
import updater.without_urllib3
lib = pathlib.Path(sys.argv[1], "lib")
modules = [path.relative_to(lib) for path in lib.rglob("*.py")]
modules += [pathlib.Path(name) for name in zipfile.ZipFile(f"{lib}.zip").namelist() if name.endswith(".py")]
for path in sorted(modules):
    parts = path.with_suffix("").parts
    if parts[-1] != "__main__":
        importlib.import_module(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
key = ed25519.Ed25519PrivateKey.generate()
key.public_key().verify(key.sign(b"x"), b"x")
pem, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
for key in (key, ec.generate_private_key(ec.SECP256R1()), rsa.generate_private_key(65537, 2048)):
    serialization.load_pem_public_key(key.public_key().public_bytes(pem, form))
import psutil
psutil.Process().memory_info()
new = [module for name, module in sys.modules.items() if name not in before]
print(json.dumps({module.__name__: getattr(module, "__file__", None) for module in new}))
"""
NEEDED = [
    "updater.catalog",
    "tuf.api.metadata",
    "securesystemslib.signer",
    "psutil",
    "click",
    "watchdog.observers",
    "watchdog.observers.polling",
]


def test_a_bundle_needs_nothing_of_the_host_but_its_python_and_holds_no_module_that_cannot_be_loaded(
    version_dir,
):
    argv = [sys.executable, "-I", "-B", "-c", IMPORT_ALL, str(version_dir)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/", env={})
    assert done.returncode == 0, done.stderr
    loaded = {name: path for name, path in json.loads(done.stdout).items() if path}
    assert {"updater.stage", "agent_core.bundle", *NEEDED} <= set(loaded)
    foreign = {
        name: path
        for name, path in loaded.items()
        if not path.startswith((f"{version_dir}/lib/", f"{version_dir}/lib.zip/"))
    }
    assert not [path for path in foreign.values() if "site-packages" in path or str(REPOSITORY) in path]


def test_what_the_product_names_is_carried_whole(built, tmp_path):
    """The agent uses little of `packaging`; a product that asks for it gets it."""
    assert not [file for file in built.index.files if file.path.startswith("lib/packaging/")]
    project = make_project(tmp_path / "shop")
    text = (project / "relfleet.toml").read_text()
    (project / "relfleet.toml").write_text(text.replace('["psutil"]', '["psutil", "packaging"]'))
    paths = {file.path for file in build(project, "1.0.0").index.files}
    assert {"lib/packaging/version.py", "lib/packaging/markers.py"} <= paths


def test_the_agent_of_a_bundle_starts(version_dir):
    argv = [sys.executable, "-I", "-B", str(version_dir / "agent.py"), "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/", env={})
    assert done.returncode == 0, done.stderr
    assert "agent" in done.stdout


def test_running_a_version_writes_nothing_into_it(version_dir):
    before = sorted(str(path) for path in version_dir.rglob("*"))
    argv = [sys.executable, str(version_dir / "app" / "main.py")]
    subprocess.run(
        argv,
        check=True,
        capture_output=True,
        env={"PYTHONPATH": f"{version_dir}/app:{version_dir}/lib.zip:{version_dir}/lib"},
    )
    assert sorted(str(path) for path in version_dir.rglob("*")) == before


# --- the same wherever it is built ------------------------------------------------------------------------


def test_building_again_elsewhere_gives_the_same_bytes(built, tmp_path):
    begun = time.monotonic()
    project = make_project(tmp_path / "quite" / "another" / "place" / "shop")
    again = build(project, "1.0.0", out=tmp_path / "out")
    assert time.monotonic() - begun < 30
    assert changed_files(built.index, again.index) == []
    assert again.archive.read_bytes() == built.archive.read_bytes()
    assert again.index_bytes == built.index_bytes


def changed_files(one, other):
    return sorted({file.path for file in set(one.files) ^ set(other.files)})


def test_every_module_is_compiled_never_checked_again_and_names_itself_relatively(version_dir):
    tag = f".{sys.implementation.cache_tag}.pyc"
    for source in version_dir.glob("*/**/*.py"):
        relative = source.relative_to(version_dir).as_posix()
        compiled = source.parent / "__pycache__" / source.name.replace(".py", tag)
        raw = compiled.read_bytes()
        assert int.from_bytes(raw[4:8], "little") == 0b01, relative  # hash-based, and not to be checked
        assert marshal.loads(raw[16:]).co_filename == relative


def test_nothing_in_a_bundle_tells_where_it_was_built(built, version_dir):
    traces = [
        str(REPOSITORY).encode() + b"/",
        sys.prefix.encode() + b"/",
        str(built.archive.parents[1]).encode(),
    ]
    for path in version_dir.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [trace for trace in traces if trace in content], path


# --- product files ----------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch):
    """Builds of the product's own files only; what devices run is built once above."""
    monkeypatch.setattr(building, "_copy_device", lambda tree: None)
    monkeypatch.setattr(building, "_base_requirements", list)


APP_ONLY = '[product]\nname = "shop"\n'


def app_files(index):
    return [file.path for file in index.files if "__pycache__" not in file.path]


def test_excluded_files_and_caches_stay_out(quick, tmp_path):
    files = {
        "main.py": "",
        "notes.txt": "",
        "data/kept.json": "",
        "data/left.tmp": "",
        "secret/key": "",
        "__pycache__/main.cpython-39.pyc": "stale",
        ".git/config": "",
    }
    toml = APP_ONLY + '[build]\nexclude = ["*.tmp", "secret", "notes.txt"]\n'
    found = build(make_project(tmp_path / "p", toml, files), "1.0.0")
    assert app_files(found.index) == ["agent.py", "app/data/kept.json", "app/main.py"]


def test_overlays_are_laid_over_the_source_for_their_version_only(quick, tmp_path):
    toml = APP_ONLY + '[build.overlays]\n"1.1.0" = ["more"]\n"1.2.0" = ["more", "most"]\n'
    project = make_project(tmp_path / "p", toml, {"main.py": "0"})
    for name, content in {"more/main.py": "1", "more/new.py": "1", "most/new.py": "22"}.items():
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text(content)

    def sizes(version):
        index = build(project, version).index
        return {file.path: file.sha256 for file in index.files if file.path in ("app/main.py", "app/new.py")}

    zero, one, two = (sha256(text).hexdigest() for text in (b"0", b"1", b"22"))
    assert sizes("1.0.0") == {"app/main.py": zero}
    assert sizes("1.1.0") == {"app/main.py": one, "app/new.py": one}
    assert sizes("1.2.0") == {"app/main.py": one, "app/new.py": two}


def test_modes_are_executable_or_not(quick, tmp_path):
    project = make_project(tmp_path / "p", APP_ONLY, {"main.py": "", "run": "#!/bin/sh\n"})
    (project / "app" / "run").chmod(0o700)
    (project / "app" / "main.py").chmod(0o666)
    found = build(project, "1.0.0", entry="app/run --fast 'two words'")
    assert {
        file.path: file.mode for file in found.index.files if file.path in ("app/run", "app/main.py")
    } == {
        "app/run": 0o755,
        "app/main.py": 0o644,
    }
    assert found.index.entry == ("app/run", "--fast", "two words")


def test_the_project_s_rules_reach_the_index(quick, tmp_path):
    toml = (
        APP_ONLY
        + """
[health]
observe_s = 20
boots = 2
deadman_s = 90
checks = [{kind = "process", interval_s = 1, grace_s = 0}]
[hooks]
pre_activate = {argv = ["{python}", "app/main.py", "--check"], timeout_s = 5}
post_activate = {argv = ["/bin/true"]}
[release]
min_launcher = 1
gates = ["canary"]
upgrade_from_seq = 4
"""
    )
    project = make_project(tmp_path / "p", toml)
    index = build(project, "1.0.0").index
    assert (index.observe_s, index.boots, index.deadman_s, index.min_launcher) == (20, 2, 90, 1)
    assert index.health == ({"kind": "process", "interval_s": 1, "grace_s": 0},)
    before = Hook(("{python}", "app/main.py", "--check"), 5)
    assert index.hooks == Hooks(before, Hook(("/bin/true",), 60))
    plan = read_project(project)
    assert (plan.gates, plan.upgrade_from_seq) == (("canary",), 4)


def test_a_hook_whose_program_is_not_in_the_bundle_is_refused(quick, tmp_path):
    project = make_project(tmp_path / "p", APP_ONLY + '[hooks]\npost_activate = {argv = ["app/migrate"]}\n')
    with pytest.raises(UsageError, match="hook post_activate names app/migrate"):
        build(project, "1.0.0")


@pytest.mark.parametrize("argv", [["app/check"], ["{python}", "app/check.py"]])
def test_a_check_whose_program_is_not_in_the_bundle_is_refused(quick, tmp_path, argv):
    check = f"[[health.checks]]\nkind = 'exec'\nname = 'sales'\nargv = {argv}\n"
    project = make_project(tmp_path / "p", APP_ONLY + check)
    with pytest.raises(UsageError, match="check 'sales' names app/check"):
        build(project, "1.0.0")


def test_progress_is_told_step_by_step(quick, tmp_path):
    told = []
    build(make_project(tmp_path / "p", APP_ONLY), "1.0.0", progress=lambda *step: told.append(step))
    assert told == [("collect", 0, 3), ("compile", 1, 3), ("pack", 2, 3), ("done", 3, 3)]


BROKEN = {
    "a link in the source": ({"main.py": ""}, {}, "is a link"),
    "an entry that is not there": ({"other.py": ""}, {}, "names app/main.py"),
    "a program that is not executable": ({"main.py": ""}, {"entry": "app/main.py"}, "not executable"),
    "an empty entry": ({"main.py": ""}, {"entry": " "}, "entry is empty"),
    "a syntax error": ({"main.py": "def"}, {}, "app/main.py cannot be compiled"),
    "another platform": ({"main.py": ""}, {"platform": "linux-riscv64-cp399"}, "cannot be built here"),
}


@pytest.mark.parametrize(("files", "options", "message"), BROKEN.values(), ids=BROKEN)
def test_what_could_not_run_is_not_built(quick, tmp_path, files, options, message):
    project = make_project(tmp_path / "p", APP_ONLY, files)
    if message == "is a link":
        (project / "app" / "x.py").symlink_to("main.py")
    with pytest.raises(UsageError, match=message):
        build(project, "1.0.0", **options)


@pytest.mark.parametrize("version", ["", "v1", "1/2", "1 2", "../1"])
def test_a_version_that_is_none_is_refused(tmp_path, version):
    with pytest.raises(UsageError, match="not a version"):
        build(make_project(tmp_path / "p"), version)


def test_a_source_without_files_is_refused(quick, tmp_path):
    project = make_project(tmp_path / "p", APP_ONLY)
    (project / "app" / "main.py").unlink()
    with pytest.raises(UsageError, match="holds no files"):
        build(project, "1.0.0")
    (project / "app").rmdir()
    with pytest.raises(NotFoundError, match="no directory"):
        build(project, "1.0.0")


# --- what is carried along --------------------------------------------------------------------------------


def test_a_distribution_that_is_not_installed_says_what_to_type(tmp_path):
    toml = APP_ONLY + '[build]\nvendor = ["no-such-distribution-anywhere"]\n'
    with pytest.raises(NotFoundError, match="pip install no-such-distribution-anywhere"):
        build(make_project(tmp_path / "p", toml), "1.0.0")


@pytest.mark.parametrize("requirement", ["psutil>9000", "psutil ==", "!"])
def test_a_requirement_that_cannot_be_met_is_refused(quick, tmp_path, requirement):
    toml = APP_ONLY + f'[build]\nvendor = ["{requirement}"]\n'
    with pytest.raises(UsageError):
        build(make_project(tmp_path / "p", toml), "1.0.0")


def test_the_closure_follows_dependencies_markers_and_extras():
    closure = building._closure(["tuf"])
    assert {"tuf", "securesystemslib", "urllib3"} <= set(closure)
    assert "pytest" not in building._closure(["psutil"])
    assert "cryptography" in building._closure(["securesystemslib[crypto]"])
    assert "cryptography" not in building._closure(["securesystemslib"])
    assert building._closure(["psutil; python_version < '3'"]) == {}


def test_the_base_requirements_are_those_without_extras():
    names = {text.split(">")[0].split("=")[0].split(";")[0] for text in building._base_requirements()}
    assert {"tuf", "psutil", "cryptography"} <= names
    assert not names & {"flask", "rich", "requests"}


def test_a_bundle_carries_urllib3_only_for_a_product_that_asks_for_it(tmp_path, version_dir):
    assert not (version_dir / "lib" / "urllib3").exists()
    wanted = building._closure(["urllib3"])
    building._copy_distributions(wanted, {}, tmp_path / "tree")
    assert (tmp_path / "tree" / "lib" / "urllib3" / "__init__.py").exists()


def test_an_editable_distribution_cannot_be_carried_along(tmp_path):
    info = tmp_path / "site" / "editable-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Name: editable\nVersion: 1.0\n")
    (info / "RECORD").write_text("editable.pth,,\neditable-1.0.dist-info/METADATA,,\n")
    found = building.importlib.metadata.PathDistribution(info)
    with pytest.raises(UsageError, match="editable mode"):
        building._copy_distributions({"editable": found}, {}, tmp_path / "tree")


# --- the project's file -----------------------------------------------------------------------------------

REFUSED = {
    "not TOML": ("[product", "cannot be read"),
    "no product": ("", "product.name"),
    "a product in capitals": ('[product]\nname = "Shop"\n', "product.name"),
    "a table misspelt": (APP_ONLY + "[biuld]\n", "did you mean build"),
    "a key misspelt": (APP_ONLY + '[build]\nvendors = ["x"]\n', "did you mean vendor"),
    "a table that is text": ('product = "shop"\n', "product is not acceptable"),
    "a source that is a list": (APP_ONLY + '[build]\nsource = ["app"]\n', "build.source"),
    "a hook nobody knows": (
        APP_ONLY + '[hooks]\nactivate = {argv = ["x"]}\n',
        "did you mean pre_activate",
    ),
    "a hook without a program": (APP_ONLY + "[hooks]\npre_activate = {}\n", "hooks.pre_activate.argv"),
    "an entry that is text": (APP_ONLY + '[build]\nentry = "app/main.py"\n', "build.entry"),
    "overlays that are text": (APP_ONLY + '[build.overlays]\n"1.1.0" = "more"\n', "overlays.1.1.0"),
    "a check nobody knows": (APP_ONLY + '[health]\nchecks = [{kind = "prayer"}]\n', "kind"),
    "a check with a misspelt key": (
        APP_ONLY + '[health]\nchecks = [{kind = "process", intervall_s = 1}]\n',
        "interval",
    ),
}


@pytest.mark.parametrize(("toml", "message"), REFUSED.values(), ids=REFUSED)
def test_a_project_file_that_is_wrong_says_where(tmp_path, toml, message):
    with pytest.raises(SettingsError) as error:
        read_project(make_project(tmp_path / "p", toml))
    assert message in str(error.value)


def test_without_a_project_file_the_next_command_is_named(tmp_path):
    with pytest.raises(NotFoundError, match="release init"):
        read_project(tmp_path)


BLIND = {
    "observed shorter than a check needs": """
        observe_s = 5
        checks = [{kind = "process", interval_s = 5, timeout_s = 1, grace_s = 0}]""",
    "too many failures allowed": """
        observe_s = 10
        checks = [{kind = "process", interval_s = 2, failures_allowed = 9, grace_s = 0}]""",
    "the second of two checks": """
        observe_s = 5
        checks = [{kind = "process", interval_s = 1, timeout_s = 1}, {kind = "tcp", port = 80}]""",
    "no boots": "boots = 0",
    "no observation": "observe_s = 0",
    "no checks": "checks = []",
    "a slow start would be killed": "deadman_s = 10",
}


@pytest.mark.parametrize("rules", BLIND.values(), ids=BLIND)
def test_rules_that_never_detect_a_fault_are_refused(tmp_path, rules):
    project = make_project(tmp_path / "p", f"{APP_ONLY}[health]\n{rules}\n")
    for call in (lambda: read_project(project), lambda: build(project, "1.0.0")):
        with pytest.raises(UsageError) as error:
            call()
        assert error.value.reason == "never-detects"
    assert not (project / "dist").exists()


# --- verifying --------------------------------------------------------------------------------------------


@pytest.fixture
def copied(built, tmp_path):
    for path in (built.archive, built.index_file):
        shutil.copy(path, tmp_path)
    return tmp_path / built.archive.name, tmp_path / built.index_file.name


def test_one_changed_byte_is_found(copied):
    archive, index = copied
    raw = bytearray(archive.read_bytes())
    raw[len(raw) // 2] ^= 1
    archive.write_bytes(raw)
    with pytest.raises(TrustError):
        verify_bundle(archive, index)


def test_an_index_of_another_bundle_is_found(copied):
    archive, index = copied
    other = json.loads(index.read_bytes())
    other["files"][3]["sha256"] = "0" * 64
    index.write_bytes(Index.from_json(other).to_bytes())
    with pytest.raises(TrustError) as error:
        verify_bundle(archive)
    assert error.value.reason == "digest-mismatch"


@pytest.mark.parametrize("missing", [0, 1], ids=["archive", "index"])
def test_a_missing_half_is_named(copied, missing):
    copied[missing].unlink()
    with pytest.raises(NotFoundError) as error:
        verify_bundle(copied[0])
    assert copied[missing].name in str(error.value)


def test_a_file_of_another_kind_is_no_bundle(tmp_path):
    with pytest.raises(UsageError, match="not a bundle"):
        verify_bundle(tmp_path / "something.zip")
