"""`release` as release managers type it: sign in, hold the ceremony, build, push, look."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from agent_core import bundle
from agent_core.errors import Exit, NotFoundError, SettingsError, TrustError, UsageError
from keys import ceremony, signers
from release_server.publish import profile
from release_server.publish.cli import COMMANDS, main
from release_server.publish.profile import Profiles, Project, Said, Stored, resolve
from tests.release_origin import PASSPHRASE, PRODUCT, TOKEN, Answer

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty home and an empty working directory, and nothing in the environment."""
    for name in list(os.environ):
        if name.startswith(("RELFLEET_", "XDG_", "CREDENTIALS_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    directory = tmp_path / "project"
    directory.mkdir()
    monkeypatch.chdir(directory)
    return tmp_path / "home"


@pytest.fixture
def run(capsys):
    """Runs `release` and returns its exit code, what it printed, and what it said."""

    def call(*words):
        code = main([str(word) for word in words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.fixture
def signed_in(origin, run, monkeypatch):
    monkeypatch.setenv("RELFLEET_TOKEN", TOKEN)
    assert run("login", origin.url)[0] == Exit.DONE
    monkeypatch.delenv("RELFLEET_TOKEN")
    monkeypatch.setenv("RELFLEET_PASSPHRASE", PASSPHRASE)
    return origin


@pytest.fixture
def cheap(monkeypatch):
    """Keys that open fast: the ceremony is the real one, only scrypt is asked for less."""
    create = signers.create
    monkeypatch.setattr(signers, "create", lambda *words, **how: create(*words, **{**how, "scrypt_n": 2**4}))


@pytest.fixture
def ready(signed_in, cheap, run):
    """Signed in, and the ceremony held."""
    code, _, said = run("key", "gen")
    assert code == Exit.DONE, said
    return signed_in


# --- the root command ---


def test_help_loads_nothing_heavy_and_answers_at_once():
    program = (
        "import sys, time\n"
        "from release_server.publish.cli import main\n"
        "code = main(['--help'])\n"
        "heavy = {'requests', 'rich', 'tuf', 'cryptography', 'securesystemslib', 'urllib3', 'tomllib'}\n"
        "print(sorted(heavy & set(sys.modules)), time.process_time(), file=sys.stderr)\n"
        "sys.exit(code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    loaded, _, spent = done.stderr.strip().rpartition(" ")
    assert loaded == "[]"
    assert float(spent) < 0.4
    assert all(name in done.stdout for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_where_the_root_looks_for_it(run, name):
    code, out, said = run(name, "--help")
    assert code == Exit.DONE, said
    assert f"Usage: release {name}" in out
    assert "--server" in out
    assert "--json" in out


def test_a_mistyped_command_names_the_nearest(run):
    code, _, said = run("pusj")
    assert code == Exit.USAGE
    assert "'push'" in said


# --- signing in ---


def test_login_keeps_server_and_token_for_the_owner_only(origin, run, home):
    token_file = home.parent / "token"
    token_file.write_text(f"{TOKEN}\n")
    code, out, said = run("login", origin.url, "--token-file", token_file)
    assert (code, out) == (Exit.DONE, "ada  admin\n")
    assert "default" in said
    kept = home / ".config" / "relfleet" / "tokens" / "default"
    assert kept.read_text().strip() == TOKEN
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert TOKEN not in (home / ".config" / "relfleet" / "release.toml").read_text()
    assert TOKEN not in out + said
    code, out, _ = run("whoami", "--json")
    assert json.loads(out) == {"server": origin.url, "profile": "default", "name": "ada", "role": "admin"}


def test_a_token_comes_from_stdin(origin, run, tmp_path, monkeypatch):
    source = tmp_path / "piped"
    source.write_text(TOKEN + "\n")
    with source.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert run("login", origin.url, "--token-file", "-")[0] == Exit.DONE
    assert run("whoami")[0] == Exit.DONE


def test_a_token_in_the_place_of_its_file_is_not_repeated(origin, run):
    code, out, said = run("login", origin.url, "--token-file", TOKEN)
    assert (code, TOKEN in out + said) == (Exit.NOT_FOUND, False)
    assert "name a file that holds the token" in said


def test_a_token_is_not_kept_when_the_server_does_not_take_it(origin, run, home, monkeypatch):
    monkeypatch.setenv("RELFLEET_TOKEN", "wrong")
    assert run("login", origin.url)[0] == Exit.NOT_ALLOWED
    assert not (home / ".config").exists()


def test_login_without_a_token_or_a_person_says_what_to_use(origin, run):
    code, _, said = run("login", origin.url)
    assert code == Exit.NOT_ALLOWED
    assert "--token-file" in said


def test_logout_forgets(signed_in, run, home):
    assert run("logout")[0] == Exit.DONE
    assert list((home / ".config" / "relfleet" / "tokens").iterdir()) == []
    assert run("whoami")[0] == Exit.USAGE
    assert run("logout")[0] == Exit.NOT_FOUND


def test_no_server_at_all_is_a_usage_error(run):
    code, _, said = run("list", "--product", "p")
    assert code == Exit.USAGE
    assert "RELFLEET_SERVER" in said


# --- where values come from ---


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_the_server_comes_from_the_first_place_that_names_one(tmp_path):
    config = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    profiles = Profiles(tmp_path / "config" / "relfleet")
    profiles.save("default", Stored("https://config"), "config-token")
    here = tmp_path / "here"

    def server(words=Said(), environ=config):  # noqa: B008 - frozen
        return resolve(words, environ, here).server

    assert server() == "https://config"
    put(here / "relfleet.toml", '[server]\nurl = "https://project"')
    assert server() == "https://project"
    environ = {**config, "RELFLEET_SERVER": "https://environment"}
    assert server(environ=environ) == "https://environment"
    assert server(Said(server="https://flag/"), environ) == "https://flag"


def test_the_token_comes_from_the_first_place_that_has_one(tmp_path):
    config = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    Profiles(tmp_path / "config" / "relfleet").save("default", Stored("https://a"), "stored")
    put(tmp_path / "file", "from-file\n")
    put(tmp_path / "flag", "from-flag\n")
    environ = dict(config)
    assert resolve(Said(), environ, tmp_path).token == "stored"
    environ["RELFLEET_TOKEN"] = "from-variable"
    assert resolve(Said(), environ, tmp_path).token == "from-variable"
    environ["RELFLEET_TOKEN_FILE"] = str(tmp_path / "file")
    assert resolve(Said(), environ, tmp_path).token == "from-file"
    assert resolve(Said(token_file=str(tmp_path / "flag")), environ, tmp_path).token == "from-flag"
    assert resolve(Said(token_file="-"), environ, tmp_path, stdin=lambda: "piped\n").token == "piped"
    with pytest.raises(NotFoundError):
        resolve(Said(token_file=str(tmp_path / "none")), environ, tmp_path)
    with pytest.raises(UsageError):
        resolve(Said(token_file="-"), environ, tmp_path, stdin=lambda: "two words")


def test_a_stored_token_never_goes_to_a_server_it_was_not_stored_for(tmp_path):
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    profiles = Profiles(tmp_path / "config" / "relfleet")
    profiles.save("default", Stored("https://mine"), "secret")
    put(tmp_path / "relfleet.toml", '[server]\nurl = "https://evil.example"')
    assert resolve(Said(), environ, tmp_path).token is None
    assert resolve(Said(profile="default"), environ, tmp_path).token is None
    profiles.save("work", Stored("https://evil.example"), "theirs")
    assert resolve(Said(), environ, tmp_path).token == "theirs"


def test_a_profile_by_name(tmp_path):
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    profiles = Profiles(tmp_path / "config" / "relfleet")
    profiles.save("work", Stored("https://work", trust="/trust/root.json"), "w")
    found = resolve(Said(profile="work"), environ, tmp_path)
    assert (found.server, found.token, found.trust) == ("https://work", "w", Path("/trust/root.json"))
    assert resolve(Said(), {**environ, "RELFLEET_PROFILE": "work"}, tmp_path).token == "w"
    with pytest.raises(NotFoundError):
        resolve(Said(profile="wrok"), environ, tmp_path)


def test_keys_and_trust_have_their_places(tmp_path):
    environ = {"XDG_CONFIG_HOME": str(tmp_path / "c"), "XDG_STATE_HOME": str(tmp_path / "s")}
    found = resolve(Said(), environ, tmp_path)
    assert found.keys_dir == tmp_path / "c" / "relfleet" / "keys"
    assert found.trust == found.keys_dir / "root.json"
    assert found.state == tmp_path / "s" / "relfleet"
    environ |= {"RELFLEET_KEYS": "/usb/keys", "RELFLEET_TRUST": "/etc/root.json"}
    found = resolve(Said(), environ, tmp_path)
    assert (found.keys_dir, found.trust) == (Path("/usb/keys"), Path("/etc/root.json"))
    found = resolve(Said(), environ, tmp_path, keys_dir=Path("/k"), trust=Path("/t"))
    assert (found.keys_dir, found.trust) == (Path("/k"), Path("/t"))


def test_a_stored_token_that_others_can_read_is_refused(tmp_path):
    profiles = Profiles(tmp_path)
    profiles.save("default", Stored("https://a"), "secret")
    (tmp_path / "tokens" / "default").chmod(0o644)
    with pytest.raises(TrustError) as caught:
        profiles.token("default")
    assert caught.value.reason == "exposed"


@pytest.mark.parametrize("name", ["", "..", "../x", ".hidden", "a/b"])
def test_a_profile_name_is_never_a_path(tmp_path, name):
    with pytest.raises(UsageError):
        Profiles(tmp_path / "c").save(name, Stored("https://a"), "t")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("[serevr]\nurl = 'x'", "server"),
        ("[server]\nulr = 'x'", "server.url"),
        ("[product]\nnam = 'x'", "product.name"),
        ("[server]\nurl = 3", ""),
        ("server = 'x'", ""),
        ("not toml", ""),
    ],
)
def test_a_project_file_with_an_unknown_key_names_the_nearest(tmp_path, text, nearest):
    put(tmp_path / "relfleet.toml", text)
    with pytest.raises(SettingsError) as caught:
        Project.read(tmp_path)
    assert nearest in caught.value.then


def test_a_broken_profiles_file_is_a_settings_error(tmp_path):
    put(tmp_path / "release.toml", '[profiles.default]\ncolour = "red"')
    with pytest.raises(SettingsError):
        Profiles(tmp_path).all()


# --- init ---


def test_init_writes_a_file_that_build_can_read(run, monkeypatch):
    from release_server.publish.build import read_project

    code, out, _ = run("init", PRODUCT, "--server", "https://releases.example.org")
    assert (code, out) == (Exit.DONE, "relfleet.toml\n")
    project = read_project(Path())
    assert (project.product, project.server) == (PRODUCT, "https://releases.example.org")
    assert Project.read(Path()) == Project(PRODUCT, "https://releases.example.org")
    assert run("init", PRODUCT)[0] == Exit.CONFLICT
    assert run("init", "other", "--force")[0] == Exit.DONE
    assert Project.read(Path()) == Project("other", None)
    assert run("init", "Not A Name", "--force")[0] == Exit.USAGE


# --- keys ---


def test_key_gen_makes_keys_and_brings_root_and_targets_to_the_server(signed_in, run, home):
    code, out, said = run("key", "gen", "--json", "--trust-file", "trust.json")
    assert code == Exit.DONE, said
    answer = json.loads(out)
    assert answer["published"]
    assert (answer["root"]["version"], answer["root"]["threshold"]) == (1, 1)
    assert signed_in.root.signed.version == 1
    assert signed_in.targets.signed.version == 1
    ceremony.verify_root(ceremony.parse_root(Path("trust.json").read_bytes()))
    directory = home / ".config" / "relfleet" / "keys"
    assert sorted(path.name for path in directory.iterdir()) == [
        "release.key.json",
        "root.json",
        "root.key.json",
        "targets.json",
    ]
    assert json.loads((directory / "root.key.json").read_text())["private"]["n"] == signers.SCRYPT_N
    assert "offline" in said


def test_key_gen_again_changes_nothing(ready, run):
    before = ready.root, ready.targets
    code, out, _ = run("key", "gen", "--json")
    assert code == Exit.DONE
    assert not json.loads(out)["made"]
    assert (ready.root, ready.targets) == before


def test_key_gen_that_was_cut_short_is_finished_by_the_same_command(signed_in, cheap, run):
    signed_in.instead.append(Answer(507, b"{}", method="POST", path="/metadata/targets"))
    assert run("key", "gen")[0] == Exit.FAILED
    assert signed_in.targets is None
    code, out, _ = run("key", "gen", "--json")
    assert code == Exit.DONE
    assert json.loads(out)["published"]


def test_key_gen_never_begins_anew_on_a_server_that_has_a_root(ready, run, tmp_path):
    before = len(ready.seen)
    code, _, said = run("key", "gen", "--keys-dir", tmp_path / "others")
    assert code == Exit.CONFLICT
    assert "has a root already" in said
    assert not (tmp_path / "others").exists()
    assert {seen.method for seen in ready.seen[before:]} == {"GET"}


def test_key_gen_with_the_root_of_another_server_is_a_conflict(ready, run, cheap, tmp_path):
    online = tmp_path / "online.json"
    online.write_text(json.dumps(ready.online_keys.to_json()))
    there = tmp_path / "there"
    assert run("key", "gen", "--offline", "--online", online, "--keys-dir", there)[0] == Exit.DONE
    code, _, said = run("key", "gen", "--keys-dir", there)
    assert code == Exit.CONFLICT
    assert "another root" in said


def test_an_offline_ceremony_needs_no_server_and_is_brought_later(signed_in, cheap, run, tmp_path):
    online = tmp_path / "trust.json"
    online.write_text(json.dumps({"online": signed_in.online_keys.to_json(), "root_version": 0}))
    words = ["key", "gen", "--keys", "3", "--threshold", "2"]
    before = len(signed_in.seen)
    code, out, _ = run(*words, "--offline", "--online", online, "--json")
    assert code == Exit.DONE
    assert len(signed_in.seen) == before
    assert len(json.loads(out)["root"]["keys"]) == 3
    assert signed_in.root is None
    assert run(*words)[0] == Exit.DONE
    assert signed_in.root.signed.roles["root"].threshold == 2
    assert run("key", "gen", "--offline")[0] == Exit.USAGE


def test_a_threshold_above_the_keys_is_refused(signed_in, run):
    code, _, said = run("key", "gen", "--keys", "2", "--threshold", "3")
    assert code == Exit.USAGE
    assert "threshold 3" in said


def test_one_more_key_is_only_a_key(signed_in, cheap, run):
    code, out, _ = run("key", "gen", "--role", "release", "--name", "bob", "--json")
    assert code == Exit.DONE
    assert json.loads(out)["signs"] == []
    code, out, _ = run("key", "list")
    assert code == Exit.DONE
    assert "bob" in out
    assert run("key", "gen", "--role", "release", "--name", "bob")[0] == Exit.CONFLICT
    assert run("key", "gen", "--name", "bob")[0] == Exit.USAGE


def test_keys_need_a_passphrase_and_it_is_never_a_flag(signed_in, run, monkeypatch, tmp_path):
    monkeypatch.delenv("RELFLEET_PASSPHRASE")
    code, _, said = run("key", "gen")
    assert code == Exit.NOT_ALLOWED
    assert "--passphrase-file" in said
    assert run("key", "gen", "--passphrase", "x")[0] == Exit.USAGE
    file = tmp_path / "words"
    file.write_text(PASSPHRASE)
    assert run("key", "gen", "--role", "root", "--passphrase-file", file)[0] == Exit.DONE


# --- build, verify, push ---


def test_verify_checks_every_byte(run, make_bundle):
    archive = make_bundle()
    code, out, _ = run("verify", archive)
    assert code == Exit.DONE
    assert out.startswith("ok  ")
    body = bytearray(archive.read_bytes())
    body[-20] ^= 1
    archive.write_bytes(bytes(body))
    assert run("verify", archive)[0] == Exit.TRUST
    archive.with_name(archive.name.replace(".tar.zst", ".index.json")).unlink()
    assert run("verify", archive)[0] == Exit.NOT_FOUND


def test_push_then_list_and_show(ready, run, make_bundle, tmp_path):
    notes = tmp_path / "notes"
    notes.write_text("the first")
    code, out, said = run("push", make_bundle(), "--notes", notes, "--gate", "canary", "--barrier", "--json")
    assert code == Exit.DONE, said
    assert json.loads(out)["state"] == "published"
    assert "uploaded warehouse-agent-1.0.0" in said
    facts = next(target.custom for target in ready.targets.signed.targets.values() if target.custom)
    assert (facts["notes"], facts["gates"], facts["barrier"]) == ("the first", ["canary"], True)
    code, out, said = run("push", make_bundle())
    assert code == Exit.DONE
    assert "already" in said
    bundles = [{"platform": "any", "length": 5, "unpacked": 9, "sha256": "ab"}]
    reach = {"agents": 1, "cohorts": ["main"], "rollouts": ["r-2"]}
    for seq, version in ((1, "1.0.0"), (2, "1.1.0")):
        row = {"product": PRODUCT, "version": version, "seq": seq, "bundles": bundles, "reach": reach}
        ready.releases.append(row)
    code, out, _ = run("list", "--product", PRODUCT)
    assert code == Exit.DONE
    assert [line.split()[0] for line in out.splitlines()] == ["VERSION", "1.1.0", "1.0.0"]
    code, out, _ = run("show", "1.0.0", "--product", PRODUCT)
    assert code == Exit.DONE
    assert "PLATFORM" in out
    assert "1 agent, cohort main, rollout r-2" in out
    assert run("show", "9.9.9", "--product", PRODUCT)[0] == Exit.NOT_FOUND
    assert run("list")[0] == Exit.USAGE


def test_push_of_a_version_that_exists_exits_6(ready, run, make_bundle, tmp_path):
    assert run("push", make_bundle())[0] == Exit.DONE
    other = make_bundle(content=b"print('other')\n", into=tmp_path / "other")
    code, _, said = run("push", other)
    assert code == Exit.CONFLICT
    assert "version exists: warehouse-agent 1.0.0" in said


def test_push_takes_the_only_bundle_of_a_directory(ready, run, make_bundle):
    assert run("push")[0] == Exit.NOT_FOUND
    make_bundle("1.0.0", into=Path("dist"))
    assert run("push", "--dry-run")[0] == Exit.DONE
    assert ready.targets.signed.version == 1
    assert run("push")[0] == Exit.DONE
    make_bundle("1.1.0", into=Path("dist"))
    code, _, said = run("push", ".")
    assert code == Exit.USAGE
    assert "name the one to push" in said


def test_push_to_a_cohort_starts_a_rollout_once(ready, run, make_bundle):
    archive = make_bundle()
    code, out, said = run("push", archive, "--to", "eu-web", "--json")
    assert code == Exit.DONE, said
    assert json.loads(out)["rollout"]["name"] == "r-1"
    assert "release rollout status r-1 --watch" in said
    assert run("push", archive, "--to", "eu-web")[0] == Exit.DONE
    assert len(ready.rollouts) == 1


def test_push_without_a_trusted_root_says_where_it_comes_from(ready, run, make_bundle, tmp_path):
    code, _, said = run("push", make_bundle(), "--trust", tmp_path / "none.json")
    assert code == Exit.NOT_FOUND
    assert "--trust" in said


def test_push_with_the_wrong_passphrase_uploads_nothing(ready, run, make_bundle, monkeypatch):
    monkeypatch.setenv("RELFLEET_PASSPHRASE", "another passphrase")
    assert run("push", make_bundle())[0] == Exit.NOT_ALLOWED
    assert ready.calls("PATCH") == []


def test_build_and_push_a_product_from_its_source(ready, run, monkeypatch):
    assert run("init", PRODUCT)[0] == Exit.DONE
    Path("app").mkdir()
    Path("app/main.py").write_text("print('hello')\n")
    code, out, said = run("build", "--version", "1.0.0", "--json")
    assert code == Exit.DONE, said
    built = json.loads(out)
    assert Path(built["archive"]).name == f"{PRODUCT}-1.0.0-{bundle.host_platforms()[0]}.tar.zst"
    code, out, said = run("push")
    assert code == Exit.DONE, said
    assert built["sha256"] in out
    assert run("build", "--version", "not a version")[0] == Exit.USAGE


def test_no_command_prints_a_secret(ready, run, make_bundle):
    printed = ""
    for words in (["push", make_bundle()], ["key", "list", "-v"], ["whoami"], ["push", "-vv", make_bundle()]):
        printed += "".join(str(part) for part in run(*words))
    assert TOKEN not in printed
    assert PASSPHRASE not in printed


def test_the_profile_of_a_command_needs_no_context(tmp_path):
    assert profile.said() == Said()
    assert profile.current().name == "default"
    assert profile.config_dir({"XDG_CONFIG_HOME": "/x"}) == Path("/x/relfleet")
